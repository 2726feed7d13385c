"""A link to a server with one output for everything, translated to the faces of streamable HTTP.

Messages of the server and bodies of the client cross as the bytes they are; only their heads are read. Which stream
gets which message is decided in `routing`. How messages travel is the business of the links made of this: `stdio_link`,
`sse_link`. A cancelled call leaves nothing behind but a late response, which is dropped.
"""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any, Final, cast

import orjson

from .errors import SessionClosed
from .jsonrpc import (
    INVALID_REQUEST,
    REQUEST_CANCELLED,
    SERVER_ERROR,
    InvalidMessage,
    Message,
    RequestId,
    classify,
    error_body,
)
from .line_stream import EventStream, LineStream
from .link import Headers, Reply
from .routing import Router
from .sse import STREAM_HEADERS

COMMIT_AFTER_S: Final = 15.0
"""Silence after which a request is answered by an event stream, whatever comes: only there can the client's end of the
gateway send comments, and proxies cut connections that are idle for longer."""
CANCEL_GRACE_S: Final = 1.0
"""How long a server may still answer a request that its client has cancelled."""

# A raw line break is white space in JSON, but ends the message on a pipe and the field in an event.
NO_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")

_JSON: Final[Headers] = [(b"content-type", b"application/json")]

_log = logging.getLogger("leasehold.pool.duplex")


