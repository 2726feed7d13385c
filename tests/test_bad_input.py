"""Bad requests, bad configuration and a Redis that is not there, against real gateway processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from faults import Mode, proxied
from fleet import EXAMPLES, SECRET, Running, get, run_example, run_gateway, run_process, wait_until, write_config
from leasehold.coordinator.embedded import EmbeddedRedis
from leasehold.pool.sse import event
from leasehold.workers.identity import ID_CHARACTERS
from mcp_http import HEADERS, VERSION, Answer, RawSession

pytestmark = [pytest.mark.anyio, pytest.mark.process]

ALICE, BOB = {"authorization": "Bearer alice"}, {"authorization": "Bearer bob"}
LIMIT = 4 * 1024 * 1024
PARAMS = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
INITIALIZE = {"jsonrpc": "2.0", "id": "init", "method": "initialize", "params": PARAMS}
PING = {"jsonrpc": "2.0", "id": "p1", "method": "ping"}


@dataclass
class Odd:
    """An upstream whose behaviour is its path; notes what it is asked."""

    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


def _answer(handler: BaseHTTPRequestHandler, odd: Odd) -> None:
    body = handler.rfile.read(int(handler.headers.get("content-length", "0")))
    message = json.loads(body) if body else {}
    odd.asked.append((handler.path, message.get("method") or handler.command))
    odd.arrived.set()
    result = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "odd", "version": "1"}}
    answer: dict[str, Any] = {"jsonrpc": "2.0", "id": message.get("id"), "result": result}
    content_type, session_id = "application/json", "odd"
    if message.get("method") == "initialize":
        match handler.path:
            case "/html":
                content_type, session_id = "text/html", ""
            case "/error":
                answer = {"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32602, "message": "not you"}}
            case "/slow":
                odd.go_on.wait(20)
            case "/endless":
                handler.send_response(200)
                handler.send_header("content-type", "text/event-stream")
                handler.send_header("mcp-session-id", "odd")
                handler.end_headers()
                notification = b'{"jsonrpc":"2.0","method":"notifications/message","params":{}}'
                handler.wfile.write(event(notification) + event(json.dumps(answer).encode()))
                handler.wfile.flush()
                odd.go_on.wait(20)
                handler.close_connection = True
                return
    payload = b"<html>" if content_type == "text/html" else json.dumps(answer).encode()
    handler.send_response(200 if "id" in message or handler.command != "POST" else 202)
    handler.send_header("content-type", content_type)
    handler.send_header("content-length", str(len(payload)))
    if session_id:
        handler.send_header("mcp-session-id", session_id)
    handler.end_headers()
    handler.wfile.write(payload)


@contextmanager
def run_odd() -> Iterator[Odd]:
    odd = Odd()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            try:
                _answer(self, odd)
            except OSError:
                self.close_connection = True

        do_GET = do_DELETE = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        odd.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield odd
        odd.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def odd() -> Iterator[Odd]:
    with run_odd() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, odd: Odd) -> Iterator[Running]:
    """One worker with two tokens, in front of a real server by both transports, and of odd ones."""
    folder = tmp_path_factory.mktemp("bad_input")
    with run_example("counter_http.py", folder) as upstream, EmbeddedRedis() as redis:
        servers: dict[str, Any] = {
            "http": {"url": upstream.url},
            "stdio": {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]},
            "dead": {"url": "http://127.0.0.1:1/mcp"},
            **{name: {"url": f"{odd.url}/{name}"} for name in ("html", "error", "slow", "endless")},
        }
        env = {"LEASEHOLD_TOKENS": "alice,bob"}
        with run_gateway(write_config(folder, servers), folder, redis_url=redis.url, env=env) as running:
            yield running
            assert running.process.poll() is None, "it lived through everything"
            assert "Traceback" not in running.output(), running.output()


@pytest.fixture
def quiet_gateway(tmp_path: Path, odd: Odd, redis_url: str) -> Iterator[Running]:
    """A gateway of its own for a test that counts sessions: elsewhere one of an earlier test may be on its way out."""
    servers = {"slow": {"url": f"{odd.url}/slow"}}
    env = {"LEASEHOLD_TOKENS": "alice"}
    with run_gateway(write_config(tmp_path, servers), tmp_path, redis_url=redis_url, env=env) as running:
        yield running
        assert "Traceback" not in running.output(), running.output()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


def endpoint(gateway: Running, server: str = "http") -> str:
    return f"{gateway.url}/servers/{server}/mcp"


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    body: Any = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    bare: bool = False,
) -> Answer:
    """One request as Alice's, unless `headers` say otherwise; `bare`: with these headers only."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {**({} if bare else {**HEADERS, **ALICE}), **(headers or {})}
    async with http.request(
        method, url, data=data, headers=sent, skip_auto_headers=["content-type", "accept"]
    ) as reply:
        received = await reply.read()
        answer = Answer(reply.status, {k.lower(): v for k, v in reply.headers.items()}, received)
    if received.startswith(b"{"):
        answer.message = json.loads(received)
    return answer


