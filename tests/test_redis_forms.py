"""What workers rely on holds on every form of Redis: TLS, an ACL user, Sentinels, a cluster; and Valkey where it is
installed. Real servers; what befalls them is in `test_redis_failover.py`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from faults import eventually
from fleet import ROOT
from leasehold.coordinator import (
    Cluster,
    Directory,
    Keys,
    RedisClients,
    Registration,
    SessionRecord,
    Unavailable,
    list_peers,
    session_key,
)
from leasehold.coordinator.event_log import EVERYBODY, Cursor, Position
from leasehold.coordinator.frames import FrameType
from members import KEYS, Peer, fleet
from redis.exceptions import NoPermissionError
from redis_forms import (
    PASSWORD,
    Server,
    cluster,
    free_port,
    make_certificates,
    one_server,
    running,
    sentinel_trio,
    server_named,
    tls_options,
)
from whole_workers import Client, upstream, worker

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("redis-forms")]

VALKEY = server_named("valkey-server")
TTL_MS = 60_000
LOOKUPS = 4


@dataclass
class Deployment:
    """One form of Redis, empty."""

    url: str
    masters: list[Server]


def documented_acl(namespace: str) -> list[str]:
    """The rule in docs/configuration.md, for a namespace."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    (rule,) = re.findall(r"^ACL SETUSER leasehold on >PASSWORD (.+?)\n```", text, re.MULTILINE | re.DOTALL)
    return rule.replace("\\\n", " ").replace("leasehold:", f"{namespace}:").split()


@contextmanager
def plain(folder: Path, binary: Path | None = None) -> Iterator[Deployment]:
    with one_server(folder, binary=binary) as server:
        yield Deployment(f"redis://{server.address}", [server])


@contextmanager
def with_tls(folder: Path) -> Iterator[Deployment]:
    made = make_certificates(folder)
    port = free_port()
    options, connect = tls_options(made, port, clients=True)
    server = Server(folder, options, connect=connect, port=port)
    query = f"ssl_ca_certs={made.authority}&ssl_certfile={made.certificate}&ssl_keyfile={made.key}"
    with running(server):
        yield Deployment(f"rediss://{server.address}/2?{query}", [server])


@contextmanager
def with_acl(folder: Path) -> Iterator[Deployment]:
    with one_server(folder) as server:
        for namespace in ("test", "leasehold"):
            rule = [f">{PASSWORD}", *documented_acl(namespace)]
            server.ask("ACL", "SETUSER", f"user-of-{namespace}", "on", *rule)
        # Both namespaces are used here, each by the one user.
        server.ask("ACL", "SETUSER", "leasehold", "on", f">{PASSWORD}", *documented_acl("test"), "~leasehold:*")
        yield Deployment(f"redis://leasehold:{quote(PASSWORD, safe='')}@{server.address}", [server])


def add_user(servers: list[Server], more: str) -> str:
    """An ACL user with the documented rights, those for a form of Redis among them; what a URL says of him."""
    for server in servers:
        rule = [*documented_acl("test"), "~leasehold:*", *documented_addition(more)]
        server.ask("ACL", "SETUSER", "leasehold", "on", f">{PASSWORD}", *rule)
    return f"leasehold:{quote(PASSWORD, safe='')}@"


def documented_addition(more: str) -> list[str]:
    text = (ROOT / "docs" / "configuration.md").read_text()
    (rights,) = re.findall(rf"{more} (?:also )?`([^`]+)`", text)
    return rights.split()


@contextmanager
def with_sentinels(folder: Path) -> Iterator[Deployment]:
    with sentinel_trio(folder) as watched:
        user = add_user([watched.master, watched.replica], "With Sentinel")
        yield Deployment(watched.url.replace("//", f"//{user}"), [watched.master])


@contextmanager
def with_cluster(folder: Path, binary: Path | None = None) -> Iterator[Deployment]:
    with cluster(folder, binary=binary) as made:
        user = add_user(made.masters, "in a cluster")
        yield Deployment(made.url.replace("//", f"//{user}"), made.masters)


FORMS: dict[str, Callable[[Path], AbstractContextManager[Deployment]]] = {
    "tls": with_tls,
    "acl": with_acl,
    "sentinel": with_sentinels,
    "cluster": with_cluster,
}
if VALKEY is not None:
    FORMS |= {
        "valkey": lambda folder: plain(folder, VALKEY),
        "valkey-cluster": lambda folder: with_cluster(folder, VALKEY),
    }


@pytest.fixture(scope="module")
def deployments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Deployment]]:
    with ExitStack() as stack:
        started: dict[str, Deployment] = {}

        def deployment(name: str) -> Deployment:
            if name not in started:
                started[name] = stack.enter_context(FORMS[name](tmp_path_factory.mktemp(name)))
            for server in started[name].masters:
                server.ask("FLUSHALL")
            return started[name]

        yield deployment


