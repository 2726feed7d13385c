"""One worker: the parts, put together, and its life: start, ready, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final

from ..coordinator import Keyring, Keys, Member, RedisClients, Unavailable
from ..coordinator.channel import Receipt
from ..coordinator.frames import Frame
from ..pool import Config, SessionPool
from .affinity import OWNER, Affinity
from .asgi import Message, Receive, Scope, Send
from .door import LOOPBACK, Door
from .forwarder import Forwarder
from .gateway import Gateway
from .identity import Identity
from .keepalive import StreamKeeper
from .sessions import Sessions
from .settings import Settings
from .telemetry import Telemetry

logger = logging.getLogger("leasehold.workers.worker")

HOUSEKEEPING_S: Final = 1.0
START_TIMEOUT_S: Final = 1.0
"""How long a starting worker waits for Redis before it answers requests, with 503."""


class Worker:
    """A gateway worker. An ASGI application once `running()` was entered; made after fork, never before."""

    def __init__(
        self,
        settings: Settings,
        config: Config,
        *,
        redis_url: str,
        secrets: list[bytes],
        ephemeral: bool,
        index: int = 0,
        clients: type[RedisClients] = RedisClients,
    ) -> None:
        """`ephemeral`: Redis ends with this process group, so a stop ends sessions upstream: nobody could adopt
        them. `clients` makes the connections to Redis."""
        self.settings = settings
        self.ephemeral = ephemeral
        self.grace_s = settings.shutdown_grace_s
        redis = clients(redis_url)
        self._redis_place = redis.place
        keyring = Keyring(secrets)
        keys = Keys(settings.namespace)
        info = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "index": index,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.upstreams = config.servers
        self.telemetry = Telemetry()
        self.telemetry.observe = self._observe
        self.keeper = StreamKeeper()
        self.pool = SessionPool()
        self.member = Member(redis, keys, keyring, self, lease_ttl_ms=settings.lease_ttl_ms, info=info)
        self.sessions = Sessions(self.member, self.pool, keyring, config.servers)
        loopback = settings.host in ("localhost", "127.0.0.1", "::1") or settings.host in LOOPBACK
        entry = Door(
            tokens=[token.get_secret_value().encode() for token in settings.tokens],
            hosts=settings.allowed_hosts,
            origins=settings.allowed_origins,
            loopback_only=loopback,
        )
        self.gateway = Gateway(
            config.servers,
            self.pool,
            self.sessions,
            Identity(keyring),
            entry,
            self.keeper,
            self.telemetry,
            max_body_bytes=settings.max_body_bytes,
            max_waiting=settings.max_waiting,
        )
        self.forwarder = Forwarder(self.member, self.sessions, self.gateway)
        self.affinity = Affinity(self.member, self.sessions, self.forwarder, self.gateway.serve_owned)
        self.gateway.affinity = self.affinity
        self._joined = asyncio.Event()
        self._draining = False
        self._tasks: asyncio.TaskGroup | None = None
        self._handing_off: asyncio.Task[None] | None = None
        self.on_joined: Callable[[str], None] = lambda _incarnation: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.settings.route_headers and scope["type"] == "http":
            send = self._show_route(scope, send)
        await self.gateway(scope, receive, send)

    def _show_route(self, scope: Scope, send: Send) -> Send:
        async def showing(message: Message) -> None:
            if message["type"] == "http.response.start":
                here = self.member.incarnation
                route = ((b"leasehold-worker", here), (b"leasehold-owner", scope.get(OWNER, here)))
                headers = [*message.get("headers", ()), *((name, value[:8].encode()) for name, value in route)]
                message = {**message, "headers": headers}
            await send(message)

        return showing

    def __repr__(self) -> str:
        return f"<Worker {self.member.incarnation[:8] or '-'} ready={self.gateway.ready} {self.pool!r}>"

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Join the fleet and serve; on leaving, drain and stop. Without Redis it starts unready and joins later."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            member = tasks.create_task(self.member.run(), name="leasehold-member")
            pool = tasks.create_task(self.pool.run(), name="leasehold-pool")
            background = [
                tasks.create_task(self._forever(self.keeper.run()), name="leasehold-keeper"),
                tasks.create_task(self._forever(self._keep_house()), name="leasehold-housekeeping"),
            ]
            try:
                await self._wait_joined()
                yield
            finally:
                await self._stop()
                self.pool.close()
                await asyncio.wait({pool}, timeout=15)
                await self.sessions.settle()
                await self.member.stop()
                for task in background:
                    task.cancel()
                await asyncio.wait({member}, timeout=5)
                await self.member.aclose()

    def drain(self) -> None:
        """Take no new sessions, hand off those that can move, and end the streams that never end by themselves.

        Calls that run go on.
        """
        if self._draining:
            return
        self._draining = True
        self.gateway.ready = False
        self.gateway.end_streams()
        logger.info("draining waiting=%d sessions=%d", self.gateway.waiting, len(self.pool))
        if self._tasks is not None and not self.ephemeral:
            self._handing_off = self._tasks.create_task(self._hand_off(), name="leasehold-hand-off")

    async def _hand_off(self) -> None:
        try:
            await self.sessions.hand_off()
        except Unavailable as error:  # their owner's end is known a moment later, from the mark that it leaves
            logger.warning("sessions_not_handed_off error=%s", error)

    async def _stop(self) -> None:
        self.drain()
        if self._handing_off is not None:
            await self._handing_off
        await self.forwarder.drain(self.grace_s)

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
            self.telemetry.collect()
            self.gateway.health = self._health()
            try:
                await self.sessions.reconcile()
            except Unavailable as error:
                logger.debug("reconcile_failed error=%s", error)
                await asyncio.sleep(HOUSEKEEPING_S)

    def _health(self) -> dict[str, Any]:
        return {
            "incarnation": self.member.incarnation[:8],
            "redis": "ok" if self.member.reachable else "unreachable",
            "sessions": len(self.pool),
        }

    def _observe(self) -> Iterable[tuple[str, dict[str, str], float]]:
        forwarder, pool, affinity = self.forwarder.statistics, self.pool.statistics(), self.affinity
        yield "calls_local", {}, affinity.local
        yield "calls_forwarded", {}, affinity.forwarded
        yield "calls_rerouted", {}, affinity.rerouted
        yield "calls_repeated", {}, affinity.repeated
        yield "exchanges_sent", {}, forwarder.sent
        yield "exchanges_answered", {}, forwarder.answered
        yield "exchanges_not_run", {}, forwarder.not_run
        yield "exchanges_unknown", {}, forwarder.unknown
        yield "exchanges_abandoned", {}, forwarder.abandoned
        yield "exchanges_executed", {}, forwarder.executed
        for reason, count in forwarder.nacked.items():
            yield "exchanges_nacked", {"reason": reason}, count
        if self.member.incarnation:
            outbox, inbox = self.member.outbox.statistics(), self.member.inbox.statistics
            yield "frames_sent", {}, outbox.frames
            yield "frames_received", {}, inbox.frames
            yield "envelopes_repeated", {}, inbox.repeated
            yield "envelopes_refused", {}, inbox.refused
            for reason, count in outbox.refused.items():
                yield "pushes_refused", {"reason": reason}, count
        yield "sessions_opened", {}, pool.opened
        yield "sessions_adopted", {}, self.sessions.adopted
        yield "sessions_lost", {}, self.sessions.lost
        yield "sessions_refused", {}, pool.refused
        yield "lease_renewals", {}, self.member.renewals
        yield "lease_incarnations", {}, self.member.incarnations
        yield "sessions", {}, pool.sessions
        yield "sessions_in_flight", {}, pool.in_flight
        yield "calls_waiting", {}, self.gateway.waiting
        yield "redis_reachable", {}, float(self.member.reachable)

    # -- what the member tells (coordinator.Listener) --------------------------------------------------------------

    async def joined(self, incarnation: str, *, again: bool) -> None:
        if again:
            await self.sessions.reconcile()
        self._joined.set()
        self.gateway.ready = not self._draining
        self.on_joined(incarnation)
        self.gateway.health = self._health()
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
