"""The gateway: the ASGI application of a worker.

    /servers/{name}/mcp   streamable HTTP, one upstream session per client session
    /healthz              200 while the process lives
    /readyz               200 once it may take requests, 503 while it starts or drains
    /metrics              Prometheus, all workers of the process group

The same application runs what arrives by a hop: `leasehold.hop` in the scope says so, and the door was passed at the other end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

import anyio
import orjson

from ..coordinator import Unavailable, session_key
from ..coordinator.frames import RequestHead
from ..pool import (
    HttpLink,
    HttpTarget,
    Message,
    OpenFailed,
    PoolError,
    PoolFull,
    SessionPool,
    Upstream,
    parse,
)
from ..pool.jsonrpc import INVALID_REQUEST, InvalidMessage
from ..pool.link import Reply
from ..pool.sse import event, events
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
    unavailable,
    unsupported_version,
)
from .asgi import Headers, Receive, Scope, Send, header, read_body, respond
from .eras import Eras
from .errors import BodyTooLarge, BrokenOff, Disconnected
from .exchange import HOP
from .guard import Guard
from .identity import Identity
from .keepalive import StreamKeeper
from .relay import relay_delete, relay_get, relay_post
from .sessions import Owned, Sessions
from .telemetry import Telemetry

logger = logging.getLogger("leasehold.workers.gateway")

PREFIX: Final = "/servers/"
SUFFIX: Final = "/mcp"
METHODS: Final = b"POST, GET, DELETE"


class Gateway:
    """One worker's application. `affinity` is set once the forwarder exists: they know each other."""

    affinity: Affinity

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        pool: SessionPool,
        sessions: Sessions,
        identity: Identity,
        entry: door.Door,
        keeper: StreamKeeper,
        telemetry: Telemetry,
        *,
        max_body_bytes: int,
        max_waiting: int,
    ) -> None:
        self._upstreams = upstreams
        self._pool = pool
        self._sessions = sessions
        self._identity = identity
        self._door = entry
        self._keeper = keeper
        self._telemetry = telemetry
        self._eras = Eras()
        self._max_body_bytes = max_body_bytes
        self._max_waiting = max_waiting
        self._listening: set[anyio.CancelScope] = set()
        self.waiting = 0
        self.ready = False
        self.health: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        head: RequestHead | None = scope.get(HOP)
        if head is not None:
            await self._serve_hop(head, scope, receive, send)
            return
        path: str = scope["path"]
        if path.startswith(PREFIX) and path.endswith(SUFFIX):
            await self._serve_edge(unquote(path[len(PREFIX) : -len(SUFFIX)]), scope, receive, send)
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
            upstream = self._upstreams.get(name)
            if upstream is None:
                raise Refused(404, f"Unknown server: {name[:64]!r}")
            version = door.named_version(scope["headers"])
            body, message = await self._read(scope, receive)
            if message is not None:
                request_id = message.id
                guard.request = message if message.kind == "request" else None
            if message is None and scope["method"] == "GET":
                await self._listen(upstream, version, scope, receive, guard)
            else:
                await self._route(upstream, version, message, body, scope, receive, guard)
        except Refused as refusal:
            if not guard.started:
                refusal.id = refusal.id if refusal.id is not None else request_id
                await refusal.send(guard.send)
        except BodyTooLarge as error:
            await Refused(413, f"Payload too large: at most {error.limit} bytes").send(guard.send)
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
        """End every GET stream that clients hold here: they open them again, at another worker."""
        for scope in list(self._listening):
            scope.cancel()

    async def _listen(self, upstream: Upstream, version: str | None, scope: Scope, receive: Receive, guard: Guard) -> None:
        with anyio.CancelScope() as listening:
            self._listening.add(listening)
            try:
                await self._route(upstream, version, None, b"", scope, receive, guard)
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

    async def _route(
        self,
        upstream: Upstream,
        version: str | None,
        message: Message | None,
        body: bytes,
        scope: Scope,
        receive: Receive,
        guard: Guard,
    ) -> None:
        session_id = header(scope["headers"], b"mcp-session-id")
        if version is not None and version not in HANDSHAKE_VERSIONS:
            await self._serve_stateless_era(upstream, version, message, body, scope, receive, guard)
        elif session_id is not None:
            credential = header(scope["headers"], b"authorization") or b""
            if not self._identity.issued(session_id, upstream.name, credential):
                raise session_not_found()
            safe = is_safe(message, upstream.idempotent_tools)
            call = Call(session_key(session_id.decode()), scope, message, body, safe)
            await self.affinity.dispatch(call, receive, guard)
        elif message is not None and message.method == "initialize" and message.kind == "request":
            await self._initialize(upstream, message, body, scope, guard.send)
        else:
            await self._serve_sessionless(upstream, message, body, scope, receive, guard.send)

    async def _break_off(self, guard: Guard, message: str) -> None:
        """An answer cannot be completed. A stream can still say so; anything else is left unfinished, so that the client sees it."""
        if not guard.is_stream:
            raise ConnectionAbortedError(message)
        last = b""
        if guard.request is not None:
            last = b"\n\n" + event(outcome_body(message, "unknown", guard.request.id))
        await guard.send({"type": "http.response.body", "body": last, "more_body": False})

    # -- sessions --------------------------------------------------------------------------------------------------

    async def _initialize(self, upstream: Upstream, message: Message, body: bytes, scope: Scope, send: Send) -> None:
        """Open a session, and let its id leave only when its record is written."""
        credential = header(scope["headers"], b"authorization") or b""
        session_id = self._identity.mint(upstream.name, credential)
        key = session_key(session_id)
        if not self.ready:
            raise unavailable("This worker takes no new sessions", message.id)
        try:
            owned = await self._sessions.open(key, upstream, self._identity.principal(credential))
        except PoolFull as error:
            raise unavailable(str(error), message.id) from error
        except OpenFailed as error:
            await respond(send, 502, outcome_body(str(error), "not_run", message.id), JSON)
            return
        reason = "unregistered"
        try:
            with owned.session:
                reply, answer = await self._ask(owned, message, body, scope["headers"])
                established = _initialize_result(reply, answer)
                link = owned.session.link
                if established is None:
                    reason = "not_initialized"
                elif link.resume is None and isinstance(upstream.target, HttpTarget):
                    reason = "stateless"  # the upstream hands out no session id: any worker can serve its client
                else:
                    if isinstance(link, HttpLink):
                        link.negotiated(established)
                    await self._sessions.register(owned)
                    reason = ""
                    reply.headers.append((b"mcp-session-id", session_id.encode()))
            await respond(send, reply.status, answer, reply.headers)
        except Unavailable as error:
            raise unavailable("Redis does not answer: the session cannot be registered", message.id) from error
        except PoolError as error:
            await respond(send, 502, outcome_body(str(error), error.outcome, message.id), JSON)
        finally:
            if reason:
                owned.session.close(reason)

    async def _ask(self, owned: Owned, message: Message, body: bytes, headers: Headers) -> tuple[Reply, bytes]:
        reply = await owned.session.link.post(message, body, headers)
        pieces: list[bytes] = []
        size = 0
        async for chunk in reply.chunks:
            pieces.append(chunk)
            size += len(chunk)
            if size > self._max_body_bytes:
                raise OpenFailed(f"the answer to initialize is larger than {self._max_body_bytes} bytes")
        return reply, b"".join(pieces)

    async def serve_owned(self, owned: Owned, call: Call, receive: Receive, send: Send) -> None:
        """Run a call on a session owned here."""
        headers: Headers = call.scope["headers"]
        with owned.session as session:
            if call.message is not None:
                await relay_post(session.link, call.message, call.body, headers, receive, send)
            elif call.scope["method"] == "GET":
                await relay_get(session.link, headers, receive, send, adopted=owned.adopted)
            else:
                status = await relay_delete(session.link, headers, receive, send)
                if 200 <= status < 300 or status == 404:
                    session.close("client")

    async def _serve_hop(self, head: RequestHead, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that another worker forwarded; admission was checked in the turn it was read in."""
        owned = self._sessions.get(head.session)
        body = await read_body(scope["headers"], receive, self._max_body_bytes)
        try:
            if owned is None:
                raise session_not_found()
            message = parse(body) if scope["method"] == "POST" else None
            await self.serve_owned(owned, Call(head.session, scope, message, body, safe=False), receive, send)
        except InvalidMessage as error:
            await Refused(400, str(error), code=error.code).send(send)
        except PoolError:
            await session_not_found().send(send)
        except Refused as refusal:
            await refusal.send(send)

    # -- requests without a session --------------------------------------------------------------------------------

    async def _serve_stateless_era(
        self,
        upstream: Upstream,
        version: str,
        message: Message | None,
        body: bytes,
        scope: Scope,
        receive: Receive,
        guard: Guard,
    ) -> None:
        """Protocol 2026-07-28 has no sessions: any worker passes its requests on, if the upstream is of that era.

        A version that does not exist is the upstream's to refuse, for it knows which ones it speaks.
        """
        identifier = message.id if message is not None else None
        if version not in STATELESS_VERSIONS and header(scope["headers"], b"mcp-session-id") is not None:
            raise unsupported_version(version, HANDSHAKE_VERSIONS, identifier)
        if message is None:
            raise door.method_not_allowed(b"POST")
        link = self._pool.stateless(upstream)
        if link is None or self._eras.is_handshake_only(upstream.name):
            raise unsupported_version(version, HANDSHAKE_VERSIONS, identifier)
        await relay_post(link, message, body, scope["headers"], receive, self._eras.watch(upstream.name, guard.send))

    async def _serve_sessionless(
        self, upstream: Upstream, message: Message | None, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """A handshake-era request that names no session: right for upstreams that hand out no session id."""
        link = self._pool.stateless(upstream)
        if link is None or scope["method"] == "DELETE":
            raise Refused(400, "Bad request: Mcp-Session-Id header required", code=INVALID_REQUEST)
        if message is None:
            await relay_get(link, scope["headers"], receive, send, adopted=False)
        else:
            await relay_post(link, message, body, scope["headers"], receive, send)


def _initialize_result(reply: Reply, answer: bytes) -> str | None:
    """The protocol version that `initialize` agreed on; None when the upstream refused."""
    if reply.status != 200:
        return None
    is_stream = (reply.header(b"content-type") or b"").startswith(b"text/event-stream")
    for data in events(answer) if is_stream else [answer]:
        try:
            result = parse(data).payload.get("result")
        except InvalidMessage:
            continue
        if isinstance(result, dict):
            return str(result.get("protocolVersion", ""))  # pyright: ignore
    return None
