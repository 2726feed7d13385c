"""Opening a session: a client's `initialize`, from the limit that may refuse it to the record under which any worker
finds the session.

Its id leaves only when the record is written, and only to a client that is still there. In every other case nothing
is left: no session here, no record, and the upstream is told.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from ..coordinator import Unavailable, session_key
from ..pool import CircuitOpen, Fenced, HttpTarget, Link, Message, PoolError, PoolFull, UpstreamLost, parse
from ..pool.calls import let_end
from ..pool.jsonrpc import InvalidMessage
from ..pool.link import Reply
from ..pool.sse import EventSplitter
from .answers import JSON, outcome_body, turned_away, unavailable
from .asgi import Headers, Send, has_left, is_event_stream, respond, until_disconnect
from .errors import Disconnected
from .identity import Identity
from .owned import Owned
from .request import Request
from .sessions import Sessions


class Opening:
    """Opens the sessions of one worker."""

    def __init__(self, sessions: Sessions, identity: Identity, *, max_body_bytes: int) -> None:
        self._sessions = sessions
        self._identity = identity
        self._max_body_bytes = max_body_bytes
        self._registering: set[asyncio.Task[None]] = set()

    async def open(self, request: Request, message: Message, send: Send) -> None:
        """Answer `initialize`, with the id of a new session if the upstream agrees.

        Raises `Refused` and `Disconnected`.
        """
        upstream, caller, receive = request.upstream, request.caller, request.receive
        session_id = self._identity.mint(upstream.name, caller.bound)
        owned: Owned | None = None
        registering: asyncio.Task[None] | None = None
        reason = "unregistered"
        try:
            with until_disconnect(receive):
                owned = await self._sessions.open(session_key(session_id), upstream, caller.principal)
                with owned.session as session:
                    reply, answer, version = await self._ask(session.link, message, request.body, request.headers)
            link = owned.session.link
            if version is None:
                reason = "not_initialized"
            elif link.resume is None and isinstance(upstream.target, HttpTarget):
                reason = "stateless"  # the upstream hands out no session id: any worker can serve its client
            else:
                link.negotiated(version)
                registering = self._register(owned)
                await asyncio.shield(registering)
                if await has_left(receive):
                    raise Disconnected
                if self._sessions.draining:  # the next caller's worker goes on with it
                    await self._sessions.hand_off()
                reply.headers.append((b"mcp-session-id", session_id.encode()))
            await respond(send, reply.status, answer, reply.headers)
            if registering is not None:
                reason = ""
        except Unavailable as error:
            raise unavailable("Redis does not answer: the session cannot be registered", message.id) from error
        except (PoolFull, Fenced, CircuitOpen) as error:
            raise turned_away(error, message.id) from error
        except PoolError as error:
            await respond(send, 502, outcome_body(str(error), error.outcome, message.id), JSON)
        finally:
            if owned is not None and reason:
                self._abandon(owned, registering, reason)

    def _register(self, owned: Owned) -> asyncio.Task[None]:
        """In a task of its own: a claim that is cancelled half-way may be in Redis and in nobody's books."""
        task = asyncio.get_running_loop().create_task(self._sessions.register(owned), name="leasehold-register")
        self._registering.add(task)
        task.add_done_callback(self._registering.discard)
        return task

    def _abandon(self, owned: Owned, registering: asyncio.Task[None] | None, reason: str) -> None:
        """Nobody will use this session: end it, and its record once it is known whether there is one."""
        if registering is None:
            owned.session.close(reason)
            return

        def registered(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                task.exception()  # retrieved: who waited for it has left, or has been told
            self._sessions.end(owned, reason)

        if registering.done():
            registered(registering)
        else:
            registering.add_done_callback(registered)

    async def _ask(
        self, link: Link, message: Message, body: bytes, headers: Headers
    ) -> tuple[Reply, bytes, str | None]:
        """Ask for `initialize`: the reply, its body, and the protocol version agreed on; None when the upstream
        refused."""
        reply = await link.post(message, body, headers)
        is_stream = is_event_stream(reply.headers)
        splitter = EventSplitter(self._max_body_bytes)
        answer = bytearray()
        answered: Message | None = None
        async with aclosing(reply.chunks) as chunks:
            async for chunk in chunks:
                answer += chunk
                if len(answer) > self._max_body_bytes:
                    raise UpstreamLost(f"the answer to initialize is larger than {self._max_body_bytes} bytes")
                if is_stream:
                    for data in splitter.feed(chunk):
                        answered = answered or _answer_in(data, message)
                    if answered is not None:
                        await let_end(chunks)
                        break
        if not is_stream:
            answered = _answer_in(bytes(answer), message)
        return reply, bytes(answer), _agreed_version(answered) if reply.status == 200 else None


def _answer_in(data: bytes, request: Message) -> Message | None:
    """The answer to `request`, if it is this."""
    try:
        message = parse(data)
    except InvalidMessage:
        return None
    return message if message.kind == "response" and message.id == request.id else None


def _agreed_version(answer: Message | None) -> str | None:
    result: Any = answer.payload.get("result") if answer is not None else None
    return str(result.get("protocolVersion", "")) if isinstance(result, dict) else None  # pyright: ignore