def refused(answer: Answer, status: int, code: int, id: Any = None) -> None:  # noqa: A002
    """Check that an answer is a JSON-RPC error, and tells nothing of the inside."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.message) == {"jsonrpc", "id", "error"}
    assert answer.message["id"] == id
    assert answer.error["code"] == code
    assert 0 < len(answer.error["message"]) < 200
    for word in (b"Traceback", b".py", b"Error(", b"leasehold."):
        assert word not in answer.body


async def raw(gateway: Running, request: bytes) -> bytes:
    """Send bytes as they are; everything that comes back until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def raw_post(gateway: Running, *lines: bytes, body: bytes = json.dumps(PING).encode(), server: str = "http") -> bytes:
    host = gateway.url.removeprefix("http://").encode()
    head = [
        b"POST /servers/%b/mcp HTTP/1.1" % server.encode(),
        b"host: " + host,
        b"connection: close",
        b"content-type: application/json",
        b"accept: application/json, text/event-stream",
        b"content-length: %d" % len(body),
        *lines,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 30) -> None:
    """As `wait_until`, off the loop: the other end of what is waited for may live there."""
    await asyncio.to_thread(wait_until, condition, what, timeout_s)


def sessions_now(gateway: Running) -> float:
    found = re.search(rb"^leasehold_sessions(?:\{[^}]*\})? (\S+)$", get(f"{gateway.url}/metrics")[1], re.MULTILINE)
    assert found is not None
    return float(found[1])


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["http", "stdio"])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"not json", -32700),
        (b"\xff\xfe\x00", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping"', -32700),
        (b"[" * 100_000, -32700),
        (b"[]", -32600),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', -32600),
        (b"null", -32600),
        (b"{}", -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', -32600),
    ],
)
async def test_a_body_that_is_no_message_is_a_bad_request(
    gateway: Running, http: aiohttp.ClientSession, server: str, body: bytes, code: int
) -> None:
    """B50"""
    refused(await ask(http, endpoint(gateway, server), body), 400, code)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"accept": "application/json"}, 406),
        ({"accept": "text/event-stream"}, 406),
        ({"accept": "text/html"}, 406),
    ],
)
async def test_wrong_content_type_and_accept_are_refused(
    gateway: Running, http: aiohttp.ClientSession, headers: dict[str, str], status: int
) -> None:
    """B50"""
    refused(await ask(http, endpoint(gateway), PING, headers=headers), status, -32600)


@pytest.mark.parametrize(
    "name", ["nobody", "HTTP", "http%20", "%2e%2e", "http%00", "%2568ttp", "http/x", "", "x" * 5000]
)
async def test_an_unknown_server_is_not_found(gateway: Running, http: aiohttp.ClientSession, name: str) -> None:
    """B50"""
    from yarl import URL

    url: Any = URL(f"{gateway.url}/servers/{name}/mcp", encoded=True)
    refused(await ask(http, url, PING), 404, -32600)


async def test_a_trailing_slash_is_the_same_endpoint(gateway: Running, http: aiohttp.ClientSession) -> None:
    async with RawSession(http, endpoint(gateway) + "/", ALICE) as session:
        assert (await session.call("increment")).text == "1"


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "HEAD", "TRACE"])
async def test_a_wrong_method_is_told_the_right_ones(
    gateway: Running, http: aiohttp.ClientSession, method: str
) -> None:
    """B50"""
    answer = await ask(http, endpoint(gateway), method=method)
    assert answer.status == 405
    assert answer.headers["allow"] == "POST, GET, DELETE"
    if method != "HEAD":
        refused(answer, 405, -32600)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_operations_answer_to_head_and_refuse_what_would_change_something(
    gateway: Running, http: aiohttp.ClientSession, path: str
) -> None:
    head = await ask(http, gateway.url + path, method="HEAD", bare=True)
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) > 0
    answer = await ask(http, gateway.url + path, b"x" * 100_000, bare=True)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/mcp", "/servers", "/servers/http", "/servers/http/sse", "/metrics/x"])
