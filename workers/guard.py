"""The `is_success` guard: the one place that judges a reply, local or forwarded. It classifies and never rewrites.

* A status outside 2xx is an error whatever its body says.
* A 2xx JSON answer to a request must be one complete JSON-RPC response; 202 and 204 need no body.
* An event stream is judged event by event; the answer to the request decides. An early end is allowed: the client may
  resume.
"""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import Any, Final, Literal

from ..pool.jsonrpc import InvalidMessage, Message, parse
from ..pool.sse import EventSplitter, event_data, event_id
from .asgi import Message as AsgiMessage
from .asgi import Send, is_event_stream

Verdict = Literal["ok", "error", "incomplete"]

MAX_JUDGED: Final = 4 * 1024 * 1024
"""A JSON body (or event) above this is not parsed only to be counted; that it was complete is known from its
framing."""


def is_success(status: int, body: bytes, request: Message | None) -> bool:
    """Whether a whole JSON reply to `request` (None: to a notification or a response) is a success."""
    if not 200 <= status < 300:
        return False
    if request is None or status in (202, 204):
        return request is None
    return _answers(body, request)


def _answers(body: bytes, request: Message) -> bool:
    try:
        answer = parse(body)
    except InvalidMessage:
        return False
    return answer.kind == "response" and answer.id == request.id and "result" in answer.payload


class Guard:
    """Wraps `send` for one reply, and says afterwards what it was."""

    def __init__(self, send: Send, request: Message | None) -> None:
        self._send = send
        self.request = request
        self._status = 0
        self._body = bytearray()
        self._events: EventSplitter | None = None
        self._answer: Message | None = None
        """That came on an event stream."""
        self.complete = False
        self.last_event_id = b""
        """The id of the last event that set one, of a stream that answers a request."""
        self._began = monotonic()
        self.first_byte_s: float | None = None
        """Seconds from the request to the first byte of its answer."""

    @property
    def started(self) -> bool:
        """Whether the client has got a status: from then on only the stream itself can tell of an error."""
        return self._status != 0

    @property
    def is_stream(self) -> bool:
        return self._events is not None

    @property
    def status(self) -> int:
        return self._status

    @property
    def is_answered(self) -> bool:
        """Whether an event stream has answered the request."""
        return self._answer is not None

    @property
    def is_resumable(self) -> bool:
        """Whether an event stream that was cut off here can be gone on with after `last_event_id`."""
        stream = self._events
        return stream is not None and stream.is_between and self._answer is None and bool(self.last_event_id)

    @property
    def result(self) -> Any:
        """What the request was answered with; None before, and where it was by an error."""
        answer = self._answer
        if answer is None and self.complete and 200 <= self._status < 300 and len(self._body) <= MAX_JUDGED:
            with suppress(InvalidMessage):
                answer = parse(bytes(self._body))
        return None if answer is None else answer.payload.get("result")

    @property
    def verdict(self) -> Verdict:
        """`ok`, `error`, or `incomplete` when a stream ended before the answer."""
        if not 200 <= self._status < 300:
            return "error"
        if self._events is not None:
            if self.request is None:  # a GET stream has nothing to answer, and ends as its reader likes
                return "ok"
            return "incomplete" if self._answer is None else "ok" if "result" in self._answer.payload else "error"
        if not self.complete:
            return "incomplete"
        if len(self._body) > MAX_JUDGED:
            return "ok"
        return "ok" if is_success(self._status, bytes(self._body), self.request) else "error"

    async def send(self, message: AsgiMessage) -> None:
        """ASGI `send`: judge, and pass on as it is."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self.first_byte_s = monotonic() - self._began
            if is_event_stream(message.get("headers", [])):
                self._events = EventSplitter(MAX_JUDGED)
        else:
            body: bytes = message.get("body", b"")
            if self._events is not None:
                if self.request is not None and self._answer is None:
                    self._judge_events(body)
            elif len(self._body) <= MAX_JUDGED:
                self._body += body
            self.complete = not message.get("more_body", False)
        await self._send(message)

    def _judge_events(self, body: bytes) -> None:
        assert self._events is not None
        assert self.request is not None
        for block in self._events.blocks(body):
            named = event_id(block)
            if named is not None:
                self.last_event_id = named
            data = event_data(block)
            if not data:
                continue  # a priming event
            try:
                message = parse(data)
            except InvalidMessage:
                continue
            if message.kind == "response" and message.id == self.request.id:
                self._answer = message
                return
