"""Both ends of exchanges, over real mailboxes: two members in one process, a small application at the owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis.asyncio
from leasehold.coordinator import Keyring, Keys, Member, RedisClients, Registration, Unavailable
from leasehold.coordinator.channel import Receipt
from leasehold.coordinator.frames import Frame, RequestHead
from leasehold.workers.asgi import read_body
from leasehold.workers.errors import BrokenOff, Disconnected, NotRun, OutcomeUnknown
from leasehold.workers.exchange import HOP, WINDOW
from leasehold.workers.forwarder import Forwarder

pytestmark = [pytest.mark.anyio]

KEYS = Keys("test")
LEASE_MS = 600
SESSION = "5e55104" * 9 + "a"

App = Callable[[Any, Any, Any], Awaitable[None]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the request's body."""
    body = await read_body(scope["headers"], receive, 1 << 30)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Node:
    """A member with a forwarder; owns every session asked for, unless `refusal` says otherwise."""

    redis_url: str
    keyring: Keyring
    app: App = echo
    refusal: tuple[str, Registration | None] | None = None
    mailbox_limit: int = 1000
    """Of the mailboxes it pushes to."""
    executed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ready = asyncio.Event()
        self.member = Member(
            RedisClients(self.redis_url),
            KEYS,
            self.keyring,
            self,
            lease_ttl_ms=LEASE_MS,
            info={},
            mailbox_limit=self.mailbox_limit,
        )
        self.forwarder = Forwarder(self.member, self, self._run)

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        self.executed.append(scope["path"])
        await self.app(scope, receive, send)

    @property
    def registration(self) -> Registration:
        return Registration(self.member.incarnation, 7)

    def refuse(self, head: RequestHead) -> tuple[str, Registration | None] | None:
        assert head.session == SESSION
        return self.refusal

    async def joined(self, incarnation: str, *, again: bool) -> None:
        self.ready.set()

    def lost(self, incarnation: str) -> None:
        self.forwarder.lost()

    def redis_changed(self) -> None: ...

    def rotated(self) -> None:
        self.forwarder.rotated()

    def frame(self, sender: str, frame: Frame) -> None:
        self.forwarder.frame(sender, frame)

    def receipt(self, sender: str, receipt: Receipt) -> None:
        self.forwarder.receipt(sender, receipt)

    def peer_down(self, peer: str, unread: frozenset[int]) -> None:
        self.forwarder.peer_down(peer, unread)


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[Node]:
    life = asyncio.create_task(node.member.run())
    try:
        async with asyncio.timeout(10):
            await node.ready.wait()
        yield node
    finally:
        await node.forwarder.drain(1)
        await node.member.stop()
        await life
        await node.member.aclose()


@pytest.fixture
async def pair(redis_url: str) -> AsyncIterator[tuple[Node, Node]]:
    keyring = Keyring.random()
    async with running(Node(redis_url, keyring)) as caller, running(Node(redis_url, keyring)) as owner:
        yield caller, owner


@dataclass
class Client:
    """The client of one request: what it was sent, and when it leaves."""

    slow: asyncio.Event | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = asyncio.Event()
        self.got_something = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        self.got_something.set()
        if self.slow is not None and message["type"] == "http.response.body":
            await self.slow.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def complete(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", True)


def scope(path: str = "/", **extra: Any) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "query_string": b"a=%20b", "headers": [], **extra}


async def forward(
    caller: Node, owner: Node, body: bytes = b"", path: str = "/", client: Client | None = None
) -> Client:
    client = client or Client()
    async with asyncio.timeout(20):
        await caller.forwarder.forward(owner.registration, SESSION, scope(path), body, client.receive, client.send)
    return client


async def test_a_request_and_its_answer_cross_untouched(pair: tuple[Node, Node]) -> None:
    caller, owner = pair
    body = bytes(range(256)) * 8
    client = await forward(caller, owner, body, "/serv\u00e9rs")
    assert client.complete
    assert client.body == body
    assert client.messages[0]["status"] == 200
    assert dict(client.messages[0]["headers"])[b"x-path"] == "/serv\u00e9rs".encode()


