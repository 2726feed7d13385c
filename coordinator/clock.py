"""Time. Monotonic inside a worker, the time of the Redis node for what workers share; wall clocks never decide.

`monotonic()` counts suspended time too where the system can (CLOCK_BOOTTIME): a machine that slept finds its lease
over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)


def monotonic() -> float:
    """Seconds since an arbitrary point; never goes back, and counts time spent suspended where the system can tell."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


@dataclass(slots=True)
class RedisClock:
    """What this worker knows of the Redis node's time, and since when it has known that node.

    The estimate errs by at most one round trip, and only towards the past: a deadline is never met early by it.
    """

    now: Callable[[], float] = monotonic
    run_id: str = ""
    known_since: float = field(default=float("inf"))
    _offset_ms: float = 0.0

    def observe(self, run_id: str, time_ms: int, received_at: float) -> bool:
        """Note a node's `run_id` and TIME; `received_at` is `monotonic()` at the answer. True if the node is new."""
        changed = run_id != self.run_id
        if changed:
            self.run_id = run_id
            self.known_since = received_at
        self._offset_ms = time_ms - received_at * 1000
        return changed

    def forget(self) -> None:
        """The connection broke: what is missing from now on may be missing because another node answers."""
        self.known_since = float("inf")
        self.run_id = ""

    def time_ms(self) -> int:
        """The node's time now, in milliseconds."""
        return int(self.now() * 1000 + self._offset_ms)

    @property
    def node(self) -> int:
        """A short name of the node: deadlines of different nodes cannot be compared."""
        return crc32(self.run_id.encode())

    def known_for(self) -> float:
        """Seconds since which the same node answers; 0 when none does."""
        return max(0.0, self.now() - self.known_since)
