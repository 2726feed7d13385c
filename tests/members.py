"""Workers of a fleet as the coordinator sees them, for tests: a member, and a listener that notes what it hears."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from faults import eventually
from leasehold.coordinator import Keyring, Keys, Member, RedisClients, Refusal, Unavailable
from leasehold.coordinator.channel import Receipt
from leasehold.coordinator.client import Line
from leasehold.coordinator.frames import FROM_OWNER, Frame, FrameType, encode

KEYS = Keys("test")
RING = Keyring([b"a secret of the tests" * 2])
LEASE_MS = 600
PER_MEMBER = 6
"""Connections to Redis: reader, writer and four for look-ups."""


class Call:
    """The sender's end of one exchange."""

    def __init__(self, exchange: int) -> None:
        self.exchange = exchange
        self.request_counter = self.first_counter = self.last_counter = 0
        self.refusals: list[Refusal] = []

    def refused(self, reason: Refusal) -> None:
        self.refusals.append(reason)


class Routed(RedisClients):
    """Clients of which some reach Redis by another way."""

    def __init__(self, url: str, *, reader: str | None = None, writer: str | None = None) -> None:
        super().__init__(url)
        self._reader = RedisClients(reader or url)
        self._writer = RedisClients(writer or url)

    def blocking(self) -> Line:
        return self._reader.blocking()

    def writer(self) -> Line:
        return self._writer.writer()


class Peer:
    """One worker. With `echo` it answers each REQUEST by an END."""

    def __init__(
        self, clients: RedisClients, *, lease_ttl_ms: int = LEASE_MS, mailbox_limit: int = 10_000, echo: bool = False
    ) -> None:
        info = {"host": "test", "pid": 1}
        self.member = Member(
            clients, KEYS, RING, self, lease_ttl_ms=lease_ttl_ms, info=info, mailbox_limit=mailbox_limit
        )
        self.frames: list[tuple[str, Frame]] = []
        self.receipts: list[Receipt] = []
        self.downs: list[tuple[str, frozenset[int]]] = []
        self.joins: list[tuple[str, bool]] = []
        self.losses: list[str] = []
        self.rotations = self.redis_changes = 0
        self.echo = echo
        self.interrupt_joins = 0
        self.on_rotated: Callable[[], None] | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.member.incarnation

    @property
    def lease(self) -> str:
        return KEYS.lease(self.name)

    @property
    def mailbox(self) -> str:
        return KEYS.mailbox(self.name, 1)

    def call(self, peer: str, exchange: int, payload: bytes = b"") -> Call:
        """Post a REQUEST."""
        call = Call(exchange)
        self.member.outbox.post(peer, encode(FrameType.REQUEST, exchange, payload), call, request=True)
        return call

    def tell(self, peer: str, exchange: int, kind: FrameType = FrameType.CANCEL) -> None:
        """Post another frame."""
        self.member.outbox.post(peer, encode(kind, exchange))

    def received(self, kind: FrameType = FrameType.REQUEST) -> list[int]:
        return [frame.exchange for _, frame in self.frames if frame.type is kind]

    async def start(self, *, wait: bool = True) -> None:
        self.task = asyncio.create_task(self.member.run())
        if wait:
            await eventually(lambda: bool(self.joins))

    async def stop(self) -> None:
        await self.member.stop()
        await self._end()

    async def die(self) -> None:
        """End without a word, as by SIGKILL: the lease stays until it lapses."""
        assert self.task is not None
        self.task.cancel()
        await self._end()

    async def _end(self) -> None:
        if self.task is not None:
            await asyncio.wait({self.task}, timeout=10)
            assert self.task.done()
            await self.member.aclose()
            self.task = None

    # The member's listener.

    async def joined(self, incarnation: str, *, again: bool) -> None:
        if self.interrupt_joins:
            self.interrupt_joins -= 1
            raise Unavailable("test")
        self.joins.append((incarnation, again))

    def lost(self, incarnation: str) -> None:
        self.losses.append(incarnation)

    def redis_changed(self) -> None:
        self.redis_changes += 1

    def rotated(self) -> None:
        self.rotations += 1
        if self.on_rotated is not None:
            self.on_rotated()

    def frame(self, sender: str, frame: Frame) -> None:
        self.frames.append((sender, frame))
        if self.echo and frame.type is FrameType.REQUEST:
            self.member.outbox.post(sender, encode(FrameType.END, frame.exchange, b"", FROM_OWNER))

    def receipt(self, sender: str, receipt: Receipt) -> None:
        self.receipts.append(receipt)

    def peer_down(self, peer: str, unread: frozenset[int]) -> None:
        self.downs.append((peer, unread))


@asynccontextmanager
async def fleet(*peers: Peer) -> AsyncGenerator[None]:
    """Start these workers, and stop those that still run at the end."""
    try:
        for peer in peers:
            await peer.start()
        yield
    finally:
        for peer in peers:
            await peer.stop()


@asynccontextmanager
async def one_of(url: str, **options: Any) -> AsyncGenerator[Peer]:
    peer = Peer(RedisClients(url), **options)
    async with fleet(peer):
        yield peer


@asynccontextmanager
async def two_of(url: str, **options: Any) -> AsyncGenerator[tuple[Peer, Peer]]:
    one, other = Peer(RedisClients(url), **options), Peer(RedisClients(url), **options)
    async with fleet(one, other):
        yield one, other
