"""What a worker owns, and how the directory is brought in line with it: whole workers in one process, a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from faults import Mode, eventually, proxied
from leasehold.coordinator import Directory, Keys, RedisClients, Registration, SessionRecord
from leasehold.coordinator.embedded import EmbeddedRedis
from redis.asyncio import Redis
from whole_workers import Client, Upstream, upstream, worker

pytestmark = [pytest.mark.anyio]

KEYS = Keys("leasehold")


@pytest.fixture
async def stub() -> AsyncGenerator[Upstream]:
    async with upstream() as stub:
        yield stub


@pytest.fixture
async def admin(redis_url: str) -> AsyncGenerator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


async def record_of(redis_url: str, client: Client) -> SessionRecord | None:
    async with RedisClients(redis_url).lookups() as lookups:
        return await Directory(lookups, KEYS).look_up(client.key)


async def test_the_record_stands_before_the_session_id_leaves(redis_url: str, stub: Upstream) -> None:
    async with worker(redis_url, {"counter": {"url": stub.url}}) as one:
        client = Client(one)
        await client.initialize()
        record = await record_of(redis_url, client)
        assert record is not None
        assert record.registration.owner == one.member.incarnation


async def test_a_session_is_served_on_after_its_owner_lost_its_lease_and_under_a_new_incarnation(
    redis_url: str, stub: Upstream, admin: Redis
) -> None:
    async with worker(redis_url, {"counter": {"url": stub.url}}) as one:
        client = Client(one)
        await client.initialize()
        first = one.member.incarnation
        await admin.delete(KEYS.lease(first))
        await eventually(lambda: one.member.incarnation != first)
        assert await client.count() == 1
        record = await record_of(redis_url, client)
        assert record is not None
        assert record.registration.owner == one.member.incarnation != first


async def test_a_session_that_was_taken_over_meanwhile_is_dropped_and_its_upstream_not_told(
    redis_url: str, stub: Upstream, admin: Redis
) -> None:
    """B27, B28: the loser of a takeover leaves the upstream session to the winner."""
    servers = {"counter": {"url": stub.url}}
    async with worker(redis_url, servers) as one, worker(redis_url, servers) as two:
        client = Client(one)
        await client.initialize()
        assert await client.count() == 1
        record = await record_of(redis_url, client)
        assert record is not None
        adopted = await two.sessions.adopt(record)
        assert adopted is not None
        first = one.member.incarnation
        await admin.delete(KEYS.lease(first))
        await eventually(lambda: one.sessions.get(client.key) is None)
        assert one.sessions.lost == 1
        # Both reach it, and the upstream still counts on.
        assert await client.count() == 2
        client.worker = two
        assert await client.count() == 3
        assert stub.deleted == []


async def test_b24_of_two_workers_that_adopt_at_once_one_wins(redis_url: str, stub: Upstream) -> None:
    servers = {"counter": {"url": stub.url}}
    async with worker(redis_url, servers) as two, worker(redis_url, servers) as three:
        async with worker(redis_url, servers) as one:
            client = Client(one)
            await client.initialize()
            record = await record_of(redis_url, client)
            assert record is not None
        won = [await two.sessions.adopt(record), await three.sessions.adopt(record)]
        assert won == [None, None]  # the record was handed off since it was read
        record = await record_of(redis_url, client)
        assert record is not None
        assert [await two.sessions.adopt(record) is None, await three.sessions.adopt(record) is None] == [False, True]


async def test_what_could_not_be_re_claimed_is_re_claimed_later(redis_url: str, stub: Upstream, admin: Redis) -> None:
    """A Redis that fails during the re-claim must not leave a session without an owner."""
    async with proxied(redis_url) as proxy, worker(proxy.url, {"counter": {"url": stub.url}}) as one:
        client = Client(one)
        await client.initialize()
        first = one.member.incarnation
        proxy.mode = Mode.RESET
        await eventually(lambda: not one.member.may_write())
        status, _ = await client.send("POST", "tools/call", {"name": "count"})
        assert status == 503
        while await admin.exists(KEYS.lease(first)):
            pass
        proxy.mode = Mode.OK
        await eventually(lambda: one.member.incarnation != first and one.member.may_write())
        assert await client.count() == 1


async def test_a_redis_that_restarted_empty_learns_every_session_again(stub: Upstream) -> None:
    """B32: owners are the truth."""
    servers = {"counter": {"url": stub.url}}
    first, second = EmbeddedRedis(), EmbeddedRedis()
    with first, second:
        async with proxied(first.url) as proxy, worker(proxy.url, servers) as one, worker(proxy.url, servers) as two:
            clients = [Client(one) for _ in range(5)]
            for client in clients:
                await client.initialize()
                assert await client.count() == 1
            proxy.retarget(second.url)
            for client in clients:
                client.worker = two
                assert await client.count() == 2


async def test_a_pinned_session_that_another_worker_ended_is_closed(redis_url: str, admin: Redis) -> None:
    """Its client was told that it is gone: the process must not live on."""
    servers = {"pinned": {"command": "cat"}}
    async with worker(redis_url, servers) as one:
        key = "ab" * 32
        owned = await one.sessions.open(key, one.upstreams["pinned"], "anonymous")
        await one.sessions.register(owned)
        first = one.member.incarnation
        await admin.delete(KEYS.session(key), KEYS.lease(first))
        await eventually(lambda: one.sessions.get(key) is None and len(one.pool) == 0)


async def test_a_record_that_could_not_be_released_is_released_later(redis_url: str, stub: Upstream) -> None:
    """B29: or other workers would take the session for one that moves."""
    async with proxied(redis_url) as proxy, worker(proxy.url, {"counter": {"url": stub.url}}) as one:
        client = Client(one)
        await client.initialize()
        owned = one.sessions.get(client.key)
        assert owned is not None
        proxy.mode = Mode.RESET
        await eventually(lambda: not one.member.reachable)
        one.sessions.end(owned, "client")
        proxy.mode = Mode.OK
        await eventually_gone(redis_url, client)


async def eventually_gone(redis_url: str, client: Client) -> None:
    async with RedisClients(redis_url).lookups() as lookups:
        directory = Directory(lookups, KEYS)
        while await directory.look_up(client.key) is not None:
            pass


async def test_a_claim_whose_answer_was_lost_leaves_no_record(redis_url: str, stub: Upstream) -> None:
    """The client got 503; a record without a session would make others wait for it."""
    async with proxied(redis_url) as proxy, worker(proxy.url, {"counter": {"url": stub.url}}) as one:
        owned = await one.sessions.open("cd" * 32, one.upstreams["counter"], "anonymous")
        await one.member.directory.claim(
            SessionRecord(owned.session.key, Registration(one.member.incarnation, 0), "counter", "anonymous", 0, None),
            60_000,
        )
        one.sessions.doubt(owned.session.key)
        one.sessions.end(owned, "unregistered")
        async with RedisClients(redis_url).lookups() as lookups:
            while await Directory(lookups, KEYS).look_up(owned.session.key) is not None:
                pass


async def test_a_worker_that_stops_hands_its_sessions_over_at_once(redis_url: str, stub: Upstream) -> None:
    """The next caller's worker adopts: nobody waits for a lease, and the count goes on."""
    servers = {"counter": {"url": stub.url}}
    async with worker(redis_url, servers) as two:
        async with worker(redis_url, servers) as one:
            client = Client(one)
            await client.initialize()
            assert await client.count() == 1
            one.drain()
            await eventually(lambda: one.sessions.get(client.key) is None)
            client.worker = two
            assert await client.count() == 2
        assert await client.count() == 3
        assert stub.deleted == []


