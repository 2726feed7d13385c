"""Which client stream gets which message of a server with one output for everything (stdio, SSE): synchronous, no I/O.

A response names its request and a progress notification its token; any other message names nobody, and goes to the
only request in flight, else to the GET stream, else to the oldest open request stream, else into a backlog that the
next stream to open receives.

A request whose client has left, or waited too long, is still in flight at the server. Its id stays taken until its
late response came, which is then dropped: a reused id would hand the old answer to the new request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .errors import UpstreamLost
from .jsonrpc import Message, RequestId
from .line_stream import LineStream

BACKLOG_MESSAGES = 256
BACKLOG_BYTES = 8 << 20
ABANDONED_IDS = 1024
SERVER_REQUESTS = 1024


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """What a router holds, and what it has dropped so far."""

    in_flight: int = 0
    abandoned: int = 0
    backlog: int = 0
    listening: bool = False
    late_responses: int = 0
    unmatched_responses: int = 0
    late_progress: int = 0
    backlog_dropped: int = 0
    slow_streams: int = 0


class Router:
    """The open streams of one session, and the rule that gives each server message to one of them."""

    def __init__(self) -> None:
        # Invariant: ids compare as JSON does ("1" is not 1); `classify` lets no bool or float become a key.
        self._open: dict[RequestId, LineStream] = {}
        self._abandoned: dict[RequestId, LineStream] = {}
        self._tokens: dict[RequestId, LineStream] = {}
        self._listener: LineStream | None = None
        self._server_requests: dict[RequestId, LineStream] = {}
        self._backlog: deque[tuple[Message, bytes]] = deque()
        self._backlog_size = 0
        self._late_responses = 0
        self._unmatched_responses = 0
        self._late_progress = 0
        self._backlog_dropped = 0
        self._slow_streams = 0

    def __repr__(self) -> str:
        return (
            f"<Router in_flight={len(self._open)} abandoned={len(self._abandoned)} backlog={len(self._backlog)}"
            f" listening={self.is_listening}>"
        )

    def statistics(self) -> RouterStatistics:
        """A snapshot of the counts."""
        return RouterStatistics(
            in_flight=len(self._open),
            abandoned=len(self._abandoned),
            backlog=len(self._backlog),
            listening=self.is_listening,
            late_responses=self._late_responses,
            unmatched_responses=self._unmatched_responses,
            late_progress=self._late_progress,
            backlog_dropped=self._backlog_dropped,
            slow_streams=self._slow_streams,
        )

    @property
    def is_listening(self) -> bool:
        """True while a GET stream is open."""
        return self._listener is not None

    def is_taken(self, id: RequestId) -> bool:  # noqa: A002
        """True while the server may still answer a request of this id."""
        return id in self._open or id in self._abandoned

    def find(self, id: RequestId) -> LineStream | None:  # noqa: A002
        """The open stream of a request."""
        return self._open.get(id)

    def requests(self) -> list[LineStream]:
        """The open streams of all requests, oldest first."""
        return list(self._open.values())

    def open(self, stream: LineStream) -> None:
        """Let a request's stream, or the GET stream, receive messages: the backlog first."""
        if stream.id is None:
            assert self._listener is None
            self._listener = stream
        else:
            assert not self.is_taken(stream.id)
            self._open[stream.id] = stream
            if stream.token is not None:
                self._tokens[stream.token] = stream
        backlog, self._backlog, self._backlog_size = self._backlog, deque(), 0
        for message, line in backlog:
            self.route(message, line)

    def leave(self, stream: LineStream) -> None:
        """The client went away or gave up. The id of a request stays taken until its late response; what waited on the
        GET stream goes where it would have gone without."""
        undelivered = stream.undelivered()
        stream.end(discard=True)
        if stream.id is None:
            if self._listener is stream:
                self._listener = None
                for message, line in undelivered:
                    self.route(message, line)
        elif self._open.get(stream.id) is stream:
            del self._open[stream.id]
            self._abandoned[stream.id] = stream
            if len(self._abandoned) > ABANDONED_IDS:
                self._forget_token(self._abandoned.pop(next(iter(self._abandoned))))

    def forget(self, stream: LineStream) -> None:
        """Free the id of a request that was never sent."""
        stream.end(discard=True)
        if stream.id is not None:
            for streams in (self._open, self._abandoned):
                if streams.get(stream.id) is stream:
                    del streams[stream.id]
            self._forget_token(stream)

    def answered(self, id: RequestId | None) -> None:  # noqa: A002
        """The client has answered this request of the server."""
        if id is not None:
            self._server_requests.pop(id, None)

    def settle(self, stream: LineStream, line: bytes) -> None:
        """End a request's stream with a response that the server did not give; its late one will be dropped."""
        assert stream.id is not None
        if self._open.get(stream.id) is stream:
            self._finish(stream, line)
            self._abandoned[stream.id] = self._open.pop(stream.id)

    def end(self, reason: str) -> None:
        """The session is over: requests in flight end with `UpstreamLost`, the GET stream just ends."""
        for stream in self._open.values():
            stream.end(UpstreamLost(reason))
        if self._listener is not None:
            self._listener.end()
        self._listener = None
        for streams in (self._open, self._abandoned, self._tokens, self._server_requests):
            streams.clear()
        self._backlog.clear()
        self._backlog_size = 0

    def route(self, message: Message, line: bytes) -> None:
        """Give one server message to the stream it belongs to."""
        if message.kind == "response":
            self._route_response(message.id, line)
            return
        if message.method == "notifications/progress":
            stream = _find(self._tokens, message.params.get("progressToken"))
            if stream is not None:
                if not self._give(stream, line):
                    self._late_progress += 1
                return
        elif message.method == "notifications/cancelled":
            stream = _find(self._server_requests, message.params.get("requestId"))
            if stream is not None and self._give(stream, line, message):
                return
        while (stream := self._any_stream()) is not None:
            if self._give(stream, line, message):
                if message.kind == "request" and message.id is not None:
                    self._server_requests[message.id] = stream
                    if len(self._server_requests) > SERVER_REQUESTS:
                        del self._server_requests[next(iter(self._server_requests))]
                return
        self._backlog.append((message, line))
        self._backlog_size += len(line)
        while len(self._backlog) > BACKLOG_MESSAGES or (self._backlog_size > BACKLOG_BYTES and len(self._backlog) > 1):
            self._backlog_size -= len(self._backlog.popleft()[1])
            self._backlog_dropped += 1

    def _route_response(self, id: RequestId | None, line: bytes) -> None:  # noqa: A002
        stream = None if id is None else self._open.pop(id, None)
        if stream is not None:
            self._finish(stream, line)
            self._forget_token(stream)
        elif id is not None and id in self._abandoned:
            self._forget_token(self._abandoned.pop(id))
            self._late_responses += 1
        else:
            self._unmatched_responses += 1

    def _any_stream(self) -> LineStream | None:
        if len(self._open) == 1 or (self._open and self._listener is None):
            return next(iter(self._open.values()))
        return self._listener

    def _give(self, stream: LineStream, line: bytes, head: Message | None = None) -> bool:
        """Push a line that is not the last; a stream that is full ends here, so that no other waits for its client."""
        if stream.push(line, head if stream.id is None else None):
            return True
        if not stream.ended:
            self._end_slow(stream)
            self.leave(stream)
        return False

    def _finish(self, stream: LineStream, line: bytes) -> None:
        if not stream.push(line, last=True) and not stream.ended:
            self._end_slow(stream)

    def _end_slow(self, stream: LineStream) -> None:
        self._slow_streams += 1
        stream.end(UpstreamLost(f"the client read too slowly: {stream.limit} bytes were waiting for it"), discard=True)

    def _forget_token(self, stream: LineStream) -> None:
        if stream.token is not None and self._tokens.get(stream.token) is stream:
            del self._tokens[stream.token]


def _find(streams: dict[RequestId, LineStream], key: object) -> LineStream | None:
    """The stream under a progress token or request id as a peer sent it: of any type."""
    return streams.get(key) if isinstance(key, str | int) and not isinstance(key, bool) else None
