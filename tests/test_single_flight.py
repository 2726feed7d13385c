"""Questions that many ask at once."""

from __future__ import annotations

import asyncio

import pytest
from leasehold.coordinator.single_flight import SingleFlight

pytestmark = pytest.mark.anyio


class Oracle:
    """Notes when it is asked; answers with the number of the question once it may."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may = asyncio.Semaphore(0)
        self.failure: Exception | None = None

    async def ask(self, name: str) -> int:
        self.asked.append(name)
        number = len(self.asked)
        await self.may.acquire()
        if self.failure is not None:
            raise self.failure
        return number


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_who_asks_while_a_question_is_under_way_shares_the_next_one() -> None:
    """Its answer must not be older than he is."""
    oracle = Oracle()
    ask = SingleFlight(oracle.ask)
    early = [asyncio.ensure_future(ask("a")) for _ in range(3)]
    await turns()
    late = [asyncio.ensure_future(ask("a")) for _ in range(100)]
    other = asyncio.ensure_future(ask("b"))
    await turns()
    assert oracle.asked == ["a", "b"], "names do not wait for each other"
    for _ in range(3):
        oracle.may.release()
    assert await asyncio.gather(*early) == [1] * 3
    assert await other == 2
    assert await asyncio.gather(*late) == [3] * 100
    assert "under_way=0" in repr(ask)


async def test_who_leaves_takes_nothing_from_the_others() -> None:
    oracle = Oracle()
    ask = SingleFlight(oracle.ask)
    one, two = asyncio.ensure_future(ask("a")), asyncio.ensure_future(ask("a"))
    await turns()
    one.cancel()
    await turns()
    oracle.may.release()
    assert await two == 1
    assert one.cancelled()


async def test_a_failure_is_told_to_all_who_wait_and_to_nobody_later() -> None:
    oracle = Oracle()
    ask = SingleFlight(oracle.ask)
    early = asyncio.ensure_future(ask("a"))
    await turns()
    late = asyncio.ensure_future(ask("a"))
    await turns()
    oracle.failure = OSError("down")
    oracle.may.release()
    for each in (early, late):
        with pytest.raises(OSError, match="down"):
            await each
    assert len(oracle.asked) == 1
    oracle.failure = None
    oracle.may.release()
    assert await ask("a") == 2
