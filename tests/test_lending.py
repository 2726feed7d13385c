"""Lending: who gets a session, in which order, within which limits, and what becomes of it afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from faults import eventually
from leasehold.pool import Message, OpenFailed, PooledSession, PoolFull, Upstream, UpstreamLost
from leasehold.pool.borrowing import Borrow, Want
from leasehold.pool.errors import PoolTimeout, SessionReleased
from lending_pool import (
    ANY,
    FILES,
    ONE,
    SHARED,
    TARGET,
    THE_ONE,
    LendingPool,
    TalkingLink,
    at_rest,
    lending,
    turns,
)
from mcp import MCPError

pytestmark = pytest.mark.anyio


async def in_line(pool: LendingPool, count: int, want: Want = THE_ONE) -> list[asyncio.Task[Borrow]]:
    """So many callers, one after the other, who wait."""
    waiting = pool.statistics().waiting
    callers: list[asyncio.Task[Borrow]] = []
    for _ in range(count):
        callers.append(asyncio.create_task(pool.acquire(want)))
        waiting += 1
        await eventually(lambda: pool.statistics().waiting == waiting)  # noqa: B023
    return callers


# -- order -------------------------------------------------------------------------------------------------------------


async def test_a_release_wakes_the_next_waiter_at_once_in_order_of_arrival() -> None:
    """B2"""
    async with lending() as pool:
        borrow = await pool.acquire(THE_ONE)
        callers = await in_line(pool, 5)
        for i, caller in enumerate(callers):
            borrow.release()
            await turns(2)
            assert [other.done() for other in callers] == [True] * (i + 1) + [False] * (4 - i)
            borrow = caller.result()
        borrow.release()
        assert len(pool.links) == 1


async def test_nobody_gets_past_those_who_wait() -> None:
    """B2: not even in the very turn in which a session comes back."""
    async with lending() as pool:
        held = await pool.acquire(THE_ONE)
        (first,) = await in_line(pool, 1)
        held.release()
        second = asyncio.create_task(pool.acquire(THE_ONE))
        third = asyncio.create_task(pool.acquire(THE_ONE))
        (await first).release()
        (await second).release()
        (await third).release()
        await at_rest(pool)
        assert pool.statistics().waits == 3 + 1  # the first of all waited for its opening


async def test_a_waiter_whose_turn_has_come_and_who_left_in_that_turn_passes_the_session_on() -> None:
    """B2, B3"""
    async with lending() as pool:
        held = await pool.acquire(THE_ONE)
        first, second = await in_line(pool, 2)
        held.release()
        first.cancel()
        borrow = await asyncio.wait_for(second, 5)
        assert borrow.session is held.session
        borrow.release()


async def test_who_waits_for_room_is_not_passed_over_for_ever_by_those_who_came_later() -> None:
    """B2: sessions that some share among them are never idle; after one round of them somebody else has his turn."""
    async with lending(max_sessions=2) as pool:
        served = 0

        async def use_all_the_time() -> None:
            nonlocal served
            while not over.is_set():
                borrow = await pool.acquire(Want(FILES, principal="busy"))
                served += 1
                await turns(3)
                borrow.release()

        over = asyncio.Event()
        busy = [asyncio.create_task(use_all_the_time()) for _ in range(6)]
        await eventually(lambda: served > 10)
        for _ in range(3):
            before = served
            (await pool.acquire(Want(FILES, principal="other"), timeout_s=10)).release()
            assert served - before < 20
        before = served
        await eventually(lambda: served > before + 20)
        over.set()
        await asyncio.gather(*busy)
        await at_rest(pool)
        assert pool.most_open == 2


async def test_an_opening_that_fails_is_told_to_one_and_the_next_gets_a_new_try() -> None:
    """B2"""
    async with lending() as pool:
        pool.may_open.clear()
        first, second = await in_line(pool, 2)
        pool.failure = OpenFailed("refused")
        pool.may_open.set()
        with pytest.raises(OpenFailed, match="refused"):
            await first
        pool.failure = None
        (await second).release()
        await at_rest(pool)


async def test_an_opening_that_cannot_even_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """B3: nobody waits for what will never come."""
    async with lending() as pool:

        def broken(want: Want) -> PooledSession:
            raise OpenFailed("no more of these")

        monkeypatch.setattr(pool._lending, "_make", broken)
        for _ in range(3):
            with pytest.raises(OpenFailed, match="no more"):
                await pool.acquire(THE_ONE, timeout_s=5)
        await at_rest(pool)


# -- giving back -------------------------------------------------------------------------------------------------------


async def test_releasing_twice_is_a_no_op() -> None:
    """B4"""
    async with lending() as pool:
        first = await pool.acquire(ANY)
        first.release()
        second = await pool.acquire(ANY)
        assert second.session is first.session
        first.release()
        first.release(discard=True)
        assert (pool.statistics().lent, second.session.in_flight, second.session.is_closed) == (1, 1, False)
        second.release()
        await at_rest(pool)
        assert pool.statistics().idle == 1


async def test_a_session_that_was_given_back_is_of_no_use_to_who_had_it() -> None:
    """B23"""
    async with lending() as pool:
        async with pool.session(FILES) as session, pool.link(FILES) as link:
            await session.send_ping()
        message = Message("request", "ping", "1", {})
        for use in (session.send_ping(), session.call_tool("x"), link.post(message, b"", []), link.get([])):
            with pytest.raises(SessionReleased, match="given back"):
                await use
        borrow = await pool.acquire(ANY)
        borrow.release()
        with pytest.raises(SessionReleased):
            borrow.check()
        assert "released" in repr(borrow)
        assert link.is_closed
        assert sum(link.methods().count("ping") for link in pool.links) == 1


async def test_a_discarded_session_is_closed_and_its_upstream_told() -> None:
    """B1"""
    async with lending() as pool:
        borrow = await pool.acquire(ANY)
        borrow.release(discard=True)
        assert borrow.session.is_closed
        await borrow.session.wait_ended()
        assert pool.links[0].closed_by
        assert pool.statistics().closed == {"discarded": 1}
        again = await pool.acquire(ANY)
        assert again.session is not borrow.session
        again.release()


def _server_error(_link: TalkingLink, _message: Message) -> dict[str, Any]:
    return {"error": {"code": -32602, "message": "no such tool"}}


def _tool_error(_link: TalkingLink, _message: Message) -> dict[str, Any]:
    return {"result": {"content": [{"type": "text", "text": "it failed"}], "isError": True}}


def _broken(_link: TalkingLink, _message: Message) -> dict[str, Any]:
    raise UpstreamLost("the connection broke")


@pytest.mark.parametrize("answer", [_server_error, _tool_error])
async def test_an_application_error_keeps_the_session(answer: Any) -> None:
    """B6"""
    async with lending() as pool:

        async def once(link: TalkingLink, message: Message) -> dict[str, Any] | None:
            return answer(link, message) if message.method == "tools/call" else None

        pool.answer = once

        async def use() -> bool:
            async with pool.session(FILES) as session:
                return (await session.call_tool("x")).is_error

        if answer is _tool_error:
            assert await use()
        else:
            with pytest.raises(MCPError, match="no such tool"):
                await use()
        await at_rest(pool)
        assert (pool.statistics().idle, pool.statistics().closed) == (1, {})


@pytest.mark.parametrize("caught", [False, True])
async def test_a_transport_error_discards_the_session_even_where_it_was_caught(*, caught: bool) -> None:
    """B1, B6"""
    async with lending() as pool:

        async def breaks(link: TalkingLink, message: Message) -> dict[str, Any] | None:
            return _broken(link, message) if message.method == "tools/call" else None

        pool.answer = breaks
        with pytest.raises(MCPError, match="Connection closed: the connection broke"):  # noqa: PT012
            async with pool.session(FILES) as session:
                try:
                    await session.call_tool("x")
                except MCPError:
                    if not caught:
                        raise
            async with pool.session(FILES) as session:
                await session.call_tool("x")
        await at_rest(pool)
        assert pool.statistics().closed == {"discarded": 2 if caught else 1}


@pytest.mark.parametrize(
    "error", [ValueError, RuntimeError, BaseException, KeyboardInterrupt, SystemExit, asyncio.CancelledError]
)
@pytest.mark.parametrize("raw", [False, True])
async def test_any_other_exception_discards_the_session(error: type[BaseException], *, raw: bool) -> None:
    """B6: who was broken off may have left half a conversation."""
    async with lending() as pool:
        with pytest.raises(error):
            async with pool.link(FILES) if raw else pool.session(FILES):
                raise error
        await at_rest(pool)
        assert (len(pool), pool.statistics().closed) == (0, {"discarded": 1})


async def test_one_holder_of_a_shared_session_does_not_close_it_for_the_others() -> None:
    """B6"""
    async with lending() as pool:
        async with pool.session(ONE, affinity="a") as other:
            with pytest.raises(ValueError, match="mine"):
                async with pool.session(ONE, affinity="a"):
                    raise ValueError("mine")
            await other.send_ping()
        await at_rest(pool)
        assert (pool.statistics().kept, pool.statistics().closed) == (1, {})


async def test_a_session_whose_owner_task_has_died_frees_its_slot_on_release() -> None:
    """B1, B4"""
    async with lending() as pool:
        borrow = await pool.acquire(THE_ONE)
        (owner,) = [task for task in asyncio.all_tasks() if task.get_name().startswith("owner-")]
        owner.cancel()
        await borrow.session.wait_ended()
        assert borrow.session.is_closed
        (waiter,) = [asyncio.create_task(pool.acquire(THE_ONE))]
        second = await asyncio.wait_for(waiter, 5)
        borrow.release()
        assert second.session is not borrow.session
        second.release()
        await at_rest(pool)


async def test_an_owner_task_that_is_cancelled_before_it_began_leaves_nothing() -> None:
    """B3"""
    async with lending() as pool:
        caller = asyncio.create_task(pool.acquire(THE_ONE))
        while not (owners := [task for task in asyncio.all_tasks() if task.get_name().startswith("owner-")]):
            await asyncio.sleep(0)
        owners[0].cancel()
        with pytest.raises(OpenFailed):
            await caller
        await at_rest(pool)
        (await pool.acquire(THE_ONE)).release()


# -- limits ------------------------------------------------------------------------------------------------------------


async def test_idle_active_and_opening_sessions_count() -> None:
    """B5"""
    async with lending(max_sessions=3) as pool:
        mail = Want(Upstream("mail", TARGET))
        idle = await pool.acquire(mail)
        active = await pool.acquire(ANY)
        pool.may_open.clear()
        opening = asyncio.create_task(pool.acquire(ANY))
        await eventually(lambda: pool.opening == 1)
        with pytest.raises(PoolTimeout, match="no session of one came free within 0 s"):
            await pool.acquire(THE_ONE, timeout_s=0)
        assert pool.statistics().sessions == 3
        idle.release()
        waiter = asyncio.create_task(pool.acquire(THE_ONE))
        await idle.session.wait_ended()
        assert pool.statistics().closed == {"evicted": 1}, "an idle session of another upstream made room"
        pool.may_open.set()
        for borrow in (active, await opening, await waiter):
            borrow.release()
        assert pool.most_open == 3


async def test_limits_hold_per_upstream_and_per_principal() -> None:
    """B5"""
    upstream = Upstream("files", TARGET, max_sessions=3, max_sessions_per_principal=2)
    alice, bob = Want(upstream, principal="alice"), Want(upstream, principal="bob")
    async with lending() as pool:
        held = [await pool.acquire(alice), await pool.acquire(alice), await pool.acquire(bob)]
        for want in (alice, bob):
            with pytest.raises(PoolTimeout):
                await pool.acquire(want, timeout_s=0)
        held[2].release()
        with pytest.raises(PoolTimeout):
            await pool.acquire(alice, timeout_s=0.01)
        assert not held[2].session.is_closed, "its end would make no room for alice, who has her two"
        held[0].release()
        held[1].release()
        await at_rest(pool)


@pytest.mark.parametrize("how", ["discarded", "failed to open"])
async def test_what_takes_its_time_to_close_still_counts(how: str) -> None:
    """B5: there are never more processes than the limit says, whatever they do."""
    async with lending() as pool:
        let_go = asyncio.Event()

        async def slowly() -> None:
            await let_go.wait()

        async def answer(link: TalkingLink, message: Message) -> dict[str, Any] | None:
            link.closing = slowly
            return {"error": {"code": 1, "message": "no"}} if how == "failed to open" else None

        pool.answer = answer
        caller = asyncio.create_task(pool.acquire(THE_ONE))
        if how == "discarded":
            (await caller).release(discard=True)
        else:
            with pytest.raises(OpenFailed, match="refused to open a session: no"):
                await caller
        waiter = asyncio.create_task(pool.acquire(THE_ONE))
        await eventually(lambda: bool(pool.links[0].closed_by))
        await turns(10)
        assert (pool.opening, len(pool.links), pool.statistics().waiting) == (0, 1, 1)
        how = "discarded"
        let_go.set()
        (await waiter).release()
        assert pool.most_open == 1


async def test_the_queue_is_bounded_and_so_is_the_time_in_it() -> None:
    """B44"""
    async with lending(max_waiting=2, acquire_timeout_s=0.05) as pool:
        held = await pool.acquire(THE_ONE)
        callers = await in_line(pool, 2, THE_ONE)
        with pytest.raises(PoolFull, match="2 callers wait") as full:
            await pool.acquire(THE_ONE)
        assert not isinstance(full.value, PoolTimeout)
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PoolTimeout] * 2
        assert "within 0.05 s" in str(outcomes[0])
        now = pool.statistics()
        assert (now.refused, now.waiting) == (1, 0)
        assert now.longest_wait_s >= 0.04
        held.release()
        await at_rest(pool)


# -- sharing -----------------------------------------------------------------------------------------------------------


async def test_concurrent_first_calls_for_one_affinity_open_one_session() -> None:
    """B12"""
    async with lending() as pool:
        borrows = await asyncio.gather(*(pool.acquire(SHARED) for _ in range(20)))
        assert len({borrow.session for borrow in borrows}) == len(pool.links) == 1
        assert borrows[0].session.in_flight == 20
        for borrow in borrows:
            borrow.release()
        other = await pool.acquire(Want(FILES, affinity="conversation"))
        assert other.session is not borrows[0].session
        other.release()
        statistics = pool.statistics()
        assert (statistics.loans, statistics.opened, statistics.reused) == (21, 2, 19)


async def test_an_opening_that_fails_is_told_to_all_who_share_it_and_tried_again_by_the_next() -> None:
    """B12"""
    async with lending() as pool:
        pool.failure = OpenFailed("refused")
        outcomes = await asyncio.gather(*(pool.acquire(SHARED) for _ in range(3)), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["refused"] * 3
        pool.failure = None
        (await pool.acquire(SHARED)).release()
        assert len(pool.links) == 1


async def test_a_shared_session_that_was_lost_is_replaced_by_one() -> None:
    """B7, B12"""
    async with lending() as pool:
        first = await pool.acquire(SHARED)
        pool.links[0].lose()
        borrows = await asyncio.gather(*(pool.acquire(SHARED) for _ in range(5)))
        assert len({borrow.session for borrow in borrows}) == 1
        assert borrows[0].session is not first.session
        assert len(pool.links) == 2
        for borrow in (first, *borrows):
            borrow.release()
        await at_rest(pool)
        assert (pool.statistics().kept, pool.statistics().closed) == (1, {"lost": 1})
