"""Servers whose sessions are no client's own: affinity `principal` (one session for all clients of a principal, fleet
wide) and `none` (each call takes any pooled session of the worker it landed on).

A client of the handshake era still gets a session id, but that is a signed token only: it says that its holder has
initialized, and nothing is kept for it. A client of the newer era needs none; what it asks is put into the words of
the handshake era (`bridge.py`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from ..pool import Message, OpenFailed, PoolError, PoolFull, SessionClosed, SessionPool, Upstream
from ..pool.borrowing import Borrow, BorrowedLink, Want
from ..pool.handshake import initialize_params
from ..pool.jsonrpc import INVALID_REQUEST
from ..pool.link import Headers, Reply
from ..pool.sharing import SharedIds, SharedLink
from .affinity import Call, is_safe
from .answers import HANDSHAKE_VERSIONS, JSON, Refused, session_not_found, turned_away, unavailable
from .asgi import Message as AsgiMessage
from .asgi import Send, header, respond, until_disconnect
from .door import method_not_allowed
from .guard import Guard
from .identity import Identity
from .owned import Opens
from .reattach import Streams
from .relay import relay_post
from .request import Request
from .shared import forwarded, initialize_answer
from .stateless_edge import StatelessEdge
from .tool_hints import ToolHints


class SharedEdge:
    """Answers requests for servers with affinity `principal` or `none`."""

    def __init__(self, pool: SessionPool, identity: Identity, streams: Streams, hints: ToolHints) -> None:
        self._hints = hints
        self._pool = pool
        self._identity = identity
        self._streams = streams
        self._stateless = StatelessEdge(self._ask)
        self._running: dict[tuple[bytes, str | int], _AnySession] = {}

    def __repr__(self) -> str:
        return f"<SharedEdge running={len(self._running)}>"

    async def route(self, request: Request, guard: Guard) -> None:
        """Answer one request. Raises `Refused`, `Disconnected`, `BrokenOff`."""
        upstream, caller = request.upstream, request.caller
        session_id = header(request.headers, b"mcp-session-id")
        if request.version is not None and request.version not in HANDSHAKE_VERSIONS:
            await self._stateless.serve(request, guard.send)
            return
        if request.initializes and not session_id:
            minted = self._identity.mint(upstream.name, caller.bound)
            await self._call(request, guard, _with_id(guard.send, minted))
            return
        if session_id is None:
            raise Refused(400, "Bad request: Mcp-Session-Id header required", code=INVALID_REQUEST)
        if not self._identity.issued(session_id, upstream.name, caller.bound):
            raise session_not_found()
        if request.method == "DELETE":
            # The token of one client: the session goes on, it is not his alone.
            await respond(guard.send, 200, b"", [])
            return
        await self._call(request, guard, guard.send)

    async def _ask(self, request: Request, send: Send) -> None:
        guard = Guard(send, request.message)
        await self._call(request, guard, guard.send)

    async def _call(self, request: Request, guard: Guard, send: Send) -> None:
        upstream, message = request.upstream, request.message
        headers = forwarded(upstream, request.headers)
        caller = self._identity.sharing(request.caller, headers)
        if upstream.affinity == "principal":
            key = self._identity.shared_key(upstream.name, caller.bound)
            opens = Opens(upstream, caller.principal, initialize_params(), headers)
            # Initializing is safe, for it is the owner's doing: he answers with what the server said to him.
            safe = request.initializes or is_safe(message, self._hints.safe(upstream, request.caller.principal))
            call = Call(key, request.scope, message, request.body, safe, opens)
            await self._streams.dispatch(call, request.receive, _sending(guard, send))
        elif message is None:
            raise method_not_allowed(b"POST, DELETE")  # no session, so no stream of its messages
        else:
            await self._borrow(request, message, caller.principal, send)

    # -- affinity `none` -------------------------------------------------------------------------------------------

    async def _borrow(self, request: Request, message: Message, principal: str, send: Send) -> None:
        headers = request.headers
        client = header(headers, b"mcp-session-id") or b""
        if message.kind != "request" or message.id is None:
            await self._tell(message, request.body, client, headers)
            await respond(send, 202, b"", [])
            return
        any_session = _AnySession(self._pool, request.upstream, principal, headers, client)
        if request.initializes:
            try:
                with until_disconnect(request.receive):
                    result = await any_session.initialize_result(message)
            except PoolError as error:
                raise turned_away(error, message.id) from error
            await respond(send, 200, initialize_answer(message, result), JSON)
            return
        self._running[client, message.id] = any_session
        try:
            await relay_post(any_session, message, request.body, headers, request.receive, send)
        finally:
            if self._running.get((client, message.id)) is any_session:
                del self._running[client, message.id]

    async def _tell(self, message: Message, body: bytes, client: bytes, headers: Headers) -> None:
        """A notification, or an answer to a server that asked. What concerns no call in flight here concerns nobody:
        there is no session that keeps it."""
        running = None
        if message.method == "notifications/cancelled":
            id: Any = message.params.get("requestId")  # noqa: A001
            running = self._running.get((client, id)) if isinstance(id, str | int) else None
        elif message.kind == "response":
            own = [each for (name, _), each in self._running.items() if name == client]
            running = own[0] if len(own) == 1 else None  # of several, it is not known which one was asked
        if running is not None:
            await running.tell(message, body, headers)


class _AnySession:
    """One call's way to any pooled session: borrowed when the call is made, given back when its answer was read.

    What did not run for want of a living session is tried once more on a fresh one: no session means anything here.
    """

    def __init__(self, pool: SessionPool, upstream: Upstream, principal: str, headers: Headers, client: bytes) -> None:
        self._pool = pool
        self._want = Want(upstream, principal=principal, headers=forwarded(upstream, headers))
        self._client = client
        self._link: SharedLink | None = None

    async def initialize_result(self, message: Message) -> dict[str, Any]:
        """What the server says to `initialize`: as it said when a session of the pool was opened."""
        borrow = await self._acquire(message)
        try:
            return BorrowedLink(borrow).initialize_result
        finally:
            borrow.release()

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """See `Link.post`. Raises `Refused` where there is no session to be had."""
        borrow = await self._acquire(message)
        try:
            return await self._post(borrow, message, body, headers)
        except (SessionClosed, OpenFailed):
            pass  # what has ended this one may have ended the others
        borrow = await self._acquire(message, sure=True)
        try:
            return await self._post(borrow, message, body, headers)
        except SessionClosed as error:
            raise OpenFailed(f"every session ends at once: {error}") from error

    async def tell(self, message: Message, body: bytes, headers: Headers) -> None:
        """Pass on that nobody waits for the call any more, or an answer to what the server asked."""
        if self._link is not None:
            try:
                reply = await self._link.post(message, body, headers)
                await reply.chunks.aclose()
            except PoolError:
                return  # it ends with its session

    async def _post(self, borrow: Borrow, message: Message, body: bytes, headers: Headers) -> Reply:
        session = borrow.session
        try:
            result = session.initialize_result or {}
            ids = SharedIds(session.next_id, str(result.get("protocolVersion", "")))
            self._link = SharedLink(BorrowedLink(borrow), ids, self._client)
            own = {name for name, _ in self._want.headers}  # they go with every call on this loan
            reply = await self._link.post(message, body, [pair for pair in headers if pair[0] not in own])
            if reply.status == 404 and session.is_closed:
                await reply.chunks.aclose()
                raise SessionClosed("the upstream has ended the session")
        except BaseException:
            borrow.release()
            raise
        chunks = _until_read(reply.chunks, borrow)
        await anext(chunks)
        return Reply(reply.status, reply.headers, chunks)

    async def _acquire(self, message: Message, *, sure: bool = False) -> Borrow:
        try:
            return await self._pool.acquire(self._want, sure=sure)
        except PoolFull as full:
            raise unavailable(str(full), message.id) from full


async def _until_read(chunks: AsyncGenerator[bytes, None], borrow: Borrow) -> AsyncGenerator[bytes, None]:
    """A client that leaves does not break the session: the call goes on at the server, and its answer is nobody's."""
    try:
        yield b""
        async for chunk in chunks:
            yield chunk
    finally:
        await chunks.aclose()
        borrow.release()


def _with_id(send: Send, session_id: str) -> Send:
    """Add the client's session id to a successful answer."""

    async def sending(message: AsgiMessage) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            headers = [*message.get("headers", ()), (b"mcp-session-id", session_id.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return sending


def _sending(guard: Guard, send: Send) -> Guard:
    """A guard that judges what is sent by another way."""
    return guard if send == guard.send else Guard(send, guard.request)
