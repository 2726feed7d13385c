"""What a member knows of the Redis nodes and of other workers' leases.

A node's time and run come with each renewal of our own lease for the node that has it, our *home*. So do the leases
of peers that are there: with a single server, of all. In a cluster the other masters are looked at as often, each
with one round trip, by a task of its own: a node that does not answer holds up nobody's mailbox.

Absence of a key proves something once the node that has it has been seen in the same run, and with the same slots,
for a whole lease; and again right after the look-up that found nothing (`believes_absence`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final
from zlib import crc32

from redis.asyncio import Redis
from redis.exceptions import RedisError

from .channel import read_envelope_head
from .client import (
    COMMAND_TIMEOUT_S,
    REDIS_FAILURES,
    Argument,
    Line,
    alone_since,
    execute,
    execute_all,
    overdue,
    settled_for,
    translated,
)
from .clock import RedisClock, monotonic
from .cluster import Cluster
from .errors import SealError
from .keys import Keys
from .outbox import Outbox
from .peers import Fate, Listener
from .single_flight import SingleFlight

logger = logging.getLogger("leasehold.coordinator.watch")

LOOK_EVERY: Final = 1 / 3
"""At this share of the lease, as it is renewed."""
RETRY_S: Final = 0.1
PAGE: Final = 128


class Watch:
    """What `Member` sees of the rest: nodes, and peers with which something is open."""

    def __init__(
        self,
        lookups: Redis | Cluster,
        keys: Keys,
        listener: Listener,
        outbox: Callable[[], Outbox],
        *,
        lease_ttl_s: float,
    ) -> None:
        self._lookups = lookups
        self.cluster = lookups if isinstance(lookups, Cluster) else None
        self._keys = keys
        self._listener = listener
        self._outbox = outbox
        self._lease_ttl_s = lease_ttl_s
        self.home = ""
        self._clocks: defaultdict[str, RedisClock] = defaultdict(RedisClock)
        self._watched: Counter[str] = Counter()
        self._told: set[str] = set()
        """Watched peers of which `peer_down` was told."""
        self._look = asyncio.Event()
        self._seen_version = 0
        # Thousands of sessions may be taken over at once, and what is asked for each is the same.
        self.fate = SingleFlight(self._ask_fate)
        """Whether a worker has a lease now, or said (or its supervisor did) that it has ended; raises
        `Unavailable`."""
        self._node_says = SingleFlight(self._ask_node)
        self.looked = asyncio.Event()
        """Every node that can be was looked at once."""

    def __len__(self) -> int:
        return len(self._watched)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def node_of(self, key: str) -> str:
        return "" if self.cluster is None else self.cluster.node_of(key)

    @property
    def clock(self) -> RedisClock:
        """The home node's."""
        return self._clocks[self.home]

    def clock_of(self, peer: str) -> RedisClock:
        """That of the node which has a peer's mailbox."""
        return self._clocks[self.node_of(self._keys.lease(peer))]

    def absence_counts(self, key: str) -> bool:
        """Whether a missing key proves anything."""
        node = self.node_of(key)
        known_s = self._clocks[node].known_for()
        if self.cluster is not None:
            known_s = min(known_s, monotonic() - self.cluster.gained.get(node, float("-inf")))
        return known_s >= self._lease_ttl_s

    def state_of(self, key: str) -> int | None:
        """A short name of the node that has a key, of its run and of the slots it was given: another one may lack what
        was written. None while it is out of reach."""
        node = self.node_of(key)
        clock = self._clocks[node]
        if not clock.run_id:
            return None
        if self.cluster is None:
            return clock.node
        return crc32(f"{clock.run_id} {self.cluster.gained.get(node)}".encode())

    async def sees_known_node(self, key: str) -> bool:
        """Whether look-ups of a key reach the node that was watched: after a failover they may see another one first.
        Raises `Unavailable`."""
        node = self.node_of(key)
        server, _ = await self._node_says(node)
        return server["run_id"] == self._clocks[node].run_id

    async def is_current(self, key: str, epoch: int) -> bool:
        """Whether the record that a look-up has just found is the latest that was written: the node that has it has
        been master for a lease at least, on its own word or because it was watched; or the record's epoch, a time of
        the node, is later than its start. A replica that lags, and was promoted a moment ago, shows what has been
        overwritten. Raises `Unavailable`."""
        node = self.node_of(key)
        server, replication = await self._node_says(node)
        if self.cluster is not None and monotonic() - self.cluster.gained.get(node, float("-inf")) < self._lease_ttl_s:
            return False
        if settled_for(server, replication) >= self._lease_ttl_s or alone_since(server, replication) < epoch:
            return True
        return self.absence_counts(key) and server["run_id"] == self._clocks[node].run_id

    # -- peers -----------------------------------------------------------------------------------------------------

    def watch(self, peer: str) -> None:
        """Have `peer_down` called when this peer's lease ends; one `unwatch` for each."""
        self._watched[peer] += 1
        self._told.discard(peer)

    def unwatch(self, peer: str) -> None:
        self._watched[peer] -= 1
        if self._watched[peer] <= 0:
            del self._watched[peer]
            self._told.discard(peer)

    async def _ask_node(self, node: str) -> list[dict[str, Any]]:
        async with translated("node"):
            client = self._lookups if isinstance(self._lookups, Redis) else self._lookups.client(node)
            return await execute_all(client, [("INFO", "server"), ("INFO", "replication")])

    async def _ask_fate(self, peer: str) -> Fate:
        async with translated("lease"):
            alive, ended = await execute_all(
                self._lookups, [("EXISTS", self._keys.lease(peer)), ("EXISTS", self._keys.ended(peer))]
            )
        return Fate.ENDED if ended else Fate.ALIVE if alive else Fate.ABSENT

    def peers_on(self, node: str) -> list[str]:
        """Watched peers whose lease is there."""
        if self.cluster is None:
            return list(self._watched)
        return [peer for peer in self._watched if self.node_of(self._keys.lease(peer)) == node]

    def questions(self, peers: Sequence[str]) -> list[Sequence[Argument]]:
        """Commands whose answers `heard` understands."""
        leases = [self._keys.lease(peer) for peer in peers]
        return [command for lease in leases for command in (("HGET", lease, "gen"), ("PTTL", lease))]

    async def heard(self, peers: Sequence[str], answers: Sequence[Any], asked: Line | Redis) -> float:
        """Act on what leases are there; returns when to look again. Raises `REDIS_FAILURES`."""
        again = float("inf")
        for peer, generation, ttl_ms in zip(peers, answers[::2], answers[1::2], strict=True):
            if isinstance(generation, RedisError) or isinstance(ttl_ms, RedisError):
                continue  # the lease is on another node by now
            if generation is not None:
                self._outbox().note_generation(peer, int(generation))
                # Just after this lease would end, if that is before the next renewal.
                again = min(again, monotonic() + max(ttl_ms / 1000 + 0.005, 0.05))
            elif peer not in self._told and self.absence_counts(self._keys.lease(peer)):
                await self._gone(peer, asked)
        return again

    def is_home(self, peer: str) -> bool:
        return self.node_of(self._keys.lease(peer)) == self.home

    def found_down(self, peer: str) -> bool:
        """A push found that a peer's lease has ended. Whether its dead mailbox is to be looked into with our own."""
        if peer not in self._watched:
            self._outbox().forget(peer)
            return False
        self._look.set()
        return self.is_home(peer)

    async def _gone(self, peer: str, asked: Line | Redis) -> None:
        """Look into a dead worker's mailbox: what is still there was not run."""
        outbox = self._outbox()
        channel = outbox.channel(peer)
        unread: set[int] = set()
        if channel is not None and channel.generation:
            mailbox = self._keys.mailbox(peer, channel.generation)
            start = 0
            while True:
                async with overdue(COMMAND_TIMEOUT_S):
                    page: list[bytes] = await execute(asked, "LRANGE", mailbox, start, start + PAGE - 1)
                for envelope in page:
                    try:
                        _, sender, counter = read_envelope_head(envelope)
                    except SealError:
                        continue
                    if sender == outbox.sender:
                        unread.add(counter)
                if len(page) < PAGE:
                    break
                start += PAGE
        if outbox is not self._outbox():  # our own lease ended meanwhile
            return
        logger.info("peer_down peer=%s unread=%d", peer[:8], len(unread))
        outbox.forget(peer)
        self._told.add(peer)
        self._listener.peer_down(peer, frozenset(unread))

    # -- a cluster's other nodes -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at the other masters of a cluster, on and on; never returns."""
        while True:
            self._look.clear()
            again = await self.look_around()
            pause_s = self._lease_ttl_s * LOOK_EVERY * random.uniform(0.9, 1.0)  # noqa: S311
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(pause_s, again - monotonic()))):
                    await self._look.wait()

    async def look_around(self) -> float:
        """Look at each of them once; returns when to look again."""
        assert self.cluster is not None
        self.cluster.doubt()
        try:
            await self.cluster.learn()
        except REDIS_FAILURES as error:
            logger.debug("cluster_unknown error=%s", type(error).__name__)
            for node, clock in self._clocks.items():
                if node != self.home:
                    clock.forget()
            return monotonic() + RETRY_S
        others = [node for node in self.cluster.masters if node != self.home]
        for node in self._clocks.keys() - set(others) - {self.home}:
            del self._clocks[node]
        is_first = not self.looked.is_set()
        again = await asyncio.gather(*(self._look_at(node, is_first) for node in others))
        if self._seen_version not in (0, self.cluster.version):
            self._listener.redis_changed()
        self._seen_version = self.cluster.version
        self.looked.set()
        return min(again, default=float("inf"))

    async def _look_at(self, node: str, is_first: bool) -> float:
        assert self.cluster is not None
        clock, peers = self._clocks[node], self.peers_on(node)
        try:
            client = self.cluster.client(node)
            commands = [("TIME",), ("INFO", "server"), ("INFO", "replication"), *self.questions(peers)]
            async with overdue(COMMAND_TIMEOUT_S):
                answers = await execute_all(client, commands, raise_on_error=False)
            for answer in answers[:3]:
                if isinstance(answer, RedisError):
                    raise answer
            (seconds, microseconds), server, replication, *leases = answers
            changed = clock.observe(server["run_id"], seconds * 1000 + microseconds // 1000, monotonic())
            if is_first:
                clock.known_since -= settled_for(server, replication)
            elif changed:
                self._listener.redis_changed()
            return await self.heard(peers, leases, client)
        except REDIS_FAILURES as error:
            logger.debug("node_unreachable node=%s error=%s", node, type(error).__name__)
            self.cluster.doubt()
            clock.forget()
            return monotonic() + RETRY_S
