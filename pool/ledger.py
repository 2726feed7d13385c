"""The pool's books: who holds which session, who waits, what is being opened, and the limits. Synchronous and pure.

Every event that happens to the pool is one method. It changes the books and returns the effects to perform, which
the pool then does; so there is no moment at which a count and what it counts differ, whatever is cancelled where.

    session:  opening --opened--> lent or idle --acquire/release--> ... --> closing --ended--> (forgotten)

A session counts from the decision to open it until it has ended. Sessions of one slot can stand in for one another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Generic

from .effects import Close, Effects, Fail, Grant, Open, Place, S, Slot, W
from .errors import PoolFull
from .shelf import Shelf, scopes
from .tally import Tally, take_one


@dataclass(slots=True)
class _Entry:
    slot: Slot
    place: Place
    room_for: Slot | None = None
    """Being closed so that a session of that slot can be opened."""


class Ledger(Generic[S, W]):
    """The books of one pool."""

    def __init__(self, *, max_sessions: int, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._tally = Tally(max_sessions)
        self.limits = self._tally.limits
        self.is_closed = False
        self.has_begun = True
        self._entries: dict[S, _Entry] = {}
        self._waiters: dict[W, Slot] = {}
        self._queues: dict[Slot, dict[W, None]] = {}
        self._passed: Counter[W] = Counter()
        self._waiting_for: Counter[str] = Counter()  # by upstream
        self._idle: Shelf[S] = Shelf()
        self._spare: Shelf[S] = Shelf()
        self._lent = 0
        self._joined = 0
        self._opening: Counter[Slot] = Counter()
        self._making_room: Counter[Slot] = Counter()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return f"<Ledger {state} sessions={self.total}/{self.max_sessions} idle={self.idle} waiting={self.waiting}>"

    @property
    def max_sessions(self) -> int:
        return self._tally.max_sessions

    @max_sessions.setter
    def max_sessions(self, most: int) -> None:
        self._tally.max_sessions = most

    @property
    def total(self) -> int:
        """Sessions that count: idle, lent, kept, closing, and those being opened."""
        return self._tally.total

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return len(self._waiters) + self._joined

    @property
    def opening(self) -> int:
        return self._opening.total()

    @property
    def lent(self) -> int:
        return self._lent

    def places(self) -> Counter[Place]:
        """How many sessions are where; O(n)."""
        return Counter(entry.place for entry in self._entries.values())

    def idle_sessions(self) -> list[S]:
        """The longest idle one first."""
        return self._idle.all()

    def place_of(self, session: S) -> Place | None:
        entry = self._entries.get(session)
        return None if entry is None else entry.place

    def slot_of(self, session: S) -> Slot | None:
        entry = self._entries.get(session)
        return None if entry is None else entry.slot

    def sessions_of(self, slot: Slot) -> int:
        return self._tally.per_slot[slot]

    def is_used(self, slot: Slot) -> bool:
        """Whether a session of this slot counts, or somebody waits for one."""
        return slot in self._tally.per_slot or slot in self._queues

    # -- borrowing -------------------------------------------------------------------------------------------------

    def acquire(self, slot: Slot) -> S | None:
        """Take the session of this slot that was used last, unless somebody waits for it. Raises `PoolFull` once
        closed."""
        self.check_open()
        if slot in self._queues or (session := self._idle.last(slot)) is None:
            return None
        self._move(session, self._entries[session], Place.LENT)
        return session

    def wait(self, waiter: W, slot: Slot) -> Effects[S, W]:
        """Wait for a session of this slot, behind all who wait for one already. Raises `PoolFull`: nothing changed."""
        self.check_open()
        self._check_waiting()
        self._waiters[waiter] = slot
        self._waiting_for[slot.upstream] += 1
        queue = self._queues.setdefault(slot, {})
        queue[waiter] = None
        uncovered = len(queue) - self._opening[slot]
        return self._provide(slot, uncovered - self._making_room[slot]) if uncovered > 0 else []

    def leave(self, waiter: W) -> bool:
        """Wait no more; False for somebody who did not wait (any more): he may have been granted one."""
        slot = self._waiters.pop(waiter, None)
        if slot is None:
            return False
        self._passed.pop(waiter, None)
        take_one(self._waiting_for, slot.upstream)
        queue = self._queues[slot]
        del queue[waiter]
        if not queue:
            del self._queues[slot]
        return True

    def join(self) -> None:
        """Wait with somebody else for one session, until `part`. Raises `PoolFull`."""
        self._check_waiting()
        self._joined += 1

    def part(self) -> None:
        """Undo one `join`."""
        self._joined -= 1

    def release(self, session: S, *, keep: bool, reason: str = "discarded") -> Effects[S, W]:
        """Give a lent session back; without `keep` it is closed. Of no effect for one that is not lent: it was
        released before, or it has ended meanwhile."""
        entry = self._entries.get(session)
        if entry is None or entry.place is not Place.LENT:
            return []
        if not keep or self.is_closed:
            return [self._close(session, entry, "drained" if keep else reason)]
        due = self._due_before(entry.slot)
        return self._offer(session, entry) if due is None else [self._close_for(due, session, entry)]

    # -- opening ---------------------------------------------------------------------------------------------------

    def is_wanted(self, slot: Slot, minimum: int = 0) -> bool:
        """Whether an opening that is about to begin still has somebody to serve."""
        waiting = len(self._queues.get(slot, ()))
        return not self.is_closed and (waiting >= self._opening[slot] or self._tally.per_slot[slot] <= minimum)

    def opened(self, session: S, slot: Slot) -> Effects[S, W]:
        """An opening succeeded: the session goes to who has waited longest, or is idle."""
        take_one(self._opening, slot)
        entry = self._entries[session] = _Entry(slot, Place.LENT)
        self._lent += 1
        if self.is_closed:
            return [self._close(session, entry, "drained")]
        return self._offer(session, entry)

    def open_failed(self, slot: Slot, session: S | None = None) -> Effects[S, W]:
        """An opening failed: who has waited longest is told so, and the next one gets a new try. `session`: what is
        left of it counts until it has ended."""
        take_one(self._opening, slot)
        if session is None:
            self._tally.uncount(slot)
        else:
            self._entries[session] = _Entry(slot, Place.CLOSING)
        effects: Effects[S, W] = []
        waiter = self._next_waiter(slot)
        if waiter is not None:
            effects.append(Fail(waiter))
        return effects + self._serve_waiting()

    def open_forgone(self, slot: Slot) -> Effects[S, W]:
        """An opening was not begun, for nobody waits any more."""
        take_one(self._opening, slot)
        self._tally.uncount(slot)
        return self._serve_waiting()

    def top_up(self, slot: Slot, minimum: int) -> Effects[S, W]:
        """Have at least so many sessions of this slot, as far as there is room without closing others."""
        effects: Effects[S, W] = []
        while not self.is_closed and self._tally.per_slot[slot] < minimum and self.blocked_by(slot) is None:
            effects.append(self._open(slot))
        return effects

    # -- sessions under a key of their own -------------------------------------------------------------------------

    def keep(self, session: S, slot: Slot, *, force: bool = False) -> None:
        """Enter a session that is never lent. Raises `PoolFull`, unless forced: then it may pass the limits."""
        reason = None if force else self.blocked_by(slot)
        if reason is not None:
            raise PoolFull(f"limit reached: {reason}")
        self._tally.count(slot)
        self._entries[session] = _Entry(slot, Place.KEPT)

    def keep_lent(self, session: S) -> None:
        """A lent session is from now on held under a key of its own."""
        entry = self._entries.get(session)
        if entry is not None and entry.place is Place.LENT:
            self._move(session, entry, Place.KEPT)

    def hold(self, session: S) -> None:
        """Somebody has this shared session."""
        entry = self._entries.get(session)
        if entry is not None and entry.place is Place.SPARE:
            self._move(session, entry, Place.KEPT)

    def spare(self, session: S) -> Effects[S, W]:
        """Nobody has this shared session any more. It makes room for who waits, if nothing else does."""
        entry = self._entries.get(session)
        if entry is None or entry.place is not Place.KEPT:
            return []
        self._move(session, entry, Place.SPARE)
        return self._serve_by_closing(session, entry)

    def make_room(self, slot: Slot) -> list[Close[S]]:
        """Close the longest idle session that is in the way of one of this slot, if that is the only one."""
        victim = self._victim(slot)
        if victim is None or self._tally.blocked_by(slot, less=1) is not None:
            return []
        return [self._close(victim, self._entries[victim], "evicted")]

    # -- ending ----------------------------------------------------------------------------------------------------

    def close(self, session: S, reason: str) -> Effects[S, W]:
        """Close a session that is idle, kept or spare; one that is lent goes when it is released."""
        entry = self._entries.get(session)
        if entry is None or entry.place not in (Place.IDLE, Place.KEPT, Place.SPARE):
            return []
        return [self._close(session, entry, reason)]

    def ended(self, session: S) -> Effects[S, W]:
        """Nothing is left of a session, wherever it was: it counts no more, and there is room for another."""
        entry = self._entries.pop(session, None)
        if entry is None:
            return []
        self._move(session, entry, Place.CLOSING)
        if entry.room_for is not None:
            take_one(self._making_room, entry.room_for)
        self._tally.uncount(entry.slot)
        return self._serve_waiting()

    def drain(self) -> Effects[S, W]:
        """Lend no more: who waits is told, what is idle closes, what is lent closes when it is released."""
        self.is_closed = True
        effects: Effects[S, W] = [Fail(waiter) for waiter in self._waiters]
        for waiting in (self._waiters, self._queues, self._passed, self._waiting_for):
            waiting.clear()
        effects.extend(self._close(session, self._entries[session], "drained") for session in self.idle_sessions())
        return effects

    def check_open(self) -> None:
        """Raises `PoolFull` once closed, and RuntimeError before the pool was entered."""
        if self.is_closed:
            if not self.has_begun:
                raise RuntimeError("expected to be used inside `async with`")
            raise PoolFull("the pool is closing")

    def blocked_by(self, slot: Slot) -> str | None:
        """The limit that forbids one more session of this slot, in words; None if there is room."""
        return self._tally.blocked_by(slot)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _offer(self, session: S, entry: _Entry) -> Effects[S, W]:
        """A session is free: for who has waited longest for its like, else for nobody yet."""
        waiter = self._next_waiter(entry.slot)
        if waiter is not None:
            self._move(session, entry, Place.LENT)
            return [Grant(waiter, session)]
        self._move(session, entry, Place.IDLE)
        return self._serve_by_closing(session, entry)

    def _serve_by_closing(self, session: S, entry: _Entry) -> Effects[S, W]:
        """Nobody has this session any more: it is closed for who has waited longest of those in whose way it is. Whom
        another one could have helped has been served before."""
        everybody = self._tally.total >= self.max_sessions
        if not self._waiters or not (everybody or entry.slot.upstream in self._waiting_for):
            return []
        near = scopes(entry.slot)
        waiting: dict[Slot, int] = {}
        for slot in self._waiters.values():
            if slot.upstream != near[2] and not everybody:
                continue
            if self._tally.scope_in_the_way(slot) in near:
                waiting[slot] = waiting.get(slot, 0) + 1
                is_covered = waiting[slot] <= self._opening[slot] + self._making_room[slot]
                if not is_covered and self.blocked_by(slot) is not None:
                    return [self._close_for(slot, session, entry)]
        return []

    def _next_waiter(self, slot: Slot) -> W | None:
        queue = self._queues.get(slot)
        if not queue:
            return None
        waiter = next(iter(queue))
        self.leave(waiter)
        return waiter

    def _serve_waiting(self) -> Effects[S, W]:
        """There may be room now: those who wait get it in the order they came, each if its own limits allow."""
        effects: Effects[S, W] = []
        opening = Counter(self._opening)
        uncovered: Counter[Slot] = Counter()
        stuck: set[Slot] = set()
        for slot in self._waiters.values():
            if opening[slot] > 0:
                opening[slot] -= 1
            elif slot not in stuck:
                uncovered[slot] += 1
                more = self._provide(slot, uncovered[slot] - self._making_room[slot])
                if more and isinstance(more[0], Open):
                    uncovered[slot] -= 1
                effects += more
                if not more and uncovered[slot] > self._making_room[slot]:
                    stuck.add(slot)  # nor is there anything for those of this slot who came later
        return effects

    def _provide(self, slot: Slot, without_room: int) -> Effects[S, W]:
        """One more session of this slot: now, or when another one has made room for it. `without_room`: how many wait
        for whom none is making room."""
        if self.blocked_by(slot) is None:
            return [self._open(slot)]
        victim = self._victim(slot) if without_room > 0 else None
        return [] if victim is None else [self._close_for(slot, victim, self._entries[victim])]

    def _due_before(self, free: Slot) -> Slot | None:
        """Those who wait for a session like the free one could be served for ever, and who came before them and needs
        its room never. He is passed over as often as there are sessions; then one of his slot is due instead."""
        if free not in self._queues:
            return None
        for waiter, slot in self._waiters.items():
            if slot == free:
                return None
            if not self._opening[slot] + self._making_room[slot] and self._tally.scope_in_the_way(slot) in scopes(free):
                self._passed[waiter] += 1
                return slot if self._passed[waiter] > self._tally.total else None
        return None

    def _victim(self, slot: Slot) -> S | None:
        """The longest idle session whose end makes room for one of this slot, or brings it nearer; else the longest
        spare one."""
        scope = self._tally.scope_in_the_way(slot)
        idle = self._idle.first(scope)
        return self._spare.first(scope) if idle is None else idle

    def _open(self, slot: Slot) -> Open:
        self._opening[slot] += 1
        self._tally.count(slot)
        return Open(slot)

    def _close(self, session: S, entry: _Entry, reason: str) -> Close[S]:
        self._move(session, entry, Place.CLOSING)
        return Close(session, reason)

    def _close_for(self, slot: Slot, session: S, entry: _Entry) -> Close[S]:
        entry.room_for = slot
        self._making_room[slot] += 1
        return self._close(session, entry, "evicted")

    def _move(self, session: S, entry: _Entry, place: Place) -> None:
        was, entry.place = entry.place, place
        if was is Place.LENT:
            self._lent -= 1
        elif was is Place.IDLE:
            self._idle.take(session, entry.slot)
        elif was is Place.SPARE:
            self._spare.take(session, entry.slot)
        if place is Place.LENT:
            self._lent += 1
        elif place is Place.IDLE:
            self._idle.put(session, entry.slot)
        elif place is Place.SPARE:
            self._spare.put(session, entry.slot)

    def _check_waiting(self) -> None:
        if self.waiting >= self.max_waiting:
            raise PoolFull(f"limit reached: {self.max_waiting} callers wait for a session")
