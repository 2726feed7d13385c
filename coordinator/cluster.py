"""A Redis Cluster: which master has which slot, and how to reach the one that has a key.

All that is used together lies on one node (`keys.py`), so each command has one place, and different workers, and
different sessions, have different ones. What follows:

* A worker's reader goes to the node of its own mailbox (`SlotLine`), its outbox to the nodes of its peers' (`line`),
  its look-ups to that of whatever they look up (`ask`): one connection each for the first two, a few for the third.
* What is known of a node (its time, its run, since when it is seen) is known of that node alone: see `watch.py`.

The map comes from any node. One that was cut off has an old one; as among the nodes themselves, the larger
configuration epoch wins. It is in doubt when a node cannot be reached or says that a key is elsewhere (MOVED), and
asked for again before the next command. MOVED, ASK and TRYAGAIN are answers of a node that did nothing, so look-ups
follow them. No command is repeated whose answer was lost.

A node that gained slots may lack what was in them: a lagging replica that was promoted, slots that were assigned
without their keys. `gained` says when; until a lease later, absence there is no evidence.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from .client import COMMAND_TIMEOUT_S, LOOKUP_CONNECTIONS, Argument, Line, ask, execute_all, make_client, overdue
from .clock import monotonic
from .connection import REDIS_FAILURES, NotConnected
from .urls import Address, RedisUrl, name_of

logger = logging.getLogger("leasehold.coordinator.cluster")

LEARN_TIMEOUT_S: Final = 0.5
"""For each node that is asked for the map: where one is silent, the next is asked."""
LEARN_EVERY_S: Final = 0.05
"""Where a node is down for long and each command to it fails, the map is not asked for with each of them."""
RETIRE_S: Final = 2 * COMMAND_TIMEOUT_S
MAX_TURNS: Final = 5
"""How often a look-up follows MOVED and ASK, or waits for a slot that is being moved."""
TURN_S: Final = 0.02
_KEY_THIRD: Final = frozenset({"EVAL", "EVALSHA"})


class Cluster:
    """The masters of a cluster, as one worker knows them. Nodes are named `host:port`."""

    def __init__(self, url: RedisUrl, options: Mapping[str, Any]) -> None:
        self._seeds = {name_of(address): address for address in url.addresses}
        self._options = dict(options)
        self._addresses: dict[str, Address] = {}
        self._slots: list[str] = []
        self._owners = [""] * REDIS_CLUSTER_HASH_SLOTS
        """Node ids, by slot."""
        self._epochs: dict[str, int] = {}
        """The largest of each node id."""
        self._ranges: list[tuple[int, int, str, Address]] = []
        self._clients: dict[str, Redis] = {}
        self._retired: list[tuple[float, Redis]] = []
        self._in_doubt = True
        self._learned_at = float("-inf")
        self._learning = asyncio.Lock()
        self.version = 0
        """Grows with each change of the map."""
        self.gained: dict[str, float] = {}
        """When (`monotonic()`) a node was last seen to have slots that another one had."""

    def __repr__(self) -> str:
        return f"<Cluster masters={len(self._addresses)} version={self.version}>"

    @property
    def masters(self) -> list[str]:
        """Masters that have slots; none before the first command."""
        return list(self._addresses)

    def node_of(self, key: str) -> str:
        """The master that has a key; "" when none is known."""
        return self._slots[key_slot(key.encode())] if self._slots else ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the look-ups' connections."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()
        await self._close_retired(0.0)

    # -- the map ---------------------------------------------------------------------------------------------------

    def doubt(self) -> None:
        """Something was not where the map has it: ask for it again before the next command."""
        self._in_doubt = True

    def heard(self, answer: Any) -> None:
        """Take in what an answer says of the map."""
        if isinstance(answer, MovedError):
            self.doubt()
            address = _target(answer)
            # Where the node does not know the name of the other one, it says nothing.
            if address[0] and self._slots and self._slots[answer.slot_id] != name_of(address):
                slots = self._slots.copy()
                slots[answer.slot_id] = name_of(address)
                self._owners[answer.slot_id] = ""
                self._ranges = []
                self._take(slots, {**self._addresses, name_of(address): address})
        elif isinstance(answer, ClusterDownError):
            self.doubt()

    async def learn(self) -> None:
        """Ask for the map, if it is in doubt. Raises `NotConnected` when no node answers."""
        if not self._in_doubt:
            return
        async with self._learning:
            if not self._in_doubt or monotonic() - self._learned_at < LEARN_EVERY_S:
                return
            await self._close_retired()
            known = list(self._addresses.items())
            random.shuffle(known)
            for name, address in [*known, *self._seeds.items()]:
                try:
                    async with overdue(LEARN_TIMEOUT_S):
                        client = self._client(name, address)
                        slots, nodes = await execute_all(client, [("CLUSTER", "SLOTS"), ("CLUSTER", "NODES")])
                except REDIS_FAILURES:
                    continue
                if slots:
                    break
            else:
                raise NotConnected("no node of the cluster says which slots it has")
            self._in_doubt = False
            self._learned_at = monotonic()
            self._read(slots, nodes, address[0])

    def _read(self, answer: Sequence[Any], nodes: bytes, asked: str) -> None:
        """Take in the map of one node, but for what others knew better: the larger epoch wins, as among the nodes."""
        epochs = _epochs(nodes)
        ranges: list[tuple[int, int, str, Address]] = []
        for first, last, (host, port, node_id, *_), *_replicas in answer:
            if host != b"?":  # as which it is not to be reached, says its configuration
                ranges.append((first, last, node_id.decode(), (host.decode() if host else asked, int(port))))
        if ranges == self._ranges:
            return
        slots = self._slots.copy() or [""] * REDIS_CLUSTER_HASH_SLOTS
        addresses = dict(self._addresses)
        for first, last, owner, address in ranges:
            addresses[name_of(address)] = address
            for slot in range(first, last + 1):
                before = self._owners[slot]
                if owner == before or before not in epochs or epochs.get(owner, 0) > self._epochs[before]:
                    self._owners[slot], slots[slot] = owner, name_of(address)
        for owner, epoch in epochs.items():
            self._epochs[owner] = max(epoch, self._epochs.get(owner, 0))
        self._ranges = ranges
        in_use = set(slots)
        self._take(slots, {name: address for name, address in addresses.items() if name in in_use})
        for name in self._clients.keys() - self._addresses.keys():
            self._retired.append((monotonic(), self._clients.pop(name)))

    async def _close_retired(self, after_s: float = RETIRE_S) -> None:
        """Close the clients of nodes that are masters no more, once nobody waits for an answer of theirs."""
        due = [client for since, client in self._retired if monotonic() - since >= after_s]
        self._retired = [entry for entry in self._retired if entry[1] not in due]
        for client in due:
            await client.aclose()

    def _take(self, slots: list[str], addresses: dict[str, Address]) -> None:
        if slots == self._slots:
            return
        if self._slots:
            gained = {new for old, new in zip(self._slots, slots, strict=True) if old != new}
            self.gained |= dict.fromkeys(gained, monotonic())
            logger.info("cluster_changed masters=%d gained=%s", len(addresses), ",".join(sorted(gained)))
        self._slots, self._addresses = slots, addresses
        self.version += 1

    # -- ways to nodes ---------------------------------------------------------------------------------------------

    def _client(self, name: str, address: Address) -> Redis:
        client = self._clients.get(name)
        if client is None:
            options = {**self._options, "host": address[0], "port": address[1]}
            client = self._clients[name] = make_client(options, LOOKUP_CONNECTIONS, COMMAND_TIMEOUT_S)
        return client

    def client(self, node: str) -> Redis:
        """Look-ups on one master. Raises `NotConnected` when it is none."""
        return self._client(node, self.address(node))

    def address(self, node: str) -> Address:
        """Raises `NotConnected` when it is no master (any more)."""
        address = self._addresses.get(node)
        if address is None:
            raise NotConnected("no master has the slot" if not node else "no master any more")
        return address

    async def each_node(self) -> list[Redis]:
        """Look-ups on every master; raises `NotConnected`."""
        await self.learn()
        return [self.client(node) for node in self.masters]

    def line(self, node: str) -> Line:
        """A connection of one's own to one master."""
        return NodeLine(self, node, make_client(self._options, 1))

    def slot_line(self) -> SlotLine:
        """A connection of one's own to whichever master has a key."""
        return SlotLine(self, make_client(self._options, 1))

    async def ask(self, *commands: Sequence[Argument]) -> list[Any]:
        """Send commands to the nodes of their keys, one round trip to each; a refusal (`RedisError`) stands in its
        place. Raises `REDIS_FAILURES` when a node did not answer, after the others have."""
        answers: list[Any] = [None] * len(commands)
        waiting = list(range(len(commands)))
        for turn in range(MAX_TURNS):
            await self.learn()
            by_node: defaultdict[str, list[int]] = defaultdict(list)
            for index in waiting:
                by_node[self.node_of(_key(commands[index]))].append(index)
            parts = [self._ask_node(node, [commands[i] for i in indexes]) for node, indexes in by_node.items()]
            found = [await parts[0]] if len(parts) == 1 else await asyncio.gather(*parts, return_exceptions=True)
            for indexes, part in zip(by_node.values(), found, strict=True):
                if isinstance(part, BaseException):
                    raise part
                for index, answer in zip(indexes, part, strict=True):
                    answers[index] = answer
            # MOVED is a kind of ASK.
            waiting = [i for i in waiting if isinstance(answers[i], (AskError, TryAgainError))]
            if not waiting:
                break
            waiting = await self._redirect(commands, answers, waiting)
            await asyncio.sleep(TURN_S * turn)
        return answers

    async def _ask_node(self, node: str, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        try:
            answers = await ask(self.client(node), commands)
        except REDIS_FAILURES:
            self.doubt()
            raise
        for answer in answers:
            self.heard(answer)
        return answers

    async def _redirect(
        self, commands: Sequence[Sequence[Argument]], answers: list[Any], waiting: list[int]
    ) -> list[int]:
        """Ask the node to which a slot is being moved for what it has already; returns what is to be asked again."""
        again: list[int] = []
        for index in waiting:
            answer = answers[index]
            if isinstance(answer, AskError) and not isinstance(answer, MovedError):
                address = _target(answer)
                client = self._client(name_of(address), address)
                _, answers[index] = await ask(client, [("ASKING",), commands[index]])
            if isinstance(answers[index], (AskError, TryAgainError)):
                again.append(index)
        return again


class NodeLine(Line):
    """A connection to one master."""

    def __init__(self, cluster: Cluster, node: str, client: Redis) -> None:
        super().__init__(client)
        self._cluster = cluster
        self.node = node

    def _make(self) -> AbstractConnection:
        connection: Any = super()._make()
        connection.host, connection.port = self._cluster.address(self.node)
        return connection

    async def ask(self, *commands: Sequence[Argument]) -> list[Any]:
        try:
            answers = await super().ask(*commands)
        except REDIS_FAILURES:
            self._cluster.doubt()
            raise
        for answer in answers:
            self._cluster.heard(answer)
        return answers


class SlotLine(NodeLine):
    """A connection to whichever master has a key. When the key moves, the next command fails: what was lost on the way
    is not known."""

    def __init__(self, cluster: Cluster, client: Redis) -> None:
        super().__init__(cluster, "", client)
        self._key = ""

    async def aim(self, key: str) -> None:
        await self._cluster.learn()
        self._key = key
        await self._lead_to(self._cluster.node_of(key))

    async def ask(self, *commands: Sequence[Argument]) -> list[Any]:
        await self._cluster.learn()
        node = self._cluster.node_of(self._key)
        if node != self.node:
            await self._lead_to(node)
            raise NotConnected("the key has moved to another node")
        return await super().ask(*commands)

    async def _lead_to(self, node: str) -> None:
        if node != self.node:
            await self.drop()
            self._connection = None
            self.node = node


def _epochs(nodes: bytes) -> dict[str, int]:
    """Configuration epochs by node id, out of CLUSTER NODES."""
    lines = (line.split() for line in nodes.decode().splitlines())
    return {words[0]: int(words[6]) for words in lines if len(words) > 6}


def _target(redirection: AskError) -> Address:
    address: Any = redirection.node_addr  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return str(address[0]), int(address[1])


def _key(command: Sequence[Argument]) -> str:
    return str(command[3] if command[0] in _KEY_THIRD else command[1])
