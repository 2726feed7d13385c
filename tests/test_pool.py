"""The pool: limits, counts that always come back, idle sessions, and an end that is bounded."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from fake_link import FakeLink
from faults import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.pool import (
    HttpTarget,
    Link,
    OpenFailed,
    PooledSession,
    PoolFull,
    ResumeRecord,
    SessionPool,
    StdioTarget,
    Upstream,
)
from leasehold.pool import pool as pool_module
from leasehold.pool import session as session_module
from leasehold.pool.link import Fence

pytestmark = pytest.mark.anyio

TARGET = HttpTarget("http://127.0.0.1:1/mcp")
FILES = Upstream("files", TARGET, max_sessions=4, max_sessions_per_principal=2)
MAIL = Upstream("mail", TARGET)


class FakePool(SessionPool):
    """A pool whose links go nowhere; they open when `may_open` is set."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.links: list[FakeLink] = []
        self.opening = 0
        self.failure: Exception | None = None
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.ended: list[PooledSession] = []
        self.on_closed = self.ended.append

    async def _open_link(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        self.opening += 1
        try:
            await self.may_open.wait()
        finally:
            self.opening -= 1
        if self.failure is not None:
            raise self.failure
        self.links.append(FakeLink(resume=resume))
        return self.links[-1]


@asynccontextmanager
async def running(pool: SessionPool) -> AsyncGenerator[None]:
    """Run a pool; at the end all its sessions are closed, and nothing is counted any more."""
    task = asyncio.create_task(pool.run())
    await asyncio.sleep(0)
    yield
    pool.close()
    await asyncio.wait_for(task, 20)
    statistics = pool.statistics()
    assert (len(pool), statistics.sessions, statistics.in_flight) == (0, 0, 0)


# -- limits ------------------------------------------------------------------------------------------------------------


async def test_limits_hold_per_upstream_per_principal_and_in_all() -> None:
    """B5"""
    pool = FakePool(max_sessions=5)
    async with running(pool):
        await pool.open("1", FILES, "alice")
        await pool.open("2", FILES, "alice")
        with pytest.raises(PoolFull, match="per principal"):
            await pool.open("3", FILES, "alice")
        await pool.open("4", FILES, "bob")
        await pool.open("5", FILES, "carol")
        with pytest.raises(PoolFull, match="4 sessions of files"):
            await pool.open("6", FILES, "dave")
        await pool.open("7", MAIL, "alice")
        with pytest.raises(PoolFull, match="on this worker"):
            await pool.open("8", MAIL, "alice")
        assert len(pool) == 5
        assert pool.statistics().refused == 3
        assert pool.statistics().opened == 5


async def test_sessions_that_are_opening_or_closing_count() -> None:
    """B5"""
    pool = FakePool()
    async with running(pool):
        pool.may_open.clear()
        opening = [asyncio.create_task(pool.open(str(i), FILES, "alice")) for i in range(2)]
        await eventually(lambda: pool.opening == 2)
        with pytest.raises(PoolFull):
            await pool.open("3", FILES, "alice")
        pool.may_open.set()
        first, _ = await asyncio.gather(*opening)
        let_go = asyncio.Event()

        async def slowly() -> None:
            await let_go.wait()

        pool.links[0].closing = slowly
        first.close("client")
        await eventually(lambda: bool(pool.links[0].closed_by))
        with pytest.raises(PoolFull):
            await pool.open("4", FILES, "alice")
        let_go.set()
        await first.wait_ended()
        await pool.open("5", FILES, "alice")


async def test_a_session_that_is_continued_for_another_owner_is_not_refused_for_a_limit() -> None:
    """B27: its user has it already."""
    pool = FakePool()
    async with running(pool):
        for i in range(2):
            await pool.open(str(i), FILES, "alice")
        session = await pool.open("3", FILES, "alice", resume=ResumeRecord("up"))
        assert session.link.resume == ResumeRecord("up")
        statistics = pool.statistics()
        assert (statistics.opened, statistics.resumed, statistics.sessions) == (2, 1, 3)
        session.abandon("moved")


async def test_principals_that_have_gone_leave_no_trace() -> None:
    """B44"""
    pool = FakePool()
    async with running(pool):
        for i in range(50):
            session = await pool.open("key", FILES, f"principal {i}")
            session.close("client")
            await session.wait_ended()
        assert not pool._ledger._tally
        assert not pool._ledger.limits


# -- opening -----------------------------------------------------------------------------------------------------------


async def test_a_cancelled_opening_leaves_no_session_task_or_count() -> None:
    """B3"""
    pool = FakePool()
    async with running(pool):
        pool.may_open.clear()
        before = asyncio.all_tasks()
        for _ in range(3):  # one more than the principal's limit: nothing may be left behind
            opening = asyncio.create_task(pool.open("key", FILES, "alice"))
            await eventually(lambda: pool.opening == 1)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            await eventually(lambda: len(pool) == 0 and pool.opening == 0)
        await eventually(lambda: asyncio.all_tasks() == before)
        assert pool.links == []
        assert pool.statistics().closed == {"open_failed": 3}
        assert len(pool.ended) == 3


@pytest.mark.parametrize("turn", range(8))
async def test_an_opening_may_be_cancelled_at_any_point(turn: int) -> None:
    """B3"""
    pool = FakePool()
    async with running(pool):
        opening = asyncio.create_task(pool.open("key", FILES, "alice"))
        for _ in range(turn):
            await asyncio.sleep(0)
        opening.cancel()
        with suppress(asyncio.CancelledError):
            (await opening).close("client")
        await eventually(lambda: len(pool) == 0)
        assert all(link.closed_by for link in pool.links)


async def test_a_failed_opening_leaves_nothing() -> None:
    """B3"""
    pool = FakePool()
    async with running(pool):
        pool.failure = OpenFailed("refused")
        for _ in range(5):
            with pytest.raises(OpenFailed):
                await pool.open("key", FILES, "alice")
        await eventually(lambda: len(pool) == 0)
        pool.failure = None
        await pool.open("key", FILES, "alice")


async def test_a_command_that_cannot_be_started_is_an_open_failed() -> None:
    pool = SessionPool()
    async with running(pool):
        upstream = Upstream("none", StdioTarget("/does/not/exist"))
        with pytest.raises(OpenFailed):
            await pool.open("key", upstream, "alice")


async def test_a_pool_that_does_not_run_opens_nothing() -> None:
    pool = FakePool()
    with pytest.raises(RuntimeError, match="inside `async with`"):
        await pool.open("key", FILES, "alice")
    async with running(pool):
        await pool.open("key", FILES, "alice")
    with pytest.raises(PoolFull):
        await pool.open("key", FILES, "alice")
    assert pool.links[0].closed_by


# -- life and end ------------------------------------------------------------------------------------------------------


async def test_a_session_is_found_by_its_key_until_it_has_ended() -> None:
    pool = FakePool()
    async with running(pool):
        session = await pool.open("key", FILES, "alice")
        assert pool.get("key") is session
        assert pool.sessions() == [session]
        session.close("client")
        await session.wait_ended()
        assert pool.get("key") is None
        assert pool.ended == [session]
        assert pool.statistics().closed == {"client": 1}


async def test_a_lost_session_is_forgotten() -> None:
    """B1"""
    pool = FakePool()
    async with running(pool):
        session = await pool.open("key", FILES, "alice")
        pool.links[0].lose()
        await session.wait_ended()
        assert len(pool) == 0
        assert pool.statistics().closed == {"lost": 1}


async def test_a_session_that_is_replaced_is_closed_and_its_upstream_session_left_alone() -> None:
    """B13"""
    pool = FakePool()
    async with running(pool):
        old = await pool.open("key", FILES, "alice", resume=ResumeRecord("up"))
        new = await pool.open("key", FILES, "alice", resume=ResumeRecord("up"))
        await old.wait_ended()
        assert pool.get("key") is new
        assert not new.is_closed
        assert len(pool) == 1
        assert pool.links[0].closed_by
        assert pool.links[0].deleted == []
        new.abandon("moved")


async def test_idle_sessions_end_without_traffic_and_used_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """B11"""
    now = 0.0
    monkeypatch.setattr(session_module, "monotonic", lambda: now)
    monkeypatch.setattr(pool_module, "SWEEP_EVERY_S", 0.001)
    pool = FakePool()
    async with running(pool):
        idle = await pool.open("idle", FILES, "alice", resume=ResumeRecord("up"))
        used = await pool.open("used", FILES, "alice")
        recent = await pool.open("recent", FILES, "bob")
        with used:
            now = FILES.idle_ttl_s - 1
            with recent:
                pass
            now += 2
            await asyncio.wait_for(idle.wait_ended(), 5)
            assert idle.close_reason == "idle"
            assert pool.links[0].deleted, "the upstream is told"
            assert sorted(session.key for session in pool.sessions()) == ["recent", "used"]


async def test_the_end_of_the_pool_closes_every_session_and_cuts_openings_short() -> None:
    """B29"""
    pool = FakePool()
    async with running(pool):
        session = await pool.open("1", FILES, "alice", resume=ResumeRecord("up"))
        pool.may_open.clear()
        opening = asyncio.create_task(pool.open("2", FILES, "bob"))
        await eventually(lambda: pool.opening == 1)
    with pytest.raises(OpenFailed):
        await opening
    assert pool.links[0].deleted
    assert session.is_closed
    assert pool.statistics().closed == {"shutdown": 2}


async def test_a_pool_that_is_cancelled_closes_its_sessions_first() -> None:
    pool = FakePool()
    task = asyncio.create_task(pool.run())
    await asyncio.sleep(0)
    await pool.open("1", FILES, "alice")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.links[0].closed_by
    assert len(pool) == 0


async def test_the_end_of_the_pool_is_bounded_though_a_link_ignores_cancellation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """B14"""
    for module in (session_module, pool_module):
        monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", 0.02)
        monkeypatch.setattr(module, "CLOSE_GRACE_S", 0.02)
    pool = FakePool()
    let_go = asyncio.Event()

    async def stubborn() -> None:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    async with running(pool):
        await pool.open("1", FILES, "alice")
        await pool.open("2", FILES, "alice")
        pool.links[0].closing = stubborn
    assert pool.statistics().closed == {"shutdown": 2}
    assert "owners_left_behind count=1" in caplog.text
    let_go.set()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "resume", "cancel", "close", "abandon", "lose", "use", "fail", "hold", "let"]),
            st.integers(0, 5),
            st.sampled_from([FILES, MAIL]),
            st.sampled_from(["alice", "bob"]),
        ),
        max_size=25,
    )
)
async def test_counts_never_pass_the_limits_and_always_come_back(actions: list[tuple[str, int, Upstream, str]]) -> None:
    """B3, B4, B5: opening, cancelling, using, losing and closing in any order."""
    pool = FakePool(max_sessions=5)
    openings: list[asyncio.Task[PooledSession]] = []
    resumed = 0
    async with running(pool):
        for action, number, upstream, principal in actions:
            sessions = pool.sessions()
            match action:
                case "open":
                    openings.append(asyncio.create_task(pool.open(str(number), upstream, principal)))
                case "resume":
                    record = ResumeRecord("up")
                    openings.append(asyncio.create_task(pool.open(str(number), upstream, principal, resume=record)))
                    resumed += 1
                case "cancel" if openings:
                    openings[number % len(openings)].cancel()
                case "close" if sessions:
                    sessions[number % len(sessions)].close("client")
                case "abandon" if sessions:
                    sessions[number % len(sessions)].abandon("moved")
                case "lose" if pool.links:
                    pool.links[number % len(pool.links)].lose()
                case "use" if sessions:
                    with sessions[number % len(sessions)]:
                        await asyncio.sleep(0)
                case "fail":
                    pool.failure = None if pool.failure else OpenFailed("refused")
                case "hold":
                    pool.may_open.clear()
                case "let":
                    pool.may_open.set()
                case _:
                    await asyncio.sleep(0)
            assert len(pool) <= pool.max_sessions + resumed
            owners = Counter((session.upstream.name, session.principal) for session in pool.sessions())
            assert all(count <= 2 + resumed for (name, _), count in owners.items() if name == "files")
        for opening in openings:
            opening.cancel()
        outcomes = await asyncio.gather(*openings, return_exceptions=True)
        assert all(isinstance(one, PooledSession | PoolFull | OpenFailed | asyncio.CancelledError) for one in outcomes)
    begun = sum(pool.statistics().closed.values())
    assert len(pool.ended) == begun == len(set(map(id, pool.ended)))
    assert all(len(link.closed_by) == 1 for link in pool.links)
