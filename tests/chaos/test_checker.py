"""The checker finds each kind of violation in a history that was made up, and nothing in one that is sound."""

from __future__ import annotations

from typing import Any

import pytest
from chaos.checker import check
from chaos.clients import judge
from chaos.history import DRIVER, SHARED, Call, Ending, Execution, History, Measured, Opening, Recovery, Span, Told

PRINCIPAL = "Bearer one"
SESSION = "upstream-1"


class Story:
    """A history in the making: a call takes a tenth of a second, and the next one begins when it has ended."""

    def __init__(self) -> None:
        self.history = History()
        self.now = 100.0
        self.counter = 0

    def call(self, **changed: Any) -> Call:
        """A call that was run and answered; what is said here is otherwise."""
        number = len(self.history.calls)
        self.counter += 1
        call = Call(
            id=f"c-{number}",
            client="c",
            principal=PRINCIPAL,
            home="c/1",
            edge="w0",
            method="count",
            counts=True,
            safe=False,
            sent=self.now,
            deadline=self.now + 5,
            ended=self.now + 0.1,
            outcome="ok",
            rpc_id=f"c-{number}",
            told=Told(f"c-{number}", PRINCIPAL, SESSION, self.counter),
        )
        for name, value in changed.items():
            setattr(call, name, value)
        if call.outcome != "ok" and "told" not in changed:
            call.told = None
        if call.told is None and "rpc_id" not in changed:
            call.rpc_id = None
        self.history.calls.append(call)
        self.now += 0.2
        return call

    def run(self, call: Call, **changed: Any) -> None:
        values: dict[str, Any] = {
            "id": call.id,
            "at": call.sent + 0.05,
            "session": SESSION,
            "opened_by": PRINCIPAL,
            "principal": PRINCIPAL,
            "counter": self.counter,
            "method": call.method,
        }
        self.history.executions.append(Execution(**{**values, **changed}))

    def good(self, **changed: Any) -> Call:
        call = self.call(**changed)
        self.run(call)
        return call

    def kinds(self) -> list[str]:
        return [violation.kind for violation in check(self.history, self.now + 60).violations]


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_sound_history_has_no_violation(story: Story) -> None:
    """Good answers, honest failures that ran or did not, safe calls that ran twice, a session that is gone."""
    for _ in range(3):
        story.good()
    story.call(outcome="not_run")
    story.call(outcome="unknown")
    story.run(story.call(outcome="unknown"))
    story.run(story.call(outcome="lost", ended=story.now + 4))
    peek = story.good(method="peek", counts=False, safe=True)
    story.run(peek)
    story.history.closed["c/1"] = story.now
    story.call(outcome="gone")
    story.counter = 0
    story.good(home="c/2", told=Told("c-9", PRINCIPAL, "upstream-2", 1))
    story.history.recoveries.append(Recovery("freeze", story.now, 1.0, 3.0))
    story.history.measured.append(Measured("sessions", story.now, 1, 1))
    report = check(story.history, story.now)
    assert report.violations == []
    assert (report.calls, report.repeated, report.ran_unknown) == (10, 1, 2)


def test_a_call_that_is_not_safe_and_ran_twice(story: Story) -> None:
    """B33."""
    call = story.good()
    story.run(call)
    assert story.kinds() == ["ran twice"]


def test_a_call_of_unknown_outcome_that_ran_twice(story: Story) -> None:
    call = story.call(outcome="unknown")
    story.run(call)
    story.run(call)
    assert story.kinds() == ["ran twice"]


def test_a_call_without_an_outcome(story: Story) -> None:
    story.call(outcome=None, ended=None)
    assert story.kinds() == ["no outcome"]


def test_an_outcome_that_came_late(story: Story) -> None:
    story.run(story.call(ended=story.now + 6.1))
    assert story.kinds() == ["no outcome"]


def test_the_time_that_its_own_worker_was_stopped_is_not_the_calls(story: Story) -> None:
    story.run(story.call(ended=story.now + 7))
    story.history.pauses.append(Span("w0", 101.0, 102.5))
    assert story.kinds() == []
    story.history.pauses[0].name = "w1"
    assert story.kinds() == ["no outcome"]
    story.history.pauses[0].name = DRIVER
    assert story.kinds() == []


@pytest.mark.parametrize("outcome", ["not_run", "gone"])
def test_a_call_that_ran_and_was_said_not_to_have(story: Story, outcome: str) -> None:
    story.history.closed["c/1"] = story.now
    story.run(story.call(outcome=outcome))
    assert story.kinds() == ["not_run, but ran"]


def test_an_answer_that_the_upstream_did_not_give(story: Story) -> None:
    story.call()
    assert story.kinds() == ["ok, but never ran"]


def test_a_counter_that_went_back(story: Story) -> None:
    """Also when it only stands still for a call that counts; a call that reads may see it again."""
    story.good()
    story.good()
    story.counter = 1
    story.good()
    assert story.kinds() == ["went back"]
    story.counter = 1
    story.good(method="peek", counts=False, safe=True)
    assert story.kinds() == ["went back"]


def test_calls_that_ran_side_by_side_may_be_answered_in_any_order(story: Story) -> None:
    one = story.good(sent=100.0, ended=101.0)
    other = story.good(sent=100.0, ended=100.5)
    assert one.told is not None
    assert other.told is not None
    assert one.told.counter < other.told.counter
    assert story.kinds() == []


def test_a_session_that_was_replaced_without_a_word(story: Story) -> None:
    story.good()
    story.run(story.call(told=Told("c-1", PRINCIPAL, "upstream-2", 2)), session="upstream-2")
    assert story.kinds() == ["another session"]


