"""A world as a Hypothesis state machine, which looks for a short sequence of steps that breaks a guarantee; and the
same steps in an order that comes from a seed alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from .steps import Steps
from .world import BEGINNING_S, World

LEASES_MS: Final = (1000, 3000)
number = st.integers(0, 11)
flag = st.booleans()
Make = Callable[..., World]


class FleetMachine(RuleBasedStateMachine):
    """B24-B36, B38, B39, B41, B45: workers, clients and every fault, in any order."""

    make_world: ClassVar[Make] = World
    worlds: ClassVar[int] = 0
    taken: ClassVar[int] = 0
    """Steps taken, by all machines of this class."""
    seconds: ClassVar[float] = 0.0
    """Of simulated time."""
    turns: ClassVar[int] = 0
    ran: ClassVar[dict[str, int]] = {}
    """How often each check of the checker had something to check."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @initialize(seed=st.integers(0, 2**32 - 1), lease=st.sampled_from(LEASES_MS), workers=st.integers(1, 3))
    def begin(self, seed: int, lease: int, workers: int) -> None:
        self.world = self.make_world(seed, lease_ms=lease, workers=workers)
        self.steps = Steps(self.world)

    @rule(server=number, principal=number, at=number)
    def open(self, server: int, principal: int, at: int) -> None:
        self.steps.open(server, principal, at)

    @rule(who=number, at=number, take=number, fate=number, safe=flag)
    def call(self, who: int, at: int, take: int, fate: int, safe: bool) -> None:
        self.steps.call(who, at, take, fate, safe=safe)

    @rule(who=number, at=number)
    def burst(self, who: int, at: int) -> None:
        self.steps.burst(who, at)

    @rule(which=number)
    def leave(self, which: int) -> None:
        self.steps.leave(which)

    @rule()
    def start(self) -> None:
        self.steps.start()

    @rule(which=number, leases=number)
    def pause(self, which: int, leases: int) -> None:
        self.steps.pause(which, leases)

    @rule(which=number, silently=flag)
    def crash(self, which: int, silently: bool) -> None:
        self.steps.crash(which, silently=silently)

    @rule(which=number)
    def stop(self, which: int) -> None:
        self.steps.stop(which)

    @rule(which=number, command=st.integers(0, 12), lasts=number, ran=flag)
    def trap(self, which: int, command: int, lasts: int, ran: bool) -> None:
        self.steps.trap(which, command, lasts, ran=ran)

    @rule(which=number)
    def break_connections(self, which: int) -> None:
        self.steps.break_connections(which)

    @rule(which=number)
    def forget(self, which: int) -> None:
        self.steps.forget(which)

    @rule(which=number, how=number, leases=number)
    def cut(self, which: int, how: int, leases: int) -> None:
        self.steps.cut(which, how, leases)

    @rule(gap=number, empty=flag)
    def restart_redis(self, gap: int, empty: bool) -> None:
        self.steps.restart_redis(gap, empty=empty)

    @rule(gap=number, lag=number, skew=number)
    def fail_over(self, gap: int, lag: int, skew: int) -> None:
        self.steps.fail_over(gap, lag, skew)

    @rule(leases=number)
    def fill(self, leases: int) -> None:
        self.steps.fill(leases)

    @rule()
    def repeat(self) -> None:
        self.steps.repeat()

    @rule(which=number)
    def wait(self, which: int) -> None:
        self.steps.wait(which)

    @rule(which=number)
    def wait_again(self, which: int) -> None:
        self.steps.wait(which)

    def teardown(self) -> None:
        world = self.world
        if world is None:
            return
        try:
            if sys.exc_info()[0] is None:
                self.steps.rest()
        finally:
            self.count(world)
            world.close()

    @classmethod
    def count(cls, world: World) -> None:
        """Add up what was done."""
        cls.worlds += 1
        cls.seconds += world.now - BEGINNING_S
        cls.turns += world.turns
        for check, count in world.checker.ran.items():
            cls.ran[check] = cls.ran.get(check, 0) + count


SCHEDULE: Final[dict[str, int]] = {
    "open": 6,
    "call": 24,
    "burst": 4,
    "leave": 2,
    "start": 4,
    "pause": 4,
    "crash": 2,
    "stop": 3,
    "trap": 8,
    "break_connections": 2,
    "forget": 2,
    "cut": 3,
    "restart_redis": 1,
    "fail_over": 3,
    "fill": 1,
    "repeat": 2,
    "wait": 24,
}
"""How often each step is taken, in schedules from a seed."""
FLAGS: Final = {"call": ("safe",), "crash": ("silently",), "trap": ("ran",), "restart_redis": ("empty",)}
NUMBERS: Final = {
    "open": 3, "call": 4, "burst": 2, "leave": 1, "pause": 2, "crash": 1, "stop": 1, "trap": 3,
    "break_connections": 1, "forget": 1,
    "cut": 3, "restart_redis": 1, "fail_over": 3, "fill": 1, "wait": 1,
}  # fmt: skip


def run_schedule(
    seed: int,
    count: int,
    *,
    make_world: Make = World,
    shares: Mapping[str, int] = SCHEDULE,
    log: list[Any] | None = None,
) -> World:
    """Take so many steps in an order that comes from `seed`, and come to rest. The world is closed.

    `shares`: how often each step is to be taken. `log` gets the steps that were taken. Raises `Violation`.
    """
    rng = random.Random(seed)
    world = make_world(seed, lease_ms=rng.choice(LEASES_MS), workers=rng.randint(1, 3))
    try:
        steps = Steps(world)
        names, weights = list(shares), list(shares.values())
        for _ in range(count):
            (name,) = rng.choices(names, weights)
            numbers = [rng.randrange(60) for _ in range(NUMBERS.get(name, 0))]
            flags = {flag: rng.random() < 0.5 for flag in FLAGS.get(name, ())}
            if log is not None:
                log.append((name, numbers, flags))
            getattr(steps, name)(*numbers, **flags)
        steps.rest()
    finally:
        world.close()
    return world
