"""The public bugs that this pool exists for: stories that a naive pool does not survive, told with both, and what the
fixes of others had to look for. IBM/mcp-context-forge issues 3520 and 3737, pull requests 3605 and 3739."""

from __future__ import annotations

import ast
import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import eventually
from leasehold.pool import HttpTarget, SessionClosed, SessionPool, StdioTarget, Upstream
from leasehold.pool import session as session_module
from leasehold.pool.borrowing import Want
from lending_pool import ANY, THE_ONE, TalkingLink, at_rest, lending
from naive_pool import Borrow, Counter, broken_in_mid_call, closed_elsewhere, idle_and_dead, sibling_fails
from talkers import SDK_LEAVES_STREAMS, talking

pytestmark = [pytest.mark.anyio, pytest.mark.process, pytest.mark.filterwarnings(SDK_LEAVES_STREAMS)]

TESTS = Path(__file__).parent
ROOT = TESTS.parent
HALF_CLOSED = str(TESTS / "servers" / "half_closed.py")


async def naively(story: str) -> list[str]:
    """What the callers of the naive pool saw."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(TESTS / "naive_pool.py"),
        story,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    told, _ = await process.communicate()
    return json.loads(told)


def borrows(pool: SessionPool, upstream: Counter, **options: Any) -> Borrow:
    target = Upstream("counter", HttpTarget(upstream.url), **options)
    return lambda: pool.session(target)


# -- stories -----------------------------------------------------------------------------------------------------------


async def test_a_session_whose_transport_broke_is_never_handed_out_again() -> None:
    """B1, IBM/mcp-context-forge 3520: the naive pool serves the corpse for ever, though the upstream is back."""
    first, broken, *after = await naively("broken_in_mid_call")
    assert (first, broken[:6]) == ("ok: 1", "error:")
    assert [said[:6] for said in after] == ["error:"] * 3

    with Counter() as upstream:
        async with SessionPool() as pool:
            told = await broken_in_mid_call(borrows(pool, upstream), upstream)
            assert pool.statistics().closed.keys() <= {"discarded", "lost"}
    assert told[1].startswith("error: Connection closed: the upstream's answer broke off")
    assert (told[0], told[2:]) == ("ok: 1", ["ok: 1", "ok: 2", "ok: 3"])


async def test_a_failing_sibling_stream_cancels_no_request_handler() -> None:
    """B21, IBM/mcp-context-forge 3737: the naive pool's handler is cancelled by a task group that lives in its task."""
    assert await naively("sibling_fails") == ["cancelled"]

    with Counter() as upstream:
        async with SessionPool() as pool:
            (told,) = await sibling_fails(borrows(pool, upstream), upstream)
    assert told.startswith("ok: went on after 'Connection closed: ")


