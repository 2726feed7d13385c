"""How long to wait before what failed is tried again for nobody in particular."""

from __future__ import annotations

from typing import Final

from .clock import monotonic

FIRST_S: Final = 1.0
LONGEST_S: Final = 60.0


class Backoff:
    """A second after the first failure, doubled with each one after that, up to a minute."""

    __slots__ = ("_delay_s", "_until")

    def __init__(self) -> None:
        self._delay_s = 0.0
        self._until = 0.0

    def __repr__(self) -> str:
        return f"<Backoff {self.remaining_s:.1f} of {self._delay_s:g} s>"

    @property
    def remaining_s(self) -> float:
        """Seconds until the next try; 0 when it may be made."""
        return max(0.0, self._until - monotonic())

    def failed(self, lived_s: float = 0.0) -> None:
        """What was tried failed, or went well for so long and then ended. What fails together counts once; what went
        well for longer than the longest wait is no sequel to what was before."""
        if self.remaining_s:
            return
        self._delay_s = 0.0 if lived_s >= LONGEST_S else min(LONGEST_S, self._delay_s * 2 or FIRST_S)
        self._until = monotonic() + self._delay_s
