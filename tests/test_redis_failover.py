"""Redis fails over, is demoted, moves its slots, refuses writes: what was promised holds, and every loop goes on.

Real servers, and whole workers in this process. A replica that lags has heard nothing of what was written last.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import eventually
from leasehold.coordinator import (
    Cluster,
    Directory,
    Keys,
    RedisClients,
    Refusal,
    Registration,
    SessionRecord,
    Unavailable,
)
from leasehold.coordinator.frames import FrameType
from leasehold.workers.worker import Worker
from members import Peer, fleet
from redis.crc import key_slot
from redis.exceptions import BusyLoadingError
from redis_forms import RedisCluster, Server, Watched, cluster, one_server, sentinel_trio
from whole_workers import Client, Upstream, upstream, worker

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("redis-failover")]

KEYS = Keys("leasehold")
LEASE_MS = 1500
AGAIN_S = 0.02


@dataclass
class Journal:
    """What became of the calls of one client: none is left without an outcome."""

    client: Client
    outcomes: Counter[str] = field(default_factory=Counter)
    highest: int = 0

    async def call(self) -> str:
        status, answer = await self.client.send("POST", "tools/call", {"name": "count"})
        if status == 200 and "result" in answer:
            outcome = "ok"
            assert answer["result"]["count"] > self.highest, "an upstream session counts on, whoever owns it"
            self.highest = answer["result"]["count"]
        elif status == 200:
            outcome = answer["error"]["data"]["outcome"]
        else:
            assert status == 503, (status, answer)
            outcome = "not_run"
        self.outcomes[outcome] += 1
        return outcome

    async def until_ok(self) -> None:
        while await self.call() != "ok":
            await asyncio.sleep(AGAIN_S)

    def check(self, stub: Upstream) -> None:
        """B33: what ran, ran once: no more often than was answered, and may have been."""
        assert len(stub.counts) >= 1
        assert self.outcomes["ok"] <= self.highest <= self.outcomes["ok"] + self.outcomes["unknown"]


@dataclass
class Workers:
    """Some workers, their upstream, and clients of theirs each of which is at another worker with every call."""

    stub: Upstream
    workers: list[Worker]
    journals: list[Journal] = field(default_factory=list)

    async def open(self, count: int) -> list[Journal]:
        made = [Journal(Client(self.workers[n % len(self.workers)])) for n in range(count)]
        for journal in made:
            await journal.client.initialize()
            await journal.until_ok()
        self.journals += made
        return made

    async def storm(self, until: asyncio.Event) -> None:
        """Calls, one after the other for each client, until it is over and each has had a good answer again."""

        async def on_and_on(journal: Journal, turn: int) -> None:
            while not until.is_set():
                turn += 1
                journal.client.worker = self.workers[turn % len(self.workers)]
                await journal.call()
                await asyncio.sleep(AGAIN_S)
            for at in self.workers:
                journal.client.worker = at
                await journal.until_ok()

        async with asyncio.TaskGroup() as tasks:
            for turn, journal in enumerate(self.journals):
                tasks.create_task(on_and_on(journal, turn))

    def check(self) -> None:
        for journal in self.journals:
            journal.check(self.stub)
        assert not self.stub.deleted
        assert sum(self.stub.counts.values()) == sum(journal.highest for journal in self.journals)


@asynccontextmanager
async def workers(url: str, count: int, lease_ms: int = LEASE_MS) -> AsyncGenerator[Workers]:
    async with AsyncExitStack() as stack:
        stub = await stack.enter_async_context(upstream())
        servers = {"counter": {"url": stub.url}}
        made = [
            await stack.enter_async_context(worker(url, servers, LEASEHOLD_LEASE_TTL_MS=str(lease_ms)))
            for _ in range(count)
        ]
        yield Workers(stub, made)


async def epochs(url: str, journals: list[Journal]) -> list[int]:
    """Of their sessions, as Redis has them; 0 where it has none."""
    async with RedisClients(url).lookups() as client:
        records = [await Directory(client, KEYS).look_up(journal.client.key) for journal in journals]
    return [record.registration.epoch if record else 0 for record in records]


def in_thread(work: Any, *arguments: Any) -> Any:
    return asyncio.to_thread(work, *arguments)


class TestSentinel:
    @pytest.fixture
    def watched(self, tmp_path: Path) -> Iterator[Watched]:
        with sentinel_trio(tmp_path) as watched:
            yield watched

    async def test_b27_b32_after_a_failover_to_a_lagging_replica_owners_publish_again_under_larger_epochs(
        self, watched: Watched
    ) -> None:
        async with workers(watched.url, 2) as fleet:
            kept = await fleet.open(4)
            old = await epochs(watched.url, kept)
            over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                with watched.lagging():
                    lost = await fleet.open(4)
                tasks.create_task(fleet.storm(over))
                await in_thread(watched.fail_over)
                over.set()
            new = watched.replica.info("server")["run_id"]
            await eventually(lambda: all(one.member.clock.run_id == new for one in fleet.workers))
            # Every session is registered again.
            await _grown(watched.url, [*kept, *lost], [*old, *[0] * 4])
            fleet.check()

    @pytest.mark.acceptance
    async def test_b27_what_a_promoted_replica_says_was_handed_off_is_not_believed_for_a_lease(
        self, watched: Watched
    ) -> None:
        """It may lag: the session may have been adopted since. A master that was always one is believed at once."""
        peer = Peer(RedisClients(watched.url), lease_ttl_ms=1500)
        async with fleet(peer):
            first, believes = peer.member.clock.run_id, partial(peer.member.believes_absence, _record().key, _record())
            await eventually(peer.member.absence_counts)
            assert await believes(certain=True)
            await in_thread(watched.fail_over)
            await eventually(lambda: peer.member.reachable and peer.member.clock.run_id not in ("", first))
            assert not await believes(certain=True)
            await eventually(peer.member.absence_counts)
            assert await believes(certain=True)

    @pytest.mark.acceptance
    async def test_b32_absence_proves_nothing_for_a_lease_after_the_failover(self, watched: Watched) -> None:
        peer = Peer(RedisClients(watched.url), lease_ttl_ms=1500)
        async with fleet(peer):
            await eventually(peer.member.absence_counts)
            first, clock = peer.member.clock.run_id, peer.member.clock.node
            await in_thread(watched.fail_over)
            await eventually(lambda: peer.member.reachable and peer.member.clock.run_id not in ("", first))
            assert not peer.member.absence_counts()
            assert peer.member.clock.node != clock, "deadlines of the other node's clock count as over"
            assert peer.redis_changes >= 1
            await eventually(peer.member.absence_counts)
            assert peer.member.clock.known_for() >= 1.5

    @pytest.mark.acceptance
    async def test_b32_a_killed_master_is_replaced_and_all_goes_on(self, watched: Watched) -> None:
        async with workers(watched.url, 2) as fleet:
            await fleet.open(4)
            over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fleet.storm(over))
                watched.master.kill()
                await in_thread(watched.wait_promoted)
                over.set()
            fleet.check()


class TestRefusals:
    """B32, B35: Redis answers, and refuses."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[Server]:
        with one_server(tmp_path) as server:
            yield server

    @pytest.mark.parametrize(
        ("refuse", "allow"),
        [
            (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
            (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
            (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        ],
        ids=["READONLY", "NOREPLICAS", "OOM"],
    )
    async def test_what_is_refused_was_not_run_is_told_at_once_and_is_over_when_it_is_over(
        self, server: Server, refuse: tuple[str, ...], allow: tuple[str, ...]
    ) -> None:
        url = f"redis://{server.address}"
        one, other = (Peer(RedisClients(url), lease_ttl_ms=3000, echo=True) for _ in range(2))
        async with fleet(one, other):
            one.call(other.name, 1)
            await eventually(lambda: one.received(FrameType.END) == [1])
            server.ask(*refuse)
            call = one.call(other.name, 2)
            assert await eventually(lambda: bool(call.refusals)) < 1
            assert call.refusals == [Refusal.UNAVAILABLE]
            with pytest.raises(Unavailable):
                one.call(other.name, 3)
            with pytest.raises(Unavailable):
                await one.member.directory.claim(_record(), 1000)
            server.ask(*allow)
            await eventually(lambda: one.member.outbox.available and one.member.reachable and other.member.reachable)
            one.call(other.name, 4)
            await eventually(lambda: one.received(FrameType.END) == [1, 4])
            assert other.received() == [1, 4]

    async def test_a_redis_that_is_loading_has_run_nothing(self) -> None:
        """Known from its answer: what is lost with a connection would be in doubt."""
        async with loading_server() as url, RedisClients(url).lookups() as client:
            line = RedisClients(url).writer()
            for _ in range(2):
                (answer,) = await line.ask(("RPUSH", "x", "y"))
                assert isinstance(answer, BusyLoadingError)
                with pytest.raises(Unavailable):
                    await Directory(client, KEYS).look_up("ab" * 32)
            await line.aclose()


@asynccontextmanager
async def loading_server() -> AsyncGenerator[str]:
    """It lets everybody in, and then says that it is loading."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            is_name = b"SETNAME" in asked
            writer.write(b"+OK\r\n" if is_name else b"-LOADING Redis is loading the dataset in memory\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _record() -> SessionRecord:
    return SessionRecord("ab" * 32, Registration("a", 0), "github", "principal", 1, b"sealed")


class TestCluster:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[RedisCluster]:
        with cluster(tmp_path, replicas=1) as made:
            yield made

    async def test_b27_b32_a_killed_master_whose_replica_lags_is_replaced_and_all_goes_on(
        self, made: RedisCluster
    ) -> None:
        master, replica = made.masters[0], made.replicas[0]
        async with workers(made.url, 4) as fleet:
            kept = await fleet.open(12)
            old = await epochs(made.url, kept)
            replica.freeze()
            master.ask("CLIENT", "KILL", "TYPE", "replica")
            lost = await fleet.open(12)
            over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fleet.storm(over))
                master.kill()
                replica.thaw()
                await eventually(lambda: replica.info("replication")["role"] == "master", 30)
                over.set()
            moved = [n for n, journal in enumerate(kept) if _is_on(journal, 0)]
            assert moved
            await _grown(made.url, [kept[n] for n in moved], [old[n] for n in moved])
            await _grown(made.url, lost, [0] * 12)
            fleet.check()

    async def test_b33_slots_that_move_and_connections_that_break_under_load_cost_nobody_a_lease(
        self, made: RedisCluster
    ) -> None:
        async with workers(made.url, 2, lease_ms=6000) as fleet:
            await fleet.open(6)
            names = [one.member.incarnation for one in fleet.workers]
            keys = [KEYS.lease(name) for name in names] + [KEYS.session(j.client.key) for j in fleet.journals]
            over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fleet.storm(over))
                for key in keys:
                    slot = key_slot(key.encode())
                    (source,) = [server for server in made.masters if server.ask("CLUSTER", "COUNTKEYSINSLOT", slot)]
                    target = made.masters[(made.masters.index(source) + 1) % 3]
                    await in_thread(made.move_slot, slot, source, target)
                    await asyncio.sleep(0.05)
                for server in made.masters * 3:  # and every connection is broken, again and again
                    await in_thread(server.ask, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                    await asyncio.sleep(0.05)
                over.set()
            assert [one.member.incarnation for one in fleet.workers] == names
            fleet.check()
            for one in fleet.workers:
                assert one.statistics().sessions_lost == 0

    async def test_look_ups_and_claims_follow_a_slot_that_is_half_way(self, made: RedisCluster) -> None:
        """ASK: what is not at the old node any more is asked for, and made, at the new one."""
        slot = key_slot(KEYS.session(_record().key).encode())
        source = next(m for n, m in enumerate(made.masters) if slot < round((n + 1) * 16384 / 3))
        target = made.masters[(made.masters.index(source) + 1) % 3]
        loop = asyncio.get_running_loop()
        async with RedisClients(made.url).lookups() as client:
            directory = Directory(client, KEYS)
            first = (await directory.claim(_record(), 60_000)).registration
            assert first is not None

            async def half_way() -> None:
                found = await directory.look_up(_record().key)
                assert found is not None
                assert found.registration == first
                assert await directory.release(_record().key, first)
                assert await directory.look_up(_record().key) is None
                assert (await directory.claim(_record(), 60_000)).won
                assert await directory.look_up(_record().key) is not None

            def during() -> None:
                asyncio.run_coroutine_threadsafe(half_way(), loop).result(20)

            await in_thread(partial(made.move_slot, slot, source, target, during=during))
            found = await directory.look_up(_record().key)
            assert found is not None
            assert found.registration.epoch > first.epoch
            assert target.ask("CLUSTER", "COUNTKEYSINSLOT", slot) == 1

    async def test_b35_without_the_node_of_an_owner_its_callers_are_told_at_once_and_others_served(
        self, made: RedisCluster
    ) -> None:
        peers = [Peer(RedisClients(made.url), lease_ttl_ms=60_000, echo=True) for _ in range(9)]
        async with fleet(*peers):
            by_node: dict[int, list[Peer]] = {}
            for peer in peers:
                slot = key_slot(peer.lease.encode())
                by_node.setdefault(next(n for n in range(3) if slot < (n + 1) * 16384 / 3), []).append(peer)
            one, other = (by_node[n][0] for n in sorted(by_node)[:2])
            one.call(other.name, 1)
            await eventually(lambda: one.received(FrameType.END) == [1])
            dead = made.masters[sorted(by_node)[1]]
            dead.kill()
            call = one.call(other.name, 2)
            assert await eventually(lambda: bool(call.refusals)) < 1
            assert call.refusals[0] in (Refusal.UNAVAILABLE, Refusal.IN_DOUBT)
            with pytest.raises(Unavailable):
                one.call(other.name, 3)
            third = next((peer for peer in by_node[sorted(by_node)[0]][1:]), one)
            third.call(one.name, 5)
            await eventually(lambda: third.received(FrameType.END) == [5])


async def _grown(url: str, journals: list[Journal], old: list[int]) -> None:
    """Wait until the epochs of all these sessions are larger."""
    async with asyncio.timeout(10):
        while not all(new > before for before, new in zip(old, await epochs(url, journals), strict=True)):
            await asyncio.sleep(0.05)


def _is_on(journal: Journal, index: int) -> bool:
    return key_slot(KEYS.session(journal.client.key).encode()) < 16384 / 3 * (index + 1)


@pytest.mark.acceptance
async def test_b35_a_cluster_that_is_down_as_a_whole_says_so_at_once_and_comes_back(tmp_path: Path) -> None:
    """By default a cluster refuses everything while one master is gone (CLUSTERDOWN)."""
    with cluster(tmp_path, **{"cluster-require-full-coverage": "yes"}) as made:
        one, other = (Peer(RedisClients(made.url), lease_ttl_ms=60_000, echo=True) for _ in range(2))
        async with fleet(one, other):
            gone = next(m for m in made.masters if m.address not in {_place(made, one), _place(made, other)})
            gone.kill()
            await eventually(lambda: not one.member.reachable and not other.member.reachable, 20)
            calls = [one.call(other.name, 1)] if one.member.outbox.available else []
            await eventually(lambda: all(call.refusals for call in calls))
            with pytest.raises(Unavailable):
                await one.member.directory.look_up("ab" * 32)
            gone.start()
            await eventually(lambda: one.member.reachable and other.member.reachable, 20)
            await eventually(lambda: one.member.outbox.available)
            one.call(other.name, 2)
            await eventually(lambda: one.received(FrameType.END)[-1:] == [2])
            assert one.joins == [(one.name, False)], "the lease was long enough"


def _place(made: RedisCluster, peer: Peer) -> str:
    slot = key_slot(peer.lease.encode())
    return next(m for n, m in enumerate(made.masters) if slot < round((n + 1) * 16384 / 3)).address


async def test_a_cluster_whose_nodes_are_all_gone_is_a_typed_error(tmp_path: Path) -> None:
    with cluster(tmp_path, masters=3) as made:
        async with RedisClients(made.url).lookups() as client:
            assert isinstance(client, Cluster)
            directory = Directory(client, KEYS)
            assert await directory.look_up("ab" * 32) is None
            for server in made.masters:
                server.kill()
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await directory.look_up("ab" * 32)
            with pytest.raises(Unavailable):
                await anext(directory.scan())
