"""The gateway: the ASGI application of a worker.

/servers/{name}/mcp   streamable HTTP, one upstream session per client session
/healthz              200 while the process lives
/readyz               200 once it may take requests, 503 while it starts or drains
/metrics              Prometheus, all workers of the process group
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import anyio
import orjson

from ..coordinator import session_key
from ..pool import HttpTarget, Message, SessionPool, Upstream
from ..pool.jsonrpc import INVALID_REQUEST
from ..pool.sse import event
from . import door
from .affinity import Affinity, Call, is_safe
from .answers import (
    HANDSHAKE_VERSIONS,
    JSON,
    STATELESS_VERSIONS,
    Refused,
    internal_error_body,
    outcome_body,
    session_not_found,
    too_large,
    unavailable,
    unsupported_version,
)
from .asgi import Receive, Scope, Send, header, read_body, respond
from .eras import Eras
from .errors import BodyTooLarge, BrokenOff, Disconnected, NotRun
from .guard import Guard
from .identity import Identity
from .keepalive import StreamKeeper
from .opening import Opening
from .reattach import Streams
from .relay import relay_get, relay_post
from .request import Request
from .sessions import Sessions
from .shared_edge import SharedEdge
from .telemetry import Telemetry
from .tool_hints import ToolHints

logger = logging.getLogger("leasehold.workers.gateway")

PREFIX: Final = "/servers/"
SUFFIX: Final = "/mcp"
METHODS: Final = b"POST, GET, DELETE"


class Gateway:
    """One worker's application."""

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        pool: SessionPool,
        sessions: Sessions,
        affinity: Affinity,
        identity: Identity,
        entry: door.Door,
        keeper: StreamKeeper,
        telemetry: Telemetry,
        *,
        max_body_bytes: int,
        max_waiting: int,
        lease_ttl_s: float,
    ) -> None:
        self._upstreams = upstreams
        self._pool = pool
        self._sessions = sessions
        self._streams = Streams(affinity, telemetry.reattached, lease_ttl_s=lease_ttl_s)
        self._identity = identity
        self._door = entry
        self._keeper = keeper
        self._telemetry = telemetry
        self._opening = Opening(sessions, identity, max_body_bytes=max_body_bytes)
        self._eras = Eras()
        self._hints = ToolHints()
        self._shared = SharedEdge(pool, identity, self._streams, self._hints)
        self._max_body_bytes = max_body_bytes
        self._max_waiting = max_waiting
        self._listening: set[anyio.CancelScope] = set()
        self._ending = False
        self.waiting = 0
        self.ready = False
        self.health: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"].removesuffix("/")
        if path.startswith(PREFIX) and path.endswith(SUFFIX):
            await self._serve_edge(path[len(PREFIX) : -len(SUFFIX)], scope, receive, send)
        else:
            await self._serve_operations(path, scope, send)

    # -- operations ------------------------------------------------------------------------------------------------

    async def _serve_operations(self, path: str, scope: Scope, send: Send) -> None:
        if path not in ("/healthz", "/readyz", "/metrics"):
            await Refused(404, "Not found: expected /servers/{name}/mcp, /healthz, /readyz or /metrics").send(send)
        elif scope["method"] not in ("GET", "HEAD"):
            await door.method_not_allowed(b"GET, HEAD").send(send)
        else:
            head_only = scope["method"] == "HEAD"
            if path == "/metrics":
                body, content_type = self._telemetry.exposition()
                await respond(send, 200, body, [(b"content-type", content_type)], head_only=head_only)
                return
            status = 200 if path == "/healthz" or self.ready else 503
            # Redis loss shows here, and does not make every worker unready at once.
            body = orjson.dumps({"status": "ok" if status == 200 else "unready", **self.health})
            await respond(send, status, body, JSON, head_only=head_only)

    # -- requests of clients ---------------------------------------------------------------------------------------

    async def _serve_edge(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        kept = self._keeper.wrap(send)
        guard = Guard(kept.send, None)
        if self.waiting >= self._max_waiting:
            await unavailable("Too many calls are waiting on this worker").send(send)
            return
        self.waiting += 1
        request_id = None
        try:
            self._door.check(scope["headers"])
            caller = await self._identity.caller(scope)
            upstream = self._upstreams.get(name)
            if upstream is None:
                raise Refused(404, f"Unknown server: {name[:64]!r}")
            version = door.named_version(scope["headers"])
            body, message = await self._read(scope, receive)
            if message is not None and message.kind == "request":
                request_id = message.id
                guard.request = message
            request = Request(upstream, caller, version, message, body, scope, receive)
            if scope["method"] == "GET":
                await self._listen(request, guard)
            else:
                await self._route(request, guard)
            if message is not None and message.method == "tools/list":
                self._hints.learn(upstream, caller.principal, message.params, guard.result)
        except Refused as refusal:
            refusal.id = refusal.id if refusal.id is not None else request_id
            await refusal.send(guard.send)
        except NotRun:
            await unavailable("This worker is stopping", request_id).send(guard.send)
        except BodyTooLarge as error:
            await too_large(error.limit).send(guard.send)
        except Disconnected:
            pass
        except BrokenOff as error:
            await self._break_off(guard, message=f"The answer broke off: {error}")
        except Exception:
            logger.exception("request_failed server=%s", name[:64])
            if not guard.started:
                await respond(guard.send, 500, internal_error_body(request_id), JSON)
            else:
                await self._break_off(guard, message="Internal error")
        finally:
            self.waiting -= 1
            kept.close()
            self._telemetry.answered(name if name in self._upstreams else "", scope["method"], guard)

    def end_streams(self) -> None:
        """End every GET stream that clients hold here: they open them again, at another worker, after the last event
        that they got."""
        self._ending = True
        for scope in list(self._listening):
            scope.cancel()

    async def _listen(self, request: Request, guard: Guard) -> None:
        if self._ending:
            raise unavailable("This worker is stopping")
        with anyio.CancelScope() as listening:
            self._listening.add(listening)
            try:
                await self._route(request, guard)
            finally:
                self._listening.discard(listening)
        if listening.cancelled_caught:
            if not guard.started:
                raise unavailable("This worker is stopping")
            await guard.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _read(self, scope: Scope, receive: Receive) -> tuple[bytes, Message | None]:
        method: str = scope["method"]
        if method == "POST":
            door.check_post(scope["headers"])
            body = await read_body(scope["headers"], receive, self._max_body_bytes)
            return body, door.read_message(body)
        if method not in ("GET", "DELETE"):
            raise door.method_not_allowed(METHODS)
        if method == "GET":
            door.check_get(scope["headers"])
        await read_body(scope["headers"], receive, self._max_body_bytes)
        return b"", None

    async def _route(self, request: Request, guard: Guard) -> None:
        upstream, version, message = request.upstream, request.version, request.message
        session_id = header(request.headers, b"mcp-session-id")
        is_unknown = version is not None and version not in HANDSHAKE_VERSIONS + STATELESS_VERSIONS
        if version is not None and is_unknown and (session_id is not None or message is None or request.initializes):
            raise unsupported_version(version, HANDSHAKE_VERSIONS)
        if upstream.affinity != "session":
            if request.initializes and not (self.ready or self._sessions.draining):
                raise unavailable("This worker takes no new sessions")
            await self._shared.route(request, guard)
        elif message is not None and request.initializes and session_id is None:
            # Whatever version its header names: an upstream that takes it opens a session.
            if not self._opens(upstream):
                raise unavailable("This worker takes no new sessions")
            await self._opening.open(request, message, guard.send)
        elif version is not None and version not in HANDSHAKE_VERSIONS:
            await self._serve_stateless_era(request, version, guard)
        elif session_id is not None:
            if not self._identity.issued(session_id, upstream.name, request.caller.bound):
                raise session_not_found()
            safe = is_safe(message, self._hints.safe(upstream, request.caller.principal))
            call = Call(session_key(session_id.decode()), request.scope, message, request.body, safe)
            await self._streams.dispatch(call, request.receive, guard, call_timeout_s=upstream.call_timeout_s)
        else:
            await self._serve_sessionless(request, guard.send)

    def _opens(self, upstream: Upstream) -> bool:
        """Whether a session may begin here: also while this worker drains, if another one can go on with it."""
        return self.ready or (self._sessions.draining and isinstance(upstream.target, HttpTarget))

    async def _break_off(self, guard: Guard, message: str) -> None:
        """An answer cannot be completed. A stream can still say so; anything else is left unfinished, so that the
        client sees it."""
        if not guard.is_stream:
            raise ConnectionAbortedError(message)
        last = b""
        if guard.request is not None:
            last = b"\n\n" + event(outcome_body(message, "unknown", guard.request.id))
        await guard.send({"type": "http.response.body", "body": last, "more_body": False})

    # -- requests without a session --------------------------------------------------------------------------------

    async def _serve_stateless_era(self, request: Request, version: str, guard: Guard) -> None:
        """Protocol 2026-07-28 has no sessions: any worker passes its requests on, if the upstream is of that era.

        A version that does not exist is the upstream's to refuse, for it knows which ones it speaks.
        """
        upstream, message = request.upstream, request.message
        if message is None:
            raise door.method_not_allowed(b"POST")
        link = self._pool.stateless(upstream)
        if link is None or self._eras.is_handshake_only(upstream.name):
            raise unsupported_version(version, HANDSHAKE_VERSIONS)
        send = self._eras.watch(upstream.name, version, message, guard.send)
        await relay_post(link, message, request.body, request.headers, request.receive, send)

    async def _serve_sessionless(self, request: Request, send: Send) -> None:
        """A handshake-era request that names no session: right for upstreams that hand out no session id."""
        link = self._pool.stateless(request.upstream)
        if link is None or request.method == "DELETE":
            raise Refused(400, "Bad request: Mcp-Session-Id header required", code=INVALID_REQUEST)
        if request.message is None:
            await relay_get(link, request.headers, request.receive, send, adopted=False)
        else:
            await relay_post(link, request.message, request.body, request.headers, request.receive, send)