async def test_other_paths_are_not_found(gateway: Running, http: aiohttp.ClientSession, path: str) -> None:
    refused(await ask(http, gateway.url + path, method="GET"), 404, -32600)


# -- who may come in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer carol", "Basic alice", "alice"])
async def test_without_one_of_its_tokens_the_gateway_is_closed(
    gateway: Running, http: aiohttp.ClientSession, authorization: str | None
) -> None:
    """B50"""
    headers = HEADERS if authorization is None else {**HEADERS, "authorization": authorization}
    for server in ("http", "nobody"):
        answer = await ask(http, endpoint(gateway, server), PING, headers=headers, bare=True)
        refused(answer, 401, -32600)
        assert answer.headers["www-authenticate"] == 'Bearer realm="leasehold"'


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://[", "http://localhost.evil.example", "x"])
async def test_a_page_of_another_origin_is_forbidden(
    gateway: Running, http: aiohttp.ClientSession, origin: str
) -> None:
    """B50"""
    refused(await ask(http, endpoint(gateway), PING, headers={"origin": origin}), 403, -32600)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "x" * 5000])
async def test_a_host_that_is_not_served_here_is_misdirected(
    gateway: Running, http: aiohttp.ClientSession, host: str
) -> None:
    """B50"""
    refused(await ask(http, endpoint(gateway), PING, headers={"host": host}), 421, -32600)


# -- sessions ----------------------------------------------------------------------------------------------------------

FORGED = "A" * ID_CHARACTERS
HOSTILE = ["x", FORGED, "*" * ID_CHARACTERS, "}" * ID_CHARACTERS, "{w:x}", "a b", "../..", "x" * 7000, "'; --", "%0a"]


@pytest.mark.parametrize("session_id", HOSTILE)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_an_unknown_session_is_not_found(
    gateway: Running, http: aiohttp.ClientSession, session_id: str, method: str
) -> None:
    """B30"""
    body = PING if method == "POST" else None
    answer = await ask(http, endpoint(gateway), body, method=method, headers={"mcp-session-id": session_id})
    refused(answer, 404, -32001, "p1" if body else None)


@pytest.mark.parametrize(
    "session_id",
    [b"", b"\t", b"a\x00b", b"a\x01b", b"a\x7fb", b"\xff\xfe", b"\xc3\xbc", b"a\rb", b"a\nb: c", b"x" * 100_000],
)
async def test_control_characters_and_huge_ids_do_no_harm(gateway: Running, session_id: bytes) -> None:
    """B30: what is no HTTP ends at the parser; what is, is not found. Nobody gets in."""
    request = raw_post(gateway, b"authorization: Bearer alice", b"mcp-session-id: " + session_id)
    status = int((await raw(gateway, request)).split(b" ", 2)[1])
    assert status in (400, 404, 431)
    assert get(f"{gateway.url}/readyz")[0] == 200


@pytest.mark.parametrize("server", ["http", "stdio"])
async def test_another_principal_s_session_answers_byte_for_byte_like_an_unknown_one(
    gateway: Running, http: aiohttp.ClientSession, server: str
) -> None:
    """B31"""
    async with RawSession(http, endpoint(gateway, server), ALICE) as session:
        assert (await session.call("increment")).text == "1"

        async def attempt(method: bytes, who: bytes, session_id: str, at: str) -> bytes:
            lines = (b"authorization: Bearer " + who, b"mcp-session-id: " + session_id.encode())
            body = json.dumps(PING).encode() if method == b"POST" else b""
            request = raw_post(gateway, *lines, body=body, server=at).replace(b"POST", method, 1)
            return re.sub(rb"\r\ndate: [^\r]*", b"", await raw(gateway, request))

        for method in (b"POST", b"GET", b"DELETE"):
            unknown = await attempt(method, b"bob", FORGED, server)
            assert unknown.startswith(b"HTTP/1.1 404 ")
            assert await attempt(method, b"bob", session.session_id, server) == unknown
            assert await attempt(method, b"alice", session.session_id[:-1], server) == unknown
            other = "stdio" if server == "http" else "http"
            assert await attempt(method, b"alice", session.session_id, other) == unknown
        assert (await session.call("increment")).text == "2", "it was not touched"


