"""ASGI types, and reading a request. The gateway is plain ASGI: its hot path is a relay, not a router."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from .errors import BodyTooLarge, Disconnected

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_DIGITS: Final = 18

WATCH_AFTER_S: Final = 0.05
"""Most answers come at once: only for those that take longer is it worth a task to see whether the client has left."""


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a header (`name` in lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def is_event_stream(headers: Headers) -> bool:
    """Whether a response with these headers is a stream of server-sent events."""
    return (header(headers, b"content-type") or b"").lower().startswith(b"text/event-stream")


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The whole body; raises `BodyTooLarge` above `limit` bytes (at once when the length is declared),
    `Disconnected`."""
    declared = header(headers, b"content-length")
    # Python refuses to read very long numbers; this one is too large in any case.
    if declared is not None and declared.isdigit() and (len(declared) > MAX_DIGITS or int(declared) > limit):
        raise BodyTooLarge(limit)
    first = await receive()
    if first["type"] == "http.disconnect":
        raise Disconnected
    body: bytes = first.get("body", b"")
    if not first.get("more_body", False):
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body
    pieces, size = [body], len(body)
    while True:
        if size > limit:
            raise BodyTooLarge(limit)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if not message.get("more_body", False):
            if size > limit:
                raise BodyTooLarge(limit)
            return b"".join(pieces)


async def respond(send: Send, status: int, body: bytes, headers: Headers, *, head_only: bool = False) -> None:
    """A complete response."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": b"" if head_only else body})


async def has_left(receive: Receive) -> bool:
    """Whether the client has gone by now; never waits for it. The body must be read."""
    try:
        async with asyncio.timeout(0):
            return (await receive())["type"] == "http.disconnect"
    except TimeoutError:
        return False


class until_disconnect:  # noqa: N801
    """Run the block until the client leaves; then the block is cancelled and `Disconnected` raised. The body must be
    read.

    As `asyncio.timeout`, with another cause: one timer for a block that ends soon, a task only for one that does not.
    """

    __slots__ = ("_cancelling", "_left", "_receive", "_task", "_timer", "_watch")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._left = False
        self._watch: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        # If somebody else cancelled the task too, that goes on.
        if self._left and self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise Disconnected from error

    def _start(self) -> None:
        self._watch = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._task.cancel()


class Kept:
    """Takes a response to a request of our own, instead of sending it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.body += message.get("body", b"")


async def silent() -> Message:
    """The `receive` of a request of our own, whose body is known and whose client does not leave."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError
