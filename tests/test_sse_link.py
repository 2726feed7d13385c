"""The link to HTTP+SSE servers: the SDK's own in a process, and a raw one that says what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import eventually
from hypothesis import given
from hypothesis import strategies as st
from leasehold.pool import duplex_link, sse_link
from leasehold.pool.errors import CallTimeout, Fenced, OpenFailed, PoolError, SessionClosed, UpstreamLost
from leasehold.pool.http_request import HttpClients
from leasehold.pool.jsonrpc import parse
from leasehold.pool.link import Link, Reply, own_header
from leasehold.pool.sse import STREAM_HEADERS as SSE
from leasehold.pool.sse import event
from leasehold.pool.sse_link import SseLink
from leasehold.pool.sse_stream import endpoint_url
from leasehold.pool.upstream import SseTarget
from raw_http import Request, Server

pytestmark = pytest.mark.anyio

SDK_SERVER = Path(__file__).parent / "servers" / "sdk_sse.py"
JSON = [(b"content-type", b"application/json")]
POST_HEADERS = [*JSON, (b"accept", b"application/json, text/event-stream")]
ENDPOINT = b"event: endpoint\ndata: /messages?session_id=1\n\n"


def request(method: str, identifier: str | int = 1, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": identifier, "method": method, "params": params}).encode()


def notification(method: str, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params}).encode()


def result(identifier: str | int = 1, value: Any = None) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": identifier, "result": value or {}}).encode()


PING = request("ping")
RESULT = result()
NOTE = notification("notifications/message")


async def post(link: SseLink, body: bytes, *headers: tuple[bytes, bytes]) -> Reply:
    return await link.post(parse(body), body, [*POST_HEADERS, *headers])


async def body_of(reply: Reply) -> bytes:
    async with contextlib.aclosing(reply.chunks) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def whole(link: SseLink, body: bytes) -> bytes:
    reply = await post(link, body)
    assert reply.status == 200, reply
    return await body_of(reply)


class Upstream:
    """An HTTP+SSE server: its streams, the messages that were posted to it, and how it treats both."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.streams: list[Request] = []
        self.posts: list[Request] = []
        self.on_get: Callable[[Request], Coroutine[Any, Any, None]] = self.open
        self.on_post: Callable[[Request], Coroutine[Any, Any, None]] = self.answer
        server.handler = self._handle

    async def _handle(self, request: Request) -> None:
        if request.method == "GET":
            self.streams.append(request)
            await self.on_get(request)
        else:
            self.posts.append(request)
            await self.on_post(request)

    @property
    def messages(self) -> list[Any]:
        return [json.loads(post.body) for post in self.posts]

    async def open(self, request: Request) -> None:
        await request.stream(ENDPOINT, ends=False)

    async def accept(self, request: Request) -> None:
        await request.reply(202, b"Accepted")

    async def answer(self, request: Request) -> None:
        """Accept a message, and answer it if it is a request."""
        await self.accept(request)
        message = parse(request.body)
        if message.kind == "request" and message.id is not None:
            await self.say(event(result(message.id)))

    async def say(self, data: bytes) -> None:
        await self.streams[-1].chunk(data)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async def nothing(request: Request) -> None: ...

    async with Server(nothing, "/sse") as server:
        yield Upstream(server)


@pytest.fixture
async def clients() -> AsyncIterator[HttpClients]:
    made = HttpClients()
    yield made
    await made.aclose()


Connect = Callable[..., SseLink]


@pytest.fixture
def connect(upstream: Upstream, clients: HttpClients, at_end: contextlib.AsyncExitStack) -> Connect:
    """Makes links; when the test ends each has to close in time and leave no task (see conftest)."""

    def connect(headers: tuple[tuple[str, str], ...] = (), *, url: str = "", **options: Any) -> SseLink:
        target = SseTarget(url or upstream.server.url, headers)
        link = SseLink(clients, target, **{"name": "fake", "call_timeout_s": 20.0, **options})
        at_end.push_async_callback(close, link)
        return link

    async def close(link: SseLink) -> None:
        async with asyncio.timeout(5):
            await link.aclose()
        assert link.statistics().posts == 0

    return connect


@pytest.fixture
async def link(connect: Connect) -> SseLink:
    return connect()


# One call


async def test_a_response_that_comes_first_is_answered_as_json_with_the_bytes_it_came_in(
    upstream: Upstream, link: SseLink
) -> None:
    port: Link = link
    odd = '{"id" : 1,"jsonrpc":"2.0",   "result":{"u":"\\u00e9 \u00e9", "n":1.0, "nan": NaN}}'.encode()

    async def answer(request: Request) -> None:
        await upstream.accept(request)
        await upstream.say(event(odd))

    upstream.on_post = answer
    body = b'{"id" : 1, "jsonrpc":"2.0",\n "method":"ping" }'
    reply = await port.post(parse(body), body, POST_HEADERS)
    assert (reply.status, reply.headers, await body_of(reply)) == (200, JSON, odd)
    assert (upstream.posts[0].path, upstream.posts[0].body) == ("/messages?session_id=1", body)
    assert port.resume is None
    port.negotiated("2024-11-05")


async def test_messages_before_the_response_make_an_event_stream_that_ends_with_it(
    upstream: Upstream, link: SseLink
) -> None:
    """B20"""
    lines = [NOTE, request("sampling/createMessage", 1), RESULT]

    async def answer(request: Request) -> None:
        await upstream.accept(request)
        await upstream.say(b"".join(map(event, lines)))

    upstream.on_post = answer
    reply = await post(link, PING)
    assert (reply.status, reply.headers) == (200, SSE)
    assert await body_of(reply) == b"".join(map(event, lines))


async def test_an_answer_may_come_before_its_post_is_answered(upstream: Upstream, link: SseLink) -> None:
    """Some servers answer a POST only when the call is done, and its event has been sent."""
    done = asyncio.Event()

    async def answer(request: Request) -> None:
        await upstream.say(event(result(parse(request.body).id or 0)))
        await done.wait()
        await request.reply(200)

    upstream.on_post = answer
    assert await whole(link, PING) == RESULT
    assert await whole(link, request("ping", 2)) == result(2)
    assert not link.is_closed
    done.set()
    await eventually(lambda: link.statistics().posts == 1)  # the stream


