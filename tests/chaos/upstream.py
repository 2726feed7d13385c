"""The upstream: a stateful streamable-HTTP server that keeps a journal, and is slow, hangs or strikes back on demand.

It runs in the driver's loop, so that its journal and the clients' have one clock. Each session has a counter; what is
asked of it by a call's `tag` is noted before it answers.

    count   adds one                         pause   adds one, and takes a moment
    peek    reads (declared idempotent)      read    reads, as `resources/read`
    big     adds one, answers with `size` bytes
    kill    adds one, and has the worker killed that asks
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Self

import orjson
from aiohttp import web
from chaos.history import SHARED, Ending, Execution, History, Opening

VERSION: Final = "2025-11-25"
PIECE: Final = b"x" * 65536
READ_ONLY: Final = frozenset({"peek", "resources/read"})


@dataclass(slots=True)
class Session:
    id: str
    principal: str
    counter: int = 0


class Upstream:
    """`/own/mcp` and `/shared/mcp` are one server each; sessions of the second are noted under their principal."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.sessions: dict[str, Session] = {}
        self.running: Counter[int] = Counter()
        """Calls in flight, by the port that they come from."""
        self.delay_s = 0.0
        self.striking: Callable[[int], None] = lambda _port: None
        """Called with the peer's port by a call of `kill`."""
        self._going = asyncio.Event()
        self._going.set()
        self._runner: web.AppRunner | None = None
        self._port = 0

    def url(self, server: str) -> str:
        return f"http://127.0.0.1:{self._port}/{server}/mcp"

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{server}/mcp", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=1.0, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=2048).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._runner is not None
        self.go_on()
        await self._runner.cleanup()

    def hang(self) -> None:
        """Answer nobody until `go_on()`. What is asked meanwhile is done."""
        self._going.clear()

    def go_on(self) -> None:
        self._going.set()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except ConnectionError:  # whoever asked has died
            return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        principal = request.headers.get("authorization", "")
        session = self.sessions.get(request.headers.get("mcp-session-id", ""))
        if request.method == "DELETE":
            return self._end(session)
        if request.method != "POST":
            return web.Response(status=405, headers={"allow": "POST, DELETE"})
        message: dict[str, Any] = orjson.loads(await request.read())
        if message.get("method") == "initialize":
            return await self._open(request.match_info["server"], principal, message)
        if session is None:
            return web.Response(status=404)
        if "id" not in message:
            return web.Response(status=202)
        if message["method"] not in ("tools/call", "resources/read"):
            return _json(message, {"tools": []} if message["method"] == "tools/list" else {})
        return await self._call(request, session, principal, message)

    async def _open(self, server: str, principal: str, message: dict[str, Any]) -> web.Response:
        session = Session(os.urandom(8).hex(), principal)
        self.sessions[session.id] = session
        home = f"{SHARED}{principal}" if server == "shared" else ""
        self.history.openings.append(Opening(session.id, principal, home, monotonic()))
        await self._answering()
        result = {
            "protocolVersion": VERSION,
            "capabilities": {"tools": {}, "resources": {}},
            "serverInfo": {"name": "recorder", "version": "1"},
        }
        return _json(message, result, {"mcp-session-id": session.id})

    def _end(self, session: Session | None) -> web.Response:
        if session is None:
            return web.Response(status=404)
        del self.sessions[session.id]
        self.history.endings.append(Ending(session.id, monotonic()))
        return web.Response()

    async def _call(
        self, request: web.Request, session: Session, principal: str, message: dict[str, Any]
    ) -> web.StreamResponse:
        params: dict[str, Any] = message["params"]
        arguments: dict[str, Any] = params.get("arguments", {})
        method: str = params.get("name", message["method"])
        tag: str = arguments.get("tag") or params["uri"].rpartition("/")[2]
        session.counter += method not in READ_ONLY
        counter = session.counter  # others of the session may run while this one waits
        run = Execution(tag, monotonic(), session.id, session.principal, principal, counter, method)
        self.history.executions.append(run)
        port = _port(request)
        self.running[port] += 1
        try:
            if method == "kill":
                self.striking(port)
            await asyncio.sleep(arguments.get("seconds", 0.0))
            await self._answering()
        finally:
            self.running[port] -= 1
        told = {"request": tag, "principal": principal, "session": session.id, "counter": counter}
        if "size" in arguments:
            return await _stream_json(request, message, told, arguments["size"])
        result = {"contents": told} if method == "resources/read" else {"structuredContent": told, "content": []}
        return await _stream_events(request, message, result) if arguments.get("events") else _json(message, result)

    async def _answering(self) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._going.wait()


def _port(request: web.Request) -> int:
    peer = request.transport and request.transport.get_extra_info("peername")
    return peer[1] if peer else 0


def _body(message: dict[str, Any], result: dict[str, Any]) -> bytes:
    return orjson.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result})


def _json(message: dict[str, Any], result: dict[str, Any], headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_body(message, result), content_type="application/json", headers=headers)


async def _stream_events(request: web.Request, message: dict[str, Any], result: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"event: message\ndata: %b\n\n" % _body(message, result))
    await response.write_eof()
    return response


async def _stream_json(
    request: web.Request, message: dict[str, Any], told: dict[str, Any], size: int
) -> web.StreamResponse:
    """One JSON answer whose text is `size` bytes long; never whole in memory."""
    head, tail = _body(message, {"structuredContent": told, "content": [{"type": "text", "text": "@"}]}).split(b"@")
    response = web.StreamResponse(headers={"content-type": "application/json"})
    response.content_length = len(head) + size + len(tail)
    await response.prepare(request)
    await response.write(head)
    for begin in range(0, size, len(PIECE)):
        await response.write(PIECE[: size - begin])
    await response.write(tail)
    await response.write_eof()
    return response