async def test_a_session_that_was_deleted_is_not_found_any_more(gateway: Running, http: aiohttp.ClientSession) -> None:
    """B7"""
    session = RawSession(http, endpoint(gateway), ALICE)
    await session.initialize()
    assert await session.delete() == 200
    refused(await session.post(PING), 404, -32001, "p1")
    assert await session.delete() == 404


@pytest.mark.parametrize(("method", "server"), [("GET", "stdio"), ("DELETE", "stdio"), ("DELETE", "http")])
async def test_what_needs_a_session_and_names_none_is_a_bad_request(
    gateway: Running, http: aiohttp.ClientSession, method: str, server: str
) -> None:
    """B50"""
    refused(await ask(http, endpoint(gateway, server), method=method), 400, -32600)


async def test_a_request_without_a_session_is_refused_by_the_upstream_that_needs_one(
    gateway: Running, http: aiohttp.ClientSession
) -> None:
    assert (await ask(http, endpoint(gateway), PING)).status == 400
    assert (await ask(http, endpoint(gateway), method="GET")).status == 400
    refused(await ask(http, endpoint(gateway, "stdio"), PING), 400, -32600, "p1")


async def test_a_client_s_answer_to_nobody_is_refused_without_an_id_that_could_be_taken_for_another_s(
    gateway: Running, http: aiohttp.ClientSession
) -> None:
    response = {"jsonrpc": "2.0", "id": 1, "result": {}}
    answer = await ask(http, endpoint(gateway), response, headers={"mcp-session-id": FORGED})
    refused(answer, 404, -32001, None)


@pytest.mark.parametrize("server", ["http", "stdio"])
@pytest.mark.parametrize("version", ["1999-01-01", "2099-01-01", "", "x" * 5000, "2025-11-25 2025-06-18"])
async def test_an_unknown_protocol_version_is_refused_with_those_that_are_known(
    gateway: Running, http: aiohttp.ClientSession, server: str, version: str
) -> None:
    """B50"""
    headers = {"mcp-protocol-version": version}
    async with RawSession(http, endpoint(gateway, server), ALICE) as session:
        answer = await ask(http, session.url, PING, headers={**session.headers, **headers})
        refused(answer, 400, -32022, "p1")
        assert VERSION in answer.error["data"]["supported"]
        assert len(answer.body) < 1000
    # Without a session: of `initialize`, which would open one, and of GET and DELETE.
    before = sessions_now(gateway)
    refused(await ask(http, endpoint(gateway, server), INITIALIZE, headers=headers), 400, -32022, "init")
    for method in ("GET", "DELETE"):
        refused(await ask(http, endpoint(gateway, server), method=method, headers=headers), 400, -32022)
    assert (await ask(http, endpoint(gateway, server), PING, headers=headers)).status == 400
    assert sessions_now(gateway) <= before


# -- bodies ------------------------------------------------------------------------------------------------------------


async def test_a_body_at_the_limit_passes(gateway: Running, http: aiohttp.ClientSession) -> None:
    """B44"""
    async with RawSession(http, endpoint(gateway), ALICE) as session:
        empty = json.dumps(PING | {"params": {"_meta": {"x": ""}}}).encode()
        body = empty.replace(b'"x": ""', b'"x": "%b"' % (b"y" * (LIMIT - len(empty))))
        assert len(body) == LIMIT
        async with http.post(session.url, data=BytesIO(body), headers=session.headers) as reply:
            assert reply.status == 200
            assert b'"result":{}' in await reply.read()


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_a_declared_body_over_the_limit_is_refused_before_it_is_sent(gateway: Running, method: str) -> None:
    """B44: the client waits to be asked for it, and never is."""
    for length in (LIMIT + 1, 10**15):
        request = raw_post(gateway, b"authorization: Bearer alice", b"expect: 100-continue", body=b"")
        request = request.replace(b"content-length: 0", b"content-length: %d" % length).replace(
            b"POST", method.encode()
        )
        assert (await raw(gateway, request)).startswith(b"HTTP/1.1 413 ")


