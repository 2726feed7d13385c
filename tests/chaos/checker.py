"""The checker: reads the journals of a run and says what must not have been. It knows nothing of how the run was made.

    ran twice            a request that is not safe reached the upstream more than once
    no outcome           a call had no outcome by its deadline and a second, but for the time its worker was stopped
    not_run, but ran     the client was told that nothing ran
    ok, but never ran    the client was given an answer that the upstream did not give
    went back            a counter is not larger than one that was told before the call was made
    another session      a home's calls ran in another upstream session, and nobody was told
    crossed              an answer to another request, or of another principal or session
    wrong principal      a call ran in a session that another principal opened, or with another's credentials
    ended under it       the upstream was told to end a session whose client had not
    lost                 a client was told that its own session is gone, which it had not ended itself
    opened twice         of a session that is shared, while the first one was there, and had been used
    no honest outcome    an answer that is none: a 5xx without outcome, an error the upstream never gave
    slow recovery        not everything served again in time after a fault
    over its limit       a figure that was measured

`gone` (404) ends a home, for the client initializes again. Of a session that is shared it is an honest end: one that
was not open for long when its owner died has no record that another could go on with.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from chaos.history import DRIVER, SHARED, Call, Execution, History

SLACK_S = 1.0
"""How long after its deadline a call may still get its outcome."""


@dataclass(frozen=True, slots=True)
class Violation:
    kind: str
    what: str
    at: float
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} (at {self.at:.3f}, fault: {self.fault})"


@dataclass
class Report:
    """What a history comes to."""

    violations: list[Violation] = field(default_factory=list[Violation])
    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    executions: int = 0
    repeated: int = 0
    """Safe requests that ran more than once."""
    ran_unknown: int = 0
    """Calls of unknown outcome, or whose connection was lost, that did run."""
    longest_s: float = 0.0
    """The longest that a call took beyond its deadline, where that is more than nothing."""

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {count:,}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.calls:,} calls ({outcomes}), {self.executions:,} executions, {self.repeated:,} safe ones repeated, "
            f"{self.ran_unknown:,} of unknown outcome had run, {len(self.violations)} violations"
        )


def check(history: History, now: float) -> Report:
    """Judge a run that has come to rest at `now`."""
    ran: defaultdict[str, list[Execution]] = defaultdict(list)
    for execution in history.executions:
        ran[execution.id].append(execution)
    report = Report(calls=len(history.calls), executions=len(history.executions))
    found: list[Violation] = []
    for call in history.calls:
        report.outcomes[call.outcome or "none"] += 1
        runs = len(ran[call.id])
        report.repeated += call.safe and runs > 1
        report.ran_unknown += call.outcome in ("unknown", "lost") and runs > 0
        late_s = _late(call, history, now)
        report.longest_s = max(report.longest_s, late_s)
        if late_s > SLACK_S:
            found.append(Violation("no outcome", f"{_named(call)}, {late_s:.1f} s after its deadline", call.deadline))
        found.extend(_runs(call, runs))
        found.extend(_answer(call))
    found.extend(_strangers(history, ran))
    found.extend(_homes(history))
    found.extend(_endings(history))
    found.extend(_losses(history))
    found.extend(_opened(history))
    found.extend(_figures(history))
    found.sort(key=lambda violation: violation.at)
    report.violations = [Violation(v.kind, v.what, v.at, history.fault_at(v.at)) for v in found]
    return report


def _named(call: Call) -> str:
    return f"{call.method} {call.id} of {call.client} by {call.edge or 'nobody'}: {call.outcome} {call.detail}".rstrip()


def _late(call: Call, history: History, now: float) -> float:
    """Seconds beyond the deadline at which the call got its outcome, or `now`, for which its worker is not to blame."""
    ended = now if call.ended is None else call.ended
    if ended <= call.deadline:
        return 0.0
    stopped = sum(pause.overlap(call.sent, ended) for pause in history.pauses if pause.name in (call.edge, DRIVER))
    return max(0.0, ended - call.deadline - stopped)


def _runs(call: Call, runs: int) -> Iterator[Violation]:
    at = call.ended or call.sent
    if runs > 1 and not call.safe:
        yield Violation("ran twice", f"{_named(call)}, {runs} times", at)
    if runs and call.outcome in ("not_run", "gone"):
        yield Violation("not_run, but ran", _named(call), at)
    # `initialize` of a session that is shared is answered by its owner, who initialized it once for all.
    if call.outcome == "ok" and not runs and call.method != "initialize":
        yield Violation("ok, but never ran", _named(call), at)


def _answer(call: Call) -> Iterator[Violation]:
    at = call.ended or call.sent
    if call.outcome == "error":
        yield Violation("no honest outcome", _named(call), at)
    if call.rpc_id is not None and call.rpc_id != call.id:
        yield Violation("crossed", f"{_named(call)} was given the answer to {call.rpc_id!r}", at)
    told = call.told
    if told is not None and (told.request, told.principal) != (call.id, call.principal):
        yield Violation("crossed", f"{_named(call)} was given that of {told.principal}, {told.request}", at)


def _strangers(history: History, ran: defaultdict[str, list[Execution]]) -> Iterator[Violation]:
    """Who asked, with whose credentials it ran, and who opened the session: one and the same."""
    for call in history.calls:
        for run in ran[call.id]:
            if not call.principal == run.principal == run.opened_by:
                who = f"{_named(call)}: asked by {call.principal}, run as {run.principal}, opened by {run.opened_by}"
                yield Violation("wrong principal", who, run.at)


def _homes(history: History) -> Iterator[Violation]:
    """What a call is told is newer than whatever was told before it was sent."""
    homes: defaultdict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        if call.method != "initialize" and call.ended is not None and (call.told is not None or call.outcome == "gone"):
            homes[call.home].append(call)
    for calls in homes.values():
        yield from _home(calls)


def _home(calls: list[Call]) -> Iterator[Violation]:
    """One pass over the moments at which calls were sent and answered."""
    known, session, age = 0, "", 0
    at_sending: dict[str, tuple[int, str, int]] = {}
    moments = [(call.sent, 1, call) for call in calls] + [(call.ended or 0.0, 0, call) for call in calls]
    for at, sending, call in sorted(moments, key=lambda moment: moment[:2]):
        if sending:
            at_sending[call.id] = known, session, age
            continue
        told = call.told
        if told is None:  # gone: whoever is told so begins anew
            known, session, age = 0, "", age + 1
            continue
        before, in_session, in_age = at_sending.get(call.id, (known, session, age))
        if in_age != age:
            continue
        if in_session not in ("", told.session):
            yield Violation("another session", f"{_named(call)}: {told.session}, was {in_session}", at)
        elif told.counter < before + call.counts:
            yield Violation("went back", f"{_named(call)}: {told.counter} after {before}", at)
        known, session = max(known, told.counter), told.session


def _endings(history: History) -> Iterator[Violation]:
    """A session of which a client was told is ended by that client, or after it was told that it is gone."""
    first: dict[str, Call] = {}
    gone: dict[str, float] = {}
    for call in history.calls:
        if call.told is not None and call.ended is not None:
            first.setdefault(call.told.session, call)
        if call.outcome == "gone" and call.ended is not None:
            gone[call.home] = min(call.ended, gone.get(call.home, call.ended))
    for ending in history.endings:
        call = first.get(ending.session)
        if call is None or (call.ended or 0.0) > ending.at:
            continue
        allowed = min(gone.get(call.home, ending.at + 1), history.closed.get(call.home, ending.at + 1))
        if allowed > ending.at:
            yield Violation("ended under it", f"session {ending.session} of {call.client}", ending.at)


def _losses(history: History) -> Iterator[Violation]:
    """A client's own session is there until the client ends it, whatever becomes of workers and Redis."""
    for call in history.calls:
        if call.outcome != "gone" or call.ended is None or call.home.startswith(SHARED):
            continue
        if history.closed.get(call.home, call.ended + 1) > call.ended:
            yield Violation("lost", f"the session of {call.home}: {_named(call)}", call.ended)


