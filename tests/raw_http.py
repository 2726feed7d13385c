"""A real HTTP/1.1 server on a socket, for tests: it answers with the bytes a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Request:
    """One request as the server read it. `connection` counts from 0."""

    connection: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    lost: asyncio.Event = field(repr=False)
    """Set when its connection has ended."""
    transport: asyncio.Transport = field(repr=False)

    async def send(self, data: bytes) -> None:
        self.transport.write(data)

    async def reply(self, status: int, body: bytes = b"", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers]
        await self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    async def json(self, body: bytes, *headers: str) -> None:
        await self.reply(200, body, "content-type: application/json", *headers)

    async def stream(self, *chunks: bytes, ends: bool = True) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for chunk in chunks:
            await self.chunk(chunk)
        if ends:
            await self.end()

    async def chunk(self, data: bytes) -> None:
        """One more piece of a stream."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    def drop(self) -> None:
        """Break the connection without an answer."""
        self.transport.abort()


Handler = Callable[[Request], Coroutine[Any, Any, None]]


class Server:
    """Serves with kept connections; `handler` answers, in a task that ends with its connection."""

    def __init__(self, handler: Handler, path: str = "/") -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.handler = handler
        self.arrived = asyncio.Event()
        self.path = path
        self.url = ""
        self.transports: set[asyncio.Transport] = set()
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.get_running_loop().create_server(lambda: Connection(self), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}{self.path}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.refuse()
        self.drop_all()

    def refuse(self) -> None:
        """Take no more connections."""
        assert self._listener is not None
        self._listener.close()

    def drop_all(self) -> None:
        for transport in self.transports:
            transport.abort()


class Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.server = server
        self.number, server.connections = server.connections, server.connections + 1
        self.received = b""
        self.lost = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        self.server.transports.add(transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, rest = self.received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        if not separator or len(rest) < length:
            return
        self.received = rest[length:]
        assert not self.received, "no client pipelines"
        method, path, _ = lines[0].split(" ")
        request = Request(self.number, method, path, headers, rest, self.lost, self.transport)
        self.server.requests.append(request)
        self.server.arrived.set()
        task = asyncio.ensure_future(self.server.handler(request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def connection_lost(self, _error: Exception | None) -> None:
        self.server.transports.discard(self.transport)
        self.lost.set()
        for task in self.tasks:
            task.cancel()
