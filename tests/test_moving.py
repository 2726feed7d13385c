"""Sessions that move from one worker to another while both live: by an operator, for balance, and in a drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from faults import Mode, eventually, proxied
from leasehold.coordinator import Directory, Keys, RedisClients, SessionRecord, Unavailable
from leasehold.pool import OpenFailed, SessionClosed
from leasehold.workers import control_client, placement
from leasehold.workers.control_client import ControlError, ask
from leasehold.workers.operator import Operator, operator
from leasehold.workers.settings import load_settings
from leasehold.workers.worker import Worker
from mcp_http import VERSION
from redis.asyncio import Redis
from whole_workers import SECRET, Client, Upstream, upstream, worker

pytestmark = pytest.mark.anyio

PINNED = {"pinned": {"command": "cat"}}


@pytest.fixture
async def stub() -> AsyncGenerator[Upstream]:
    async with upstream() as stub:
        yield stub


def servers(stub: Upstream, **options: Any) -> dict[str, Any]:
    return {"counter": {"url": stub.url, "leasehold": options}}


async def record_of(redis_url: str, key: str) -> SessionRecord | None:
    async with RedisClients(redis_url).lookups() as lookups:
        return await Directory(lookups, Keys("leasehold")).look_up(key)


async def opened(one: Worker) -> Client:
    client = Client(one)
    await client.initialize()
    assert await client.count() == 1
    return client


async def pinned(one: Worker) -> str:
    key = "ab" * 32
    owned = await one.sessions.open(key, one.upstreams["pinned"], "anonymous")
    await one.sessions.register(owned)
    return key


def as_operator(redis_url: str) -> Any:
    settings = load_settings({"LEASEHOLD_REDIS_URL": redis_url, "LEASEHOLD_SECRET": SECRET.decode()}, serving=False)
    return operator(settings, RedisClients(redis_url))


class TestMove:
    async def test_a_session_that_is_moved_goes_on_for_callers_of_any_worker(
        self, redis_url: str, stub: Upstream
    ) -> None:
        """B27: the same upstream session, under a larger epoch."""
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            client = await opened(one)
            owned = one.sessions.get(client.key)
            assert owned is not None
            assert owned.registration is not None
            moved = await one.placement.move(owned, two.member.incarnation)
            assert moved.owner == two.member.incarnation
            assert moved.epoch > owned.registration.epoch
            assert one.sessions.get(client.key) is None
            assert await client.count() == 2
            client.worker = two
            assert await client.count() == 3
            assert (one.statistics().sessions_handed_off, two.sessions.adopted) == (1, 1)
            await eventually(lambda: len(one.pool) == 0)
            assert stub.deleted == []

    async def test_b28_no_upstream_write_starts_at_the_old_owner_once_it_gives_up(
        self, redis_url: str, stub: Upstream
    ) -> None:
        """Not even while the directory still names it."""
        async with proxied(redis_url) as proxy, worker(proxy.url, servers(stub)) as one:
            client = await opened(one)
            owned = one.sessions.get(client.key)
            assert owned is not None
            proxy.mode = Mode.BLACKHOLE
            leaving = asyncio.ensure_future(one.sessions.hand_off())
            await asyncio.sleep(0)
            assert one.sessions.get(client.key) is None
            assert not one.sessions.holds(owned), "a request that waits for its connection is not written any more"
            with pytest.raises(SessionClosed):
                owned.session.link  # noqa: B018
            proxy.mode = Mode.RESET
            await asyncio.wait({leaving})
            assert leaving.exception() is not None
            record = await record_of(redis_url, client.key)
            assert record is not None
            assert record.registration.owner
            proxy.mode = Mode.OK
            while (record := await record_of(redis_url, client.key)) is not None and record.registration.owner:
                pass
            assert record is not None, "what could not be handed off is handed off later"

    async def test_b33_moves_under_load_lose_no_call_and_run_none_twice(self, redis_url: str, stub: Upstream) -> None:
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            clients = [await opened(one) for _ in range(4)]
            moves = 0
            counts: dict[str, list[int]] = {client.key: [] for client in clients}
            done = asyncio.Event()

            async def calling(client: Client) -> None:
                for number in range(60):
                    client.worker = (one, two)[number % 2]
                    counts[client.key].append(await client.count())

            async def moving() -> None:
                nonlocal moves
                while not done.is_set():
                    for here, there in ((one, two), (two, one)):
                        for owned in here.sessions.all():
                            await here.placement.move(owned, there.member.incarnation)
                            moves += 1

            mover = asyncio.ensure_future(moving())
            await asyncio.gather(*map(calling, clients))
            done.set()
            await mover
            assert moves > 8
            assert list(counts.values()) == [list(range(2, 62))] * 4
            assert stub.deleted == []

    async def test_callers_who_come_while_a_session_moves_wait_and_do_not_take_it_back(
        self, redis_url: str, stub: Upstream
    ) -> None:
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            client = await opened(one)
            owned = one.sessions.get(client.key)
            assert owned is not None
            async with one.sessions.leaving(owned) as left:
                assert left
                waiting = asyncio.ensure_future(client.count())
                assert (await record_of(redis_url, client.key)).registration.owner == ""  # type: ignore[union-attr]
                assert not waiting.done()
                async with one.sessions.leaving(owned) as again:
                    assert not again
                await ask(one.forwarder, two.member.incarnation, "adopt", client.key)
            assert await waiting == 2
            assert two.sessions.get(client.key) is not None

    async def test_b32_a_record_that_redis_has_lost_is_written_again_by_who_hands_off(
        self, redis_url: str, stub: Upstream
    ) -> None:
        """Owners are the truth: or its client would get 404."""
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            client = await opened(one)
            async with Redis.from_url(redis_url) as admin:
                assert await admin.delete(Keys("leasehold").session(client.key)) == 1
            await one.hand_off()
            client.worker = two
            assert await client.count() == 2

    @pytest.mark.parametrize("lost", ["the answer", "the opening"])
    async def test_b35_an_adoption_that_fails_half_way_leaves_the_session_to_the_next_caller(
        self, redis_url: str, stub: Upstream, lost: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or everybody would be sent to a worker that does not have it."""
        async with worker(redis_url, servers(stub)) as two, worker(redis_url, servers(stub)) as three:
            async with worker(redis_url, servers(stub)) as one:
                client = await opened(one)
            failures = 0

            def failing(original: Any, *, before: bool) -> Any:
                async def fail(*arguments: Any, **options: Any) -> Any:
                    nonlocal failures
                    failures += 1
                    if not before:
                        await original(*arguments, **options)
                    raise (OpenFailed if before else Unavailable)("lost")

                return fail

            client.worker = two
            with monkeypatch.context() as patch:
                if lost == "the answer":
                    directory = two.member.directory
                    patch.setattr(directory, "take_over", failing(directory.take_over, before=False))
                else:
                    patch.setattr(two.sessions, "_open", failing(None, before=True))
                assert (await client.send("POST", "tools/call", {"name": "count"}))[0] in (502, 503)
                assert failures == 1
            client.worker = three
            while (answer := await client.send("POST", "tools/call", {"name": "count"}))[0] == 503:
                assert answer[1]["error"]["data"] == {"outcome": "not_run"}
            assert answer[1]["result"] == {"count": 2}

    async def test_one_that_cannot_go_stays(self, redis_url: str, stub: Upstream) -> None:
        async with worker(redis_url, servers(stub) | PINNED) as one:
            client = await opened(one)
            owned = one.sessions.get(client.key)
            assert owned is not None
            with pytest.raises(ControlError, match="no other worker"):
                await one.placement.move(owned)
            with pytest.raises(ControlError, match="there already"):
                await one.placement.move(owned, one.member.incarnation)
            key = await pinned(one)
            with pytest.raises(ControlError, match="pinned"):
                await ask(one.forwarder, one.member.incarnation, "move", key)
            assert await client.count() == 2
            assert one.sessions.get(key) is not None

    async def test_one_that_nobody_takes_is_the_next_caller_s(self, redis_url: str, stub: Upstream) -> None:
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, PINNED) as two:
            client = await opened(one)
            owned = one.sessions.get(client.key)
            assert owned is not None
            with pytest.raises(ControlError, match="no worker took it"):
                await one.placement.move(owned, two.member.incarnation)
            assert await client.count() == 2