async def test_bodies_larger_than_every_window_cross_both_ways(pair: tuple[Node, Node]) -> None:
    caller, owner = pair
    body = b"0123456789abcdef" * (WINDOW // 4)
    assert (await forward(caller, owner, body)).body == body


async def test_the_scope_says_that_a_request_came_by_a_hop_and_a_header_cannot(pair: tuple[Node, Node]) -> None:
    caller, owner = pair
    scopes: list[Any] = []

    async def look(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await echo(scope, receive, send)

    owner.app = look
    await forward(caller, owner)
    assert scopes[0][HOP].session == SESSION
    assert scopes[0]["query_string"] == b"a=%20b"


async def test_a_thousand_concurrent_requests_run_once_each(pair: tuple[Node, Node]) -> None:
    """B33"""
    caller, owner = pair
    paths = [f"/{number}" for number in range(1000)]
    clients = await asyncio.gather(*(forward(caller, owner, path.encode(), path) for path in paths))
    assert [client.body.decode() for client in clients] == paths
    assert sorted(owner.executed) == sorted(paths)


async def test_a_slow_request_delays_no_other_and_a_client_that_leaves_is_seen_at_the_owner(
    pair: tuple[Node, Node],
) -> None:
    """B37: cancellation overtakes what waits."""
    caller, owner = pair
    left = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_body([], receive, 1 << 20)
        if scope["path"] == "/slow":
            assert (await receive())["type"] == "http.disconnect"
            left.set()
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fast"})

    owner.app = app
    slow = Client()
    waiting = asyncio.create_task(forward(caller, owner, path="/slow", client=slow))
    for _ in range(20):
        assert (await forward(caller, owner, path="/fast")).body == b"fast"
    assert not waiting.done()
    slow.left.set()
    with pytest.raises(Disconnected):
        await waiting
    async with asyncio.timeout(5):
        await left.wait()


async def test_a_client_that_does_not_read_holds_the_owner_back(pair: tuple[Node, Node]) -> None:
    """B44: what is on the way to a slow client is bounded by the window, not by the size of the answer."""
    caller, owner = pair
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(256):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 65536
        await send({"type": "http.response.body", "body": b""})

    owner.app = app
    slow = Client(slow=asyncio.Event())
    waiting = asyncio.create_task(forward(caller, owner, client=slow))
    await slow.got_something.wait()
    before = -1
    while sent != before:  # until it stands still
        before = sent
        for _ in range(20):
            await forward_nothing(caller, owner)
    assert sent <= WINDOW + 65536
    assert slow.slow is not None
    slow.slow.set()
    await waiting
    assert len(slow.body) == 256 * 65536


async def forward_nothing(caller: Node, owner: Node) -> None:
    """One round trip through both mailboxes."""
    owner.refusal = ("not_owner", None)
    with pytest.raises(NotRun):
        await forward(caller, owner)
    owner.refusal = None


async def test_an_owner_that_is_not_owner_names_the_owner_and_runs_nothing(pair: tuple[Node, Node]) -> None:
    """B41: the caller decides whether to go there; nothing bounces on its own."""
    caller, owner = pair
    owner.refusal = ("stale", Registration("ab" * 16, 9))
    with pytest.raises(NotRun) as refused:
        await forward(caller, owner)
    assert refused.value.owner == Registration("ab" * 16, 9)
    assert owner.executed == []


async def test_a_dead_worker_is_refused_in_one_round_trip(pair: tuple[Node, Node]) -> None:
    """B34"""
    caller, _ = pair
    with pytest.raises(NotRun) as refused:
        await caller.forwarder.forward(
            Registration("ab" * 16, 1), SESSION, scope(), b"", Client().receive, Client().send
        )
    assert refused.value.reason == "owner_down"


async def test_a_full_mailbox_refuses_a_request_as_not_run(redis_url: str) -> None:
    """B44"""
    keyring = Keyring.random()
    async with running(Node(redis_url, keyring, mailbox_limit=0)) as caller, running(Node(redis_url, keyring)) as owner:
        with pytest.raises(NotRun) as refused:
            await forward(caller, owner)
        assert refused.value.reason == "busy"
        assert caller.member.outbox.statistics().refused["busy"] == 1
        assert owner.executed == []


async def test_a_request_that_a_dead_owner_had_not_read_did_not_run_and_one_it_had_read_is_unknown(
    redis_url: str,
) -> None:
    """B34: queued frames are told from popped ones by looking into the dead mailbox."""
    keyring = Keyring.random()
    never = asyncio.Event()

    async def hang(scope: Any, receive: Any, send: Any) -> None:
        await never.wait()

    async with running(Node(redis_url, keyring)) as caller:
        owner = Node(redis_url, keyring, hang)
        life = asyncio.create_task(owner.member.run())
        await owner.ready.wait()
        read = asyncio.create_task(forward(caller, owner, path="/read"))
        while owner.executed != ["/read"]:
            await asyncio.sleep(0.005)
        # The owner is killed: its reader stops, and nothing of its lease is ended.
        life.cancel()
        await asyncio.wait({life})
        unread = asyncio.create_task(forward(caller, owner, path="/unread"))
        with pytest.raises(NotRun):
            await unread
        with pytest.raises(OutcomeUnknown):
            await read
        assert owner.executed == ["/read"]
        never.set()
        await owner.forwarder.drain(1)
        await owner.member.aclose()


async def test_an_answer_that_breaks_off_at_the_owner_breaks_off_for_the_caller(pair: tuple[Node, Node]) -> None:
    caller, owner = pair

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise BrokenOff("the upstream is gone")

    owner.app = app
    client = Client()
    with pytest.raises(BrokenOff):
        await forward(caller, owner, client=client)
    assert client.body == b"half"
    assert not client.complete


async def test_a_request_that_expired_in_the_mailbox_is_not_started(
    pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B38: its deadline is in the time of the Redis node, whatever the workers' own clocks say."""
    caller, owner = pair
    monkeypatch.setattr("leasehold.workers.forwarder.REQUEST_EXPIRY_MS", -1000)
    with pytest.raises(NotRun) as refused:
        await forward(caller, owner)
    assert refused.value.reason == "expired"
    assert owner.executed == []


async def test_a_fenced_owner_runs_nothing(pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """B28"""
    caller, owner = pair
    monkeypatch.setattr(owner.member, "may_write", lambda: False)
    with pytest.raises(NotRun) as refused:
        await forward(caller, owner)
    assert refused.value.reason == "fenced"
    assert owner.executed == []


async def test_a_cut_reader_loses_no_call(pair: tuple[Node, Node]) -> None:
    """A connection that dies in mid-pop may take frames with it: every call still ends, and none runs twice."""
    caller, owner = pair
    admin = redis.asyncio.Redis.from_url(caller.redis_url)
    outcomes: list[str] = []

    async def call(path: str) -> None:
        try:
            await forward(caller, owner, path.encode(), path)
            outcomes.append("ok")
        except NotRun:
            outcomes.append("not_run")
        except (OutcomeUnknown, BrokenOff):
            outcomes.append("unknown")

    async with admin, asyncio.TaskGroup() as tasks:
        for turn in range(10):
            for number in range(30):
                tasks.create_task(call(f"/{turn}/{number}"))
            await asyncio.sleep(0)
            for info in await admin.client_list():
                if info["cmd"] in ("blpop", "lpop"):
                    await admin.client_kill_filter(_id=info["id"])
            await asyncio.sleep(0.02)
    assert len(outcomes) == 300
    assert len(owner.executed) == len(set(owner.executed))
    assert len(owner.executed) >= outcomes.count("ok")
    assert 300 - outcomes.count("not_run") >= len(owner.executed)


async def test_without_redis_a_call_is_refused_at_once_and_nothing_waits(redis_url: str) -> None:
    """B35"""
    keyring = Keyring.random()
    async with running(Node(redis_url, keyring)) as caller:
        caller.member.outbox.close()  # it takes nothing more
        with pytest.raises(Unavailable):
            await caller.forwarder.forward(
                Registration("ab" * 16, 1), SESSION, scope(), b"", Client().receive, Client().send
            )
        assert caller.forwarder.calling == 0
