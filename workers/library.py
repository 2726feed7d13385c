"""The library face of a fleet: `Fleet`, whose sessions are ordinary `mcp.ClientSession`s wherever their owner runs.

A process with a `Fleet` is a worker of the fleet like any other: it has a lease, owns the sessions that it opened, and
serves the calls that others forward to them. Needs `mcp` 2.3 or newer.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import orjson
from mcp import ClientSession

from ..coordinator import Keyring, RedisClients
from ..pool import BorrowedLink, Config, ConfigError, SessionPool, Upstream, load_config, parse_config
from ..pool.link import Headers, OwnHeaders, own_headers
from ..pool.typed import Callbacks
from .core import WorkerCore, WorkerStatistics
from .fleet_wire import FleetLink, FleetSession, FleetWire
from .identity import Identity

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger("leasehold.workers.library")

MIN_SECRET: Final = 16
MAX_BODY_BYTES: Final = 64 * 1024 * 1024


class Fleet:
    """The sessions of a fleet: `async with Fleet("redis://...", config="mcp.json", secret="...") as fleet`.

    Raises `ConfigError` for a configuration that is wrong. Without Redis it starts all the same, and calls raise until
    it answers.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        config: Config | Mapping[str, Any] | str | os.PathLike[str],
        secret: str | Sequence[str] | None = None,
        namespace: str = "leasehold",
        lease_ttl_ms: int = 3000,
        shutdown_grace_s: float = 10.0,
        max_sessions: int = 10_000,
        max_waiting: int = 1_000,
        acquire_timeout_s: float = 30.0,
    ) -> None:
        """`config`: a file, or what is in it (`{"mcpServers": ...}`). `redis_url` and `secret` (the newest first,
        where there are several) come from LEASEHOLD_REDIS_URL or REDIS_URL, and LEASEHOLD_SECRET, where they are not
        given. All members of a fleet have the same namespace, secrets and servers. The limits are those of this
        process's `SessionPool`; a session has to be had within `acquire_timeout_s`, unless its caller says so."""
        environ = os.environ
        url = redis_url or environ.get("LEASEHOLD_REDIS_URL") or environ.get("REDIS_URL")
        secrets = (
            [secret] if isinstance(secret, str) else list(secret or environ.get("LEASEHOLD_SECRET", "").split(","))
        )
        secrets = [each.strip() for each in secrets if each.strip()]
        if not url:
            raise ConfigError("Fleet: expected a Redis URL, as argument or as LEASEHOLD_REDIS_URL")
        if not secrets or min(map(len, secrets)) < MIN_SECRET:
            raise ConfigError(
                f"Fleet: expected a secret of at least {MIN_SECRET} characters, as argument or as LEASEHOLD_SECRET"
            )
        self.config = _read(config)
        self._url = url
        self._keyring = Keyring([each.encode() for each in secrets])
        self._identity = Identity(self._keyring)
        self._options: dict[str, Any] = {
            "namespace": namespace,
            "lease_ttl_ms": lease_ttl_ms,
            "grace_s": shutdown_grace_s,
            "max_body_bytes": MAX_BODY_BYTES,
            "role": "library",
        }
        self._acquire_timeout_s = acquire_timeout_s
        self._limits: dict[str, Any] = {
            "max_sessions": max_sessions,
            "max_waiting": max_waiting,
            "acquire_timeout_s": acquire_timeout_s,
        }
        self._core: WorkerCore | None = None
        self._hosted: _Hosted | None = None

    def __repr__(self) -> str:
        return f"<Fleet {self.config.source} {self._core.pool if self._core else 'not entered'!r}>"

    async def __aenter__(self) -> Self:
        # Not before: what makes a worker is made in the process and the loop it lives in, after any fork.
        pool = SessionPool(**self._limits)
        redis = RedisClients(self._url)
        core = WorkerCore(self.config.servers, redis=redis, keyring=self._keyring, pool=pool, **self._options)
        self._hosted = _Hosted(core)
        await self._hosted.start()
        self._core = core
        return self

    async def __aexit__(self, *_exc: object) -> None:
        hosted, self._core, self._hosted = self._hosted, None, None
        if hosted is not None:
            await hosted.stop()

    @property
    def core(self) -> WorkerCore:
        """The worker that this process is; raises RuntimeError outside `async with`."""
        if self._core is None:
            raise RuntimeError("expected to be used inside `async with`")
        if self._hosted is not None and self._hosted.failure is not None:
            raise RuntimeError("this member of the fleet has stopped") from self._hosted.failure
        return self._core

    def drain(self) -> None:
        """Open no more sessions, and hand those that can move to whoever asks for them next. Calls that run go on."""
        self.core.drain()

    def statistics(self) -> WorkerStatistics:
        """What this process owns and has done."""
        return self.core.statistics()

    def session(
        self,
        server: str,
        *,
        affinity: str | None = None,
        principal: str | None = None,
        headers: OwnHeaders = None,
        auth: httpx2.Auth | None = None,
        callbacks: Callbacks | None = None,
        timeout_s: float | None = None,
    ) -> AbstractAsyncContextManager[ClientSession]:
        """A session with a server of the configuration, as an `mcp.ClientSession`.

        All who name the same server, `principal` and `affinity`, in any process of the fleet, share one upstream
        session; it lives until it is idle for the server's `idle_ttl`. Without `affinity`, one of this process's own
        pool is borrowed, as with `SessionPool.session`. Without `principal`, the `headers` (credentials) are who
        calls; with an `affinity` each of them has to be in the server's `forward_headers`, for it crosses to the owner.

        A server whose affinity in the configuration is `principal` has one session per principal, without an `affinity`
        here. `headers` may be a function, which is asked for them with each call: then there has to be a `principal`.

        Calls raise `MCPError` with what the server answered, `CallFailed` with an `outcome` where there was no answer.
        Raises `PoolTimeout` when there is no session within `timeout_s` (default: the fleet's), and `ConfigError` for a
        server, or a header that is to cross, that the configuration does not have.
        """
        upstream, shared = self._upstream(server, affinity)
        if shared is None:
            return self.core.pool.session(
                upstream, principal=principal, headers=headers, auth=auth, callbacks=callbacks, timeout_s=timeout_s
            )
        if auth is not None:
            raise ConfigError(f"{server}: expected no auth with an affinity: the session may be another process's")
        wire = self._wire(upstream, shared, principal, headers)
        return FleetSession(wire, callbacks or Callbacks(), self._timeout(timeout_s))

    def link(
        self,
        server: str,
        *,
        affinity: str | None = None,
        principal: str | None = None,
        headers: OwnHeaders = None,
        timeout_s: float | None = None,
    ) -> AbstractAsyncContextManager[FleetWire | BorrowedLink]:
        """The raw face of such a session: bytes of JSON-RPC in, bytes out; see `session`."""
        upstream, shared = self._upstream(server, affinity)
        if shared is None:
            return self.core.pool.link(upstream, principal=principal, headers=headers, timeout_s=timeout_s)
        return FleetLink(self._wire(upstream, shared, principal, headers), self._timeout(timeout_s))

    def _upstream(self, server: str, affinity: str | None) -> tuple[Upstream, str | None]:
        """A server, and the name of the session that is shared; None for one that is not."""
        upstream = self.config.servers.get(server)
        if upstream is None:
            known = ", ".join(self.config.servers)
            raise ConfigError(f"{self.config.source}: expected one of {known}, got {server!r}")
        return upstream, "" if affinity is None and upstream.affinity == "principal" else affinity

    def _wire(self, upstream: Upstream, affinity: str, principal: str | None, headers: OwnHeaders) -> FleetWire:
        if principal == "" or (callable(headers) and principal is None):
            raise ValueError("expected the name of a principal: without one, the headers are who calls")
        allowed = upstream.forward_headers

        def own() -> Headers:
            given = (headers() if callable(headers) else headers) or {}
            unknown = [name for name in given if name.lower() not in allowed]
            if unknown:
                raise ConfigError(
                    f"{self.config.source}: {upstream.name}: expected {unknown[0]!r} in forward_headers: "
                    "it would not be sent"
                )
            return own_headers(given)

        now = own()
        bound = b"named:" + principal.encode() if principal is not None else _digest(now) if now else b""
        key = self._identity.shared_key(upstream.name, bound, b"affinity:" + affinity.encode())
        return FleetWire(self.core.affinity, upstream, key, self._identity.principal(bound), own)

    def _timeout(self, timeout_s: float | None) -> float:
        return self._acquire_timeout_s if timeout_s is None else timeout_s


class _Hosted:
    """A worker's life in a task of its own: it is entered and left by whichever task."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core
        self._stop = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="leasehold-fleet")

    @property
    def failure(self) -> BaseException | None:
        """Why it has ended, if it has."""
        return self._task.exception() if self._task.done() and not self._task.cancelled() else None

    async def start(self) -> None:
        """Return when it has joined the fleet, or goes on trying to. Cancelled, it leaves nothing behind."""
        try:
            await asyncio.wait({self._task, self._started}, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            self._stop.set()
            await asyncio.wait({self._task})
            raise
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """Drain and leave. The caller may be cancelled: it goes on all the same."""
        self._stop.set()
        try:
            await asyncio.shield(self._task)
        except ExceptionGroup:
            logger.error("fleet_member_failed", exc_info=self._task.exception())  # noqa: TRY400

    async def _run(self) -> None:
        async with self._core.running():
            if not self._started.done():
                self._started.set_result(None)
            await self._stop.wait()


def _read(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return parse_config(orjson.dumps(dict(config)).decode(), "config", os.environ)
    return load_config(Path(config), os.environ)


def _digest(headers: Headers) -> bytes:
    return b"headers:" + sha256(repr(sorted(headers)).encode()).digest()
