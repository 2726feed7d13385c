"""The event log against a real Redis: order, bounds, what does not open, and Redis that is slow or away (B43)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable

import pytest
from faults import Mode, proxied
from leasehold.coordinator import Keyring, Keys, RedisClients, Unavailable
from leasehold.coordinator.client import execute
from leasehold.coordinator.event_log import (
    EVERYBODY,
    MAX_BYTES,
    MAX_EVENTS,
    WRITE_S,
    Cursor,
    EventLog,
    Logged,
    Position,
    SessionEvents,
    settled,
)
from redis.asyncio import Redis

pytestmark = pytest.mark.anyio

KEYS = Keys("leasehold")
KEYRING = Keyring([b"a secret for tests only and long enough"])
ONE, TWO = b"00000001", b"00000002"
TTL_MS = 60_000


@pytest.fixture
async def client(redis_url: str) -> AsyncGenerator[Redis]:
    async with RedisClients(redis_url).lookups() as client:
        yield client


@pytest.fixture
def log(client: Redis) -> EventLog:
    return EventLog(client, KEYS, KEYRING)


def session(log: EventLog, key: str = "session", *, epoch: int = 7, anew: bool = False) -> SessionEvents:
    return log.of(key, lambda: epoch, TTL_MS, anew=anew)


async def say(events: SessionEvents, *texts: bytes, stream: bytes = ONE) -> list[Logged]:
    logged = [events.add(stream, text) for text in texts]
    await settled(logged)
    return logged


def texts(logged: Iterable[Logged]) -> list[bytes]:
    return [each.event for each in logged]


def cursor(events: SessionEvents, name: bytes) -> Cursor:
    found = events.cursor(name)
    assert found is not None
    return found


async def test_b43_what_came_after_an_event_is_read_in_order_and_under_the_ids_it_was_sent_with(log: EventLog) -> None:
    events = session(log)
    beginning = events.now(ONE)
    first, second, third = await say(events, b"1", b"2", b"3")
    assert texts(await events.after(cursor(events, beginning))) == [b"1", b"2", b"3"]
    after = await events.after(cursor(events, first.name))
    assert [(each.event, each.name) for each in after] == [(b"2", second.name), (b"3", third.name)]
    assert await events.after(cursor(events, third.name)) == []
    assert (log.statistics.logged, log.statistics.replayed, log.statistics.not_logged) == (3, 5, 0)


async def test_b43_a_stream_is_told_its_own_events_and_everybodys(log: EventLog) -> None:
    events = session(log)
    beginning = events.now(ONE)
    await say(events, b"mine")
    await say(events, b"his", stream=TWO)
    await say(events, b"ours", stream=EVERYBODY)
    assert texts(await events.after(cursor(events, beginning))) == [b"mine", b"ours"]


async def test_b43_positions_grow_from_owner_to_owner_and_one_of_the_past_writes_nothing(log: EventLog) -> None:
    old, new = session(log, epoch=7), session(log, epoch=8)
    beginning = old.now(ONE)
    await say(old, b"1", b"2")
    await say(new, b"3")
    (late,) = await say(old, b"too late")
    assert not await late.written  # type: ignore[misc]
    assert texts(await new.after(cursor(new, beginning))) == [b"1", b"2", b"3"]
    assert log.statistics.not_logged == 1


async def test_events_of_one_turn_are_written_in_one_round_trip_and_expire(log: EventLog, client: Redis) -> None:
    one, two = session(log, "one"), session(log, "two")
    await say(one, b"warm")
    before = (await client.info("stats"))["total_commands_processed"]
    await settled([each.add(ONE, b"x") for each in (one, two) for _ in range(10)])
    after = (await client.info("stats"))["total_commands_processed"]
    assert after - before <= 20 + 2 + 1, "20 XADD, an expiry for each session, and INFO"
    for key in ("one", "two"):
        assert 0 < await client.pttl(KEYS.events(key)) <= TTL_MS


async def test_a_log_keeps_so_many_events_and_so_many_bytes(log: EventLog, client: Redis) -> None:
    many, large = session(log, "many"), session(log, "large")
    await say(many, *[b"x"] * (MAX_EVENTS + 300))
    assert MAX_EVENTS <= await client.xlen(KEYS.events("many")) <= MAX_EVENTS + 200
    beginning = large.now(ONE)
    size = MAX_BYTES // 4
    for number in b"123456":
        await say(large, bytes([number]) * size)
    kept = await large.after(cursor(large, beginning))
    assert [each.event[:1] for each in kept] == [b"3", b"4", b"5", b"6"]
    await say(large, b"x" * (MAX_BYTES + 1))
    assert log.statistics.not_logged == 1


async def test_an_entry_opens_only_where_it_was_written(log: EventLog, client: Redis) -> None:
    """An entry that was moved, in Redis, to another session or place says nothing."""
    mine, other = session(log, "mine"), session(log, "other")
    beginning = mine.now(ONE)
    await say(other, b"secret")
    ((where, fields),) = await client.xrange(KEYS.events("other"))
    assert b"secret" not in fields[b"e"]
    await execute(client, "XADD", KEYS.events("mine"), where, "e", fields[b"e"])
    await execute(client, "XADD", KEYS.events("other"), "9-9", "e", fields[b"e"])
    assert await mine.after(cursor(mine, beginning)) == []
    assert len(await other.after(cursor(other, beginning))) == 1


async def test_only_ids_of_this_fleet_are_read_as_ours(log: EventLog) -> None:
    events = session(log)
    name = events.now(ONE)
    assert events.cursor(name) == Cursor(ONE, Position(7, 0))
    strangers = EventLog(log._client, KEYS, Keyring([b"the secret of another fleet, as long as ours"]))
    assert strangers.read_name(name) is None
    for other in (b"", b"5", name[:-1], name + b"0", name.upper(), name.replace(b"-7-", b"-8-"), b"\xff" * 70):
        assert events.cursor(other) is None


async def test_a_session_that_ended_leaves_nothing_and_one_under_its_key_begins_anew(
    log: EventLog, client: Redis
) -> None:
    """B29"""
    ended, untouched = session(log), session(log, "untouched")
    beginning = ended.now(ONE)
    await say(ended, b"old")
    ended.drop()
    untouched.drop()
    await say(ended, b"a last word")
    while await client.exists(KEYS.events("session")):
        await asyncio.sleep(0.005)
    await say(session(log), b"old, and its end was not told")
    fresh = session(log, epoch=9, anew=True)
    await say(fresh, b"1", b"2")
    await say(fresh, b"3")
    assert texts(await fresh.after(cursor(fresh, beginning))) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("mode", [Mode.BLACKHOLE, Mode.DROP_REPLIES, Mode.RESET])
async def test_b32_an_event_is_not_held_up_by_a_redis_that_is_away_and_is_counted(redis_url: str, mode: Mode) -> None:
    async with proxied(redis_url) as proxy, RedisClients(proxy.url).lookups() as client:
        log = EventLog(client, KEYS, KEYRING)
        events = session(log)
        beginning = events.now(ONE)
        await say(events, b"1")
        proxy.mode = mode
        began = time.monotonic()
        lost = [*await say(events, b"2"), *await say(events, *[b"x"] * 10)]
        assert time.monotonic() - began < 2 * WRITE_S + 1
        assert log.statistics.not_logged == 11
        assert all(events.cursor(each.name) for each in lost), "who has them is past them"
        with pytest.raises(Unavailable):
            await events.after(cursor(events, beginning))
        proxy.mode = Mode.OK
        proxy.break_all()
        while log.statistics.logged < 2:
            (last,) = await say(events, b"3")
            await asyncio.sleep(0.05)
        assert texts(await events.after(cursor(events, lost[-1].name)))[-1] == b"3"
        assert last.name


async def test_b32_who_waits_for_a_write_may_be_cancelled_and_it_is_written(log: EventLog) -> None:
    events = session(log)
    beginning = events.now(ONE)
    logged = events.add(ONE, b"1")
    waiting = asyncio.create_task(settled([logged]))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await settled([logged])
    assert texts(await events.after(cursor(events, beginning))) == [b"1"]


async def test_a_full_redis_refuses_an_event_and_it_is_counted(log: EventLog, client: Redis) -> None:
    """B32"""
    events = session(log)
    await client.config_set("maxmemory", 1)
    try:
        await say(events, b"1")
    finally:
        await client.config_set("maxmemory", 0)
    assert log.statistics.not_logged == 1
