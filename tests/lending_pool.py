"""A pool that lends sessions of links to nowhere, which answer as a test tells them to; and what must hold of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fake_link import FakeLink
from faults import eventually
from leasehold.pool import HttpTarget, Link, Message, Reply, ResumeRecord, SessionPool, Upstream
from leasehold.pool.borrowing import Want
from leasehold.pool.link import Fence, Headers

TARGET = HttpTarget("http://127.0.0.1:1/mcp")
FILES = Upstream("files", TARGET, max_sessions=4)
ONE = Upstream("one", TARGET, max_sessions=1)
ANY = Want(FILES)
THE_ONE = Want(ONE)
SHARED = Want(ONE, affinity="conversation")

INITIALIZED = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "nowhere", "version": "1"},
}
RESULTS: dict[str, dict[str, Any]] = {
    "initialize": INITIALIZED,
    "ping": {},
    "tools/list": {"tools": []},
    "tools/call": {"content": [{"type": "text", "text": "done"}]},
}
UNDER_WAY = ("leasehold-create", "leasehold-share", "leasehold-check", "leasehold-callback")

Answer = Callable[["TalkingLink", Message], Awaitable[dict[str, Any] | None]]
"""The answer to a request, as `{"result": ...}` or `{"error": ...}`; None for the usual one."""


class TalkingLink(FakeLink):
    """Answers requests, over two turns of the loop each."""

    def __init__(self, number: int, answer: Answer, *, resume: ResumeRecord | None = None) -> None:
        super().__init__(resume=resume)
        self.number = number
        self.asked: list[tuple[str, Headers]] = []
        self.is_gone = False
        self._answer = answer

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        await asyncio.sleep(0)
        self.asked.append((message.method or "", headers))
        if message.kind != "request":
            return Reply(202, [], _body(b""))
        answer = await self._answer(self, message)
        await asyncio.sleep(0)
        if answer is None:
            answer = {"result": RESULTS[message.method or ""]}
        payload = orjson.dumps({"jsonrpc": "2.0", "id": message.id, **answer})
        return Reply(200, [(b"content-type", b"application/json")], _body(payload))

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            self.is_gone = True

    def methods(self) -> list[str]:
        return [method for method, _ in self.asked]


async def _body(data: bytes) -> AsyncGenerator[bytes, None]:
    yield b""
    yield data


async def as_usual(_link: TalkingLink, _message: Message) -> None:
    """No answer but the usual one."""


class LendingPool(SessionPool):
    """Its links open when `may_open` is set, or fail with `failure`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.links: list[TalkingLink] = []
        self.opening = 0
        self.most_open = 0
        self.failure: Exception | None = None
        self.answer: Answer = as_usual
        self.may_open = asyncio.Event()
        self.may_open.set()

    async def _open_link(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        self.opening += 1
        try:
            await asyncio.sleep(0)
            await self.may_open.wait()
            await asyncio.sleep(0)
        finally:
            self.opening -= 1
        if self.failure is not None:
            raise self.failure
        self.links.append(TalkingLink(len(self.links), self.answer, resume=resume))
        self.most_open = max(self.most_open, len(self.open_links()))
        return self.links[-1]

    def open_links(self) -> list[TalkingLink]:
        return [link for link in self.links if not link.is_gone]


def under_way() -> list[str]:
    """Tasks that serve somebody: none may be left once nobody wants anything."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() in UNDER_WAY]


async def at_rest(pool: LendingPool) -> None:
    """Nobody wants anything of the pool: soon every count says so, and each session has an open link, and none more."""
    await eventually(lambda: not under_way())
    await eventually(lambda: (now := pool.statistics()).closing == now.lent == now.in_flight == 0)
    await eventually(lambda: len(pool) == len(pool.open_links()))
    now = pool.statistics()
    assert (now.lent, now.waiting, now.opening, now.closing, now.in_flight, pool.opening) == (0, 0, 0, 0, 0, 0)
    assert now.sessions == now.idle + now.kept == pool._ledger.total == len(pool.open_links())
    assert now.loans >= now.reused


@asynccontextmanager
async def lending(**options: Any) -> AsyncGenerator[LendingPool]:
    """A running pool. After it no count, task, session or link is left."""
    pool = LendingPool(**options)
    before = asyncio.all_tasks()
    async with pool:
        yield pool
    await eventually(lambda: asyncio.all_tasks() <= before)
    assert len(pool) == 0
    assert [len(link.closed_by) for link in pool.links] == [1] * len(pool.links)
    left = {name: value for name, value in vars(pool._ledger).items() if name.startswith("_")}
    assert not any(left.values()), left
    assert pool._lending._wants.keys() <= pool._lending._minimum.keys(), "how to open what nobody wants any more"
    assert pool._ledger.limits.keys() <= pool._lending._minimum.keys(), "limits of what nobody wants any more"
    assert pool._lending._backoff.keys() <= pool._lending._minimum.keys()


async def turns(count: int) -> None:
    """Let the loop make so many turns."""
    for _ in range(count):
        await asyncio.sleep(0)
