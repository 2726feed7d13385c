"""A link to nowhere, for tests of what holds links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from leasehold.pool import Message, Reply, ResumeRecord
from leasehold.pool.link import Headers


class FakeLink:
    """Notes by which task it was closed, and whether the upstream was told."""

    def __init__(self, *, resume: ResumeRecord | None = None) -> None:
        self.resume = resume
        self.deleted: list[Headers] = []
        self.closed_by: list[asyncio.Task[object] | None] = []
        self.closing: Callable[[], Awaitable[None]] | None = None
        self._closed = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def lose(self) -> None:
        self._closed.set()

    def negotiated(self, protocol_version: str) -> None:
        self.version = protocol_version

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        return Reply(200, headers, _once(body))

    async def get(self, headers: Headers) -> Reply:
        return Reply(200, headers, _once(b""))

    async def delete(self, headers: Headers) -> Reply:
        self.deleted.append(headers)
        return Reply(200, [], _once(b""))

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def aclose(self) -> None:
        self.closed_by.append(asyncio.current_task())
        if self.closing is not None:
            await self.closing()
        self._closed.set()


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
