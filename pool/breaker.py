"""The circuit breaker (B16): what has failed again and again is not tried by every call, but by one now and then.

    CLOSED --`threshold` failures in a row--> OPEN --its time is over: one probe--> HALF_OPEN
       ^                                       ^------the probe failed, or was given up----|
       `--------------------------------the probe succeeded--------------------------------'

A call asks for a permit, and says by it how it ended. Only failures of the connection or transport count; an upstream
that answers, whatever it answers, has not failed; a call that ended otherwise (cancelled, fenced, timed out while the
upstream worked) says nothing. The results of calls that began before the last opening come late, and change nothing.

Synchronous, for one thread. Nothing here waits: time is looked at when somebody asks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from math import inf
from types import TracebackType
from typing import Final

from .clock import monotonic
from .errors import CircuitOpen, OpenFailed, UpstreamLost

TRANSPORT_FAILURES: Final = (OpenFailed, UpstreamLost)
"""What counts, of that which the pool raises."""
JITTER: Final = 0.2
"""By up to this share an opening is shorter than it could be, so that workers do not come back all at once."""
SOON_S: Final = 1.0
"""What a refused caller is told while the probe is out: how long that takes is not known."""


class BreakerState(Enum):
    """OPEN lasts until a probe is made, also when its time is over; HALF_OPEN: the probe is out."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """How much a breaker bears, and for how long it opens: doubled with each probe that fails."""

    threshold: int = 5
    """Failures in a row."""
    open_s: float = 1.0
    max_open_s: float = 60.0
    probe_s: float = 30.0
    """A probe whose result is not known after this long is no longer waited for."""


@dataclass(frozen=True, slots=True)
class BreakerStatistics:
    """A breaker now (`age_s`: since when it is in its state), and what it has done since it was made."""

    state: BreakerState
    age_s: float
    failures: int
    """In a row, so far."""
    retry_after_s: float
    opened: int
    """By failures seen here."""
    refused: int


class Permit:
    """Leave to make one call. Say how it ended, or use it as a context manager: `TRANSPORT_FAILURES` count, other
    exceptions say nothing, and leaving without one is a success.

    Success may be told as soon as the upstream has answered at all. What is told once more changes nothing, but that
    failures after an early success count while the breaker is closed: that connection did break.
    """

    # While the breaker is closed, all calls have the same permit: a new one is made with each opening. So neither
    # admission nor success makes an object, and what comes late is known by its permit.
    __slots__ = ("_breaker",)

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker

    def succeeded(self) -> None:
        """The upstream answered."""
        self._breaker.settle_success(self)

    def failed(self, event: Hashable = None) -> None:
        """The connection could not be made, or broke.

        `event` names what broke where that hits many calls at once (a process, a stream): it counts once.
        """
        self._breaker.settle_failure(self, event)

    def abandoned(self) -> None:
        """Nothing is known: the call was cancelled, or never made. A probe may be made by the next caller."""
        self._breaker.settle_nothing(self)

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._breaker.settle_success(self)
        elif issubclass(kind, TRANSPORT_FAILURES):
            self._breaker.settle_failure(self, None)
        else:
            self._breaker.settle_nothing(self)


class Breaker:
    """One circuit. `name` says in messages what is not tried; it may hold no secret."""

    def __init__(
        self,
        name: str,
        settings: BreakerSettings = BreakerSettings(),
        *,
        now: Callable[[], float] = monotonic,
        chance: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.name = name
        self.settings = settings
        self.state = BreakerState.CLOSED
        self.failures = 0
        self.succeeded_at = -inf
        """When a call succeeded last (`now`)."""
        self.openings = 0
        """Openings since it was closed last: what the time of the next one depends on."""
        self.opened_at = -inf
        """When it opened last, or was told to have opened (`now`)."""
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change of `state`, and when one probe takes another's place."""
        self.may_probe: Callable[[], bool] = lambda: True
        """Asked before a probe is let through: whether nobody else is to make it."""
        self._now = now
        self._chance = chance
        self._changed_at = now()
        self._due_at = 0.0
        self._permit = Permit(self)
        self._probe: Permit | None = None
        self._events: set[Hashable] = set()
        self._opened = self._refused = 0

    def __repr__(self) -> str:
        seconds = self._now() - self._changed_at
        parts = [f"{self.name} {self.state.value} for {seconds:.1f} s, failures={self.failures}"]
        if self.state is BreakerState.OPEN:
            parts.append(f"retry in {self.retry_after_s:.1f} s" if self.retry_after_s else "the next call is a probe")
        return f"<Breaker {', '.join(parts)}>"

    def statistics(self) -> BreakerStatistics:
        return BreakerStatistics(self.state, self.age_s, self.failures, self.retry_after_s, self._opened, self._refused)

    @property
    def age_s(self) -> float:
        """Seconds since the last change of state; HALF_OPEN: since the probe began."""
        return self._now() - self._changed_at

    @property
    def retry_after_s(self) -> float:
        """Seconds until a probe is due; 0 unless OPEN."""
        return max(0.0, self._due_at - self._now()) if self.state is BreakerState.OPEN else 0.0

    def admit(self) -> Permit:
        """Leave to make a call; raises `CircuitOpen`. Every permit but a lost one is to be settled."""
        if self.state is BreakerState.CLOSED:
            return self._permit
        return self._admit_probe()

    def open_for(self, seconds: float, *, openings: int, age_s: float = 0.0) -> None:
        """Open because somebody else knows better; once open, change until when. What is in flight counts no more.

        `openings`: how many there were in a row; the last was `age_s` ago. 0 seconds: the next call is a probe. No
        effect while a probe of our own is out: that will be newer.
        """
        if self.state is BreakerState.HALF_OPEN:
            return
        self.openings = max(1, openings)
        due_at = self._now() + seconds
        if self.state is BreakerState.CLOSED:
            self.opened_at = self._now() - age_s
            self._turn(BreakerState.OPEN, due_at)
        else:
            self._due_at = due_at

    def close(self) -> None:
        """Close because somebody else's probe has succeeded. A probe of our own that is out counts no more."""
        if self.state is not BreakerState.CLOSED:
            self._close()

    # -- results ---------------------------------------------------------------------------------------------------

    def settle_success(self, permit: Permit) -> None:
        """`Permit.succeeded`."""
        if permit is self._permit:
            self.succeeded_at = self._now()
            if self.failures:
                self.failures = 0
                self._events.clear()
        elif permit is self._probe:
            self.succeeded_at = self._now()
            self._close()

    def settle_failure(self, permit: Permit, event: Hashable) -> None:
        """`Permit.failed`."""
        if permit is self._permit:
            if event is not None:
                if event in self._events:
                    return
                self._events.add(event)  # at most `threshold` of them
            self.failures += 1
            if self.failures >= self.settings.threshold:
                self._open()
        elif permit is self._probe:
            self.failures += 1
            self._open()

    def settle_nothing(self, permit: Permit) -> None:
        """`Permit.abandoned`."""
        if permit is self._probe:
            self._turn(BreakerState.OPEN, self._now())

    # -- transitions -----------------------------------------------------------------------------------------------

    def _admit_probe(self) -> Permit:
        now = self._now()
        if self.state is BreakerState.HALF_OPEN and now - self._changed_at < self.settings.probe_s:
            raise self._refusal(SOON_S)
        if now < self._due_at:
            raise self._refusal(self._due_at - now)
        if not self.may_probe():
            raise self._refusal(SOON_S)
        self.state = BreakerState.HALF_OPEN
        self._changed_at = now
        probe = self._probe = Permit(self)
        self.on_change()
        return probe

    def _refusal(self, retry_after_s: float) -> CircuitOpen:
        self._refused += 1
        return CircuitOpen(f"{self.name} is failing: it is not tried for another {retry_after_s:.1f} s", retry_after_s)

    def _open(self) -> None:
        self.openings += 1
        self._opened += 1
        self.opened_at = self._now()
        settings = self.settings
        longest = min(settings.max_open_s, settings.open_s * 2 ** min(self.openings - 1, 32))
        self._turn(BreakerState.OPEN, self.opened_at + longest * self._chance(1 - JITTER, 1))

    def _close(self) -> None:
        self.failures = self.openings = 0
        self._turn(BreakerState.CLOSED, 0.0)

    def _turn(self, state: BreakerState, due_at: float) -> None:
        self.state = state
        self._changed_at = self._now()
        self._due_at = due_at
        self._probe = None
        self._permit = Permit(self)  # permits given out before tell nothing any more
        self._events.clear()
        self.on_change()
