"""All breakers of a worker: one per upstream, and one per (upstream, principal, credential) that was refused.

What the fleet knows comes from outside, for the pool knows no Redis. A housekeeper repeats, every second and whenever
`on_due` is called:

    circuits = await <ask the fleet>(breakers.reports())        then     breakers.heard(circuits)
                                                 or, if that failed,     breakers.alone()

While the fleet answers, a probe needs its leave, so that of all workers one makes it: `admit` waits for that, some
milliseconds as a rule. Without the fleet each worker probes on its own account, and nothing waits.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import Final, Literal, Protocol

from .breaker import Breaker, BreakerSettings, BreakerState, BreakerStatistics, Permit
from .clock import monotonic
from .errors import CircuitOpen

MAX_PRINCIPALS: Final = 10_000
MAX_UPSTREAMS: Final = 10_000
FLEET_S: Final = 3.0
"""So long after it was last heard of, the fleet is asked before a probe: three rounds of the housekeeper."""
LEAVE_S: Final = 0.25
"""How long a call waits for the leave to be the probe."""
STALE_S: Final = 5.0
"""A closing that could not be told for so long is not told any more: the others have probed themselves."""

Kind = Literal["opened", "closed", "failed", "succeeded", "probe"]


@dataclass(frozen=True, slots=True)
class Report:
    """What the fleet is to know of an upstream. `probe` asks for leave to make the probe, or for more time for it."""

    kind: Kind
    upstream: str
    open_s: float = 0.0
    """`opened`: for how long."""
    openings: int = 0
    """`opened` and `probe`: how many in a row."""
    age_s: float = 0.0
    """`probe`: since when it is open here."""
    failures: int = 0
    """`failed`: new ones, without a success since."""


class Circuit(Protocol):
    """What the fleet knows of an upstream."""

    @property
    def upstream(self) -> str: ...
    @property
    def state(self) -> str:
        """`open` or `closed`; anything else says nothing."""
        ...

    @property
    def age_s(self) -> float:
        """Seconds since it opened or closed."""
        ...

    @property
    def remaining_s(self) -> float:
        """Seconds until a probe is due; 0 when it is."""
        ...

    @property
    def openings(self) -> int: ...
    @property
    def probe_s(self) -> float:
        """Seconds for which somebody has leave to probe; 0 when nobody has."""
        ...

    @property
    def mine(self) -> bool:
        """Whether that is this worker."""
        ...


@dataclass(frozen=True, slots=True)
class BreakersStatistics:
    """The breakers that are there now. Only principals with failures have one."""

    upstreams: Mapping[str, BreakerStatistics]
    principals: int
    principals_refused: int
    """Those whose breaker is not closed."""


@dataclass(slots=True)
class _Known:
    """An upstream's breaker, what the fleet was told of it, and what it allowed."""

    breaker: Breaker
    changes: int = 0
    sent: int = 0
    told: int = 0
    counted: int = 0
    """Failures that were reported."""
    wants_probe: bool = False
    asked: bool = False
    """Whether the fleet has been asked for that, and has not yet answered."""
    leave_until: float = -inf


class OpeningPermit:
    """Leave to open a session: of the upstream, and for this principal's credential."""

    __slots__ = ("_breakers", "_key", "_principal", "_upstream")

    def __init__(
        self, breakers: Breakers, key: tuple[str, str, str], upstream: Permit, principal: Permit | None
    ) -> None:
        self._breakers = breakers
        self._key = key
        self._upstream = upstream
        self._principal = principal

    def succeeded(self) -> None:
        """The session is open."""
        self._upstream.succeeded()
        self._breakers.principal_admitted(self._key)

    def denied(self) -> None:
        """The upstream answered with 401 or 403: the failure is the principal's."""
        self._upstream.succeeded()
        self._breakers.principal_denied(self._key, self._principal)

    def failed(self, event: Hashable = None) -> None:
        """The connection could not be made, or broke: see `Permit.failed`."""
        self._upstream.failed(event)
        if self._principal is not None:
            self._principal.abandoned()

    def abandoned(self) -> None:
        """Nothing is known: cancelled, for example."""
        self._upstream.abandoned()
        if self._principal is not None:
            self._principal.abandoned()


