"""The library face of a fleet: `Fleet`, whose sessions are ordinary `mcp.ClientSession`s wherever their owner runs.

A process with a `Fleet` is a worker of the fleet like any other: it has a lease, owns the sessions that it opened, and
serves the calls that others forward to them. Needs `mcp` 2.3 or newer.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Self

import orjson
from mcp import ClientSession

from ..coordinator import Keyring, RedisClients
from ..pool import (
    Config,
    ConfigError,
    Message,
    SessionClosed,
    SessionReleased,
    Upstream,
    UpstreamLost,
    load_config,
    parse_config,
)
from ..pool.dispatcher import LinkDispatcher
from ..pool.link import Headers, Reply, own_headers
from ..pool.typed import Callbacks, HostedClient
from .affinity import Affinity, Call, is_safe
from .answers import Refused
from .asgi import Message as AsgiMessage
from .core import WorkerCore, WorkerStatistics
from .errors import BrokenOff, Disconnected
from .guard import Guard
from .identity import Identity
from .sessions import Opens

MIN_SECRET: Final = 16
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
MAX_BEHIND: Final = 16
"""Pieces of an answer that may wait for their reader."""


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
    ) -> None:
        """`config`: a file, or what is in it (`{"mcpServers": ...}`). `redis_url` and `secret` (the newest first,
        where there are several) come from LEASEHOLD_REDIS_URL or REDIS_URL, and LEASEHOLD_SECRET, where they are not
        given. All members of a fleet have the same namespace, secrets and servers."""
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
        }
        self._core: WorkerCore | None = None
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Fleet {self.config.source} {self._core.pool if self._core else 'not entered'!r}>"

    async def __aenter__(self) -> Self:
        # Not before: what makes a worker is made in the process and the loop it lives in, after any fork.
        core = WorkerCore(self.config.servers, redis=RedisClients(self._url), keyring=self._keyring, **self._options)
        await self._stack.enter_async_context(_Hosted(core))
        self._core = core
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._core = None
        await self._stack.aclose()

    @property
    def core(self) -> WorkerCore:
        """The worker that this process is; raises RuntimeError outside `async with`."""
        if self._core is None:
            raise RuntimeError("expected to be used inside `async with`")
        return self._core

    def statistics(self) -> WorkerStatistics:
        """What this process owns and has done."""
        return self.core.statistics()

    def session(
        self,
        server: str,
        *,
        affinity: str | None = None,
        principal: str | None = None,
        headers: Mapping[str, str] | None = None,
        callbacks: Callbacks | None = None,
        timeout_s: float | None = None,
    ) -> AbstractAsyncContextManager[ClientSession]:
        """A session with a server of the configuration, as an `mcp.ClientSession`.

        All who name the same server, `principal` and `affinity`, in any process of the fleet, share one upstream
        session; it lives until it is idle for the server's `idle_ttl`. Without `affinity`, one of this process's own
        pool is borrowed, as with `SessionPool.session`. Without `principal`, the `headers` (credentials) are who
        calls; with an `affinity` each of them has to be in the server's `forward_headers`, for it crosses to the owner.

        Calls raise `MCPError` with what the server answered, `CallFailed` with an `outcome` where there was no answer.
        Raises `ConfigError` for a server or header that the configuration does not have.
        """
        upstream = self.config.servers.get(server)
        if upstream is None:
            known = ", ".join(self.config.servers)
            raise ConfigError(f"{self.config.source}: expected one of {known}, got {server!r}")
        if affinity is None:
            return self.core.pool.session(
                upstream, principal=principal, headers=headers, callbacks=callbacks, timeout_s=timeout_s
            )
        unknown = [name for name in headers or {} if name.lower() not in upstream.forward_headers]
        if unknown:
            raise ConfigError(
                f"{self.config.source}: {server}: expected {unknown[0]!r} in forward_headers: it would not be sent"
            )
        own = own_headers(headers or {})
        bound = b"named:" + principal.encode() if principal is not None else _digest(own) if own else b""
        wire = FleetWire(
            self.core.affinity,
            upstream,
            self._identity.shared_key(server, bound, b"affinity:" + affinity.encode()),
            self._identity.principal(bound),
            own,
        )
        return _FleetSession(wire, callbacks or Callbacks(), timeout_s)


class FleetWire:
    """One holder's way to a shared session, wherever its owner runs: each call is an exchange of its own."""

    def __init__(self, affinity: Affinity, upstream: Upstream, key: str, principal: str, headers: Headers) -> None:
        self._affinity = affinity
        self._upstream = upstream
        self._key = key
        self._principal = principal
        self._headers = headers
        self._ids = itertools.count(1)
        self._params: dict[str, Any] = {}
        # Names this holder to the owner, who keeps the ids of all holders apart.
        self._client = (b"mcp-session-id", os.urandom(12).hex().encode())
        self._calls: set[asyncio.Task[None]] = set()
        self.is_closed = False

    def __repr__(self) -> str:
        return f"<FleetWire {self._upstream.name} session={self._key[:8]} calls={len(self._calls)}>"

    def next_id(self) -> int:
        """Of requests of this holder."""
        return next(self._ids)

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """See `Link.post`. A session that has ended is told of once; the call after that opens another."""
        if message.method == "initialize":
            self._params = message.params
        reply = await self._send("POST", message, body, headers)
        if reply.status == 404:
            await reply.chunks.aclose()
            raise SessionClosed("the upstream has ended the session; the next call begins another")
        return reply

    async def get(self, headers: Headers) -> Reply:
        """See `Link.get`."""
        return await self._send("GET", None, b"", headers)

    async def aclose(self) -> None:
        """End the calls that are under way."""
        self.is_closed = True
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)

    async def _send(self, method: str, message: Message | None, body: bytes, headers: Headers) -> Reply:
        if self.is_closed:
            raise SessionReleased("this session was given back")
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": f"/servers/{self._upstream.name}/mcp",
            "query_string": b"",
            "headers": [*headers, *self._headers, self._client],
            "client": None,
        }
        opens = Opens(self._upstream, self._principal, self._params, self._headers)
        safe = is_safe(message, self._upstream.idempotent_tools) or (
            message is not None and message.method == "initialize"
        )
        call = Call(self._key, scope, message, body, safe, opens)
        answer = _Answer()
        task = asyncio.get_running_loop().create_task(self._dispatch(call, answer), name="leasehold-fleet-call")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(answer.done)
        try:
            status, received = await answer.begun
        except BaseException:
            answer.leave()
            raise
        chunks = answer.chunks()
        await anext(chunks)
        return Reply(status, received, chunks)

    async def _dispatch(self, call: Call, answer: _Answer) -> None:
        guard = Guard(answer.send, call.message if call.id is not None else None)
        try:
            await self._affinity.dispatch(call, answer.receive, guard)
        except Refused as refusal:
            refusal.id = refusal.id if refusal.id is not None else call.id
            await refusal.send(guard.send)


