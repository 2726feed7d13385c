"""The model finds what is broken: each guarantee is taken out in turn, and the checker notices within some schedules.

What is replaced is one function or one script, as a mistake would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha1
from typing import Any

import pytest
from leasehold.coordinator import Member, scripts
from leasehold.coordinator.channel import ReplayWindow
from leasehold.coordinator.scripts import Script
from leasehold.workers.errors import NotRun
from leasehold.workers.exchange import CallerExchange
from leasehold.workers.forwarder import Forwarder
from leasehold.workers.identity import Identity
from simulation import calls
from simulation.checker import Violation
from simulation.machine import SCHEDULE, run_schedule

STEPS = 80
SCHEDULES = 150
"""Most schedules until a violation is found."""

Patch = pytest.MonkeyPatch


def changed(patch: Patch, name: str, old: str, new: str) -> None:
    """A script with something else in place of `old`."""
    script: Script = getattr(scripts, name)
    assert old in script.source
    source = script.source.replace(old, new)
    digest = sha1(source.encode(), usedforsecurity=False).hexdigest()
    patch.setattr(scripts, name, Script(script.name, source, digest))


def without_fence(patch: Patch) -> None:
    patch.setattr(Member, "may_write", lambda _self: True)


def without_replay_window(patch: Patch) -> None:
    patch.setattr(ReplayWindow, "seen", lambda _self, _counter: False)


def takeover_that_does_not_compare(patch: Patch) -> None:
    changed(
        patch, "SESSION_TAKEOVER", "if current[1] ~= ARGV[1] or current[2] ~= ARGV[2] then", "if not current[1] then"
    )


def claim_that_does_not_look(patch: Patch) -> None:
    changed(patch, "SESSION_CLAIM", "if current[1] then", "if false then")


def epochs_that_only_count(patch: Patch) -> None:
    for name in ("SESSION_CLAIM", "SESSION_TAKEOVER"):
        changed(patch, name, "now[1] * 1000 + math.floor(now[2] / 1000)", "1")


def absence_that_counts_at_once(patch: Patch) -> None:
    async def yes(*_: object, **__: object) -> bool:
        return True

    patch.setattr(Member, "absence_counts", lambda _self: True)
    patch.setattr(Member, "believes_absence", yes)


def what_a_dead_owner_read_counts_as_unread(patch: Patch) -> None:
    patch.setattr(CallerExchange, "peer_read", lambda _self, _unread: False)


def doubt_that_is_told_as_not_run(patch: Patch) -> None:
    patch.setattr(CallerExchange, "refused", lambda self, reason: self.fail(NotRun(reason.value)))


def every_call_is_repeated(patch: Patch) -> None:
    patch.setattr(calls, "is_safe", lambda _message, _tools: True)


def deaths_that_nobody_is_told_of(patch: Patch) -> None:
    patch.setattr(Forwarder, "peer_down", lambda _self, _peer, _unread: None)


def one_session_for_all_principals(patch: Patch) -> None:
    patch.setattr(Identity, "shared_key", lambda _self, _server, _bound: "ab" * 32)


def requests_that_are_counted_twice(patch: Patch) -> None:
    request_head = Forwarder._request_head

    def counting(self: Forwarder, *args: Any) -> Any:
        self.statistics.sent += 1
        return request_head(self, *args)

    patch.setattr(Forwarder, "_request_head", counting)


CALLS = {"open": 6, "call": 30, "burst": 4, "wait": 20}
PAUSES = {**CALLS, "pause": 8}
DEATHS = {**CALLS, "crash": 4, "start": 6}
REDIS = {**CALLS, "restart_redis": 2, "fail_over": 2}


@pytest.mark.parametrize(
    ("broken", "what", "shares"),
    [
        (without_fence, r"after its lease had ended|at once", PAUSES),
        (without_replay_window, r"ran 2 times|never retrieved", {**CALLS, "repeat": 30}),
        (takeover_that_does_not_compare, r"at once|epoch", PAUSES),
        (claim_that_does_not_look, r"at once|epoch", CALLS),
        (epochs_that_only_count, r"epoch \d+ of session \w+\}? follows", SCHEDULE),
        (absence_that_counts_at_once, r"at once|owns the session|epoch", REDIS),
        (what_a_dead_owner_read_counts_as_unread, r"had run|ran after its caller|ran 2 times", DEATHS),
        pytest.param(
            doubt_that_is_told_as_not_run,
            r"had run|ran after its caller|ran 2 times",
            {**CALLS, "trap": 40},
            marks=pytest.mark.acceptance,  # it takes longer to be found out
        ),
        (every_call_is_repeated, r"ran 2 times", {**CALLS, "cut": 8, "crash": 2, "start": 4}),
        (deaths_that_nobody_is_told_of, r"no outcome", DEATHS),
        (one_session_for_all_principals, r"ran on the session of", CALLS),
        (requests_that_are_counted_twice, r"requests, \d+ ended", CALLS),
    ],
)
def test_a_guarantee_that_is_taken_out_is_missed(
    broken: Callable[[Patch], None],
    what: str,
    shares: dict[str, int],
    monkeypatch: Patch,
) -> None:
    broken(monkeypatch)
    found = next((violation for number in range(SCHEDULES) if (violation := violated(number, shares))), "")
    assert re.search(what, found), found or f"{SCHEDULES} schedules without a violation"


def violated(number: int, shares: dict[str, int]) -> str:
    """How a schedule breaks a guarantee; nothing if it does not."""
    try:
        run_schedule(number, STEPS, shares=shares)
    except Violation as violation:
        return str(violation)
    return ""
