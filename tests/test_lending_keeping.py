"""Keeping house: what is checked before it is lent, what ends without being asked for, what is kept ready, the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from faults import eventually
from leasehold.pool import Message, OpenFailed, PoolFull, SessionPool, Upstream
from leasehold.pool import lending as lending_module
from leasehold.pool import pool as pool_module
from leasehold.pool import session as session_module
from leasehold.pool.borrowing import Borrow, Want
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

pytestmark = pytest.mark.anyio


class Clock:
    """The clock of idle times and ages."""

    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Stands still unless a test moves it; the pool looks at it all the time."""
    clock = Clock()
    monkeypatch.setattr(session_module, "monotonic", lambda: clock.now)
    monkeypatch.setattr(pool_module, "SWEEP_EVERY_S", 0.002)
    return clock


# -- health checks -----------------------------------------------------------------------------------------------------

STALE = FILES.health_check_interval_s + 1


async def test_a_session_used_a_moment_ago_is_not_checked(clock: Clock) -> None:
    """B10"""
    async with lending() as pool:
        (await pool.acquire(ANY)).release()
        clock.now += FILES.health_check_interval_s
        (await pool.acquire(ANY)).release()
        assert pool.links[0].methods().count("ping") == 0
        clock.now += STALE
        (await pool.acquire(ANY)).release()
        (await pool.acquire(ANY)).release()
        assert pool.links[0].methods().count("ping") == pool.statistics().health_checks == 1


async def test_an_unhealthy_session_is_replaced_before_anybody_gets_it(clock: Clock) -> None:
    """B10"""
    async with lending() as pool:
        (await pool.acquire(THE_ONE)).release()
        clock.now += STALE

        async def gone(link: TalkingLink, message: Message) -> dict[str, Any] | None:
            if message.method == "ping" and link.number == 0:
                return {"error": {"code": -32000, "message": "Connection closed"}}
            return None

        pool.links[0]._answer = gone
        borrow = await pool.acquire(THE_ONE)
        assert borrow.session.link is pool.links[1]
        assert pool.statistics().closed == {"unhealthy": 1}
        borrow.release()


@pytest.mark.parametrize("chain", [("ping", "skip"), ("ping", "list_tools", "skip")])
async def test_a_timeout_is_not_masked_by_a_later_step(clock: Clock, chain: tuple[str, ...]) -> None:
    """B10: `skip` least of all."""
    upstream = replace(FILES, name="frozen", health_check=chain, health_check_timeout_s=0.02)
    async with lending() as pool:
        (await pool.acquire(Want(upstream))).release()
        clock.now += STALE

        async def frozen(_link: TalkingLink, message: Message) -> None:
            await asyncio.Event().wait()

        first = pool.links[0]
        first._answer = frozen
        borrow = await pool.acquire(Want(upstream))
        assert borrow.session.link is pool.links[1]
        assert first.methods()[2:] == ["ping"]
        assert pool.statistics().closed == {"unhealthy": 1}
        borrow.release()


async def test_a_server_without_ping_is_asked_for_its_tools(clock: Clock) -> None:
    """B10"""
    upstream = replace(FILES, name="old", health_check=("ping", "list_tools"))
    async with lending() as pool:
        borrow = await pool.acquire(Want(upstream))
        borrow.release()
        clock.now += STALE

        async def old(_link: TalkingLink, message: Message) -> dict[str, Any] | None:
            return {"error": {"code": -32601, "message": "?"}} if message.method == "ping" else None

        pool.links[0]._answer = old
        again = await pool.acquire(Want(upstream))
        assert again.session is borrow.session
        assert pool.links[0].methods()[2:] == ["ping", "tools/list"]
        again.release()


async def test_several_who_want_a_shared_session_wait_for_one_check_and_get_one_replacement(clock: Clock) -> None:
    """B10, B12: nobody gets it unchecked because somebody else is checking it."""
    async with lending() as pool:
        (await pool.acquire(SHARED)).release()
        clock.now += STALE
        let_go = asyncio.Event()

        async def dies(link: TalkingLink, message: Message) -> dict[str, Any] | None:
            if message.method == "ping":
                await let_go.wait()
                return {"error": {"code": -32000, "message": "Connection closed"}}
            return None

        pool.links[0]._answer = dies
        callers = [asyncio.create_task(pool.acquire(SHARED)) for _ in range(5)]
        await eventually(lambda: "ping" in pool.links[0].methods())
        callers.append(asyncio.create_task(pool.acquire(SHARED)))
        await turns(5)
        assert not any(caller.done() for caller in callers)
        callers[0].cancel()
        let_go.set()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        borrows = [borrow for borrow in outcomes if isinstance(borrow, Borrow)]
        assert len(borrows) == 5
        assert {borrow.session.link for borrow in borrows} == {pool.links[1]}
        assert (len(pool.links), pool.links[0].methods().count("ping")) == (2, 1)
        for borrow in borrows:
            borrow.release()


