"""B16: the circuit breaker of one upstream, and the registry of all of them, as far as one worker goes."""

from __future__ import annotations

import asyncio
import timeit
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from leasehold.pool import CallTimeout, Fenced, OpenFailed, PoolError, UpstreamLost
from leasehold.pool.breaker import JITTER, Breaker, BreakerSettings, BreakerState, Permit
from leasehold.pool.breakers import FLEET_S, STALE_S, Breakers, Report
from leasehold.pool.errors import CircuitOpen

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SETTINGS = BreakerSettings(threshold=3, open_s=1.0, max_open_s=8.0, probe_s=30.0)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time

    def pass_(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return made(clock)


def made(clock: Clock) -> Breaker:
    """A breaker without jitter."""
    return Breaker("github", SETTINGS, now=clock, chance=lambda _low, high: high)


def fail(breaker: Breaker, times: int = SETTINGS.threshold) -> None:
    for _ in range(times):
        breaker.admit().failed()


def probe(breaker: Breaker, clock: Clock) -> Permit:
    clock.pass_(breaker.retry_after_s)
    return breaker.admit()


class Model(RuleBasedStateMachine):
    """Any order of calls, results, late results and news, beside a model that numbers every call."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = made(self.clock)
        self.changes: list[BreakerState] = []
        self.breaker.on_change = lambda: self.changes.append(self.breaker.state)
        self.permits: list[tuple[Permit, int, bool]] = []
        """With the epoch in which each was given out, and whether as a probe."""
        self.epoch = 0
        self.state = CLOSED
        self.failures = self.openings = 0
        self.due = self.probed = 0.0

    def _open(self, seconds: float) -> None:
        self.state, self.due, self.epoch = OPEN, self.clock.time + seconds, self.epoch + 1

    def _fail(self) -> None:
        self.openings += 1
        self._open(min(SETTINGS.max_open_s, SETTINGS.open_s * 2 ** (self.openings - 1)))

    def _close(self) -> None:
        self.state, self.failures, self.openings, self.epoch = CLOSED, 0, 0, self.epoch + 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0, 8.0, 29.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.pass_(seconds)

    @rule()
    def call(self) -> None:
        now = self.clock.time
        lapsed = self.state is HALF_OPEN and now - self.probed >= SETTINGS.probe_s
        admits = self.state is CLOSED or lapsed or (self.state is OPEN and now >= self.due)
        if not admits:
            with pytest.raises(CircuitOpen) as refused:
                self.breaker.admit()
            assert 0 < refused.value.retry_after_s <= SETTINGS.max_open_s
            return
        permit = self.breaker.admit()
        if self.state is not CLOSED:
            self.state, self.probed, self.epoch = HALF_OPEN, now, self.epoch + 1
        self.permits.append((permit, self.epoch, self.state is HALF_OPEN))

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), result=st.sampled_from(["succeeded", "failed", "abandoned"]), keep=st.booleans())
    def call_ends(self, data: st.DataObject, result: str, keep: bool) -> None:
        """`keep`: its result is told once more later."""
        index = data.draw(st.integers(0, len(self.permits) - 1))
        permit, epoch, is_probe = self.permits[index] if keep else self.permits.pop(index)
        before = self.state
        getattr(permit, result)()
        if epoch != self.epoch:
            return  # late
        if is_probe:
            if result == "succeeded":
                self._close()
            elif result == "failed":
                self.failures += 1
                self._fail()
            else:
                self._open(0.0)
        elif result == "succeeded":
            self.failures = 0
        elif result == "failed":
            assert before is CLOSED
            self.failures += 1
            if self.failures >= SETTINGS.threshold:
                self._fail()

    @rule(seconds=st.sampled_from([0.0, 2.0]), openings=st.integers(1, 4))
    def opened_elsewhere(self, seconds: float, openings: int) -> None:
        self.breaker.open_for(seconds, openings=openings)
        if self.state is not HALF_OPEN:
            self.openings = openings
            if self.state is CLOSED:
                self._open(seconds)
            self.due = self.clock.time + seconds

    @rule()
    def closed_elsewhere(self) -> None:
        self.breaker.close()
        if self.state is not CLOSED:
            self._close()

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        assert self.breaker.state is self.state
        assert self.breaker.failures == self.failures
        assert self.breaker.openings == self.openings
        assert self.breaker.retry_after_s == (max(0.0, self.due - self.clock.time) if self.state is OPEN else 0.0)
        assert self.state is not CLOSED or self.failures < SETTINGS.threshold

    @invariant()
    def one_probe_at_most_counts(self) -> None:
        assert len({epoch for _, epoch, is_probe in self.permits if is_probe and epoch == self.epoch}) <= 1

    @invariant()
    def changes_were_told(self) -> None:
        assert not self.changes or self.changes[-1] is self.state


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


class TestB16Breaker:
    """B16: connection failures open it, one probe at a time closes it."""

    def test_failures_in_a_row_open_it_and_a_success_between_starts_the_count_again(self, breaker: Breaker) -> None:
        for _ in range(10):
            fail(breaker, SETTINGS.threshold - 1)
            breaker.admit().succeeded()
        assert breaker.state is CLOSED
        fail(breaker)
        assert breaker.state is OPEN

    def test_an_open_circuit_refuses_without_trying_and_says_for_how_long(self, breaker: Breaker, clock: Clock) -> None:
        fail(breaker)
        clock.pass_(0.25)
        with pytest.raises(CircuitOpen, match="github is failing") as refused:
            breaker.admit()
        assert isinstance(refused.value, PoolError)
        assert refused.value.outcome == "not_run"
        assert refused.value.retry_after_s == pytest.approx(0.75)

    def test_of_many_calls_after_its_time_one_is_the_probe(self, breaker: Breaker, clock: Clock) -> None:
        fail(breaker)
        clock.pass_(1.0)
        breaker.admit()
        for _ in range(99):
            with pytest.raises(CircuitOpen) as refused:
                breaker.admit()
            assert refused.value.retry_after_s > 0
        assert breaker.state is HALF_OPEN
        assert breaker.statistics().refused == 99

    def test_each_probe_that_fails_doubles_the_time_up_to_the_longest(self, breaker: Breaker, clock: Clock) -> None:
        fail(breaker)
        times = [breaker.retry_after_s]
        for _ in range(40):
            probe(breaker, clock).failed()
            times.append(breaker.retry_after_s)
        assert times == pytest.approx([1, 2, 4, *[8] * 38])

    def test_a_probe_that_succeeds_closes_it_and_the_next_opening_is_short_again(
        self, breaker: Breaker, clock: Clock
    ) -> None:
        fail(breaker)
        probe(breaker, clock).failed()
        probe(breaker, clock).succeeded()
        assert (breaker.state, breaker.failures) == (CLOSED, 0)
        fail(breaker)
        assert breaker.retry_after_s == pytest.approx(1.0)

    def test_a_probe_that_was_abandoned_leaves_its_place_to_the_next_caller(
        self, breaker: Breaker, clock: Clock
    ) -> None:
        fail(breaker)
        probe(breaker, clock).abandoned()
        assert breaker.state is OPEN
        breaker.admit().succeeded()
        assert breaker.state is CLOSED

    def test_a_probe_of_which_nothing_is_heard_is_waited_for_a_while_only(self, breaker: Breaker, clock: Clock) -> None:
        fail(breaker)
        lost = probe(breaker, clock)
        clock.pass_(SETTINGS.probe_s - 0.1)
        with pytest.raises(CircuitOpen):
            breaker.admit()
        clock.pass_(0.2)
        second = breaker.admit()
        lost.failed()
        assert breaker.state is HALF_OPEN
        second.succeeded()
        assert breaker.state is CLOSED

    @pytest.mark.parametrize("result", ["succeeded", "failed", "abandoned"])
    def test_late_results_of_calls_from_before_the_opening_change_nothing(
        self, breaker: Breaker, clock: Clock, result: str
    ) -> None:
        late = breaker.admit()
        fail(breaker)
        clock.pass_(0.5)
        getattr(late, result)()
        assert (breaker.state, breaker.retry_after_s, breaker.failures) == (OPEN, 0.5, SETTINGS.threshold)
        running = probe(breaker, clock)
        getattr(late, result)()
        assert breaker.state is HALF_OPEN
        running.succeeded()
        for _ in range(SETTINGS.threshold):
            getattr(late, result)()
        assert (breaker.state, breaker.failures) == (CLOSED, 0)

    def test_what_broke_many_calls_at_once_counts_once(self, breaker: Breaker) -> None:
        """A process that dies with a hundred calls in flight is one failure; three that die are three."""
        permits = [breaker.admit() for _ in range(100)]
        for n, permit in enumerate(permits):
            permit.failed(event=f"process-{n % 2}")
        assert (breaker.state, breaker.failures) == (CLOSED, 2)
        breaker.admit().failed(event="process-2")
        assert breaker.state is OPEN

    def test_an_event_counts_again_after_a_success(self, breaker: Breaker) -> None:
        for _ in range(2):
            breaker.admit().failed(event="a")
            assert breaker.failures == 1
            breaker.admit().succeeded()

    @pytest.mark.parametrize(
        ("error", "state"),
        [
            (OpenFailed("refused"), OPEN),
            (UpstreamLost("reset"), OPEN),
            (CallTimeout("silent"), CLOSED),
            (Fenced("lease"), CLOSED),
            (PoolError("other"), CLOSED),
            (RuntimeError("a tool failed"), CLOSED),
            (asyncio.CancelledError(), CLOSED),
        ],
    )
    def test_as_a_context_it_counts_failures_of_connection_and_transport_only(
        self, breaker: Breaker, error: BaseException, state: BreakerState
    ) -> None:
        for _ in range(SETTINGS.threshold):
            with pytest.raises(type(error)), breaker.admit():
                raise error
        assert breaker.state is state

    def test_what_says_nothing_does_not_start_the_count_again(self, breaker: Breaker) -> None:
        fail(breaker, 2)
        with pytest.raises(CallTimeout), breaker.admit():
            raise CallTimeout("silent")
        fail(breaker, 1)
        assert breaker.state is OPEN

    def test_a_probe_may_tell_its_success_before_its_end(self, breaker: Breaker, clock: Clock) -> None:
        fail(breaker)
        permit = probe(breaker, clock)
        permit.succeeded()
        assert breaker.state is CLOSED
        with pytest.raises(asyncio.CancelledError), permit:
            raise asyncio.CancelledError
        assert breaker.state is CLOSED

    @given(st.integers(0, 60), st.floats(0, 1))
    def test_jitter_makes_an_opening_shorter_never_longer(self, failed_probes: int, dice: float) -> None:
        clock = Clock()
        breaker = Breaker("x", SETTINGS, now=clock, chance=lambda low, high: low + (high - low) * dice)
        fail(breaker)
        for _ in range(failed_probes):
            probe(breaker, clock).failed()
        longest = min(SETTINGS.max_open_s, SETTINGS.open_s * 2**failed_probes)
        assert longest * (1 - JITTER) - 1e-6 <= breaker.retry_after_s <= longest + 1e-6

    def test_statistics_and_repr_say_what_it_does(self, breaker: Breaker, clock: Clock) -> None:
        assert repr(breaker) == "<Breaker github closed for 0.0 s, failures=0>"
        clock.pass_(5)
        fail(breaker)
        clock.pass_(0.25)
        with pytest.raises(CircuitOpen):
            breaker.admit()
        found = breaker.statistics()
        assert (found.state, found.age_s, found.failures) == (OPEN, 0.25, 3)
        assert (found.retry_after_s, found.opened, found.refused) == (0.75, 1, 1)
        assert repr(breaker) == "<Breaker github open for 0.2 s, failures=3, retry in 0.8 s>"
        clock.pass_(1)
        assert repr(breaker).endswith("the next call is a probe>")

    def test_admission_and_success_cost_almost_nothing(self) -> None:
        """Under a microsecond on any machine of today; ten are allowed here, for this one may be busy."""
        breaker = Breaker("x")
        best = min(timeit.repeat(lambda: breaker.admit().succeeded(), number=10_000, repeat=5))
        assert best / 10_000 < 10e-6


@dataclass
class Told:
    """What a fleet says of an upstream."""

    upstream: str = "github"
    state: str = "open"
    age_s: float = 0.0
    remaining_s: float = 0.0
    openings: int = 1
    probe_s: float = 0.0
    mine: bool = False


@dataclass
class Rig:
    """A registry, its clock, and what it told."""

    clock: Clock = field(default_factory=Clock)
    breakers: Breakers = field(init=False)
    changes: list[tuple[str, BreakerState]] = field(default_factory=list)
    dues: int = 0

    def __post_init__(self) -> None:
        self.breakers = Breakers(SETTINGS, now=self.clock, max_principals=3)
        self.breakers.on_change = lambda upstream, state: self.changes.append((upstream, state))
        self.breakers.on_due = self._due

    def _due(self) -> None:
        self.dues += 1

    @property
    def github(self) -> Breaker:
        return self.breakers.upstream("github")

    def exchange(self, *circuits: Told) -> list[Report]:
        reports = self.breakers.reports()
        self.breakers.heard(circuits)
        return reports

    def kinds(self, *circuits: Told) -> list[str]:
        return [report.kind for report in self.exchange(*circuits)]


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.anyio
class TestB16Principals:
    """B16: a failure that is the principal's is counted for that principal and credential alone."""

    async def denied(self, rig: Rig, principal: str = "alice", fingerprint: str = "f1") -> None:
        (await rig.breakers.admit_opening("github", principal, fingerprint)).denied()

    async def test_refused_credentials_close_nobody_else_out(self, rig: Rig) -> None:
        for _ in range(SETTINGS.threshold):
            await self.denied(rig)
        with pytest.raises(CircuitOpen, match=r"github \(with these credentials\) is failing"):
            await self.denied(rig)
        assert rig.github.state is CLOSED
        for principal, fingerprint in (("bob", "f1"), ("alice", "f2")):
            (await rig.breakers.admit_opening("github", principal, fingerprint)).succeeded()
        (await rig.breakers.admit_opening("gitlab", "alice", "f1")).succeeded()
        assert rig.breakers.statistics().principals_refused == 1

    async def test_a_refusal_is_an_answer_of_the_upstream(self, rig: Rig) -> None:
        fail(rig.github, 2)
        await self.denied(rig)
        assert rig.github.failures == 0

    async def test_after_its_time_one_attempt_is_let_through(self, rig: Rig) -> None:
        for _ in range(SETTINGS.threshold):
            await self.denied(rig)
        rig.clock.pass_(1.0)
        attempt = await rig.breakers.admit_opening("github", "alice", "f1")
        with pytest.raises(CircuitOpen):
            await self.denied(rig)
        attempt.succeeded()
        await self.denied(rig)
        assert rig.breakers.statistics().principals_refused == 0

    async def test_a_failed_connection_is_the_upstreams(self, rig: Rig) -> None:
        await self.denied(rig)
        for _ in range(SETTINGS.threshold):
            (await rig.breakers.admit_opening("github", "alice", "f1")).failed()
        assert rig.github.state is OPEN
        assert rig.breakers.statistics().principals_refused == 0

    async def test_a_principals_probe_is_given_back_when_the_upstream_is_not_to_be_tried(self, rig: Rig) -> None:
        for _ in range(SETTINGS.threshold):
            await self.denied(rig)
        rig.clock.pass_(1.0)
        fail(rig.github)
        with pytest.raises(CircuitOpen, match=r"^github is failing"):
            await self.denied(rig)
        rig.github.close()
        (await rig.breakers.admit_opening("github", "alice", "f1")).abandoned()
        (await rig.breakers.admit_opening("github", "alice", "f1")).succeeded()

    async def test_an_upstreams_probe_is_not_taken_by_a_principal_who_may_not_try(self, rig: Rig) -> None:
        for _ in range(SETTINGS.threshold):
            await self.denied(rig)
        rig.github.open_for(0.0, openings=1)
        with pytest.raises(CircuitOpen, match="with these credentials"):
            await self.denied(rig)
        assert rig.github.state is OPEN

    async def test_denials_of_attempts_that_ran_together_are_counted(self, rig: Rig) -> None:
        attempts = [await rig.breakers.admit_opening("github", "alice", "f1") for _ in range(20)]
        for attempt in attempts:
            attempt.denied()
        with pytest.raises(CircuitOpen, match="with these credentials"):
            await self.denied(rig)

    async def test_there_is_a_bound_and_who_was_seen_last_stays(self, rig: Rig) -> None:
        for principal in ("a", "b", "c"):
            await self.denied(rig, principal)
        await self.denied(rig, "a")
        await self.denied(rig, "d")
        assert rig.breakers.statistics().principals == 3
        await self.denied(rig, "a")
        with pytest.raises(CircuitOpen):
            await self.denied(rig, "a")

    async def test_b19_neither_principal_nor_fingerprint_is_shown(self, rig: Rig) -> None:
        for _ in range(SETTINGS.threshold):
            await self.denied(rig, "s3cret-principal", "s3cret-fingerprint")
        with pytest.raises(CircuitOpen) as refused:
            await self.denied(rig, "s3cret-principal", "s3cret-fingerprint")
        assert "s3cret" not in f"{refused.value} {rig.breakers!r} {rig.breakers.statistics()}"


@pytest.mark.anyio
class TestB16OneWorkerOfAFleet:
    """B16: what a worker tells the fleet, and what it takes from it."""

    async def test_without_a_fleet_a_worker_probes_on_its_own_account(self, rig: Rig) -> None:
        fail(rig.github)
        rig.clock.pass_(1.0)
        (await rig.breakers.admit("github")).succeeded()
        assert rig.changes == [("github", OPEN), ("github", HALF_OPEN), ("github", CLOSED)]

    async def test_an_opening_is_told_at_once_and_once(self, rig: Rig) -> None:
        assert rig.exchange() == []
        fail(rig.github)
        assert rig.dues == 1
        (report,) = rig.exchange(Told(remaining_s=1.0))
        assert (report.kind, report.upstream, report.openings) == ("opened", "github", 1)
        assert 0 < report.open_s <= SETTINGS.open_s
        assert rig.kinds(Told(remaining_s=0.9)) == []

    async def test_an_opening_that_could_not_be_told_is_told_later(self, rig: Rig) -> None:
        fail(rig.github)
        rig.breakers.reports()
        rig.breakers.alone()
        assert rig.kinds(Told(remaining_s=1.0)) == ["opened"]

    async def test_an_opening_that_the_fleet_has_forgotten_is_told_again(self, rig: Rig) -> None:
        fail(rig.github)
        rig.exchange(Told(remaining_s=1.0))
        rig.exchange()
        assert rig.kinds(Told(remaining_s=0.5)) == ["opened"]

    async def test_an_opening_elsewhere_opens_here_and_is_not_told_back(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=4.0, openings=3))
        with pytest.raises(CircuitOpen) as refused:
            await rig.breakers.admit("github")
        assert refused.value.retry_after_s == pytest.approx(4.0)
        assert rig.changes == [("github", OPEN)]
        assert (rig.dues, rig.kinds(Told(remaining_s=4.0, openings=3))) == (0, [])
        assert rig.github.openings == 3

    async def test_a_closing_elsewhere_closes_here_and_is_not_told_back(self, rig: Rig) -> None:
        fail(rig.github)
        rig.exchange(Told(remaining_s=1.0))
        rig.clock.pass_(1.0)
        rig.dues = 0
        assert rig.kinds(Told(state="closed", age_s=0.1)) == []
        assert rig.github.state is CLOSED
        assert (rig.dues, rig.kinds(Told(state="closed", age_s=1.1))) == (0, [])

    async def test_a_closing_from_before_the_opening_here_is_old_news(self, rig: Rig) -> None:
        fail(rig.github)
        rig.clock.pass_(10)
        rig.exchange(Told(state="closed", age_s=10.001))
        assert rig.github.state is OPEN
        rig.exchange(Told(state="closed", age_s=9.999))
        assert rig.github.state is CLOSED

    async def test_what_was_heard_is_older_than_what_happened_since_it_was_asked(self, rig: Rig) -> None:
        rig.breakers.reports()
        fail(rig.github)
        rig.breakers.heard([Told(state="closed", age_s=-1.0)])
        assert rig.github.state is OPEN
        assert rig.kinds(Told(remaining_s=1.0)) == ["opened"]

    async def test_an_opening_elsewhere_is_not_believed_where_calls_have_succeeded_since(self, rig: Rig) -> None:
        rig.github.admit().succeeded()
        rig.clock.pass_(1.0)
        rig.exchange(Told(remaining_s=60.0, age_s=1.5))
        assert rig.github.state is CLOSED
        rig.exchange(Told(remaining_s=60.0, age_s=0.5))
        assert rig.github.state is OPEN

    async def test_with_a_fleet_a_probe_waits_for_leave(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        callers = [asyncio.create_task(rig.breakers.admit("github")) for _ in range(10)]
        await asyncio.sleep(0)
        (report,) = rig.breakers.reports()
        assert report.kind == "probe"
        rig.breakers.heard([Told(mine=True, probe_s=5.0)])
        results = await asyncio.gather(*callers, return_exceptions=True)
        permits = [result for result in results if isinstance(result, Permit)]
        assert len(permits) == 1
        assert sum(isinstance(result, CircuitOpen) for result in results) == 9
        rig.clock.pass_(0.1)
        permits[0].succeeded()
        assert rig.kinds(Told(state="closed")) == ["succeeded", "closed"]

    async def test_a_probe_that_another_worker_makes_is_waited_for(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        caller = asyncio.create_task(rig.breakers.admit("github"))
        await asyncio.sleep(0)
        rig.exchange(Told(probe_s=5.0))
        with pytest.raises(CircuitOpen) as refused:
            await caller
        assert refused.value.retry_after_s == pytest.approx(5.0)

    async def test_an_ask_that_came_after_the_question_waits_for_the_next_answer(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        rig.breakers.reports()
        caller = asyncio.create_task(rig.breakers.admit("github"))
        await asyncio.sleep(0)
        rig.breakers.heard([Told(remaining_s=0.0)])
        await asyncio.sleep(0)
        assert not caller.done()
        assert rig.kinds(Told(mine=True, probe_s=5.0)) == ["probe"]
        (await caller).succeeded()

    async def test_an_answer_that_does_not_come_ends_the_wait(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        with pytest.raises(CircuitOpen):
            await rig.breakers.admit("github")

    async def test_a_fleet_that_is_out_of_reach_ends_the_wait_and_the_worker_probes_itself(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        caller = asyncio.create_task(rig.breakers.admit("github"))
        await asyncio.sleep(0)
        rig.breakers.reports()
        rig.breakers.alone()
        (await caller).succeeded()

    async def test_a_fleet_not_heard_of_for_a_while_is_not_asked(self, rig: Rig) -> None:
        """The housekeeper hangs, or is not there any more."""
        rig.exchange(Told(remaining_s=0.0))
        rig.clock.pass_(FLEET_S)
        (await rig.breakers.admit("github")).succeeded()

    async def test_a_fleet_that_keeps_no_account_of_an_upstream_holds_nobody_up(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        caller = asyncio.create_task(rig.breakers.admit("github"))
        await asyncio.sleep(0)
        rig.exchange()
        (await caller).succeeded()

    async def test_leave_is_for_one_probe(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        caller = asyncio.create_task(rig.breakers.admit("github"))
        await asyncio.sleep(0)
        rig.exchange(Told(mine=True, probe_s=60.0))
        (await caller).failed()
        (report,) = rig.exchange(Told(remaining_s=2.0, openings=2))
        assert (report.kind, report.openings) == ("opened", 2)
        rig.clock.pass_(2.0)
        rig.exchange(Told(remaining_s=0.0))
        with pytest.raises(CircuitOpen):
            rig.github.admit()

    async def test_leave_that_was_not_used_stays_for_the_next_caller_until_it_ends(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        caller = asyncio.create_task(rig.breakers.admit("github"))
        await asyncio.sleep(0)
        rig.exchange(Told(mine=True, probe_s=2.0))
        (await caller).abandoned()
        (await rig.breakers.admit("github")).abandoned()
        rig.clock.pass_(2.0)
        with pytest.raises(CircuitOpen):
            rig.github.admit()

    async def test_a_probe_that_takes_long_has_its_leave_renewed_as_long_as_it_is_waited_for(self, rig: Rig) -> None:
        rig.github.open_for(0.0, openings=1)
        rig.github.admit()
        assert rig.kinds(Told(mine=True, probe_s=5.0)) == ["probe"]
        rig.clock.pass_(SETTINGS.probe_s - 1)
        assert rig.kinds(Told(mine=True, probe_s=5.0)) == ["probe"]
        rig.clock.pass_(1)
        assert rig.kinds(Told(mine=True, probe_s=5.0)) == []

    async def test_a_closing_that_could_not_be_told_for_long_is_not_told(self, rig: Rig) -> None:
        for late, kinds in ((STALE_S - 0.1, ["succeeded", "closed"]), (STALE_S, ["succeeded"])):
            fail(rig.github)
            rig.clock.pass_(1.0)
            rig.github.admit().succeeded()
            rig.clock.pass_(late)
            assert rig.kinds() == kinds
            rig.breakers.alone()

    async def test_failures_are_reported_once_and_without_those_before_a_success(self, rig: Rig) -> None:
        fail(rig.github, 2)
        (report,) = rig.exchange()
        assert (report.kind, report.failures) == ("failed", 2)
        assert rig.exchange() == []
        rig.clock.pass_(1)
        rig.github.admit().succeeded()
        fail(rig.github, 1)
        first, second = rig.exchange()
        assert (first.kind, second.kind, second.failures) == ("succeeded", "failed", 1)

    async def test_b38_the_workers_own_clock_does_not_matter(self) -> None:
        """B38: only spans are compared, so an hour of difference changes nothing."""
        answers: list[list[str]] = []
        for skew in (0.0, 3600.0, -3600.0):
            rig = Rig()
            rig.clock.pass_(skew)
            found = rig.kinds(Told(remaining_s=2.0, age_s=0.5))
            rig.clock.pass_(2.0)
            rig.github.open_for(0.0, openings=1)
            answers.append([*found, repr(rig.github)])
        assert answers[0] == answers[1] == answers[2]

    async def test_b3_a_caller_who_is_cancelled_while_it_waits_for_leave_holds_nothing(self, rig: Rig) -> None:
        rig.exchange(Told(remaining_s=0.0))
        first, second = (asyncio.create_task(rig.breakers.admit("github")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        rig.exchange(Told(mine=True, probe_s=5.0))
        (await second).succeeded()

    async def test_statistics_cover_every_upstream_and_its_repr_shows_the_ones_in_trouble(self, rig: Rig) -> None:
        rig.breakers.upstream("fine").admit().succeeded()
        fail(rig.github)
        found = rig.breakers.statistics()
        assert {name: one.state for name, one in found.upstreams.items()} == {"fine": CLOSED, "github": OPEN}
        assert "Breaker github open" in repr(rig.breakers)
        assert "Breaker fine" not in repr(rig.breakers)
