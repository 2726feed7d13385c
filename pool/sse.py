"""Server-sent events, as far as a relay needs them: writing one, and finding the data of those that pass by.

Format: WHATWG HTML, "Server-sent events". Lines end in CR LF, LF or CR; a blank line ends an event.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

KEEPALIVE: Final = b": keepalive\n\n"
"""A comment: keeps proxies from closing a silent stream, and means nothing to clients."""

STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]

BLANK_LINES: Final = (b"\n\n", b"\n\r\n", b"\r\r", b"\r\r\n")
"""What a stream ends in when a comment may be put in without splitting an event."""

# The two halves of a CR LF are never taken for two line ends. Written out: an atomic group, (?>...){2}, says the same
# and takes seven times as long to search.
_BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")


def is_event_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a response with these headers (names in lower case) is a stream of server-sent events."""
    for name, value in headers:
        if name == b"content-type":
            return value.lower().startswith(b"text/event-stream")
    return False


def event(data: bytes) -> bytes:
    """One message event; `data` is one line of JSON."""
    return b"event: message\ndata: " + data + b"\n\n"


class EventSplitter:
    """Cuts a byte stream into events and yields the data of each; an event above `limit` bytes is passed over."""

    def __init__(self, limit: int) -> None:
        self.overran = False
        """Whether an event was passed over."""
        self._limit = limit
        self._pending = bytearray()
        self._skipping = False
        self._after_cr = False

    @property
    def is_between(self) -> bool:
        """Whether the stream stands between two events."""
        return not self._pending and not self._skipping

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of the events that `chunk` completes. To be iterated to its end."""
        for block in self.blocks(chunk):
            data = event_data(block)
            if data:
                yield data

    def blocks(self, chunk: bytes) -> Iterator[bytes]:
        """The events that `chunk` completes, as they came. To be iterated to its end."""
        if self._after_cr and chunk:
            # The CR that ended the last event was the first half of a CR LF.
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        pending = self._pending
        # A blank line may straddle the chunks: search again from just before the seam.
        start = max(0, len(pending) - 3)
        pending += chunk
        consumed = 0
        while match := _BLANK.search(pending, max(start, consumed)):
            block = bytes(pending[consumed : match.start()])
            consumed = match.end()
            self._after_cr = match[0].endswith(b"\r") and consumed == len(pending)
            self._skipping = self._skipping or len(block) > self._limit
            self.overran = self.overran or self._skipping
            if not self._skipping:
                yield block
            self._skipping = False
        del pending[:consumed]
        if self._skipping or len(pending) > self._limit + 2:  # 2: as much of the blank line as may be here already
            del pending[:-3]
            self._skipping = self.overran = True


class Piece(NamedTuple):
    """A part of a stream, as the bytes it came as."""

    data: bytes
    is_event: bool
    """One event, whole, with the blank line after it."""
    ends: bool
    """Whether the stream stands between two events after it."""


class EventCutter:
    """Cuts a byte stream into its events and changes nothing; an event above `limit` bytes comes in several pieces."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray()
        self._torn = False

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """The events that `chunk` completes. To be iterated to its end."""
        pending = self._pending
        start = max(0, len(pending) - 3)
        pending += chunk
        consumed = 0
        while match := _BLANK.search(pending, max(start, consumed)):
            piece = Piece(bytes(pending[consumed : match.end()]), not self._torn, ends=True)
            consumed = match.end()
            self._torn = False
            yield piece
        del pending[:consumed]
        if len(pending) > 3 and (self._torn or len(pending) > self._limit):
            self._torn = True
            piece = Piece(bytes(pending[:-3]), is_event=False, ends=False)
            del pending[:-3]
            yield piece

    def rest(self) -> bytes:
        """What has come of an event that is not complete; it is given once."""
        rest = bytes(self._pending)
        self._pending.clear()
        return rest


def event_id(block: bytes) -> bytes | None:
    """The id that an event sets; None where it sets none."""
    if not (block.startswith(b"id:") or b"\nid:" in block or b"\rid:" in block):
        return None
    ids = [line[3:].removeprefix(b" ") for line in block.splitlines() if line.startswith(b"id:")]
    return next((each for each in reversed(ids) if b"\0" not in each), None)


def has_data(block: bytes) -> bool:
    """Whether an event says something: others only set an id or a time, or are comments."""
    return block.startswith(b"data:") or b"\ndata:" in block or b"\rdata:" in block


def event_data(block: bytes) -> bytes:
    """The data of one event: its `data:` lines joined by newlines."""
    lines = [line[5:].removeprefix(b" ") for line in block.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)


def event_type(block: bytes) -> bytes:
    """The type of one event: `message` where it names none."""
    types = [line[6:].removeprefix(b" ") for line in block.splitlines() if line.startswith(b"event:")]
    return (types[-1] if types else b"") or b"message"


def with_data(block: bytes, data: bytes) -> bytes:
    """An event with other data (one line): its id, type and retry stay."""
    kept = [line for line in block.splitlines() if not line.startswith(b"data:")]
    return b"\n".join([*kept, b"data: " + data, b"", b""])


def events(body: bytes) -> Iterator[bytes]:
    """The data of all complete events in a whole body."""
    return EventSplitter(len(body) + 1).feed(body + b"\n\n")
