"""The pool's books, driven by Hypothesis through everything that can happen to a pool, against books kept the plain
way: a list of what is there, counted anew after each step."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from leasehold.pool.effects import Close, Effects, Fail, Grant, Limits, Open, Place, Slot
from leasehold.pool.errors import PoolFull
from leasehold.pool.ledger import Ledger

Books = Ledger[int, str]

LIMITS = {"files": Limits(4, per_principal=2), "mail": Limits(2), "web": Limits(5, per_principal=1)}
SLOTS = [
    Slot("files", "alice"),
    Slot("files", "alice", "sampling"),
    Slot("files", "bob"),
    Slot("mail", "alice"),
    Slot("mail", "bob"),
    Slot("web", "alice"),
]
MAX_SESSIONS = 6
MAX_WAITING = 8

OUTCOMES = ["opened"] * 4 + ["failed", "failed and lingers", "forgone", "asked"]

slots = st.sampled_from(SLOTS)
picks = st.integers(0, 1_000)


@dataclass
class Held:
    """A session as the plain books have it."""

    slot: Slot
    place: Place
    idle_since: int = 0
    makes_room: bool = False
    """Evicted for somebody who waits."""
    extra: bool = False
    """Entered by force: it may pass the limits."""


class LedgerMachine(RuleBasedStateMachine):
    """B2, B4, B5, B12, B13: every method in any order, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.books: Books = Ledger(max_sessions=MAX_SESSIONS, max_waiting=MAX_WAITING)
        self.books.limits.update({slot: LIMITS[slot.upstream] for slot in SLOTS})
        self.held: dict[int, Held] = {}
        self.waiting: dict[str, Slot] = {}
        self.opening: list[Slot] = []
        self.ended: set[int] = set()
        self.told: set[str] = set()
        self.names = iter(range(1_000_000))

    @initialize(small=st.booleans())
    def begin(self, *, small: bool) -> None:
        """Half of all runs are short of room all the time."""
        if small:
            self.books.max_sessions = 2

    # -- the plain books -----------------------------------------------------------------------------------------------

    def of(self, *places: Place) -> list[int]:
        return [session for session, held in self.held.items() if held.place in places]

    def counts(self) -> Counter[Slot]:
        """What counts towards the limits, by slot."""
        return Counter([held.slot for held in self.held.values()] + self.opening)

    def full_for(self, slot: Slot) -> list[list[Slot]]:
        """What each limit that forbids one more session of this slot counts; none of it if there is room."""
        there = [held.slot for held in self.held.values()] + self.opening
        upstream = [other for other in there if other.upstream == slot.upstream]
        principal = [other for other in upstream if other.principal == slot.principal]
        limits = LIMITS[slot.upstream]
        reached = [(there, self.books.max_sessions), (upstream, limits.sessions), (principal, limits.per_principal)]
        return [counted for counted, limit in reached if limit is not None and len(counted) >= limit]

    def has_room(self, slot: Slot) -> bool:
        return not self.full_for(slot)

    def in_the_way_of(self, slot: Slot) -> list[int]:
        """Idle sessions that every limit which forbids another one counts: the longest idle one first. After them those
        that are shared and that nobody has."""
        full = self.full_for(slot)
        found = [
            session
            for session in self.of(Place.IDLE, Place.SPARE)
            if all(self.held[session].slot in one for one in full)
        ]
        return sorted(found, key=lambda one: (self.held[one].place is Place.SPARE, self.held[one].idle_since))

    def apply(self, effects: Effects[int, str], room_for: Slot | None = None) -> None:
        """Note what the books have decided, and that each decision was right. Evicted is for those who wait, or for
        one of that slot."""
        for effect in effects:
            match effect:
                case Open(slot):
                    assert not self.books.is_closed
                    self.opening.append(slot)
                case Grant(waiter, session):
                    held = self.held[session]
                    slot = self.waiting.pop(waiter)
                    assert slot == held.slot, "a session of another slot (B17)"
                    assert held.place is not Place.CLOSING
                    assert slot not in self.waiting_before(waiter), "not in order of arrival (B2)"
                    held.place = Place.LENT
                    self.tell(waiter)
                case Fail(waiter):
                    self.waiting.pop(waiter)
                    self.tell(waiter)
                case Close(session, reason):
                    held = self.held[session]
                    assert held.place is not Place.CLOSING, "closed twice"
                    if reason == "evicted":
                        wanting = self.waiting.values() if room_for is None else [room_for]
                        assert session in [next(iter(self.in_the_way_of(slot)), None) for slot in wanting]
                    held.makes_room = reason == "evicted" and held.place in (Place.IDLE, Place.SPARE)
                    held.place = Place.CLOSING

    def tell(self, waiter: str) -> None:
        assert waiter not in self.told, "told twice"
        self.told.add(waiter)

    def waiting_before(self, waiter: str) -> list[Slot]:
        return [slot for other, slot in self.waiting.items() if int(other) < int(waiter)]

    def new(self) -> int:
        return next(self.names)

    # -- borrowing -----------------------------------------------------------------------------------------------------

    @rule(slot=slots)
    def acquire(self, slot: Slot) -> None:
        """As a caller does: take what is free, else wait."""
        if self.books.is_closed:
            with pytest.raises(PoolFull):
                self.books.acquire(slot)
            return
        free = {s: self.held[s].idle_since for s in self.of(Place.IDLE) if self.held[s].slot == slot}
        session = self.books.acquire(slot)
        if slot in self.waiting.values():
            assert session is None, "past those who wait"
        else:
            assert session == max(free, key=free.__getitem__, default=None), "not the one used last"
        if session is None:
            self.wait(slot)
        else:
            self.held[session].place = Place.LENT

    def wait(self, slot: Slot) -> None:
        waiter = str(self.new())
        if len(self.waiting) >= MAX_WAITING:
            with pytest.raises(PoolFull):
                self.books.wait(waiter, slot)
            return
        effects = self.books.wait(waiter, slot)
        self.waiting[waiter] = slot
        self.apply(effects)

    @precondition(lambda self: self.waiting)
    @rule(pick=picks)
    def leave(self, pick: int) -> None:
        waiter = list(self.waiting)[pick % len(self.waiting)]
        del self.waiting[waiter]
        assert self.books.leave(waiter)
        assert not self.books.leave(waiter)

    @precondition(lambda self: self.told)
    @rule(pick=picks)
    def leave_too_late(self, pick: int) -> None:
        assert not self.books.leave(sorted(self.told)[pick % len(self.told)])

    @rule(pick=picks, keep=st.sampled_from([True, True, False]))
    def release(self, pick: int, *, keep: bool) -> None:
        """Of any session there is or was, lent or not (B4)."""
        known = [*self.held, *sorted(self.ended)]
        if not known:
            return
        session = known[pick % len(known)]
        was_lent = session in self.held and self.held[session].place is Place.LENT
        if was_lent:
            # Unless the effects say otherwise.
            self.held[session] = Held(self.held[session].slot, Place.IDLE, self.new())
        effects = self.books.release(session, keep=keep)
        assert was_lent or not effects
        self.apply(effects)
        if was_lent and not keep:
            assert self.held[session].place is Place.CLOSING
        was_lent_again = session in self.held and self.held[session].place is Place.LENT
        if not was_lent_again:
            assert self.books.release(session, keep=keep) == []

    # -- opening -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.opening)
    @rule(pick=picks, outcome=st.sampled_from(OUTCOMES))
    def opening_ends(self, pick: int, outcome: str) -> None:
        slot = self.opening[pick % len(self.opening)]
        session = self.new()
        if outcome == "asked":  # as the creator does before it begins
            wanted = self.books.is_wanted(slot)
            waiting, opening = list(self.waiting.values()).count(slot), self.opening.count(slot)
            if wanted:
                return
            assert waiting < opening or self.books.is_closed, "somebody waits for this very opening"
            outcome = "forgone"
        self.opening.remove(slot)
        match outcome:
            case "opened":
                self.opens(slot)
            case "failed":
                self.fails(slot, None)
            case "failed and lingers":
                self.held[session] = Held(slot, Place.CLOSING)
                self.fails(slot, session)
            case _:
                self.apply(self.books.open_forgone(slot))

    def fails(self, slot: Slot, session: int | None) -> None:
        first = next((waiter for waiter, wanted in self.waiting.items() if wanted == slot), None)
        effects = self.books.open_failed(slot, session)
        assert [effect for effect in effects if isinstance(effect, Fail)] == ([] if first is None else [Fail(first)])
        self.apply(effects)

    @rule(slot=slots, minimum=st.integers(0, 3))
    def top_up(self, slot: Slot, minimum: int) -> None:
        had, room = self.counts()[slot], self.has_room(slot)
        effects = self.books.top_up(slot, minimum)
        assert all(effect == Open(slot) for effect in effects), "nobody else is closed for it"
        assert len(effects) <= max(0, minimum - had)
        if room and not self.books.is_closed:
            assert bool(effects) == (had < minimum)
        self.apply(effects)

    @rule(slot=slots, count=st.integers(1, 3))
    def some_more(self, slot: Slot, count: int) -> None:
        """Sessions that nobody had asked for, as after a pre-warming: most walks would see few idle ones otherwise."""
        self.top_up(slot, self.counts()[slot] + count)
        while slot in self.opening:
            self.opening.remove(slot)
            self.opens(slot)

    def opens(self, slot: Slot) -> None:
        session = self.new()
        self.held[session] = Held(slot, Place.IDLE, self.new())
        self.apply(self.books.opened(session, slot))

    # -- sessions under a key of their own -----------------------------------------------------------------------------

    @rule(slot=slots, force=st.booleans())
    def keep(self, slot: Slot, *, force: bool) -> None:
        session = self.new()
        if not force and not self.has_room(slot):
            with pytest.raises(PoolFull, match="limit reached"):
                self.books.keep(session, slot)
            return
        extra = not self.has_room(slot)
        self.books.keep(session, slot, force=force)
        self.held[session] = Held(slot, Place.KEPT, extra=extra)

    @precondition(lambda self: self.held)
    @rule(pick=picks)
    def keep_lent(self, pick: int) -> None:
        session = list(self.held)[pick % len(self.held)]
        self.books.keep_lent(session)
        if self.held[session].place is Place.LENT:
            self.held[session].place = Place.KEPT

    @precondition(lambda self: self.of(Place.KEPT, Place.LENT))
    @rule(pick=picks)
    def spare(self, pick: int) -> None:
        """B2: nobody has a shared session any more."""
        some = self.of(Place.KEPT, Place.LENT)
        session = some[pick % len(some)]
        is_kept = self.held[session].place is Place.KEPT
        if is_kept:
            self.held[session].place, self.held[session].idle_since = Place.SPARE, self.new()
        effects = self.books.spare(session)
        assert is_kept or not effects
        self.apply(effects)

    @precondition(lambda self: self.held)
    @rule(pick=picks)
    def hold(self, pick: int) -> None:
        session = list(self.held)[pick % len(self.held)]
        self.books.hold(session)
        if self.held[session].place is Place.SPARE:
            self.held[session].place = Place.KEPT

    @rule(slot=slots)
    def make_room(self, slot: Slot) -> None:
        """Only if one will do."""
        counts, limits = self.counts(), LIMITS[slot.upstream]
        upstream = sum(n for one, n in counts.items() if one.upstream == slot.upstream)
        principal = sum(n for one, n in counts.items() if one[:2] == slot[:2])
        over = max(
            counts.total() - self.books.max_sessions,
            upstream - limits.sessions,
            0 if limits.per_principal is None else principal - limits.per_principal,
        )
        victims = [] if over > 0 else self.in_the_way_of(slot)
        effects = self.books.make_room(slot)
        assert effects == [Close(victim, "evicted") for victim in victims[:1]]
        self.apply(effects, slot)
        for effect in effects:
            assert isinstance(effect, Close)
            self.held[effect.session].makes_room = False  # for nobody who waits

    # -- ending --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.held)
    @rule(pick=picks, reason=st.sampled_from(["idle", "max_age", "evicted by hand"]))
    def close(self, pick: int, reason: str) -> None:
        session = list(self.held)[pick % len(self.held)]
        closes = self.held[session].place in (Place.IDLE, Place.KEPT, Place.SPARE)
        effects = self.books.close(session, reason)
        assert effects == ([Close(session, reason)] if closes else [])
        self.apply(effects)

    @precondition(lambda self: self.held)
    @rule(pick=picks)
    def ends(self, pick: int) -> None:
        """At any time: asked to close, idle, or while it is lent."""
        self.end(list(self.held)[pick % len(self.held)])

    @precondition(lambda self: Place.CLOSING in {held.place for held in self.held.values()})
    @rule(pick=picks)
    def closing_ends(self, pick: int) -> None:
        closing = self.of(Place.CLOSING)
        self.end(closing[pick % len(closing)])

    def end(self, session: int) -> None:
        del self.held[session]
        self.ended.add(session)
        self.apply(self.books.ended(session))
        assert self.books.ended(session) == []
        assert self.books.slot_of(session) is None

    @rule(whether=st.integers(0, 30))
    def drain(self, whether: int) -> None:
        if whether != 7:  # seldom, for it is the end of most that can happen
            return
        was = list(self.waiting)
        effects = self.books.drain()
        assert [effect.waiter for effect in effects if isinstance(effect, Fail)] == was
        self.apply(effects)
        assert not self.of(Place.IDLE)
        with pytest.raises(PoolFull):
            self.books.wait("late", SLOTS[0])

    # -- what must hold after each step --------------------------------------------------------------------------------

    @invariant()
    def the_counts_are_those_of_what_is_there(self) -> None:
        """B4"""
        counts = self.counts()
        assert self.books.total == counts.total()
        assert {slot: self.books.sessions_of(slot) for slot in SLOTS} == {slot: counts[slot] for slot in SLOTS}
        assert self.books.places() == Counter(held.place for held in self.held.values())
        assert self.books.idle == len(self.of(Place.IDLE)) == len(self.books.idle_sessions())
        assert (self.books.opening, self.books.waiting) == (len(self.opening), len(self.waiting))
        assert self.books.lent == len(self.of(Place.LENT))
        for session, held in self.held.items():
            assert self.books.slot_of(session) == held.slot
        for slot in SLOTS:
            assert (self.books.blocked_by(slot) is None) == self.has_room(slot)

    @invariant()
    def no_limit_is_passed(self) -> None:
        """B5: but by what was forced in."""
        counts = self.counts()
        extra = sum(held.extra for held in self.held.values())
        assert counts.total() <= self.books.max_sessions + extra
        for upstream, limits in LIMITS.items():
            own = {slot: n for slot, n in counts.items() if slot.upstream == upstream}
            assert sum(own.values()) <= limits.sessions + extra
            by_principal: Counter[str] = Counter()
            for slot, n in own.items():
                by_principal[slot.principal] += n
            if limits.per_principal is not None:
                assert all(n <= limits.per_principal + extra for n in by_principal.values())

    @invariant()
    def nobody_waits_while_a_session_of_his_is_idle(self) -> None:
        """B2"""
        assert not {self.held[session].slot for session in self.of(Place.IDLE)} & set(self.waiting.values())

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        """B2: who could be helped, now or by closing an idle session, has an opening or a closing under way for him."""
        helpless = 0
        for slot, waiting in Counter(self.waiting.values()).items():
            uncovered = waiting - self.opening.count(slot)
            if uncovered <= 0:
                continue
            assert not self.has_room(slot), f"there is room for {slot}"
            if self.in_the_way_of(slot):
                helpless += uncovered
        assert helpless <= sum(held.makes_room for held in self.held.values() if held.place is Place.CLOSING)

    @invariant()
    def a_closed_pool_holds_nobody_up(self) -> None:
        if self.books.is_closed:
            assert not self.waiting
            assert not self.of(Place.IDLE)

    def teardown(self) -> None:
        """Whatever happened: once all have ended, nothing is left in any count (B3, B4)."""
        self.apply(self.books.drain())
        for session in list(self.held):
            self.end(session)
        for slot in list(self.opening):
            self.opening.remove(slot)
            assert not self.books.is_wanted(slot, 3)
            self.apply(self.books.open_forgone(slot))
        assert (self.held, self.opening, self.waiting) == ({}, [], {})
        left = {name: value for name, value in vars(self.books).items() if name not in ("limits", "max_sessions")}
        assert not [name for name, value in left.items() if name.startswith("_") and value]


LedgerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_an_event_costs_little_however_many_wait_and_are_idle() -> None:
    """B44: a thousand principals wait for an upstream that is full, while nine thousand sessions of others are idle."""
    books: Books = Ledger(max_sessions=20_000, max_waiting=2_000)
    for principal in ("holder", *map(str, range(9_000))):
        books.limits[Slot("busy", principal)] = Limits(1)
        books.limits[Slot("idle", principal)] = Limits(10_000)
    for session in range(9_000):
        books.top_up(Slot("idle", str(session)), 1)
        books.opened(session, Slot("idle", str(session)))
    assert books.wait("first", Slot("busy", "holder")) == [Open(Slot("busy", "holder"))]
    assert books.opened(-1, Slot("busy", "holder")) == [Grant("first", -1)]
    for waiter in range(1_000):
        assert books.wait(str(waiter), Slot("busy", str(waiter))) == []
    begun = time.process_time()
    for session in range(100):
        assert books.acquire(Slot("idle", str(session))) == session
        assert books.release(session, keep=True) == []
    assert time.process_time() - begun < 5
    assert books.release(-1, keep=True) == [Close(-1, "evicted")]
    assert books.ended(-1) == [Open(Slot("busy", "0"))]
