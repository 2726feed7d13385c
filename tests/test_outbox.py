"""The outbox: what a push can come to, and that no request is called not run which may have run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from faults import Mode, Proxy, eventually, proxied
from leasehold.coordinator import RedisClients, Refusal, Unavailable
from leasehold.coordinator.frames import Frame, FrameType, encode
from leasehold.coordinator.inbox import Inbox
from members import RING, Call, Peer, Routed, fleet, one_of, two_of
from redis.asyncio import Redis

pytestmark = pytest.mark.anyio

LONG_MS = 30_000


@pytest.fixture
async def admin(redis_url: str, anyio_backend: Any) -> AsyncGenerator[Redis]:
    client: Redis = Redis.from_url(redis_url)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def frozen_peer(url: str) -> AsyncGenerator[Peer]:
    """A worker that holds a lease and reads nothing."""
    peer = Peer(RedisClients(url), lease_ttl_ms=LONG_MS)
    await peer.start()
    await peer.die()
    yield peer


@asynccontextmanager
async def caller(url: str, **options: Any) -> AsyncGenerator[tuple[Peer, Proxy]]:
    """A worker whose pushes go through a proxy."""
    async with proxied(url) as proxy:
        peer = Peer(Routed(url, writer=proxy.url), lease_ttl_ms=LONG_MS, **options)
        async with fleet(peer):
            yield peer, proxy


async def lose_the_answer(proxy: Proxy, peer: Peer, call: Call, reconnect: bool = True) -> None:
    """Have the push of what was just posted answered into the void, then the connection break."""
    proxy.mode = Mode.DROP_REPLIES
    dropped = proxy.dropped_bytes
    await eventually(lambda: proxy.dropped_bytes > dropped)
    assert call.request_counter
    if reconnect:
        proxy.mode = Mode.OK
        proxy.break_all()


async def acquainted(one: Peer, other: Peer) -> None:
    """Make `one` know the generation of the other's mailbox, so that its next push is taken at once."""
    one.tell(other.name, 0)
    assert await one.member.outbox.flush(5)


