"""A worker's membership: its lease, its mailbox, and what it knows of the lives of others.

The lease is one key per incarnation, `PX` a few seconds, renewed at a third of it. Whoever finds it missing may take
this worker's sessions over, so:

* the fence is computed from the monotonic clock *before* the renewal is sent: no write starts after it;
* a lease that lapsed is never revived: the worker takes a new, random incarnation and re-claims its sessions;
* the task that reads the mailbox also renews, so a worker whose reader is dead cannot look alive.

One connection serves all of this, and one command is in flight on it at a time. In a cluster it leads to the master
that has the mailbox, and that differs from one incarnation to the next: one whose master is gone for longer than the
lease is given up for another. A blocking pop ends by the server's timeout; when its answer is overdue, or the
connection breaks, elements may be lost with it: the connection is dropped, the mailbox gets a new generation, the old
one is drained, and senders learn from receipts what did not arrive (`channel.py`).

A clean stop ends the lease first, so that nothing more comes in, then answers what is still in the mailbox (the fence
has fallen, so requests are not run) and sends what is still in the outbox.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Sequence
from typing import Any, Final

import orjson
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from . import scripts
from .channel import Receipt
from .client import (
    COMMAND_TIMEOUT_S,
    REDIS_FAILURES,
    Argument,
    Line,
    RedisClients,
    execute,
    execute_all,
    overdue,
    parse_info,
    settled_for,
)
from .clock import RedisClock, monotonic
from .connection import Sentinels, forget_places
from .directory import Directory, SessionRecord
from .errors import Unavailable
from .event_log import EventLog
from .frames import FROM_OWNER, Frame, FrameType, encode
from .health import UpstreamHealth
from .inbox import Inbox
from .keys import Keys
from .outbox import BACKOFF_S, MAILBOX_TTL_MS, Outbox
from .peers import Fate, Listener, PeerInfo, end_lease, list_peers
from .sealing import Keyring
from .watch import Watch

logger = logging.getLogger("leasehold.coordinator.member")

RENEW_EVERY: Final = 1 / 3
"""Renew at this share of the lease: two renewals may fail before it ends."""
MARGIN: Final = 1 / 10
"""The fence falls this share of the lease before Redis ends it: room for what was checked but not yet written."""
POP_COUNT: Final = 128
POP_OVERDUE_S: Final = 1.0
FLUSH_S: Final = 1.0
"""How long a clean stop waits for its last frames to be written."""
_WAKE: Final = b""
"""An element that is no envelope: it only ends the blocking pop."""


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
        self._reader = clients.blocking()
        self._lookups = clients.lookups()
        self._watch = Watch(self._lookups, keys, listener, lambda: self.outbox, lease_ttl_s=self.lease_ttl_s)
        self.directory = Directory(self._lookups, keys)
        self.health = UpstreamHealth(self._lookups, keys)
        self.events = EventLog(self._lookups, keys, keyring)
        self.incarnation = ""
        self.reachable = False
        """Whether the last renewal was answered."""
        self.renewals = 0
        self.incarnations = 0
        self._fence = float("-inf")
        self._renew_at = 0.0
        self._wake_at = float("inf")
        self._generation = 1
        self._undrained: list[int] = []
        self._stopping = False
        self._released = asyncio.Event()
        self._reading = False
        self._outbox: Outbox | None = None
        self._inbox: Inbox | None = None

    def __repr__(self) -> str:
        return f"<Member {self.incarnation[:8] or '-'} reachable={self.reachable} watched={len(self._watch)}>"

    @property
    def outbox(self) -> Outbox:
        """The outbox of the current incarnation; raises `Unavailable` before the first."""
        if self._outbox is None:
            raise Unavailable("outbox: not joined yet")
        return self._outbox

    @property
    def inbox(self) -> Inbox:
        """The inbox of the current incarnation; raises `Unavailable` before the first."""
        if self._inbox is None:
            raise Unavailable("inbox: not joined yet")
        return self._inbox

    @property
    def lease_ttl_s(self) -> float:
        return self._lease_ttl_ms / 1000

    @property
    def clock(self) -> RedisClock:
        """Of the Redis node that has our own mailbox."""
        return self._watch.clock

    def clock_of(self, peer: str) -> RedisClock:
        """Of the node that has a peer's: deadlines of what is sent there are in its time."""
        return self._watch.clock_of(peer)

    def may_write(self) -> bool:
        """Whether an upstream write may start in this very turn of the loop."""
        return not self._stopping and monotonic() < self._fence

    def absence_counts(self) -> bool:
        """Whether what is missing on the node that has our lease proves anything: it has been seen for a whole
        lease."""
        return self.reachable and self._watch.absence_counts(self._keys.lease(self.incarnation))

    async def sees_known_node(self) -> bool:
        """Whether look-ups reach that node."""
        return await self._watch.sees_known_node(self._keys.lease(self.incarnation))

    async def believes_absence(self, session: str, record: SessionRecord | None, *, certain: bool = False) -> bool:
        """Whether what a look-up has just not found is not there: the record of a session (None), or the lease of its
        owner. `certain`: the owner has said itself that it ended, or gave the session up, and it is enough that the
        record is the latest. Raises `Unavailable`."""
        found = self._keys.session(session)
        if certain:
            return await self._watch.is_current(found, 0 if record is None else record.registration.epoch)
        keys = [found] if record is None else [found, self._keys.lease(record.registration.owner)]
        if not self.reachable or not all(self._watch.absence_counts(key) for key in keys):
            return False
        nodes = {self._watch.node_of(key): key for key in keys}
        return all([await self._watch.sees_known_node(key) for key in nodes.values()])

    def record_node(self, session: str) -> int | None:
        """A short name of the node that has the record of a session, and of its run: another one may have forgotten it.
        None while it is out of reach."""
        return self._watch.state_of(self._keys.session(session)) if self.reachable else None

    def watch(self, peer: str) -> None:
        """Have `peer_down` called when this peer's lease ends; one `unwatch` for each."""
        self._watch.watch(peer)

    def unwatch(self, peer: str) -> None:
        self._watch.unwatch(peer)

    async def fate(self, peer: str) -> Fate:
        """Whether a worker has a lease now, or said (or its supervisor did) that it has ended; raises `Unavailable`."""
        return await self._watch.fate(peer)

    async def peers(self) -> list[PeerInfo]:
        """All workers with a lease, this one included; a scan of all keys. Raises `Unavailable`."""
        return await list_peers(self._lookups, self._keys)

    async def run(self) -> None:
        """Live: acquire, read and renew, and when the lease is lost begin again. Ends after `stop()`."""
        low, high = BACKOFF_S
        delay = low
        async with asyncio.TaskGroup() as tasks:
            looking = None
            if self._watch.cluster is not None:
                looking = tasks.create_task(self._watch.run(), name="leasehold-watch")
            elif self._clients.sentinels is not None:
                looking = tasks.create_task(self._follow(self._clients.sentinels), name="leasehold-follow")
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
                outbox = self.outbox
                tasks.create_task(outbox.run(), name="leasehold-outbox")
                joined = tasks.create_task(self._join(), name="leasehold-joined")
                self._reading = True
                try:
                    if self._stopping:  # while the lease was being acquired
                        await self._release()
                    await self._read()
                    if self._stopping:
                        await self._finish()
                finally:
                    self._reading = False
                    self._fence = float("-inf")
                    # A task of the last incarnation must claim nothing for it any more.
                    joined.cancel()
                    outbox.close()
                if not self._stopping:
                    logger.warning("lease_lost incarnation=%s", self.incarnation[:8])
                    self._listener.lost(self.incarnation)
            if looking is not None:
                looking.cancel()

    async def stop(self) -> None:
        """End the lease at once, so that nobody waits for it to lapse; then `run()` finishes its work and returns."""
        self._stopping = True
        self._fence = float("-inf")
        if self._reading:
            await self._release()

    async def _release(self) -> None:
        """End the lease, and the blocking pop."""
        mailbox = self._keys.mailbox(self.incarnation, self._generation)
        commands = [
            *end_lease(self._keys, self.incarnation),
            ("RPUSH", mailbox, _WAKE),
            ("PEXPIRE", mailbox, MAILBOX_TTL_MS),
        ]
        try:
            await execute_all(self._lookups, commands)
        except REDIS_FAILURES as error:
            logger.warning("lease_not_released error=%s", type(error).__name__)
            await self._reader.drop()
        finally:
            self._released.set()

    async def _finish(self) -> None:
        """Answer what is still in the mailbox, where nothing comes in any more, and send what is still to be sent."""
        await self._released.wait()
        try:
            for generation in [*self._undrained, self._generation]:
                await self._drain(generation)
        except REDIS_FAILURES as error:
            logger.warning("mailbox_not_drained error=%s", type(error).__name__)
        if not await self.outbox.flush(FLUSH_S):
            logger.warning("outbox_not_flushed")

    async def _join(self) -> None:
        if self._watch.cluster is not None:
            await self._watch.looked.wait()
        again = self.incarnations > 1
        low, high = BACKOFF_S
        delay = low
        while True:
            try:
                await self._listener.joined(self.incarnation, again=again)
                return
            except Unavailable as error:
                logger.warning("join_interrupted error=%s", error)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
            delay = min(high, delay * 2)

    async def _follow(self, sentinels: Sentinels) -> None:
        """Leave a master that is one no more for the Sentinels, as soon as a peer's lease would end.

        A master that was replaced goes on for some seconds (10 and more) before it is told. Who stays with it would
        renew his lease there, while others, on the new one, see it end.
        """
        async with sentinels.connected() as clients:
            while True:
                await asyncio.sleep(self.lease_ttl_s * RENEW_EVERY * random.uniform(0.9, 1.0))  # noqa: S311
                try:
                    master = await sentinels.master(clients)
                except REDIS_FAILURES:
                    continue  # it may be the Sentinels that are gone
                elsewhere = self._reader.address not in (None, master.address)
                if elsewhere and master.run_id and self.clock.run_id not in ("", master.run_id):
                    logger.warning("master_replaced")
                    await self._reader.drop()
                    if isinstance(self._lookups, Redis):
                        await forget_places(self._lookups)
                    if self._outbox is not None:
                        await self._outbox.reconnect()

    async def aclose(self) -> None:
        """Close all connections, after `run()` has returned."""
        await self._reader.aclose()
        await self._lookups.aclose()

    # -- the reader ------------------------------------------------------------------------------------------------

    async def _acquire(self) -> bool:
        incarnation = os.urandom(16).hex()
        lease = self._keys.lease(incarnation)
        await self._reader.aim(lease)
        before = monotonic()
        await self._load_scripts()
        acquire = scripts.LEASE_ACQUIRE.command([lease], [self._lease_ttl_ms, 1, orjson.dumps(self._info)])
        async with overdue(COMMAND_TIMEOUT_S):
            (acquired, time_ms), server, replication = await execute_all(
                self._reader, [acquire, ("INFO", "server"), ("INFO", "replication")]
            )
        if not acquired:
            return False
        self.incarnation, self._generation = incarnation, 1
        self._undrained.clear()
        self.incarnations += 1
        self._watch.home = self._reader.node
        self._outbox = Outbox(
            self._make_line,
            self._watch.cluster,
            self._keys,
            self._keyring,
            incarnation,
            mailbox_limit=self._mailbox_limit,
        )
        self._outbox.on_owner_down = self._push_found_down
        self._inbox = Inbox(self._keyring, incarnation, self._deliver)
        about = parse_info(server)
        self._renewed(before, time_ms, about["run_id"])
        if self.incarnations == 1:
            self.clock.known_since -= settled_for(about, parse_info(replication))
        logger.info("lease_acquired incarnation=%s ttl_ms=%d", incarnation[:8], self._lease_ttl_ms)
        return True

    def _make_line(self, node: str) -> Line:
        cluster = self._watch.cluster
        return self._clients.writer() if cluster is None else cluster.line(node)

    async def _load_scripts(self) -> None:
        for script in (scripts.LEASE_ACQUIRE, scripts.LEASE_RENEW):
            async with overdue(COMMAND_TIMEOUT_S):
                await script.load(self._reader)

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
                await self._reader.drop()
                if monotonic() > self._fence + self.lease_ttl_s * MARGIN:
                    return  # the lease is over, whoever answers next: nobody may wait for us any longer
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
                delay = min(high, delay * 2)

    async def _try_loading(self) -> None:
        try:
            await self._load_scripts()
        except REDIS_FAILURES:
            await self._reader.drop()

    def _broken(self) -> None:
        self.reachable = False
        self.clock.forget()

    async def _pop(self, timeout_s: float) -> None:
        mailbox = self._keys.mailbox(self.incarnation, self._generation)
        # Redis 6.2 and newer: LPOP takes a count, BLPOP a fraction of a second. A timeout of 0 would block for ever.
        timeout_s = max(0.01, round(timeout_s, 3))
        async with overdue(timeout_s + POP_OVERDUE_S):
            # What came while the first one woke us comes with it, in the same round trip.
            first, more = await execute_all(self._reader, [("BLPOP", mailbox, timeout_s), ("LPOP", mailbox, POP_COUNT)])
        self._receive(first[1:] if first else ())
        while more:
            self._receive(more)
            if len(more) < POP_COUNT or self._stopping or monotonic() >= self._renew_at:
                return
            more = await self._pop_more(mailbox)

    async def _pop_more(self, mailbox: str) -> Sequence[bytes]:
        async with overdue(POP_OVERDUE_S):
            popped: Sequence[bytes] | None = await execute(self._reader, "LPOP", mailbox, POP_COUNT)
        return popped or ()

    def _receive(self, envelopes: Sequence[bytes]) -> None:
        for envelope in envelopes:
            if envelope != _WAKE:
                self.inbox.receive(envelope)

    async def _renew(self) -> bool:
        """Renew, and look at the leases of the peers we have something open with, in one round trip."""
        before = monotonic()
        peers = self._watch.peers_on(self._watch.home)
        commands: list[Sequence[Argument]] = [
            scripts.LEASE_RENEW.command([self._keys.lease(self.incarnation)], [self._lease_ttl_ms]),
            ("INFO", "server"),
            *self._watch.questions(peers),
        ]
        async with overdue(COMMAND_TIMEOUT_S):
            renewed, server, *leases = await execute_all(self._reader, commands, raise_on_error=False)
        for answer in (renewed, server):
            if isinstance(answer, RedisError):
                raise answer
        alive, time_ms = renewed
        if not alive:
            return False
        self._watch.home = self._reader.node
        self._renewed(before, time_ms, parse_info(server)["run_id"])
        again = await self._watch.heard(peers, leases, self._reader)
        self._wake_at = min(self._wake_at, again)
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

    def _push_found_down(self, peer: str) -> None:
        if self._watch.found_down(peer):
            self._wake_at = 0.0  # as soon as the reader's pop ends

    async def _rotate(self) -> bool:
        """Open a new mailbox generation and drain the old ones: more than one, when this was interrupted before."""
        self._undrained.append(self._generation)
        self._generation += 1
        async with overdue(COMMAND_TIMEOUT_S):
            before = await scripts.MAILBOX_ROTATE.run(
                self._reader, [self._keys.lease(self.incarnation)], [self._generation]
            )
        if not before:
            return False
        if before not in self._undrained:  # a replica that lags was promoted, and named an earlier one since
            self._undrained = sorted({*self._undrained, before} - {self._generation})
        logger.info("mailbox_rotated generation=%d", self._generation)
        while self._undrained:
            await self._drain(self._undrained[0])
            del self._undrained[0]
        self._listener.rotated()
        return True

    async def _drain(self, generation: int) -> None:
        mailbox = self._keys.mailbox(self.incarnation, generation)
        while envelopes := await self._pop_more(mailbox):
            self._receive(envelopes)

    def _deliver(self, sender: str, frame: Frame) -> None:
        if frame.type is FrameType.QUERY:
            receipt = self.inbox.window(sender).receipt(frame.exchange)
            self.outbox.post(sender, encode(FrameType.RECEIPT, 0, receipt.pack(), FROM_OWNER))
        elif frame.type is FrameType.RECEIPT:
            self._listener.receipt(sender, Receipt.unpack(frame.payload))
        else:
            self._listener.frame(sender, frame)
