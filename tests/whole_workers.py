"""Whole workers in one process, without sockets in front: ASGI calls, a real Redis, and a small upstream."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web
from leasehold.coordinator import RedisClients, session_key
from leasehold.pool import parse_config
from leasehold.workers.settings import load_settings
from leasehold.workers.worker import Worker
from mcp_http import VERSION

SECRET = b"a secret for tests only and long enough"
LEASE_MS = 600


@dataclass
class Upstream:
    """A stateful streamable-HTTP upstream: counts the calls of each session, and notes what it was told."""

    url: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    farewells: list[str] = field(default_factory=list)
    """The authorization of each DELETE."""
    cookies: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    """Of every request of a session, in order; "" for one without."""
    methods: list[str] = field(default_factory=list)
    """What it was asked, and told."""

    async def serve(self, request: web.Request) -> web.Response:
        session = request.headers.get("mcp-session-id", "")
        if request.method == "DELETE":
            self.deleted.append(session)
            self.farewells.append(request.headers.get("authorization", ""))
            self.counts.pop(session, None)
            return web.Response()
        message = orjson.loads(await request.read())
        self.methods.append(message["method"])
        if message["method"] == "initialize":
            session = f"upstream-{len(self.counts)}-{id(self)}"
            self.counts[session] = 0
            result: Any = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
            return self.answer(message, result, session, {"set-cookie": "pin=1"})
        if session not in self.counts:
            return web.Response(status=404)
        self.counts[session] += 1
        self.cookies.append(request.headers.get("cookie", ""))
        self.authorizations.append(request.headers.get("authorization", ""))
        return self.answer(message, {"count": self.counts[session]}, session, {"set-cookie": "pin=2; Path=/"})

    def answer(self, message: Any, result: Any, session: str, headers: dict[str, str]) -> web.Response:
        body = orjson.dumps({"jsonrpc": "2.0", "id": message.get("id"), "result": result})
        return web.Response(body=body, content_type="application/json", headers={"mcp-session-id": session, **headers})


@asynccontextmanager
async def upstream() -> AsyncGenerator[Upstream]:
    stub = Upstream()
    app = web.Application()
    app.router.add_route("*", "/mcp", stub.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    try:
        yield stub
    finally:
        await runner.cleanup()


@asynccontextmanager
async def worker(
    redis_url: str, servers: dict[str, Any], *, clients: type[RedisClients] = RedisClients, **environ: str
) -> AsyncGenerator[Worker]:
    """A running worker with a short lease; stopped at the end of the block."""
    environ = {"LEASEHOLD_LEASE_TTL_MS": str(LEASE_MS), "LEASEHOLD_SHUTDOWN_GRACE_S": "1", **environ}
    config = parse_config(orjson.dumps({"mcpServers": servers}).decode(), "test", {})
    made = Worker(
        load_settings(environ), config, redis_url=redis_url, secrets=[SECRET], ephemeral=False, clients=clients
    )
    async with made.running():
        yield made


@dataclass
class Client:
    """One MCP session; `worker` is where its next request lands."""

    worker: Worker
    server: str = "counter"
    session_id: str = ""
    ids: Any = field(default_factory=lambda: itertools.count(1))
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Sent with every request, besides those of the protocol."""
    peer: tuple[str, int] | None = ("127.0.0.1", 50_000)
    answered: list[tuple[bytes, bytes]] = field(default_factory=list)
    """The headers of the last answer."""

    @property
    def key(self) -> str:
        return session_key(self.session_id)

    async def initialize(self) -> None:
        status, _ = await self.send("POST", "initialize", {"protocolVersion": VERSION})
        assert status == 200

    async def count(self) -> int:
        status, message = await self.send("POST", "tools/call", {"name": "count"})
        assert status == 200, message
        return message["result"]["count"]

    async def tell(self, notification: str) -> int:
        """The status of what wants no answer."""
        return (await self.send("POST", body=orjson.dumps({"jsonrpc": "2.0", "method": notification})))[0]

    async def send(self, method: str, call: str = "", params: Any = None, *, body: bytes = b"") -> tuple[int, Any]:
        """(status, body) of one request: decoded if it is JSON, the bytes of a stream. `body`: its own, as it is."""
        if method == "POST" and not body:
            body = orjson.dumps({"jsonrpc": "2.0", "id": next(self.ids), "method": call, "params": params})
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"accept", b"application/json, text/event-stream"),
            *self.headers,
        ]
        if self.session_id:
            headers.append((b"mcp-session-id", self.session_id.encode()))
        scope = {"type": "http", "method": method, "path": f"/servers/{self.server}/mcp", "headers": headers}
        scope |= {"client": self.peer, "server": ("127.0.0.1", 8333)}
        received: list[Any] = []
        waiting = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            return await _never()

        async def send(message: Any) -> None:
            received.append(message)

        await self.worker({**scope, "query_string": b""}, receive, send)
        self.answered = received[0]["headers"]
        for name, value in self.answered:
            if name == b"mcp-session-id":
                self.session_id = value.decode()
        answer = b"".join(message.get("body", b"") for message in received[1:])
        is_json = answer[:1] in (b"{", b"[")
        return received[0]["status"], orjson.loads(answer) if is_json else answer or None


async def _never() -> Any:
    await asyncio.get_running_loop().create_future()
