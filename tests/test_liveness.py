"""What is known of a session's health: from the calls of those who share it, and from the check where they told
nothing for long; and openings that come to no end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import orjson
import pytest
from leasehold.pool import (
    AuthFailed,
    CallTimeout,
    CircuitOpen,
    Fenced,
    HttpTarget,
    Message,
    OpenFailed,
    PooledSession,
    PoolError,
    Reply,
    SessionPool,
    Upstream,
    UpstreamLost,
    Want,
)
from leasehold.pool import openers as openers_module
from leasehold.pool import session as session_module
from leasehold.pool.calls import JSON_HEADERS, request
from leasehold.pool.link import Headers, own_headers
from leasehold.pool.liveness import HeardLink, is_well
from lending_pool import ONE, SHARED, LendingPool, TalkingLink, lending
from raw_http import Request
from raw_http import Server as RawServer

pytestmark = pytest.mark.anyio

INTERVAL_S = ONE.health_check_interval_s


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Stands still unless a test moves it."""
    clock = Clock()
    monkeypatch.setattr(session_module, "monotonic", lambda: clock.now)
    return clock


class Server:
    """What the upstream does with the next requests."""

    def __init__(self) -> None:
        self.status = 200
        self.payload: dict[str, Any] = {"result": {}}
        self.failure: Exception | None = None
        self.asked: list[tuple[str, Headers]] = []
        self.pieces: asyncio.Queue[bytes | Exception | None] | None = None
        """What its answers are made of, if they come in pieces."""

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        self.asked.append((message.method or "", headers))
        if self.failure is not None:
            raise self.failure
        payload = orjson.dumps({"jsonrpc": "2.0", "id": message.id, **self.payload})
        return Reply(self.status, [(b"content-type", b"application/json")], _chunks(payload, self.pieces))


async def _chunks(
    payload: bytes, pieces: asyncio.Queue[bytes | Exception | None] | None
) -> AsyncGenerator[bytes, None]:
    if pieces is None:
        yield payload
        return
    while (piece := await pieces.get()) is not None:
        if isinstance(piece, Exception):
            raise piece
        yield piece


async def opened(pool: LendingPool, server: Server) -> PooledSession:
    """A session that others may share, idle, of an upstream that does as `server` says from now on."""
    borrow = await pool.acquire(SHARED)
    borrow.release()
    link: TalkingLink = pool.links[0]
    link.post = server.post  # pyright: ignore[reportAttributeAccessIssue]
    return borrow.session


@pytest.fixture
def server() -> Server:
    return Server()


# -- the check ---------------------------------------------------------------------------------------------------------


async def test_b10_an_answer_is_as_good_as_a_use(server: Server, clock: Clock) -> None:
    async with lending() as pool:
        session = await opened(pool, server)
        clock.now += INTERVAL_S + 1
        assert session.is_due
        assert await is_well(session, own_headers({"authorization": "Bearer t"}))
        assert not session.is_due
        assert session.idle_s == 0
        ((method, headers),) = server.asked
        assert method == "ping"
        assert (b"authorization", b"Bearer t") in headers, "asked as the caller who wants it"
        assert pool.statistics().health_checks == 1


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_b10_a_5xx_is_no_answer_whatever_its_body_says(server: Server, status: int) -> None:
    """A gateway between us and the server says so of one that is gone, some of them as a JSON-RPC error."""
    async with lending() as pool:
        session = await opened(pool, server)
        server.payload = {"error": {"code": -32603, "message": "Internal error"}}
        assert await is_well(session, []), "the same in a 200 is an answer"
        server.status = status
        assert not await is_well(session, [])


@pytest.mark.parametrize("failure", [OpenFailed("refused"), UpstreamLost("broke"), CallTimeout("silent")])
async def test_b10_a_call_that_fails_in_its_transport_is_no_answer(server: Server, failure: PoolError) -> None:
    async with lending() as pool:
        session = await opened(pool, server)
        server.failure = failure
        assert not await is_well(session, [])


@pytest.mark.parametrize(
    "failure", [CircuitOpen("failing", 1.0), Fenced("lease over"), AuthFailed("no token"), 401, 403, 429]
)
async def test_a_session_is_not_blamed_for_what_says_nothing_of_it(
    server: Server, clock: Clock, failure: PoolError | int
) -> None:
    """B10: what is wrong with the caller's credentials, or with this worker, ends no session that others share; and
    nothing was learnt, so that the next caller asks again."""
    async with lending() as pool:
        session = await opened(pool, server)
        clock.now += INTERVAL_S + 1
        if isinstance(failure, int):
            server.status, server.payload = failure, {}
        else:
            server.failure = failure
        assert await is_well(session, [])
        assert session.is_due


async def test_a_session_that_ends_while_it_is_checked_is_not_well(server: Server) -> None:
    """B1"""
    async with lending() as pool:
        session = await opened(pool, server)
        server.pieces = asyncio.Queue()
        check = asyncio.create_task(is_well(session, []))
        while not server.asked:
            await asyncio.sleep(0)
        pool.links[0].lose()
        server.failure = CircuitOpen("failing", 1.0)
        server.pieces.put_nowait(b'{"jsonrpc":"2.0","id":"x","result":{}}')
        server.pieces.put_nowait(None)
        assert not await check


# -- what calls tell ---------------------------------------------------------------------------------------------------


async def begun(session: PooledSession, server: Server) -> Reply:
    """A call of one who shares the session: its answer has begun."""
    server.pieces = asyncio.Queue()
    message, body = request(session.next_id(), "tools/call")
    return await HeardLink(session.link, session).post(message, body, JSON_HEADERS)


async def test_b10_a_server_that_works_on_a_call_is_not_asked_how_it_is(server: Server, clock: Clock) -> None:
    """It may be able to do one thing at a time; ending its session would end that call."""
    async with lending() as pool:
        session = await opened(pool, server)
        reply = await begun(session, server)
        clock.now += INTERVAL_S + 1
        assert not session.is_due
        await reply.chunks.aclose()
        assert session.is_due, "it is over, and nothing was heard"


async def test_b10_whoever_holds_a_session_or_listens_on_it_uses_it_not(server: Server, clock: Clock) -> None:
    async with lending() as pool:
        session = await opened(pool, server)
        with session:
            clock.now += INTERVAL_S + 1
            assert session.idle_s == 0
            assert session.is_due


async def test_b10_every_piece_of_an_answer_is_a_sign_of_life(server: Server, clock: Clock) -> None:
    async with lending() as pool:
        session = await opened(pool, server)
        reply = await begun(session, server)
        assert server.pieces is not None
        clock.now += INTERVAL_S
        server.pieces.put_nowait(b"data: {}\n\n")
        await anext(reply.chunks)
        await reply.chunks.aclose()
        clock.now += INTERVAL_S
        assert not session.is_due
        clock.now += 1
        assert session.is_due


async def test_b10_after_a_call_that_got_no_answer_the_session_is_checked_whatever_else_is_in_flight(
    server: Server, clock: Clock
) -> None:
    """B9: or under traffic that never pauses every call would wait for its own time limit, and nobody would look."""
    async with lending() as pool:
        session = await opened(pool, server)
        other = await begun(session, server)
        others = server.pieces
        reply = await begun(session, server)
        assert server.pieces is not None
        assert others is not None
        server.pieces.put_nowait(CallTimeout("silent"))
        with pytest.raises(CallTimeout):
            await anext(reply.chunks)
        assert session.is_due
        others.put_nowait(b"data: {}\n\n")
        await anext(other.chunks)
        assert not session.is_due, "but it lives"
        await other.chunks.aclose()

        server.failure = CallTimeout("silent")
        with pytest.raises(CallTimeout):
            await begun(session, server)
        assert session.is_due
        assert session.calls == 0


async def test_a_5xx_is_no_sign_of_life(server: Server, clock: Clock) -> None:
    async with lending() as pool:
        session = await opened(pool, server)
        clock.now += INTERVAL_S + 1
        server.status = 502
        message, body = request(session.next_id(), "tools/list")
        reply = await HeardLink(session.link, session).post(message, body, JSON_HEADERS)
        assert [chunk async for chunk in reply.chunks]
        assert session.is_due


async def test_an_answer_that_nobody_reads_leaves_no_call_behind(server: Server) -> None:
    """B3"""
    async with lending() as pool:
        session = await opened(pool, server)
        reply = await begun(session, server)
        assert session.calls == 1
        await reply.chunks.aclose()
        reading = asyncio.create_task(anext((await begun(session, server)).chunks))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert session.calls == 0


# -- opening -----------------------------------------------------------------------------------------------------------


async def test_b16_a_handshake_that_gets_no_answer_is_given_up_in_time_and_counts_as_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B9, B16: also where calls have much more time; and the caller's own call was not run."""
    monkeypatch.setattr(openers_module, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def silent(_request: Request) -> None:
        await asyncio.Event().wait()

    async with RawServer(silent) as listener, SessionPool() as pool:
        upstream = Upstream("silent", HttpTarget(listener.url))
        with pytest.raises(OpenFailed, match=r"did not answer the handshake within 0\.05 s") as caught:
            await pool.acquire(Want(upstream))
        assert caught.value.outcome == "not_run"
        (breaker,) = pool.breakers.statistics().upstreams.values()
        assert breaker.failures == 1


async def test_b9_an_opening_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """B9: wherever it hangs."""
    monkeypatch.setattr(session_module, "OPEN_TIMEOUT_S", 0.05)
    async with lending() as pool:
        pool.may_open.clear()
        with pytest.raises(OpenFailed, match=r"not open within 0\.05 s"):
            await pool.acquire(SHARED)