def _opened(history: History) -> Iterator[Violation]:
    """What was opened and never used may be of a worker that died, or was not answered in time, before it could."""
    used = {execution.session for execution in history.executions}
    gone = [(call.home, call.ended or 0.0) for call in history.calls if call.outcome == "gone"]
    ended = {ending.session: ending.at for ending in history.endings}
    last: dict[str, tuple[str, float]] = {}
    for opening in history.openings:
        if not opening.home or opening.session not in used:
            continue
        before = last.get(opening.home)
        last[opening.home] = opening.session, opening.at
        if before is None or ended.get(before[0], opening.at + 1) <= opening.at:
            continue
        if not any(home == opening.home and before[1] <= at <= opening.at for home, at in gone):
            yield Violation("opened twice", f"{opening.home}: {opening.session} beside {before[0]}", opening.at)


def _figures(history: History) -> Iterator[Violation]:
    for recovery in history.recoveries:
        if recovery.seconds is None or recovery.seconds > recovery.limit:
            took = "never" if recovery.seconds is None else f"{recovery.seconds:.2f} s"
            yield Violation("slow recovery", f"{recovery.fault}: {took}, limit {recovery.limit:.2f} s", recovery.at)
    for figure in history.measured:
        if figure.value > figure.limit:
            yield Violation("over its limit", f"{figure.what}: {figure.value:,.0f} of {figure.limit:,.0f}", figure.at)