def test_who_was_told_that_it_is_gone_begins_anew(story: Story) -> None:
    """On a session that is shared the home is the same before and after."""
    home = f"{SHARED}{PRINCIPAL}"
    story.good(home=home)
    story.call(home=home, outcome="gone")
    story.run(story.call(home=home, told=Told("c-2", PRINCIPAL, "upstream-2", 1)), session="upstream-2")
    assert story.kinds() == []


def test_a_client_s_own_session_that_was_lost(story: Story) -> None:
    """Who has ended it himself may be told that it is gone."""
    story.good()
    gone = story.call(outcome="gone")
    assert story.kinds() == ["lost"]
    story.history.closed["c/1"] = gone.sent + 0.2
    assert story.kinds() == ["lost"], "he ended it later"
    story.history.closed["c/1"] = gone.sent
    assert story.kinds() == []


@pytest.mark.parametrize(
    "told", [Told("c-7", PRINCIPAL, SESSION, 1), Told("c-0", "Bearer two", SESSION, 1)], ids=["request", "principal"]
)
def test_an_answer_that_was_anothers(story: Story, told: Told) -> None:
    story.run(story.call(told=told))
    assert story.kinds() == ["crossed"]


def test_an_answer_with_the_id_of_another_request(story: Story) -> None:
    story.run(story.call(rpc_id="c-8"))
    assert story.kinds() == ["crossed"]


@pytest.mark.parametrize("changed", [{"principal": "Bearer two"}, {"opened_by": "Bearer two"}], ids=str)
def test_a_call_that_ran_for_somebody_else(story: Story, changed: dict[str, str]) -> None:
    """B17, B31."""
    story.run(story.call(), **changed)
    assert story.kinds() == ["wrong principal"]


def test_a_session_that_was_ended_under_its_client(story: Story) -> None:
    story.good()
    story.history.endings.append(Ending(SESSION, story.now))
    assert story.kinds() == ["ended under it"]
    story.history.closed["c/1"] = story.now - 0.1
    assert story.kinds() == []


def test_a_session_that_nobody_was_told_of_may_be_ended(story: Story) -> None:
    story.good()
    story.history.endings.append(Ending("upstream-7", story.now))
    assert story.kinds() == []


def test_a_shared_session_that_was_opened_twice(story: Story) -> None:
    story.history.openings.append(Opening("a", PRINCIPAL, f"{SHARED}one", 100.0))
    story.history.openings.append(Opening("b", PRINCIPAL, f"{SHARED}one", 101.0))
    assert story.kinds() == [], "neither was used"
    for session in ("a", "b"):
        story.run(story.call(outcome="unknown"), session=session)
    assert story.kinds() == ["opened twice"]
    story.history.endings.append(Ending("a", 100.5))
    assert story.kinds() == []


def test_sessions_of_clients_own_are_as_many_as_they_like(story: Story) -> None:
    story.history.openings.append(Opening("a", PRINCIPAL, "", 100.0))
    story.history.openings.append(Opening("b", PRINCIPAL, "", 101.0))
    assert story.kinds() == []


def test_an_error_that_is_no_outcome(story: Story) -> None:
    story.call(outcome="error", detail="500")
    assert story.kinds() == ["no honest outcome"]


@pytest.mark.parametrize("seconds", [None, 3.1])
def test_a_recovery_that_took_too_long(story: Story, seconds: float | None) -> None:
    story.history.recoveries.append(Recovery("freeze", story.now, seconds, 3.0))
    assert story.kinds() == ["slow recovery"]


def test_a_figure_beyond_its_limit(story: Story) -> None:
    story.history.measured.append(Measured("sessions", story.now, 2, 1))
    assert story.kinds() == ["over its limit"]


def test_a_violation_names_the_fault_that_came_before_it(story: Story) -> None:
    story.history.faults = [Span("freeze", 90.0, 95.0), Span("block", 99.0, 99.5), Span("later", 500.0, 501.0)]
    story.call()
    assert [violation.fault for violation in check(story.history, 200).violations] == ["block"]


ANSWER = b'{"jsonrpc":"2.0","id":"c-0","result":{"structuredContent":%b,"content":[]}}'
TOLD = b'{"request":"c-0","principal":"p","session":"s","counter":3}'


class TestJudging:
    """What an answer says became of a call."""

    def judged(self, status: int, body: bytes) -> Call:
        call = Call("c-0", "c", "p", "c/1", "w0", "count", counts=True, safe=False, sent=0.0, deadline=5.0)
        judge(call, status, body)
        return call

    @pytest.mark.parametrize("form", [b"%b", b"event: message\ndata: %b\n\n"], ids=["json", "events"])
    def test_a_result(self, form: bytes) -> None:
        call = self.judged(200, form % (ANSWER % TOLD))
        assert (call.outcome, call.rpc_id, call.told) == ("ok", "c-0", Told("c-0", "p", "s", 3))

    @pytest.mark.parametrize(
        ("status", "body", "outcome"),
        [
            (
                200,
                b'{"jsonrpc":"2.0","id":"c-0","error":{"code":1,"message":"","data":{"outcome":"unknown"}}}',
                "unknown",
            ),
            (
                503,
                b'{"jsonrpc":"2.0","id":"c-0","error":{"code":1,"message":"","data":{"outcome":"not_run"}}}',
                "not_run",
            ),
            (404, b'{"jsonrpc":"2.0","id":"c-0","error":{"code":1,"message":""}}', "gone"),
            (200, b"", "unknown"),
            (200, b'{"jsonrpc":"2.0","id":"c-0","error":{"code":1,"message":""}}', "error"),
            (500, b"Internal Server Error", "error"),
            (502, b"", "error"),
        ],
    )
    def test_everything_else(self, status: int, body: bytes, outcome: str) -> None:
        assert self.judged(status, body).outcome == outcome
