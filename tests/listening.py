"""Event streams under test: an upstream that says what a test tells it to, and clients that listen through a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web
from faults import eventually
from leasehold.pool.sse import EventSplitter, event_data, event_id
from mcp_http import VERSION
from whole_workers import Client

HELLO: Any = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}


def said(number: int) -> bytes:
    """A message that belongs to no call."""
    return orjson.dumps({"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": number}})


@dataclass
class Speaker:
    """A streamable-HTTP upstream. With `ids` it gives its events ids, keeps them, and resumes; without, it fails at a
    `Last-Event-ID`, as the Python SDK's server does that keeps no events."""

    ids: bool = False
    url: str = ""
    streams: dict[str, web.StreamResponse] = field(default_factory=dict)
    """The one GET stream that each session may have."""
    last_ids: list[str] = field(default_factory=list)
    """`Last-Event-ID` of each GET; "" for none."""
    kept: dict[str, list[bytes]] = field(default_factory=dict)
    calls: int = 0
    sessions: int = 0
    line_end: bytes = b"\n"
    refuses: int = 0
    """A status for who asks to resume."""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        session = request.headers.get("mcp-session-id", "")
        if request.method == "DELETE":
            self.streams.pop(session, None)
            self.kept.pop(session, None)
            return web.Response()
        if request.method == "GET":
            return await self._stream(request, session)
        message = orjson.loads(await request.read())
        if message.get("method") == "initialize":
            self.sessions += 1
            session = f"session-{self.sessions}-{id(self)}"
            self.kept[session] = []
            body = {"jsonrpc": "2.0", "id": message["id"], "result": HELLO}
            return web.json_response(body, headers={"mcp-session-id": session})
        if session not in self.kept:
            return web.Response(status=404)
        if "id" not in message:
            return web.Response(status=202)
        self.calls += 1
        return web.json_response({"jsonrpc": "2.0", "id": message["id"], "result": {"calls": self.calls}})

    async def _stream(self, request: web.Request, session: str) -> web.StreamResponse:
        last = request.headers.get("last-event-id", "")
        self.last_ids.append(last)
        if session not in self.kept:
            return web.Response(status=404)
        if session in self.streams:
            return web.Response(status=409)
        if last and (self.refuses or not self.ids):
            return web.Response(status=self.refuses or 500)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        self.streams[session] = response
        try:
            await response.prepare(request)
            for number in range(int(last) if last else len(self.kept[session]), len(self.kept[session])):
                await response.write(self._event(session, number))
            while session in self.kept and self.streams.get(session) is response:
                await asyncio.sleep(0.01)
        finally:
            if self.streams.get(session) is response:
                del self.streams[session]
        return response

    def _event(self, session: str, index: int) -> bytes:
        lines = [b"event: message", b"data: " + self.kept[session][index]]
        if self.ids:
            lines.insert(0, b"id: %d" % (index + 1))
        return self.line_end.join([*lines, b"", b""])

    async def say(self, *numbers: int, session: str = "") -> None:
        """On the one session's stream, in one piece."""
        session = session or next(iter(self.kept))
        first = len(self.kept[session])
        self.kept[session] += [said(number) for number in numbers]
        if session in self.streams:
            await self.streams[session].write(b"".join(self._event(session, first + i) for i in range(len(numbers))))

    async def write(self, data: bytes) -> None:
        """Bytes, as they are, on the one stream there is."""
        (stream,) = self.streams.values()
        await stream.write(data)


@asynccontextmanager
async def speaking(*, ids: bool = False) -> AsyncGenerator[Speaker]:
    speaker = Speaker(ids)
    app = web.Application()
    app.router.add_route("*", "/mcp", speaker.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    speaker.url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    try:
        yield speaker
    finally:
        speaker.kept.clear()
        await runner.cleanup()


class Listener:
    """One GET of a client, open at the worker where the client is; with a `body`, one POST."""

    def __init__(self, client: Client, last_id: bytes | None = None, *, body: bytes = b"") -> None:
        self.client = client
        self._body = body
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.events: list[tuple[bytes | None, bytes]] = []
        """(id, data) of each event that said something."""
        self.raw = b""
        self.is_deaf = False
        """What still comes is lost on its way: the client has gone, and nobody knows."""
        self._splitter = EventSplitter(1 << 24)
        self._left = asyncio.Event()
        self._last_id = last_id
        self.task = asyncio.create_task(self._listen())

    @property
    def numbers(self) -> list[int]:
        """What was said, by `said`."""
        return [orjson.loads(data)["params"]["data"] for _, data in self.events]

    @property
    def messages(self) -> list[Any]:
        return [orjson.loads(data) for _, data in self.events]

    @property
    def last_id(self) -> bytes | None:
        """Of the last event; of the request, when there was none."""
        return next((name for name, _ in reversed(self.events) if name is not None), self._last_id)

    async def heard(self, count: int) -> list[int]:
        """Wait until so many events have come; returns their numbers."""
        await eventually(lambda: len(self.events) >= count or self.task.done())
        return self.numbers

    async def begun(self) -> int:
        """Wait for the status."""
        await eventually(lambda: bool(self.status))
        return self.status

    async def leave(self) -> None:
        """The client goes; returns when the worker is done with it."""
        self._left.set()
        with suppress(asyncio.CancelledError):
            await self.task

    async def _listen(self) -> None:
        client = self.client
        accept = b"application/json, text/event-stream" if self._body else b"text/event-stream"
        headers = [(b"host", b"localhost"), (b"accept", accept), *client.headers]
        headers += [(b"mcp-session-id", client.session_id.encode()), (b"mcp-protocol-version", VERSION.encode())]
        if self._last_id is not None:
            headers.append((b"last-event-id", self._last_id))
        if self._body:
            headers.append((b"content-type", b"application/json"))
        method = "POST" if self._body else "GET"
        scope = {"type": "http", "method": method, "path": f"/servers/{client.server}/mcp", "headers": headers}
        scope |= {"client": client.peer, "server": ("127.0.0.1", 8333), "query_string": b""}
        asked = False

        async def receive() -> Any:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": self._body}
            await self._left.wait()
            return {"type": "http.disconnect"}

        await client.worker(scope, receive, self._send)

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        if self.is_deaf:
            return
        body = message.get("body", b"")
        self.raw += body
        for block in self._splitter.blocks(body):
            if data := event_data(block):
                self.events.append((event_id(block), data))


@asynccontextmanager
async def listening(client: Client, last_id: bytes | None = None) -> AsyncGenerator[Listener]:
    """A client's GET stream that has begun."""
    listener = Listener(client, last_id)
    try:
        await listener.begun()
        yield listener
    finally:
        await listener.leave()