async def test_a_session_is_closed_by_another_task_than_the_one_that_opened_it() -> None:
    """B21, IBM/mcp-context-forge 3737"""
    opened, closed = await naively("closed_elsewhere")
    assert opened == "ok: 1"
    assert "Attempted to exit cancel scope in a different task" in closed

    with Counter() as upstream:
        async with SessionPool() as pool:
            told = await closed_elsewhere(borrows(pool, upstream), upstream, pool.aclose)
            assert told == ["ok: 1", "ok: None"]
            assert len(pool) == 0


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Six seconds later, without waiting for them."""
    now = session_module.monotonic
    later = [0.0]
    monkeypatch.setattr(session_module, "monotonic", lambda: now() + later[0])

    def pass_time() -> None:
        later[0] += 6

    return pass_time


async def test_an_upstream_that_died_while_its_session_was_idle_and_is_back(pass_time: Callable[[], None]) -> None:
    """B54, B10: the ping finds it before the call does."""
    assert [said[:6] for said in await naively("idle_and_back")] == ["ok: 1", "error:"]

    with Counter() as upstream:
        async with SessionPool() as pool:
            borrow = borrows(pool, upstream, health_check_interval_s=5.0)
            assert await idle_and_dead(borrow, upstream, pass_time, back=True) == ["ok: 1", "ok: 1"]
            assert (pool.statistics().health_checks, pool.statistics().opened) == (1, 2)
            assert pool.statistics().closed.keys() <= {"unhealthy", "lost"}


async def test_an_upstream_that_died_while_its_session_was_idle_and_is_down(pass_time: Callable[[], None]) -> None:
    """B54: an error that says so, and no corpse once it is back."""
    first, *after = await naively("idle_and_down")
    assert first == "ok: 1"
    assert [said[:6] for said in after] == ["error:"] * 2, "down, and the corpse"

    with Counter() as upstream:
        async with SessionPool() as pool:
            borrow = borrows(pool, upstream, health_check_interval_s=5.0)
            told = await idle_and_dead(borrow, upstream, pass_time, back=False)
            assert pool.statistics().closed["unhealthy"] == 1
    assert told == ["ok: 1", "error: cannot connect to the upstream: ClientConnectorError", "ok: 1"]


# -- what is closed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stdin", "stdout"])
async def test_a_session_is_closed_as_soon_as_one_of_its_ends_is(end: str) -> None:
    """B1, pull request 3605: a closed write side, and a receive side on which nothing can come any more. The process
    still lives."""
    upstream = Upstream("half", StdioTarget(sys.executable, (HALF_CLOSED, end)))
    async with SessionPool() as pool:
        borrow = await pool.acquire(Want(upstream))
        if not borrow.session.is_closed:
            await eventually(lambda: borrow.session.is_closed)
        with pytest.raises(SessionClosed):
            _ = borrow.session.link
        borrow.release()
        await eventually(lambda: len(pool) == 0)
        assert pool.statistics().closed == {"lost": 1}


async def test_a_session_on_an_event_stream_that_has_ended_is_closed() -> None:
    """B1, pull request 3605: the receive side of HTTP+SSE."""
    async with SessionPool() as pool:
        async with talking("sse") as talker:
            borrow = await pool.acquire(Want(talker.upstream()))
            assert not borrow.session.is_closed
        await eventually(lambda: borrow.session.is_closed)
        borrow.release()
        await eventually(lambda: len(pool) == 0)


async def test_a_session_whose_owner_task_has_finished_is_closed_and_its_slot_free() -> None:
    """B1, B4, pull request 3739: release of a session whose owner died leaked its slot."""
    async with SessionPool() as pool:
        want = Want(Upstream("one", StdioTarget(sys.executable, (HALF_CLOSED, "never-answers")), max_sessions=1))
        borrow = await pool.acquire(want)
        (owner,) = [task for task in asyncio.all_tasks() if task.get_name().startswith("owner-")]
        owner.cancel()
        with suppress(asyncio.CancelledError):
            await owner
        assert borrow.session.is_closed
        borrow.release()
        assert pool.statistics().sessions == 0
        (await pool.acquire(want, timeout_s=10)).release()


class OddLink(TalkingLink):
    """Its insides are not what anybody expects."""

    odd: Any = None

    @property
    def is_closed(self) -> bool:
        if isinstance(self.odd, BaseException):
            raise self.odd
        return super().is_closed if self.odd is None else self.odd

    async def wait_closed(self) -> None:
        if isinstance(self.odd, BaseException):
            raise self.odd
        await super().wait_closed()


@pytest.mark.parametrize("error", [AttributeError("_state"), RuntimeError("no loop"), TypeError("mock"), KeyError(1)])
async def test_asking_whether_a_session_is_closed_never_raises(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B1, pull request 3605: a transport that cannot even say it is taken as closed."""
    monkeypatch.setattr("lending_pool.TalkingLink", OddLink)
    async with lending() as pool:
        borrow = await pool.acquire(ANY)
        assert not borrow.session.is_closed
        pool.links[0].odd = error  # type: ignore[attr-defined]
        assert borrow.session.is_closed
        with pytest.raises(SessionClosed):
            _ = borrow.session.link
        borrow.release()
        pool.links[0].odd = None  # type: ignore[attr-defined]
        await borrow.session.wait_ended()
        again = await pool.acquire(ANY)
        assert again.session is not borrow.session
        again.release()


async def test_a_link_that_cannot_wait_for_its_end_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """B1, pull request 3605"""
    monkeypatch.setattr("lending_pool.TalkingLink", OddLink)
    monkeypatch.setattr(OddLink, "wait_closed", _fails)
    async with lending() as pool:
        borrow = await pool.acquire(THE_ONE)
        await eventually(lambda: borrow.session.is_closed)
        borrow.release()
        await at_rest(pool)
        assert pool.statistics().closed == {"lost": 1}


async def _fails(_self: Any) -> None:
    raise AttributeError("_state")


async def test_a_404_closes_the_session() -> None:
    """B1, B7: over HTTP that is the one sign there is."""
    async with SessionPool() as pool, talking("http") as talker:
        borrow = await pool.acquire(Want(talker.upstream()))
        async with pool.session(talker.upstream(), affinity="x") as session:
            assert not borrow.session.is_closed
            talker.forget_all()
            with pytest.raises(Exception, match="Connection closed"):
                await session.send_ping()
        borrow.release(discard=True)
        await eventually(lambda: len(pool) == 0)


# -- openings and deadlines --------------------------------------------------------------------------------------------


async def test_an_opening_that_is_cancelled_leaves_no_owner_task_and_no_process() -> None:
    """B3, B22, pull request 3739: a server that does not answer the handshake."""
    sleeper = "import sys, time; sys.stdin.readline(); time.sleep(3600)"
    want = Want(Upstream("mute", StdioTarget(sys.executable, ("-c", sleeper)), max_sessions=1))
    async with SessionPool() as pool:
        before = children()
        for _ in range(2):
            opening = asyncio.create_task(pool.acquire(want))
            await eventually(lambda: len(children() - before) == 1)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        assert pool.statistics().waiting == 0
        assert len(children() - before) == 1, "the second caller would have had the first one's session"
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith(("owner-", "leasehold-"))]
    await eventually(lambda: not children() - before)


def children() -> set[int]:
    found: set[int] = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "time.sleep(3600)" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_no_deadline_is_put_around_a_call_from_outside() -> None:
    """Pull request 3739: `asyncio.wait_for` runs what it waits for in another task (before Python 3.12), where scopes
    that were entered in this one cannot be left; so deadlines are inside."""
    found: list[str] = []
    for folder in ("pool", "workers"):
        for path in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "attr", None) or getattr(node, "id", None)
                if name in ("wait_for", "run_until_complete"):
                    found.append(f"{path.name}:{node.lineno}")  # type: ignore[attr-defined]
    assert not found