async def test_a_chunked_body_over_the_limit_is_refused(gateway: Running, http: aiohttp.ClientSession) -> None:
    """B44"""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(LIMIT // 65536 + 1):
            yield b"x" * 65536

    async with http.post(endpoint(gateway), data=pieces(), headers={**HEADERS, **ALICE}) as reply:
        answer = Answer(reply.status, {k.lower(): v for k, v in reply.headers.items()}, await reply.read())
    answer.message = json.loads(answer.body)
    refused(answer, 413, -32600)
    assert "4194304" in answer.error["message"]


@pytest.mark.parametrize(
    "length", [b"x", b"-1", b"1e3", b"9" * 30, b"9" * 5000, b"5, 5", b"", b"\xb2"], ids=lambda length: length[:8]
)
async def test_a_malformed_length_is_a_bad_request(gateway: Running, length: bytes) -> None:
    request = raw_post(gateway, b"authorization: Bearer alice").replace(
        b"content-length: %d" % len(json.dumps(PING)), b"content-length: " + length
    )
    assert (await raw(gateway, request)).split(b" ", 2)[1] in (b"400", b"413")


async def test_a_client_that_leaves_in_mid_body_does_no_harm(gateway: Running) -> None:
    request = raw_post(gateway, b"authorization: Bearer alice")
    _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(request[:-10])
    await writer.drain()
    writer.transport.abort()
    assert get(f"{gateway.url}/readyz")[0] == 200


async def test_a_get_or_delete_with_a_body_is_served(gateway: Running, http: aiohttp.ClientSession) -> None:
    session = RawSession(http, endpoint(gateway), ALICE)
    await session.initialize()
    answer = await ask(http, session.url, b"{}", method="DELETE", headers=session.headers)
    assert answer.status == 200


async def test_a_tool_of_a_strange_name_is_the_upstream_s_to_refuse(
    gateway: Running, http: aiohttp.ClientSession
) -> None:
    async with RawSession(http, endpoint(gateway), ALICE) as session:
        for params in ({"name": []}, {"name": {}}, {"name": None}, {}, [], "x", None):
            answer = await session.post({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params})
            assert answer.status in (200, 400)
            assert "error" in answer.message


# -- odd upstreams -----------------------------------------------------------------------------------------------------


async def test_an_upstream_that_cannot_be_reached_is_a_bad_gateway_that_ran_nothing(
    gateway: Running, http: aiohttp.ClientSession
) -> None:
    """B8"""
    answer = await ask(http, endpoint(gateway, "dead"), INITIALIZE)
    refused(answer, 502, -32000, "init")
    assert answer.error["data"] == {"outcome": "not_run"}
    assert "mcp-session-id" not in answer.headers


async def test_an_upstream_that_answers_with_a_page_opens_no_session(
    gateway: Running, http: aiohttp.ClientSession
) -> None:
    """B40"""
    before = sessions_now(gateway)
    answer = await ask(http, endpoint(gateway, "html"), INITIALIZE)
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"<html>", "text/html")
    assert "mcp-session-id" not in answer.headers
    await until(lambda: sessions_now(gateway) <= before, "the session is not closed")


async def test_an_initialize_that_is_refused_leaves_no_session_here_or_upstream(
    gateway: Running, http: aiohttp.ClientSession, odd: Odd
) -> None:
    """B3"""
    answer = await ask(http, endpoint(gateway, "error"), INITIALIZE)
    assert (answer.status, answer.error["message"]) == (200, "not you")
    assert "mcp-session-id" not in answer.headers
    await until(lambda: ("/error", "DELETE") in odd.asked, "the upstream is not told")


async def test_an_initialize_that_is_answered_by_a_stream_without_end_is_answered(
    gateway: Running, http: aiohttp.ClientSession, odd: Odd
) -> None:
    """B20: with what came before the answer."""
    odd.go_on.clear()
    session = RawSession(http, endpoint(gateway, "endless"), ALICE)
    answer = await asyncio.wait_for(session.initialize(), 10)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.result["serverInfo"]["name"] == "odd"
    assert b"notifications/message" in answer.body
    assert (await session.request("ping")).status == 200
    odd.go_on.set()
    await session.delete()


