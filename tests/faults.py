"""Faults for tests: a proxy between a worker and its Redis that loses, delays and breaks what passes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from enum import Enum
from typing import Self
from urllib.parse import unquote, urlsplit


class Mode(Enum):
    """What a proxy does with what passes; a change applies to open connections too."""

    OK = "ok"
    BLACKHOLE = "blackhole"
    """Swallows both directions; connections stay open."""
    DROP_REPLIES = "drop_replies"
    """Commands arrive, answers do not."""
    RESET = "reset"
    """Breaks every connection, and every new one at once."""
    DELAY = "delay"
    """Holds every answer for `delay_s`."""


class Proxy:
    """Listens on loopback and connects to the Redis at `url`."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._mode = Mode.OK
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delay_s = 0.2
        self.dropped_bytes = 0

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.RESET:
            self.break_all()

    def retarget(self, url: str) -> None:
        """Break all connections; new ones reach another Redis."""
        self._target = urlsplit(url)
        self.break_all()

    def break_all(self) -> None:
        """Break all connections that are open now."""
        for writer in self._writers:
            writer.transport.abort()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.break_all()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self._mode is Mode.RESET:
                return
            if self._target.scheme == "unix":
                far_reader, far_writer = await asyncio.open_unix_connection(unquote(self._target.path))
            else:
                far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port or 6379)
            self._writers.add(far_writer)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._relay(reader, far_writer, replies=False))
                tasks.create_task(self._relay(far_reader, writer, replies=True))
            self._writers.discard(far_writer)
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool) -> None:
        try:
            while data := await reader.read(65536):
                if self._mode is Mode.BLACKHOLE or (replies and self._mode is Mode.DROP_REPLIES):
                    self.dropped_bytes += len(data)
                    continue
                if replies and self._mode is Mode.DELAY:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        except (OSError, RuntimeError):
            pass  # uvloop raises RuntimeError for a write to a connection that has just closed
        finally:
            writer.transport.abort()


@asynccontextmanager
async def proxied(url: str) -> AsyncGenerator[Proxy]:
    async with Proxy(url) as proxy:
        yield proxy


async def eventually(condition: Callable[[], bool], limit_s: float = 10.0) -> float:
    """Wait until a condition holds; returns the seconds that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < limit_s, "waited in vain"
        await asyncio.sleep(0.002)
    return time.monotonic() - begun
