"""An owner is killed, or frozen: what its callers see, how soon, and what becomes of its sessions."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from fleet import EXAMPLES, Fleet, run_example, run_fleet, wait_until
from leasehold.coordinator import Directory, Keys, RedisClients, list_peers
from mcp_http import RawSession

pytestmark = [pytest.mark.anyio, pytest.mark.process]

LEASE_S = 1.5


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    journal = tmp_path / "journal"
    with run_example("counter_http.py", tmp_path, "--journal", str(journal)) as upstream:
        servers = {
            "http": {"url": upstream.url},
            "stdio": {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]},
        }
        async with run_fleet(
            tmp_path, servers, workers=3, env={"LEASEHOLD_LEASE_TTL_MS": str(int(LEASE_S * 1000))}
        ) as fleet:
            yield fleet


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    # A connection of its own for each request: the balancer counts requests, not connections.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
        yield client


async def owner_of(fleet: Fleet, session: RawSession) -> int:
    """Which of the fleet's workers owns a session."""
    client, keys = RedisClients(fleet.redis_url).lookups(), Keys("leasehold")
    async with client:
        record = await Directory(client, keys).look_up(session.key)
        assert record is not None
        pids = {peer.incarnation: peer.info["pid"] for peer in await list_peers(client, keys)}
    supervisors = [worker.pid for worker in fleet.workers]
    return supervisors.index(parent(pids[record.registration.owner]))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def worker_pids(fleet: Fleet, index: int) -> list[int]:
    """The worker processes of one `leasehold serve`, without its Redis."""
    supervisor = fleet.workers[index].pid
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return [int(child) for child in children if "leasehold" in Path(f"/proc/{child}/cmdline").read_text()]


def kill(fleet: Fleet, index: int) -> None:
    """SIGKILL the worker and its supervisor, so that nobody is left to end the lease early."""
    fleet.workers[index].process.send_signal(signal.SIGSTOP)  # it must not see its worker die
    pids = worker_pids(fleet, index)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    fleet.workers[index].kill()
    # Until they are gone their socket takes connections that nobody will serve: the balancer's loss, not ours.
    wait_until(lambda: is_refused(fleet.workers[index].url), "the killed workers listen")


def is_refused(url: str) -> bool:
    """Whether nobody listens there."""
    where = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((where.hostname, where.port)) == errno.ECONNREFUSED


async def test_a_session_goes_on_where_it_was_after_its_owner_was_killed(
    fleet: Fleet, http: aiohttp.ClientSession
) -> None:
    """Adoption: the counter continues, for every session of the dead worker, within the lease and a second (B34)."""
    sessions = [RawSession(http, fleet.url("http")) for _ in range(9)]
    for session in sessions:
        await session.initialize()
    for expected in (1, 2):
        for session in sessions:
            assert (await session.call("increment", tag=f"{session.key}-{expected}")).text == str(expected)
    victim = await owner_of(fleet, sessions[0])
    kill(fleet, victim)
    killed = time.monotonic()

    async def next_count(session: RawSession) -> None:
        while True:
            answer = await session.call("increment", tag=f"{session.key}-3")
            if answer.status == 503:  # only where nothing ran
                await asyncio.sleep(0.05)
                continue
            assert answer.text == "3"
            return

    await asyncio.gather(*(next_count(session) for session in sessions))
    assert time.monotonic() - killed < LEASE_S + 1
    journal = [json.loads(line) for line in (fleet.folder / "journal").read_text().splitlines()]
    tags = [entry["tag"] for entry in journal if entry.get("tool") == "increment"]
    assert len(tags) == len(set(tags)) == 27


async def test_a_call_that_was_running_on_a_killed_owner_ends_as_unknown_in_time(
    fleet: Fleet, http: aiohttp.ClientSession
) -> None:
    """Waiting calls end within 4/3 of the lease with an honest outcome."""
    session = RawSession(http, fleet.url("http"))
    await session.initialize()
    victim = await owner_of(fleet, session)
    edge = (victim + 1) % len(fleet.workers)
    waiting = RawSession(http, fleet.worker_url(edge, "http"), headers=session.headers)
    waiting.ids = session.ids
    call = asyncio.ensure_future(waiting.call("slow", seconds=60, steps=1, tag="doomed"))
    journal = fleet.folder / "journal"
    while "doomed" not in (journal.read_text() if journal.exists() else ""):
        await asyncio.sleep(0.02)
    kill(fleet, victim)
    killed = time.monotonic()
    answer = await call
    assert time.monotonic() - killed < LEASE_S * 4 / 3 + 0.3
    assert answer.status == 200
    assert answer.error["data"]["outcome"] == "unknown"
    # And the session is alive, at another worker.
    assert (await waiting.call("increment", tag="after")).text == "1"


async def test_a_pinned_session_ends_with_its_worker_and_its_client_is_told(
    fleet: Fleet, http: aiohttp.ClientSession
) -> None:
    """A stdio session cannot move: 404, so that the client initializes again."""
    session = RawSession(http, fleet.url("stdio"))
    await session.initialize()
    assert (await session.call("increment", tag="a")).text == "1"
    victim = await owner_of(fleet, session)
    kill(fleet, victim)
    survivor = RawSession(http, fleet.worker_url((victim + 1) % 3, "stdio"), headers=session.headers)
    deadline = time.monotonic() + LEASE_S + 1
    while (answer := await survivor.call("increment", tag="b")).status != 404:
        assert answer.status == 503
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert "error" in answer.message


async def test_an_owner_that_was_frozen_past_its_lease_runs_nothing_under_it(
    fleet: Fleet, http: aiohttp.ClientSession
) -> None:
    """B28: it wakes up, finds its session taken over, and sends what waited at its door to the new owner."""
    session = RawSession(http, fleet.url("http"))
    await session.initialize()
    assert (await session.call("increment", tag="one")).text == "1"
    victim = await owner_of(fleet, session)
    (frozen,) = worker_pids(fleet, victim)
    os.kill(frozen, signal.SIGSTOP)
    try:
        at_the_door = RawSession(http, fleet.worker_url(victim, "http"), headers=session.headers)
        elsewhere = RawSession(http, fleet.worker_url((victim + 1) % 3, "http"), headers=session.headers)
        at_the_door.ids = elsewhere.ids = session.ids
        waiting = asyncio.ensure_future(at_the_door.call("increment", tag="at the door"))
        # Redis had handed this one to the frozen worker already: nobody can know yet that it will refuse it.
        assert (await elsewhere.call("increment", tag="handed over")).error["data"]["outcome"] == "unknown"
        assert (await elsewhere.call("increment", tag="two")).text == "2"
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert (await waiting).text == "3"
    tags = [json.loads(line)["tag"] for line in (fleet.folder / "journal").read_text().splitlines()]
    assert sorted(tags) == ["at the door", "one", "two"]
    assert await owner_of(fleet, session) != victim
