"""One session: its states as a table, and its owner task as the only one that opens and closes."""

from __future__ import annotations

import asyncio

import pytest
from fake_link import FakeLink
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.pool import HttpTarget, OpenFailed, ResumeRecord, SessionClosed, Upstream
from leasehold.pool import session as session_module
from leasehold.pool.session import TRANSITIONS, Event, PooledSession, State

pytestmark = pytest.mark.anyio

UPSTREAM = Upstream("files", HttpTarget("http://127.0.0.1:1/mcp"))


class Owned:
    """A session, its link and its owner task; the link opens when `may_open` is set."""

    def __init__(self, *, opens: bool = True, failure: Exception | None = None, resume: str | None = None) -> None:
        self.link = FakeLink(resume=ResumeRecord(resume, "2025-11-25") if resume else None)
        self.may_open = asyncio.Event()
        if opens:
            self.may_open.set()
        self.failure = failure
        self.opening = asyncio.Event()
        self.open_cancelled = False
        self.ended: list[PooledSession] = []
        self.session = PooledSession("key", UPSTREAM, "alice")
        self.owner = asyncio.create_task(self.session.own(self._open, self.ended.append))

    async def _open(self) -> FakeLink:
        self.opening.set()
        try:
            await self.may_open.wait()
        except asyncio.CancelledError:
            self.open_cancelled = True
            raise
        if self.failure is not None:
            raise self.failure
        return self.link

    async def gone(self) -> None:
        """Wait for the end, and check that nothing is left."""
        await asyncio.wait_for(self.session.wait_ended(), 5)
        await asyncio.wait_for(asyncio.wait({self.owner}), 5)
        assert self.session.state is State.CLOSED
        assert self.ended == [self.session]


# -- the table ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(Event), max_size=20))
def test_no_walk_through_the_table_leaves_closed_or_goes_back_to_ready(events: list[Event]) -> None:
    state, been = State.OPENING, [State.OPENING]
    for event in events:
        if (state, event) in TRANSITIONS:
            state = TRANSITIONS[state, event]
            been.append(state)
    order = [State.OPENING, State.READY, State.CLOSING, State.CLOSED]
    ranks = [order.index(one) for one in been]
    assert ranks == sorted(ranks)


def test_a_close_is_allowed_in_every_state_and_every_state_has_a_way_to_the_end() -> None:
    """B4"""
    for state in State:
        assert TRANSITIONS[state, Event.CLOSE] in (State.CLOSING, State.CLOSED)
    reached = {State.CLOSED}
    for _ in State:
        reached |= {start for (start, _), end in TRANSITIONS.items() if end in reached}
    assert reached == set(State)


@settings(max_examples=200, deadline=None)
@given(
    actions=st.lists(st.sampled_from(["let_open", "close", "abandon", "lose", "cancel_owner", "yield"]), max_size=8),
    fails=st.booleans(),
)
async def test_whatever_happens_to_a_session_it_ends_once_and_its_link_is_closed_once(
    actions: list[str], *, fails: bool
) -> None:
    """B3, B4"""
    owned = Owned(opens=False, failure=OpenFailed("no") if fails else None)
    session = owned.session
    opened = asyncio.ensure_future(session.wait_open())
    for action in actions:
        match action:
            case "let_open":
                owned.may_open.set()
            case "close":
                session.close("evicted")
            case "abandon":
                session.abandon("moved")
            case "lose":
                if session.state is State.READY:
                    owned.link.lose()
            case "cancel_owner":
                # A task that is cancelled before its first step never runs.
                await asyncio.sleep(0)
                owned.owner.cancel()
            case _:
                await asyncio.sleep(0)
    session.close("end")
    await owned.gone()
    (outcome,) = await asyncio.gather(opened, return_exceptions=True)
    assert outcome is None or isinstance(outcome, OpenFailed)
    assert len(owned.link.closed_by) <= 1
    assert session.is_closed
    with pytest.raises(SessionClosed):
        _ = session.link
    session.close("again")
    assert session.state is State.CLOSED


# -- opening -----------------------------------------------------------------------------------------------------------


async def test_a_session_is_of_no_use_before_it_is_open() -> None:
    """B23"""
    owned = Owned(opens=False)
    with pytest.raises(SessionClosed):
        _ = owned.session.link
    owned.may_open.set()
    await owned.session.wait_open()
    assert owned.session.link is owned.link
    assert not owned.session.is_closed
    owned.session.close("done")
    await owned.gone()


@pytest.mark.parametrize("failure", [OpenFailed("refused"), OSError("no such command"), RuntimeError("a bug")])
async def test_a_failure_to_open_is_told_to_the_opener_and_closes_the_session(failure: Exception) -> None:
    owned = Owned(failure=failure)
    with pytest.raises(OpenFailed):
        await owned.session.wait_open()
    await owned.gone()
    assert owned.session.close_reason == "open_failed"


async def test_an_opening_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "OPEN_TIMEOUT_S", 0.01)
    owned = Owned(opens=False)
    with pytest.raises(OpenFailed):
        await owned.session.wait_open()
    await owned.gone()
    assert owned.open_cancelled


