"""How many sessions count, and the limits that forbid one more."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from .effects import Limits, Scope, Slot

K = TypeVar("K")


class Tally:
    """The counts of one pool. What has come to nothing is forgotten, for principals come and go without end."""

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self.limits: dict[Slot, Limits] = {}
        """Of each slot that is used. What they count is what has the same name, whatever its settings."""
        self.total = 0
        self.per_slot: Counter[Slot] = Counter()
        self._per_upstream: Counter[str] = Counter()
        self._per_principal: Counter[tuple[str, str]] = Counter()

    def __repr__(self) -> str:
        return f"<Tally total={self.total}>"

    def __bool__(self) -> bool:
        return any((self.total, self.per_slot, self._per_upstream, self._per_principal))

    def count(self, slot: Slot) -> None:
        """One more of this slot."""
        self.total += 1
        self._per_upstream[slot.upstream] += 1
        self._per_principal[slot.upstream, slot.principal] += 1
        self.per_slot[slot] += 1

    def uncount(self, slot: Slot) -> None:
        """One less."""
        self.total -= 1
        take_one(self._per_upstream, slot.upstream)
        take_one(self._per_principal, (slot.upstream, slot.principal))
        take_one(self.per_slot, slot)

    def blocked_by(self, slot: Slot, *, less: int = 0) -> str | None:
        """The limit that forbids one more session of this slot, in words; None if there is room, or will be with so
        many `less`."""
        limits = self.limits[slot]
        if self.total - less >= self.max_sessions:
            return f"{self.max_sessions} sessions on this worker"
        if self._per_upstream[slot.upstream] - less >= limits.sessions:
            return f"{limits.sessions} sessions of {slot.upstream}"
        per_principal = limits.per_principal
        if per_principal is not None and self._per_principal[slot.upstream, slot.principal] - less >= per_principal:
            return f"{per_principal} sessions of {slot.upstream} per principal"
        return None

    def scope_in_the_way(self, slot: Slot) -> Scope:
        """Where sessions have to end before there is room for one of this slot."""
        limits = self.limits[slot]
        if limits.per_principal is not None:
            principal = (slot.upstream, slot.principal)
            if self._per_principal[principal] >= limits.per_principal:
                return principal
        return slot.upstream if self._per_upstream[slot.upstream] >= limits.sessions else None


def take_one(counter: Counter[K], key: K) -> None:
    """Count one down; what has come to nothing is forgotten."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
