"""A link to a stdio server: one child process per session, translated to the faces of streamable HTTP.

Lines of the child and bodies of the client cross as the bytes they are; only their heads are read. Which stream gets
which line is decided in `stdio_routing`, the process lives and ends in `stdio_process`; both call back synchronously,
and nothing here is a task. So a cancelled call leaves nothing behind but a late response, which is dropped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import orjson

from .errors import CallTimeout, OpenFailed, SessionClosed
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
from .link import Fence, Headers, Reply
from .sse import STREAM_HEADERS
from .stdio_lines import StrayLog
from .stdio_process import StdioProcess
from .stdio_routing import Router, RouterStatistics
from .stdio_stream import EventStream, LineStream

COMMIT_AFTER_S: Final = 15.0
"""Silence after which a request is answered by an event stream, whatever comes: only there can the client's end of the
gateway send comments, and proxies cut connections that are idle for longer."""
CANCEL_GRACE_S: Final = 1.0
"""How long a server may still answer a request that its client has cancelled."""
OPEN_TIMEOUT_S: Final = 10.0

_JSON: Final[Headers] = [(b"content-type", b"application/json")]
# A raw line break is white space in JSON, but ends the message on a pipe and the field in an event.
_NO_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")

_log = logging.getLogger("leasehold.pool.stdio")


@dataclass(frozen=True, slots=True)
class StdioStatistics:
    """A snapshot of one stdio session."""

    pid: int
    returncode: int | None
    is_closed: bool
    sent: int
    received: int
    invalid_lines: int
    unsent: int
    stderr_lines: int
    stderr_dropped: int
    streams: RouterStatistics


class StdioLink:
    """One stdio server session: a `Link`. Opened by `StdioLink.open`, ended by `aclose` or with its process."""

    def __init__(self, name: str, *, fence: Fence, call_timeout: float, commit_after: float = COMMIT_AFTER_S) -> None:
        self.name = name
        self._fence = fence
        self._call_timeout = call_timeout
        self._commit_after = commit_after
        self._loop = asyncio.get_running_loop()
        self._router = Router()
        self._stray = StrayLog(name, self._loop.time)
        self._process: StdioProcess | None = None
        # Lines that wait until the child reads again, oldest first: of a request's stream, or of somebody else who
        # waits on a future. Who gives up takes its line out, so none is written for a caller that has left.
        self._unsent: dict[LineStream | asyncio.Future[None], bytes] = {}
        self._closed = asyncio.Event()
        self._reason = "it is not open"
        self._sent = 0
        self._received = 0
        self._invalid_lines = 0

    @classmethod
    async def open(
        cls,
        command: str,
        args: Sequence[str],
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        *,
        name: str,
        fence: Fence,
        call_timeout: float,
        open_timeout: float = OPEN_TIMEOUT_S,
        commit_after: float = COMMIT_AFTER_S,
    ) -> StdioLink:
        """Start the server's process; `env` is laid over the safe part of our own environment. Times in seconds.

        Nothing is said to the server: its session begins with the client's `initialize`.

        Raises `OpenFailed` when the process cannot be started.
        """
        self = cls(name, fence=fence, call_timeout=call_timeout, commit_after=commit_after)
        try:
            async with asyncio.timeout(open_timeout):
                self._process = await StdioProcess.start(
                    command,
                    args,
                    env,
                    cwd,
                    name=name,
                    stray=self._stray,
                    on_line=self._on_line,
                    on_writable=self._on_writable,
                    on_lost=self._end,
                )
        except TimeoutError:
            raise OpenFailed(f"upstream {name!r}: its process did not start within {open_timeout:g} s") from None
        return self

    def __repr__(self) -> str:
        process = self._process
        state = f"closed ({self._reason})" if self.is_closed else "open"
        return f"<StdioLink {self.name!r} pid={process and process.pid} {state} {self._router!r}>"

    def statistics(self) -> StdioStatistics:
        """A snapshot of the counts."""
        process = self._running()
        return StdioStatistics(
            pid=process.pid,
            returncode=process.returncode,
            is_closed=self.is_closed,
            sent=self._sent,
            received=self._received,
            invalid_lines=self._invalid_lines,
            unsent=len(self._unsent),
            stderr_lines=self._stray.lines,
            stderr_dropped=self._stray.dropped,
            streams=self._router.statistics(),
        )

    @property
    def is_closed(self) -> bool:
        """True as soon as the session has ended, from whichever side."""
        return self._closed.is_set()

    @property
    def resume(self) -> None:
        """None: a stdio session is pinned to its process."""
        return

    async def wait_closed(self) -> None:
        """Return once `is_closed` is true."""
        await self._closed.wait()

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """Write one client message to the child; for a request, wait for the first thing that belongs to it.

        That is its response (200, JSON), or something before it or 15 s of silence (200, an event stream). Other
        messages get 202. A request whose id is still in flight is refused with 400, and is not sent.

        Raises `Fenced` or `SessionClosed` (nothing was sent), `UpstreamLost` or `CallTimeout` (it may have run).
        """
        self._check_open()
        line = _framed(body)
        if message.kind == "request" and message.id is not None:
            return await self._request(message, message.id, line)
        if message.kind == "response":
            self._router.answered(message.id)
        elif message.method == "notifications/cancelled":
            self._expect_end(message.params.get("requestId"))
        await self._send(line)
        return Reply(202, [], _once(b""))

    async def get(self, headers: Headers) -> Reply:
        """Open the stream of messages that belong to no request; 409 while another is open."""
        self._check_open()
        if self._router.is_listening:
            error = error_body(SERVER_ERROR, "Conflict: this session's event stream is already open")
            return Reply(409, list(_JSON), _once(error))
        stream = LineStream()
        events = self._events(stream, None)
        self._router.open(stream)
        return Reply(200, list(STREAM_HEADERS), events)

    async def delete(self, headers: Headers) -> Reply:
        """End the session: its process is on its way out when this returns. Requests in flight end with an error."""
        self._check_open()
        message = f"upstream {self.name!r}: the session is closed: its client has ended it"
        for stream in self._router.requests():
            self._let_go(stream)
            self._settle(stream, error_body(SERVER_ERROR, message, id=stream.id, data={"outcome": "unknown"}))
        self._end("its client has ended it")
        return Reply(200, [], _once(b""))

    async def aclose(self) -> None:
        """End the session and wait until its process and that one's children are gone: 5 s at most.

        A cancelled wait changes nothing about the end.
        """
        self._end("it was closed")
        await self._running().wait_gone()

    # One call

    async def _request(self, message: Message, id: RequestId, line: bytes) -> Reply:  # noqa: A002
        if self._router.is_taken(id):
            error = error_body(INVALID_REQUEST, "Invalid request: this id is still in flight", id=id)
            return Reply(400, list(_JSON), _once(error))
        stream = LineStream(id, message.progress_token)
        if self._can_write():
            self._write(line)
        else:
            self._unsent[stream] = line
        events = self._events(stream, self._call_timeout)
        # In the turn of the write, so that no answer can come before.
        self._router.open(stream)
        try:
            await events.ready(self._commit_after)
        except BaseException:
            await events.aclose()
            raise
        if stream.is_answer:
            response = stream.pop()
            assert response is not None
            await events.aclose()
            return Reply(200, list(_JSON), _once(response))
        return Reply(200, list(STREAM_HEADERS), events)

    def _events(self, stream: LineStream, timeout: float | None) -> EventStream:
        return EventStream(stream, self._leave, timeout=timeout)

    def _leave(self, stream: LineStream) -> None:
        """The client of `stream` is gone, or has all it waited for."""
        if self._unsent.pop(stream, None) is None:
            self._router.leave(stream)
        else:
            self._router.forget(stream)

    def _expect_end(self, id: object) -> None:  # noqa: A002
        """Answer a cancelled request ourselves if the server does not do so in a moment."""
        if not isinstance(id, str | int) or isinstance(id, bool):
            return
        stream = self._router.find(id)
        if stream is not None:
            self._let_go(stream)
            error = error_body(REQUEST_CANCELLED, "Request cancelled", id=id)
            self._loop.call_later(CANCEL_GRACE_S, self._settle, stream, error)

    @staticmethod
    def _let_go(stream: LineStream) -> None:
        """The client no longer waits for this request: what still comes, comes as events.

        Both majors of the Python SDK's client fail as a whole (ClosedResourceError) when plain JSON answers a request
        of a session they are closing; an event they drop. The SDK's server answers a cancelled request so too.
        """
        stream.as_events = True

    def _settle(self, stream: LineStream, error: bytes) -> None:
        """Answer a request in the server's place, unless it is answered."""
        if self._unsent.pop(stream, None) is None:
            self._router.settle(stream, error)
        else:
            stream.push(error, last=True)
            self._router.forget(stream)

    # Towards the child

    def _can_write(self) -> bool:
        return not self._unsent and not self._running().is_paused

    def _write(self, line: bytes) -> None:
        # One turn of the loop from the fence to the first byte; `write` takes the line whole.
        self._fence()
        self._running().write(line)
        self._sent += 1

    async def _send(self, line: bytes) -> None:
        """Write a line that has no stream of its own, as soon as the child takes it."""
        if self._can_write():
            self._write(line)
            return
        written: asyncio.Future[None] = self._loop.create_future()
        self._unsent[written] = line
        error = CallTimeout(f"upstream {self.name!r}: it took no input for {self._call_timeout:g} s")
        timer = self._loop.call_later(self._call_timeout, _fail, written, error)
        try:
            await written
        finally:
            timer.cancel()
            self._unsent.pop(written, None)

    def _on_writable(self) -> None:
        process = self._running()
        while self._unsent and not process.is_paused:
            waiter = next(iter(self._unsent))
            line = self._unsent.pop(waiter)
            try:
                self._write(line)
            except Exception as error:  # noqa: BLE001 - the fence's and the pipe's errors are the waiting call's
                if isinstance(waiter, LineStream):
                    waiter.end(error)
                    self._router.forget(waiter)
                else:
                    _fail(waiter, error)
            else:
                if not isinstance(waiter, LineStream) and not waiter.done():
                    waiter.set_result(None)

    # From the child

    def _on_line(self, line: bytes) -> None:
        if b"\r" in line:
            line = line.rstrip(b"\r").translate(_NO_BREAKS)
        if not line or line.isspace():
            return
        try:
            message = _read_head(line)
        except InvalidMessage as error:
            self._invalid_lines += 1
            if line.lstrip()[:1] in (b"{", b"["):
                # It may be somebody's data: described, not shown.
                _log.warning("line_skipped upstream=%s bytes=%d reason=%r", self.name, len(line), str(error))
            else:
                self._stray.write(line, "stdout")
            return
        self._received += 1
        self._router.route(message, line)

    def _end(self, reason: str) -> None:
        """The session is over: every waiting call learns it now, and the process is told to end."""
        if not self.is_closed:
            _log.info("session_ended upstream=%s reason=%r", self.name, reason)
            self._reason = reason
            self._closed.set()
            unsent, self._unsent = self._unsent, {}
            for waiter in unsent:
                if isinstance(waiter, LineStream):
                    waiter.end(self._session_closed())
                else:
                    _fail(waiter, self._session_closed())
            self._router.end(f"upstream {self.name!r}: {reason}")
        if self._process is not None:
            self._process.terminate()

    def _check_open(self) -> None:
        if self.is_closed:
            raise self._session_closed()

    def _session_closed(self) -> SessionClosed:
        return SessionClosed(f"upstream {self.name!r}: the session is closed: {self._reason}")

    def _running(self) -> StdioProcess:
        assert self._process is not None
        return self._process


async def _once(chunk: bytes) -> AsyncGenerator[bytes, None]:
    if chunk:
        yield chunk


def _framed(body: bytes) -> bytes:
    """A body as one line: the same bytes, or where it has raw line breaks (which would split it) the same JSON."""
    if b"\n" in body or b"\r" in body:
        body = body.translate(_NO_BREAKS)
    return body + b"\n"


def _read_head(line: bytes) -> Message:
    try:
        decoded: Any = orjson.loads(line)
    except orjson.JSONDecodeError:
        # Python's own servers write NaN and lone surrogates, which others refuse. What such a line is worth is for
        # its reader to say; dropping it would let its request wait in vain.
        try:
            decoded = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidMessage(INVALID_REQUEST, "not JSON") from None
    if not isinstance(decoded, dict):
        raise InvalidMessage(INVALID_REQUEST, "not a JSON object")
    return classify(cast("dict[str, Any]", decoded))


def _fail(waiter: asyncio.Future[None], error: Exception) -> None:
    if not waiter.done():
        waiter.set_exception(error)
