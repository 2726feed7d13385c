"""B3: whatever is cancelled, at whatever turn of the loop: every count comes back; no task, session or link is left.

Each operation is begun anew for each turn it takes, cancelled at that turn, and the pool then looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from cancelling import cancelled_at
from leasehold.pool import Message, OpenFailed, PoolFull, SessionClosed
from leasehold.pool import session as session_module
from leasehold.pool.borrowing import Borrow, Want
from lending_pool import (
    ANY,
    FILES,
    ONE,
    SHARED,
    THE_ONE,
    LendingPool,
    TalkingLink,
    at_rest,
    lending,
    turns,
)
from mcp import MCPError

pytestmark = pytest.mark.anyio

MOST_TURNS = 200


async def cancelled_at_every_turn(
    operation: Callable[[LendingPool], Awaitable[object]],
    before: Callable[[LendingPool], Awaitable[object]] | None = None,
    after: Callable[[LendingPool], Awaitable[object]] | None = None,
) -> int:
    """Returns the number of turns. `before` prepares the pool, `after` says what must still work."""
    for count in range(MOST_TURNS):
        async with lending() as pool:
            if before is not None:
                await before(pool)
            task = asyncio.ensure_future(operation(pool))
            await turns(count)
            over = task.done()
            task.cancel()
            await asyncio.wait({task})
            if over:
                task.result()
            await at_rest(pool)
            if after is not None:
                await after(pool)
                await at_rest(pool)
        if over:
            return count
    raise AssertionError("it never ended")


async def works(pool: LendingPool) -> None:
    """All sessions that the limit allows can be had."""
    borrows = [await pool.acquire(ANY, timeout_s=5) for _ in range(FILES.max_sessions)]
    with pytest.raises(PoolFull):
        await pool.acquire(ANY, timeout_s=0)
    assert len({borrow.session for borrow in borrows}) == FILES.max_sessions
    for borrow in borrows:
        borrow.release()
    (await pool.acquire(THE_ONE, timeout_s=5)).release()


async def test_acquire_with_an_opening() -> None:
    async def acquire(pool: LendingPool) -> None:
        (await pool.acquire(THE_ONE)).release()

    assert await cancelled_at_every_turn(acquire, after=works) > 5


async def test_acquire_at_each_of_its_own_waits() -> None:
    """The same, counted by awaits of the caller instead of turns of the loop."""

    async def acquire(pool: LendingPool) -> None:
        async with pool.session(ONE) as session:
            await session.send_ping()

    for step in range(1, MOST_TURNS):
        async with lending() as pool:
            task = asyncio.ensure_future(_stepped(step, acquire(pool)))
            await asyncio.wait({task})
            await at_rest(pool)
            await works(pool)
            if not task.cancelled():
                task.result()
                break
    assert step > 4


async def _stepped(step: int, work: object) -> None:
    await cancelled_at(step, work)  # type: ignore[arg-type]


async def test_acquire_that_waits_and_the_next_one_in_line() -> None:
    """The session comes back while the first waiter is being cancelled: the second gets it, whatever happens (B2)."""
    for count in range(MOST_TURNS):
        async with lending() as pool:
            held = await pool.acquire(THE_ONE)
            first = asyncio.ensure_future(pool.acquire(THE_ONE))
            await turns(2)
            second = asyncio.ensure_future(pool.acquire(THE_ONE))
            await turns(2)
            assert pool.statistics().waiting == 2
            asyncio.get_running_loop().call_soon(held.release)
            await turns(count)
            over = first.done()
            first.cancel()
            await asyncio.wait({first})
            if over:
                first.result().release()
            borrow = await asyncio.wait_for(second, 5)
            assert borrow.session is held.session, "nothing was opened for it"
            borrow.release()
            await at_rest(pool)
        if over:
            break
    assert count > 0


async def test_acquire_that_makes_room_first() -> None:
    """An idle session of another principal is closed for it (B5)."""

    async def fill(pool: LendingPool) -> None:
        (await pool.acquire(Want(ONE, principal="bob"))).release()

    async def acquire(pool: LendingPool) -> None:
        (await pool.acquire(THE_ONE)).release()

    assert await cancelled_at_every_turn(acquire, before=fill, after=works) > 5


@pytest.mark.parametrize("healthy", [True, False])
@pytest.mark.parametrize("want", [THE_ONE, SHARED], ids=["alone", "shared"])
async def test_acquire_with_a_health_check(want: Want, monkeypatch: pytest.MonkeyPatch, *, healthy: bool) -> None:
    """B10: nor is a session whose check was broken off taken as checked."""
    now = 0.0
    monkeypatch.setattr(session_module, "monotonic", lambda: now)

    async def answer(_link: TalkingLink, message: Message) -> dict[str, object] | None:
        if message.method == "ping" and not healthy:
            raise SessionClosed("gone")
        return None

    async def age(pool: LendingPool) -> None:
        nonlocal now
        pool.answer = answer
        borrow = await pool.acquire(want)
        borrow.release()
        now += ONE.health_check_interval_s + 1
        assert borrow.session.idle_s > ONE.health_check_interval_s

    async def acquire(pool: LendingPool) -> None:
        (await pool.acquire(want)).release()

    async def is_checked(pool: LendingPool) -> None:
        borrow = await pool.acquire(want, timeout_s=5)
        first = pool.links[0]
        assert first.methods().count("ping") >= 1 or first.closed_by
        assert len(pool.open_links()) == 1
        assert (borrow.session.link is first) <= healthy
        borrow.release()

    assert await cancelled_at_every_turn(acquire, before=age, after=is_checked) > 2


async def test_a_typed_session_from_enter_to_exit() -> None:
    async def use(pool: LendingPool) -> None:
        async with pool.session(FILES) as session:
            await session.call_tool("anything")
            await session.list_tools()

    assert await cancelled_at_every_turn(use, after=works) > 10


async def test_a_raw_link_from_enter_to_exit() -> None:
    async def use(pool: LendingPool) -> None:
        async with pool.link(FILES) as link:
            message = Message("request", "ping", link.next_id(), {"jsonrpc": "2.0", "method": "ping"})
            async for _ in (await link.post(message, b"{}", [])).chunks:
                pass

    assert await cancelled_at_every_turn(use, after=works) > 5


async def test_the_first_of_several_who_share_a_session() -> None:
    """B12: the others get the one session all the same."""
    for count in range(MOST_TURNS):
        async with lending() as pool:
            first = asyncio.ensure_future(pool.acquire(SHARED))
            await turns(1)
            others = [asyncio.ensure_future(pool.acquire(SHARED)) for _ in range(3)]
            await turns(count)
            over = first.done()
            first.cancel()
            await asyncio.wait({first})
            borrows = [await other for other in others]
            assert len({borrow.session for borrow in borrows}) == 1
            assert len(pool.links) == 1
            for borrow in borrows:
                borrow.release()
            if over:
                first.result().release()
            await at_rest(pool)
            assert pool.statistics().kept == 1
        if over:
            break
    assert count > 5


async def test_all_of_several_who_share_a_session() -> None:
    """B12: what was opened for them is there for the next one."""
    for count in range(MOST_TURNS):
        async with lending() as pool:
            callers = [asyncio.ensure_future(pool.acquire(SHARED)) for _ in range(3)]
            await turns(count)
            over = all(caller.done() for caller in callers)
            for caller in callers:
                caller.cancel()
            await asyncio.wait(callers)
            for caller in callers:
                if not caller.cancelled():
                    caller.result().release()
            await at_rest(pool)
            (await pool.acquire(SHARED, timeout_s=5)).release()
            assert len(pool.links) == 1
            await at_rest(pool)
        if over:
            break
    assert count > 5


async def test_the_replacement_of_a_session_that_was_lost_before_its_first_call() -> None:
    """B7, B8: the call is moved to a fresh session, or cancelled on the way there."""

    async def gone_at_first(link: TalkingLink, message: Message) -> None:
        if message.method == "tools/call" and link.number == 0:
            link.lose()
            raise SessionClosed("the upstream has ended the session")

    async def prepare(pool: LendingPool) -> None:
        pool.answer = gone_at_first

    async def use(pool: LendingPool) -> None:
        async with pool.session(ONE) as session:
            await session.call_tool("anything")
        assert [link.methods().count("tools/call") for link in pool.links] == [1, 1]

    assert await cancelled_at_every_turn(use, before=prepare, after=works) > 15


async def test_calls_that_lose_a_session_together_get_one_replacement() -> None:
    """B3, B4: and none of them leaves a session behind, whichever is cancelled."""

    async def gone_at_first(link: TalkingLink, message: Message) -> None:
        if message.method == "tools/call" and link.number == 0:
            await asyncio.sleep(0)
            link.lose()
            raise SessionClosed("the upstream has ended the session")

    for count in range(MOST_TURNS):
        async with lending() as pool:
            pool.answer = gone_at_first
            async with pool.session(FILES) as session:
                calls = [asyncio.ensure_future(session.call_tool("anything")) for _ in range(3)]
                await turns(count)
                over = all(call.done() for call in calls)
                calls[0].cancel()
                await asyncio.wait(calls)
                assert not any(call.result().is_error for call in calls[1:])
                assert len(pool.links) == 2
            await at_rest(pool)
            await works(pool)
        if over:
            break
    assert count > 5


async def test_a_session_given_back_while_it_is_replaced() -> None:
    """B23: the replacement is not for who has gone."""
    async with lending() as pool:
        borrow = await pool.acquire(ANY)
        pool.may_open.clear()
        lost = borrow.session
        pool.links[0].lose()
        renewal = asyncio.ensure_future(pool._lending.renew(borrow, lost))
        await turns(5)
        borrow.release()
        pool.may_open.set()
        await asyncio.wait({renewal})
        assert "given back" in str(renewal.exception())
        await at_rest(pool)
        assert pool.statistics().idle == 1


async def test_a_drain_that_is_cancelled_and_one_that_is_not() -> None:
    async def drain(pool: LendingPool) -> None:
        assert await pool.drain(5)

    async def hold(pool: LendingPool) -> None:
        (await pool.acquire(ANY)).release()
        borrows = [await pool.acquire(ANY), await pool.acquire(SHARED)]

        async def give_back() -> None:
            for borrow in borrows:
                await turns(5)
                borrow.release()

        background.append(asyncio.ensure_future(give_back()))

    async def is_drained(pool: LendingPool) -> None:
        if not pool.statistics().sessions:  # it had begun
            for want in (ANY, SHARED):
                with pytest.raises(PoolFull):
                    await pool.acquire(want)

    background: list[asyncio.Future[None]] = []
    assert await cancelled_at_every_turn(drain, before=hold, after=is_drained) > 10


@pytest.mark.parametrize("how", ["acquire", "share", "prewarm", "session"])
async def test_a_pool_that_closes_at_any_turn_of_an_opening(how: str) -> None:
    """B3, B14: who waits is told; `lending` then finds nothing left."""
    for count in range(40):
        async with lending() as pool:

            async def use(pool: LendingPool = pool) -> None:
                async with pool.session(FILES) as session:
                    await session.send_ping()

            if how == "prewarm":
                pool.prewarm(ANY, 3)
            tasks = [
                asyncio.ensure_future(use() if how == "session" else pool.acquire(SHARED if how == "share" else ANY))
                for _ in range(0 if how == "prewarm" else 3)
            ]
            await turns(count)
        if not tasks:
            continue
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, Borrow | PoolFull | OpenFailed | MCPError), outcome
            if isinstance(outcome, Borrow):
                outcome.release()


async def test_a_thousand_who_are_cancelled_in_the_turn_in_which_a_session_comes_back() -> None:
    """B2, B3: a task group that ends takes all its callers with it; whoever is left is served."""
    async with lending(max_waiting=3000) as pool:
        held = await pool.acquire(THE_ONE)
        many = [asyncio.ensure_future(pool.acquire(THE_ONE)) for _ in range(2000)]
        await turns(2)
        last = asyncio.ensure_future(pool.acquire(THE_ONE))
        await turns(2)
        assert pool.statistics().waiting == 2001
        for caller in many:
            caller.cancel()
        held.release()
        (await asyncio.wait_for(last, 10)).release()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*many)
        await at_rest(pool)
