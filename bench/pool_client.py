"""One way to call a tool, in a process of its own, so that its CPU time is its own: see `Ways`.

Commands:

    run    url, in_flight, seconds, warm_up_s  -> calls, failed, seconds, cpu_s, latencies_us
    lend   url, times                          -> us for an acquire with its release, an empty block of either face
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from time import perf_counter, process_time
from typing import Any

import aiohttp
import httpx2
import orjson
import uvloop
from child import obey, say
from leasehold.pool import HttpTarget, SessionPool, Upstream
from leasehold.pool.borrowing import Want
from leasehold.pool.calls import call
from leasehold.pool.handshake import session_headers
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

TOOL = "count"
ARGUMENTS = {"text": "y" * 60}
PARAMS = {"name": TOOL, "arguments": ARGUMENTS}
VERSION = "2025-11-25"

Call = Callable[[], Awaitable[None]]


class Ways:
    """How to make one call of the tool. Each keeps what it may keep between calls."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._pool: SessionPool | None = None
        self._upstreams: dict[str, Upstream] = {}

    async def upstream(self, url: str) -> tuple[SessionPool, Upstream]:
        if self._pool is None:
            self._pool = await self._stack.enter_async_context(SessionPool())
        return self._pool, self._upstreams.setdefault(url, Upstream(url, HttpTarget(url)))

    async def per_call(self, url: str) -> Call:
        """What the SDK's documents show, once per call: connect, initialize, call, close."""

        async def once() -> None:
            async with streamable_http_client(url) as streams, ClientSession(*streams) as session:
                await session.initialize()
                await session.call_tool(TOOL, ARGUMENTS)

        return once

    async def per_call_shared(self, url: str) -> Call:
        """The same with one HTTP client for all calls: the CA bundle is loaded once, connections are kept."""
        client = await self._stack.enter_async_context(wide_client())

        async def once() -> None:
            async with streamable_http_client(url, http_client=client) as streams, ClientSession(*streams) as session:
                await session.initialize()
                await session.call_tool(TOOL, ARGUMENTS)

        return once

    async def sdk(self, url: str) -> Call:
        """One session of the SDK for all calls, which it makes side by side."""
        return await self._sdk(url, None)

    async def sdk_wide(self, url: str) -> Call:
        """The same with an HTTP client that keeps as many connections as there are calls in flight."""
        return await self._sdk(url, await self._stack.enter_async_context(wide_client()))

    async def _sdk(self, url: str, client: httpx2.AsyncClient | None) -> Call:
        streams = await self._stack.enter_async_context(streamable_http_client(url, http_client=client))
        session = await self._stack.enter_async_context(ClientSession(*streams))
        await session.initialize()

        async def once() -> None:
            await session.call_tool(TOOL, ARGUMENTS)

        return once

    async def typed(self, url: str) -> Call:
        """A session borrowed from the pool for each call, as an `mcp.ClientSession`."""
        pool, upstream = await self.upstream(url)

        async def once() -> None:
            async with pool.session(upstream) as session:
                await session.call_tool(TOOL, ARGUMENTS)

        return once

    async def raw(self, url: str) -> Call:
        """A session borrowed for each call, as its raw face."""
        pool, upstream = await self.upstream(url)
        headers = session_headers(VERSION, [])

        async def once() -> None:
            async with pool.link(upstream) as link:
                answer = await call(link, "tools/call", PARAMS, id=link.next_id(), headers=headers)
                answer.payload["result"]["content"]

        return once

    async def floor(self, url: str) -> Call:
        """The same bytes by bare HTTP, through the client that the pool's links use; nobody looks at the answer."""
        connector = aiohttp.TCPConnector(limit=0)
        client = await self._stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": PARAMS})
        headers = {
            "accept": "application/json, text/event-stream",
            "content-type": "application/json",
            "mcp-protocol-version": VERSION,
            "mcp-session-id": "s" * 32,
        }

        async def once() -> None:
            async with client.post(url, data=body, headers=headers) as response:
                await response.read()

        return once


def wide_client() -> httpx2.AsyncClient:
    """Without the SDK's default of 20 connections that are kept."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(timeout=httpx2.Timeout(30, read=300), limits=limits)


async def drive(once: Call, in_flight: int, seconds: float) -> tuple[list[int], int]:
    """Latencies in us, and how many calls failed."""
    latencies: list[int] = []
    failed = 0
    until = perf_counter() + seconds

    async def again_and_again() -> None:
        nonlocal failed
        while (started := perf_counter()) < until:
            try:
                await once()
            except Exception as error:
                logging.warning("call failed: %r", error)
                failed += 1
            latencies.append(int((perf_counter() - started) * 1e6))

    await asyncio.gather(*(again_and_again() for _ in range(in_flight)))
    return latencies, failed


async def lend(pool: SessionPool, upstream: Upstream, times: int) -> dict[str, float]:
    """What borrowing costs by itself: us of CPU time (there is nothing to wait for), the best of five."""
    want = Want(upstream)

    async def acquire() -> None:
        (await pool.acquire(want)).release()

    async def session() -> None:
        async with pool.session(upstream):
            pass

    async def link() -> None:
        async with pool.link(upstream):
            pass

    async def us(once: Call) -> float:
        took: list[float] = []
        for _ in range(5):
            began = process_time()
            for _ in range(times):
                await once()
            took.append((process_time() - began) / times * 1e6)
        return min(took)

    await session()
    return {"acquire_release": await us(acquire), "session": await us(session), "link": await us(link)}


async def main(way: str) -> None:
    async with AsyncExitStack() as stack:
        ways = Ways(stack)
        calls: dict[str, Call] = {}

        async def do(command: dict[str, Any]) -> Any:
            url = command["url"]
            if command["do"] == "lend":
                return await lend(*await ways.upstream(url), command["times"])
            if url not in calls:
                calls[url] = await getattr(ways, way)(url)
            once, in_flight = calls[url], command["in_flight"]
            await drive(once, in_flight, command["warm_up_s"])
            began, cpu = perf_counter(), process_time()
            latencies, failed = await drive(once, in_flight, command["seconds"])
            return {
                "calls": len(latencies),
                "failed": failed,
                "seconds": perf_counter() - began,
                "cpu_s": process_time() - cpu,
                "latencies_us": latencies,
            }

        say("ready")
        await obey(do)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
