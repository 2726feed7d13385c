"""What the pool does at its limits and after failures: whom it closes, what it does not try again at once, what it
counts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faults import eventually
from leasehold.pool import (
    CircuitOpen,
    HttpTarget,
    OpenFailed,
    PoolFull,
    PoolTimeout,
    SessionClosed,
    SessionPool,
    StdioTarget,
    Upstream,
)
from leasehold.pool import backoff as backoff_module
from leasehold.pool.backoff import Backoff
from leasehold.pool.borrowing import Want
from leasehold.pool.calls import request
from lending_pool import ANY, FILES, TARGET, LendingPool, at_rest, lending, turns

pytestmark = pytest.mark.anyio


# -- who makes room ----------------------------------------------------------------------------------------------------


async def test_shared_sessions_that_nobody_holds_make_room_the_longest_unused_first() -> None:
    """B2, B5: two conversations that are over do not keep everybody else waiting until they are idle for too long."""
    two = Upstream("two", TARGET, max_sessions=2)
    async with lending() as pool:
        for name in ("a", "b", "a"):
            (await pool.acquire(Want(two, affinity=name))).release()
        first = await pool.acquire(Want(two), timeout_s=5)
        assert pool.statistics().closed == {"evicted": 1}
        again = await pool.acquire(Want(two, affinity="a"), timeout_s=5)
        assert again.session.link is pool.links[0], "that of b had been unused for longer"
        with pytest.raises(PoolTimeout):
            await pool.acquire(Want(two, affinity="c"), timeout_s=0.05)
        waiter = asyncio.create_task(pool.acquire(Want(two, affinity="c"), timeout_s=5))
        await eventually(lambda: pool.statistics().waiting == 1)
        again.release()  # nobody has it now
        (await waiter).release()
        first.release()
        await at_rest(pool)


async def test_idle_sessions_make_room_before_shared_ones() -> None:
    """B2"""
    two = Upstream("two", TARGET, max_sessions=2)
    async with lending() as pool:
        (await pool.acquire(Want(two, affinity="a"))).release()
        (await pool.acquire(Want(two))).release()
        (await pool.acquire(Want(two, principal="bob"), timeout_s=5)).release()
        borrow = await pool.acquire(Want(two, affinity="a"))
        assert borrow.session.link is pool.links[0]
        borrow.release()


async def test_a_shared_session_whose_opener_has_gone_makes_room_too() -> None:
    """B2, B3: nobody ever had it."""
    one = Upstream("one", TARGET, max_sessions=1)
    async with lending() as pool:
        pool.may_open.clear()
        opener = asyncio.create_task(pool.acquire(Want(one, affinity="a")))
        await eventually(lambda: pool.opening == 1)
        opener.cancel()
        pool.may_open.set()
        await eventually(lambda: pool.statistics().kept == 1)
        (await pool.acquire(Want(one), timeout_s=5)).release()
        await at_rest(pool)


async def test_a_shared_session_is_not_taken_from_who_opened_it_before_he_has_it() -> None:
    """B2: two conversations with room for one would take it from each other for ever."""
    one = Upstream("one", TARGET, max_sessions=1)
    async with lending() as pool:

        async def converse(name: str) -> None:
            for _ in range(20):
                borrow = await pool.acquire(Want(one, affinity=name), timeout_s=20)
                await turns(2)
                borrow.release()

        await asyncio.gather(converse("a"), converse("b"), converse("c"))
        assert pool.most_open == 1
        await at_rest(pool)


async def test_a_session_with_a_key_waits_for_the_room_that_an_idle_one_makes() -> None:
    """B5: it evicts, and is not refused all the same; and there is never one too many."""
    one = Upstream("one", TARGET, max_sessions=1)
    async with lending() as pool:
        (await pool.acquire(Want(one))).release()
        may_end = asyncio.Event()
        pool.links[0].closing = may_end.wait
        opening = asyncio.create_task(pool.open("key", one, "alice"))
        await turns(20)
        assert (len(pool.links), pool.opening) == (1, 0)
        may_end.set()
        session = await asyncio.wait_for(opening, 5)
        assert pool.most_open == 1
        assert pool.statistics().closed == {"evicted": 1}
        with pytest.raises(PoolFull, match="limit reached: 1 sessions of one"):
            pool.begin("another", one, "bob")
        session.close("idle")


async def test_callers_who_wait_for_one_shared_opening_count_as_waiting() -> None:
    """B5"""
    async with lending(max_waiting=2) as pool:
        pool.may_open.clear()
        callers = [asyncio.create_task(pool.acquire(Want(FILES, affinity="x"))) for _ in range(2)]
        await eventually(lambda: pool.statistics().waiting == 2)
        with pytest.raises(PoolFull, match="2 callers wait"):
            await pool.acquire(Want(FILES, affinity="x"))
        pool.may_open.set()
        for borrow in await asyncio.gather(*callers):
            borrow.release()
        assert pool.statistics().waiting == 0
        await at_rest(pool)


# -- what is not tried at once -----------------------------------------------------------------------------------------


async def test_what_is_kept_ready_and_ends_at_once_is_not_opened_again_and_again() -> None:
    """B11, B16: neither where it is lost as soon as it is open, nor where it cannot be opened."""
    async with lending() as pool:
        pool.prewarm(ANY, 1)
        for number in range(20):
            if len(pool.links) > number:
                pool.links[number].lose()
            await turns(20)
        assert len(pool.links) == 1
        pool.prewarm(ANY, 0)
    async with lending() as pool:
        pool.failure = OpenFailed("refused")
        pool.prewarm(ANY, 1)
        await eventually(lambda: pool.statistics().closed == {"open_failed": 1})
        for _ in range(50):
            pool._sweep()
            await turns(3)
        assert pool.statistics().closed == {"open_failed": 1}


def test_the_time_between_tries_doubles_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """B16: what fails together counts once, and what went well for long starts afresh."""
    now = 100.0
    monkeypatch.setattr(backoff_module, "monotonic", lambda: now)
    backoff, waits = Backoff(), []
    for _ in range(9):
        backoff.failed()
        backoff.failed()
        waits.append(backoff.remaining_s)
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    backoff.failed(lived_s=60)
    assert backoff.remaining_s == 0
    backoff.failed()
    assert backoff.remaining_s == 1


# -- what opens the circuit --------------------------------------------------------------------------------------------


async def test_a_process_that_dies_at_its_start_opens_the_circuit() -> None:
    """B16: that it was started says nothing."""
    upstream = Upstream("dies", StdioTarget("/bin/false"))
    async with SessionPool() as pool:
        for _ in range(5):
            with pytest.raises(OpenFailed):
                await pool.acquire(Want(upstream))
        with pytest.raises(CircuitOpen):
            await pool.acquire(Want(upstream))


async def test_a_server_that_is_gone_opens_the_circuit_of_calls_without_a_session() -> None:
    """B16: each call fails for itself."""
    async with SessionPool() as pool:
        link = pool.stateless(Upstream("gone", HttpTarget("http://127.0.0.1:1/mcp")))
        assert link is not None
        for number in range(5):
            with pytest.raises(OpenFailed):
                await link.post(*request(number, "tools/list"), [])
        with pytest.raises(CircuitOpen):
            await link.post(*request(6, "tools/list"), [])


async def test_a_process_that_dies_under_many_calls_counts_once(tmp_path: Path) -> None:
    """B16"""
    server = tmp_path / "server.sh"
    server.write_text(
        "read a\n"
        'echo \'{"jsonrpc":"2.0","id":"leasehold-initialize","result":{"protocolVersion":"2025-11-25",'
        '"capabilities":{},"serverInfo":{"name":"s","version":"1"}}}\'\n'
        "read a; for i in 1 2 3 4 5 6; do read a; done\n"
    )
    upstream = Upstream("s", StdioTarget("/bin/sh", (str(server),)))
    async with SessionPool() as pool:
        borrow = await pool.acquire(Want(upstream))
        link = borrow.session.link

        async def call(number: int) -> None:
            async for _ in (await link.post(*request(number, "tools/call"), [])).chunks:
                pass

        outcomes = await asyncio.gather(*(call(number) for number in range(6)), return_exceptions=True)
        assert all(isinstance(outcome, Exception) for outcome in outcomes)
        assert pool.statistics().breakers.upstreams["s"].failures == 1
        borrow.release()


# -- what it says of itself --------------------------------------------------------------------------------------------


async def test_a_pool_that_was_not_entered_says_so_and_an_empty_one_is_a_pool() -> None:
    """A mistake in the program is no full pool."""
    pool = LendingPool()
    assert pool
    for affinity in (None, "x"):
        with pytest.raises(RuntimeError, match="inside `async with`"):
            await pool.acquire(Want(FILES, affinity=affinity))
    async with pool:
        pass
    with pytest.raises(PoolFull, match="closing"):
        await pool.acquire(ANY)


async def test_the_parts_add_up_while_sessions_open_and_close() -> None:
    """A session counts in one place."""
    async with lending() as pool:
        pool.may_open.clear()
        keyed = pool.begin("key", FILES, "alice")
        lent = asyncio.create_task(pool.acquire(ANY))
        await eventually(lambda: pool.opening == 2)

        def adds_up() -> bool:
            now = pool.statistics()
            return now.sessions == now.idle + now.lent + now.kept + now.opening + now.closing

        assert (pool.statistics().opening, pool.statistics().kept) == (2, 0)
        assert adds_up()
        pool.may_open.set()
        borrow = await lent
        await keyed.wait_open()
        assert (pool.statistics().lent, pool.statistics().kept) == (1, 1)
        assert adds_up()
        keyed.close("idle")
        assert (pool.statistics().closing, pool.statistics().kept) == (1, 0)
        assert adds_up()
        borrow.release()


async def test_the_raw_face_of_a_shared_session_that_was_lost_goes_on_with_another() -> None:
    """B7: the call that finds out fails, the next one does not; others who hold it are told, too."""
    async with lending() as pool:
        want = {"affinity": "x"}
        async with pool.link(FILES, **want) as one, pool.link(FILES, **want) as other:
            pool.links[0].lose()
            for link in (one, other):
                with pytest.raises(SessionClosed):
                    await link.post(*request(link.next_id(), "ping"), [])
                await (await link.post(*request(link.next_id(), "ping"), [])).chunks.aclose()
            assert len(pool.links) == 2
        await at_rest(pool)


async def test_a_drain_costs_little_however_many_come_back() -> None:
    """B44"""
    upstream = replace(FILES, max_sessions=3_000)
    async with lending() as pool:
        borrows = [await pool.acquire(Want(upstream, principal=str(n), affinity="x")) for n in range(1_500)]
        draining = asyncio.create_task(pool.drain(60))
        await turns(2)
        begun = time.process_time()
        for borrow in borrows:
            borrow.release()
            await asyncio.sleep(0)
        assert await draining
        assert time.process_time() - begun < 5