class Breakers:
    """The registry. For one event loop; only `admit` and `admit_opening` may wait."""

    def __init__(
        self,
        settings: BreakerSettings = BreakerSettings(),  # noqa: B008  # immutable
        *,
        max_principals: int = MAX_PRINCIPALS,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self.settings = settings
        self.on_change: Callable[[str, BreakerState], None] = lambda _upstream, _state: None
        """Called with each change of an upstream's breaker, whoever caused it."""
        self.on_due: Callable[[], None] = lambda: None
        """Called when the fleet is to be told or asked something at once."""
        self._now = now
        self._max_principals = max_principals
        self._upstreams: OrderedDict[str, _Known] = OrderedDict()
        self._principals: OrderedDict[tuple[str, str, str], Breaker] = OrderedDict()
        self._fleet_until = -inf
        self._sent_at = -inf
        self._hearing = False
        self._waiting: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        trouble = [
            known.breaker for known in self._upstreams.values() if known.breaker.state is not BreakerState.CLOSED
        ]
        return f"<Breakers upstreams={len(self._upstreams)} principals={len(self._principals)} not closed: {trouble}>"

    def statistics(self) -> BreakersStatistics:
        refused = sum(breaker.state is not BreakerState.CLOSED for breaker in self._principals.values())
        upstreams = {name: known.breaker.statistics() for name, known in self._upstreams.items()}
        return BreakersStatistics(upstreams, len(self._principals), refused)

    def upstream(self, upstream: str) -> Breaker:
        """The breaker of an upstream; the least recently used one makes room for one too many."""
        return self._known(upstream).breaker

    async def admit(self, upstream: str) -> Permit:
        """Leave to make a call; raises `CircuitOpen`. Waits only where the call may become the probe."""
        known = self._known(upstream)
        try:
            return known.breaker.admit()
        except CircuitOpen:
            if not known.wants_probe:
                raise
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                while known.wants_probe:
                    await self._answer()
        return known.breaker.admit()

    async def admit_opening(self, upstream: str, principal: str, fingerprint: str) -> OpeningPermit:
        """Leave to open a session; raises `CircuitOpen`. `fingerprint` tells the principal's credentials apart without
        showing them: with a new one the principal is tried again at once."""
        key = (upstream, principal, fingerprint)
        breaker = self._principals.get(key)
        # First the principal: a probe of the upstream that is not made would hold up all others.
        own = None
        if breaker is not None:
            self._principals.move_to_end(key)
            own = breaker.admit()
        try:
            return OpeningPermit(self, key, await self.admit(upstream), own)
        except BaseException:
            if own is not None:
                own.abandoned()
            raise

    # -- principals ------------------------------------------------------------------------------------------------

    def principal_denied(self, key: tuple[str, str, str], permit: Permit | None) -> None:
        """`OpeningPermit.denied`."""
        if permit is None:
            breaker = self._principals.get(key)
            if breaker is None:
                breaker = Breaker(f"{key[0]} (with these credentials)", self.settings, now=self._now)
                self._principals[key] = breaker
                if len(self._principals) > self._max_principals:
                    self._principals.popitem(last=False)
            if breaker.state is not BreakerState.CLOSED:
                return  # others were refused as well since this one was let through
            permit = breaker.admit()
        permit.failed()

    def principal_admitted(self, key: tuple[str, str, str]) -> None:
        """`OpeningPermit.succeeded`."""
        self._principals.pop(key, None)

    # -- the fleet -------------------------------------------------------------------------------------------------

    def reports(self) -> list[Report]:
        """What the fleet is to be told and asked now. One at a time: `heard` or `alone` comes before the next."""
        now, before = self._now(), self._sent_at
        self._sent_at = now
        reports: list[Report] = []
        for name, known in self._upstreams.items():
            breaker = known.breaker
            known.sent, known.asked = known.changes, known.wants_probe
            if breaker.succeeded_at > before:
                known.counted = 0
                reports.append(Report("succeeded", name))
            if breaker.state is BreakerState.CLOSED:
                if known.changes != known.told and breaker.age_s < STALE_S:
                    reports.append(Report("closed", name))
                if breaker.failures > known.counted:
                    reports.append(Report("failed", name, failures=breaker.failures - known.counted))
                known.counted = breaker.failures
                continue
            known.counted = 0
            if breaker.retry_after_s:
                if known.changes != known.told:
                    reports.append(Report("opened", name, breaker.retry_after_s, breaker.openings))
            elif known.wants_probe or (
                breaker.state is BreakerState.HALF_OPEN and breaker.age_s < breaker.settings.probe_s
            ):
                reports.append(Report("probe", name, openings=breaker.openings, age_s=now - breaker.opened_at))
        return reports

    def heard(self, circuits: Iterable[Circuit]) -> None:
        """Take what the fleet answered to `reports`."""
        self._fleet_until = self._sent_at + FLEET_S
        told = {circuit.upstream: circuit for circuit in circuits}
        for name, circuit in told.items():
            known = self._upstreams.get(name)
            if known is not None and known.changes != known.sent:
                continue  # what was heard is older than what happened here since
            if circuit.state == "closed":
                # One from before the breaker opened here is old news. The other end compares the same figures.
                if known is not None and circuit.age_s < round(self._sent_at - known.breaker.opened_at, 3):
                    self.closed_elsewhere(name)
            elif circuit.state == "open":
                probe_s = 0.0 if circuit.mine else circuit.probe_s
                self.open_elsewhere(
                    name, max(circuit.remaining_s, probe_s), openings=circuit.openings, age_s=circuit.age_s
                )
                if circuit.mine and circuit.probe_s:
                    self._known(name).leave_until = self._sent_at + circuit.probe_s
        for name, known in self._upstreams.items():
            known.told = known.sent
            if known.asked:
                known.asked = known.wants_probe = False
                if name not in told:  # it keeps no account of this one, so there is nobody to wait for
                    known.leave_until = self._sent_at + FLEET_S
            if known.breaker.retry_after_s and name not in told:
                known.changes += 1  # what it knew was lost, so it is told again
        self._wake()

    def alone(self) -> None:
        """The fleet does not answer: from now on each worker probes on its own account."""
        self._fleet_until = -inf
        for known in self._upstreams.values():
            known.asked = known.wants_probe = False
        self._wake()

    def open_elsewhere(self, upstream: str, remaining_s: float, *, openings: int = 1, age_s: float = 0.0) -> None:
        """The fleet has opened the circuit `age_s` ago, and probes in `remaining_s`.

        Not believed where a call has succeeded since: one worker may have lost its network.
        """
        breaker = self._known(upstream).breaker
        if breaker.state is BreakerState.CLOSED and breaker.succeeded_at > self._now() - age_s:
            return
        with self._quietly():
            breaker.open_for(remaining_s, openings=openings, age_s=age_s)

    def closed_elsewhere(self, upstream: str) -> None:
        """A probe of another worker has succeeded."""
        known = self._upstreams.get(upstream)
        if known is not None:
            with self._quietly():
                known.breaker.close()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _known(self, upstream: str) -> _Known:
        known = self._upstreams.get(upstream)
        if known is None:
            known = self._upstreams[upstream] = self._make(upstream)
            if len(self._upstreams) > MAX_UPSTREAMS:
                self._upstreams.popitem(last=False)
        else:
            self._upstreams.move_to_end(upstream)
        return known

    def _make(self, upstream: str) -> _Known:
        breaker = Breaker(upstream, self.settings, now=self._now)
        known = _Known(breaker)
        breaker.on_change = lambda: self._changed(upstream, known)
        breaker.may_probe = lambda: self._may_probe(known)
        return known

    def _changed(self, upstream: str, known: _Known) -> None:
        state = known.breaker.state
        if state is BreakerState.CLOSED or known.breaker.retry_after_s:
            known.leave_until = -inf  # the leave was for one probe
        if not self._hearing:
            known.changes += 1
        self.on_change(upstream, state)
        if not self._hearing:
            self.on_due()

    def _may_probe(self, known: _Known) -> bool:
        now = self._now()
        if now >= self._fleet_until or now < known.leave_until:
            return True
        known.wants_probe = True
        self.on_due()
        return False

    @contextmanager
    def _quietly(self) -> Generator[None, None, None]:
        """Changes that come from the fleet are not told to it."""
        self._hearing = True
        try:
            yield
        finally:
            self._hearing = False

    async def _answer(self) -> None:
        """Wait for the next answer of the fleet, or the news that there is none."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(answer)
        try:
            await answer
        finally:
            self._waiting.discard(answer)

    def _wake(self) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_result(None)
