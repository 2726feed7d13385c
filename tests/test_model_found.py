"""What the model has found, each as the few steps that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from leasehold.coordinator import Keys
from simulation.calls import CallRecord, Client
from simulation.process import NAMESPACE, Process
from simulation.world import World


class Stage:
    """Workers, and a client whose session the first of them owns."""

    def __init__(self, seed: int, workers: int) -> None:
        self.world = World(seed, workers=workers)
        self.workers: list[Process] = self.world.processes[:]
        self.world.run_until(lambda: all(worker.is_serving for worker in self.workers), 10)
        self.client: Client = self.world.calls.client("client", "alice")
        self.world.calls.open_session(self.client, self.workers[0])
        self.world.run(0.5)

    def call(self, worker: Process, **options: object) -> CallRecord:
        return self.world.calls.call(self.client, worker, **options)  # type: ignore[arg-type]


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(seed: int = 1, workers: int = 2) -> Stage:
        made.append(Stage(seed, workers))
        return made[-1]

    yield make
    for stage in made:
        stage.world.close()


def test_b35_calls_end_with_the_lease_of_a_worker_that_redis_does_not_answer(stage: Callable[..., Stage]) -> None:
    """The lease is over when its time is, not when Redis says so: it may be away for long."""
    here = stage()
    world, (_, caller) = here.world, here.workers
    calls = [here.call(caller, take=0.5), here.call(caller, take=4.0)]
    world.run(0.2)
    world.lose_redis(100, lag_s=0)
    world.run(world.lease_ms / 1000 + 1)
    assert [call.outcome for call in calls] == ["unknown"] * 2


@pytest.mark.parametrize("seed", range(5))
def test_b27_what_a_promoted_replica_says_of_an_owner_that_has_gone_is_no_evidence_at_once(
    stage: Callable[..., Stage], seed: int
) -> None:
    """A session was handed off, and adopted; the replica that is promoted has the one and not the other."""
    here = stage(seed, workers=3)
    world, (first, second, third) = here.world, here.workers
    world.stop(first)
    world.run(1.0)
    here.call(second)
    world.run(0.2)
    assert world.owner_of(here.client) is second
    world.lose_redis(0.15, lag_s=0.5, promoted=True)
    for _ in range(20):
        here.call(third)
        world.run(0.05)
    world.run(3)
    assert here.call(second).outcome == ""
    assert world.run_until(lambda: not world.calls.waiting(), 5)
    assert world.calls.records[-1].outcome == "ok"


def test_b45_a_push_of_the_last_incarnation_that_hangs_does_not_meet_the_pushes_of_the_next(
    stage: Callable[..., Stage],
) -> None:
    """A lease that was lost while a push was under way: nobody else may use its connection."""
    here = stage()
    world, (_, caller) = here.world, here.workers
    here.call(caller)
    world.run(0.5)
    assert caller.core is not None
    assert world.redis is not None
    incarnation = caller.core.member.incarnation
    world.network.forget(caller.host, "mailbox_push")
    hanging = here.call(caller)
    world.run(0.01)
    world.redis.do_del(Keys(NAMESPACE).lease(incarnation).encode())
    world.run_until(lambda: caller.core.member.incarnation != incarnation, 3)  # type: ignore[union-attr]
    calls = [here.call(caller) for _ in range(3)]
    world.run(6)
    assert hanging.outcome == "unknown"
    assert {call.outcome for call in calls} <= {"ok", "not_run"}
    calls = [here.call(caller) for _ in range(3)]
    world.run(6)
    assert [call.outcome for call in calls] == ["ok"] * 3


def test_b35_what_cannot_be_sent_over_a_connection_that_was_reset_while_it_was_idle_is_not_in_doubt(
    stage: Callable[..., Stage],
) -> None:
    here = stage()
    world, (_, caller) = here.world, here.workers
    here.call(caller)
    world.run(0.2)
    world.lose_redis(100, lag_s=0)
    world.run(0.3)
    call = here.call(caller)
    world.run(1.0)
    assert call.outcome == "not_run"


@pytest.mark.parametrize("seed", range(3))
def test_b35_a_connection_that_was_reset_while_it_was_idle_costs_nobody_a_look_up(
    stage: Callable[..., Stage], seed: int
) -> None:
    here = stage(seed)
    world, (_, caller) = here.world, here.workers
    other = world.calls.client("shared", "bob")
    world.calls.call(other, caller)
    world.run(0.5)
    for connection in list(caller.host.connections):
        connection.reset()
    world.run(0.05)
    third = world.calls.client("shared", "alice")
    calls = [world.calls.call(third, caller) for _ in range(2)]
    world.run(world.lease_ms / 1000 + 1)  # absence is no evidence until then
    assert [call.outcome for call in calls] == ["ok"] * 2


def test_b33_a_call_that_may_have_run_is_not_told_as_not_run_because_its_repetition_was_refused(
    stage: Callable[..., Stage],
) -> None:
    """Calls that are safe to repeat are repeated; where that is refused, the first try may still have run."""
    here = stage()
    world, (_, caller) = here.world, here.workers
    call = here.call(caller, take=1.0, safe=True)
    world.run(0.2)
    world.lose_redis(100, lag_s=0)
    world.run(world.lease_ms / 1000 + 4)
    assert len(world.upstream.executions[call.number]) == 1
    assert call.outcome == "unknown"
