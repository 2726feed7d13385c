"""Server-sent events, as far as a relay needs them: writing one, and finding the data of those that pass by.

Format: WHATWG HTML, "Server-sent events". Lines end in CR LF, LF or CR; a blank line ends an event.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

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
