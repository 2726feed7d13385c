"""A worker's membership: its lease, its mailbox, and what it knows of the lives of others.

The lease is one key per incarnation, `PX` a few seconds, renewed at a third of it. Whoever finds it missing may take this
worker's sessions over, so:

* the fence is computed from the monotonic clock *before* the renewal is sent: no write starts after it;
* a lease that lapsed is never revived: the worker takes a new, random incarnation and re-claims its sessions;
* the task that reads the mailbox also renews, so a worker whose reader is dead cannot look alive.

One connection serves all of this, and one command is in flight on it at a time. A blocking pop ends by the server's timeout; when
its answer is overdue, or the connection breaks, elements may be lost with it: the connection is dropped, the mailbox gets a
new generation, the old one is drained, and senders learn from receipts what did not arrive (`channel.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from . import scripts
from .channel import Receipt, read_envelope_head
from .client import REDIS_FAILURES, RedisClients
from .clock import RedisClock, monotonic
from .directory import Directory
from .errors import SealError
from .frames import FROM_OWNER, Frame, FrameType, encode
from .inbox import Inbox
from .keys import Keys
from .outbox import BACKOFF_S, Outbox
from .sealing import Keyring

logger = logging.getLogger("leasehold.coordinator.member")

RENEW_EVERY: Final = 1 / 3
"""Renew at this share of the lease: two renewals may fail before it ends."""
MARGIN: Final = 1 / 10
"""The fence falls this share of the lease before Redis ends it: room for what was checked but not yet written."""
POP_COUNT: Final = 128
POP_OVERDUE_S: Final = 1.0


class Listener(Protocol):
    """Who acts on what a member learns. All but `joined` are called from the reader and must not wait."""

    async def joined(self, incarnation: str, *, again: bool) -> None:
        """A new incarnation has its lease; `again` when an earlier one was lost: sessions have to be re-claimed.

        Called in a task of its own; frames may arrive before it returns.
        """
        ...

    def lost(self, incarnation: str) -> None:
        """The lease ended: exchanges of this incarnation cannot go on."""
        ...

    def redis_changed(self) -> None:
        """Another Redis node answers: records may have gone, owners publish theirs again."""
        ...

    def rotated(self) -> None:
        """Frames to us may have been lost, and whatever was not has been delivered: ask after what is still open."""
        ...

    def frame(self, sender: str, frame: Frame) -> None:
        """A frame from another worker."""
        ...

    def receipt(self, sender: str, receipt: Receipt) -> None:
        """What a receiver says did arrive."""
        ...

    def peer_down(self, peer: str, unread: frozenset[int] | None) -> None:
        """A watched peer's lease ended; `unread` are the counters of our envelopes that it had not read, None if unknown."""
        ...


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A worker as others see it; for listings."""

    incarnation: str
    generation: int
    lease_ms: int
    info: dict[str, Any]


class Member:
    """This worker in its fleet. `run()` is its life; everything else may be called at any time from the same loop."""

    def __init__(
        self,
        clients: RedisClients,
        keys: Keys,
        keyring: Keyring,
        listener: Listener,
        *,
        lease_ttl_ms: int,
        info: dict[str, Any],
        mailbox_limit: int = 10_000,
    ) -> None:
        self._clients = clients
        self._keys = keys
        self._keyring = keyring
        self._listener = listener
        self._lease_ttl_ms = lease_ttl_ms
        self._info = info
        self._mailbox_limit = mailbox_limit
        self._reader: Redis = clients.blocking()
        self._writer: Redis = clients.writer()
        self._lookups: Redis = clients.lookups()
        self.directory = Directory(self._lookups, keys)
        self.clock = RedisClock()
        self.incarnation = ""
        self.reachable = False
        """Whether the last renewal was answered."""
        self.renewals = 0
        self.incarnations = 0
        self._fence = float("-inf")
        self._renew_at = 0.0
        self._wake_at = float("inf")
        self._generation = 1
        self._watched: Counter[str] = Counter()
        self._stopping = False
        self._outbox: Outbox | None = None
        self._inbox: Inbox | None = None

    def __repr__(self) -> str:
        return f"<Member {self.incarnation[:8] or '-'} reachable={self.reachable} watched={len(self._watched)}>"

    @property
    def outbox(self) -> Outbox:
        """The outbox of the current incarnation; only after `joined`."""
        assert self._outbox is not None
        return self._outbox

    @property
    def inbox(self) -> Inbox:
        assert self._inbox is not None
        return self._inbox

    @property
    def lease_ttl_s(self) -> float:
        return self._lease_ttl_ms / 1000

    def may_write(self) -> bool:
        """Whether an upstream write may start in this very turn of the loop."""
        return monotonic() < self._fence

    def absence_counts(self) -> bool:
        """Whether a missing record or lease proves anything: the same Redis node has answered for a whole lease."""
        return self.reachable and self.clock.known_for() >= self.lease_ttl_s

    def watch(self, peer: str) -> None:
        """Have `peer_down` called when this peer's lease ends; one `unwatch` for each."""
        self._watched[peer] += 1

    def unwatch(self, peer: str) -> None:
        self._watched[peer] -= 1
        if self._watched[peer] <= 0:
            del self._watched[peer]

    async def run(self) -> None:
        """Live: acquire, read and renew, and when the lease is lost begin again. Ends after `stop()`."""
        low, high = BACKOFF_S
        delay = low
        async with asyncio.TaskGroup() as tasks:
            while not self._stopping:
                try:
                    if not await self._acquire():
                        continue
                except REDIS_FAILURES as error:
                    if self.reachable or delay == low:
                        logger.warning("redis_unreachable place=%s error=%s", self._clients.place, type(error).__name__)
                    self._broken()
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
                    delay = min(high, delay * 2)
                    continue
                delay = low
                writing = tasks.create_task(self.outbox.run(), name="leasehold-outbox")
                joined = tasks.create_task(
                    self._listener.joined(self.incarnation, again=self.incarnations > 1), name="leasehold-joined"
                )
                try:
                    await self._read()
                finally:
                    writing.cancel()
                    if self._stopping:
                        joined.cancel()
                if not self._stopping:
                    logger.warning("lease_lost incarnation=%s", self.incarnation[:8])
                    self._fence = float("-inf")
                    self._listener.lost(self.incarnation)

    async def stop(self) -> None:
        """End the lease at once, so that nobody waits for it to lapse; then `run()` returns."""
        self._stopping = True
        self._fence = float("-inf")
        try:
            if self.incarnation:
                await self._lookups.delete(  # pyright: ignore[reportUnknownMemberType]
                    self._keys.lease(self.incarnation), self._keys.mailbox(self.incarnation, self._generation)
                )
        except REDIS_FAILURES as error:
            logger.warning("lease_not_released error=%s", type(error).__name__)
        # Ends the blocking pop; nothing can be lost with it, for nobody can push to a mailbox without a lease.
        await self._reader.connection_pool.disconnect()

    async def aclose(self) -> None:
        """Close all connections, after `run()` has returned."""
        for client in (self._reader, self._writer, self._lookups):
            await client.aclose()

    async def peers(self) -> list[PeerInfo]:
        """All workers with a lease, in no order; for listings."""
        return await list_peers(self._lookups, self._keys)

    # -- the reader ------------------------------------------------------------------------------------------------

    async def _acquire(self) -> bool:
        incarnation = os.urandom(16).hex()
        before = monotonic()
        pipeline = self._reader.pipeline(transaction=False)
        await self._load_scripts()
        pipeline.execute_command(
            *scripts.LEASE_ACQUIRE.command(
                [self._keys.lease(incarnation)], [self._lease_ttl_ms, 1, orjson.dumps(self._info)]
            )
        )
        pipeline.info("server")  # pyright: ignore[reportUnknownMemberType, reportUnusedCoroutine]
        (acquired, time_ms), server = await pipeline.execute()
        if not acquired:
            return False
        self.incarnation, self._generation = incarnation, 1
        self.incarnations += 1
        self._outbox = Outbox(
            self._writer, self._keys, self._keyring, incarnation, mailbox_limit=self._mailbox_limit
        )
        self._outbox.on_owner_down = self._push_found_down
        self._inbox = Inbox(self._keyring, incarnation, self._deliver)
        self._renewed(before, time_ms, server["run_id"])
        logger.info("lease_acquired incarnation=%s ttl_ms=%d", incarnation[:8], self._lease_ttl_ms)
        return True

    async def _load_scripts(self) -> None:
        for script in (scripts.LEASE_ACQUIRE, scripts.LEASE_RENEW):
            await self._reader.script_load(script.source)  # pyright: ignore[reportUnknownMemberType]

    async def _read(self) -> None:
        """Read and renew until the lease is lost or `stop()` was called."""
        low, high = BACKOFF_S
        delay = low
        broken = False
        while not self._stopping:
            try:
                if broken:
                    if not await self._renew() or not await self._rotate():
                        return
                    broken = False
                    delay = low
                now = monotonic()
                if now >= min(self._renew_at, self._wake_at) and not await self._renew():
                    return
                await self._pop(min(self._renew_at, self._wake_at) - monotonic())
            except REDIS_FAILURES as error:
                if self._stopping:
                    return
                if isinstance(error, NoScriptError):  # Redis restarted empty or its scripts were flushed
                    await self._try_loading()
                    continue
                if not broken:
                    logger.warning("mailbox_broken place=%s error=%s", self._clients.place, type(error).__name__)
                broken = True
                self._broken()
                await self._reader.connection_pool.disconnect()
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
                delay = min(high, delay * 2)

    async def _try_loading(self) -> None:
        try:
            await self._load_scripts()
        except REDIS_FAILURES:
            await self._reader.connection_pool.disconnect()

    def _broken(self) -> None:
        self.reachable = False
        self.clock.forget()

    async def _pop(self, timeout_s: float) -> None:
        mailbox = self._keys.mailbox(self.incarnation, self._generation)
        # Redis 6.2 and newer: LPOP takes a count, BLPOP a fraction of a second. A timeout of 0 would block for ever.
        timeout_s = max(0.01, round(timeout_s, 3))
        async with asyncio.timeout(timeout_s + POP_OVERDUE_S):
            popped = await self._reader.blpop([mailbox], timeout=timeout_s)  # pyright: ignore
        if popped is None:
            return
        receive = self.inbox.receive
        receive(popped[1])
        while not self._stopping:
            async with asyncio.timeout(POP_OVERDUE_S):
                more = await self._reader.lpop(mailbox, POP_COUNT)  # pyright: ignore
            for envelope in more or ():
                receive(envelope)
            if not more or len(more) < POP_COUNT // 8 or monotonic() >= self._renew_at:
                # A short batch: block for the next one rather than ask again for nothing.
                return

    async def _renew(self) -> bool:
        """Renew, and look at the leases of the peers we have something open with, in one round trip."""
        before = monotonic()
        peers = list(self._watched)
        pipeline = self._reader.pipeline(transaction=False)
        pipeline.execute_command(
            *scripts.LEASE_RENEW.command([self._keys.lease(self.incarnation)], [self._lease_ttl_ms])
        )
        pipeline.info("server")  # pyright: ignore
        for peer in peers:
            pipeline.hget(self._keys.lease(peer), "gen")  # pyright: ignore
            pipeline.pttl(self._keys.lease(peer))  # pyright: ignore
        async with asyncio.timeout(POP_OVERDUE_S * 2):
            (alive, time_ms), server, *leases = await pipeline.execute()
        if not alive:
            return False
        self._renewed(before, time_ms, server["run_id"])
        for peer, generation, ttl_ms in zip(peers, leases[::2], leases[1::2], strict=True):
            await self._look_at(peer, generation, ttl_ms)
        return True

    def _renewed(self, before: float, time_ms: int, run_id: str) -> None:
        self.renewals += 1
        self.reachable = True
        self._fence = before + self.lease_ttl_s * (1 - MARGIN)
        self._renew_at = before + self.lease_ttl_s * RENEW_EVERY * random.uniform(0.9, 1.0)  # noqa: S311
        self._wake_at = float("inf")
        known = self.clock.run_id
        if self.clock.observe(run_id, time_ms, monotonic()) and self.renewals > 1 and known != run_id:
            self._listener.redis_changed()

    async def _look_at(self, peer: str, generation: bytes | None, ttl_ms: int) -> None:
        if generation is not None:
            self.outbox.note_generation(peer, int(generation))
            # Look again just after this lease would end, if that is before the next renewal.
            self._wake_at = min(self._wake_at, max(monotonic() + ttl_ms / 1000 + 0.005, monotonic() + 0.05))
        elif self.absence_counts():
            await self._peer_gone(peer)

    async def _peer_gone(self, peer: str) -> None:
        """Look into a dead worker's mailbox: what is still there was not run."""
        channel = self.outbox.channel(peer)
        unread: set[int] | None = set()
        if channel is not None and channel.generation:
            mailbox = self._keys.mailbox(peer, channel.generation)
            own = bytes.fromhex(self.incarnation)
            start = 0
            while True:
                page: list[bytes] = await self._reader.lrange(mailbox, start, start + POP_COUNT - 1)  # pyright: ignore
                for envelope in page:
                    try:
                        _, sender, counter = read_envelope_head(envelope)
                    except SealError:
                        continue
                    if sender == own:
                        unread.add(counter)
                if len(page) < POP_COUNT:
                    break
                start += POP_COUNT
        logger.info("peer_down peer=%s unread=%d", peer[:8], len(unread))
        self.outbox.forget(peer)
        self._listener.peer_down(peer, frozenset(unread))

    def _push_found_down(self, peer: str) -> None:
        if peer in self._watched:
            self._wake_at = 0.0  # the reader looks into the dead mailbox as soon as its pop ends
        else:
            self.outbox.forget(peer)

    async def _rotate(self) -> bool:
        """Open a new mailbox generation and drain the old one."""
        old = self._keys.mailbox(self.incarnation, self._generation)
        self._generation += 1
        alive = await scripts.MAILBOX_ROTATE.run(
            self._reader, [self._keys.lease(self.incarnation)], [self._generation]
        )
        if not alive:
            return False
        logger.info("mailbox_rotated generation=%d", self._generation)
        while envelopes := await self._reader.lpop(old, POP_COUNT):  # pyright: ignore
            for envelope in envelopes:
                self.inbox.receive(envelope)
        self._listener.rotated()
        return True

    def _deliver(self, sender: str, frame: Frame) -> None:
        if frame.type is FrameType.QUERY:
            receipt = self.inbox.window(sender).receipt(frame.exchange)
            self.outbox.post(sender, encode(FrameType.RECEIPT, 0, receipt.pack(), FROM_OWNER))
        elif frame.type is FrameType.RECEIPT:
            self._listener.receipt(sender, Receipt.unpack(frame.payload))
        else:
            self._listener.frame(sender, frame)


async def list_peers(client: Redis, keys: Keys) -> list[PeerInfo]:
    """All workers with a lease, by incarnation; raises what redis-py raises."""
    found: list[PeerInfo] = []
    async for name in client.scan_iter(match=keys.leases, count=500):  # pyright: ignore
        lease_key: str = name.decode()  # pyright: ignore
        fields: dict[bytes, bytes] = await client.hgetall(lease_key)  # pyright: ignore
        ttl_ms: int = await client.pttl(lease_key)  # pyright: ignore
        if b"gen" in fields and ttl_ms > 0:
            info = orjson.loads(fields.get(b"info", b"{}"))
            found.append(PeerInfo(keys.incarnation_of(lease_key), int(fields[b"gen"]), ttl_ms, info))
    return sorted(found, key=lambda peer: peer.incarnation)