@pytest.fixture(params=FORMS)
def redis_form(request: pytest.FixtureRequest, deployments: Callable[[str], Deployment]) -> Deployment:
    return deployments(request.param)


@asynccontextmanager
async def lookups(url: str) -> AsyncGenerator[Any]:
    async with RedisClients(url).lookups() as client:
        yield client


def record(session: str, owner: str = "a", resume: bytes | None = b"sealed") -> SessionRecord:
    return SessionRecord(session_key(session), Registration(owner, 0), "github", "principal", 1, resume)


def keys_left(deployment: Deployment) -> list[bytes]:
    return [key for server in deployment.masters for key in server.client(db=_db(deployment)).keys("*")]


def _db(deployment: Deployment) -> int:
    return 2 if deployment.url.startswith("rediss:") else 0


class TestContract:
    async def test_b24_b27_of_many_claims_and_takeovers_one_wins(self, redis_form: Deployment) -> None:
        async with lookups(redis_form.url) as client:
            directory = Directory(client, KEYS)
            for session in ("s", "t", "u", "v"):
                claims = await asyncio.gather(*[directory.claim(record(session, f"w{n}"), TTL_MS) for n in range(20)])
                assert sum(claim.won for claim in claims) == 1
                held = claims[0].registration
                assert held is not None
                taken = await asyncio.gather(
                    *[directory.take_over(session_key(session), held, f"x{n}", TTL_MS) for n in range(20)]
                )
                assert sum(claim.won for claim in taken) == 1
                assert taken[0].registration is not None
                assert taken[0].registration.epoch > held.epoch
                assert await directory.release(session_key(session), taken[0].registration)
        assert not keys_left(redis_form)

    async def test_b25_b29_many_records_are_written_refreshed_listed_and_handed_off_wherever_they_are(
        self, redis_form: Deployment
    ) -> None:
        async with lookups(redis_form.url) as client:
            directory = Directory(client, KEYS)
            names = [f"s{n}" for n in range(300)]
            claims = await directory.claim_all([(record(name), TTL_MS) for name in names])
            held = [(session_key(name), claim.registration) for name, claim in zip(names, claims, strict=True)]
            batch = [(key, registration) for key, registration in held if registration is not None]
            assert len(batch) == 300
            for server in redis_form.masters:
                server.ask("SCRIPT", "FLUSH")
            assert await directory.refresh([(key, registration, 10 * TTL_MS) for key, registration in batch]) == []
            found = {entry.key: entry async for entry in directory.scan()}
            assert set(found) == {session_key(name) for name in names}
            assert all(TTL_MS < entry.ttl_ms <= 10 * TTL_MS for entry in found.values())
            await directory.hand_off(batch)
            assert all([not entry.registration.owner async for entry in directory.scan()])

    async def test_b33_frames_arrive_once_and_in_order_between_all_workers(self, redis_form: Deployment) -> None:
        peers = [Peer(RedisClients(redis_form.url), lease_ttl_ms=3000, echo=True) for _ in range(5)]
        async with fleet(*peers):
            for exchange in range(100):
                for one in peers:
                    for other in peers:
                        if one is not other:
                            one.call(other.name, 1000 * peers.index(other) + exchange)
                await asyncio.sleep(0)
            for index, one in enumerate(peers):
                asked = [n for n in range(len(peers)) if n != index]
                await eventually(lambda one=one: len(one.received(FrameType.END)) == 400)
                assert sorted(one.received(FrameType.END)) == [1000 * n + m for n in asked for m in range(100)]
                for n in asked:
                    sent = [frame.exchange for sender, frame in one.frames if sender == peers[n].name]
                    assert [e for e in sent if e // 1000 == index] == [1000 * index + m for m in range(100)]
            async with lookups(redis_form.url) as client:
                listed = await list_peers(client, KEYS)
            assert [info.incarnation for info in listed] == sorted(peer.name for peer in peers)
        left = keys_left(redis_form)
        assert len(left) == 5
        assert all(key.endswith(b":ended") for key in left), "B29: nothing but the word that they ended"

    async def test_b34_a_dead_peer_is_told_of_with_what_it_had_not_read(self, redis_form: Deployment) -> None:
        peers = [Peer(RedisClients(redis_form.url), lease_ttl_ms=1500) for _ in range(4)]
        one, *others = peers
        async with fleet(*peers):
            unread: dict[str, int] = {}
            for other in others:
                one.member.watch(other.name)
                one.tell(other.name, 0)
            assert await one.member.outbox.flush(5)
            await asyncio.gather(*(other.die() for other in others))
            # Or what comes next would be popped for a connection that is not there any more.
            await eventually(
                lambda: sum(server.info("clients")["blocked_clients"] for server in redis_form.masters) <= 1
            )
            for other in others:
                call = one.call(other.name, 1)
                assert await one.member.outbox.flush(5)
                unread[other.name] = call.request_counter
            await eventually(lambda: len(one.downs) == 3)
            assert dict(one.downs) == {name: frozenset({counter}) for name, counter in unread.items()}
            for other in others:
                one.member.unwatch(other.name)

    async def test_b36_connections_to_each_node_are_few_whatever_is_under_way(self, redis_form: Deployment) -> None:
        one, other = (Peer(RedisClients(redis_form.url), lease_ttl_ms=3000, echo=True) for _ in range(2))
        async with fleet(one, other):
            for exchange in range(300):
                one.call(other.name, exchange)
            tasks = [asyncio.create_task(one.member.directory.look_up(session_key(str(n)))) for n in range(300)]
            peaks: dict[int, int] = {}
            while len(one.received(FrameType.END)) < 300 or not all(task.done() for task in tasks):
                for server in redis_form.masters:
                    clients = [c for c in await asyncio.to_thread(_connections, server) if c["name"] == "leasehold"]
                    peaks[server.port] = max(peaks.get(server.port, 0), len(clients))
            # Each worker: look-ups, its mailbox, its pushes.
            assert all(peak <= 2 * (LOOKUPS + 2) for peak in peaks.values()), peaks
            assert sum(peaks.values()) > 0

    async def test_a_session_is_served_by_any_worker_and_goes_on_when_its_owner_stops(
        self, redis_form: Deployment
    ) -> None:
        """An exchange of whole workers, adoption, and a 404 for what is gone: absence is evidence on every node."""
        async with upstream() as stub:
            servers = {"counter": {"url": stub.url}}
            async with worker(redis_form.url, servers) as two:
                async with worker(redis_form.url, servers) as one:
                    clients = [Client(one) for _ in range(6)]
                    for client in clients:
                        await client.initialize()
                        assert await client.count() == 1
                        client.worker = two
                        assert await client.count() == 2
                for client in clients:
                    assert await client.count() == 3
                    assert (await client.send("DELETE"))[0] == 200
                    status, _ = await client.send("POST", "ping")
                    assert status == 404
        left = keys_left(redis_form)
        assert all(key.endswith(b":ended") for key in left), left


def _connections(server: Server) -> list[dict[str, str]]:
    with server.client() as client:
        return client.client_list()


async def test_the_mailboxes_and_sessions_of_a_cluster_are_on_all_its_nodes(
    deployments: Callable[[str], Deployment],
) -> None:
    deployment = deployments("cluster")
    async with lookups(deployment.url) as client:
        assert isinstance(client, Cluster)
        await Directory(client, Keys("test")).claim_all([(record(f"s{n}"), TTL_MS) for n in range(60)])
        assert sorted(client.masters) == sorted(server.address for server in deployment.masters)
    for server in deployment.masters:
        assert server.ask("DBSIZE") > 5


@dataclass
class Report:
    """What a worker says of an upstream (`UpstreamHealth.exchange`)."""

    kind: str
    upstream: str = "github"
    open_s: float = 0.0
    age_s: float = 0.0
    openings: int = 0
    failures: int = 1


class TestLeastRights:
    """The ACL rule of docs/configuration.md."""

    async def test_it_suffices_and_grants_no_command_that_is_not_used(
        self, deployments: Callable[[str], Deployment]
    ) -> None:
        deployment = deployments("acl")
        (server,) = deployment.masters
        for command in (("SCRIPT", "FLUSH"), ("ACL", "LOG", "RESET"), ("CONFIG", "RESETSTAT")):
            server.ask(*command)
        one, other = (Peer(RedisClients(deployment.url), lease_ttl_ms=600, echo=True) for _ in range(2))
        async with fleet(one, other):
            one.call(other.name, 1)
            await eventually(lambda: one.received(FrameType.END) == [1])
            await self._use_directory(one)
            for kind in ("failed", "succeeded"):
                await one.member.health.exchange(one.name, [Report(kind)])
            key = session_key("s")
            assert await one.member.events.add(key, TTL_MS, Position(1, 1), b"sealed", (), anew=True)
            await one.member.events.read(key, Cursor(EVERYBODY, Position(0, 0)))
            assert len(await one.member.peers()) == 2
            await one.member.fate(other.name)
            # A push that is refused, so that it is asked whether Redis is there.
            server.ask("CONFIG", "SET", "maxmemory", 1)
            call = one.call(other.name, 2)
            await eventually(lambda: bool(call.refusals))
            server.ask("CONFIG", "SET", "maxmemory", 0)
            await eventually(lambda: one.member.outbox.available)
            # A worker that dies, whose mailbox is looked into.
            one.member.watch(other.name)
            await other.die()
            await eventually(lambda: bool(one.downs))
            one.member.unwatch(other.name)
        assert server.ask("ACL", "LOG") == []
        used = {name.removeprefix("cmdstat_") for name in server.info("commandstats")}
        granted = {right[1:] for right in documented_acl("test") if right.startswith("+")}
        assert granted - used == set()

    async def _use_directory(self, peer: Peer) -> None:
        directory = peer.member.directory
        claimed = await directory.claim(record("s"), TTL_MS)
        assert claimed.registration is not None
        assert await directory.refresh([(session_key("s"), claimed.registration, TTL_MS)]) == []
        taken = await directory.take_over(session_key("s"), claimed.registration, "b", TTL_MS)
        assert taken.registration is not None
        await directory.hand_off([(session_key("s"), taken.registration)])
        assert [entry.key async for entry in directory.scan()] == [session_key("s")]
        handed = await directory.look_up(session_key("s"))
        assert handed is not None
        assert await directory.release(session_key("s"), handed.registration)

    @pytest.mark.parametrize(
        "command",
        [
            "GET leasehold:x",
            "HGETALL other:{s:x}",
            "EVALSHA 0 1 other:{s:x}",
            "SET other:x 1",
            "KEYS *",
            "FLUSHALL",
            "CONFIG GET maxmemory-policy",
            "ACL LIST",
            "CLIENT LIST",
            "SCRIPT FLUSH",
            "MONITOR",
            "SUBSCRIBE x",
            "SHUTDOWN",
        ],
    )
    def test_it_grants_nothing_else(self, deployments: Callable[[str], Deployment], command: str) -> None:
        (server,) = deployments("acl").masters
        with server.client(username="user-of-leasehold", password=PASSWORD, protocol=2) as client:
            assert client.execute_command("EXISTS", "leasehold:x") == 0
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split())