async def test_a_cookie_that_the_upstream_changed_is_there_for_the_next_owner(redis_url: str, stub: Upstream) -> None:
    servers = {"counter": {"url": stub.url}}
    async with worker(redis_url, servers) as two:
        async with worker(redis_url, servers) as one:
            client = Client(one)
            await client.initialize()
            await client.count()
            owned = one.sessions.get(client.key)
            assert owned is not None
            await eventually(lambda: owned.sealed == owned.session.resume)
        client.worker = two
        await client.count()
        assert stub.cookies == ["pin=1", "pin=2"]


async def test_a_deleted_session_is_unknown_everywhere(redis_url: str, stub: Upstream) -> None:
    servers = {"counter": {"url": stub.url}}
    async with worker(redis_url, servers) as one, worker(redis_url, servers) as two:
        client = Client(one)
        await client.initialize()
        client.worker = two
        assert await client.count() == 1
        assert (await client.send("DELETE"))[0] == 200
        for where in (one, two):
            client.worker = where
            await eventually(where.member.absence_counts)
            assert (await client.send("POST", "ping"))[0] == 404
        assert len(stub.deleted) == 1


async def test_b12_requests_for_one_unknown_owner_share_one_look_up(
    redis_url: str, stub: Upstream, admin: Redis
) -> None:
    servers = {"counter": {"url": stub.url}}
    async with worker(redis_url, servers) as one, worker(redis_url, servers) as two:
        client = Client(one)
        await client.initialize()
        client.worker = two
        before = (await admin.info("commandstats")).get("cmdstat_hgetall", {"calls": 0})["calls"]
        counts = await asyncio.gather(*(client.count() for _ in range(20)))
        assert sorted(counts) == list(range(1, 21))
        after = (await admin.info("commandstats"))["cmdstat_hgetall"]["calls"]
        assert after - before == 1


async def test_a_missing_record_is_no_404_while_look_ups_reach_another_redis_than_the_lease_is_on(
    redis_url: str, stub: Upstream, admin: Redis
) -> None:
    """After a failover the two may part for a while: an empty node proves nothing."""

    class Parted(RedisClients):
        def lookups(self) -> Redis:
            return RedisClients(empty.url).lookups()

    with EmbeddedRedis() as empty:
        async with worker(redis_url, {"counter": {"url": stub.url}}) as one:
            client = Client(one)
            await client.initialize()
            owned = one.sessions.get(client.key)
            assert owned is not None
            one.sessions.end(owned, "client")
            await eventually(one.member.absence_counts)
            assert await one.member.sees_known_node()
            assert (await client.send("POST", "ping"))[0] == 404

        async with worker(redis_url, {"counter": {"url": stub.url}}, clients=Parted) as one:
            await eventually(one.member.absence_counts)
            assert not await one.member.sees_known_node()
            client.worker = one
            assert (await client.send("POST", "ping"))[0] == 503
