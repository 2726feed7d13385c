"""A session that many clients share: of one principal (affinity `principal`), or of the users of one affinity key.

Its owner initialized it, so `initialize` is answered from what the server said then. Requests go through with ids of
their own (`pool/sharing.py`), and the one stream of messages that belong to no request is given to all who listen.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, Final

import orjson

from ..pool import Message, PooledSession, PoolError, Upstream
from ..pool.calls import session_stream
from ..pool.link import Headers, Link
from ..pool.liveness import HeardLink, is_well
from ..pool.sharing import SharedIds, SharedLink
from ..pool.sse import event
from .affinity import Call
from .answers import HANDSHAKE_VERSIONS, JSON, Refused, session_not_found, unavailable
from .asgi import Receive, Send, header, respond, until_disconnect
from .door import method_not_allowed
from .relay import relay_post, stream_out

logger = logging.getLogger("leasehold.workers.shared")

MAX_BEHIND: Final = 1000
"""Messages that a listener may be behind; then its stream ends, and its client opens it again."""
CALLBACKS: Final = b"leasehold-callbacks"
"""A header by which a library's listener says what it can be asked for; it goes no further than to the owner."""
ASKED_OF: Final = {"sampling/createMessage": b"sampling", "elicitation/create": b"elicitation", "roots/list": b"roots"}
RETRY_S: Final = (0.1, 5.0)


class SharedRelay:
    """The clients of one shared session, at its owner."""

    def __init__(self, session: PooledSession) -> None:
        """The session is open."""
        assert session.initialize_result is not None
        self._session = session
        self._result = session.initialize_result
        self._ids = SharedIds(session.next_id, str(self._result.get("protocolVersion", "")))
        self._listeners: dict[_Listener, None] = {}
        self._reader: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[bool] | None = None
        self._is_open = False
        """Whether the upstream's stream is."""

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
            await relay_post(link, message, call.body, call.scope["headers"], receive, send)

    # -- the stream of messages that belong to no request ----------------------------------------------------------

    async def _listen(self, client: bytes, headers: Headers, receive: Receive, send: Send) -> None:
        listener = _Listener(client, headers)
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
                await stream_out(listener.events(), send)
        finally:
            del self._listeners[listener]
            if not self._listeners and self._reader is not None:
                self._reader.cancel()
                self._reader, self._is_open = None, False

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
        async with session_stream(link, [(b"mcp-protocol-version", self._ids.version), *own]) as (status, messages):
            if status != 200:
                return status
            self._is_open = True
            try:
                for listener in self._listeners:
                    listener.begin(200)
                async for message in messages:
                    self._give(message)
            finally:
                if self._reader is asyncio.current_task():
                    self._is_open = False
        return status

    def _give(self, message: Message) -> None:
        """Progress goes to who asked for it, a request of the server to who came last of those that can answer it, the
        rest to everybody."""
        data = orjson.dumps(message.payload)
        if message.method == "notifications/progress":
            known = self._ids.token(message.params.get("progressToken"))
            data = SharedLink.progress(message.payload, self._ids)
            for listener in self._listeners:
                if known is not None and data is not None and listener.client == known[0]:
                    listener.put(data)
        elif message.kind == "request":
            able = (listener for listener in reversed(self._listeners) if listener.answers(message.method))
            for listener in itertools.islice(able, 1):
                listener.put(data)
        else:
            for listener in self._listeners:
                listener.put(data)


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


class _Listener:
    """One client that listens: what it has yet to be sent."""

    def __init__(self, client: bytes, headers: Headers) -> None:
        self.client = client
        self.headers = headers
        self.begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        told = header(headers, CALLBACKS)
        self._callbacks = None if told is None else told.split(b",")
        self._waiting: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._ended = False

    def answers(self, method: str | None) -> bool:
        """Whether it can answer this request of the server, as far as it has said."""
        asked = ASKED_OF.get(method or "")
        return asked is None or self._callbacks is None or asked in self._callbacks

    def begin(self, status: int) -> None:
        if not self.begun.done():
            self.begun.set_result(status)

    def put(self, data: bytes) -> None:
        if len(self._waiting) >= MAX_BEHIND:
            self._ended = True
        else:
            self._waiting.append(data)
        self._wake.set()

    def end(self, status: int) -> None:
        self.begin(status)
        self._ended = True
        self._wake.set()

    async def events(self) -> AsyncGenerator[bytes, None]:
        while True:
            while self._waiting:
                yield event(self._waiting.popleft())
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()
