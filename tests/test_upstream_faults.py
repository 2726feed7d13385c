"""Real upstreams that are killed, frozen and restarted, on every transport, idle and in mid-call: what every kind of
caller sees, and how soon. These are rows of `docs/failure-modes.md`; with `-rP` the seconds measured are printed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from faults import eventually
from faulty_upstreams import (
    FACES,
    FLEET,
    HTTP,
    JSON,
    LOAN,
    NONE,
    PRINCIPAL,
    SESSION,
    SHARED,
    STDIO,
    TRANSPORTS,
    Callers,
    Face,
    Seen,
    Upstream,
    callers,
    longest,
    whats,
)
from fleet import run_gateway, write_config
from mcp_http import RawSession

pytestmark = [pytest.mark.anyio, pytest.mark.process]


def those(*quick: str) -> Any:
    """All transports; those that are not quick where minutes count less."""
    marked = [pytest.param(each, marks=[] if each in quick else pytest.mark.acceptance) for each in TRANSPORTS]
    return pytest.mark.parametrize("transport", marked)


each_transport = those(HTTP, JSON)
each_when_frozen = those(JSON)
each_http = pytest.mark.parametrize("transport", [HTTP, JSON])
Figure = Callable[[str, float], None]

# What the six faces see, in the order of FACES: a loan, a shared session, a session of the fleet; and through the
# gateway a client of a server with affinity `session`, `principal`, `none`.
ALL_WELL = ("ok",) * 6
NOT_RUN = ("not_run",) * 6
# The session is gone. Told once where somebody may count on what was in it; the next call begins another one.
TOLD = ("ok", "not_run", "not_run", "404", "404", "ok")
# It was known to be gone before the call: only a client that has to initialize again is told.
REPLACED = ("ok", "ok", "ok", "404", "ok", "ok")
# The same, and another one cannot be opened.
NO_OTHER = ("not_run", "not_run", "not_run", "404", "503 not_run", "not_run")
# An idle session that does not answer its check; the gateway checks no client's own session, so that its call waits.
FROZEN = ("not_run", "not_run", "not_run", "unknown", "503 not_run", "not_run")
FROZEN_REPLACED = ("ok", "ok", "ok", "unknown", "ok", "ok")

LONG_S = 60
"""A time limit that no test reaches: what comes long before it was not waited for."""
CALL_S, CHECK_S = 3, 1
SOON_S, NEVER_S = 0.1, 3600
"""Idle times after which a session is checked before it is used."""
SSE_OPEN_S = 10


def by_face(expected: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(FACES, expected, strict=True))


@pytest.fixture
async def upstream(transport: str, tmp_path: Path, anyio_backend: Any) -> AsyncIterator[Upstream]:
    async with Upstream(transport, tmp_path) as upstream:
        yield upstream


@pytest.fixture
def figure() -> Figure:
    return lambda what, seconds: print(f"{what}: {seconds:.3f} s")


async def kill_idle(everybody: Callers, **options: Any) -> float:
    """Kill what nobody calls; seconds until that is known, where it can be."""
    sessions = everybody.sessions()
    await everybody.upstream.kill(**options)
    if not everybody.upstream.knows_at_once:
        assert not any(session.is_closed for session in sessions), "HTTP tells of nothing"
        return 0.0
    return await eventually(lambda: all(session.is_closed for session in sessions))


async def idle_for(seconds: float) -> None:
    """Let sessions be idle for longer than that."""
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() - begun > seconds + 0.1)


async def initialize_again(everybody: Callers) -> None:
    """What a client does that got a 404. After it all is well."""
    await everybody[SESSION].begin()
    assert whats(await everybody.call()) == by_face(ALL_WELL)


# -- killed ------------------------------------------------------------------------------------------------------------


@each_transport
async def test_b9_killed_in_mid_call(redis_url: str, upstream: Upstream, figure: Figure) -> None:
    """B9, B1, B33: every caller is told in under a second that the call may have run, and it ran once."""
    async with callers(redis_url, upstream, call_timeout=LONG_S, health_check_interval=NEVER_S) as everybody:
        calls = await everybody.running("mid")
        begun = time.monotonic()
        await upstream.kill()
        took: list[float] = []
        for call in calls.values():
            assert (await call).what == "unknown", await call
            took.append(time.monotonic() - begun)
        figure("told", max(took))
        assert min(took) < 1
        assert max(took) < LONG_S / 6, "on a machine that is busy; but nobody waited for a time limit"
        assert [upstream.runs(f"mid-{name}") for name in FACES] == [1] * len(FACES)

        await upstream.start()
        seen = await everybody.call()
        assert whats(seen) == by_face(REPLACED if upstream.knows_at_once else TOLD)
        figure("restarted", longest(seen))
        assert whats(await everybody.call()) == by_face(REPLACED)
        await initialize_again(everybody)


@pytest.mark.acceptance
@pytest.mark.parametrize("transport", [JSON])
async def test_b9_callers_of_another_upstream_see_nothing_of_it(
    redis_url: str, upstream: Upstream, tmp_path: Path
) -> None:
    """B9: calls that run there, through the same pools and the same gateway, go on to their answers."""
    async with Upstream(STDIO, tmp_path) as other:
        async with callers(redis_url, upstream, beside=other, call_timeout=LONG_S) as everybody:
            assert [(await face.call()).what for face in everybody.neighbours] == ["ok"] * 3
            calls = await everybody.running("mid")
            slow = [asyncio.create_task(face.call("slow", seconds=3.0, tag="slow")) for face in everybody.neighbours]
            await eventually(lambda: other.runs("slow") == 3, 30)
            await upstream.kill()
            assert {(await call).what for call in calls.values()} == {"unknown"}
            assert not any(call.done() for call in slow)
            assert {(await call).what for call in slow} == {"ok"}


@each_transport
async def test_killed_while_idle(redis_url: str, upstream: Upstream, figure: Figure) -> None:
    """B1, B8: a stream or process that ends is known at once, and the next call opens another session if it can; of
    HTTP the next call finds out, and was not run."""
    async with callers(redis_url, upstream, call_timeout=LONG_S, health_check_interval=NEVER_S) as everybody:
        figure("known", await kill_idle(everybody, stays_down=True))
        seen = await everybody.call()
        figure("down", longest(seen))
        assert whats(seen) == by_face(NO_OTHER if upstream.knows_at_once else NOT_RUN)
        assert longest(seen) < LONG_S / 6
        await upstream.start()
        seen = await everybody.call()
        figure("back", longest(seen))
        assert whats(seen) == by_face(REPLACED if upstream.knows_at_once else TOLD)
        assert whats(await everybody.call()) == by_face(REPLACED)
        await initialize_again(everybody)


@each_http
async def test_b54_killed_while_idle_and_found_by_the_health_check(
    redis_url: str, upstream: Upstream, figure: Figure
) -> None:
    """B54, B10: what was idle for longer than `health_check_interval` is asked before it is used. The call is not run,
    or runs on another session; who shares a session is not even told."""
    async with callers(redis_url, upstream, call_timeout=LONG_S, health_check_interval=SOON_S) as everybody:
        await kill_idle(everybody)
        await idle_for(SOON_S)
        seen = await everybody.call()
        figure("down", longest(seen))
        assert whats(seen) == by_face(("not_run", "not_run", "not_run", "not_run", "503 not_run", "not_run"))
        await upstream.start()
        assert whats(await everybody.call()) == by_face(REPLACED)
        await initialize_again(everybody)


@pytest.mark.parametrize("transport", [JSON])
async def test_b54_the_idle_dead_backend(redis_url: str, upstream: Upstream, figure: Figure) -> None:
    """B54: used once, idle for more than 5 s, killed and started again without a word, then called: by all who need
    not initialize themselves, in a fresh session and on the first try."""
    async with callers(redis_url, upstream, call_timeout=LONG_S, health_check_interval=5) as everybody:
        sessions = everybody.sessions()
        await kill_idle(everybody)
        await upstream.start()
        await idle_for(5)
        seen = await everybody.call()
        figure("back", longest(seen))
        assert whats(seen) == by_face(REPLACED)
        assert [one.text for one in seen.values() if one.what == "ok"] == ["1"] * 5, "fresh ones"
        used = everybody.sessions()
        assert not [session for session in sessions if session in used], "no corpse is left"


# -- restarted ---------------------------------------------------------------------------------------------------------


@each_transport
async def test_restarted_while_idle(redis_url: str, upstream: Upstream, figure: Figure) -> None:
    """B7, B8: who can have no use of what was in the session gets another one without noticing; who may have is told
    once, and the call after that begins another one."""
    async with callers(redis_url, upstream, call_timeout=LONG_S, health_check_interval=NEVER_S) as everybody:
        await kill_idle(everybody)
        await upstream.start()
        seen = await everybody.call()
        figure("first", longest(seen))
        assert whats(seen) == by_face(REPLACED if upstream.knows_at_once else TOLD)
        seen = await everybody.call()
        assert whats(seen) == by_face(REPLACED)
        await initialize_again(everybody)


@each_http
async def test_b7_many_idle_sessions_of_an_upstream_that_was_restarted_cost_nobody_a_call(
    redis_url: str, upstream: Upstream
) -> None:
    """B7: the session that takes the place of one that is gone is not another one that is gone."""
    async with callers(redis_url, upstream, names=(LOAN, NONE), health_check_interval=NEVER_S) as everybody:
        for face in (everybody[LOAN], everybody[NONE]):
            await asyncio.gather(*(face.call("slow", seconds=0.5) for _ in range(5)))
        assert len(everybody.sessions()) == 10
        await upstream.kill()
        await upstream.start()
        assert set(whats(await everybody.call()).values()) == {"ok"}
        for face in (everybody[LOAN], everybody[NONE]):
            assert {one.what for one in await asyncio.gather(*(face.call() for _ in range(10)))} == {"ok"}


# -- frozen ------------------------------------------------------------------------------------------------------------


@each_when_frozen
async def test_frozen_in_mid_call_and_thawed(redis_url: str, upstream: Upstream, figure: Figure) -> None:
    """B9, B10: a call that got no answer ends after `call_timeout`, and the next one does not wait for as long: the
    session is checked first. Once it is thawed nothing is left of all that."""
    options = {"call_timeout": CALL_S, "health_check_timeout": CHECK_S, "health_check_interval": NEVER_S}
    async with callers(redis_url, upstream, **options) as everybody:
        calls = await everybody.running("mid")
        upstream.freeze()
        seen = {name: await call for name, call in calls.items()}
        assert set(whats(seen).values()) == {"unknown"}, seen
        figure("frozen", longest(seen))
        await still_frozen(everybody, figure)


@each_when_frozen
async def test_frozen_while_idle_and_thawed(redis_url: str, upstream: Upstream, figure: Figure) -> None:
    """B10, B54: the check is given up after `health_check_timeout`. A process of its own is replaced; of a server that
    all sessions share, opening another one takes as long as that may take."""
    options = {"call_timeout": CALL_S, "health_check_timeout": CHECK_S, "health_check_interval": SOON_S}
    async with callers(redis_url, upstream, **options) as everybody:
        upstream.freeze()
        await idle_for(SOON_S)
        await still_frozen(everybody, figure)


async def still_frozen(everybody: Callers, figure: Figure) -> None:
    """The next calls to an upstream that is frozen, and those after it was thawed."""
    upstream = everybody.upstream
    seen = await everybody.call()
    figure("next", longest(seen))
    assert whats(seen) == by_face(FROZEN_REPLACED if upstream.transport == STDIO else FROZEN)
    if upstream.transport != STDIO:
        for name in (LOAN, SHARED, FLEET, PRINCIPAL, NONE):
            assert seen[name].seconds < CHECK_S + max(CALL_S, SSE_OPEN_S) + CALL_S, "bounded"
    upstream.thaw()
    await comes_back(everybody, figure)
    assert whats(await everybody.call()) == by_face(ALL_WELL)


# -- down for longer ---------------------------------------------------------------------------------------------------


async def opening(face: Face) -> Seen:
    """A call, or what comes first for a client whose session is gone."""
    seen = await face.call()
    return await face.begin() or seen if seen.what in ("404", "400") else seen


async def until(face: Face, ask: Callable[[Face], Any], found: Callable[[Seen], bool], limit_s: float) -> Seen:
    """Ask again and again."""
    async with asyncio.timeout(limit_s):
        while not found(seen := await ask(face)):
            await asyncio.sleep(0.05)
    return seen


def is_refused(seen: Seen) -> bool:
    return "is failing: it is not tried" in seen.text


async def circuit_opens(everybody: Callers, figure: Figure) -> None:
    """After five failures nobody tries any more."""
    seen = await everybody.each(lambda face: until(face, opening, is_refused, LONG_S))
    assert {everybody.circuit(name) for name in everybody.faces} == {"open"}
    figure("refused", longest(seen))
    for one in seen.values():
        assert one.what in ("not_run", "503 not_run")
        assert one.seconds < LONG_S / 6, "at once"
        assert one.what == "not_run" or int(one.headers["retry-after"]) >= 1
    if SESSION in everybody.faces:
        refused = await everybody[SESSION].begin()
        assert refused is not None
        assert (refused.what, int(refused.headers["retry-after"]) >= 1) == ("503 not_run", True)


async def comes_back(everybody: Callers, figure: Figure) -> None:
    """Nothing stays broken: before long all calls are answered, and no circuit is open."""
    begun = time.monotonic()
    await everybody.each(lambda face: until(face, opening, lambda seen: seen.what == "ok", LONG_S))
    figure("back", time.monotonic() - begun)
    assert {everybody.circuit(name) for name in everybody.faces} == {"closed"}


@each_transport
async def test_b16_down_for_long_opens_the_circuit_and_coming_back_closes_it(
    redis_url: str, upstream: Upstream, figure: Figure
) -> None:
    """B16"""
    async with callers(redis_url, upstream, call_timeout=LONG_S) as everybody:
        await kill_idle(everybody, stays_down=True)
        await circuit_opens(everybody, figure)
        await upstream.start()
        await comes_back(everybody, figure)


@pytest.mark.acceptance
@pytest.mark.parametrize("transport", [JSON])
async def test_b16_one_that_hangs_when_sessions_are_opened_is_as_good_as_down(
    redis_url: str, upstream: Upstream, figure: Figure
) -> None:
    """B16: silence may be work, but not on `initialize`."""
    options = {"call_timeout": 1.5, "health_check_timeout": CHECK_S, "health_check_interval": SOON_S}
    async with callers(redis_url, upstream, **options) as everybody:
        client = everybody.faces.pop(SESSION)  # his calls go to a session that is open
        upstream.freeze()
        waiting = asyncio.create_task(until(client, lambda face: face.begin(), is_refused, LONG_S))
        await circuit_opens(everybody, figure)
        assert (await waiting).what == "503 not_run"
        upstream.thaw()
        await comes_back(everybody, figure)


# -- behind `leasehold serve` ------------------------------------------------------------------------------------------


@pytest.mark.acceptance
async def test_b9_upstreams_of_a_gateway_that_die_cost_their_own_clients_a_call(tmp_path: Path) -> None:
    """B9, B7: over real HTTP, one transport after the other, while calls to the others run."""
    async with AsyncExitStack() as stack:
        upstreams = {name: await stack.enter_async_context(Upstream(name, tmp_path)) for name in TRANSPORTS}
        servers = {name: upstream.config(call_timeout=LONG_S) for name, upstream in upstreams.items()}
        gateway = stack.enter_context(run_gateway(write_config(tmp_path, servers), tmp_path, redis_url=None))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        sessions = {name: RawSession(http, f"{gateway.url}/servers/{name}/mcp") for name in TRANSPORTS}
        await asyncio.gather(*(session.initialize() for session in sessions.values()))
        calls = {name: asyncio.create_task(session.call("wait_cancel", tag=name)) for name, session in sessions.items()}
        await eventually(lambda: all(upstream.runs(name) for name, upstream in upstreams.items()), 30)
        for name, upstream in upstreams.items():
            await upstream.kill()
            async with asyncio.timeout(LONG_S / 6):
                ended = await calls.pop(name)
            assert (ended.status, ended.error["data"]) == (200, {"outcome": "unknown"})
            assert ended.error["message"]
            assert not any(call.done() for call in calls.values())
            after = await sessions[name].call("increment")
            if upstream.knows_at_once:
                assert after.status == 404
            else:
                assert (after.status, after.error["data"]) == (200, {"outcome": "not_run"})
            await upstream.start()
            if not upstream.knows_at_once:
                assert (await sessions[name].call("increment")).status == 404
            fresh = RawSession(http, sessions[name].url)
            await fresh.initialize()
            assert (await fresh.call("increment")).text == "1"
