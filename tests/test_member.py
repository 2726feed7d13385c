"""Membership: leases that end in time and for good, mailboxes that lose nothing unnoticed, workers that recover."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from math import inf
from typing import Any

import pytest
from faults import Mode, eventually, proxied
from leasehold.coordinator import RedisClients, Unavailable, list_peers
from leasehold.coordinator.client import alone_since, parse_info, settled_for
from leasehold.coordinator.embedded import EmbeddedRedis
from leasehold.coordinator.frames import Frame, FrameType
from members import KEYS, LEASE_MS, PER_MEMBER, Peer, Routed, fleet, one_of, two_of
from redis.asyncio import Redis

pytestmark = pytest.mark.anyio


@pytest.fixture
async def admin(redis_url: str, anyio_backend: Any) -> AsyncGenerator[Redis]:
    client: Redis = Redis.from_url(redis_url)
    try:
        yield client
    finally:
        await client.aclose()


async def blocked_readers(admin: Redis) -> list[str]:
    """Ids of the connections that wait in a mailbox."""
    return [client["id"] for client in await admin.client_list() if client["cmd"] == "blpop"]


async def only_marks_of_the_end(admin: Redis) -> bool:
    """Whether nothing is left in Redis but the word, with a TTL, that workers have ended."""
    return all([key.endswith(b":ended") and await admin.pttl(key) > 0 for key in await admin.keys("*")])


class TestLease:
    async def test_it_is_renewed_for_as_long_as_the_worker_lives(self, redis_url: str, admin: Redis) -> None:
        async with one_of(redis_url) as peer:
            incarnation = peer.name
            await eventually(lambda: peer.member.renewals >= 7)
            assert peer.joins == [(incarnation, False)]
            assert peer.member.may_write()
            assert 0 < await admin.pttl(peer.lease) <= LEASE_MS
            (info,) = await list_peers(admin, KEYS)
            assert (info.incarnation, info.info["host"]) == (incarnation, "test")

    async def test_a_lease_that_ended_is_never_revived(self, redis_url: str, admin: Redis) -> None:
        async with one_of(redis_url) as peer:
            first = peer.name
            await admin.delete(peer.lease)
            await eventually(lambda: len(peer.joins) == 2)
            assert peer.losses == [first]
            assert peer.joins == [(first, False), (peer.name, True)]
            assert peer.name != first
            assert not await admin.exists(KEYS.lease(first))
            assert peer.member.may_write()

    async def test_b26_a_restart_with_the_same_host_and_pid_is_a_new_owner(self, redis_url: str) -> None:
        seen: set[str] = set()
        for _ in range(3):
            async with one_of(redis_url) as peer:
                seen.add(peer.name)
        assert len(seen) == 3

    async def test_b28_the_fence_falls_before_redis_ends_the_lease(self, redis_url: str, admin: Redis) -> None:
        async with proxied(redis_url) as proxy, one_of(proxy.url) as peer:
            assert peer.member.may_write()
            proxy.mode = Mode.BLACKHOLE
            while peer.member.may_write():
                await asyncio.sleep(0.001)
            assert await admin.pttl(peer.lease) > 0
            proxy.mode = Mode.RESET
            proxy.mode = Mode.OK

    async def test_b28_after_a_pause_of_the_process_the_fence_has_fallen(self, redis_url: str) -> None:
        async with one_of(redis_url) as peer:
            first = peer.name
            time.sleep(LEASE_MS / 1000)  # noqa: ASYNC251  # the pause is the point
            assert not peer.member.may_write()
            await eventually(lambda: len(peer.joins) == 2)
            assert peer.losses == [first]

    async def test_a_pause_shorter_than_the_lease_loses_nothing(self, redis_url: str) -> None:
        async with two_of(redis_url, lease_ttl_ms=6000) as (one, other):
            for exchange in range(5):
                one.call(other.name, exchange)
            await asyncio.sleep(0)
            time.sleep(2.5)  # noqa: ASYNC251  # longer than any answer may take
            await eventually(lambda: len(other.received()) == 5)
            assert (one.rotations, other.rotations) == (0, 0)

    async def test_b29_a_clean_stop_leaves_nothing_and_until_then_everything_has_an_end(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with two_of(redis_url, echo=True) as (one, other):
            for exchange in range(50):
                one.call(other.name, exchange)
            await eventually(lambda: len(one.received(FrameType.END)) == 50)
            keys = await admin.keys("*")
            assert keys
            for key in keys:
                assert await admin.pttl(key) != -1
        assert await only_marks_of_the_end(admin)

    async def test_b29_a_stop_while_the_lease_is_being_acquired_leaves_no_lease(
        self, redis_url: str, admin: Redis
    ) -> None:
        for step in range(8):
            async with proxied(redis_url) as proxy:
                proxy.mode, proxy.delay_s = Mode.DELAY, 0.01
                peer = Peer(RedisClients(proxy.url), lease_ttl_ms=60_000)
                await peer.start(wait=False)
                await asyncio.sleep(0.008 * step)
                await peer.stop()
            assert await only_marks_of_the_end(admin)

    async def test_a_stop_answers_what_is_still_in_the_mailbox_under_a_fallen_fence(
        self, redis_url: str, admin: Redis
    ) -> None:
        late: list[bool] = []

        class Stopping(Peer):
            stopping = False

            def frame(self, sender: str, frame: Frame) -> None:
                if self.stopping:
                    late.append(self.member.may_write())
                super().frame(sender, frame)

        async with proxied(redis_url) as slow:
            one, other = Peer(RedisClients(redis_url)), Stopping(Routed(redis_url, reader=slow.url), echo=True)
            async with fleet(one, other):
                slow.mode, slow.delay_s = Mode.DELAY, 0.1
                for exchange in range(300):
                    one.call(other.name, exchange)
                    if exchange % 10 == 0:
                        await one.member.outbox.flush(5)
                name, other.stopping = other.name, True
                await other.stop()
                await eventually(lambda: len(one.received(FrameType.END)) == 300)
                assert late
                assert not any(late)
                assert not await admin.exists(KEYS.mailbox(name, 1))

    async def test_a_stop_with_redis_gone_is_bounded_in_time(self, redis_url: str) -> None:
        async with proxied(redis_url) as proxy, one_of(proxy.url) as peer:
            proxy.mode = Mode.BLACKHOLE
            begun = time.monotonic()
            await peer.stop()
            assert time.monotonic() - begun < 8


class TestRedisGone:
    async def test_b35_redis_down_is_said_at_once_and_overcome_without_help(self, redis_url: str) -> None:
        async with proxied(redis_url) as proxy:
            one, other = Peer(RedisClients(proxy.url), lease_ttl_ms=3000), Peer(RedisClients(redis_url), echo=True)
            async with fleet(one, other):
                one.call(other.name, 1)
                await eventually(lambda: one.received(FrameType.END) == [1])
                proxy.mode = Mode.RESET
                call = one.call(other.name, 2)
                assert await eventually(lambda: bool(call.refusals)) < 1
                begun = time.monotonic()
                with pytest.raises(Unavailable):
                    one.call(other.name, 3)
                with pytest.raises(Unavailable):
                    await one.member.directory.look_up("x")
                assert time.monotonic() - begun < 0.5
                await eventually(lambda: not one.member.reachable)
                assert not one.member.absence_counts()
                proxy.mode = Mode.OK
                await eventually(lambda: one.member.outbox.available and one.member.reachable)
                one.call(other.name, 4)
                await eventually(lambda: one.received(FrameType.END) == [1, 4])
                assert other.received() == [1, 4]
                assert one.joins == [(one.name, False)], "the lease was long enough"

    async def test_b35_without_redis_at_the_start_a_worker_joins_when_it_comes(self, redis_url: str) -> None:
        async with proxied(redis_url) as proxy:
            proxy.mode = Mode.RESET
            peer = Peer(RedisClients(proxy.url))
            await peer.start(wait=False)
            with pytest.raises(Unavailable):
                peer.call("00" * 16, 1)
            assert not peer.member.may_write()
            proxy.mode = Mode.BLACKHOLE
            proxy.break_all()
            proxy.mode = Mode.OK
            await eventually(lambda: bool(peer.joins))
            await peer.stop()

    async def test_b32_a_redis_that_swallows_everything_ends_no_loop_for_good(self, redis_url: str) -> None:
        async with proxied(redis_url) as proxy, one_of(proxy.url) as peer:
            proxy.mode = Mode.BLACKHOLE
            await eventually(lambda: not peer.member.reachable)
            proxy.mode = Mode.OK
            await eventually(lambda: len(peer.joins) == 2 and peer.member.may_write())

    async def test_b32_redis_restarts_empty_and_absence_proves_nothing_for_one_lease(self, redis_url: str) -> None:
        with EmbeddedRedis() as empty:
            async with proxied(redis_url) as proxy, one_of(proxy.url) as peer:
                await eventually(peer.member.absence_counts)
                proxy.retarget(empty.url)
                await eventually(lambda: len(peer.joins) == 2)
                came_back = time.monotonic()
                assert not peer.member.absence_counts()
                await eventually(peer.member.absence_counts)
                assert time.monotonic() - came_back > 0.6 * LEASE_MS / 1000
                assert peer.joins[1] == (peer.name, True)

    async def test_b32_a_failover_that_kept_the_lease_keeps_the_incarnation_and_is_told(self, redis_url: str) -> None:
        with EmbeddedRedis() as replica:
            async with proxied(redis_url) as proxy, one_of(proxy.url) as peer, Redis.from_url(replica.url) as client:
                await client.hset(peer.lease, mapping={"gen": "1", "info": "{}"})
                await client.pexpire(peer.lease, 5000)
                proxy.retarget(replica.url)
                await eventually(lambda: peer.rotations == 1)
                assert len(peer.joins) == 1
                assert peer.redis_changes == 1
                assert await client.hget(peer.lease, "gen") == b"2"

    async def test_noscript_in_the_middle_of_a_run_is_overcome(self, redis_url: str, admin: Redis) -> None:
        async with two_of(redis_url, echo=True) as (one, other):
            for exchange in range(200):
                if exchange % 20 == 0:
                    await admin.script_flush()
                one.call(other.name, exchange)
                await asyncio.sleep(0.002)
            await eventually(lambda: len(one.received(FrameType.END)) == 200)
            assert other.received() == list(range(200))
            assert len(one.joins) == len(other.joins) == 1

    async def test_b36_any_number_of_frames_uses_a_constant_number_of_connections(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with two_of(redis_url, echo=True) as (one, other):
            for exchange in range(500):
                one.call(other.name, exchange)
            look_ups = [asyncio.create_task(one.member.directory.look_up("x")) for _ in range(200)]
            peak = 0
            while len(one.received(FrameType.END)) < 500 or not all(task.done() for task in look_ups):
                clients = [client for client in await admin.client_list() if client["name"] == "leasehold"]
                peak = max(peak, len(clients))
            assert 0 < peak <= 2 * PER_MEMBER


class TestPeers:
    async def test_b34_a_dead_peer_is_told_of_with_what_it_had_not_read(self, redis_url: str) -> None:
        async with two_of(redis_url) as (one, other):
            dead = other.name
            one.member.watch(dead)
            read = one.call(dead, 1)
            await eventually(lambda: other.received() == [1])
            await other.die()
            unread = one.call(dead, 2)
            took = await eventually(lambda: bool(one.downs))
            assert took < 3 * LEASE_MS / 1000
            assert one.downs == [(dead, frozenset({unread.request_counter}))]
            assert read.request_counter not in one.downs[0][1]
            assert not read.refusals
            renewals = one.member.renewals
            await eventually(lambda: one.member.renewals > renewals + 2)
            assert len(one.downs) == 1, "once, though it is watched still"
            assert one.call(dead, 3).refusals, "refused before the call returns"
            one.member.unwatch(dead)

    async def test_b34_a_peer_that_stops_is_told_of_within_a_renewal(self, redis_url: str) -> None:
        async with two_of(redis_url) as (one, other):
            one.member.watch(other.name)
            await eventually(one.member.absence_counts)
            await other.stop()
            assert await eventually(lambda: bool(one.downs)) < LEASE_MS / 1000
            one.member.unwatch(other.name)

    async def test_a_missing_lease_proves_nothing_while_redis_is_new(self) -> None:
        with EmbeddedRedis() as server:
            async with one_of(server.url, lease_ttl_ms=1500) as peer:
                peer.member.watch("ab" * 16)
                joined = time.monotonic()
                await eventually(lambda: bool(peer.downs))
                assert time.monotonic() - joined > 1.0

    @pytest.mark.acceptance
    async def test_a_redis_that_has_stood_for_long_is_believed_at_once_unless_it_was_promoted(self) -> None:
        with EmbeddedRedis() as server:
            await asyncio.sleep(4.5)  # it says so itself, in whole seconds
            async with one_of(server.url, lease_ttl_ms=1500) as peer:
                assert peer.member.absence_counts()
        # A replica that was promoted may lack what was written last, and does not say since when.
        up = parse_info(b"# Server\r\nuptime_in_seconds:500\r\n")
        assert settled_for(up, parse_info(b"role:master\r\nsecond_repl_offset:17\r\n")) == 0
        assert settled_for(up, parse_info(b"role:slave\r\nsecond_repl_offset:-1\r\n")) == 0
        assert settled_for(up, parse_info(b"role:master\r\nsecond_repl_offset:-1\r\n")) == 499

    def test_what_a_master_that_was_never_promoted_has_written_since_its_start_is_the_latest(self) -> None:
        """What it had at its start may be from a file, and overwritten since by another node."""
        up = parse_info(b"# Server\r\nuptime_in_seconds:500\r\nserver_time_usec:1000900000\r\n")
        assert alone_since(up, parse_info(b"role:master\r\nsecond_repl_offset:-1\r\n")) == (1_000 - 500 + 1) * 1_000
        assert alone_since(up, parse_info(b"role:master\r\nsecond_repl_offset:17\r\n")) == inf
        assert alone_since(up, parse_info(b"role:slave\r\nsecond_repl_offset:-1\r\n")) == inf
        untimed = parse_info(b"# Server\r\nuptime_in_seconds:500\r\n")
        assert alone_since(untimed, parse_info(b"role:master\r\nsecond_repl_offset:-1\r\n")) == inf


class TestMailbox:
    async def test_when_its_connection_is_killed_a_reader_opens_a_new_generation_and_tells_what_arrived(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with two_of(redis_url, lease_ttl_ms=5000) as (one, other):
            first = one.call(other.name, 1)
            await eventually(lambda: other.received() == [1])
            for reader in await blocked_readers(admin):
                await admin.client_kill_filter(_id=reader)
            await eventually(lambda: other.rotations == 1 and one.rotations == 1)
            assert await admin.hget(other.lease, "gen") == b"2"
            second = one.call(other.name, 2)
            await eventually(lambda: bool(one.receipts))
            assert other.received() == [1, 2]
            assert one.receipts[0].lost(first.request_counter) is False
            assert one.receipts[0].lost(second.request_counter) is False

    async def test_what_was_popped_into_a_broken_connection_is_called_lost(self, redis_url: str, admin: Redis) -> None:
        async with proxied(redis_url) as proxy:
            one = Peer(RedisClients(redis_url), lease_ttl_ms=5000)
            other = Peer(Routed(redis_url, reader=proxy.url), lease_ttl_ms=5000)
            async with fleet(one, other):
                kept = one.call(other.name, 1)
                await eventually(lambda: other.received() == [1])
                while len(await blocked_readers(admin)) < 2:
                    await asyncio.sleep(0.002)
                proxy.mode = Mode.DROP_REPLIES
                swallowed = one.call(other.name, 2)
                await eventually(lambda: proxy.dropped_bytes > 0)
                proxy.mode = Mode.OK
                proxy.break_all()
                await eventually(lambda: other.rotations == 1)
                one.tell(other.name, 3)
                await eventually(lambda: bool(one.receipts))
                assert one.receipts[0].lost(kept.request_counter) is False
                assert one.receipts[0].lost(swallowed.request_counter) is True
                assert other.received() == [1]

    async def test_b33_under_load_with_breaking_readers_each_call_runs_once_or_is_called_lost(
        self, redis_url: str
    ) -> None:
        async with proxied(redis_url) as proxy:
            one = Peer(RedisClients(redis_url), lease_ttl_ms=5000)
            other = Peer(Routed(redis_url, reader=proxy.url), lease_ttl_ms=5000)
            async with fleet(one, other):
                one.member.watch(other.name)  # as for every exchange: so it learns of a rotation without a push
                calls = []
                for exchange in range(1500):
                    calls.append(one.call(other.name, exchange))
                    if exchange % 5 == 0:
                        await asyncio.sleep(0.001)
                    if exchange % 150 == 149:
                        proxy.break_all()
                assert await one.member.outbox.flush(10)

                def lost() -> set[int]:
                    return {
                        call.exchange
                        for call in calls
                        if any(receipt.lost(call.request_counter) for receipt in one.receipts)
                    }

                await eventually(lambda: len(lost()) + len(other.received()) >= len(calls), 20)
                ran = other.received()
                assert ran == sorted(set(ran))
                assert not lost() & set(ran)
                assert not any(call.refusals for call in calls)
                one.member.unwatch(other.name)

    async def test_a_rotation_that_is_interrupted_leaves_no_generation_unread(self, redis_url: str) -> None:
        async with proxied(redis_url) as proxy:
            one = Peer(RedisClients(redis_url), lease_ttl_ms=8000)
            other = Peer(Routed(redis_url, reader=proxy.url), lease_ttl_ms=8000)
            async with fleet(one, other):
                one.call(other.name, 1)
                await eventually(lambda: other.received() == [1])
                proxy.mode = Mode.RESET
                await eventually(lambda: not other.member.reachable)
                for exchange in range(2, 50):
                    one.call(other.name, exchange)
                await one.member.outbox.flush(5)
                # Broken again and again on the way through renewal, rotation and draining.
                proxy.mode, proxy.delay_s = Mode.DELAY, 0.01
                for pause_ms in range(15, 75, 5):
                    await asyncio.sleep(pause_ms / 1000)
                    proxy.break_all()
                proxy.mode = Mode.OK
                await eventually(lambda: other.rotations > 0 and other.member.reachable)
                one.call(other.name, 100)
                await eventually(lambda: 100 in other.received())
                ran = other.received()
                assert ran == sorted(set(ran))


class TestListener:
    async def test_b45_a_reader_that_crashes_ends_the_worker_at_once(self, redis_url: str, admin: Redis) -> None:
        peer = Peer(RedisClients(redis_url))
        await peer.start()

        def crash() -> None:
            raise RuntimeError("a bug")

        peer.on_rotated = crash
        (reader,) = await blocked_readers(admin)
        await admin.client_kill_filter(_id=reader)
        assert peer.task is not None
        with pytest.raises(ExceptionGroup):
            await peer.task
        assert not peer.member.may_write()
        with pytest.raises(Unavailable):
            peer.call("00" * 16, 1)
        while await admin.exists(peer.lease):
            await asyncio.sleep(0.01)
        await peer.member.aclose()

    async def test_a_join_that_redis_interrupts_is_done_again(self, redis_url: str) -> None:
        peer = Peer(RedisClients(redis_url))
        peer.interrupt_joins = 3
        async with fleet(peer):
            assert peer.joins == [(peer.name, False)]

    async def test_work_for_an_incarnation_ends_with_it(self, redis_url: str, admin: Redis) -> None:
        cancelled: list[str] = []

        class Slow(Peer):
            async def joined(self, incarnation: str, *, again: bool) -> None:
                if not again:
                    try:
                        await asyncio.Event().wait()
                    finally:
                        cancelled.append(incarnation)
                await super().joined(incarnation, again=again)

        peer = Slow(RedisClients(redis_url))
        await peer.start(wait=False)
        await eventually(lambda: bool(peer.name))
        first = peer.name
        await admin.delete(peer.lease)
        await eventually(lambda: bool(peer.joins))
        assert cancelled == [first]
        await peer.stop()
