"""The directory keeps its contract on every backend: one owner, larger epochs, nothing without an end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import fakeredis
import pytest
from faults import Mode, proxied
from leasehold.coordinator import Directory, Keys, RedisClients, Registration, SessionRecord, Unavailable, session_key
from redis.asyncio import Redis

pytestmark = pytest.mark.anyio

TTL_MS = 60_000
YEAR_2100_MS = 4_102_444_800_000
KEYS = Keys("test")
HOSTILE_IDS = [
    "",
    " ",
    "*",
    "?[a-z]\\",
    "a}b{c",
    "{s:x}",
    "{w:0123}:lease",
    "\n\r\n*3\r\n$3\r\nSET\r\n",
    "\0\x01\x7f",
    "../../etc/passwd",
    "'; DROP TABLE sessions; --",
    "\ud800",
    "\u202e\N{PILE OF POO}",
    "x" * 1_000_000,
]


def record(
    session: str = "s", owner: str = "a", epoch: int = 0, resume: bytes | None = b"\0sealed\xff"
) -> SessionRecord:
    return SessionRecord(
        session_key(session), Registration(owner, epoch), "github", "principal", 1_700_000_000_000, resume
    )


@pytest.fixture(params=["fakeredis", "redis"])
async def client(request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncGenerator[Redis]:
    if request.param == "fakeredis":
        client: Redis = fakeredis.FakeAsyncRedis()
    else:
        client = RedisClients(request.getfixturevalue("redis_url")).lookups()
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
def directory(client: Redis) -> Directory:
    return Directory(client, KEYS)


async def everything_ends(client: Redis) -> bool:
    """Whether every key in Redis has a TTL."""
    return all([await client.pttl(key) > 0 for key in await client.keys("*")])


class TestDirectory:
    async def test_what_was_claimed_is_found(self, directory: Directory) -> None:
        claimed = await directory.claim(record(), TTL_MS)
        assert claimed.won
        assert claimed.registration is not None
        found = await directory.look_up(session_key("s"))
        assert found is not None
        assert found.registration == claimed.registration
        assert (found.upstream, found.principal, found.created_ms) == ("github", "principal", 1_700_000_000_000)
        assert found.resume == b"\0sealed\xff"
        assert await directory.look_up(session_key("other")) is None

    async def test_a_session_that_cannot_move_has_no_resume_record(self, directory: Directory) -> None:
        await directory.claim(record(resume=None), TTL_MS)
        found = await directory.look_up(session_key("s"))
        assert found is not None
        assert found.resume is None

    async def test_b24_of_many_concurrent_claims_one_wins_and_all_learn_which(self, directory: Directory) -> None:
        claims = await asyncio.gather(*[directory.claim(record(owner=f"w{n}"), TTL_MS) for n in range(50)])
        assert sum(claim.won for claim in claims) == 1
        assert len({claim.registration for claim in claims}) == 1
        (winner,) = [n for n, claim in enumerate(claims) if claim.won]
        assert claims[0].registration is not None
        assert claims[0].registration.owner == f"w{winner}"

    async def test_b24_a_claim_whose_answer_was_lost_is_found_to_be_won(self, directory: Directory) -> None:
        first = await directory.claim(record(), TTL_MS)
        assert await directory.claim(record(), TTL_MS) == first

    async def test_b27_of_many_concurrent_takeovers_of_one_registration_one_wins(self, directory: Directory) -> None:
        seen = (await directory.claim(record(), TTL_MS)).registration
        assert seen is not None
        key = session_key("s")
        claims = await asyncio.gather(*[directory.take_over(key, seen, f"w{n}", TTL_MS) for n in range(50)])
        assert sum(claim.won for claim in claims) == 1
        (registration,) = {claim.registration for claim in claims}
        assert registration is not None
        assert registration.epoch > seen.epoch
        found = await directory.look_up(key)
        assert found is not None
        assert (found.registration, found.resume) == (registration, b"\0sealed\xff")

    async def test_b27_epochs_grow_strictly_also_when_the_clock_of_redis_goes_back(self, directory: Directory) -> None:
        # A record from a node whose clock was ahead of the one that answers now.
        claimed = await directory.claim(record(epoch=YEAR_2100_MS), TTL_MS)
        assert claimed.registration == Registration("a", YEAR_2100_MS)
        registration = claimed.registration
        for n in range(3):
            taken = await directory.take_over(session_key("s"), registration, f"w{n}", TTL_MS)
            assert taken.won
            assert taken.registration is not None
            assert taken.registration.epoch == registration.epoch + 1
            registration = taken.registration

    async def test_b27_an_owner_that_publishes_again_after_a_loss_gets_no_smaller_epoch(
        self, directory: Directory, client: Redis
    ) -> None:
        held = (await directory.claim(record(epoch=YEAR_2100_MS), TTL_MS)).registration
        assert held is not None
        await client.flushall()
        again = await directory.claim(record(epoch=held.epoch + 1), TTL_MS)
        assert again.registration == Registration("a", held.epoch + 1)

    async def test_b27_a_takeover_names_what_it_replaces(self, directory: Directory) -> None:
        held = (await directory.claim(record(), TTL_MS)).registration
        assert held is not None
        for stale in (Registration("a", held.epoch - 1), Registration("b", held.epoch)):
            assert await directory.take_over(session_key("s"), stale, "c", TTL_MS) == type(
                await directory.claim(record(owner="c"), TTL_MS)
            )(False, held)
        gone = await directory.take_over(session_key("unknown"), held, "c", TTL_MS)
        assert (gone.won, gone.registration) == (False, None)

    async def test_only_the_holder_releases(self, directory: Directory) -> None:
        held = (await directory.claim(record(), TTL_MS)).registration
        assert held is not None
        key = session_key("s")
        assert not await directory.release(key, Registration("b", held.epoch))
        assert not await directory.release(key, Registration("a", held.epoch + 1))
        assert await directory.look_up(key) is not None
        assert await directory.release(key, held)
        assert await directory.look_up(key) is None
        assert not await directory.release(key, held)

    async def test_b25_use_refreshes_the_lifetime_and_only_the_holder_can(
        self, directory: Directory, client: Redis
    ) -> None:
        held = (await directory.claim(record(), TTL_MS)).registration
        assert held is not None
        key = session_key("s")
        assert await directory.refresh([(key, Registration("b", held.epoch), 10 * TTL_MS)]) == [key]
        assert await client.pttl(KEYS.session(key)) <= TTL_MS
        assert await directory.refresh([(key, held, 10 * TTL_MS)]) == []
        assert await client.pttl(KEYS.session(key)) > TTL_MS

    async def test_b25_a_refresh_names_the_sessions_whose_record_has_gone_and_revives_none(
        self, directory: Directory, client: Redis
    ) -> None:
        held = {name: (await directory.claim(record(name), TTL_MS)).registration for name in ("s", "t", "u")}
        await client.delete(KEYS.session(session_key("t")))
        batch = [(session_key(name), registration, TTL_MS) for name, registration in held.items() if registration]
        assert await directory.refresh(batch) == [session_key("t")]
        assert await directory.look_up(session_key("t")) is None
        assert await directory.refresh([]) == []

    async def test_b29_every_record_has_an_end_whatever_was_done_to_it(
        self, directory: Directory, client: Redis
    ) -> None:
        held = (await directory.claim(record(), TTL_MS)).registration
        assert held is not None
        assert await everything_ends(client)
        taken = await directory.take_over(session_key("s"), held, "b", TTL_MS)
        assert taken.registration is not None
        assert await everything_ends(client)
        await directory.refresh([(session_key("s"), taken.registration, TTL_MS)])
        assert await everything_ends(client)
        assert await directory.release(session_key("s"), taken.registration)
        assert not await client.keys("*")

    @pytest.mark.parametrize("hostile", HOSTILE_IDS, ids=range(len(HOSTILE_IDS)))
    async def test_b30_a_hostile_session_id_is_one_session_like_any_other(
        self, directory: Directory, client: Redis, hostile: str
    ) -> None:
        await directory.claim(record("innocent"), TTL_MS)
        held = (await directory.claim(record(hostile, owner="b"), TTL_MS)).registration
        assert held is not None
        names = await client.keys("*")
        assert sorted(names) == sorted(KEYS.session(session_key(name)).encode() for name in ("innocent", hostile))
        assert {found.key async for found in directory.scan()} == {session_key("innocent"), session_key(hostile)}
        assert await directory.release(session_key(hostile), held)
        assert await directory.look_up(session_key("innocent")) is not None

    async def test_b30_different_ids_have_different_keys(self) -> None:
        assert len({session_key(hostile) for hostile in HOSTILE_IDS}) == len(HOSTILE_IDS)

    @pytest.mark.parametrize("namespace", ["*", "?", "[a-z]", "te\\st", "t{e}st"])
    async def test_b30_a_listing_stays_in_its_namespace(self, client: Redis, namespace: str) -> None:
        odd, plain = Directory(client, Keys(namespace)), Directory(client, Keys("test"))
        await odd.claim(record("odd"), TTL_MS)
        await plain.claim(record("plain"), TTL_MS)
        assert [found.key async for found in odd.scan()] == [session_key("odd")]
        assert [found.key async for found in plain.scan()] == [session_key("plain")]

    async def test_a_listing_names_every_session_and_its_lifetime(self, directory: Directory) -> None:
        names = [f"s{n}" for n in range(1200)]
        for name in names:
            await directory.claim(record(name), TTL_MS)
        found = {entry.key: entry async for entry in directory.scan()}
        assert set(found) == {session_key(name) for name in names}
        assert all(0 < entry.ttl_ms <= TTL_MS for entry in found.values())

    async def test_scripts_are_loaded_again_when_redis_has_forgotten_them(
        self, directory: Directory, client: Redis
    ) -> None:
        held = (await directory.claim(record(), TTL_MS)).registration
        assert held is not None
        await client.script_flush()
        assert await directory.refresh([(session_key("s"), held, TTL_MS)]) == []
        await client.script_flush()
        assert await directory.release(session_key("s"), held)


async def test_b35_redis_down_is_a_typed_error_for_every_method() -> None:
    client = RedisClients("unix:///nowhere/redis.sock").lookups()
    directory = Directory(client, KEYS)
    held = Registration("a", 1)
    for call in (
        directory.claim(record(), TTL_MS),
        directory.take_over("k", held, "b", TTL_MS),
        directory.release("k", held),
        directory.refresh([("k", held, TTL_MS)]),
        directory.look_up("k"),
        anext(directory.scan()),
    ):
        with pytest.raises(Unavailable):
            await call
    await client.aclose()


async def test_b3_look_ups_that_are_cancelled_cost_no_connection_and_mix_up_no_answers(redis_url: str) -> None:
    async with proxied(redis_url) as proxy:
        client = RedisClients(proxy.url).lookups()
        directory = Directory(client, KEYS)
        names = [f"s{n}" for n in range(40)]
        for name in names:
            await directory.claim(record(name, owner=name), TTL_MS)
        proxy.mode, proxy.delay_s = Mode.DELAY, 0.002
        chance = random.Random(7)

        async def look(name: str) -> None:
            found = await directory.look_up(session_key(name))
            assert found is not None
            assert found.registration.owner == name

        for _ in range(20):
            tasks = [asyncio.create_task(look(name)) for name in names]
            for task in tasks:
                asyncio.get_running_loop().call_later(chance.uniform(0, 0.04), task.cancel)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert not [error for error in results if error and not isinstance(error, asyncio.CancelledError)]
        proxy.mode = Mode.OK
        await asyncio.gather(*[look(name) for name in names])
        await client.aclose()
