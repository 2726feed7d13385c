"""The stages of the failover bench: workers with supervisors of their own, and workers of one `leasehold serve`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from chaos.nodes import Node
from fleet import Running, run_gateway
from leasehold.coordinator import Keys, RedisClients, list_peers

WORKERS = 4
LIMIT_S = 40.0
"""Nothing is waited for longer."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. `goal` None: no goal, the figure only explains another one."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.value <= self.goal


@dataclass
class Stage:
    """What every measurement needs."""

    folder: Path
    config: Path
    redis_url: str


@dataclass
class Supervised:
    """One `leasehold serve` with all workers on one port."""

    running: Running
    redis_url: str

    @property
    def url(self) -> str:
        return self.running.url

    async def pids(self) -> dict[str, int]:
        """Process ids of the workers that have a lease, by their shortened incarnation."""
        client = RedisClients(self.redis_url).lookups()
        async with client:
            return {peer.incarnation[:8]: peer.info["pid"] for peer in await list_peers(client, Keys("leasehold"))}

    async def whole(self, without: frozenset[int] = frozenset()) -> dict[str, int]:
        """Wait until all workers are there, and none of `without`."""
        until = perf_counter() + LIMIT_S
        while True:
            pids = await self.pids()
            if len(pids) == WORKERS and not without & set(pids.values()):
                return pids
            assert perf_counter() < until, "a worker is missing"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def alone(stage: Stage, count: int = WORKERS, **env: str) -> AsyncGenerator[list[Node]]:
    """One-worker fleets: each has its own port and supervisor."""
    nodes = [Node(f"w{n}", stage.folder, stage.config, stage.redis_url, env, proxied=False) for n in range(count)]
    async with AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node)
        stack.callback(lambda: [node.terminate() for node in nodes])
        yield nodes


@asynccontextmanager
async def supervised(stage: Stage) -> AsyncGenerator[Supervised]:
    starting = run_gateway(
        stage.config,
        stage.folder,
        "--workers",
        str(WORKERS),
        redis_url=stage.redis_url,
        env={"LEASEHOLD_ROUTE_HEADERS": "true"},
    )
    running = await asyncio.to_thread(starting.__enter__)
    try:
        serve = Supervised(running, stage.redis_url)
        await serve.whole()
        yield serve
    finally:
        await asyncio.to_thread(starting.__exit__, None, None, None)
