"""One simulated worker process: the real worker on a loop and a clock of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from leasehold.coordinator import RedisClients
from leasehold.workers.core import WorkerCore
from leasehold.workers.opening import Opening

from .calls import UPSTREAMS
from .loop import SimLoop
from .network import Host
from .upstream import SimPool

if TYPE_CHECKING:
    from .world import World

NAMESPACE: Final = "sim"
MAX_BODY: Final = 1 << 20
GRACE_S: Final = 4.0
"""How long a worker that stops waits for its calls."""


class Process:
    """One worker process, with a loop and a clock of its own."""

    def __init__(self, world: World, name: str, skew_s: float) -> None:
        self.world = world
        self.name = name
        self.skew_s = skew_s
        self.host = Host(name)
        self.loop = SimLoop(
            lambda: world.now + skew_s,
            lambda factory: world.network.connect(self.host, factory),
            lambda context: world.unhandled(self, context),
        )
        self.host.loop = self.loop
        self.paused_at: float | None = None
        self.has_crashed = False
        self.has_stopped = False
        self.is_serving = False
        self.core: WorkerCore | None = None
        self._pool: SimPool | None = None
        self.opening: Opening | None = None
        self.calls: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self.life = self.loop.create_task(self._live(), name="life")
        self.life.add_done_callback(self._ended)

    def __repr__(self) -> str:
        return f"<Process {self.name} paused={self.is_paused} crashed={self.has_crashed} stopped={self.has_stopped}>"

    @property
    def pool(self) -> SimPool:
        assert self._pool is not None
        return self._pool

    @property
    def is_alive(self) -> bool:
        """It has not ended; perhaps it is paused."""
        return not (self.has_crashed or self.has_stopped)

    @property
    def is_paused(self) -> bool:
        return self.paused_at is not None

    @property
    def takes_calls(self) -> bool:
        return self.is_alive and self.is_serving and not self._stopping.is_set()

    def _make_core(self, pool: SimPool) -> WorkerCore:
        """As the product makes it."""
        return WorkerCore(
            UPSTREAMS,
            redis=RedisClients("redis://redis.invalid:6379"),
            keyring=self.world.keyring,
            namespace=NAMESPACE,
            lease_ttl_ms=self.world.lease_ms,
            grace_s=GRACE_S,
            max_body_bytes=MAX_BODY,
            pool=pool,
        )

    def stop(self) -> None:
        """As by SIGTERM."""
        self._stopping.set()

    def _ended(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()) is not None and not self.world.is_over:
            self.world.problem(f"{self.name} broke down: {error!r}", error)

    async def _live(self) -> None:
        self._pool = SimPool(self)
        self.core = core = self._make_core(self._pool)
        self.opening = Opening(core.sessions, self.world.identity, max_body_bytes=MAX_BODY)
        async with core.running():
            self.is_serving = True
            await self._stopping.wait()
            core.drain()
            if self.calls:
                await asyncio.wait(self.calls, timeout=GRACE_S)
        for task in self.calls:
            task.cancel()
        if self.calls:
            await asyncio.wait(self.calls)
        self.has_stopped = True
        self.is_serving = False
        self.host.alive = False
        self.world.note("stopped", self.name)