# -- what ends by itself -----------------------------------------------------------------------------------------------


async def test_idle_sessions_end_without_traffic_and_borrowed_ones_do_not(clock: Clock) -> None:
    """B11"""
    async with lending() as pool:
        idle, held, shared = await pool.acquire(ANY), await pool.acquire(ANY), await pool.acquire(SHARED)
        idle.release()
        clock.now += FILES.idle_ttl_s - 1
        await asyncio.sleep(0.02)
        assert len(pool) == 3
        clock.now += 2
        await idle.session.wait_ended()
        assert pool.statistics().closed == {"idle": 1}
        assert not held.session.is_closed
        assert not shared.session.is_closed
        shared.release()
        held.release()
        clock.now += FILES.idle_ttl_s + 1
        await eventually(lambda: len(pool) == 0)
        assert pool.statistics().closed == {"idle": 3}


async def test_sessions_grow_no_older_than_their_maximum_and_not_all_the_same(clock: Clock) -> None:
    """B11: jittered, or all would be opened anew at once."""
    upstream = Upstream("young", TARGET, max_age_s=100.0, idle_ttl_s=1e9)
    want = Want(upstream)
    async with lending() as pool:
        borrows = [await pool.acquire(want) for _ in range(20)]
        lives = sorted(borrow.session.expires_at - clock.now for borrow in borrows)
        assert 90 <= lives[0] < lives[-1] <= 100
        assert len(set(lives)) > 10
        clock.now += 101
        for borrow in borrows[:10]:
            borrow.release()
        assert pool.statistics().closing == 10, "too old to be lent once more"
        await eventually(lambda: len(pool) == 10)
        assert pool.statistics().closed == {"max_age": 10}
        for borrow in borrows[10:]:
            borrow.release()
        await at_rest(pool)


async def test_a_session_that_is_too_old_is_not_lent_even_before_it_is_swept(clock: Clock) -> None:
    """B11"""
    upstream = Upstream("young", TARGET, max_age_s=100.0, health_check_interval_s=1e9)
    async with lending() as pool:
        first = await pool.acquire(Want(upstream))
        first.release()
        clock.now += 101
        second = await pool.acquire(Want(upstream))  # in the same turn: no sweep comes between
        assert second.session is not first.session
        second.release()


async def test_the_least_number_is_kept_ready_and_what_it_lost_is_replaced(clock: Clock) -> None:
    """B11: idle sessions of the least number do not end, unless they grow old or are lost."""
    async with lending() as pool:
        pool.prewarm(ANY, 3)
        await eventually(lambda: pool.statistics().idle == 3)
        clock.now += FILES.idle_ttl_s + 1
        await asyncio.sleep(0.02)
        assert pool.statistics().closed == {}
        pool.links[1].lose()
        await eventually(lambda: len(pool.links) == 4 and pool.statistics().idle == 3)
        pool.prewarm(ANY, 0)
        clock.now += FILES.idle_ttl_s + 1
        await eventually(lambda: len(pool) == 0)
        assert pool.statistics().closed == {"lost": 1, "idle": 3}


async def test_the_least_number_is_that_of_the_upstream_unless_said_otherwise_and_opens_no_more_than_allowed() -> None:
    """B5"""
    upstream = replace(FILES, name="ready", min_sessions=2)
    async with lending() as pool:
        pool.prewarm(Want(upstream))
        pool.prewarm(Want(replace(FILES, name="eager")), 50)
        await eventually(lambda: pool.statistics().idle == 2 + FILES.max_sessions)
        assert len(pool.links) == 2 + FILES.max_sessions
        borrow = await pool.acquire(Want(upstream))
        assert borrow.session.link in pool.links[: len(pool.links)]
        assert pool.statistics().opened == 2 + FILES.max_sessions
        borrow.release()


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_drain_waits_for_what_is_lent_and_refuses_the_rest() -> None:
    """B4: shared sessions included."""
    async with lending() as pool:
        held, shared = await pool.acquire(THE_ONE), await pool.acquire(Want(FILES, affinity="x"))
        (await pool.acquire(ANY)).release()
        waiter = asyncio.create_task(pool.acquire(THE_ONE))
        await eventually(lambda: pool.statistics().waiting == 1)
        draining = asyncio.create_task(pool.drain(5))
        with pytest.raises(PoolFull, match="closing"):
            await waiter
        for want in (ANY, THE_ONE, Want(FILES, affinity="x")):
            with pytest.raises(PoolFull, match="closing"):
                await pool.acquire(want)
        assert pool.statistics().idle == 0
        held.release()
        await turns(5)
        assert not draining.done()
        shared.release()
        assert await draining
        await eventually(lambda: len(pool) == 0)
        assert pool.statistics().closed == {"drained": 3}


