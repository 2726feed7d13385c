"""A link to an HTTP+SSE server (protocol 2024-11-05): one event stream per session, and POSTs beside it.

The stream brings everything the server says, answers included; a POST only brings a message there. The session lives as
long as its stream: one task reads it, and when it ends or breaks, every call in flight ends at once.

The stream is opened by the first message, with the credentials of that message, as a streamable-HTTP session is. So an
upstream that wants a header of the client's, or answers 401, is asked and heard as it should be.
"""

from __future__ import annotations

import asyncio
import logging
from codecs import BOM_UTF8
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from aiohttp import ClientResponse

from .duplex_link import COMMIT_AFTER_S, DuplexLink, once
from .errors import Fenced, OpenFailed, PoolError, SessionClosed, UpstreamLost
from .http_request import Attempt, HttpClients, HttpRequests, reply_headers
from .jsonrpc import InvalidMessage, Message
from .line_stream import LineStream
from .link import Fence, Headers, Reply, unfenced
from .routing import RouterStatistics
from .sse import EventSplitter, event_data, event_type
from .sse_stream import Refused, beginning, endpoint_url, open_stream
from .upstream import SseTarget

OPEN_TIMEOUT_S: Final = 10.0
"""From the request for the event stream to its `endpoint` event."""
CLOSE_TIMEOUT_S: Final = 2.0
MAX_EVENT_BYTES: Final = 64 << 20
"""An event above it ends the session: whose answer it was is unknown, and its caller would wait in vain."""
POST_GRACE_S: Final = 5.0
"""How long a POST may stay unanswered once its call is over: some servers answer it when the call is done."""
ORDER_TIMEOUT_S: Final = 1.0
"""How long a cancellation waits for the request that it cancels to be taken: sent side by side, it could come first."""

GONE: Final = frozenset({404, 410})

logger = logging.getLogger("leasehold.pool.sse")


@dataclass(frozen=True, slots=True)
class SseStatistics:
    """A snapshot of one SSE session. `posts`: on their way now."""

    is_open: bool
    is_closed: bool
    sent: int
    received: int
    invalid_events: int
    ignored_events: int
    posts: int
    streams: RouterStatistics


@dataclass(slots=True, eq=False)
class _Posting:
    """One POST on its way, in a task of its own: its caller may leave, the message must not be torn."""

    attempt: Attempt
    task: asyncio.Task[None]
    stream: LineStream | None = None


