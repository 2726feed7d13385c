"""One process with a pool, for `memory.py`. Commands:

hold    kind, target, count, traced  -> bytes per idle session, file descriptors, CPU of idling, s to open
churn   url, cycles                  -> objects, tasks, bytes, file descriptors; the pool is empty then
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter, process_time
from typing import Any

import psutil
import uvloop
from child import obey, say
from leasehold.pool import HttpTarget, PooledSession, SessionPool, StdioTarget, Upstream
from leasehold.pool.borrowing import Want
from leasehold.pool.calls import call
from leasehold.pool.errors import PoolError
from leasehold.pool.handshake import session_headers
from leasehold.pool.upstream import SseTarget
from mcp import ClientSession

PROCESS = psutil.Process()
OPEN_AT_ONCE = 32
CONNECTIONS_GONE_S = 8.0
"""Longer than the pool keeps an idle connection: twice 3 s, for it looks every 3 s."""
IDLING_S = 5.0
IN_FLIGHT = 20
HEADERS = session_headers("2025-11-25", [])


def upstream_of(kind: str, target: Any, **limits: Any) -> Upstream:
    targets = {
        "http": lambda: HttpTarget(target),
        "sse": lambda: SseTarget(target),
        "stdio": lambda: StdioTarget(target[0], tuple(target[1:])),
    }
    return Upstream(kind, targets[kind.partition("-")[0]](), **limits)


async def open_and_hold(pool: SessionPool, upstream: Upstream, count: int, *, typed: bool) -> None:
    """As many sessions as were asked for, used once each and then idle."""

    async def use(stack: AsyncExitStack) -> None:
        if typed:
            session: ClientSession = await stack.enter_async_context(pool.session(upstream))
            await session.call_tool("echo", {"text": "once"})
        else:
            link = await stack.enter_async_context(pool.link(upstream))
            params = {"name": "echo", "arguments": {"text": "once"}}
            await call(link, "tools/call", params, id=link.next_id(), headers=HEADERS)

    async with AsyncExitStack() as stack:
        for begun in range(0, count, OPEN_AT_ONCE):
            await asyncio.gather(*(use(stack) for _ in range(min(OPEN_AT_ONCE, count - begun))))


async def hold(kind: str, target: Any, count: int, traced: bool) -> dict[str, float]:
    typed = kind.endswith("-typed")
    async with SessionPool(max_sessions=count + 10) as pool:
        # What the first session costs, and modules that are imported late, is not counted.
        upstream = upstream_of(kind, target, max_sessions=count)
        await open_and_hold(pool, upstream, 1, typed=typed)
        if traced:
            tracemalloc.start()
        before, before_traced, before_fds = rss(), tracemalloc.get_traced_memory()[0], PROCESS.num_fds()
        began = perf_counter()
        await open_and_hold(pool, upstream, count, typed=typed)
        opened_s = perf_counter() - began
        await asyncio.sleep(CONNECTIONS_GONE_S)
        found: dict[str, float] = {
            "sessions": len(pool),
            "bytes_each": (rss() - before) / (len(pool) - 1),
            "traced_bytes_each": (tracemalloc.get_traced_memory()[0] - before_traced) / (len(pool) - 1),
            "fds_each": (PROCESS.num_fds() - before_fds) / (len(pool) - 1),
            "fds": PROCESS.num_fds(),
            "tasks_each": len(asyncio.all_tasks()) / len(pool),
            "rss": rss(),
            "open_s": opened_s,
        }
        if traced:
            tracemalloc.stop()
        cpu = process_time()
        await asyncio.sleep(IDLING_S)
        found["idle_cpu"] = (process_time() - cpu) / IDLING_S
        began = perf_counter()
        await pool.aclose()
        found["close_s"] = perf_counter() - began
    return found


class HolderError(Exception):
    """What a holder of a session fails with himself."""


class Churn:
    """Borrowing, in every way and with every ending there is."""

    def __init__(self, url: str) -> None:
        limits: dict[str, Any] = {"max_sessions": 24, "max_sessions_per_principal": 16, "idle_ttl_s": 0.5}
        self._good = upstream_of("http", f"{url}/mcp", **limits)
        self._bad = Upstream("refuses", HttpTarget(f"{url}/nowhere"), **limits)
        self._none = Upstream("nobody", HttpTarget("http://127.0.0.1:9/mcp"), **limits)  # the discard port, closed
        self._stack = AsyncExitStack()
        self._pool: SessionPool | None = None
        self._numbers = iter(range(sys.maxsize))
        self.outcomes: Counter[str] = Counter()
        self.unforeseen = 0
        """Failures that are nobody's, or reached nobody but the loop."""
        asyncio.get_running_loop().set_exception_handler(self._unforeseen)

    def _unforeseen(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.unforeseen += 1
        loop.default_exception_handler(context)

    async def run(self, cycles: int) -> dict[str, Any]:
        if self._pool is None:
            self._pool = await self._stack.enter_async_context(SessionPool(max_sessions=30, acquire_timeout_s=5))
        pool, left = self._pool, iter(range(cycles))
        began = perf_counter()

        async def again_and_again() -> None:
            for _ in left:
                await self._cycle(pool)

        await asyncio.gather(*(again_and_again() for _ in range(IN_FLIGHT)))
        took = perf_counter() - began
        await self._emptied(pool)
        found: dict[str, Any] = {**counts(), "unforeseen": self.unforeseen, "seconds": took}
        return {**found, "outcomes": dict(self.outcomes), "closed": pool.statistics().closed}

    async def _cycle(self, pool: SessionPool) -> None:
        """One of: given back at once, discarded, called, cancelled anywhere, not opened, shared, of a new principal."""
        roll = random.random()
        principal = f"user-{random.randrange(3)}"
        if random.random() < 0.03:
            principal = f"passer-by-{next(self._numbers)}"
        want = Want(self._good, principal=principal)
        try:
            if roll < 0.55:
                borrow = await pool.acquire(want)
                borrow.release(discard=roll > 0.54)
                borrow.release()
            elif roll < 0.6:
                async with asyncio.timeout(random.uniform(0, 0.004)):
                    await self._call(pool, principal)
            elif roll < 0.605:
                await pool.acquire(Want(random.choice((self._bad, self._none)), principal=principal))
            elif roll < 0.61:
                async with pool.link(self._good, principal=principal):
                    raise HolderError
            elif roll < 0.65:
                async with pool.session(self._good, affinity=f"room-{random.randrange(4)}") as session:
                    await session.call_tool("echo", {"text": "shared"})
            elif roll < 0.66:
                async with asyncio.timeout(random.uniform(0, 0.004)):
                    async with pool.session(self._good, principal=principal) as session:
                        await session.call_tool("echo", {"text": "cancelled"})
            elif roll < 0.7:
                async with pool.session(self._good, principal=principal) as session:
                    await session.call_tool("echo", {"text": "typed"})
            else:
                await self._call(pool, principal)
            self.outcomes["ok"] += 1
        except (PoolError, TimeoutError, HolderError) as error:
            self.outcomes[type(error).__name__] += 1
        except Exception:
            self.unforeseen += 1
            logging.exception("unforeseen")

    async def _call(self, pool: SessionPool, principal: str) -> None:
        async with pool.link(self._good, principal=principal) as link:
            params = {"name": "echo", "arguments": {"text": "raw"}}
            await call(link, "tools/call", params, id=link.next_id(), headers=HEADERS)

    async def _emptied(self, pool: SessionPool) -> None:
        """The idle ones go by their TTL, connections by theirs; then only what leaked is left."""
        quiet_since = perf_counter()
        async with asyncio.timeout(30):
            while perf_counter() < quiet_since + CONNECTIONS_GONE_S:
                await asyncio.sleep(0.1)
                if len(pool) or pool.statistics().waiting:
                    quiet_since = perf_counter()

    async def aclose(self) -> None:
        await self._stack.aclose()


def counts() -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    return {
        "objects": len(objects),
        "pooled_sessions": sum(isinstance(found, PooledSession) for found in objects),
        "tasks": len(asyncio.all_tasks()),
        "rss": rss(),
        "fds": PROCESS.num_fds(),
    }


def rss() -> int:
    gc.collect()
    return PROCESS.memory_info().rss


@asynccontextmanager
async def churning() -> AsyncGenerator[dict[str, Churn], None]:
    """Made with the first command."""
    made: dict[str, Churn] = {}
    try:
        yield made
    finally:
        for churn in made.values():
            await churn.aclose()


async def main() -> None:
    async with churning() as made:

        def do(command: dict[str, Any]) -> Awaitable[Any]:
            if command.pop("do") == "hold":
                return hold(**command)
            url = command["url"]
            if url not in made:
                made[url] = Churn(url)
            return made[url].run(command["cycles"])

        say("ready")
        await obey(do)


if __name__ == "__main__":
    uvloop.run(main())
