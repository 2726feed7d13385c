"""What the books of a pool (`ledger.py`) are about, slots, places and limits, and what they decide: data only."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)
"""A session, by identity."""
W = TypeVar("W", bound=Hashable)
"""Somebody who waits for one, by identity."""


class Slot(NamedTuple):
    """What sessions must have in common to stand in for one another. `kind`: which upstream of that name it is,
    credentials and capabilities."""

    upstream: str
    principal: str
    kind: str = ""


class Place(Enum):
    """Where a session is."""

    IDLE = "idle"
    LENT = "lent"
    KEPT = "kept"
    """Held under a key of its own, and never lent to anybody who does not name it."""
    SPARE = "spare"
    """As KEPT, shared by a name, and nobody has it now: closed where nothing idle makes room."""
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class Limits:
    """How many sessions an upstream may have. None: no limit beside the others."""

    sessions: int
    per_principal: int | None = None


@dataclass(frozen=True, slots=True)
class Open:
    """Open a session of this slot; then tell `opened`, `open_failed` or `open_forgone`."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Grant(Generic[S, W]):
    """Give a session to somebody who waited for it."""

    waiter: W
    session: S


@dataclass(frozen=True, slots=True)
class Fail(Generic[W]):
    """Tell somebody that the session opened for them could not be."""

    waiter: W


@dataclass(frozen=True, slots=True)
class Close(Generic[S]):
    """Close a session; then tell `ended`."""

    session: S
    reason: str


Scope = Slot | tuple[str, str] | str | None
"""A slot; an upstream and principal; an upstream; all."""

Effects = list[Open | Grant[S, W] | Fail[W] | Close[S]]
