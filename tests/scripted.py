"""A small HTTP server for tests, which answers as a test tells it to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Scripted:
    """`answer` is asked for each request; `requests` are those that came, as "METHOD /path authorization"."""

    answer: Answer
    origin: str = ""
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0

    @property
    def url(self) -> str:
        return f"{self.origin}/mcp"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        self.requests.append(f"{request.method} {request.path} {request.headers.get('authorization', '-')}")
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.running += 1
        try:
            return await self.answer(request)
        finally:
            self.running -= 1


@asynccontextmanager
async def scripted(answer: Answer) -> AsyncGenerator[Scripted]:
    served = Scripted(answer)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", served.handle)
    runner = web.AppRunner(app, shutdown_timeout=1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield served
    finally:
        await runner.cleanup()
