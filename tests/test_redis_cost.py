"""What calls cost Redis: a local one nothing, a forwarded one a few commands, and fewer the more are in flight."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import redis
from fleet import ROOT, Fleet, run_fleet
from mcp_http import RawSession

sys.path.append(str(ROOT / "bench"))

from child import Child

sys.path.pop()  # a bench has the name of a package

pytestmark = [pytest.mark.anyio, pytest.mark.process]

IN_FLIGHT = 32
LOCAL_CALLS = 1000
FORWARDED_CALLS = 320
SLACK = 40
"""Commands by which two spans of the same length may differ: renewals are jittered, and come a few at a time."""
MOST_PER_FORWARDED_CALL = 7
"""A push and at most two pops each way make six."""
INSIDE_SCRIPTS = ("hget", "llen", "rpush", "pexpire")
"""Redis counts what a script calls as well; these belong to the script that pushes."""


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two workers in front of an upstream that answers at once."""
    with Child("stub_upstream.py") as stub:
        async with run_fleet(tmp_path, {"stub": {"url": f"{stub.read()}/json/mcp"}}, workers=2) as fleet:
            yield fleet


@pytest.fixture
async def sessions(fleet: Fleet) -> AsyncIterator[list[RawSession]]:
    """Sessions that the first worker owns; the second one knows it."""
    async with aiohttp.ClientSession() as http:
        sessions = [RawSession(http, fleet.worker_url(0, "stub")) for _ in range(IN_FLIGHT)]
        for session in sessions:
            assert (await session.initialize()).status == 200
        await call_through(fleet, 1, sessions, IN_FLIGHT, len(sessions))
        yield sessions


def commands(fleet: Fleet) -> int:
    """Commands that Redis has run so far, without those that scripts called."""
    with redis.Redis.from_url(fleet.redis_url) as client:
        rows = client.info("commandstats")
    assert isinstance(rows, dict)
    inside = {f"cmdstat_{name}" for name in INSIDE_SCRIPTS}
    return sum(row["calls"] for name, row in rows.items() if name not in inside)


async def call_through(fleet: Fleet, worker: int, sessions: list[RawSession], in_flight: int, calls: int) -> float:
    """Make calls by one worker; returns the seconds they took."""

    async def one_after_the_other(session: RawSession, count: int) -> None:
        for _ in range(count):
            assert (await session.call("any")).text

    for session in sessions:
        session.url = fleet.worker_url(worker, "stub")
    began = time.monotonic()
    await asyncio.gather(*(one_after_the_other(session, calls // in_flight) for session in sessions[:in_flight]))
    return time.monotonic() - began


async def idle_commands(fleet: Fleet, seconds: float) -> int:
    before = commands(fleet)
    await asyncio.sleep(seconds)
    return commands(fleet) - before


async def test_local_calls_cost_no_redis_command(fleet: Fleet, sessions: list[RawSession]) -> None:
    """A thousand calls at the owner raise the count no more than doing nothing for as long."""
    before = commands(fleet)
    seconds = await call_through(fleet, 0, sessions, 8, LOCAL_CALLS)
    busy = commands(fleet) - before
    idle = await idle_commands(fleet, seconds)
    assert fleet.metric("leasehold_calls_local") >= LOCAL_CALLS
    assert busy <= idle + SLACK


async def test_a_forwarded_call_costs_a_few_commands_and_fewer_when_many_are_in_flight(
    fleet: Fleet, sessions: list[RawSession]
) -> None:
    cost: dict[int, float] = {}
    for in_flight in (1, IN_FLIGHT):
        before = commands(fleet)
        seconds = await call_through(fleet, 1, sessions, in_flight, FORWARDED_CALLS)
        busy = commands(fleet) - before
        cost[in_flight] = (busy - await idle_commands(fleet, seconds)) / FORWARDED_CALLS
    assert fleet.metric("leasehold_calls_forwarded") >= 2 * FORWARDED_CALLS
    assert 2 < cost[1] <= MOST_PER_FORWARDED_CALL
    assert cost[IN_FLIGHT] < 0.8 * cost[1]
