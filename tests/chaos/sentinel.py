"""A Redis under Sentinel: master, replica and three Sentinels on loopback, and a replica that can be made to lag.

The replica follows its master through a proxy: what that swallows is lost when the replica is promoted. Sentinels would
correct a replica that follows another address than they know, but only after `failover-timeout`; so there is one
failover in the life of one of these.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis
from chaos.nodes import PatientProxy
from faults import Mode
from fleet import Running, run_process, wait_until
from leasehold.coordinator.embedded import find_server

SERVICE: Final = "leases"
DOWN_AFTER_MS: Final = 500
SETTINGS: Final = ("--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")


@dataclass
class SentinelTrio:
    """Masters change; `url` names the Sentinels and stays."""

    url: str
    master: Running
    replica_port: int
    replication: PatientProxy

    async def fail_over(self, lag_s: float) -> None:
        """The replica misses the last `lag_s`, the master dies; returns when the replica takes writes."""
        self.replication.mode = Mode.BLACKHOLE
        await asyncio.sleep(lag_s)
        self.master.kill()
        await asyncio.to_thread(wait_until, self._promoted, "no Sentinel promotes the replica", 30)

    def _promoted(self) -> bool:
        with redis.Redis(port=self.replica_port) as client:
            return client.role()[0] == b"master"


@asynccontextmanager
async def sentinel_trio(folder: Path) -> AsyncGenerator[SentinelTrio]:
    """Ready when all three Sentinels know each other and the replica."""
    server = str(find_server())
    async with AsyncExitStack() as stack:
        processes = stack.enter_context(ExitStack())

        def start(*arguments: str) -> Running:
            return processes.enter_context(run_process([server, *arguments], folder))

        master_port, replica_port, *ports = free_ports(5)
        master = start("--port", str(master_port), *SETTINGS)
        replication = await stack.enter_async_context(PatientProxy(f"redis://127.0.0.1:{master_port}"))
        follow = ["--replicaof", "127.0.0.1", replication.url.rpartition(":")[2]]
        await asyncio.to_thread(wait_until, lambda: answers(master_port), "the master does not start")
        start("--port", str(replica_port), *SETTINGS, *follow)
        await asyncio.to_thread(wait_until, lambda: follows(replica_port), "the replica does not follow")
        for port in ports:
            file = folder / f"sentinel-{port}.conf"
            file.write_text(
                f"port {port}\n"
                f"sentinel monitor {SERVICE} 127.0.0.1 {master_port} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
                f"sentinel failover-timeout {SERVICE} 60000\n"
            )
            start(str(file), "--sentinel")
        await asyncio.to_thread(wait_until, lambda: all(map(knows_all, ports)), "the Sentinels do not find each other")
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        yield SentinelTrio(f"redis+sentinel://{hosts}/{SERVICE}", master, replica_port, replication)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def answers(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def follows(port: int) -> bool:
    if not answers(port):
        return False
    with redis.Redis(port=port) as client:
        return client.info("replication").get("master_link_status") == "up"


def knows_all(port: int) -> bool:
    if not answers(port):
        return False
    with redis.Redis(port=port) as client:
        state = client.sentinel_master(SERVICE)
        return state["num-other-sentinels"] == 2 and state["num-slaves"] == 1
