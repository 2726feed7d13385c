"""Six faults, on real processes under load, and a checker that looks for what must never be (B27, B28, B33, B34, B46).

All faults there are, for as long as one likes: `make chaos`.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest
from chaos.breakage import FAULTS, break_and_recover, schedule
from chaos.checker import Report
from chaos.harness import chaos_stage

pytestmark = [pytest.mark.anyio, pytest.mark.process]


@pytest.fixture
def seed() -> int:
    """Another one in each run, unless CHAOS_SEED says which; shown when a test fails."""
    seed = int(os.environ.get("CHAOS_SEED", "") or int.from_bytes(os.urandom(3), "big"))
    print(f"CHAOS_SEED={seed}")
    return seed


async def survive(folder: Path, seed: int, *faults: str, sentinel: bool = False) -> Report:
    """Each fault once, in an order that the seed decides."""
    async with chaos_stage(folder, seed, sentinel=sentinel) as chaos:
        for name in islice(schedule(seed, faults), len(faults)):
            await break_and_recover(chaos, name)
        report = await chaos.judged()
        print(report, *report.violations, *(node.log() for node in chaos.nodes if report.violations), sep="\n")
        return report


async def test_workers_that_are_killed_and_frozen_run_nothing_twice_and_lose_no_session(
    tmp_path: Path, seed: int
) -> None:
    """B27, B28, B33, B34: kill -9 while idle and in mid-call, and a pause of one and a half leases."""
    report = await survive(tmp_path, seed, "kill_idle", "kill_mid_call", "freeze")
    assert report.violations == []
    assert report.outcomes["ok"] > 100


async def test_a_redis_that_forgets_and_is_cut_off_and_a_rolling_restart_run_nothing_twice_and_lose_no_session(
    tmp_path: Path, seed: int
) -> None:
    """B32, B33, B35, B46: a restart with loss, a silent partition, and SIGTERM to all workers in turn."""
    report = await survive(tmp_path, seed, "redis_empty", "partition_silent", "rolling_restart")
    assert report.violations == []
    assert report.outcomes["ok"] > 100


@pytest.mark.acceptance
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", range(6))
async def test_every_fault_there_is_in_an_order_of_its_own(tmp_path: Path, seed: int, number: int) -> None:
    """The others too: B32, B34, B35, B41, B44."""
    names = list(FAULTS)[number::6]
    report = await survive(tmp_path, seed + number, *names)
    assert report.violations == []


@pytest.mark.acceptance
async def test_a_failover_to_a_replica_that_lags_runs_nothing_twice_and_loses_no_session(
    tmp_path: Path, seed: int
) -> None:
    """B27, B32: what the promoted replica has not heard of is known to the owners, and epochs do not repeat."""
    report = await survive(tmp_path, seed, "kill_mid_call", "failover", "freeze", sentinel=True)
    assert report.violations == []
