"""A worker that serves HTTP: the gateway over the parts that make it one of the fleet."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from ..coordinator import Keyring, RedisClients
from ..pool import Config, Want
from ..pool.borrowing import ANONYMOUS
from .affinity import OWNER
from .asgi import Message, Receive, Scope, Send
from .core import WorkerCore
from .door import LOOPBACK, Door
from .gateway import Gateway
from .keepalive import StreamKeeper
from .observed import observed
from .principals import make_identity
from .settings import Settings
from .telemetry import Telemetry


class Worker(WorkerCore):
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
        """`clients` makes the connections to Redis; `ephemeral`, see `WorkerCore`."""
        keyring = Keyring(secrets)
        super().__init__(
            config.servers,
            redis=clients(redis_url),
            keyring=keyring,
            namespace=settings.namespace,
            lease_ttl_ms=settings.lease_ttl_ms,
            grace_s=settings.shutdown_grace_s,
            max_body_bytes=settings.max_body_bytes,
            ephemeral=ephemeral,
            index=index,
        )
        self.settings = settings
        self.telemetry = Telemetry()
        self.telemetry.observe = lambda: observed(self, self.gateway.waiting)
        self.keeper = StreamKeeper()
        self.identity = make_identity(settings, keyring)
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
            self.affinity,
            self.identity,
            entry,
            self.keeper,
            self.telemetry,
            max_body_bytes=settings.max_body_bytes,
            max_waiting=settings.max_waiting,
            lease_ttl_s=self.member.lease_ttl_s,
        )

    def __repr__(self) -> str:
        return f"<Worker {self.member.incarnation[:8] or '-'} ready={self.gateway.ready} {self.pool!r}>"

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

    def in_flight(self) -> int:
        return super().in_flight() + self.gateway.waiting

    def background(self) -> list[Coroutine[Any, Any, None]]:
        work: list[Coroutine[Any, Any, None]] = [self.keeper.run(), self.identity.run()]
        if self.settings.rebalance:
            work.append(self.placement.rebalance(self.settings.rebalance))
        return work

    def tick(self) -> None:
        self.telemetry.collect()
        self.gateway.health = self._health()

    def drain(self) -> None:
        """Also: say so to who asks (`/readyz`), and end the streams that never end by themselves."""
        if not self.is_draining:
            self.gateway.ready = False
            self.gateway.end_streams()
        super().drain()

    async def joined(self, incarnation: str, *, again: bool) -> None:
        await super().joined(incarnation, again=again)
        self._prewarm()
        self.gateway.ready = not self.is_draining
        self.gateway.health = self._health()

    def _prewarm(self) -> None:
        """Sessions that any call may take are ready before the first one."""
        for upstream in self.upstreams.values():
            if upstream.affinity == "none" and upstream.min_sessions:
                self.pool.prewarm(Want(upstream, principal=ANONYMOUS))

    def _health(self) -> dict[str, Any]:
        return {
            "incarnation": self.member.incarnation[:8],
            "redis": "ok" if self.member.reachable else "unreachable",
            "sessions": len(self.pool),
        }