class TestDrain:
    async def test_b46_a_worker_that_drains_goes_on_answering_and_others_own_its_sessions(
        self, redis_url: str, stub: Upstream
    ) -> None:
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            clients = [await opened(one) for _ in range(5)]
            await one.hand_off()
            assert one.sessions.all() == []
            assert [await client.count() for client in clients] == [2] * 5
            assert len(two.sessions.all()) == 5
            assert one.member.may_write(), "it lives on"

    async def test_b46_calls_that_run_when_the_drain_begins_are_answered_and_run_once(
        self, redis_url: str, stub: Upstream
    ) -> None:
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            clients = [await opened(each) for each in (one, one, two, two)]
            calls = [asyncio.ensure_future(client.count()) for client in clients * 10]
            await asyncio.sleep(0)
            draining = asyncio.ensure_future(one.hand_off())
            counts = await asyncio.gather(*calls)
            await draining
            assert sorted(counts) == sorted(list(range(2, 12)) * 4)

    @pytest.mark.parametrize("affinity", ["session", "principal", "none"])
    async def test_b46_a_client_that_begins_at_a_worker_that_drains_has_a_session(
        self, redis_url: str, stub: Upstream, affinity: str
    ) -> None:
        """Its load balancer may not know yet."""
        config = servers(stub, affinity=affinity)
        async with worker(redis_url, config) as one, worker(redis_url, config) as two:
            await one.hand_off()
            client = Client(one)
            await client.initialize()
            first = await client.count()
            client.worker = two
            if affinity != "none":
                assert await client.count() == first + 1
                assert len(two.sessions.all()) == 1
            assert one.sessions.all() == []

    async def test_b46_a_pinned_session_is_not_begun_at_a_worker_that_drains(
        self, redis_url: str, stub: Upstream
    ) -> None:
        async with worker(redis_url, PINNED) as one:
            await one.hand_off()
            assert (await Client(one, "pinned").send("POST", "initialize", {"protocolVersion": VERSION}))[0] == 503

    async def test_a_session_that_is_shared_is_opened_by_another_worker(self, redis_url: str, stub: Upstream) -> None:
        config = servers(stub, affinity="principal")
        async with worker(redis_url, config) as one, worker(redis_url, config) as two:
            client = Client(one)
            await client.initialize()
            (owned,) = one.sessions.all()
            two.sessions.end(owned, "idle") if two.sessions.all() else one.sessions.end(owned, "idle")
            await one.hand_off()
            assert await client.count() == 2, "1 was `initialized`"
            assert len(two.sessions.all()) == 1

    async def test_without_another_worker_callers_are_told_to_come_back(self, redis_url: str, stub: Upstream) -> None:
        """B35"""
        async with worker(redis_url, servers(stub)) as one:
            client = await opened(one)
            await one.hand_off()
            status, answer = await client.send("POST", "tools/call", {"name": "count"})
            assert (status, answer["error"]["data"]) == (503, {"outcome": "not_run"})
            assert b"retry-after" in dict(client.answered)
        assert stub.deleted == []

    async def test_two_that_drain_do_not_send_a_session_round_and_round(self, redis_url: str, stub: Upstream) -> None:
        """B41"""
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            client = await opened(one)
            await one.hand_off()
            await two.hand_off()
            assert (await client.send("POST", "tools/call", {"name": "count"}))[0] == 503
            async with worker(redis_url, servers(stub)):
                assert await client.count() == 2