@pytest.mark.parametrize("answers_at_once", [True, False])
async def test_a_client_that_leaves_while_its_session_opens_leaves_no_session(
    quiet_gateway: Running, odd: Odd, *, answers_at_once: bool
) -> None:
    """B3"""
    gateway = quiet_gateway
    assert sessions_now(gateway) == 0
    odd.go_on.clear()
    odd.arrived.clear()
    odd.asked.clear()
    request = raw_post(gateway, b"authorization: Bearer alice", body=json.dumps(INITIALIZE).encode(), server="slow")
    _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    try:
        writer.write(request)
        assert await asyncio.to_thread(odd.arrived.wait, 10)
        await until(lambda: sessions_now(gateway) == 1, "the session does not show")
    finally:
        writer.transport.abort()
    if not answers_at_once:
        # The gateway sees it by itself, long before the upstream answers.
        await until(lambda: sessions_now(gateway) == 0, "the session is kept", 10)
    odd.go_on.set()
    await until(lambda: sessions_now(gateway) == 0, "the session is kept", 10)
    assert get(f"{gateway.url}/readyz")[0] == 200


async def test_a_client_that_has_left_when_its_session_is_open_leaves_none(quiet_gateway: Running, odd: Odd) -> None:
    """B3: it left in the first moment, in which nobody looks."""
    gateway = quiet_gateway
    assert sessions_now(gateway) == 0
    port = int(gateway.url.rpartition(":")[2])
    body = json.dumps(INITIALIZE).encode()
    odd.asked.clear()
    for _ in range(10):
        odd.go_on.clear()
        odd.arrived.clear()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(raw_post(gateway, b"authorization: Bearer alice", body=body, server="slow"))
            assert await asyncio.to_thread(odd.arrived.wait, 10)
        odd.go_on.set()
    await until(lambda: sessions_now(gateway) == 0, "a session is kept", 10)
    assert ("/slow", "DELETE") in odd.asked, "the upstream is told of those that it had opened"


# -- the command -------------------------------------------------------------------------------------------------------


def leasehold(*arguments: str, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "leasehold.workers.cli", *arguments],
        cwd=folder,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


GOOD = '{"mcpServers": {"a": {"url": "http://127.0.0.1:1/mcp"}}}'


@pytest.mark.parametrize(
    ("text", "env", "arguments", "expected"),
    [
        (None, {}, [], ["mcp.json", "found nothing of that name"]),
        ("{", {}, [], ["mcp.json", "JSON"]),
        ('{"mcpServers": {}}', {}, [], ["mcp.json", "expected at least one server"]),
        ('{"mcpServers": {"a": {"url": "ftp://x"}}}', {}, [], ["mcp.json", "mcpServers.a.url"]),
        ('{"mcpServers": {"a": {"url": "http://x", "headers": {"k": "${NOPE}"}}}}', {}, [], ["NOPE"]),
        ('{"mcpServers": {"a": {"url": "http://x", "leasehold": {"idle_tll": 1}}}}', {}, [], ["idle_tll", "idle_ttl"]),
        (GOOD, {"LEASEHOLD_PORT": "x"}, [], ["LEASEHOLD_PORT", "from 0 to 65535"]),
        (GOOD, {}, ["--workers", "0"], ["--workers", "from 1 to 256"]),
        (GOOD, {"LEASEHOLD_REDIS_URL": "redis://127.0.0.1:1"}, [], ["LEASEHOLD_SECRET"]),
        (GOOD, {"LEASEHOLD_WORKER": "4"}, [], ["LEASEHOLD_WORKER", "LEASEHOLD_WORKERS"]),
        (GOOD, {}, ["--prot", "1"], ["--prot"]),
    ],
)
def test_what_is_wrong_with_the_configuration_is_one_clear_message(
    tmp_path: Path, text: str | None, env: dict[str, str], arguments: list[str], expected: list[str]
) -> None:
    """B49"""
    if text is not None:
        (tmp_path / "mcp.json").write_text(text)
    ended = leasehold("serve", "mcp.json", *arguments, folder=tmp_path, env=env)
    assert ended.returncode == 2, ended
    assert all(word in ended.stderr for word in expected), ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 8
    assert ended.stdout == ""