async def test_a_post_that_is_never_answered_is_given_up_a_while_after_its_call(
    upstream: Upstream, link: SseLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse_link, "POST_GRACE_S", 0.05)
    upstream.on_post = lambda request: upstream.say(event(RESULT))
    assert await whole(link, PING) == RESULT
    await asyncio.wait_for(upstream.posts[0].lost.wait(), 5)
    await eventually(lambda: link.statistics().posts == 1)
    upstream.on_post = upstream.answer
    assert await whole(link, PING) == RESULT


async def test_silence_makes_an_event_stream_so_that_comments_can_be_sent(upstream: Upstream, connect: Connect) -> None:
    link = connect(commit_after_s=0.02)
    upstream.on_post = upstream.accept
    reply = await post(link, PING)
    assert (reply.status, reply.headers) == (200, SSE)
    await upstream.say(event(RESULT))
    assert await body_of(reply) == event(RESULT)


@pytest.mark.parametrize(
    "body", [notification("notifications/initialized"), result(5)], ids=["notification", "response"]
)
async def test_a_message_that_wants_no_answer_is_accepted_when_the_server_has_it(
    upstream: Upstream, link: SseLink, body: bytes
) -> None:
    reply = await post(link, body)
    assert (reply.status, reply.headers, await body_of(reply)) == (202, [], b"")
    assert upstream.posts[0].body == body


async def test_a_slow_call_delays_no_other(upstream: Upstream, link: SseLink) -> None:
    """B15"""

    async def answer(request: Request) -> None:
        if b"slow" not in request.body:
            await upstream.answer(request)

    upstream.on_post = answer
    slow = asyncio.ensure_future(whole(link, request("ping", "slow")))
    others = [whole(link, request("ping", number)) for number in range(30)]
    assert await asyncio.gather(*others) == [result(number) for number in range(30)]
    assert not slow.done()
    await upstream.say(event(result("slow")))
    assert await slow == result("slow")


async def test_posts_use_a_connection_again(upstream: Upstream, link: SseLink) -> None:
    for number in range(10):
        await whole(link, request("ping", number))
        await eventually(lambda: link.statistics().posts == 1)
    assert upstream.server.connections == 2  # the stream's, and this


async def test_an_id_in_flight_is_refused_and_not_sent(upstream: Upstream, link: SseLink) -> None:
    upstream.on_post = upstream.accept
    first = asyncio.ensure_future(whole(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)
    reply = await post(link, PING)
    assert (reply.status, json.loads(await body_of(reply))["error"]["code"]) == (400, -32600)
    await upstream.say(event(RESULT))
    assert await first == RESULT
    assert len(upstream.posts) == 1


async def test_the_get_stream_carries_what_belongs_to_no_request(upstream: Upstream, link: SseLink) -> None:
    """B20"""
    reply = await link.get([])
    assert (reply.status, reply.headers) == (200, SSE)
    second = await link.get([])
    assert second.status == 409
    await second.chunks.aclose()
    await whole(link, PING)
    await upstream.say(event(NOTE))
    assert await anext(reply.chunks) == event(NOTE)
    await reply.chunks.aclose()


async def test_a_large_message_passes_both_ways(upstream: Upstream, link: SseLink) -> None:
    """B44"""
    big = "y" * 3_000_000

    async def answer(request: Request) -> None:
        await upstream.accept(request)
        await upstream.say(event(result(1, json.loads(request.body)["params"])))

    upstream.on_post = answer
    assert json.loads(await whole(link, request("big", x=big)))["result"] == {"x": big}


# Opening


async def test_messages_at_once_open_one_stream(upstream: Upstream, link: SseLink) -> None:
    """B12"""
    answers = await asyncio.gather(*(whole(link, request("ping", number)) for number in range(10)))
    assert answers == [result(number) for number in range(10)]
    assert len(upstream.streams) == 1


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("/messages/?session_id=a%2Bb+c", "/messages/?session_id=a%2Bb+c"),
        ("messages?x=1", "/messages?x=1"),
        ("?x=1", "/sse?x=1"),
        ("../a/./b", "/a/b"),
        ("{origin}/other?x", "/other?x"),
        ("//{host}/other", "/other"),
        ("/m?x=1#fragment", "/m?x=1"),
        ("{origin}//elsewhere.example/x", "//elsewhere.example/x"),
        ("/\\elsewhere.example/x", "/%5Celsewhere.example/x"),
    ],
)
async def test_messages_go_where_the_endpoint_event_says(
    upstream: Upstream, link: SseLink, said: str, path: str
) -> None:
    origin = upstream.server.url.removesuffix("/sse")
    said = said.replace("{origin}", origin).replace("{host}", origin.removeprefix("http://"))
    upstream.on_get = lambda request: request.stream(f"event: endpoint\ndata: {said}\n\n".encode(), ends=False)
    assert await whole(link, PING) == RESULT
    assert upstream.posts[0].path == path