class TestPush:
    async def test_b33_frames_arrive_once_and_in_order_both_ways(self, redis_url: str) -> None:
        async with two_of(redis_url, echo=True) as (one, other):
            for exchange in range(3000):
                one.call(other.name, exchange, b"x" * (exchange % 97))
                if exchange % 50 == 0:
                    await asyncio.sleep(0)
            await eventually(lambda: len(one.received(FrameType.END)) == 3000)
            assert other.received() == one.received(FrameType.END) == list(range(3000))
            statistics = one.member.outbox.statistics()
            assert statistics.frames == 3000
            assert statistics.pushes < 3000 / 10, "a batch is one round trip"

    async def test_a_request_precedes_its_other_frames(self, redis_url: str) -> None:
        async with two_of(redis_url) as (one, other):
            for exchange in range(1, 20):
                one.call(other.name, exchange)
                one.tell(other.name, exchange, FrameType.BODY)
            await eventually(lambda: len(other.frames) == 38)
            for exchange in range(1, 20):
                kinds = [frame.type for _, frame in other.frames if frame.exchange == exchange]
                assert kinds == [FrameType.REQUEST, FrameType.BODY]

    async def test_frames_larger_than_an_envelope_and_than_a_push_arrive(self, redis_url: str) -> None:
        async with two_of(redis_url, lease_ttl_ms=5000) as (one, other):
            payload = b"x" * 65_536
            for exchange in range(200):
                one.call(other.name, exchange, payload)
            await eventually(lambda: len(other.frames) == 200)
            assert other.received() == list(range(200))

    async def test_b34_a_push_to_a_dead_owner_is_refused_in_the_same_round_trip(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with one_of(redis_url) as one:
            one.tell("cd" * 16, 1)  # a Redis that does not know the script yet takes one round trip more
            assert await one.member.outbox.flush(5)
            pushes = one.member.outbox.statistics().pushes
            nobody = "ab" * 16
            first = one.call(nobody, 1)
            await eventually(lambda: bool(first.refusals))
            assert first.refusals == [Refusal.OWNER_DOWN]
            assert one.member.outbox.statistics().pushes == pushes + 1
            second = one.call(nobody, 2)
            assert second.refusals == [Refusal.OWNER_DOWN]
            one.tell(nobody, 2)
            assert one.member.outbox.statistics().pushes == pushes + 1
            assert not await admin.keys(f"*{nobody}*")

    async def test_b39_a_channel_is_never_made_twice(self, redis_url: str) -> None:
        """Its counters would start again under the same key: an AEAD nonce used twice."""
        async with one_of(redis_url) as one:
            nobody = "ab" * 16
            call = one.call(nobody, 1)
            await eventually(lambda: bool(call.refusals))
            one.call(nobody, 2)
            one.tell(nobody, 2)
            assert one.member.outbox.channel(nobody) is None

    async def test_b44_a_full_mailbox_refuses_requests_only(self, redis_url: str, admin: Redis) -> None:
        async with frozen_peer(redis_url) as other, one_of(redis_url, mailbox_limit=5) as one:
            for exchange in range(5):
                call = one.call(other.name, exchange)
                assert await one.member.outbox.flush(5)
                assert not call.refusals
            refused = one.call(other.name, 6)
            one.tell(other.name, 1, FrameType.CREDIT)
            await eventually(lambda: bool(refused.refusals))
            assert refused.refusals == [Refusal.BUSY]
            assert await admin.llen(other.mailbox) == 6, "the credit went in"
            for _ in range(20):
                one.tell(other.name, 1)
                assert await one.member.outbox.flush(5)
            assert await admin.llen(other.mailbox) == 26

    async def test_b39_copies_of_an_envelope_pushed_by_others_are_dropped_silently_and_counted(
        self, redis_url: str, admin: Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with two_of(redis_url) as (one, other):
            await acquainted(one, other)
            channel = one.member.outbox.channel(other.name)
            assert channel is not None
            _, envelope = channel.seal(encode(FrameType.CREDIT, 7))
            caplog.clear()
            await admin.rpush(other.mailbox, envelope, envelope)
            await admin.rpush(other.mailbox, envelope)
            await eventually(lambda: other.member.inbox.statistics.repeated == 2)
            assert other.received(FrameType.CREDIT) == [7]
            assert not caplog.records
            # The same envelope is nothing to a third worker.
            await admin.rpush(one.mailbox, envelope)
            await eventually(lambda: one.member.inbox.statistics.refused == 1)
            assert not one.frames

    async def test_b32_a_full_redis_refuses_requests_as_not_run_and_keeps_answers(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with two_of(redis_url, lease_ttl_ms=LONG_MS) as (one, other):
            await acquainted(one, other)
            await admin.config_set("maxmemory", 1)
            call = one.call(other.name, 1)
            one.tell(other.name, 2, FrameType.CREDIT)
            assert await eventually(lambda: bool(call.refusals)) < 1
            assert call.refusals == [Refusal.UNAVAILABLE]
            with pytest.raises(Unavailable):
                one.call(other.name, 3)
            await admin.config_set("maxmemory", 0)
            await eventually(lambda: other.received(FrameType.CREDIT) == [2])
            await eventually(lambda: one.member.outbox.available)
            one.call(other.name, 4)
            await eventually(lambda: other.received() == [4])

    async def test_the_outbox_of_an_ended_incarnation_takes_no_request(self, redis_url: str, admin: Redis) -> None:
        async with two_of(redis_url) as (one, other):
            outbox = one.member.outbox
            await admin.delete(one.lease)
            await eventually(lambda: len(one.joins) == 2)
            with pytest.raises(Unavailable):
                outbox.post(other.name, encode(FrameType.REQUEST, 1), Call(1), request=True)
            outbox.post(other.name, encode(FrameType.CREDIT, 1))
            one.call(other.name, 2)
            await eventually(lambda: other.received() == [2])
            assert not other.received(FrameType.CREDIT)


class TestInDoubt:
    """The answer to a push was lost: it may have been taken, and what the next push comes to does not say."""

    async def test_b33_a_push_whose_answer_was_lost_is_repeated_and_delivered_once(self, redis_url: str) -> None:
        async with one_of(redis_url, lease_ttl_ms=LONG_MS, echo=True) as other, caller(redis_url) as (one, proxy):
            await acquainted(one, other)
            call = one.call(other.name, 1)
            one.tell(other.name, 1, FrameType.BODY)
            await lose_the_answer(proxy, one, call)
            await eventually(lambda: one.received(FrameType.END) == [1])
            await eventually(lambda: other.member.inbox.statistics.repeated == 2)
            assert (other.received(), other.received(FrameType.BODY)) == ([1], [1])
            assert not call.refusals
            await eventually(lambda: bool(one.receipts))
            assert one.receipts[0].lost(call.request_counter) is False

    async def test_an_owner_that_is_down_at_the_second_push_may_have_run_what_the_first_brought(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with frozen_peer(redis_url) as other, caller(redis_url) as (one, proxy):
            await acquainted(one, other)
            call = one.call(other.name, 1)
            await lose_the_answer(proxy, one, call, reconnect=False)
            await admin.delete(other.lease)
            proxy.mode = Mode.OK
            proxy.break_all()
            await eventually(lambda: bool(call.refusals))
            assert call.refusals == [Refusal.IN_DOUBT]

    async def test_a_mailbox_that_is_full_at_the_second_push_may_hold_what_the_first_brought(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with frozen_peer(redis_url) as other, caller(redis_url, mailbox_limit=2) as (one, proxy):
            await acquainted(one, other)
            call = one.call(other.name, 1)
            await lose_the_answer(proxy, one, call)
            assert await one.member.outbox.flush(5)
            assert await admin.llen(other.mailbox) == 3, "the greeting, the request, and the question what arrived"
            assert not call.refusals

    async def test_a_request_that_only_the_second_push_brought_comes_late_and_the_receipt_says_so(
        self, redis_url: str, admin: Redis
    ) -> None:
        async with frozen_peer(redis_url) as other, caller(redis_url, mailbox_limit=1) as (one, proxy):
            await acquainted(one, other)
            call = one.call(other.name, 1)
            one.tell(other.name, 1, FrameType.BODY)
            await lose_the_answer(proxy, one, call, reconnect=False)
            read = await admin.lpop(other.mailbox, 10)
            assert len(read) == 2, "the greeting and the body; the request was refused"
            proxy.mode = Mode.OK
            proxy.break_all()
            assert await one.member.outbox.flush(5)
            read += await admin.lpop(other.mailbox, 10)
            got: list[Frame] = []
            inbox = Inbox(RING, other.name, lambda _, frame: got.append(frame))
            for envelope in read:
                inbox.receive(envelope)
            assert [frame.type for frame in got] == [FrameType.CANCEL, FrameType.BODY, FrameType.QUERY]
            assert inbox.window(one.name).receipt(got[-1].exchange).lost(call.request_counter) is True
            assert not call.refusals

    async def test_a_request_is_given_up_as_in_doubt_when_the_second_push_fails_too(self, redis_url: str) -> None:
        async with frozen_peer(redis_url) as other, caller(redis_url) as (one, proxy):
            await acquainted(one, other)
            call = one.call(other.name, 1)
            await lose_the_answer(proxy, one, call, reconnect=False)
            proxy.mode = Mode.RESET
            await eventually(lambda: bool(call.refusals))
            assert call.refusals == [Refusal.IN_DOUBT]

    async def test_a_request_that_was_never_sent_is_not_run_and_not_in_doubt(self, redis_url: str) -> None:
        async with frozen_peer(redis_url) as other, caller(redis_url) as (one, proxy):
            await acquainted(one, other)
            proxy.mode = Mode.RESET
            await asyncio.sleep(0.02)  # the idle connection is seen to be broken
            call = one.call(other.name, 1)
            assert await eventually(lambda: bool(call.refusals)) < 1
            assert call.refusals == [Refusal.UNAVAILABLE]
            proxy.mode = Mode.OK
            await eventually(lambda: one.member.outbox.available)

    async def test_answers_are_repeated_until_redis_takes_them(self, redis_url: str) -> None:
        async with one_of(redis_url, lease_ttl_ms=LONG_MS) as other, caller(redis_url) as (one, proxy):
            await acquainted(one, other)
            proxy.mode = Mode.RESET
            for exchange in range(1, 50):
                one.tell(other.name, exchange, FrameType.CREDIT)
                await asyncio.sleep(0.002)
            assert not await one.member.outbox.flush(0.05)
            proxy.mode = Mode.OK
            await eventually(lambda: other.received(FrameType.CREDIT) == list(range(1, 50)))

    async def test_b33_under_load_with_lost_answers_each_call_runs_once_or_is_told_of(self, redis_url: str) -> None:
        async with one_of(redis_url, lease_ttl_ms=LONG_MS, echo=True) as other, caller(redis_url) as (one, proxy):
            calls: list[Call] = []
            for exchange in range(600):
                try:
                    calls.append(one.call(other.name, exchange))
                except Unavailable:
                    await asyncio.sleep(0.005)
                    continue
                await asyncio.sleep(0.001)
                if exchange % 40 == 39:
                    proxy.mode = Mode.DROP_REPLIES
                    await asyncio.sleep(0.003)
                    proxy.mode = Mode.OK
                    proxy.break_all()
            await eventually(lambda: one.member.outbox.available)
            assert await one.member.outbox.flush(5)
            await eventually(lambda: not one.receipts or len(one.received(FrameType.END)) == len(other.received()))
            ran = other.received()
            assert len(ran) == len(set(ran))
            for call in calls:
                if call.exchange not in ran:
                    lost = any(receipt.lost(call.request_counter) for receipt in one.receipts)
                    assert lost or call.refusals
                else:
                    assert set(call.refusals) <= {Refusal.IN_DOUBT}
            assert other.member.inbox.statistics.repeated > 0
