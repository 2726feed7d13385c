"""Comments on silent event streams, so that no proxy closes them: one every 15 s, between events only.

Sent where the client is connected and nowhere else: a comment of the owner's would cross the hop for nothing.
"""

from __future__ import annotations

import asyncio
from typing import Final

from ..pool.sse import BLANK_LINES, KEEPALIVE
from .asgi import Message, Send, is_event_stream

KEEPALIVE_EVERY_S: Final = 15.0


class StreamKeeper:
    """All open event streams of a worker; one task looks after them."""

    def __init__(self, every_s: float = KEEPALIVE_EVERY_S) -> None:
        self._every_s = every_s
        self._open: set[KeptResponse] = set()

    def wrap(self, send: Send) -> KeptResponse:
        """Wrap a response's `send`; what is no event stream passes unwatched. Close it in any case."""
        return KeptResponse(send, self._open)

    async def run(self) -> None:
        """Send comments until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._every_s / 3)
            silent = [kept for kept in self._open if loop.time() - kept.sent_at >= self._every_s * 2 / 3]
            # Side by side: a client that does not read keeps nobody else waiting.
            await asyncio.gather(*(kept.comment() for kept in silent))


class KeptResponse:
    """One response."""

    __slots__ = ("_loop", "_open", "_send", "_tail", "sent_at")

    def __init__(self, send: Send, streams: set[KeptResponse]) -> None:
        self._send = send
        self._open = streams
        self._tail = b"\n\n"
        self._loop = asyncio.get_running_loop()
        self.sent_at = 0.0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if is_event_stream(message.get("headers", [])):
                self._open.add(self)
                self.sent_at = self._loop.time()
        elif self in self._open:
            body: bytes = message.get("body", b"")
            if body:
                self._tail = (self._tail + body)[-4:] if len(body) < 4 else body[-4:]
                self.sent_at = self._loop.time()
            if not message.get("more_body", False):
                self._open.discard(self)
        try:
            await self._send(message)
        except BaseException:
            self._open.discard(self)
            raise

    def close(self) -> None:
        """The response is over, however it ended."""
        self._open.discard(self)

    async def comment(self) -> None:
        """Send a comment if the stream stands between two events; a client that does not read is left alone."""
        if not self._tail.endswith(BLANK_LINES):
            return
        self.sent_at = self._loop.time()
        try:
            async with asyncio.timeout(1.0):
                await self._send({"type": "http.response.body", "body": KEEPALIVE, "more_body": True})
        except (TimeoutError, OSError, RuntimeError):
            self._open.discard(self)
