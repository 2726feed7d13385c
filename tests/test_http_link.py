"""The streamable-HTTP link, against a real server on a socket that answers with the bytes a test tells it to."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from leasehold.pool import (
    CallTimeout,
    Fenced,
    HttpClients,
    HttpLink,
    HttpTarget,
    OpenFailed,
    Reply,
    ResumeRecord,
    SessionClosed,
    UpstreamLost,
    parse,
)
from leasehold.pool.sse import event
from raw_http import Request, Server

pytestmark = pytest.mark.anyio

POST_HEADERS = [
    (b"content-type", b"application/json"),
    (b"accept", b"application/json, text/event-stream"),
    (b"mcp-protocol-version", b"2025-11-25"),
]
PING = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
INITIALIZE = b'{"jsonrpc":"2.0","id":0,"method":"initialize","params":{}}'
RESULT = b'{"jsonrpc":"2.0","id":1,"result":{}}'


def json_answer(request: Request) -> Coroutine[Any, Any, None]:
    return request.json(RESULT)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server(json_answer, "/mcp") as served:
        yield served


@pytest.fixture
async def clients() -> AsyncIterator[HttpClients]:
    made = HttpClients()
    yield made
    await made.aclose()


@pytest.fixture
def connect(server: Server, clients: HttpClients) -> Callable[..., HttpLink]:
    def connect(headers: tuple[tuple[str, str], ...] = (), **options: Any) -> HttpLink:
        return HttpLink(clients, HttpTarget(server.url, headers), **{"call_timeout_s": 20.0, **options})

    return connect


Connect = Callable[..., HttpLink]


async def post(link: HttpLink, body: bytes = PING, *headers: tuple[bytes, bytes]) -> Reply:
    return await link.post(parse(body), body, [*POST_HEADERS, *headers])


async def body_of(reply: Reply) -> bytes:
    async with aclosing(reply.chunks) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def call(link: HttpLink, body: bytes = PING) -> bytes:
    return await body_of(await post(link, body))


async def initialized(link: HttpLink, server: Server, session_id: str, *headers: str) -> HttpLink:
    before = server.handler
    server.handler = lambda request: request.json(RESULT, f"mcp-session-id: {session_id}", *headers)
    await call(link, INITIALIZE)
    server.handler = before
    return link


async def test_a_json_answer_crosses_as_the_bytes_it_is(server: Server, connect: Connect) -> None:
    odd = b' {"jsonrpc" :"2.0","id":1,\n"result":{"x":"\\u00e9\xc3\xa9"}} '
    server.handler = lambda request: request.reply(
        201, odd, "content-type: application/json; charset=utf-8", "X-Own: 1"
    )
    reply = await post(connect())
    assert (reply.status, reply.headers) == (201, [(b"content-type", b"application/json; charset=utf-8")])
    assert await body_of(reply) == odd
    assert server.requests[0].body == PING


async def test_events_arrive_as_they_are_sent(server: Server, connect: Connect) -> None:
    """B20"""
    go_on = asyncio.Event()

    async def handler(request: Request) -> None:
        await request.stream(event(b"1"), ends=False)
        await go_on.wait()
        await request.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event(b"2")), event(b"2")))

    server.handler = handler
    reply = await post(connect())
    assert (b"content-type", b"text/event-stream") in reply.headers
    async with aclosing(reply.chunks) as chunks:
        assert await anext(chunks) == event(b"1")
        go_on.set()
        assert [chunk async for chunk in chunks] == [event(b"2")]


async def test_one_connection_carries_one_call_after_another_json_or_events(server: Server, connect: Connect) -> None:
    """modelcontextprotocol/python-sdk 3281: a connection per call that was answered by events."""
    link = connect()

    async def handler(request: Request) -> None:
        if len(server.requests) % 2:
            await request.stream(event(RESULT))
        else:
            await request.json(RESULT)

    server.handler = handler
    for _ in range(20):
        await call(link)
    assert server.connections == 1


async def test_sessions_share_connections(server: Server, connect: Connect) -> None:
    for link in [connect() for _ in range(5)]:
        await call(link)
    assert server.connections == 1


async def test_calls_at_once_run_side_by_side(server: Server, connect: Connect) -> None:
    """B15"""
    link = connect()
    everybody = asyncio.Event()

    async def handler(request: Request) -> None:
        if len(server.requests) == 10:
            everybody.set()
        await everybody.wait()
        await request.json(RESULT)

    server.handler = handler
    answers = await asyncio.wait_for(asyncio.gather(*(call(link) for _ in range(10))), 10)
    assert answers == [RESULT] * 10


async def test_a_dropped_connection_costs_its_own_call_and_no_other(server: Server, connect: Connect) -> None:
    """B9; modelcontextprotocol/python-sdk 3522: one dropped POST ended the session and every call in flight."""
    link = await initialized(connect(), server, "s1")
    waiting, dropped = asyncio.Event(), asyncio.Event()

    async def handler(request: Request) -> None:
        if request.headers.get("traceparent") == "drop":
            await waiting.wait()
            request.drop()
        else:
            waiting.set()
            await dropped.wait()
            await request.json(RESULT)

    server.handler = handler
    other = asyncio.create_task(call(link))
    begun = time.monotonic()
    with pytest.raises(UpstreamLost) as caught:
        await post(link, PING, (b"traceparent", b"drop"))
    assert time.monotonic() - begun < 1
    assert caught.value.outcome == "unknown"
    assert not link.is_closed
    dropped.set()
    assert await other == RESULT
    assert await call(link) == RESULT


async def test_a_post_whose_connection_dropped_is_not_sent_again(server: Server, connect: Connect) -> None:
    """B33"""
    link = connect()
    await call(link)

    async def handler(request: Request) -> None:
        request.drop()

    server.handler = handler
    with pytest.raises(UpstreamLost):
        await call(link)
    assert len(server.requests) == 2


@pytest.mark.parametrize("streams", [False, True])
async def test_an_upstream_that_dies_in_mid_answer_fails_the_caller_at_once(
    server: Server, connect: Connect, *, streams: bool
) -> None:
    """B9"""

    async def handler(request: Request) -> None:
        if streams:
            await request.stream(event(b"1"), ends=False)
        else:
            await request.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")

    server.handler = handler
    reply = await post(connect())
    async with aclosing(reply.chunks) as chunks:
        await anext(chunks)
        begun = time.monotonic()
        server.drop_all()
        with pytest.raises(UpstreamLost):
            await anext(chunks)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("garbage", [b"no chunk\r\n", b"5\r\nmore than five\r\n", b"-1\r\n"])
async def test_an_answer_that_is_no_http_fails_the_caller_at_once(
    server: Server, connect: Connect, garbage: bytes
) -> None:
    """B9: aiohttp closes the connection, drops the timeout, and leaves the reader waiting."""

    async def handler(request: Request) -> None:
        await request.stream(event(b"1"), ends=False)
        await go_on.wait()
        await request.send(garbage)

    server.handler = handler
    link = connect()
    for send in (lambda: post(link), lambda: link.get([])):
        go_on = asyncio.Event()
        chunks = (await send()).chunks
        assert await anext(chunks) == event(b"1")
        go_on.set()
        with pytest.raises(UpstreamLost):
            await asyncio.wait_for(_rest(chunks), 5)
    server.handler = json_answer
    assert await call(link) == RESULT


async def test_a_silent_upstream_is_given_up_after_the_call_timeout(server: Server, connect: Connect) -> None:
    """B9"""
    never = asyncio.Event()

    async def handler(request: Request) -> None:
        if request.method == "POST" and len(server.requests) == 2:
            await request.stream(event(b"1"), ends=False)
        await never.wait()

    server.handler = handler
    link = connect(call_timeout_s=0.1)
    with pytest.raises(CallTimeout) as caught:
        await call(link)
    assert caught.value.outcome == "unknown"
    with pytest.raises(CallTimeout):
        await call(link)
    assert len(server.requests) == 2
    assert not link.is_closed


async def test_a_get_stream_may_be_silent_for_longer_than_a_call(server: Server, connect: Connect) -> None:
    speak = asyncio.Event()

    async def handler(request: Request) -> None:
        await request.stream(ends=False)
        await speak.wait()
        await request.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event(b"1")), event(b"1")))

    server.handler = handler
    link = connect(call_timeout_s=0.05)
    reply = await link.get([(b"accept", b"text/event-stream"), (b"last-event-id", b"7")])
    asyncio.get_running_loop().call_later(0.2, speak.set)
    assert await body_of(reply) == event(b"1")
    assert server.requests[0].headers["last-event-id"] == "7"


async def test_a_404_ends_the_session_and_no_other_status_does(server: Server, connect: Connect) -> None:
    """B7"""
    link = await initialized(connect(), server, "s1")
    for status in (400, 401, 409, 500, 503):
        server.handler = lambda request, status=status: request.reply(status)
        assert (await post(link)).status == status
        assert not link.is_closed
    server.handler = lambda request: request.reply(404, b"gone", "content-type: text/plain")
    reply = await post(link)
    assert reply.status == 404
    assert await body_of(reply) == b"gone"
    await asyncio.wait_for(link.wait_closed(), 1)
    sent = len(server.requests)
    with pytest.raises(SessionClosed):
        await post(link)
    assert len(server.requests) == sent


async def test_a_404_before_there_is_a_session_closes_nothing(server: Server, connect: Connect) -> None:
    server.handler = lambda request: request.reply(404)
    for link in (connect(), connect(stateless=True)):
        assert (await post(link)).status == 404
        assert not link.is_closed


async def test_a_fenced_call_never_reaches_the_upstream(server: Server, connect: Connect) -> None:
    """B28"""
    held = True

    def fence() -> None:
        if not held:
            raise Fenced("lease over")

    link = await initialized(connect(fence=fence), server, "s1")
    held = False
    sent = len(server.requests)
    for send in (lambda: post(link), lambda: link.get([]), lambda: link.delete([])):
        with pytest.raises(Fenced) as caught:
            await send()
        assert caught.value.outcome == "not_run"
    held = True
    assert await call(link) == RESULT, "the link itself is unharmed"
    assert len(server.requests) == sent + 1


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("turn", range(10))
async def test_the_fence_is_asked_in_the_turn_of_the_loop_in_which_the_first_byte_is_written(
    server: Server, connect: Connect, method: str, turn: int
) -> None:
    """B28: whenever the lease ends, what had not been written by then never is."""
    held = True

    def fence() -> None:
        if not held:
            raise Fenced("lease over")

    link = connect(fence=fence)
    await call(link)  # so that there is a connection, whose bytes can be looked for
    (socket_at_server,) = (transport.get_extra_info("socket") for transport in server.transports)
    calling = asyncio.create_task(post(link) if method == "POST" else link.get([]))
    for _ in range(turn):
        await asyncio.sleep(0)
    readable, _, _ = select.select([socket_at_server.fileno()], [], [], 0)
    written = bool(readable) or len(server.requests) > 1
    held = False
    if written:
        assert (await calling).status == 200
    else:
        with pytest.raises(Fenced):
            await calling
        assert len(server.requests) == 1


async def test_a_refused_connection_is_a_call_that_was_not_run(clients: HttpClients) -> None:
    """B8"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        link = HttpLink(clients, HttpTarget(f"http://127.0.0.1:{free.getsockname()[1]}/mcp"), call_timeout_s=5)
        for send in (post(link), link.get([]), link.delete([])):
            with pytest.raises(OpenFailed) as caught:
                await send
            assert caught.value.outcome == "not_run"


