"""What the pool has counted; the one source of its `repr`, of metrics and of listings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .breakers import BreakersStatistics
from .effects import Place
from .errors import PoolFull
from .session import PooledSession, State


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """One session. Times in seconds."""

    key: str
    upstream: str
    state: str
    in_flight: int
    age_s: float
    idle_s: float
    is_closed: bool


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Sessions now, and what happened since start. Times in seconds."""

    sessions: int
    """All that have not ended: idle, lent, kept, opening and closing ones together."""
    idle: int
    lent: int
    kept: int
    """Held under a key of their own: sessions of the gateway's clients, and those with an affinity."""
    opening: int
    closing: int
    in_flight: int
    waiting: int
    opened: int
    resumed: int
    """Continued from another owner's record."""
    loans: int
    reused: int
    """Loans of a session that was not opened for them."""
    refused: int
    """Callers turned away by a limit or a full queue."""
    waits: int
    wait_s: float
    """Time that callers have waited for a session, in all; a caller served at once did not wait."""
    longest_wait_s: float
    health_checks: int
    closed: dict[str, int]
    """By reason: `discarded`, `evicted`, `idle`, `max_age`, `unhealthy`, `lost`, `open_failed`, `shutdown`, ..."""
    oldest_s: float
    breakers: BreakersStatistics


@dataclass(slots=True)
class Counts:
    """What the pool counts as it goes."""

    opened: int = 0
    resumed: int = 0
    loans: int = 0
    reused: int = 0
    refused: int = 0
    waits: int = 0
    wait_s: float = 0.0
    longest_wait_s: float = 0.0
    health_checks: int = 0
    closed: Counter[str] = field(default_factory=Counter[str])

    def opening(self) -> None:
        self.opened += 1

    def resumption(self) -> None:
        self.resumed += 1

    def loan(self, session: PooledSession) -> None:
        self.loans += 1
        self.reused += not session.is_new
        session.is_new = False

    def check(self) -> None:
        self.health_checks += 1

    def waited(self, seconds: float) -> None:
        self.waits += 1
        self.wait_s += seconds
        self.longest_wait_s = max(self.longest_wait_s, seconds)

    def refusal(self, reason: str) -> PoolFull:
        """Count a refusal; the error to raise."""
        self.refused += 1
        return PoolFull(reason)

    def statistics(
        self,
        sessions: list[PooledSession],
        place_of: Callable[[PooledSession], Place | None],
        waiting: int,
        breakers: BreakersStatistics,
    ) -> PoolStatistics:
        places = Counter(_place(session, place_of(session)) for session in sessions)
        return PoolStatistics(
            sessions=len(sessions),
            idle=places[Place.IDLE],
            lent=places[Place.LENT],
            kept=places[Place.KEPT] + places[Place.SPARE],
            opening=places[None],
            closing=places[Place.CLOSING],
            in_flight=sum(session.in_flight for session in sessions),
            waiting=waiting,
            opened=self.opened,
            resumed=self.resumed,
            loans=self.loans,
            reused=self.reused,
            refused=self.refused,
            waits=self.waits,
            wait_s=self.wait_s,
            longest_wait_s=self.longest_wait_s,
            health_checks=self.health_checks,
            closed=dict(self.closed),
            oldest_s=max((session.age_s for session in sessions), default=0.0),
            breakers=breakers,
        )


def _place(session: PooledSession, place: Place | None) -> Place | None:
    """Where a session is; None while it is opened. One that has a key is in the books from the start, and one that is
    lost before its owner has closed it."""
    if session.state in (State.CLOSING, State.CLOSED):
        return Place.CLOSING
    return None if session.is_opening else place


def session_statistics(session: PooledSession) -> SessionStatistics:
    """A snapshot of one session."""
    return SessionStatistics(
        key=session.key,
        upstream=session.upstream.name,
        state=session.state.value,
        in_flight=session.in_flight,
        age_s=session.age_s,
        idle_s=session.idle_s,
        is_closed=session.is_closed,
    )
