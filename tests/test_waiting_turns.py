"""Callers of several principals who wait for the same room: each is served, and those who are gone leave nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import orjson
import pytest
from fake_link import FakeLink
from leasehold.pool import HttpTarget, Link, Message, OpenFailed, Reply, ResumeRecord, SessionPool, Upstream
from leasehold.pool.borrowing import Borrow, Want
from leasehold.pool.link import Fence, Headers

pytestmark = pytest.mark.anyio

FILES = Upstream("files", HttpTarget("http://127.0.0.1:1/mcp"))


class ServerLink(FakeLink):
    """Answers the handshake."""

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        result = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "fake", "version": "1"}}
        answer = orjson.dumps({"jsonrpc": "2.0", "id": message.id, "result": result})
        return Reply(200, [(b"content-type", b"application/json")], _once(answer))


class ServerPool(SessionPool):
    refuses = False

    async def _open_link(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        if self.refuses:
            raise OpenFailed("refused")
        return ServerLink(resume=resume)


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def waiting(pool: SessionPool, principal: str) -> asyncio.Task[Borrow]:
    """Somebody who has begun to wait."""
    before = pool.statistics().waiting
    task = asyncio.create_task(pool.acquire(Want(FILES, principal=principal), timeout_s=20))
    while pool.statistics().waiting == before:
        await asyncio.sleep(0)
    return task


async def test_who_waits_is_served_after_the_last_session_of_his_principal_has_ended() -> None:
    """B2, B5: alice waits behind bob while her own principal's only session ends; her turn comes all the same."""
    async with ServerPool(max_sessions=1) as pool:
        first = await pool.acquire(Want(FILES, principal="alice"))
        bob = await waiting(pool, "bob")
        alice = await waiting(pool, "alice")
        first.release(discard=True)
        (await bob).release()
        borrow = await alice
        assert borrow.session.principal == "alice"
        borrow.release()
        assert (pool.statistics().opening, pool.statistics().waiting) == (0, 0)


async def test_nothing_is_kept_of_principals_whose_sessions_could_not_be_opened() -> None:
    """B3: they come and go without end."""
    async with ServerPool() as pool:
        pool.refuses = True
        for number in range(20):
            with pytest.raises(OpenFailed):
                await pool.acquire(Want(FILES, principal=f"passer-by-{number}"))
        assert pool._lending._wants == {}