class TestBalance:
    async def test_idle_sessions_go_to_who_has_fewest_and_no_more_than_the_share(
        self, redis_url: str, stub: Upstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(placement, "IDLE_S", -1.0)
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            clients = [await opened(one) for _ in range(10)]
            assert await two.placement.rebalance_once(100) == 0, "it has less than its share"
            assert await one.placement.rebalance_once(2) == 2
            assert await one.placement.rebalance_once(100) == 3
            assert await one.placement.rebalance_once(100) == 0
            assert (len(one.sessions.all()), len(two.sessions.all())) == (5, 5)
            assert [await client.count() for client in clients] == [2] * 10

    async def test_nothing_is_moved_that_is_in_use_or_to_a_worker_that_drains(
        self, redis_url: str, stub: Upstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with worker(redis_url, servers(stub)) as one, worker(redis_url, servers(stub)) as two:
            for _ in range(6):
                await opened(one)
            assert await one.placement.rebalance_once(100) == 0, "they were used a moment ago"
            monkeypatch.setattr(placement, "IDLE_S", -1.0)
            await two.hand_off()
            assert await one.placement.rebalance_once(100) == 0


class TestOperator:
    async def test_shows_moves_and_evicts_a_session(self, redis_url: str, stub: Upstream) -> None:
        async with (
            worker(redis_url, servers(stub)) as one,
            worker(redis_url, servers(stub)) as two,
            as_operator(redis_url) as acting,
        ):
            client = await opened(one)
            shown = await acting.show(client.key[:8])
            assert (shown["owner"], shown["server"], shown["state"]) == (one.member.incarnation, "counter", "ready")
            assert (shown["in_flight"], shown["pinned"]) == (0, False)
            record, owner = await acting.move(client.key, two.member.incarnation[:12])
            assert (record.registration.owner, owner) == (one.member.incarnation, two.member.incarnation)
            assert await client.count() == 2
            await acting.move(client.key, None)
            assert one.sessions.get(client.key) is not None
            await acting.evict(client.key[:10])
            await eventually(lambda: len(stub.deleted) == 1)
            assert (await client.send("POST", "tools/call", {"name": "count"}))[0] == 404
            assert await record_of(redis_url, client.key) is None

    async def test_drains_a_worker_and_waits(self, redis_url: str, stub: Upstream) -> None:
        async with (
            worker(redis_url, servers(stub) | PINNED) as one,
            worker(redis_url, servers(stub)) as two,
            as_operator(redis_url) as acting,
        ):
            client = await opened(one)
            key = await pinned(one)
            peer, status = await acting.drain(one.member.incarnation[:6], 0.3)
            assert peer.incarnation == one.member.incarnation
            assert status == {"draining": True, "sessions": 1, "pinned": 1, "in_flight": 0}
            assert not one.gateway.ready
            assert await client.count() == 2
            assert len(two.sessions.all()) == 1
            assert one.sessions.get(key) is not None, "what cannot move stays as long as the worker"

    async def test_a_session_without_an_owner_can_be_placed_or_ended(self, redis_url: str, stub: Upstream) -> None:
        async with worker(redis_url, servers(stub)) as two, as_operator(redis_url) as acting:
            async with worker(redis_url, servers(stub)) as one:
                clients = [await opened(one), await opened(one)]
            first, second = (client.key for client in clients)
            assert "without an owner" in (await acting.show(first))["state"]
            with pytest.raises(ControlError, match="--to"):
                await acting.move(first, None)
            assert (await acting.move(first, two.member.incarnation))[1] == two.member.incarnation
            await acting.evict(second)
            clients[1].worker = two
            assert (await clients[1].send("POST", "ping"))[0] == 404

    async def test_what_it_names_wrong_is_said(self, redis_url: str, stub: Upstream) -> None:
        async with worker(redis_url, servers(stub)) as one, as_operator(redis_url) as acting:
            assert isinstance(acting, Operator)
            await opened(one)
            await opened(one)
            for name, says in (("zz", "none begins so"), ("", "2 begin so")):
                with pytest.raises(ControlError, match=says):
                    await acting.show(name)
            with pytest.raises(ControlError, match="none begins so"):
                await acting.drain("zz", 0)
            with pytest.raises(ControlError, match="no operation"):
                await ask(one.forwarder, one.member.incarnation, "frobnicate")
            with pytest.raises(ControlError, match="did not answer: owner_down"):
                await ask(one.forwarder, "ab" * 16, "status")

    async def test_b39_without_the_secret_nothing_can_be_asked(
        self, redis_url: str, stub: Upstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_client, "ASK_S", 0.5)
        settings = load_settings({"LEASEHOLD_SECRET": "another secret that is long enough"}, serving=False)
        async with worker(redis_url, servers(stub)) as one:
            client = await opened(one)
            async with operator(settings, RedisClients(redis_url)) as acting:
                with pytest.raises(ControlError, match="did not answer within"):
                    await acting.evict(client.key)
            assert await client.count() == 2
            assert one.member.inbox.statistics.refused > 0