@pytest.mark.parametrize(
    "said",
    [
        "http://elsewhere.example/m",
        "//elsewhere.example/m",
        "https://{host}/m",
        "http://{name}:1/m",
        "http://user@{host}/m",
        "http://{host}@elsewhere.example/m",
        "http://{host}.elsewhere.example/m",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "http://[::1/m",
        "http://{name}:port/m",
        "",
        "/m x",
        "/m\ndata: GET / HTTP/1.1",
        "/m\x00",
        "/m\t",
        "/\xff",
        "/" + "m" * 10_000,
    ],
)
async def test_an_endpoint_elsewhere_or_nowhere_opens_no_session(
    upstream: Upstream, connect: Connect, said: str
) -> None:
    """B19: credentials of the configuration go to the configured place only."""
    host = upstream.server.url.removeprefix("http://").removesuffix("/sse")
    said = said.replace("{host}", host).replace("{name}", host.partition(":")[0])
    data = b"event: endpoint\ndata: " + said.encode("latin-1") + b"\n\n"
    upstream.on_get = lambda request: request.stream(data, ends=False)
    with pytest.raises(OpenFailed) as caught:
        await post(connect((("authorization", "Bearer secret"),)), PING)
    assert caught.value.outcome == "not_run"
    assert len(upstream.server.requests) == 1
    assert "elsewhere" not in str(caught.value)
    await asyncio.wait_for(upstream.streams[0].lost.wait(), 5)


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_whatever_an_endpoint_event_says_messages_go_to_the_origin_of_the_stream(said: str) -> None:
    """B30"""
    with contextlib.suppress(OpenFailed):
        found = endpoint_url("http://h.example:8080/sse", said.encode("utf-8", "replace"))
        assert found.startswith("http://h.example:8080")
        assert found[len("http://h.example:8080") :][:1] in ("", "/", "?")


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\n", b": hello\n\n", event(NOTE), ENDPOINT[:-1]])
async def test_a_server_that_names_no_endpoint_is_given_up_in_time_and_may_be_tried_again(
    upstream: Upstream, connect: Connect, beginning: bytes
) -> None:
    """B14"""
    link = connect(open_timeout_s=0.2)

    async def silent(request: Request) -> None:
        if beginning.startswith(b"HTTP") or not beginning:
            await request.send(beginning)
        else:
            await request.stream(beginning, ends=False)

    upstream.on_get = silent
    for result_of in await asyncio.gather(post(link, PING), post(link, NOTE), return_exceptions=True):
        assert isinstance(result_of, OpenFailed)
        assert "no endpoint event" in str(result_of)
    assert not upstream.posts
    assert len(upstream.streams) == 1
    assert not link.is_closed
    await asyncio.wait_for(upstream.streams[0].lost.wait(), 5)
    upstream.on_get = upstream.open
    assert await whole(link, PING) == RESULT
    assert link.statistics().streams.backlog == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda request: request.reply(500, b"secret"), "HTTP status 500"),
        (lambda request: request.reply(404), "HTTP status 404"),
        (lambda request: request.reply(307, b"", "location: /sse/"), "HTTP status 307, and redirects are not followed"),
        (lambda request: request.json(b"{}"), "no event stream"),
        (lambda request: request.reply(204), "HTTP status 204"),
        (
            lambda request: request.reply(200, b"x", "content-type: text/event-stream", "content-encoding: gzip"),
            "compressed",
        ),
        (lambda request: request.stream(ENDPOINT[:20]), "its event stream ended"),
        (lambda request: request.stream(event(NOTE)), "its event stream ended"),
        (lambda request: request.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\x00\r\n"), "upstream"),
        (lambda request: asyncio.sleep(0, request.drop()), "broke"),
    ],
)
async def test_what_is_no_event_stream_opens_no_session(
    upstream: Upstream, link: SseLink, answer: Callable[[Request], Coroutine[Any, Any, None]], said: str
) -> None:
    upstream.on_get = answer
    with pytest.raises(OpenFailed, match="'fake'") as caught:
        await post(link, PING)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not upstream.posts
    upstream.on_get = upstream.open
    assert await whole(link, PING) == RESULT


async def test_an_opening_that_fails_with_an_endpoint_in_hand_has_failed(upstream: Upstream, connect: Connect) -> None:
    link = connect(max_event_bytes=1000)
    upstream.on_get = lambda request: request.stream(ENDPOINT + event(b"x" * 1000), ends=False)
    with pytest.raises(OpenFailed, match="more than 1000 bytes"):
        await post(link, PING)
    upstream.on_get = upstream.open
    assert await whole(link, PING) == RESULT
    assert len(upstream.streams) == 2


async def test_a_stream_that_ends_right_after_its_endpoint_was_a_session(upstream: Upstream, link: SseLink) -> None:
    upstream.on_get = lambda request: request.stream(ENDPOINT)
    with pytest.raises(PoolError) as caught:
        await post(link, PING)
    assert link.is_closed
    assert isinstance(caught.value, SessionClosed | UpstreamLost)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_stream_that_wants_a_credential_says_so_to_the_caller_who_may_try_again_with_one(
    upstream: Upstream, connect: Connect, status: int
) -> None:
    """B18"""
    link = connect((("authorization", "Bearer old"),))

    async def guarded(request: Request) -> None:
        if request.headers["authorization"] == "Bearer new":
            await upstream.open(request)
        else:
            await request.reply(status, b"no", "www-authenticate: Bearer", "content-type: text/plain", "x-own: 1")

    upstream.on_get = guarded
    reply = await post(link, PING)
    assert (reply.status, await body_of(reply)) == (status, b"no")
    assert reply.headers == [(b"www-authenticate", b"Bearer"), (b"content-type", b"text/plain")]
    assert not upstream.posts
    reply = await post(link, PING, own_header(b"authorization", b"Bearer new"))
    assert await body_of(reply) == RESULT
    assert [seen.headers["authorization"] for seen in upstream.posts] == ["Bearer new"]


