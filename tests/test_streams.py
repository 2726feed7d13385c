"""Event streams of sessions through whole workers: ids, the log, resumption anywhere, and owners that change."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from faults import Mode, eventually, proxied
from leasehold.coordinator import Keys
from leasehold.pool.sse import event
from leasehold.workers.worker import Worker
from listening import Listener, Speaker, listening, said, speaking
from redis.asyncio import Redis
from whole_workers import Client, worker

pytestmark = pytest.mark.anyio

KEYS = Keys("leasehold")


@pytest.fixture
async def speaker() -> AsyncGenerator[Speaker]:
    async with speaking() as speaker:
        yield speaker


@pytest.fixture
async def admin(redis_url: str) -> AsyncGenerator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


def servers(speaker: Speaker, affinity: str = "session") -> dict[str, Any]:
    return {"counter": {"url": speaker.url, "leasehold": {"affinity": affinity}}}


@asynccontextmanager
async def workers(redis_url: str, config: dict[str, Any], count: int = 2) -> AsyncGenerator[list[Worker]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(worker(redis_url, config)) for _ in range(count)]


async def opened(owner: Worker) -> Client:
    client = Client(owner)
    await client.initialize()
    return client


def statistics(made: list[Worker]) -> tuple[int, int, int]:
    """(logged, replayed, not logged) by all of them."""
    each = [one.member.events.statistics for one in made]
    return sum(s.logged for s in each), sum(s.replayed for s in each), sum(s.not_logged for s in each)


AFFINITIES = pytest.mark.parametrize("affinity", ["session", "principal"])


@AFFINITIES
@pytest.mark.parametrize("hops", [False, True])
async def test_b43_events_without_ids_get_ours_are_logged_first_and_sent_again_to_who_comes_back(
    redis_url: str, speaker: Speaker, affinity: str, *, hops: bool
) -> None:
    async with workers(redis_url, servers(speaker, affinity)) as (one, two):
        client = await opened(one)
        client.worker = two if hops else one
        async with listening(client) as listener:
            assert listener.status == 200
            await speaker.say(1)
            await speaker.say(2, 3)
            assert await listener.heard(3) == [1, 2, 3]
            names = [name for name, _ in listener.events]
            assert all(name is not None and name.startswith(b"leasehold-") for name in names)
            assert len(set(names)) == 3
            assert not any(name.startswith(b"leasehold") for name in listener.headers)
        assert statistics([one, two]) == (3, 0, 0)
        for seen in range(3):
            client.worker = one if client.worker is two else two
            again = await _come_back(listener, names[seen])
            assert await again.heard(2 - seen) == [1, 2, 3][seen + 1 :]
            assert [name for name, _ in again.events] == names[seen + 1 :]
            await again.leave()
        again = await _come_back(again, names[2])
        await speaker.say(4)
        assert await again.heard(1) == [4]
        await again.leave()
        assert statistics([one, two]) == (4, 2 + 1, 0)
        assert all(not last.startswith("leasehold") for last in speaker.last_ids)


async def test_b43_what_a_client_missed_while_nobody_knew_that_it_was_gone_is_sent_again(
    redis_url: str, speaker: Speaker
) -> None:
    async with workers(redis_url, servers(speaker), 3) as made:
        client = await opened(made[0])
        client.worker = made[1]
        async with listening(client) as listener:
            await speaker.say(1, 2)
            await listener.heard(2)
            listener.is_deaf = True
            await speaker.say(3, 4)
            await eventually(lambda: statistics(made)[0] == 4)
        client.worker = made[2]
        await eventually(lambda: not speaker.streams)
        async with listening(client, listener.last_id) as again:
            await speaker.say(5)
            assert await again.heard(3) == [3, 4, 5]


@pytest.mark.parametrize("hops", [False, True])
async def test_b43_ids_of_the_upstream_pass_as_they_are_and_resumption_is_relayed_to_it(
    redis_url: str, *, hops: bool
) -> None:
    """Untouched bytes, through a hop and after an adoption; nothing is logged."""
    async with speaking(ids=True) as speaker, workers(redis_url, servers(speaker), 3) as made:
        speaker.line_end = b"\r\n"
        client = await opened(made[0])
        client.worker = made[1 if hops else 0]
        async with listening(client) as listener:
            await speaker.say(1, 2)
            await listener.heard(2)
            await speaker.write(b": a comment\r\n\r\nretry: 7\r\n\r\n")
            await eventually(lambda: b"retry: 7" in listener.raw)
        session = next(iter(speaker.kept))
        expected = b"".join(speaker._event(session, number) for number in range(2))
        assert listener.raw == expected + b": a comment\r\n\r\nretry: 7\r\n\r\n"
        await speaker.say(3)
        await eventually(lambda: not speaker.streams)
        client.worker = made[0 if hops else 1]
        async with listening(client, b"1") as again:
            assert await again.heard(2) == [2, 3]
        await eventually(lambda: not speaker.streams)
        # The next one adopts it.
        owned = made[0].sessions.get(client.key)
        assert owned is not None
        async with made[0].sessions.leaving(owned):
            pass
        client.worker = made[2]
        async with listening(client, b"2") as adopted:
            assert await adopted.heard(1) == [3]
        assert speaker.last_ids == ["", "1", "2"]
        assert statistics(made) == (0, 0, 0)


async def test_events_that_only_set_an_id_or_a_time_and_comments_decide_nothing(
    redis_url: str, speaker: Speaker
) -> None:
    async with workers(redis_url, servers(speaker), 1) as (one,), listening(await opened(one)) as listener:
        await speaker.write(b": hello\n\nretry: 100\n\n")
        await eventually(lambda: b"retry" in listener.raw)
        await speaker.write(b'data: {"torn":')
        await asyncio.sleep(0.05)
        await speaker.write(b"1}\n")
        await speaker.write(b"\nid: 5\ndata: {}\n\ndata: {}\n\n")
        await eventually(lambda: len(listener.events) == 3)
        ours, *theirs = [name for name, _ in listener.events]
        assert ours is not None
        assert ours.startswith(b"leasehold-")
        assert theirs == [b"5", None], "from the first id on the stream is the upstream's"
        assert statistics([one]) == (1, 0, 0)


@AFFINITIES
@pytest.mark.parametrize("what", ["garbage", "unsendable", "forged", "trimmed", "of another session", "malformed"])
async def test_b43_an_id_that_says_nothing_begins_a_stream_of_what_comes_now(
    redis_url: str, speaker: Speaker, admin: Redis, affinity: str, what: str
) -> None:
    """As the SDK's server does for one: 200, and nothing is sent again. No error, and nothing of anybody else's."""
    async with workers(redis_url, servers(speaker, affinity)) as (one, two):
        client = await opened(one)
        async with listening(client) as listener:
            await speaker.say(1, 2)
            await listener.heard(2)
        name = listener.events[0][0]
        assert name is not None
        other = Client(one, headers=[(b"authorization", b"Bearer another")])
        await other.initialize()
        if what == "trimmed":
            for key in await admin.keys("*:events"):
                await admin.delete(key)
        if what == "of another session":
            await eventually(lambda: not speaker.streams)
            client = other
        told = {
            "garbage": b"5",
            "unsendable": b"\xc3\xa4\x01",
            "forged": name[:-4] + b"0000",
            "malformed": b"leasehold-" + b"9" * 5000,
        }.get(what, name)
        client.worker = two
        await eventually(lambda: not speaker.streams)
        async with listening(client, told) as again:
            assert again.status == 200
            await eventually(lambda: bool(speaker.streams))
            await speaker.say(3, session=next(reversed(speaker.streams)))
            assert await again.heard(1) == [3]
        assert name.decode() not in speaker.last_ids


async def test_b17_clients_that_share_a_session_get_no_events_of_each_other(redis_url: str, speaker: Speaker) -> None:
    """Progress is its caller's alone, also out of the log, and by another's id."""
    async with workers(redis_url, servers(speaker, "principal"), 1) as (one,):
        alice, bob = await opened(one), await opened(one)
        async with listening(alice) as first, listening(bob) as second:
            await speaker.say(1)
            await first.heard(1)
            await second.heard(1)
            owned = one.sessions.all()[0]
            upstream = owned.relay._ids.begin(alice.session_id.encode(), 7, "token")
            progress = {"progressToken": upstream, "progress": 1}
            message = {"jsonrpc": "2.0", "method": "notifications/progress", "params": progress}
            await speaker.write(event(orjson.dumps(message)))
            await eventually(lambda: len(first.events) == 2)
            await speaker.say(2)
            await eventually(lambda: len(first.events) == 3 and len(second.events) == 2)
        await eventually(lambda: not speaker.streams)
        names = [name for name, _ in first.events]
        async with listening(alice, names[0]) as again:
            await eventually(lambda: len(again.events) == 2)
            assert [name for name, _ in again.events] == names[1:]
        async with listening(bob, second.events[0][0]) as again:
            assert await again.heard(1) == [2]
        async with listening(bob, names[0]) as again:
            await eventually(lambda: bool(speaker.streams))
            await speaker.say(3)
            assert await again.heard(1) == [3]


@AFFINITIES
async def test_b43_a_stream_goes_on_for_its_client_when_its_owner_stops(
    redis_url: str, speaker: Speaker, affinity: str
) -> None:
    """One HTTP response; what the first owner had logged and not yet sent comes from the log."""
    config = servers(speaker, affinity)
    async with workers(redis_url, config) as (edge, other):
        async with worker(redis_url, config) as owner:
            client = await opened(owner)
            client.worker = edge
            async with AsyncExitStack() as leaving:
                listener = await leaving.enter_async_context(listening(client))
                await speaker.say(1)
                await listener.heard(1)
                held = leaving.pop_all()
        async with held:
            await eventually(lambda: bool(speaker.streams))
            await speaker.say(2, 3)
            assert await listener.heard(3) == [1, 2, 3]
            client.worker = other
            assert (await client.send("POST", "tools/call", {"name": "x"}))[0] == 200
            assert not listener.task.done()
        exposed = edge.telemetry.exposition()[0]
        assert b'leasehold_streams_reattached_total{reason="listening"} 1.0' in exposed
        assert b"leasehold_events_logged_total" in exposed


async def test_b43_the_one_stream_of_a_shared_session_is_resumed_where_the_upstream_gives_ids(redis_url: str) -> None:
    """Its connection breaks, and what the upstream said meanwhile comes; an id that it has forgotten ends nothing."""
    async with speaking(ids=True) as speaker, workers(redis_url, servers(speaker, "principal"), 1) as (one,):
        async with listening(await opened(one)) as listener:
            await eventually(lambda: bool(speaker.streams))
            await speaker.say(1, 2)
            await listener.heard(2)
            speaker.streams.clear()
            await speaker.say(3)
            assert await listener.heard(3) == [1, 2, 3]
            assert speaker.last_ids == ["", "2"]
            assert all(name is not None and name.startswith(b"leasehold-") for name, _ in listener.events)
            speaker.refuses = 400
            speaker.streams.clear()
            await eventually(lambda: speaker.last_ids[2:] == ["3", ""])
            await speaker.say(4)
            assert await listener.heard(4) == [1, 2, 3, 4]


@AFFINITIES
async def test_b43_what_an_owner_had_logged_and_could_not_send_comes_from_the_log(
    redis_url: str, speaker: Speaker, admin: Redis, affinity: str
) -> None:
    """Also the very first event of a stream, before which the client has no id: the edge knows where it began."""
    async with workers(redis_url, servers(speaker, affinity)) as made:
        owner, edge = made
        client = await opened(owner)
        client.worker = edge
        async with listening(client) as listener:
            await eventually(lambda: bool(speaker.streams))
            (exchange,) = owner.forwarder._owners.values()
            exchange._credit = 0
            await speaker.say(1, 2)
            await eventually(lambda: statistics(made)[0] == 2)
            assert listener.events == []
            await admin.delete(KEYS.lease(owner.member.incarnation))
            assert await listener.heard(2) == [1, 2]
            await eventually(lambda: bool(speaker.streams))
            await speaker.say(3)
            assert await listener.heard(3) == [1, 2, 3]


async def test_b43_a_stdio_server_has_ids_and_resumption_and_its_stream_ends_when_its_owner_stops(
    redis_url: str,
) -> None:
    """And it does not keep the owner from stopping: the grace is far longer than this may take."""
    command = ["-I", "-S", str(Path(__file__).parent / "servers" / "fake_stdio.py")]
    config: Any = {"counter": {"command": sys.executable, "args": command}}
    async with AsyncExitStack() as stack:
        edge = await stack.enter_async_context(worker(redis_url, config))
        async with AsyncExitStack() as owning:
            owner = await owning.enter_async_context(worker(redis_url, config, LEASEHOLD_SHUTDOWN_GRACE_S="60"))
            client = await opened(owner)
            # With two calls in flight, what belongs to no call goes to the GET stream.
            held = [asyncio.create_task(client.send("POST", "hold", {"name": name})) for name in ("a", "b")]
            client.worker = edge
            listener = await stack.enter_async_context(listening(client))
            await _tell(client, 1)
            await listener.heard(1)
            listener.is_deaf = True
            await _tell(client, 2)
            await eventually(lambda: statistics([owner])[0] == 2)
            listener = await _come_back(listener, listener.last_id)
            await _tell(client, 3)
            assert await listener.heard(2) == [2, 3]
            assert all(name is not None and name.startswith(b"leasehold-") for name, _ in listener.events)
            listener = await _come_back(listener, b"5")
            stack.push_async_callback(listener.leave)
            await _tell(client, 4)
            assert await listener.heard(1) == [4]
            for name in ("a", "b"):
                assert (await client.send("POST", "release", {"name": name}))[0] == 200
            await asyncio.gather(*held)
            async with asyncio.timeout(30):
                await owning.aclose()
        await eventually(listener.task.done)
        assert (await client.send("POST", "ping"))[0] == 404


async def _tell(client: Client, number: int) -> None:
    status, _ = await client.send("POST", "say", {"lines": [said(number).decode()]})
    assert status == 200


async def test_a_stream_ends_with_its_session_and_the_next_get_is_a_404(redis_url: str, speaker: Speaker) -> None:
    async with workers(redis_url, servers(speaker)) as (one, two):
        client = await opened(one)
        client.worker = two
        async with listening(client) as listener:
            await speaker.say(1)
            await listener.heard(1)
            assert (await client.send("DELETE"))[0] == 200
            await eventually(listener.task.done)
            assert listener.task.exception() is None
        async with listening(client) as again:
            assert again.status == 404


async def test_b29_a_deleted_session_leaves_no_log(redis_url: str, speaker: Speaker, admin: Redis) -> None:
    async with workers(redis_url, servers(speaker), 1) as (one,):
        client = await opened(one)
        async with listening(client) as listener:
            await speaker.say(1)
            await listener.heard(1)
            assert await admin.exists(KEYS.events(client.key))
            await client.send("DELETE")
        while await admin.exists(KEYS.events(client.key)):
            await asyncio.sleep(0.005)


async def test_b43_the_end_of_a_stream_that_the_upstream_has_ended_is_passed_on(
    redis_url: str, speaker: Speaker
) -> None:
    async with workers(redis_url, servers(speaker)) as (one, two):
        client = await opened(one)
        client.worker = two
        async with listening(client) as listener:
            await speaker.say(1)
            await listener.heard(1)
            speaker.streams.clear()
            await eventually(listener.task.done)
        assert len(speaker.last_ids) == 1


async def test_b32_a_redis_that_is_away_holds_no_event_up_for_long_and_who_comes_back_is_told_so(
    redis_url: str, speaker: Speaker
) -> None:
    async with proxied(redis_url) as proxy, workers(proxy.url, servers(speaker), 1) as (one,):
        client = await opened(one)
        async with listening(client) as listener:
            await speaker.say(1)
            await listener.heard(1)
            proxy.mode = Mode.BLACKHOLE
            await speaker.say(2, 3)
            assert await listener.heard(3) == [1, 2, 3]
            assert statistics([one]) == (1, 0, 2)
            proxy.mode = Mode.OK
            proxy.break_all()


@pytest.mark.parametrize("seed", range(4))
@AFFINITIES
async def test_b43_whatever_happens_to_client_and_owners_nothing_is_missed_or_repeated(
    redis_url: str, speaker: Speaker, admin: Redis, affinity: str, seed: int
) -> None:
    """Seeded: clients that leave without a word and come back anywhere, owners that hand over, leases that end."""
    chance = random.Random(seed)
    async with workers(redis_url, servers(speaker, affinity), 3) as made:
        client = await opened(made[0])
        client.worker = made[1]
        told: list[int] = []
        heard: list[int] = []

        async def turn_up(listener: Listener, where: Worker) -> Listener:
            await listener.leave()
            heard.extend(listener.numbers)
            client.worker = where
            return await _come_back(listener, listener.last_id)

        listener = Listener(client)
        await listener.begun()
        await _say(speaker, made, told, 1)
        await listener.heard(1)
        for _ in range(12):
            match chance.choice(["say", "say", "deafen", "come back", "hand over", "lose lease"]):
                case "say":
                    await _say(speaker, made, told, chance.randint(1, 3))
                case "deafen":
                    listener.is_deaf = True
                case "come back":
                    listener = await turn_up(listener, chance.choice(made))
                case "hand over":
                    for each in made:
                        for owned in each.sessions.all():
                            async with each.sessions.leaving(owned):
                                pass
                case "lose lease":
                    await admin.delete(KEYS.lease(chance.choice(made).member.incarnation))
                    await asyncio.sleep(chance.random() / 5)
        listener = await turn_up(listener, chance.choice(made))
        await _say(speaker, made, told, 1)
        await eventually(lambda: told[-1] in listener.numbers)
        assert heard + listener.numbers == told
        await listener.leave()


async def _say(speaker: Speaker, made: list[Worker], told: list[int], count: int) -> None:
    """Say something until an owner has it: what was said on a stream that it was just leaving has gone nowhere."""
    for number in range(len(told) + 1, len(told) + 1 + count):
        before = statistics(made)[0]
        while statistics(made)[0] == before:
            await eventually(lambda: bool(speaker.streams), 20)
            session, stream = next(iter(speaker.streams.items()))
            with suppress(ConnectionError):
                await speaker.say(number, session=session)
            await eventually(lambda: statistics(made)[0] > before or speaker.streams.get(session) is not stream, 20)  # noqa: B023
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while statistics(made)[0] == before:
                        await asyncio.sleep(0.005)
        told.append(number)


async def _come_back(listener: Listener, last_id: bytes | None) -> Listener:
    """Leave, and listen again at the worker where the client is now. The owner may take a moment to know of the one."""
    await listener.leave()
    again = Listener(listener.client, last_id)
    while await again.begun() != 200:
        assert again.status in (409, 503)
        await again.leave()
        await asyncio.sleep(0.05)
        again = Listener(listener.client, last_id)
    return again
