"""The model: whole workers in a simulated world, and everything that can happen to them (`simulation/`).

`make test` looks for a few seconds, at another place each time; `MODEL_SEED` repeats a run,
`MODEL_SECONDS` looks for longer, and so does `make acceptance`.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from simulation.checker import Violation
from simulation.machine import FleetMachine, run_schedule
from simulation.steps import Steps
from simulation.world import World

SEED = int(os.environ.get("MODEL_SEED") or random.SystemRandom().randrange(2**32))
SECONDS = float(os.environ.get("MODEL_SECONDS") or 6)
STEPS = 80


def quiet_world(**options: int) -> World:
    return World(1, **options)


def test_the_same_seed_has_the_same_history() -> None:
    """What the model finds can be found again."""
    for number in range(3):
        first, second = (run_schedule(number, STEPS).history for _ in range(2))
        assert first == second
        assert len(first) > STEPS / 2


def test_without_faults_every_call_runs_once_and_every_frame_is_counted_at_both_ends() -> None:
    """B33, B51: what was sent was executed, NACKed or refused; nothing is in doubt."""
    world = quiet_world()
    try:
        steps = Steps(world)
        for number in range(4):
            steps.open(number, number // 2, number)
            world.run(0.5)
        for number in range(60):
            steps.call(number, number // 3, number % 3, 0, safe=bool(number % 2))
            world.run(0.05)
        world.run(3)
        assert [call.outcome for call in world.calls.records] == ["ok"] * 64
        assert [len(runs) for runs in world.upstream.executions.values()] == [1] * 60
        cores = [process.core for process in world.processes if process.core is not None]
        sent = sum(core.forwarder.statistics.sent for core in cores)
        taken = sum(core.forwarder.statistics.executed for core in cores)
        refused = sum(sum(core.member.outbox.statistics().refused.values()) for core in cores)
        nacked = sum(sum(core.forwarder.statistics.nacked.values()) for core in cores)
        assert sent == taken + nacked + refused > 20
        assert sum(core.member.outbox.statistics().frames for core in cores) == sum(
            core.member.inbox.statistics.frames for core in cores
        )
        steps.rest()
    finally:
        world.close()


def test_no_schedule_breaks_a_guarantee() -> None:
    """B24-B36, B38, B39, B41, B45: schedules from seeds, for as long as there is time."""
    until, number = time.monotonic() + SECONDS, SEED
    while time.monotonic() < until:
        try:
            run_schedule(number, STEPS)
        except Violation as violation:
            violation.add_note(f"again: run_schedule({number}, {STEPS})")
            raise
        number += 1
    assert number > SEED


def look(*, examples: int, steps: int) -> type[FleetMachine]:
    """Let Hypothesis look for a violation; the machine class says how much it did."""

    class Machine(FleetMachine):
        ran = dict[str, int]()  # noqa: RUF012

    print(f"MODEL_SEED={SEED}")
    run_state_machine_as_test(
        seed(SEED)(Machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            print_blob=True,
            verbosity=Verbosity.normal,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Machine


def test_hypothesis_finds_no_steps_that_break_a_guarantee() -> None:
    """B24-B36, B38, B39, B41, B45."""
    machine = look(examples=40, steps=40)
    assert machine.worlds >= 40
    for check in ("owner", "epoch", "write", "execution", "outcome ok", "counters"):
        assert machine.ran[check] > 0, check


@pytest.mark.acceptance
@pytest.mark.timeout(1200)
def test_hypothesis_finds_no_steps_that_break_a_guarantee_in_minutes() -> None:
    """B24-B36, B38, B39, B41, B45."""
    machine = look(examples=1500, steps=80)
    print(f"worlds={machine.worlds} simulated_s={machine.seconds:.0f} turns={machine.turns} checks={machine.ran}")