async def test_a_refused_connection_is_a_call_that_was_not_run(connect: Connect) -> None:
    """B8, B19"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        link = connect(url=f"http://127.0.0.1:{free.getsockname()[1]}/secret-path?key=secret-key")
        for body in (PING, NOTE):
            with pytest.raises(OpenFailed) as caught:
                await post(link, body)
            assert caught.value.outcome == "not_run"
            assert "secret" not in str(caught.value)
            assert "127.0.0.1" not in str(caught.value)
    assert "secret" not in repr(link)


async def test_a_caller_who_leaves_while_the_session_opens_leaves_it_to_others(
    upstream: Upstream, link: SseLink
) -> None:
    """B3"""
    go_on = asyncio.Event()

    async def slow(request: Request) -> None:
        await go_on.wait()
        await upstream.open(request)

    upstream.on_get = slow
    first, second = (asyncio.ensure_future(whole(link, request("ping", number))) for number in (1, 2))
    await eventually(lambda: len(upstream.streams) == 1)
    first.cancel()
    await asyncio.wait([first])
    go_on.set()
    assert await second == result(2)
    assert [message["id"] for message in upstream.messages] == [2]


async def test_a_link_that_is_closed_while_it_opens_tells_who_waits(upstream: Upstream, link: SseLink) -> None:
    upstream.on_get = lambda request: request.send(b"")
    waiting = asyncio.ensure_future(post(link, PING))
    await eventually(lambda: len(upstream.streams) == 1)
    await link.aclose()
    with pytest.raises(SessionClosed):
        await waiting
    await asyncio.wait_for(upstream.streams[0].lost.wait(), 5)
    with pytest.raises(SessionClosed):
        await post(link, PING)


# Headers


async def test_headers_of_the_protocol_pass_and_others_only_where_allowed(upstream: Upstream, connect: Connect) -> None:
    """B17, B19: a client's credential for the gateway is none for the upstream."""
    link = connect((("authorization", "Bearer upstream"), ("x-tenant", "a")), forward_headers=frozenset({"x-user"}))
    hostile = [
        (b"authorization", b"Bearer gateway"),
        (b"cookie", b"theirs=1"),
        (b"host", b"evil.example"),
        (b"last-event-id", b"7"),
        (b"mcp-protocol-version", b"2025-11-25"),
        (b"mcp-session-id", b"gateway-id"),
        (b"x-tenant", b"b"),
        (b"x-user", b"u"),
        (b"x-other", b"o"),
        (b"traceparent", b"00-1-2-03"),
        (b"content-length", b"1"),
    ]
    await body_of(await post(link, PING, *hostile))
    stream, sent = upstream.streams[0].headers, upstream.posts[0].headers
    for headers in (stream, sent):
        assert headers.pop("host").startswith("127.0.0.1:")
    common = {
        "accept-encoding": "identity",
        "authorization": "Bearer upstream",
        "mcp-protocol-version": "2025-11-25",
        "traceparent": "00-1-2-03",
        "x-tenant": "a",
        "x-user": "u",
    }
    assert stream == common | {"accept": "text/event-stream", "cache-control": "no-store"}
    assert sent == common | {
        "accept": "application/json, text/event-stream",
        "content-length": str(len(PING)),
        "content-type": "application/json",
        "last-event-id": "7",
    }


async def test_cookies_belong_to_one_session(upstream: Upstream, connect: Connect) -> None:
    """B17: load balancers pin sessions by cookie."""

    async def open_with_cookie(request: Request) -> None:
        await request.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            b"set-cookie: lb=%d; Path=/; HttpOnly\r\n\r\n" % len(upstream.streams)
        )
        await request.chunk(ENDPOINT)

    upstream.on_get = open_with_cookie
    first = connect()
    await whole(first, PING)
    await whole(connect(), PING)
    upstream.on_post = upstream.accept
    await post(first, NOTE)
    assert [seen.headers["cookie"] for seen in upstream.posts] == ["lb=1", "lb=2", "lb=1"]


# The fence


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("turn", range(10))
async def test_the_fence_is_asked_in_the_turn_of_the_loop_in_which_the_first_byte_is_written(
    upstream: Upstream, connect: Connect, method: str, turn: int
) -> None:
    """B28: whenever the lease ends, what had not been written by then never is."""
    held = True

    def fence() -> None:
        if not held:
            raise Fenced("lease over")

    link = connect(fence=fence)
    used = link if method == "POST" else connect()
    await whole(used, PING)  # so that there is a free connection, whose bytes can be looked for
    await eventually(lambda: used.statistics().posts == 1)
    before = len(upstream.server.requests)
    at_server = [transport.get_extra_info("socket").fileno() for transport in upstream.server.transports]
    calling = asyncio.create_task(post(link, request("ping", 2)))
    for _ in range(turn):
        await asyncio.sleep(0)
    readable, _, _ = select.select(at_server, [], [], 0)
    written = bool(readable) or len(upstream.server.requests) > before
    held = False
    if written and method == "POST":
        assert (await calling).status == 200
    else:
        with pytest.raises(Fenced) as caught:
            await calling
        assert caught.value.outcome == "not_run"
        assert len(upstream.server.requests) == before + written
    held = True
    assert await whole(link, request("ping", 3)) == result(3), "the link itself is unharmed"


@pytest.mark.parametrize("turn", range(12))
async def test_a_caller_who_leaves_before_the_write_has_sent_nothing(
    upstream: Upstream, link: SseLink, turn: int
) -> None:
    """B3: at whichever turn; its id is free again exactly if it was not sent."""
    await whole(link, PING)
    await eventually(lambda: link.statistics().posts == 1)
    upstream.on_post = upstream.accept
    calling = asyncio.create_task(post(link, request("ping", 2)))
    for _ in range(turn):
        await asyncio.sleep(0)
    calling.cancel()
    await asyncio.wait([calling])
    taken = link.statistics().streams.abandoned == 1
    await post(link, NOTE)  # by now it would have arrived
    assert [message.get("id") for message in upstream.messages] == ([1, 2, None] if taken else [1, None])
    assert link.statistics().streams.in_flight == 0
    await eventually(lambda: link.statistics().posts == 1)


@pytest.mark.parametrize("body", [request("ping", 2), NOTE], ids=["request", "notification"])
@pytest.mark.parametrize("turn", [0, 1, 2, 3, 4, 5, 6, 7, 8, 19])
async def test_a_call_that_the_end_of_the_session_overtakes_says_whether_it_may_have_run(
    upstream: Upstream, connect: Connect, turn: int, body: bytes
) -> None:
    """B33"""
    link = connect()
    await whole(link, PING)
    await eventually(lambda: link.statistics().posts == 1)
    upstream.on_post = lambda request: request.send(b"")
    calling = asyncio.create_task(post(link, body))
    for _ in range(turn):
        await asyncio.sleep(0)
    await link.aclose()
    with pytest.raises(UpstreamLost if turn == 19 else SessionClosed if turn < 2 else PoolError) as caught:
        await calling
    if caught.value.outcome == "not_run":
        assert isinstance(caught.value, SessionClosed)
        upstream.on_post = upstream.answer
        await whole(connect(), PING)  # by now it would have arrived
        assert [message["id"] for message in upstream.messages] == [1, 1]