def test_a_port_in_use_is_a_clear_message(tmp_path: Path) -> None:
    """B49"""
    (tmp_path / "mcp.json").write_text(GOOD)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = leasehold("serve", "--port", str(port), folder=tmp_path)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


# -- Redis -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


async def test_a_gateway_without_redis_says_so_serves_503_and_recovers_by_itself(
    tmp_path: Path, redis: EmbeddedRedis, http: aiohttp.ClientSession
) -> None:
    """B32, B35"""
    with run_example("counter_http.py", tmp_path) as upstream:
        config = write_config(tmp_path, {"http": {"url": upstream.url}})
        async with proxied(redis.url) as proxy:
            proxy.mode = Mode.RESET
            command = [sys.executable, "-m", "leasehold.workers.cli", "serve", str(config), "--port", "0"]
            env = {"LEASEHOLD_REDIS_URL": proxy.url, "LEASEHOLD_SECRET": SECRET}
            process = run_process(command, tmp_path, env)
            running = await asyncio.to_thread(process.__enter__)
            try:
                await until(lambda: re.search(r"serving .*url=(http://[^/]+)", running.output()), running.output())
                found = re.search(r"serving .*url=(http://[^/]+)", running.output())
                assert found is not None
                running.url = found[1]
                # It begins to answer when it has waited a while for its Redis.
                assert (await ask(http, f"{running.url}/healthz", method="GET")).status == 200
                unready = await ask(http, f"{running.url}/readyz", method="GET")
                assert (unready.status, unready.message["status"]) == (503, "unready")
                answer = await ask(http, endpoint(running), INITIALIZE)
                refused(answer, 503, -32000, "init")
                assert answer.error["data"] == {"outcome": "not_run"}
                assert answer.headers["retry-after"] == "1"
                assert "redis_unreachable" in running.output()
                proxy.mode = Mode.OK
                await until(lambda: get(f"{running.url}/readyz")[0] == 200, "does not recover")
                async with RawSession(http, endpoint(running)) as session:
                    assert (await session.call("increment")).text == "1"
            finally:
                await asyncio.to_thread(process.__exit__, None, None, None)
            assert "Traceback" not in running.output()


async def test_sessions_are_served_through_a_loss_of_redis_until_the_fence_and_go_on_after_it(
    tmp_path: Path, redis: EmbeddedRedis, http: aiohttp.ClientSession
) -> None:
    """B32, B35"""
    lease_s = 2.0
    with run_example("counter_http.py", tmp_path) as upstream:
        config = write_config(tmp_path, {"http": {"url": upstream.url}})
        async with proxied(redis.url) as proxy:
            gateway = run_gateway(
                config, tmp_path, redis_url=proxy.url, env={"LEASEHOLD_LEASE_TTL_MS": str(int(lease_s * 1000))}
            )
            running = await asyncio.to_thread(gateway.__enter__)
            try:
                session = RawSession(http, endpoint(running))
                await session.initialize()
                assert (await session.call("increment")).text == "1"
                proxy.mode = Mode.RESET
                lost_at = time.monotonic()
                # A new session needs Redis; one that is here does not, as long as the lease surely lasts.
                refused(await ask(http, endpoint(running), INITIALIZE), 503, -32000, "init")
                assert (await session.call("increment")).text == "2"
                assert time.monotonic() - lost_at < lease_s / 2, "too slow a machine to tell"
                served = 2
                while (answer := await session.call("increment")).status == 200:
                    served += 1
                    assert answer.text == str(served)
                    assert time.monotonic() - lost_at < 2 * lease_s, "served beyond the fence"
                assert answer.status == 503
                assert answer.error["data"] == {"outcome": "not_run"}
                assert time.monotonic() - lost_at > lease_s / 2
                ready = await ask(http, f"{running.url}/readyz", method="GET")
                assert (ready.status, ready.message["redis"]) == (200, "unreachable"), "not every pod unready at once"
                proxy.mode = Mode.OK

                async def recovered() -> Answer:
                    while (again := await session.call("increment")).status == 503:
                        await asyncio.sleep(0.05)
                    return again

                assert (await asyncio.wait_for(recovered(), 15)).text == str(served + 1)
            finally:
                await asyncio.to_thread(gateway.__exit__, None, None, None)
            assert "Traceback" not in running.output()
