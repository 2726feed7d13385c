"""Sessions that nobody has, in the order in which they were put there, so that the longest unused one is found at once:
of each slot, principal and upstream, and of all."""

from __future__ import annotations

from typing import Generic

from .effects import S, Scope, Slot


class Shelf(Generic[S]):
    """Sessions by scope. What is empty is forgotten, for principals come and go without end."""

    __slots__ = ("_sessions",)

    def __init__(self) -> None:
        self._sessions: dict[Scope, dict[S, None]] = {}

    def __repr__(self) -> str:
        return f"<Shelf sessions={len(self)}>"

    def __len__(self) -> int:
        return len(self._sessions.get(None, ()))

    def put(self, session: S, slot: Slot) -> None:
        """Behind all others."""
        for scope in scopes(slot):
            self._sessions.setdefault(scope, {})[session] = None

    def take(self, session: S, slot: Slot) -> None:
        for scope in scopes(slot):
            there = self._sessions[scope]
            del there[session]
            if not there:
                del self._sessions[scope]

    def first(self, scope: Scope) -> S | None:
        """The one that has been there longest."""
        return next(iter(self._sessions.get(scope, ())), None)

    def last(self, scope: Scope) -> S | None:
        """The one that was used last."""
        there = self._sessions.get(scope)
        return next(reversed(there)) if there else None

    def all(self) -> list[S]:
        """The longest unused one first."""
        return list(self._sessions.get(None, ()))


def scopes(slot: Slot) -> tuple[Scope, ...]:
    """Where a session of this slot counts."""
    return slot, (slot.upstream, slot.principal), slot.upstream, None