async def test_a_drain_that_takes_too_long_says_so() -> None:
    """B14"""
    async with lending() as pool:
        held = await pool.acquire(THE_ONE)
        assert not await pool.drain(0.02)
        held.release()
        assert await pool.drain(5)


async def test_a_pool_that_was_drained_at_once_stays_so() -> None:
    """B4: its house-keeping has not begun by then."""
    async with LendingPool() as pool:
        assert await pool.drain(1)
        await turns(5)
        with pytest.raises(PoolFull):
            await pool.acquire(ANY)


@pytest.mark.parametrize("where", ["closing", "opening"])
async def test_the_end_is_bounded_though_a_link_ignores_cancellation(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """B14: a discarded session's slot is free again, and the pool ends."""
    for module in (session_module, pool_module, lending_module):
        monkeypatch.setattr(module, "CLOSE_GRACE_S", 0.02)
    for module in (session_module, pool_module):
        monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", 0.02)
    let_go = asyncio.Event()

    async def stubborn(*_: Any) -> None:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    async with LendingPool() as pool:
        if where == "closing":
            borrow = await pool.acquire(THE_ONE)
            pool.links[0].closing = stubborn
            borrow.release(discard=True)
            (await pool.acquire(THE_ONE, timeout_s=5)).release()
        else:
            monkeypatch.setattr(pool, "_open_link", stubborn)
            waiter = asyncio.create_task(pool.acquire(THE_ONE))
            await turns(5)
    if where == "opening":
        with pytest.raises(PoolFull, match="closing"):
            await waiter
    assert "owners_left_behind count=1" in caplog.text
    let_go.set()


async def test_a_caller_who_waits_for_a_check_when_the_pool_closes_is_told_and_not_cancelled(clock: Clock) -> None:
    """B3"""
    async with LendingPool() as pool:
        (await pool.acquire(SHARED)).release()
        clock.now += STALE

        async def frozen(_link: TalkingLink, _message: Message) -> None:
            await asyncio.Event().wait()

        pool.links[0]._answer = frozen
        waiter = asyncio.create_task(pool.acquire(SHARED))
        await eventually(lambda: "ping" in pool.links[0].methods())
    with pytest.raises(PoolFull):
        await waiter


# -- figures -----------------------------------------------------------------------------------------------------------


async def test_the_statistics_add_up(clock: Clock) -> None:
    """What was opened is there or was closed for a reason; what was lent was opened for it or used again."""
    async with lending(max_waiting=1) as pool:
        held = await pool.acquire(THE_ONE)
        waiter = asyncio.create_task(pool.acquire(THE_ONE))
        await eventually(lambda: pool.statistics().waiting == 1)
        with pytest.raises(PoolFull):
            await pool.acquire(THE_ONE)
        held.release()
        (await waiter).release()
        (await pool.acquire(ANY)).release(discard=True)
        pool.failure = OpenFailed("refused")
        with pytest.raises(OpenFailed):
            await pool.acquire(ANY)
        pool.failure = None
        clock.now += STALE
        (await pool.acquire(THE_ONE)).release()
        shared = [await pool.acquire(Want(FILES, affinity="x")) for _ in range(2)]
        await eventually(lambda: pool.statistics().closing == 0)
        now = pool.statistics()
        assert (now.sessions, now.idle, now.lent, now.kept, now.opening) == (2, 1, 0, 1, 0)
        assert (now.loans, now.reused, now.opened, now.refused) == (6, 3, 3, 1)
        assert now.closed == {"discarded": 1, "open_failed": 1}
        assert now.opened == now.sessions + now.closed["discarded"]
        assert now.waits == 5
        assert 0 < now.longest_wait_s <= now.wait_s
        assert (now.health_checks, now.in_flight, now.oldest_s) == (1, 2, STALE)
        for borrow in shared:
            borrow.release()


async def test_what_a_pool_says_of_itself_shows_counts_and_no_credentials() -> None:
    """B19"""
    async with lending() as pool:
        async with pool.session(ONE, headers={"authorization": "Bearer secret-token"}) as session:
            told = f"{pool!r} {session!r} {pool._lending!r} {pool.statistics()!r} {pool.sessions()!r}"
        assert "secret" not in told
        assert "sessions=1" in repr(pool)
        assert isinstance(pool, SessionPool)
