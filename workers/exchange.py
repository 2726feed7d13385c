"""One exchange: an ASGI request that crosses to the owner, and its response that streams back.

Each end is a small object fed with frames by the reader, synchronously; the task that relays waits on it. Body bytes
go at most WINDOW ahead of the other end's credit, so a slow client costs memory once, not without bound.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import orjson

from ..coordinator.frames import (
    ABORT,
    FROM_OWNER,
    LAST,
    MAX_BODY,
    Frame,
    FrameType,
    RequestHead,
    encode,
    pack_head,
    pack_request,
)
from ..coordinator.outbox import Refusal
from .asgi import Message, Scope
from .errors import Disconnected, NotRun, OutcomeUnknown

WINDOW: Final = 4 * MAX_BODY
"""Body bytes an end may send before it gets credit: 256 KiB."""
CREDIT_EVERY: Final = MAX_BODY

HOP: Final = "leasehold.hop"
"""Scope key of a request that came by a hop; a client cannot set it. Its value is the `RequestHead`."""

CONTROL: Final = "control"
"""Stands for a session key in a request that is meant for the worker itself: keys are SHA-256 sums, so none is this."""

REPEAT: Final = "leasehold.repeat"
"""Scope key of a request of which an earlier try may have run: upstream it needs an id of its own."""

Post = Callable[[bytes], None]
"""Queues one encoded frame for the peer of an exchange."""


class _Wakeable:
    """A queue of frames with one waiter, and a failure that ends the waiting."""

    __slots__ = ("_failure", "_frames", "_waiter")

    def __init__(self) -> None:
        self._frames: deque[Frame] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    def feed(self, frame: Frame) -> None:
        self._frames.append(frame)
        self._wake()

    def fail(self, failure: BaseException) -> None:
        """End the exchange when all frames that came before have been read. The first failure stands."""
        if self._failure is None:
            self._failure = failure
            self._wake()

    async def next(self) -> Frame:
        while not self._frames:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._frames.popleft()

    def take_end(self) -> bool:
        """Take the END of a complete response, if it is the very next frame."""
        frames = self._frames
        if frames and frames[0].type is FrameType.END and not frames[0].flags & ABORT:
            frames.popleft()
            return True
        return False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class CallerExchange(_Wakeable):
    """The caller's end; also the outbox's ticket for its frames."""

    __slots__ = (
        "_body",
        "_credit",
        "_sent",
        "first_counter",
        "id",
        "last_counter",
        "peer",
        "post",
        "received",
        "request_counter",
    )

    def __init__(self, exchange_id: int, peer: str, body: bytes, post: Post) -> None:
        super().__init__()
        self.id = exchange_id
        self.peer = peer
        self.post = post
        self.request_counter = self.first_counter = self.last_counter = 0
        self.received = 0
        self._body = body
        self._sent = 0
        self._credit = WINDOW

    def refused(self, reason: Refusal) -> None:
        if reason is Refusal.IN_DOUBT:
            self.fail(OutcomeUnknown("the connection to Redis broke while the call was being handed over"))
        else:
            self.fail(NotRun(reason.value))

    def request_frame(self, head: RequestHead) -> bytes:
        """The REQUEST frame with the first piece of the body."""
        piece = self._body[:MAX_BODY]
        self._sent = len(piece)
        self._credit -= len(piece)
        flags = LAST if self._sent == len(self._body) else 0
        return encode(FrameType.REQUEST, self.id, pack_request(head, piece), flags)

    def send_body(self) -> None:
        """Send as much more of the body as there is credit for."""
        while self._sent < len(self._body) and self._credit > 0:
            piece = self._body[self._sent : self._sent + min(MAX_BODY, self._credit)]
            self._sent += len(piece)
            self._credit -= len(piece)
            flags = LAST if self._sent == len(self._body) else 0
            self.post(encode(FrameType.BODY, self.id, piece, flags))

    def grant(self, size: int) -> None:
        """`size` bytes of the response have reached the client: let the owner send as many more."""
        self.received += size
        if self.received >= CREDIT_EVERY:
            self.post(encode(FrameType.CREDIT, self.id, self.received.to_bytes(4, "big")))
            self.received = 0

    def credited(self, frame: Frame) -> None:
        self._credit += int.from_bytes(frame.payload, "big")
        self.send_body()

    def peer_read(self, unread: frozenset[int]) -> bool:
        """Whether the dead peer may have run it: its REQUEST was pushed and is not among those it had not read."""
        return self.request_counter != 0 and self.request_counter not in unread


class OwnerExchange(_Wakeable):
    """The owner's end: gives the application its `receive` and `send`."""

    __slots__ = (
        "_body",
        "_body_done",
        "_consumed",
        "_credit",
        "_credit_waiter",
        "_ended",
        "first_counter",
        "head",
        "id",
        "last_counter",
        "peer",
        "post",
        "request_counter",
    )

    def __init__(self, exchange_id: int, peer: str, head: RequestHead, body: bytes, *, last: bool, post: Post) -> None:
        super().__init__()
        self.id = exchange_id
        self.peer = peer
        self.head = head
        self.post = post
        self.request_counter = self.first_counter = self.last_counter = 0
        self._body: bytes | None = body
        self._body_done = last
        self._consumed = 0
        self._credit = WINDOW
        self._credit_waiter: asyncio.Future[None] | None = None
        self._ended = False

    def refused(self, reason: Refusal) -> None:
        """An owner sends no REQUEST; nothing to do."""

    @property
    def scope(self) -> Scope:
        head = self.head
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": head.method,
            "scheme": head.scheme,
            "path": head.path,
            "raw_path": head.path.encode(),
            "query_string": head.query.encode("latin-1"),
            "root_path": head.root_path,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers],
            "client": head.client,
            "server": None,
            HOP: head,
        }
        if head.repeat:
            scope[REPEAT] = True
        return scope

    async def receive(self) -> Message:
        """ASGI `receive`: the body's pieces in order, then `http.disconnect` when the caller has gone."""
        if self._body is not None:
            piece, self._body = self._body, None
            self._consume(len(piece))
            return {"type": "http.request", "body": piece, "more_body": not self._body_done}
        try:
            frame = await self.next()
        except Disconnected:
            return {"type": "http.disconnect"}
        self._body_done = bool(frame.flags & LAST)
        self._consume(len(frame.payload))
        return {"type": "http.request", "body": frame.payload, "more_body": not self._body_done}

    async def send(self, message: Message) -> None:
        """ASGI `send`. Waits for credit; raises `Disconnected` after the caller has gone."""
        if message["type"] == "http.response.start":
            payload = pack_head(message["status"], list(message.get("headers", ())))
            self.post(encode(FrameType.HEAD, self.id, payload, FROM_OWNER))
            return
        body: bytes = message.get("body", b"")
        position = 0
        while position < len(body):
            await self._wait_credit()
            if self._failure is not None:
                raise self._failure
            piece = body[position : position + min(MAX_BODY, self._credit)]
            position += len(piece)
            self._credit -= len(piece)
            self.post(encode(FrameType.CHUNK, self.id, piece, FROM_OWNER))
        if not message.get("more_body", False):
            self.end()

    def end(self, *, abort: bool = False) -> None:
        """Say that the response is complete, or with `abort` that it broke off. Once."""
        if not self._ended:
            self._ended = True
            self.post(encode(FrameType.END, self.id, b"", FROM_OWNER | (ABORT if abort else 0)))

    def refuse(self, reason: str) -> None:
        """Say that the request was not run after all. Only before a response."""
        if not self._ended:
            self._ended = True
            self.post(nack(self.id, reason))

    def credited(self, frame: Frame) -> None:
        self._credit += int.from_bytes(frame.payload, "big")
        self._wake_credit()

    def disconnect(self) -> None:
        """The caller is gone: `receive` says so, and waiting for its credit ends."""
        self.fail(Disconnected())
        self._wake_credit()

    async def _wait_credit(self) -> None:
        while self._credit <= 0 and self._failure is None:
            self._credit_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._credit_waiter
            finally:
                self._credit_waiter = None

    def _wake_credit(self) -> None:
        if self._credit_waiter is not None and not self._credit_waiter.done():
            self._credit_waiter.set_result(None)

    def _consume(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= CREDIT_EVERY and not self._body_done:
            self.post(encode(FrameType.CREDIT, self.id, self._consumed.to_bytes(4, "big"), FROM_OWNER))
            self._consumed = 0


def nack(exchange_id: int, reason: str, owner: str = "", epoch: int = 0) -> bytes:
    """A NACK frame; `owner` and `epoch` name the registration that stands, where it is known."""
    return encode(FrameType.NACK, exchange_id, orjson.dumps([reason, owner, epoch]), FROM_OWNER)


def read_nack(frame: Frame) -> tuple[str, str, int]:
    """(reason, owner, epoch) of a NACK frame."""
    values: Any = orjson.loads(frame.payload)
    return str(values[0]), str(values[1]), int(values[2])
