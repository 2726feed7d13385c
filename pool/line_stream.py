"""One client's stream: the lines that wait for it, and their face as server-sent events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import TracebackType

from .errors import CallTimeout
from .jsonrpc import Message, RequestId
from .sse import event

STREAM_BYTES = 8 << 20
"""What a stream holds for a slow client before it is ended; one message more may pass it, whatever its size."""


def _nothing() -> None:
    """The waker of a stream nobody waits on."""


class LineStream:
    """Lines on their way to one client: to the POST of request `id`, or to the GET stream (`id` is None)."""

    __slots__ = ("_lines", "_size", "as_events", "ended", "error", "id", "limit", "token", "wake")

    def __init__(
        self,
        id: RequestId | None = None,  # noqa: A002
        token: RequestId | None = None,
        *,
        limit: int = STREAM_BYTES,
    ) -> None:
        self.id = id
        # Invariant: never a bool, which as a key would equal the token 0 or 1.
        self.token = None if isinstance(token, bool) else token
        self.limit = limit
        self.wake: Callable[[], None] = _nothing
        self.as_events = False
        """Whether even a lone response is sent as an event."""
        self.ended = False
        self.error: Exception | None = None
        self._lines: deque[tuple[bytes, Message | None]] = deque()
        self._size = 0

    def __repr__(self) -> str:
        state = "ended" if self.ended else "open"
        return f"<LineStream id={self.id!r} {state} lines={len(self._lines)} bytes={self._size}>"

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def is_answer(self) -> bool:
        """True when all it holds, and ever will, is the response, and that may go as plain JSON."""
        return self.ended and self.error is None and len(self._lines) == 1 and not self.as_events

    def push(self, line: bytes, head: Message | None = None, *, last: bool = False) -> bool:
        """Add a line; false when the stream has ended or already holds its limit: then nothing was added. `head`: what
        was read of it, of a line that may have to go elsewhere."""
        if self.ended or self._size >= self.limit:
            return False
        self._lines.append((line, head))
        self._size += len(line)
        self.ended = last
        self.wake()
        return True

    def pop(self) -> bytes | None:
        """Take the oldest line; None when there is none (now, or for good if `ended`)."""
        if not self._lines:
            return None
        line, _ = self._lines.popleft()
        self._size -= len(line)
        return line

    def undelivered(self) -> list[tuple[Message, bytes]]:
        """Those lines that may go elsewhere, oldest first."""
        return [(head, line) for line, head in self._lines if head is not None]

    def end(self, error: Exception | None = None, *, discard: bool = False) -> None:
        """Take no more lines; `error` is raised once those it holds were read (none of them with `discard`)."""
        if self.ended:
            return
        self.ended = True
        self.error = error
        if discard:
            self._lines.clear()
            self._size = 0
        self.wake()


class EventStream(AsyncGenerator[bytes, None]):
    """A stream's lines as server-sent events.

    No generator function: one that is closed before its first step runs no clean-up.
    """

    def __init__(self, stream: LineStream, leave: Callable[[LineStream], None], *, timeout: float | None) -> None:
        self._stream = stream
        self._leave = leave
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._is_over = False

    async def ready(self, at_most: float | None = None) -> None:
        """Return as soon as there is a line, or `at_most` so many seconds later.

        Raises `CallTimeout`, the stream's error if it ended with one, StopAsyncIteration if it ended without.
        """
        stream = self._stream
        return_at = None if at_most is None else self._loop.time() + at_most
        while not len(stream):
            if stream.ended:
                raise stream.error or StopAsyncIteration
            now = self._loop.time()
            fail_at = None if self._timeout is None else self._heard_at + self._timeout
            if fail_at is not None and now >= fail_at:
                raise CallTimeout(f"the upstream was silent for {self._timeout:g} s")
            if return_at is not None and now >= return_at:
                return
            await self._woken(min((at for at in (fail_at, return_at) if at is not None), default=None))

    async def _woken(self, at: float | None) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self._stream.wake = wake
        timer = None if at is None else self._loop.call_at(at, wake)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()

    async def asend(self, value: None) -> bytes:
        """The next event; what `ready` raises, it raises."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            await self.ready()
        except BaseException:
            self._close()
            raise
        self._heard_at = self._loop.time()
        line = self._stream.pop()
        assert line is not None
        return event(line)

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> bytes:
        """End the stream, then raise as told."""
        self._close()
        error = val if isinstance(val, BaseException) else typ if isinstance(typ, BaseException) else typ()
        raise error.with_traceback(tb)

    async def aclose(self) -> None:
        """The client needs no more of it."""
        self._close()

    def _close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._leave(self._stream)