async def test_no_error_shows_where_the_upstream_is_or_with_what_it_is_called(clients: HttpClients) -> None:
    """B19"""
    target = HttpTarget("http://127.0.0.1:1/secret-path?key=secret-key", (("authorization", "Bearer secret-token"),))
    with pytest.raises(OpenFailed) as caught:
        await post(HttpLink(clients, target, call_timeout_s=5))
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


async def test_headers_of_the_protocol_pass_and_others_only_where_allowed(server: Server, connect: Connect) -> None:
    """B17, B19: a client's credential for the gateway is none for the upstream."""
    link = connect((("authorization", "Bearer upstream"), ("x-tenant", "a")), forward_headers=frozenset({"x-user"}))
    await initialized(link, server, "up")
    hostile = [
        (b"authorization", b"Bearer gateway"),
        (b"cookie", b"theirs=1"),
        (b"host", b"evil.example"),
        (b"mcp-session-id", b"gateway-id"),
        (b"x-tenant", b"b"),
        (b"x-user", b"u"),
        (b"x-other", b"o"),
        (b"traceparent", b"00-1-2-03"),
        (b"mcp-param-region", b"eu"),
        (b"mcp-method", b"ping"),
        (b"connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"1"),
        (b"accept-encoding", b"br"),
        (b"x-forwarded-for", b"1.1.1.1"),
    ]
    await body_of(await post(link, PING, *hostile))
    sent = server.requests[-1].headers
    assert sent.pop("host").startswith("127.0.0.1:")
    assert sent == {
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "authorization": "Bearer upstream",
        "content-length": str(len(PING)),
        "content-type": "application/json",
        "mcp-method": "ping",
        "mcp-param-region": "eu",
        "mcp-protocol-version": "2025-11-25",
        "mcp-session-id": "up",
        "traceparent": "00-1-2-03",
        "x-tenant": "a",
        "x-user": "u",
    }


async def test_what_the_upstream_says_of_itself_stays_with_the_link(server: Server, connect: Connect) -> None:
    server.handler = lambda request: request.json(
        RESULT,
        "mcp-session-id: up",
        "set-cookie: a=1",
        "server: x",
        "retry-after: 3",
        "www-authenticate: Bearer",
        "content-encoding: gzip",
        "location: http://internal/",
    )
    reply = await post(connect(), INITIALIZE)
    assert {name for name, _ in reply.headers} == {
        b"content-type",
        b"retry-after",
        b"www-authenticate",
        b"content-encoding",
    }
    await reply.chunks.aclose()


async def test_a_session_id_is_kept_from_initialize_only(server: Server, connect: Connect) -> None:
    link = connect()
    assert link.resume is None
    server.handler = lambda request: request.json(RESULT, "mcp-session-id: early")
    await call(link)
    assert link.resume is None
    server.handler = lambda request: request.reply(400, b"", "mcp-session-id: refused")
    await call(link, INITIALIZE)
    assert link.resume is None
    await initialized(link, server, "s1")
    link.negotiated("2025-11-25")
    assert link.resume == ResumeRecord("s1", "2025-11-25", {})
    stateless = connect(stateless=True)
    await initialized(stateless, server, "s2")
    assert stateless.resume is None


async def test_cookies_belong_to_one_session_and_move_with_it(server: Server, connect: Connect) -> None:
    """B17: load balancers pin sessions by cookie."""
    one = await initialized(connect(), server, "one", "set-cookie: lb=a; Path=/; HttpOnly", 'set-cookie: x="q"')
    two = await initialized(connect(), server, "two", "set-cookie: lb=b")
    await call(one)
    await call(two)
    await call(connect())
    sent = [request.headers.get("cookie") for request in server.requests[-3:]]
    assert sent == ['lb=a; x="q"', "lb=b", None]
    assert one.resume is not None
    adopted = connect(resume=one.resume)
    server.handler = lambda request: request.json(RESULT, "set-cookie: lb=c")
    await call(adopted)
    await call(adopted)
    assert [request.headers.get("cookie") for request in server.requests[-2:]] == ['lb=a; x="q"', 'lb=c; x="q"']
    assert server.requests[-1].headers["mcp-session-id"] == "one"
    stateless = connect(stateless=True)
    await call(stateless)
    await call(stateless)
    assert "cookie" not in server.requests[-1].headers


async def test_a_broken_cookie_is_no_error(server: Server, connect: Connect) -> None:
    await initialized(connect(), server, "s1", "set-cookie: =;;,\x01", "set-cookie: ")


async def test_a_reply_that_is_closed_unread_gives_its_connection_back(server: Server, connect: Connect) -> None:
    """An adopter asks again for a GET stream that another still holds: each refusal must be let go."""
    link = connect()
    server.handler = lambda request: request.send(b"HTTP/1.1 409 X\r\ncontent-length: 1000000\r\n\r\nhalf")
    for _ in range(3):
        reply = await link.get([])
        assert reply.status == 409
        await reply.chunks.aclose()
    await asyncio.wait_for(asyncio.gather(*(request.lost.wait() for request in server.requests)), 5)
    server.handler = lambda request: request.json(RESULT)
    assert await call(link) == RESULT


async def test_a_cancelled_call_leaves_the_link_usable(server: Server, connect: Connect) -> None:
    """B3"""
    link = connect()
    never = asyncio.Event()

    async def hang(_request: Request) -> None:
        await never.wait()

    server.handler = hang
    calling = asyncio.create_task(call(link))
    await asyncio.wait_for(server.arrived.wait(), 5)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    server.handler = lambda request: request.json(RESULT)
    assert await call(link) == RESULT


async def test_a_closed_link_sends_nothing(server: Server, connect: Connect) -> None:
    """B23"""
    link = connect()
    await link.aclose()
    await link.aclose()
    assert link.is_closed
    await asyncio.wait_for(link.wait_closed(), 1)
    with pytest.raises(SessionClosed) as caught:
        await post(link)
    assert caught.value.outcome == "not_run"
    assert not server.requests


async def test_a_get_stream_ends_when_its_link_is_closed(server: Server, connect: Connect) -> None:
    """Whoever closed it: the client, the idle limit, another owner, who wants this stream for himself."""
    link, other = connect(), connect()
    server.handler = lambda request: request.stream(event(b"1"), ends=False)
    streams = [(await each.get([])).chunks for each in (link, link, other)]
    for chunks in streams:
        assert await anext(chunks) == event(b"1")
    reading = [asyncio.ensure_future(_rest(chunks)) for chunks in streams]
    await asyncio.sleep(0)
    await link.aclose()
    assert await asyncio.wait_for(asyncio.gather(*reading[:2]), 1) == [b"", b""]
    await asyncio.wait_for(asyncio.gather(*(request.lost.wait() for request in server.requests[:2])), 1)
    assert not reading[2].done()
    await other.aclose()
    assert await asyncio.wait_for(reading[2], 1) == b""


async def test_a_get_stream_that_is_not_being_read_ends_too(server: Server, connect: Connect) -> None:
    link = connect()
    server.handler = lambda request: request.stream(event(b"1"), ends=False)
    reply = await link.get([])
    await link.aclose()
    await asyncio.wait_for(server.requests[0].lost.wait(), 1)
    assert await asyncio.wait_for(body_of(reply), 1) in (b"", event(b"1"))


async def test_a_get_stream_that_has_not_begun_is_given_up_when_its_link_is_closed(
    server: Server, connect: Connect
) -> None:
    link = connect()
    never = asyncio.Event()

    async def hang(_request: Request) -> None:
        await never.wait()

    server.handler = hang
    opening = asyncio.ensure_future(link.get([]))
    await asyncio.wait_for(server.arrived.wait(), 5)
    await link.aclose()
    with pytest.raises(SessionClosed):
        await asyncio.wait_for(opening, 1)
    await asyncio.wait_for(server.requests[0].lost.wait(), 1)


async def test_a_call_under_way_is_answered_though_its_link_was_closed(server: Server, connect: Connect) -> None:
    """B46: the session may have moved to another owner, and this call runs at the upstream all the same."""
    link = connect()
    go_on = asyncio.Event()

    async def handler(request: Request) -> None:
        if request.headers.get("traceparent") == "events":
            await request.stream(event(b"1"), ends=False)
            await go_on.wait()
            await request.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event(RESULT)), event(RESULT)))
        else:
            await go_on.wait()
            await request.json(RESULT)

    server.handler = handler
    streaming = await post(link, PING, (b"traceparent", b"events"))
    waiting = asyncio.ensure_future(call(link))
    while len(server.requests) < 2:
        await asyncio.sleep(0.005)
    await link.aclose()
    go_on.set()
    assert await body_of(streaming) == event(b"1") + event(RESULT)
    assert await waiting == RESULT


async def test_a_get_stream_that_breaks_by_itself_is_lost(server: Server, connect: Connect) -> None:
    link = connect()
    server.handler = lambda request: request.stream(event(b"1"), ends=False)
    reply = await link.get([])
    assert await anext(reply.chunks) == event(b"1")
    server.drop_all()
    with pytest.raises(UpstreamLost):
        await anext(reply.chunks)


async def _rest(chunks: Any) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def test_a_large_body_arrives_whole(server: Server, connect: Connect) -> None:
    """B44"""
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "x", "params": {"x": "y" * 3_000_000}}).encode()
    server.handler = lambda request: request.json(request.body)
    assert await call(connect(), body) == body


async def test_a_redirect_is_not_followed(server: Server, connect: Connect) -> None:
    """B19: headers of the configuration go to the configured place only."""
    server.handler = lambda request: request.reply(307, b"", f"location: {server.url}/other")
    assert (await post(connect())).status == 307
    assert len(server.requests) == 1