class SseLink(DuplexLink):
    """An HTTP+SSE server session: a `Link`. Opened by its first message, ended by `aclose` or with its event stream."""

    def __init__(
        self,
        clients: HttpClients,
        target: SseTarget,
        *,
        name: str,
        call_timeout_s: float,
        fence: Fence = unfenced,
        forward_headers: frozenset[str] = frozenset(),
        open_timeout_s: float = OPEN_TIMEOUT_S,
        commit_after_s: float = COMMIT_AFTER_S,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        super().__init__(name, call_timeout_s=call_timeout_s, commit_after_s=commit_after_s)
        self._url = target.url
        self._http = HttpRequests(clients, target.headers, fence=fence, forward_headers=forward_headers, cookies={})
        self._open_timeout_s = open_timeout_s
        self._max_event_bytes = max_event_bytes
        self._endpoint = ""
        self._opening: asyncio.Future[None] | None = None
        self._postings: dict[asyncio.Task[None], _Posting] = {}
        self._by_stream: dict[LineStream, _Posting] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ignored = 0

    def __repr__(self) -> str:
        state = f"closed ({self._reason})" if self.is_closed else "open" if self._endpoint else "not yet open"
        return f"<SseLink {self.name!r} {state} {self._router!r}>"

    def statistics(self) -> SseStatistics:
        """A snapshot of the counts."""
        return SseStatistics(
            is_open=bool(self._endpoint) and not self.is_closed,
            is_closed=self.is_closed,
            sent=self._sent,
            received=self._received,
            invalid_events=self._invalid,
            ignored_events=self._ignored,
            posts=len(self._tasks),
            streams=self._router.statistics(),
        )

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """As `DuplexLink.post`. An answer of HTTP that is no success is the reply.

        Raises besides: `OpenFailed` (nothing was sent), when there is no connection or no session to be had.
        """
        try:
            await self._open(headers)
            return await super().post(message, body, headers)
        except Refused as refusal:
            # To clients a session that is gone is a 404, whatever it was to this server.
            status = 404 if refusal.status in GONE else refusal.status
            return Reply(status, refusal.headers, once(refusal.body))

    async def aclose(self) -> None:
        """End the session: 2 s at most. A cancelled wait changes nothing about the end."""
        self._end("it was closed")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)

    # Opening

    async def _open(self, headers: Headers) -> None:
        """Wait for the session. Who comes first opens it, for all; when that fails, who comes next tries again."""
        self._check_open()
        if self._endpoint:
            return
        if self._opening is None:
            self._opening = self._loop.create_future()
            self._spawn(self._hold(headers, self._opening))
        await asyncio.shield(self._opening)

    async def _hold(self, headers: Headers, opening: asyncio.Future[None]) -> None:
        """The task of the event stream: from before there is one to its end, which is the session's."""
        error: PoolError | None = None
        try:
            reason = await self._read(headers, opening)
        except (Fenced, Refused) as failure:
            error, reason = failure, ""
        except PoolError as failure:
            reason = str(failure)
        except (aiohttp.ClientError, OSError) as failure:
            reason = f"its event stream broke: {type(failure).__name__}"
        except Exception:
            logger.exception("event_stream_failed upstream=%s", self.name)
            reason = "its event stream could not be read"
        if opening.done():
            self._end(reason)
        else:
            self._opening, self._endpoint = None, ""
            opening.set_exception(error or OpenFailed(f"upstream {self.name!r}: cannot open a session: {reason}"))
            opening.exception()  # retrieved: who opened it may have left

    async def _read(self, headers: Headers, opening: asyncio.Future[None]) -> str:
        """Open the event stream and read it; returns why it ended."""
        response: ClientResponse | None = None
        splitter = EventSplitter(self._max_event_bytes)
        try:
            async with asyncio.timeout(self._open_timeout_s) as overdue:
                response = await open_stream(self._http, self._url, headers)
                while chunk := await response.content.readany():
                    for block in splitter.blocks(chunk):
                        self._on_event(block)
                    if splitter.overran:
                        return f"it sent an event of more than {self._max_event_bytes} bytes"
                    if self._endpoint and not opening.done():
                        overdue.reschedule(None)
                        opening.set_result(None)
        except TimeoutError:
            if opening.done():
                raise
            return f"no endpoint event came within {self._open_timeout_s:g} s"
        finally:
            if response is not None:
                response.close()
        return "its event stream ended"

    def _on_event(self, block: bytes) -> None:
        if not self._endpoint:
            block = block.removeprefix(BOM_UTF8)  # a stream may begin with one
        kind = event_type(block)
        if kind == b"message" and self._endpoint:
            self._receive(event_data(block))
        elif kind == b"endpoint" and not self._endpoint:
            self._endpoint = endpoint_url(self._url, event_data(block))
        else:
            self._ignored += 1

    def _on_invalid(self, data: bytes, error: InvalidMessage) -> None:
        # It may be somebody's data: described, not shown. The 1st, 2nd, 4th, ...: a server may say nothing else.
        if not self._invalid & (self._invalid - 1):
            count = self._invalid
            logger.warning(
                "event_skipped upstream=%s count=%d bytes=%d reason=%r", self.name, count, len(data), str(error)
            )

    # Towards the server

    def _start(self, stream: LineStream, body: bytes, headers: Headers) -> None:
        self._by_stream[stream] = self._post(body, headers, stream, read_timeout_s=None)

    def _post(
        self, body: bytes, headers: Headers, stream: LineStream | None = None, *, read_timeout_s: float | None
    ) -> _Posting:
        attempt = self._http.attempt(has_body=True)
        task = self._spawn(self._deliver(body, headers, attempt, read_timeout_s))
        posting = self._postings[task] = _Posting(attempt, task, stream)
        task.add_done_callback(self._on_posted)
        return posting

    async def _deliver(self, body: bytes, headers: Headers, attempt: Attempt, read_timeout_s: float | None) -> None:
        """Raises `PoolError`; `Refused` for what is no success."""
        response = await self._http.send(
            "POST", self._endpoint, headers, body, read_timeout_s=read_timeout_s, attempt=attempt
        )
        self._sent += 1
        answered = await beginning(response)
        if not 200 <= response.status < 300:
            raise Refused(response.status, reply_headers(response), answered)

    def _on_posted(self, task: asyncio.Task[None]) -> None:
        stream = self._postings.pop(task).stream
        if stream is None:  # somebody waits for the task itself
            return
        del self._by_stream[stream]
        error = None if task.cancelled() else task.exception()
        if error is None:
            return  # its answer comes by the event stream
        if not isinstance(error, PoolError):
            logger.error("post_failed upstream=%s", self.name, exc_info=error)
            error = UpstreamLost(f"upstream {self.name!r}: sending failed: {type(error).__name__}")
        stream.end(error)
        if _did_not_run(error):
            self._router.forget(stream)
        else:
            self._router.leave(stream)
        self._look_for_end(error)

    def _withdraw(self, stream: LineStream) -> bool:
        posting = self._by_stream.get(stream)
        return posting is not None and self._let_go_of(posting)

    def _let_go_of(self, posting: _Posting) -> bool:
        """Nobody waits for that POST any more. True if nothing of it was sent, and nothing will be."""
        if posting.attempt.withdraw():
            posting.task.cancel()
            return True
        timer = self._loop.call_later(POST_GRACE_S, posting.task.cancel)
        posting.task.add_done_callback(lambda _task: timer.cancel())
        return False

    async def _send(self, message: Message, body: bytes, headers: Headers) -> None:
        if message.method == "notifications/cancelled":
            await self._let_pass(message.params.get("requestId"))
            self._check_open()
        posting = self._post(body, headers, read_timeout_s=self._call_timeout_s)
        try:
            await asyncio.wait({posting.task})
        except asyncio.CancelledError:
            self._let_go_of(posting)
            raise
        if posting.task.cancelled():
            if posting.attempt.withdraw():
                raise self._session_closed()
            raise UpstreamLost(f"upstream {self.name!r}: {self._reason}")
        self._look_for_end(posting.task.exception())
        posting.task.result()

    async def _let_pass(self, id: object) -> None:  # noqa: A002
        """Wait a moment until the request of that id has been taken."""
        stream = self._stream_of(id)
        posting = None if stream is None else self._by_stream.get(stream)
        if posting is not None:
            await asyncio.wait({posting.task}, timeout=ORDER_TIMEOUT_S)

    def _look_for_end(self, error: BaseException | None) -> None:
        if isinstance(error, Refused) and error.status in GONE:
            self._end(f"the upstream knows it no more: HTTP status {error.status}")

    # The end

    def _drop_unsent(self, error: SessionClosed) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.set_exception(error)
            self._opening.exception()  # retrieved: who opened it may have left
        for posting in self._postings.values():
            if posting.attempt.withdraw() and posting.stream is not None:
                posting.stream.end(error)

    def _stop(self) -> None:
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine, name=f"leasehold-sse-{self.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _did_not_run(error: PoolError) -> bool:
    """Whether the server cannot have taken the request: a proxy in front of it answers 5xx also for one it took."""
    return error.status < 500 if isinstance(error, Refused) else error.outcome == "not_run"
