"""What comes out of a child's pipes: whole lines, and words for the log."""

from __future__ import annotations

import logging
from collections.abc import Callable

STRAY_LINE_CHARS = 2000
STRAY_LINE_BYTES = 4 * STRAY_LINE_CHARS
"""The same as bytes: 4 are the longest character."""
STRAY_LINES_PER_S = 100

_log = logging.getLogger("leasehold.pool.stderr")


class LineSplitter:
    """Joins chunks of a pipe to lines, in linear time; keeps at most `limit` bytes of an unfinished one."""

    def __init__(self, limit: int) -> None:
        self.overran = False
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newline. `overran` says that one was cut at the limit."""
        lines = data.split(b"\n")
        if len(lines) == 1:
            self._hold(data)
            return []
        self._hold(lines[0])
        lines[0] = self.rest()
        self._hold(lines.pop())
        return lines

    def rest(self) -> bytes:
        """Take what there is of the unfinished line."""
        line = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return line

    def _hold(self, data: bytes) -> None:
        room = self._limit - self._size
        if len(data) > room:
            self.overran = True
            data = data[:room]
        if data:
            self._parts.append(data)
            self._size += len(data)


class StrayLog:
    """Writes what a child says to humans into the log: bounded per line and per second, and the rest is counted."""

    def __init__(self, name: str, now: Callable[[], float]) -> None:
        self.lines = 0
        self.dropped = 0
        self._name = name
        self._now = now
        self._window_ends = 0.0
        self._room = 0
        self._unreported = 0

    def write(self, line: bytes, source: str = "stderr") -> None:
        """Log one line, or count it."""
        if not line.strip():
            return
        if self._now() >= self._window_ends:
            self.report()
            self._window_ends = self._now() + 1.0
            self._room = STRAY_LINES_PER_S
        if self._room == 0:
            self.dropped += 1
            self._unreported += 1
            return
        self._room -= 1
        self.lines += 1
        text = line[:STRAY_LINE_BYTES].decode(errors="replace").rstrip()[:STRAY_LINE_CHARS]
        # %r keeps control characters from forging lines of the log.
        _log.info("%s upstream=%s text=%r", source, self._name, text)

    def report(self) -> None:
        """Say how many lines were dropped since the last report."""
        if self._unreported:
            _log.warning("stderr_dropped upstream=%s lines=%d", self._name, self._unreported)
            self._unreported = 0