class TestWrongCredentials:
    """B35: a Redis that does not let us in is a typed error at once, and no credential is told (B19)."""

    async def refused(self, url: str) -> str:
        async with lookups(url) as client:
            with pytest.raises(Unavailable) as told:
                await Directory(client, KEYS).look_up(session_key("s"))
        return str(told.value)

    async def test_a_server_whose_certificate_is_not_trusted_is_not_spoken_to(
        self, deployments: Callable[[str], Deployment], tmp_path: Path
    ) -> None:
        url = deployments("tls").url
        stranger = make_certificates(tmp_path)
        place, _, query = url.partition("?")
        own = "&".join(part for part in query.split("&") if not part.startswith("ssl_ca_certs"))
        assert await self.refused(f"{place}?ssl_ca_certs={stranger.authority}&{own}") == "look-up: NotConnected"
        assert await self.refused(f"{place}?ssl_cert_reqs=none") == "look-up: NotConnected", "it wants a certificate"
        async with lookups(f"{place}?ssl_cert_reqs=none&{own}") as client:
            assert await Directory(client, KEYS).look_up(session_key("s")) is None

    async def test_a_wrong_password_is_not_told(self, deployments: Callable[[str], Deployment]) -> None:
        (server,) = deployments("acl").masters
        told = await self.refused(f"redis://leasehold:s3cret@{server.address}")
        assert told == "look-up: NotConnected"