async def test_a_notification_whose_caller_left_holds_nothing_up(
    upstream: Upstream, link: SseLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B3"""
    monkeypatch.setattr(sse_link, "POST_GRACE_S", 0.05)
    upstream.on_post = lambda request: request.send(b"")
    telling = asyncio.create_task(post(link, NOTE))
    await eventually(lambda: len(upstream.posts) == 1)
    telling.cancel()
    await asyncio.wait([telling])
    await eventually(lambda: link.statistics().posts == 1)
    await asyncio.wait_for(upstream.posts[0].lost.wait(), 5)


# What a POST may be answered with


async def test_a_post_that_breaks_costs_its_own_call_and_no_other(upstream: Upstream, link: SseLink) -> None:
    """B9"""

    async def answer(request: Request) -> None:
        if b"drop" in request.body:
            request.drop()
        else:
            await upstream.accept(request)

    upstream.on_post = answer
    other = asyncio.ensure_future(whole(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)
    begun = time.monotonic()
    for body in (request("drop", 2), notification("notifications/drop")):
        with pytest.raises(UpstreamLost) as caught:
            await post(link, body)
        assert caught.value.outcome == "unknown"
    assert time.monotonic() - begun < 1
    assert not link.is_closed
    await upstream.say(event(result(2)) + event(RESULT))
    assert await other == RESULT
    assert link.statistics().streams.late_responses == 1
    assert len(upstream.posts) == 3, "nothing is sent twice"


async def test_a_post_whose_connection_is_refused_was_not_run(upstream: Upstream, link: SseLink) -> None:
    """B8"""
    upstream.on_post = lambda request: request.send(b"")
    other = asyncio.ensure_future(whole(link, PING))  # it keeps the only other connection busy
    await eventually(lambda: len(upstream.posts) == 1)
    upstream.server.refuse()
    for body in (request("ping", 2), NOTE, request("ping", 2)):
        with pytest.raises(OpenFailed) as caught:
            await post(link, body)
        assert caught.value.outcome == "not_run"
    assert not link.is_closed
    await upstream.say(event(RESULT))
    assert await other == RESULT


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("body", [request("ping", 2), NOTE], ids=["request", "notification"])
async def test_a_session_that_the_server_knows_no_more_has_ended(
    upstream: Upstream, link: SseLink, status: int, body: bytes
) -> None:
    """B7"""
    upstream.on_post = upstream.accept
    stream = await link.get([])
    other = asyncio.ensure_future(post(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)
    upstream.on_post = lambda request: request.reply(status, b"Could not find session", "content-type: text/plain")
    reply = await post(link, body)
    assert (reply.status, await body_of(reply)) == (404, b"Could not find session")
    assert reply.headers == [(b"content-type", b"text/plain")]
    with pytest.raises(UpstreamLost):
        await other
    await asyncio.wait_for(link.wait_closed(), 1)
    assert await body_of(stream) == b""
    with pytest.raises(SessionClosed):
        await post(link, PING)
    assert len(upstream.server.requests) == 3
    await asyncio.wait_for(upstream.streams[0].lost.wait(), 5)


@pytest.mark.parametrize("status", [302, 400, 401, 413, 429, 500, 503])
async def test_any_other_refusal_is_passed_to_its_caller_and_ends_nothing(
    upstream: Upstream, link: SseLink, status: int
) -> None:
    headers = ("content-type: text/plain", "retry-after: 3", "location: http://internal/", "set-cookie: a=1")
    upstream.on_post = lambda request: request.reply(status, b"why", *headers)
    for body in (PING, NOTE):
        reply = await post(link, body)
        assert (reply.status, await body_of(reply)) == (status, b"why")
        assert reply.headers == [(b"content-type", b"text/plain"), (b"retry-after", b"3")]
    assert not link.is_closed
    upstream.on_post = upstream.answer
    # What a proxy answered with 5xx may have been taken all the same: its late answer is not given to another.
    assert (await post(link, PING)).status == (200 if status < 500 else 400)
    assert await whole(link, request("ping", 2)) == result(2)


async def test_a_refusal_that_comes_after_the_first_event_ends_the_stream_of_its_call(
    upstream: Upstream, link: SseLink
) -> None:
    token = notification("notifications/progress", progressToken="t", progress=1)

    async def answer(request: Request) -> None:
        await upstream.say(event(token))
        await asyncio.sleep(0.05)
        await request.reply(500)

    upstream.on_post = answer
    reply = await post(link, request("ping", 1, _meta={"progressToken": "t"}))
    assert await anext(reply.chunks) == event(token)
    with pytest.raises(UpstreamLost, match="500"):
        await anext(reply.chunks)


async def test_a_refusal_without_end_is_cut(upstream: Upstream, link: SseLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """B44"""
    monkeypatch.setattr("leasehold.pool.sse_stream.BODY_TIMEOUT_S", 0.2)

    async def endless(request: Request) -> None:
        await request.send(b"HTTP/1.1 400 X\r\ncontent-length: 1000000000\r\n\r\n")
        if b'"id": 2' not in request.body:
            await request.send(b"x" * 1_000_000)

    upstream.on_post = endless
    assert len(await body_of(await post(link, PING))) == 64 << 10
    assert await body_of(await post(link, request("ping", 2))) == b""
    await asyncio.wait_for(asyncio.gather(*(seen.lost.wait() for seen in upstream.posts)), 5)


# Time and cancellation


async def test_a_silent_server_is_given_up_after_the_call_timeout_and_the_session_stays_usable(
    upstream: Upstream, connect: Connect
) -> None:
    """B9"""
    link = connect(call_timeout_s=0.2)
    upstream.on_post = upstream.accept
    with pytest.raises(CallTimeout) as caught:
        await post(link, PING)
    assert caught.value.outcome == "unknown"
    upstream.on_post = lambda request: request.send(b"")
    for body in (request("ping", 2), NOTE):
        with pytest.raises(CallTimeout):
            await post(link, body)
    upstream.on_post = upstream.answer
    await upstream.say(event(RESULT))
    assert await whole(link, request("ping", 3)) == result(3)
    assert link.statistics().streams.late_responses == 1


async def test_progress_postpones_the_timeout_also_while_the_post_is_unanswered(
    upstream: Upstream, connect: Connect
) -> None:
    link = connect(call_timeout_s=0.5)
    upstream.on_post = lambda request: request.send(b"")
    token = event(notification("notifications/progress", progressToken=7, progress=1))
    calling = asyncio.ensure_future(post(link, request("ping", 1, _meta={"progressToken": 7})))
    await eventually(lambda: len(upstream.posts) == 1)
    chunks, begun = None, time.monotonic()
    while time.monotonic() - begun < 0.9:
        await upstream.say(token)
        chunks = chunks or (await calling).chunks
        assert await anext(chunks) == token
        await asyncio.sleep(0.05)
    await upstream.say(event(RESULT))
    assert chunks is not None
    assert await anext(chunks) == event(RESULT)
    await chunks.aclose()


async def test_a_cancelled_request_ends_with_an_error_and_its_late_response_is_dropped(
    upstream: Upstream, link: SseLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplex_link, "CANCEL_GRACE_S", 0.05)
    upstream.on_post = upstream.accept
    waiting = asyncio.ensure_future(post(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)
    cancel = notification("notifications/cancelled", requestId=1)
    assert (await post(link, cancel)).status == 202
    reply = await waiting
    assert reply.headers == SSE
    assert b'"code":-32800' in await body_of(reply)
    assert upstream.posts[1].body == cancel
    await upstream.say(event(RESULT))
    await eventually(lambda: link.statistics().streams.late_responses == 1)


async def test_a_cancellation_does_not_overtake_its_request(upstream: Upstream, link: SseLink) -> None:
    """B42: order per session holds."""
    accepted = asyncio.Event()

    async def slow(request: Request) -> None:
        if b"ping" in request.body:
            await accepted.wait()
        await upstream.accept(request)

    upstream.on_post = slow
    waiting = asyncio.ensure_future(post(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)
    cancelling = asyncio.ensure_future(post(link, notification("notifications/cancelled", requestId=1)))
    await asyncio.sleep(0.1)
    assert len(upstream.posts) == 1
    accepted.set()
    assert (await cancelling).status == 202
    assert len(upstream.posts) == 2
    await upstream.say(event(RESULT))
    assert await body_of(await waiting) == event(RESULT)


@pytest.mark.parametrize("id_of_nothing", [7, "1", True, None, [], {}, 1.0])
async def test_a_cancellation_of_nothing_is_passed_on(upstream: Upstream, link: SseLink, id_of_nothing: object) -> None:
    upstream.on_post = upstream.accept
    assert (await post(link, notification("notifications/cancelled", requestId=id_of_nothing))).status == 202


async def test_a_client_that_goes_away_cancels_nothing(upstream: Upstream, link: SseLink) -> None:
    upstream.on_post = upstream.accept
    waiting = asyncio.ensure_future(post(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert (await post(link, PING)).status == 400
    await upstream.say(event(RESULT))
    await eventually(lambda: link.statistics().streams.late_responses == 1)
    assert len(upstream.posts) == 1


# The end of the stream


@pytest.mark.parametrize("end", ["ends", "ends in mid-event", "breaks", "breaks in mid-event", "is no HTTP"])
async def test_when_the_stream_ends_every_call_in_flight_ends_at_once(
    upstream: Upstream, connect: Connect, end: str
) -> None:
    """B1, B9"""
    link = connect(commit_after_s=0.05)
    upstream.on_post = upstream.accept
    listening = await link.get([])
    streaming = (await post(link, request("ping", "streaming"))).chunks
    waiting = asyncio.ensure_future(whole(link, request("ping", "waiting")))
    upstream.on_post = lambda request: request.send(b"")
    unanswered = asyncio.ensure_future(whole(link, request("ping", "unanswered")))
    telling = asyncio.ensure_future(post(link, NOTE))
    await eventually(lambda: len(upstream.posts) == 4)
    begun = time.monotonic()
    if "mid-event" in end:
        await upstream.say(event(result("waiting"))[:-1])
    if end.startswith("breaks"):
        upstream.streams[0].drop()
    elif end == "is no HTTP":
        await upstream.streams[0].send(b"zzz\r\n")
    else:
        await upstream.streams[0].end()
    for doomed in (waiting, unanswered, telling, anext(streaming)):
        with pytest.raises(UpstreamLost) as caught:
            await doomed
        assert "'fake': its event stream" in str(caught.value)
    assert link.is_closed
    await link.wait_closed()
    assert time.monotonic() - begun < 1
    assert await body_of(listening) == b""
    for refused in (post(link, PING), post(link, NOTE), link.get([]), link.delete([])):
        with pytest.raises(SessionClosed) as closed:
            await refused
        assert closed.value.outcome == "not_run"
    assert len(upstream.streams) == 1
    assert "closed (its event stream" in repr(link)


async def test_the_last_words_of_a_server_are_delivered_before_its_end(upstream: Upstream, link: SseLink) -> None:
    async def answer(request: Request) -> None:
        await upstream.accept(request)
        await upstream.say(event(RESULT))
        await upstream.streams[0].end()

    upstream.on_post = answer
    assert await whole(link, PING) == RESULT
    await asyncio.wait_for(link.wait_closed(), 1)


async def test_a_session_that_ended_while_idle_is_known_to_have(upstream: Upstream, connect: Connect) -> None:
    """B1"""
    link = connect(open_timeout_s=0.1)
    await whole(link, PING)
    await asyncio.sleep(0.3)  # a stream may be silent for longer than opening it may take
    assert not link.is_closed
    upstream.streams[0].drop()
    await asyncio.wait_for(link.wait_closed(), 1)
    assert link.is_closed


async def test_delete_ends_the_session(upstream: Upstream, link: SseLink) -> None:
    upstream.on_post = upstream.accept
    stream = await link.get([])
    waiting = asyncio.ensure_future(post(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)
    reply = await link.delete([])
    assert (reply.status, await body_of(reply)) == (200, b"")
    assert link.is_closed
    answer = json.loads((await body_of(await waiting)).rpartition(b"data: ")[2])
    assert answer["error"]["data"] == {"outcome": "unknown"}
    assert await body_of(stream) == b""
    await asyncio.wait_for(upstream.streams[0].lost.wait(), 5)


async def test_closing_ends_calls_and_connections_at_once(upstream: Upstream, link: SseLink) -> None:
    """B14"""
    upstream.on_post = lambda request: request.send(b"")
    calls = [asyncio.ensure_future(post(link, body)) for body in (PING, request("ping", 2), NOTE)]
    await eventually(lambda: len(upstream.posts) == 3)
    begun = time.monotonic()
    await asyncio.gather(link.aclose(), link.aclose())
    for call in calls:
        with pytest.raises(UpstreamLost):
            await call
    assert time.monotonic() - begun < 1
    lost = [seen.lost.wait() for seen in upstream.server.requests]
    await asyncio.wait_for(asyncio.gather(*lost), 5)


async def test_a_link_that_was_never_used_closes_as_well(upstream: Upstream, link: SseLink) -> None:
    await link.aclose()
    assert link.is_closed
    with pytest.raises(SessionClosed):
        await post(link, PING)
    assert not upstream.server.requests


async def test_a_peer_that_vanishes_without_a_word_will_be_noticed(upstream: Upstream, link: SseLink) -> None:
    """B9: the system asks after it, and ends the stream when nothing answers."""
    await whole(link, PING)
    stream_port = upstream.streams[0].transport.get_extra_info("peername")[1]
    (fd,) = (conn.fd for conn in psutil.Process().net_connections("tcp") if conn.laddr.port == stream_port)
    with socket.socket(fileno=os.dup(fd)) as same:
        assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


# Hostile and odd streams


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_events_are_found_however_they_are_written_and_cut(
    upstream: Upstream, link: SseLink, newline: bytes, size: int
) -> None:
    """B30"""
    text = (
        b"\xef\xbb\xbfevent:endpoint\ndata:/messages\n\n: a comment\n\n:\n\n\n\nid: 1\nretry: 5\n\n"
        b'event: message\nid: 2\ndata: {"jsonrpc":"2.0",\ndata: "id":1,\ndata:"result":{}}\n\n'
    ).replace(b"\n", newline)
    opened = asyncio.Event()

    async def cut(request: Request) -> None:
        await request.stream(ends=False)
        for start in range(0, len(text), size):
            if text.find(b"comment") < start:
                await opened.wait()
            await request.chunk(text[start : start + size])
            await asyncio.sleep(0.001)

    async def accept(request: Request) -> None:
        await upstream.accept(request)
        opened.set()

    upstream.on_get, upstream.on_post = cut, accept
    if size == 1000:
        opened.set()  # the answer comes with the endpoint, before the question: it belongs to nobody
        upstream.on_post = upstream.answer
        assert await whole(link, PING) == RESULT
        assert link.statistics().streams.unmatched_responses == 1
    else:
        assert await whole(link, PING) == b'{"jsonrpc":"2.0", "id":1, "result":{}}'


async def test_what_is_no_message_is_passed_over_and_not_shown(
    upstream: Upstream, link: SseLink, caplog: pytest.LogCaptureFixture
) -> None:
    """B19, B30"""
    odd = [b'{"secret"', b'["secret"]', b'"secret"', b"\xff\xfe", b"[" * 5000, b"9" * 100_000, b'{"jsonrpc":"1.0"}']
    ignored = [
        b"event: endpoint\ndata: http://elsewhere.example/\n\n",
        b"event: ping\ndata: secret\n\n",
        b"event\ndata\n\n",
        b": comment\n\n",
    ]

    async def answer(request: Request) -> None:
        await upstream.accept(request)
        await upstream.say(b"".join([*map(event, odd), *ignored, event(result(99)), b"data: %b\n\n" % RESULT]))

    upstream.on_post = answer
    with caplog.at_level(logging.INFO):
        assert await whole(link, PING) == RESULT
    counts = link.statistics()
    assert (counts.invalid_events, counts.ignored_events) == (7, 2)
    assert counts.streams.unmatched_responses == 1
    assert caplog.text.count("event_skipped upstream=fake") == 3  # the 1st, 2nd and 4th
    assert "secret" not in caplog.text
    upstream.on_post = upstream.answer
    await whole(link, request("ping", 2))
    assert upstream.posts[-1].path == "/messages?session_id=1"


@pytest.mark.parametrize("is_whole", [True, False])
async def test_an_event_above_the_limit_ends_the_session(upstream: Upstream, connect: Connect, is_whole: bool) -> None:
    """B44: whose answer it was is unknown, and its caller would wait in vain."""
    link = connect(max_event_bytes=10_000)
    upstream.on_post = upstream.accept
    calls = [asyncio.ensure_future(post(link, request("ping", number))) for number in range(3)]
    await eventually(lambda: len(upstream.posts) == 3)
    await upstream.say(event(b"x" * 10_000) if is_whole else b"data: " + b"x" * 10_000)
    for call in calls:
        with pytest.raises(UpstreamLost, match="more than 10000 bytes"):
            await call
    await asyncio.wait_for(upstream.streams[0].lost.wait(), 5)


async def test_a_client_that_does_not_read_is_cut_off_and_delays_nobody(upstream: Upstream, link: SseLink) -> None:
    """B44"""
    upstream.on_post = upstream.answer
    slow = await link.get([])
    await whole(link, PING)
    note = event(notification("notifications/message", x="x" * (1 << 20)))
    for _ in range(12):
        await upstream.say(note)
    await eventually(lambda: link.statistics().streams.slow_streams == 1)
    assert (await whole(link, request("ping", 2))).endswith(event(result(2)))
    with pytest.raises(UpstreamLost, match="too slowly"):
        await body_of(slow)


async def test_an_error_of_our_own_ends_the_session_and_not_in_silence(
    upstream: Upstream, link: SseLink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """B45: a stream that nobody reads is no session."""
    upstream.on_post = upstream.accept
    waiting = asyncio.ensure_future(post(link, PING))
    await eventually(lambda: len(upstream.posts) == 1)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(link, "_receive", fail)
    await upstream.say(event(RESULT))
    with pytest.raises(UpstreamLost, match="could not be read"):
        await waiting
    assert link.is_closed
    assert "event_stream_failed upstream=fake" in caplog.text


# The SDK's server


class Client:
    """Calls tools as an MCP client would, and answers what the server asks."""

    def __init__(self, link: SseLink, url: str) -> None:
        self.link = link
        self.url = url
        self.asked: list[Any] = []
        self.answers: dict[str, Any] = {}

    async def initialize(self) -> Any:
        client = {"name": "test", "version": "1"}
        capabilities = {"sampling": {}, "elicitation": {}, "roots": {}}
        body = request("initialize", 0, protocolVersion="2025-11-25", capabilities=capabilities, clientInfo=client)
        answer = json.loads(await whole(self.link, body))
        assert (await post(self.link, notification("notifications/initialized"))).status == 202
        return answer["result"]

    async def use(self, tool: str, identifier: str | int, **arguments: Any) -> tuple[list[Any], str]:
        """What came before the answer, and the answer's text."""
        meta = {"progressToken": f"token-{identifier}"}
        reply = await post(self.link, request("tools/call", identifier, name=tool, arguments=arguments, _meta=meta))
        assert reply.status == 200, reply
        if reply.headers != SSE:
            return [], json.loads(await body_of(reply))["result"]["content"][0]["text"]
        seen: list[Any] = []
        async for chunk in reply.chunks:
            seen.append(json.loads(chunk.removeprefix(b"event: message\ndata: ")))
            if "id" in seen[-1] and "method" in seen[-1]:
                answer = result(seen[-1]["id"], self.answers[seen[-1]["method"]])
                assert (await post(self.link, answer)).status == 202
        *before, last = seen
        return before, last["result"]["content"][0]["text"]

    async def until_held(self, names: str) -> None:
        """Wait until the server runs the calls of `hold` with these names."""
        async with asyncio.timeout(20):
            while (await self.use("held", "held"))[1] != names:
                await asyncio.sleep(0.01)


@pytest.fixture
async def sdk(connect: Connect) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    """The SDK's server in a process of its own, and a client whose session is initialized."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SDK_SERVER), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            url = f"http://127.0.0.1:{int(await process.stdout.readline())}/sse"
        client = Client(connect(url=url, name="sdk"), url)
        assert (await client.initialize())["serverInfo"]["name"] == "everything"
        yield process, client
        await client.link.aclose()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


Sdk = tuple[asyncio.subprocess.Process, Client]


@pytest.mark.process
async def test_everything_that_flows_against_the_stream_passes_the_sdks_server(sdk: Sdk) -> None:
    """B20: progress, logging, elicitation, sampling, roots and notifications, in both directions."""
    _, client = sdk
    listed = json.loads(await whole(client.link, request("tools/list", 1)))["result"]["tools"]
    assert {"count", "ask", "sample", "roots", "log"} <= {tool["name"] for tool in listed}
    progress, text = await client.use("count", 2, upto=3)
    assert [step["params"]["progress"] for step in progress] == [1, 2, 3]
    assert text == "counted to 3"
    logged, text = await client.use("log", 3, text="hello")
    assert [message["params"]["data"] for message in logged] == ["hello"]
    client.answers = {
        "elicitation/create": {"action": "accept", "content": {"name": "Ada"}},
        "sampling/createMessage": {"role": "assistant", "content": {"type": "text", "text": "hard"}, "model": "m"},
        "roots/list": {"roots": [{"uri": "file:///a"}]},
    }
    texts = {"ask": "hello Ada", "sample": "thought hard", "roots": "1 roots"}
    for (tool, expected), (number, method) in zip(texts.items(), enumerate(client.answers, start=4), strict=True):
        asked, text = await client.use(tool, number)
        assert ([message["method"] for message in asked], text) == ([method], expected)
    changed, _ = await client.use("rename", 9)
    assert [message["method"] for message in changed] == ["notifications/tools/list_changed"]


@pytest.mark.process
async def test_a_slow_call_at_the_sdks_server_delays_no_other(sdk: Sdk) -> None:
    """B15"""
    _, client = sdk
    slow = asyncio.ensure_future(client.use("hold", "slow", name="a"))
    await client.until_held("a")
    answers = await asyncio.gather(*(client.use("count", number, upto=1) for number in range(1, 20)))
    assert [text for _, text in answers] == ["counted to 1"] * 19
    assert not slow.done()
    await client.use("release", "release", name="a")
    assert (await slow)[1] == "released a"


@pytest.mark.process
async def test_a_call_at_the_sdks_server_can_be_cancelled(sdk: Sdk) -> None:
    """B20"""
    _, client = sdk
    body = request("tools/call", 5, name="hold", arguments={"name": "a"})
    waiting = asyncio.ensure_future(post(client.link, body))
    await client.until_held("a")
    assert (await post(client.link, notification("notifications/cancelled", requestId=5))).status == 202
    answer = json.loads((await body_of(await waiting)).rpartition(b"data: ")[2])
    assert "error" in answer
    assert (await client.use("count", 7, upto=1))[1] == "counted to 1"


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_an_sdk_server_that_dies_in_mid_call_fails_every_caller_at_once(sdk: Sdk, number: signal.Signals) -> None:
    """B1, B9"""
    process, client = sdk
    calls = [asyncio.ensure_future(client.use("hold", name, name=name)) for name in "abc"]
    await client.until_held("a b c")
    process.send_signal(number)
    if number is signal.SIGTERM:
        # uvicorn asks its streams to end and waits for them: that they end is what is waited for here.
        await asyncio.wait_for(client.link.wait_closed(), 20)
    begun = time.monotonic()
    for call in calls:
        with pytest.raises(UpstreamLost):
            await call
    assert client.link.is_closed
    assert time.monotonic() - begun < 1
    with pytest.raises(SessionClosed):
        await client.use("count", 2, upto=1)


@pytest.mark.process
async def test_an_sdk_server_that_is_frozen_costs_each_call_its_own_timeout(sdk: Sdk, connect: Connect) -> None:
    """B9"""
    process, client = sdk
    impatient = Client(connect(url=client.url, name="sdk", call_timeout_s=1.0), client.url)
    await impatient.initialize()
    process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    outcomes = await asyncio.gather(
        *(impatient.use("count", number, upto=1) for number in range(1, 5)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [CallTimeout] * 4
    assert time.monotonic() - begun < 5
    process.send_signal(signal.SIGCONT)
    assert (await impatient.use("count", 9, upto=1))[1] == "counted to 1"