async def test_a_close_cuts_an_opening_short() -> None:
    """B3"""
    owned = Owned(opens=False)
    await owned.opening.wait()
    owned.session.close("opener_left")
    await owned.gone()
    assert owned.open_cancelled
    assert owned.session.close_reason == "opener_left"
    assert owned.link.closed_by == []


async def test_an_opener_that_leaves_does_not_stop_the_opening_by_itself() -> None:
    owned = Owned(opens=False)
    waiting = asyncio.create_task(owned.session.wait_open())
    await owned.opening.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    owned.may_open.set()
    await owned.session.wait_open()
    owned.session.close("done")
    await owned.gone()


async def test_an_opener_is_told_when_the_owner_task_is_cancelled_and_is_not_cancelled_itself() -> None:
    owned = Owned(opens=False)
    waiting = asyncio.create_task(owned.session.wait_open())
    await owned.opening.wait()
    owned.owner.cancel()
    with pytest.raises(OpenFailed):
        await waiting
    await owned.gone()


# -- use and end -------------------------------------------------------------------------------------------------------


async def test_a_lost_link_closes_the_session_at_once() -> None:
    """B1"""
    owned = Owned(resume="up")
    await owned.session.wait_open()
    owned.link.lose()
    assert owned.session.is_closed, "known before the owner task runs"
    with pytest.raises(SessionClosed):
        _ = owned.session.link
    await owned.gone()
    assert owned.session.close_reason == "lost"
    assert owned.link.deleted == []


async def test_a_session_is_idle_from_the_end_of_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """B11"""
    now = 100.0
    monkeypatch.setattr(session_module, "monotonic", lambda: now)
    owned = Owned()
    now = 130.0
    assert owned.session.idle_s == 30
    with owned.session, owned.session:
        now = 200.0
        assert owned.session.in_flight == 2
        assert owned.session.idle_s == 0
    assert owned.session.in_flight == 0
    now = 205.0
    assert owned.session.idle_s == 5
    owned.session.close("done")
    await owned.gone()


async def test_a_session_opened_in_one_task_serves_others_and_survives_their_cancellation() -> None:
    """B21; IBM/mcp-context-forge 3737."""
    owned = Owned()
    await asyncio.create_task(owned.session.wait_open())

    async def use() -> None:
        with owned.session as session:
            _ = session.link
            await asyncio.Event().wait()

    users = [asyncio.create_task(use()) for _ in range(5)]
    while owned.session.in_flight < 5:
        await asyncio.sleep(0)
    for user in users:
        user.cancel()
    await asyncio.wait(users)
    assert owned.session.in_flight == 0
    assert owned.session.link is owned.link

    async def close() -> None:
        owned.session.close("by another task")

    await asyncio.create_task(close())
    await owned.gone()
    assert owned.link.closed_by == [owned.owner], "the owner task alone closes"


@pytest.mark.parametrize("reason", ["idle", "shutdown", "unregistered", "not_initialized"])
async def test_an_upstream_session_that_nobody_would_know_of_is_ended_upstream(reason: str) -> None:
    """B29"""
    owned = Owned(resume="up")
    await owned.session.wait_open()
    owned.session.close(reason)
    await owned.gone()
    assert owned.link.deleted == [[(b"mcp-protocol-version", b"2025-11-25")]]


@pytest.mark.parametrize("reason", ["client", "stateless", "replaced"])
async def test_an_upstream_session_that_has_ended_or_lives_on_is_left_alone(reason: str) -> None:
    owned = Owned(resume="up")
    await owned.session.wait_open()
    owned.session.close(reason)
    await owned.gone()
    assert owned.link.deleted == []


async def test_an_abandoned_session_lives_on_upstream() -> None:
    """B28"""
    owned = Owned(resume="up")
    await owned.session.wait_open()
    assert owned.session.resume is not None
    owned.session.abandon("shutdown")
    assert owned.session.keeps_record
    await owned.gone()
    assert owned.link.deleted == []


async def test_the_first_reason_to_close_stands() -> None:
    owned = Owned()
    await owned.session.wait_open()
    owned.session.close("client")
    owned.session.close("shutdown")
    await owned.gone()
    assert owned.session.close_reason == "client"


async def test_a_close_is_bounded_though_the_link_ignores_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """B14"""
    monkeypatch.setattr(session_module, "CLOSE_TIMEOUT_S", 0.02)
    monkeypatch.setattr(session_module, "CLOSE_GRACE_S", 0.02)
    owned = Owned()
    await owned.session.wait_open()
    let_go = asyncio.Event()
    cancellations = 0

    async def stubborn() -> None:
        nonlocal cancellations
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                cancellations += 1

    owned.link.closing = stubborn
    owned.session.close("shutdown")
    await asyncio.wait_for(owned.session.wait_ended(), 5)
    assert cancellations == 1
    assert not owned.owner.done(), "it holds up its own task, and nobody else"
    assert owned.session.state is State.CLOSED
    assert owned.ended == [owned.session]
    let_go.set()
    await owned.gone()


async def test_a_close_that_fails_ends_the_session_all_the_same() -> None:
    """B14"""
    owned = Owned()
    await owned.session.wait_open()

    async def broken() -> None:
        raise RuntimeError("a bug")

    owned.link.closing = broken
    owned.session.close("shutdown")
    await owned.gone()
