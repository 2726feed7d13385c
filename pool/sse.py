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

# Atomic: the two halves of a CR LF are never taken for two line ends.
_BLANK = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE = re.compile(rb"\r\n|\n|\r")


def event(data: bytes) -> bytes:
    """One message event; `data` is one line of JSON."""
    return b"event: message\ndata: " + data + b"\n\n"


class EventSplitter:
    """Cuts a byte stream into events and yields the data of each; an event above `limit` bytes is passed over."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray()
        self._skipping = False
        self._after_cr = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of the events that `chunk` completes. To be iterated to its end."""
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
            data = b"" if self._skipping or len(block) > self._limit else event_data(block)
            self._skipping = False
            if data:
                yield data
        del pending[:consumed]
        if self._skipping or len(pending) > self._limit + 2:  # 2: as much of the blank line as may be here already
            del pending[:-3]
            self._skipping = True


def event_data(block: bytes) -> bytes:
    """The data of one event: its `data:` lines joined by newlines."""
    lines = [line[5:].removeprefix(b" ") for line in _LINE.split(block) if line.startswith(b"data:")]
    return b"\n".join(lines)


def events(body: bytes) -> Iterator[bytes]:
    """The data of all complete events in a whole body."""
    return EventSplitter(len(body) + 1).feed(body + b"\n\n")
