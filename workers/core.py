"""What makes a process a worker of the fleet, whether it serves HTTP (the gateway) or calls by itself (the library):
its lease, its sessions, both ends of forwarding, and its life: join, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from ..coordinator import Keyring, Keys, Member, RedisClients, Unavailable
from ..coordinator.channel import Receipt
from ..coordinator.frames import Frame
from ..pool import SessionPool, Upstream
from ..pool.statistics import PoolStatistics
from .affinity import Affinity
from .asgi import Receive, Scope, Send
from .control import Control
from .exchange import CONTROL, HOP
from .forwarder import Forwarder, ForwarderStatistics
from .placement import Placement
from .serving import Serving
from .sessions import Sessions

logger = logging.getLogger("leasehold.workers.core")

HOUSEKEEPING_S: Final = 1.0
START_TIMEOUT_S: Final = 1.0
"""How long a starting worker waits for Redis before it goes on without."""


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """A worker now, and since it was made."""

    incarnation: str
    redis_reachable: bool
    incarnations: int
    """How many it has had: each but the first means a lease that was lost."""
    sessions_owned: int
    sessions_adopted: int
    sessions_handed_off: int
    sessions_lost: int
    """To other workers, while the lease was over."""
    calls_local: int
    calls_forwarded: int
    calls_rerouted: int
    calls_repeated: int
    forwarder: ForwarderStatistics
    pool: PoolStatistics


class WorkerCore:
    """A worker of the fleet. Made after fork, never before; lives inside `running()`."""

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        *,
        redis: RedisClients,
        keyring: Keyring,
        namespace: str,
        lease_ttl_ms: int,
        grace_s: float,
        max_body_bytes: int,
        ephemeral: bool = False,
        index: int = 0,
        role: str = "worker",
        pool: SessionPool | None = None,
    ) -> None:
        """`ephemeral`: Redis ends with this process group, so a stop ends sessions upstream: nobody could adopt
        them. `role`: what kind of member it is; sessions move among those of one kind."""
        self.upstreams = upstreams
        self.ephemeral = ephemeral
        self.grace_s = grace_s
        self._redis_place = redis.place
        info = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "index": index,
            "role": role,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.pool = pool or SessionPool()
        self.member = Member(redis, Keys(namespace), keyring, self, lease_ttl_ms=lease_ttl_ms, info=info)
        self.sessions = Sessions(self.member, self.pool, keyring, upstreams)
        self.serving = Serving(self.sessions, self.member.events, max_body_bytes=max_body_bytes)
        self.forwarder = Forwarder(self.member, self.sessions, self._serve_hop)
        self.placement = Placement(self.member, self.sessions, self.forwarder, role)
        self.affinity = Affinity(self.member, self.sessions, self.forwarder, self.placement, self.serving.serve)
        self.control = Control(self.sessions, self.affinity, self.placement, upstreams, self.hand_off, self.in_flight)
        self.is_draining = False
        self._health_due = asyncio.Event()
        self.pool.breakers.on_due = self._health_due.set
        self.on_joined: Callable[[str], None] = lambda _incarnation: None
        self._joined = asyncio.Event()
        self._handing_off: asyncio.Task[None] | None = None

    @property
    def has_joined(self) -> bool:
        """Whether it has ever had a lease."""
        return self._joined.is_set()

    def statistics(self) -> WorkerStatistics:
        """A snapshot; O(sessions)."""
        forwarder = self.forwarder.statistics
        return WorkerStatistics(
            incarnation=self.member.incarnation[:8],
            redis_reachable=self.member.reachable,
            incarnations=self.member.incarnations,
            sessions_owned=len(self.sessions.all()),
            sessions_adopted=self.sessions.adopted,
            sessions_handed_off=self.sessions.handed_off,
            sessions_lost=self.sessions.lost,
            calls_local=self.affinity.local,
            calls_forwarded=self.affinity.forwarded,
            calls_rerouted=self.affinity.rerouted,
            calls_repeated=self.affinity.repeated,
            forwarder=replace(forwarder, nacked=dict(forwarder.nacked)),
            pool=self.pool.statistics(),
        )

    def in_flight(self) -> int:
        """Calls and streams that this worker has to do with, but for the control request that asks."""
        return self.forwarder.serving - 1

    def background(self) -> list[Coroutine[Any, Any, None]]:
        """What else runs for as long as the worker lives; each may end by itself."""
        return []

    def tick(self) -> None:
        """Called about every second."""

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Join the fleet and serve; on leaving, drain and stop. Without Redis it starts unready and joins later."""
        async with asyncio.TaskGroup() as tasks:
            member = tasks.create_task(self.member.run(), name="leasehold-member")
            pool = tasks.create_task(self.pool.run(), name="leasehold-pool")
            background = [
                tasks.create_task(self._forever(work), name="leasehold-background")
                for work in (self._keep_house(), self._share_health(), *self.background())
            ]
            try:
                await self._wait_joined()
                yield
            finally:
                await self._shut_down(member, pool, background)

    async def _shut_down(
        self, member: asyncio.Task[None], pool: asyncio.Task[None], background: list[asyncio.Task[None]]
    ) -> None:
        """Each step is taken, whatever becomes of the others: background work may have failed, and ended the group."""
        await self._step(self._stop())
        self.pool.close()
        await asyncio.wait({pool}, timeout=15)
        await self._step(self.sessions.settle())
        await self._step(self.member.stop())
        for task in background:
            task.cancel()
        await asyncio.wait({member}, timeout=5)
        await self._step(self.member.aclose())

    @staticmethod
    async def _step(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            logger.exception("stop_incomplete")

    def drain(self) -> None:
        """Take no new sessions, hand off those that can move, and end the streams that never end by themselves.

        Calls that run go on.
        """
        if self.is_draining:
            return
        self.is_draining = True
        logger.info("draining sessions=%d", len(self.pool))
        if self.has_joined and not self.ephemeral:
            loop = asyncio.get_running_loop()
            self._handing_off = loop.create_task(self._hand_off(), name="leasehold-hand-off")

    async def hand_off(self) -> None:
        """`drain`, and return when what can move was handed off."""
        self.drain()
        if self._handing_off is not None:
            await asyncio.shield(self._handing_off)

    async def _hand_off(self) -> None:
        try:
            await self.sessions.hand_off()
        except Unavailable as error:  # their owner's end is known a moment later, from the mark that it leaves
            logger.warning("sessions_not_handed_off error=%s", error)

    async def _stop(self) -> None:
        await self.hand_off()
        self.serving.takes_streams = False
        await self.forwarder.drain(self.grace_s)

    async def _serve_hop(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.control if scope[HOP].session == CONTROL else self.serving.serve_hop
        await app(scope, receive, send)

    async def _wait_joined(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._joined.wait()
        except TimeoutError:
            logger.error("start_without_redis place=%s: unready until it answers", self._redis_place)  # noqa: TRY400

    async def _forever(self, work: Coroutine[Any, Any, None]) -> None:
        """Background work whose failure must not go unseen: it is logged, and the task group ends the worker."""
        try:
            await work
        except Exception:
            logger.critical("background_task_failed", exc_info=True)
            raise

    async def _keep_house(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HOUSEKEEPING_S):
                    await self.sessions.due.wait()
            self.sessions.due.clear()
            self.tick()
            try:
                await self.sessions.reconcile()
            except Unavailable as error:
                logger.debug("reconcile_failed error=%s", error)
                await asyncio.sleep(HOUSEKEEPING_S)

    async def _share_health(self) -> None:
        """Tell the fleet which upstreams fail, and hear of it: every second, and at once when a circuit changes."""
        breakers = self.pool.breakers
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HOUSEKEEPING_S):
                    await self._health_due.wait()
            self._health_due.clear()
            try:
                circuits = await self.member.health.exchange(self.member.incarnation, breakers.reports())
            except Unavailable:
                breakers.alone()
            else:
                breakers.heard(circuits)

    # -- what the member tells (coordinator.Listener) --------------------------------------------------------------

    async def joined(self, incarnation: str, *, again: bool) -> None:
        if again:
            await self.sessions.reconcile()
        self._joined.set()
        self.on_joined(incarnation)
        logger.info("worker_ready incarnation=%s", incarnation[:8])

    def lost(self, incarnation: str) -> None:
        self.forwarder.lost()

    def redis_changed(self) -> None:
        self.sessions.due.set()

    def rotated(self) -> None:
        self.forwarder.rotated()

    def frame(self, sender: str, frame: Frame) -> None:
        self.forwarder.frame(sender, frame)

    def receipt(self, sender: str, receipt: Receipt) -> None:
        self.forwarder.receipt(sender, receipt)

    def peer_down(self, peer: str, unread: frozenset[int]) -> None:
        self.forwarder.peer_down(peer, unread)