class _Answer:
    """The other end of one ASGI call: what it sends is read as a `Reply`."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[tuple[int, Headers]] = asyncio.get_running_loop().create_future()
        self._pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(MAX_BEHIND)
        self._left = asyncio.Event()

    async def receive(self) -> AsgiMessage:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: AsgiMessage) -> None:
        if self._left.is_set():
            raise Disconnected
        if message["type"] == "http.response.start":
            if not self.begun.done():
                self.begun.set_result((message["status"], list(message.get("headers", ()))))
            return
        if message.get("body"):
            await self._pieces.put(message["body"])
        if not message.get("more_body", False):
            await self._pieces.put(None)

    def leave(self) -> None:
        """Nobody reads any more: what still comes is not waited for."""
        self._left.set()
        while not self._pieces.empty():
            self._pieces.get_nowait()

    def done(self, task: asyncio.Task[None]) -> None:
        """The call has ended; without an answer, or in the middle of one, that is an error."""
        error = None if task.cancelled() else task.exception()
        lost: Exception = UpstreamLost(
            f"the call broke off: {error}" if isinstance(error, BrokenOff) else "the call broke off"
        )
        if isinstance(error, Exception) and not isinstance(error, BrokenOff | Disconnected):
            lost = error
        if not self.begun.done():
            self.begun.set_exception(lost)
            self.begun.exception()  # retrieved: who asked may have left
        elif not self._left.is_set() and (error is not None or task.cancelled()):
            if self._pieces.full():
                self._pieces.get_nowait()  # what is lost with it is told by the error
            self._pieces.put_nowait(lost)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, after one empty piece."""
        try:
            yield b""
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.leave()


class _FleetSession:
    """`async with`: one holder's `ClientSession` of a shared session."""

    def __init__(self, wire: FleetWire, callbacks: Callbacks, timeout_s: float | None) -> None:
        self._wire = wire
        self._callbacks = callbacks
        self._timeout_s = timeout_s
        self._dispatcher = LinkDispatcher(wire)
        self._hosted: HostedClient | None = None

    async def __aenter__(self) -> ClientSession:
        callbacks = self._callbacks
        client = ClientSession(
            dispatcher=self._dispatcher,
            sampling_callback=callbacks.sampling,
            elicitation_callback=callbacks.elicitation,
            list_roots_callback=callbacks.list_roots,
            logging_callback=callbacks.logging,
            message_handler=callbacks.message_handler,
        )
        self._hosted = HostedClient(client)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._hosted.wait_ready()
                await client.initialize()
        except BaseException:
            await self._aclose()
            raise
        if callbacks.listens:
            self._dispatcher.listen()
        return client

    async def __aexit__(self, *_exc: object) -> None:
        await self._aclose()

    async def _aclose(self) -> None:
        assert self._hosted is not None
        await self._hosted.aclose()
        await self._wire.aclose()


class _Hosted:
    """A worker's life in a task of its own: it is entered and left by whichever task."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core
        self._stop = asyncio.Event()

    async def __aenter__(self) -> None:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._run(started), name="leasehold-fleet")
        await asyncio.wait({self._task, started}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            await self._task

    async def __aexit__(self, *_exc: object) -> None:
        self._stop.set()
        await asyncio.shield(self._task)

    async def _run(self, started: asyncio.Future[None]) -> None:
        async with self._core.running():
            started.set_result(None)
            await self._stop.wait()


def _read(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return parse_config(orjson.dumps(dict(config)).decode(), "config", os.environ)
    return load_config(Path(config), os.environ)


def _digest(headers: Headers) -> bytes:
    return b"headers:" + sha256(repr(sorted(headers)).encode()).digest()
