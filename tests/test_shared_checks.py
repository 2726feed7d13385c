"""The health check of sessions that a worker's clients share (affinity `principal`, and the library's affinities):
before a request goes to one that was idle, at its owner."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from faults import eventually
from whole_workers import Client, Upstream, upstream, worker

pytestmark = pytest.mark.anyio

SOON_S = 0.1


@pytest.fixture
async def stub(anyio_backend: Any) -> Any:
    async with upstream() as made:
        yield made


def servers(stub: Upstream, **options: Any) -> dict[str, Any]:
    return {"counter": {"url": stub.url, "leasehold": {"affinity": "principal", **options}}}


async def idle() -> None:
    """Let every session be idle for longer than `SOON_S`."""
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() - begun > SOON_S * 1.5)


async def test_b10_a_session_that_was_idle_is_checked_once_for_all_who_call_it(redis_url: str, stub: Upstream) -> None:
    async with worker(redis_url, servers(stub, health_check_interval=SOON_S)) as one:
        clients = [Client(one) for _ in range(10)]
        for client in clients:
            await client.initialize()
        await clients[0].count()
        await idle()
        before = stub.methods.count("ping")
        counts = await asyncio.gather(*(client.count() for client in clients))
        assert len(set(counts)) == 10
        assert stub.methods.count("ping") == before + 1 == one.pool.statistics().health_checks
        assert len(stub.counts) == 1


async def test_b10_one_that_was_used_a_moment_ago_is_not_and_initialize_asks_nothing(
    redis_url: str, stub: Upstream
) -> None:
    async with worker(redis_url, servers(stub, health_check_interval=3600)) as one:
        client = Client(one)
        await client.initialize()
        assert [await client.count() for _ in range(3)] == [2, 3, 4]
        assert "ping" not in stub.methods
    async with worker(redis_url, servers(stub, health_check_interval=SOON_S)) as one:
        await Client(one).initialize()
        await idle()
        stub.methods.clear()
        await Client(one).initialize()
        assert stub.methods == [], "it is answered by what the server said before"


async def test_the_check_goes_with_the_credentials_of_the_caller(redis_url: str, stub: Upstream) -> None:
    options = {"health_check_interval": SOON_S, "forward_headers": ["authorization"]}
    async with worker(redis_url, servers(stub, **options)) as one:
        client = Client(one, headers=[(b"authorization", b"Bearer mine")])
        await client.initialize()
        await idle()
        await client.count()
        assert "ping" in stub.methods
        assert set(stub.authorizations) == {"Bearer mine"}


@pytest.mark.parametrize("landed", [0, 1])
async def test_b54_what_the_check_finds_dead_is_replaced_within_the_call(
    redis_url: str, stub: Upstream, landed: int
) -> None:
    """B54, B10: at the owner, and by a hop: the call did not run, so that it may run on a fresh session."""
    config = servers(stub, health_check_interval=SOON_S)
    async with worker(redis_url, config) as one, worker(redis_url, config) as two:
        client = Client(one)
        await client.initialize()
        assert await client.count() == 2
        stub.counts.clear()
        await idle()
        client.worker = (one, two)[landed]
        assert await client.count() == 2, "a fresh one: `initialized`, and this"
        assert len(one.pool) + len(two.pool) == 1
        closed = one.pool.statistics().closed
        assert closed == {"unhealthy": 1}


async def test_b16_a_shared_session_that_cannot_be_opened_says_why(redis_url: str) -> None:
    """B16: at once, also while its circuit is open: then it fails before anybody could wait for it."""
    config = {"counter": {"url": "http://127.0.0.1:1/mcp", "leasehold": {"affinity": "principal"}}}
    async with worker(redis_url, config) as one:
        client = Client(one)
        said: list[str] = []
        for _ in range(7):
            status, answer = await client.send("POST", "initialize", {"protocolVersion": "2025-11-25"})
            assert (status, answer["error"]["data"]) == (503, {"outcome": "not_run"})
            said.append(answer["error"]["message"])
        assert all("cannot connect" in each for each in said[:5]), said
        assert all("is not tried" in each for each in said[5:]), said
        assert int(dict(client.answered)[b"retry-after"]) >= 1
