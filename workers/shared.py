"""A session that many clients share: of one principal (affinity `principal`), or of the users of one affinity key.

Its owner initialized it, so `initialize` is answered from what the server said then. Requests go through with ids of
their own (`pool/sharing.py`), and the one stream of messages that belong to no request is given to all who listen, with
ids of ours, and out of the session's log to who comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from hashlib import sha256
from typing import Any, Final

import orjson

from ..coordinator import Unavailable
from ..coordinator.event_log import EVERYBODY, Logged, Position, SessionEvents, settled
from ..pool import Message, PooledSession, PoolError, Upstream
from ..pool.calls import Place, session_stream
from ..pool.link import Headers, Link
from ..pool.liveness import HeardLink, is_well
from ..pool.sharing import SharedIds, SharedLink
from ..pool.sse import event
from .affinity import Call
from .answers import HANDSHAKE_VERSIONS, JSON, Refused, session_not_found, unavailable
from .asgi import Receive, Send, header, respond, until_disconnect
from .door import method_not_allowed
from .errors import BrokenOff
from .event_log import BEGINS_AFTER, LAST_EVENT_ID, with_id
from .exchange import REPEAT
from .relay import relay_post, stream_out

logger = logging.getLogger("leasehold.workers.shared")

MAX_BEHIND: Final = 1000
"""Messages that a listener may be behind; then its stream ends, and its client opens it again, after the last one that
it got."""
CALLBACKS: Final = b"leasehold-callbacks"
"""A header by which a library's listener says what it can be asked for; it goes no further than to the owner."""
ASKED_OF: Final = {"sampling/createMessage": b"sampling", "elicitation/create": b"elicitation", "roots/list": b"roots"}
RETRY_S: Final = (0.1, 5.0)


class SharedRelay:
    """The clients of one shared session, at its owner."""

    def __init__(self, session: PooledSession, events: SessionEvents) -> None:
        """The session is open."""
        assert session.initialize_result is not None
        self._session = session
        self._result = session.initialize_result
        self._ids = SharedIds(session.next_id, str(self._result.get("protocolVersion", "")))
        self._events = events
        self._listeners: dict[_Listener, None] = {}
        self._reader: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[bool] | None = None
        self._is_open = False
        """Whether the upstream's stream is."""
        self._place = Place()

    def __repr__(self) -> str:
        return f"<SharedRelay of {self._session!r} listeners={len(self._listeners)} {self._ids!r}>"

    @staticmethod
    def asks_upstream(call: Call) -> bool:
        """Whether a call is a request that the upstream answers."""
        return call.message is not None and call.message.kind == "request" and call.message.method != "initialize"

    async def is_well(self, headers: Headers) -> bool:
        """Whether calls may go to the session, which is checked first where it was not heard of for a while: once for
        all who ask meanwhile, with the credentials of the first of them (`headers`: his)."""
        if self._checking is None:
            if not self._session.is_due:
                return not self._session.is_closed
            check = is_well(self._session, forwarded(self._session.upstream, headers))
            self._checking = asyncio.get_running_loop().create_task(check, name="leasehold-check")
            self._checking.add_done_callback(self._checked)
        return await asyncio.shield(self._checking)

    def _checked(self, check: asyncio.Task[bool]) -> None:
        self._checking = None
        if not check.cancelled():
            check.exception()  # retrieved: who asked may have left

    async def serve(self, call: Call, receive: Receive, send: Send) -> None:
        """Answer one request of one client. Raises what a relay raises."""
        client = header(call.scope["headers"], b"mcp-session-id") or b""
        message = call.message
        if message is None:
            if call.scope["method"] != "GET":
                raise method_not_allowed(b"POST, GET")
            await self._listen(client, call.scope["headers"], receive, send)
        elif message.kind == "request" and message.method == "initialize":
            await respond(send, 200, initialize_answer(message, self._result), JSON)
        elif message.method == "notifications/initialized":
            await respond(send, 202, b"", [])
        else:
            link = SharedLink(HeardLink(self._session.link, self._session), self._ids, client)
            headers, is_repeat = call.scope["headers"], REPEAT in call.scope
            await relay_post(link, message, call.body, headers, receive, send, is_repeat=is_repeat)

    # -- the stream of messages that belong to no request ----------------------------------------------------------

    async def _listen(self, client: bytes, headers: Headers, receive: Receive, send: Send) -> None:
        # Whoever it is, he begins here: what comes from now on waits for him while he is told what he has missed.
        listener = _Listener(client, headers)
        begins_after = self._events.now(listener.stream)
        self._listeners[listener] = None
        try:
            with until_disconnect(receive):
                if self._is_open:
                    listener.begin(200)
                elif self._reader is None:
                    self._reader = asyncio.get_running_loop().create_task(self._read(), name="leasehold-shared")
                status = await listener.begun
                if status != 200:
                    raise _refusal(status)
                missed = await self._missed(listener)
                begins = [(BEGINS_AFTER, begins_after)] if missed is None else []
                await stream_out(listener.events(missed or []), begins, send)
        finally:
            del self._listeners[listener]
            if not self._listeners and self._reader is not None:
                self._reader.cancel()
                self._reader, self._is_open = None, False

    async def _missed(self, listener: _Listener) -> list[Logged] | None:
        """What a client that comes back has not got; None for one who begins. An id that is not of his stream says
        nothing."""
        told = header(listener.headers, LAST_EVENT_ID)
        cursor = None if told is None else self._events.cursor(told)
        if cursor is None or cursor.stream != listener.stream:
            return None
        try:
            return await self._events.after(cursor)
        except Unavailable as error:
            raise unavailable("Redis does not answer: what the stream has missed cannot be told") from error

    async def _read(self) -> None:
        """Read the upstream's stream, again and again, for as long as anybody listens."""
        delay, longest = RETRY_S
        status = 503
        try:
            while status not in (404, 405) and not self._session.is_closed:
                try:
                    status = await self._read_once(self._session.link)
                except PoolError:
                    status = 503
                if status == 200:
                    delay = RETRY_S[0]
                for listener in self._listeners:
                    listener.begin(status)  # who waits for his stream to begin learns that it does not
                await asyncio.sleep(delay)
                delay = min(longest, delay * 2)
        finally:
            if self._reader is asyncio.current_task():  # else nobody listens, or somebody has begun anew
                self._reader = None
                for listener in self._listeners:
                    listener.end(status if status == 405 else 404)

    async def _read_once(self, link: Link) -> int:
        """With the credentials of who listens since last."""
        own = forwarded(self._session.upstream, next(reversed(self._listeners)).headers)
        headers = [(b"mcp-protocol-version", self._ids.version), *own]
        async with session_stream(link, headers, self._place) as (status, messages):
            if status != 200:
                return status
            self._is_open = True
            try:
                for listener in self._listeners:
                    listener.begin(200)
                async for message in messages:
                    await self._give(message)
            finally:
                if self._reader is asyncio.current_task():
                    self._is_open = False
        return status

    async def _give(self, message: Message) -> None:
        """Progress goes to who asked for it, a request of the server to who came last of those that can answer it, the
        rest to everybody. It is in the log before anybody gets it."""
        stream, data = EVERYBODY, orjson.dumps(message.payload)
        if message.method == "notifications/progress":
            known = self._ids.token(message.params.get("progressToken"))
            told = SharedLink.progress(message.payload, self._ids)
            if known is None or told is None:
                return
            stream, data = stream_of(known[0]), told
        elif message.kind == "request":
            able = (listener for listener in reversed(self._listeners) if listener.answers(message.method))
            asked = next(able, None)
            if asked is None:
                return
            stream = asked.stream
        logged = self._events.add(stream, event(data))
        await settled([logged])
        if stream == EVERYBODY:
            for listener in self._listeners:
                listener.put(logged._replace(name=self._events.name(listener.stream, logged.position)))
        else:
            for listener in reversed(self._listeners):
                if listener.stream == stream:  # the one that its client has opened last
                    listener.put(logged)
                    return


