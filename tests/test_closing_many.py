"""A pool that closes with many sessions tells their upstream, and does not fall upon it."""

from __future__ import annotations

import asyncio

import pytest
from fake_link import FakeLink
from leasehold.pool import HttpTarget, Link, Reply, ResumeRecord, SessionPool, Upstream
from leasehold.pool import session as session_module
from leasehold.pool.link import Fence, Headers
from leasehold.pool.pool import TELL_AT_ONCE

pytestmark = pytest.mark.anyio

FILES = Upstream("files", HttpTarget("http://127.0.0.1:1/mcp"))
MAIL = Upstream("mail", HttpTarget("http://127.0.0.1:2/mcp"))
MANY = 3 * TELL_AT_ONCE


class SlowPool(SessionPool):
    """Its links take a while to tell their upstream of the end; for ever, where it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.telling: dict[str, int] = {"files": 0, "mail": 0}
        self.most = 0
        self.told: list[str] = []
        self.frozen = ""

    async def _open_link(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        return SlowLink(self, upstream.name)


class SlowLink(FakeLink):
    def __init__(self, pool: SlowPool, name: str) -> None:
        super().__init__(resume=ResumeRecord("an id"))
        self._pool = pool
        self._name = name

    async def delete(self, headers: Headers) -> Reply:
        pool, name = self._pool, self._name
        pool.telling[name] += 1
        pool.most = max(pool.most, pool.telling[name])
        try:
            if pool.frozen == name:
                await asyncio.Event().wait()
            for _ in range(3):
                await asyncio.sleep(0)
        finally:
            pool.telling[name] -= 1
        pool.told.append(name)
        return await super().delete(headers)


async def test_all_sessions_are_told_of_a_few_at_a_time() -> None:
    """B29: nothing is left at the upstream, and idle sessions, which hold no connection, need few to end."""
    pool = SlowPool()
    async with pool:
        for number in range(MANY):
            await pool.open(str(number), FILES, "alice")
    assert pool.most == TELL_AT_ONCE
    assert len(pool.told) == MANY


async def test_an_upstream_that_does_not_answer_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """B14"""
    monkeypatch.setattr(session_module, "CLOSE_TIMEOUT_S", 3.0)
    pool = SlowPool()
    pool.frozen = "mail"
    async with pool:
        for number in range(MANY):
            await pool.open(f"mail-{number}", MAIL, "alice")
            await pool.open(f"files-{number}", FILES, "alice")
        pool.close()
        async with asyncio.timeout(5):
            while len(pool.told) < MANY:
                await asyncio.sleep(0.01)
    assert set(pool.told) == {"files"}
    assert len(pool) == 0