class DuplexLink(ABC):
    """One session of such a server: a `Link`, but for how messages are sent."""

    def __init__(self, name: str, *, call_timeout_s: float, commit_after_s: float) -> None:
        self.name = name
        self._call_timeout_s = call_timeout_s
        self._commit_after_s = commit_after_s
        self._loop = asyncio.get_running_loop()
        self._router = Router()
        self._closed = asyncio.Event()
        self._reason = "it is not open"
        self._sent: int = 0
        self._received = 0
        self._invalid = 0

    # How messages travel

    @abstractmethod
    def _start(self, stream: LineStream, body: bytes, headers: Headers) -> None:
        """Send a request, now or soon: what then fails ends its stream. Raises `Fenced` when that is known at once."""

    @abstractmethod
    def _withdraw(self, stream: LineStream) -> bool:
        """Have the request of that stream not be sent; false when it may have been, wholly or in part."""

    @abstractmethod
    async def _send(self, message: Message, body: bytes, headers: Headers) -> None:
        """Send a message that has no stream of its own. Raises `PoolError`."""

    @abstractmethod
    def _drop_unsent(self, error: SessionClosed) -> None:
        """Send nothing more: who waits for that gets the error."""

    @abstractmethod
    def _stop(self) -> None:
        """End what carries the messages; may be called twice."""

    @abstractmethod
    def _on_invalid(self, data: bytes, error: InvalidMessage) -> None:
        """The server said something that is no message."""

    def _patience_s(self, message: Message) -> float:
        """How long the server may be silent after this request."""
        return self._call_timeout_s

    # The faces of a link

    @property
    def is_closed(self) -> bool:
        """True as soon as the session has ended, from whichever side."""
        return self._closed.is_set()

    @property
    def resume(self) -> None:
        """None: the session is pinned to what carries it."""
        return

    def negotiated(self, protocol_version: str) -> None:  # noqa: B027
        """Nothing to note: there is no resume record."""

    async def wait_closed(self) -> None:
        """Return once `is_closed` is true."""
        await self._closed.wait()

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """Send one client message; for a request, wait for the first thing that belongs to it.

        That is its response (200, JSON), or something before it or 15 s of silence (200, an event stream). Other
        messages get 202. A request whose id is still in flight is refused with 400, and is not sent.

        Raises `Fenced` or `SessionClosed` (nothing was sent), `UpstreamLost` or `CallTimeout` (it may have run).
        """
        self._check_open()
        if message.kind == "request" and message.id is not None:
            return await self._request(message, message.id, body, headers)
        if message.kind == "response":
            self._router.answered(message.id)
        elif message.method == "notifications/cancelled":
            self._expect_end(message.params.get("requestId"))
        await self._send(message, body, headers)
        return Reply(202, [], once(b""))

    async def get(self, headers: Headers) -> Reply:
        """Open the stream of messages that belong to no request; 409 while another is open."""
        self._check_open()
        if self._router.is_listening:
            error = error_body(SERVER_ERROR, "Conflict: this session's event stream is already open")
            return Reply(409, list(_JSON), once(error))
        stream = LineStream()
        events = self._events(stream, None)
        self._router.open(stream)
        return Reply(200, list(STREAM_HEADERS), events)

    async def delete(self, headers: Headers) -> Reply:
        """End the session, and what carries it soon after this returns. Requests in flight end with an error."""
        self._check_open()
        message = f"upstream {self.name!r}: the session is closed: its client has ended it"
        for stream in self._router.requests():
            self._let_go(stream)
            self._settle(stream, error_body(SERVER_ERROR, message, id=stream.id, data={"outcome": "unknown"}))
        self._end("its client has ended it")
        return Reply(200, [], once(b""))

    # One call

    async def _request(self, message: Message, id: RequestId, body: bytes, headers: Headers) -> Reply:  # noqa: A002
        if self._router.is_taken(id):
            error = error_body(INVALID_REQUEST, "Invalid request: this id is still in flight", id=id)
            return Reply(400, list(_JSON), once(error))
        stream = LineStream(id, message.progress_token)
        self._start(stream, body, headers)
        events = self._events(stream, self._patience_s(message))
        # In the turn of the write, so that no answer can come before.
        self._router.open(stream)
        try:
            await events.ready(self._commit_after_s)
        except BaseException:
            await events.aclose()
            raise
        if stream.is_answer:
            response = stream.pop()
            assert response is not None
            await events.aclose()
            return Reply(200, list(_JSON), once(response))
        return Reply(200, list(STREAM_HEADERS), events)

    def _events(self, stream: LineStream, timeout: float | None) -> EventStream:
        return EventStream(stream, self._leave, timeout=timeout)

    def _leave(self, stream: LineStream) -> None:
        """The client of `stream` is gone, or has all it waited for."""
        if self._withdraw(stream):
            self._router.forget(stream)
        else:
            self._router.leave(stream)

    def _expect_end(self, id: object) -> None:  # noqa: A002
        """Answer a cancelled request ourselves if the server does not do so in a moment."""
        stream = self._stream_of(id)
        if stream is not None:
            self._let_go(stream)
            error = error_body(REQUEST_CANCELLED, "Request cancelled", id=stream.id)
            self._loop.call_later(CANCEL_GRACE_S, self._settle, stream, error)

    def _stream_of(self, id: object) -> LineStream | None:  # noqa: A002
        """The stream of the request in flight whose id, as a client sent it, is this."""
        return self._router.find(id) if isinstance(id, str | int) and not isinstance(id, bool) else None

    @staticmethod
    def _let_go(stream: LineStream) -> None:
        """The client no longer waits for this request: what still comes, comes as events.

        Both majors of the Python SDK's client fail as a whole (ClosedResourceError) when plain JSON answers a request
        of a session they are closing; an event they drop. The SDK's server answers a cancelled request so too.
        """
        stream.as_events = True

    def _settle(self, stream: LineStream, error: bytes) -> None:
        """Answer a request in the server's place, unless it is answered."""
        if self._withdraw(stream):
            stream.push(error, last=True)
            self._router.forget(stream)
        else:
            self._router.settle(stream, error)

    # From the server

    def _receive(self, data: bytes) -> None:
        """Take what should be one message of the server."""
        if b"\r" in data or b"\n" in data:
            data = data.translate(NO_BREAKS)
        if not data or data.isspace():
            return
        try:
            message = _read_head(data)
        except InvalidMessage as error:
            self._invalid += 1
            self._on_invalid(data, error)
            return
        self._received += 1
        self._router.route(message, data)

    def _end(self, reason: str) -> None:
        """The session is over: every waiting call learns it now, and what carries it is told to end."""
        if not self.is_closed:
            _log.info("session_ended upstream=%s reason=%r", self.name, reason)
            self._reason = reason
            self._closed.set()
            self._drop_unsent(self._session_closed())
            self._router.end(f"upstream {self.name!r}: {reason}")
        self._stop()

    def _check_open(self) -> None:
        if self.is_closed:
            raise self._session_closed()

    def _session_closed(self) -> SessionClosed:
        return SessionClosed(f"upstream {self.name!r}: the session is closed: {self._reason}")


async def once(chunk: bytes) -> AsyncGenerator[bytes, None]:
    """A body in one piece."""
    if chunk:
        yield chunk


def _read_head(data: bytes) -> Message:
    try:
        decoded: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        # Python's own servers write NaN and lone surrogates, which others refuse. What such a message is worth is for
        # its reader to say; dropping it would let its request wait in vain.
        try:
            decoded = json.loads(data)
        except (ValueError, RecursionError):
            raise InvalidMessage(INVALID_REQUEST, "not JSON") from None
    if not isinstance(decoded, dict):
        raise InvalidMessage(INVALID_REQUEST, "not a JSON object")
    return classify(cast("dict[str, Any]", decoded))
