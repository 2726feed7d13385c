"""The stage: workers, Redis, upstream and clients, and the loop of fault, recovery, repair."""

from __future__ import annotations

import asyncio
import random
import resource
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Final

import aiohttp
import psutil
from chaos.checker import Report, check
from chaos.clients import Balancer, Client, mixed_clients
from chaos.history import DRIVER, History, Measured, Recovery, Span
from chaos.nodes import Node, RedisServer
from chaos.sentinel import SentinelTrio, sentinel_trio
from chaos.upstream import Upstream
from fleet import write_config

LEASE_S: Final = 1.0
CALL_TIMEOUT_S: Final = 2.0
"""Silence of the upstream after which a call ends."""
PATIENCE_S: Final = CALL_TIMEOUT_S + 4 * LEASE_S
"""A call's deadline: the upstream's silence, and the waits for leases that may come before it."""
PAUSED_S: Final = 1.5 * LEASE_S
"""How long a worker is frozen, or its loop blocked."""
RECOVERY_S: Final = LEASE_S + 2.0
GRACE_S: Final = 3
TICK_S: Final = 0.02
REST_S: Final = 0.5
"""What a worker still had under way has reached the upstream by then."""
FILES: Final = 8192


@dataclass
class Chaos:
    """One run. `rng` is the schedule's: what it decides depends on the seed and the fault's number alone."""

    history: History
    upstream: Upstream
    redis: RedisServer | SentinelTrio
    nodes: list[Node]
    balancer: Balancer
    clients: list[Client]
    seed: int
    rng: random.Random
    going: asyncio.Event
    running: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    def pick(self) -> Node:
        return self.rng.choice(self.nodes)

    @asynccontextmanager
    async def quiet(self) -> AsyncGenerator[None]:
        """Nobody calls within the block."""
        self.going.clear()
        try:
            while self.balancer.in_flight:
                await asyncio.sleep(0.01)
            yield
        finally:
            self.going.set()

    def serving(self, node: Node) -> int:
        """Calls that a worker has under way at the upstream."""
        return sum(self.upstream.running[port] for pid in node.pids for port in _ports(pid))

    def serves_port(self, port: int) -> Node | None:
        """The worker that a connection comes from."""
        return next((node for node in self.nodes if any(port in _ports(pid) for pid in node.pids)), None)

    async def recovered(self, fault: str) -> None:
        """Wait until every client is served by every worker, and note how long that took."""
        begun = monotonic()

        async def serves(client: Client, node: Node) -> float | None:
            while monotonic() < begun + RECOVERY_S + 1:
                call = await client.step("peek", via=node)
                if call is not None and call.outcome == "ok":
                    return monotonic() - begun
                await asyncio.sleep(0.02)
            return None

        up = [node for node in self.nodes if node.url]
        took = await asyncio.gather(*(serves(client, node) for client in self.clients for node in up))
        seconds = None if None in took else max(each for each in took if each is not None)
        self.history.recoveries.append(Recovery(fault, begun, seconds, RECOVERY_S))

    async def repair(self) -> None:
        """Start whatever is down."""
        for node in self.nodes:
            if node.running is None:
                await node.start()
            else:
                await node.wait_ready()

    async def judged(self) -> Report:
        """Stop the clients, let everything come to rest, and check."""
        await self.stop_clients()
        await asyncio.sleep(REST_S)
        failed = sum(node.log().count(" CRITICAL ") for node in self.nodes)
        self.history.measured.append(Measured("workers that failed by themselves", monotonic(), failed, 0))
        return check(self.history, monotonic())

    async def stop_clients(self) -> None:
        for client in self.clients:
            client.stopping = True
        self.going.set()
        await asyncio.gather(*self.running)
        self.running.clear()


async def watch_driver(history: History) -> None:
    """Note when this process could not run: everybody's answers are late by that."""
    while True:
        due = monotonic() + TICK_S
        await asyncio.sleep(TICK_S)
        if (now := monotonic()) > due + TICK_S:
            history.pauses.append(Span(DRIVER, due, now))


def _ports(pid: int) -> set[int]:
    """Local ports of a process' connections."""
    try:
        return {connection.laddr.port for connection in psutil.Process(pid).net_connections("tcp")}
    except psutil.Error:
        return set()


@asynccontextmanager
async def chaos_stage(
    folder: Path, seed: int, *, workers: int = 3, clients: int = 10, sentinel: bool = False
) -> AsyncGenerator[Chaos]:
    """Start everything. With `sentinel` workers have no proxy of their own on the way to Redis."""
    _allow_files()
    history = History()
    async with AsyncExitStack() as stack:
        redis: RedisServer | SentinelTrio
        if sentinel:
            redis = await stack.enter_async_context(sentinel_trio(folder))
        else:
            redis = stack.enter_context(RedisServer())
        upstream = await stack.enter_async_context(Upstream(history))
        options = {"forward_headers": ["authorization"], "idempotent_tools": ["peek"], "call_timeout": CALL_TIMEOUT_S}
        servers = {
            "own": {"url": upstream.url("own"), "leasehold": options},
            "shared": {"url": upstream.url("shared"), "leasehold": {**options, "affinity": "principal"}},
        }
        config = write_config(folder, servers)
        env = {
            "LEASEHOLD_LEASE_TTL_MS": str(int(LEASE_S * 1000)),
            "LEASEHOLD_SHUTDOWN_GRACE_S": str(GRACE_S),
        }
        nodes = [
            Node(f"w{number}", folder, config, redis.url, env, block_s=PAUSED_S, proxied=not sentinel)
            for number in range(workers)
        ]
        started = await asyncio.gather(*(node.__aenter__() for node in nodes), return_exceptions=True)
        for node, outcome in zip(nodes, started, strict=True):
            if not isinstance(outcome, BaseException):
                stack.push_async_exit(node)
        for outcome in started:
            if isinstance(outcome, BaseException):
                raise outcome
        stack.callback(lambda: [node.terminate() for node in nodes])
        # A connection of its own for each request: a broken one is then a fault's doing and not a race.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        balancer = Balancer(nodes, http, history, patience_s=PATIENCE_S, longest_pause_s=PAUSED_S)
        chaos = Chaos(
            history,
            upstream,
            redis,
            nodes,
            balancer,
            mixed_clients(clients, balancer, seed),
            seed,
            random.Random(seed),
            asyncio.Event(),
        )
        chaos.going.set()
        for client in chaos.clients:
            client.going = chaos.going
        stack.push_async_callback(chaos.stop_clients)
        watching = asyncio.create_task(watch_driver(history), name="watch-driver")
        stack.callback(watching.cancel)
        chaos.running = [asyncio.create_task(client.run(), name=client.name) for client in chaos.clients]
        yield chaos


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