def _refusal(status: int) -> Refused:
    if status == 405:
        return method_not_allowed(b"POST")
    if status in (401, 403):
        return Refused(status, "The upstream refused the stream of its messages")
    return session_not_found() if status == 404 else unavailable("The upstream's stream of messages cannot be opened")


def initialize_answer(message: Message, result: dict[str, Any]) -> bytes:
    """The answer to a client's `initialize` on a session that has been initialized: the server's result, in the older
    one of the two protocol versions."""
    asked = message.params.get("protocolVersion")
    agreed = result.get("protocolVersion")
    if asked in HANDSHAKE_VERSIONS and agreed in HANDSHAKE_VERSIONS:
        agreed = min(asked, agreed)  # they are dates
    return orjson.dumps({"jsonrpc": "2.0", "id": message.id, "result": {**result, "protocolVersion": agreed}})


def forwarded(upstream: Upstream, headers: Headers) -> Headers:
    """The caller's headers that this upstream is to see."""
    return [pair for pair in headers if pair[0].decode("latin-1") in upstream.forward_headers]


def stream_of(client: bytes) -> bytes:
    """The name of a client's stream in the log."""
    return sha256(client).hexdigest()[:8].encode()


class _Listener:
    """One client that listens: what it has yet to be sent."""

    def __init__(self, client: bytes, headers: Headers) -> None:
        self.stream = stream_of(client)
        self.headers = headers
        self.begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        told = header(headers, CALLBACKS)
        self._callbacks = None if told is None else told.split(b",")
        self._waiting: deque[Logged] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._is_lost = False

    def answers(self, method: str | None) -> bool:
        """Whether it can answer this request of the server, as far as it has said."""
        asked = ASKED_OF.get(method or "")
        return asked is None or self._callbacks is None or asked in self._callbacks

    def begin(self, status: int) -> None:
        if not self.begun.done():
            self.begun.set_result(status)

    def put(self, logged: Logged) -> None:
        self._ended = self._ended or len(self._waiting) >= MAX_BEHIND
        if not self._ended:
            self._waiting.append(logged)
        self._wake.set()

    def end(self, status: int) -> None:
        """The session has no stream any more."""
        self.begin(status)
        self._ended = self._is_lost = True
        self._wake.set()

    async def events(self, missed: list[Logged]) -> AsyncGenerator[bytes, None]:
        """What was missed, then what comes: an event may be among both. Raises `BrokenOff` when the session has moved,
        or ended."""
        told = {logged.position for logged in missed}
        waiting, self._waiting = self._waiting, deque()
        for logged in sorted([*missed, *(each for each in waiting if each.position not in told)], key=_position):
            yield with_id(logged)
        while True:
            while self._waiting:
                logged = self._waiting.popleft()
                if logged.position not in told:
                    yield with_id(logged)
            if self._is_lost:
                raise BrokenOff("the session has moved, or ended")
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()


def _position(logged: Logged) -> Position:
    return logged.position
