"""The outbox: it writes everything this worker has to say to others.

All frames of a loop turn for one receiver become one or two sealed envelopes, and the envelopes for all receivers one
pipelined write. In a cluster each node has a *lane* of its own, a connection and a task, so that one which does not
answer holds up the receivers whose mailboxes it has, and nobody else; with a single server there is one lane. While
that write is under way the next turn's frames gather, so the batch grows with the load and a call costs a share of a
round trip.

What a push can come to:

* taken;
* refused in the same round trip: the receiver's lease has ended (OWNER_DOWN; an incarnation never comes back), or its
  mailbox is full (BUSY: only requests are refused, for a reader must never wait for an answer that waits for room);
* nothing pushed, because the receiver has a new mailbox generation: the same bytes go there, and a QUERY after them;
* nothing pushed, because the mailbox is on another node of the cluster (MOVED), or on its way to one: the same bytes
  go there, in a moment;
* in doubt, because the connection broke: the same bytes are pushed again under the same counters, and the receiver
  drops what it has seen. Requests are tried once more and then given up as `unknown`, for their callers are waiting;
  answers are tried until the receiver's lease ends or our own does. What the second push comes to says nothing about
  the first one: the first may have got in where the second is refused, or may have got in without its requests, so
  that those of the second come late and are dropped. So a QUERY follows, and the receipt tells.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import AskError, MovedError, NoScriptError, TryAgainError

from . import scripts
from .batches import Batch, Queued, Receiver, Refusal, Ticket
from .channel import SendChannel
from .client import COMMAND_TIMEOUT_S, REDIS_FAILURES, Argument, Line, NotConnected, execute, execute_all, overdue
from .cluster import Cluster
from .errors import Unavailable
from .keys import Keys
from .sealing import Keyring

__all__ = ["Outbox", "OutboxStatistics", "Refusal", "Ticket"]

logger = logging.getLogger("leasehold.coordinator.outbox")

MAILBOX_TTL_MS: Final = 60_000
"""How long a mailbox outlives its last push: time enough for callers to look what a dead owner had not read."""
BACKOFF_S: Final = (0.02, 1.0)
MOVE_S: Final = 0.05
"""Pause while the slot of a mailbox is being moved."""
MAX_MOVES: Final = 10

_PUSHED, _OWNER_DOWN, _MOVED, _BUSY = range(4)


@dataclass(slots=True, eq=False)
class _Lane:
    """The way to one node."""

    node: str
    line: Line
    dirty: dict[Receiver, None] = field(default_factory=dict[Receiver, None])
    """Receivers for whom something waits."""
    available: bool = True
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class OutboxStatistics:
    """Counts since start: frames and envelopes sealed, round trips, and requests refused by reason."""

    frames: int
    envelopes: int
    pushes: int
    refused: dict[str, int]
    peers: int
    available: bool


class Outbox:
    """Everything one incarnation sends. `on_owner_down(peer)` is called when a push finds a receiver's lease ended.

    `make_line(node)` makes the connection of a lane; without `cluster` there is one, for "".
    """

    def __init__(
        self,
        make_line: Callable[[str], Line],
        cluster: Cluster | None,
        keys: Keys,
        keyring: Keyring,
        incarnation: str,
        *,
        mailbox_limit: int,
    ) -> None:
        self._make_line = make_line
        self._cluster = cluster
        self._keys = keys
        self._keyring = keyring
        self.sender = bytes.fromhex(incarnation)
        self._mailbox_limit = mailbox_limit
        self._peers: dict[str, Receiver] = {}
        # Invariant: no channel to a peer is made twice. Its counters would start again, under the same key.
        self._gone: set[str] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._closed = asyncio.Event()
        self._lanes: dict[str, _Lane] = {}
        if cluster is None:
            self._open_lane("")
        self.on_owner_down: Callable[[str], None] = _nobody
        self._frames = self._envelopes = self._pushes = 0
        self._refused = dict.fromkeys((reason.value for reason in Refusal), 0)

    def __repr__(self) -> str:
        waiting = sum(len(lane.dirty) for lane in self._lanes.values())
        return f"<Outbox peers={len(self._peers)} lanes={len(self._lanes)} dirty={waiting} available={self.available}>"

    @property
    def available(self) -> bool:
        """Whether every node that was written to takes what is written."""
        return not self._closed.is_set() and all(lane.available for lane in self._lanes.values())

    def statistics(self) -> OutboxStatistics:
        return OutboxStatistics(
            self._frames, self._envelopes, self._pushes, dict(self._refused), len(self._peers), self.available
        )

    def post(self, peer: str, data: bytes, ticket: Ticket | None = None, *, request: bool = False) -> None:
        """Queue one encoded frame for `peer` (an incarnation). Never waits.

        Raises `Unavailable` for a request while Redis cannot be written to: nothing was queued. A request to a peer
        that is known to be gone is refused before this returns; other frames for it are dropped.
        """
        lane = self._lane(peer)
        if request and (self._closed.is_set() or not lane.available):
            self._refused[Refusal.UNAVAILABLE.value] += 1
            raise Unavailable("push: Redis does not answer")
        if self._closed.is_set():
            return
        if peer in self._gone:
            if request and ticket is not None:
                self._refuse_one(ticket, Refusal.OWNER_DOWN)
            return
        state = self._peers.get(peer)
        if state is None:
            channel = SendChannel(self._keyring, self.sender, bytes.fromhex(peer))
            state = self._peers[peer] = Receiver(peer, channel)
        state.queue.append(Queued(data, ticket, request))
        _mark(lane, state)

    async def flush(self, limit_s: float) -> bool:
        """Wait, at most `limit_s`, until everything that was posted has been pushed or refused; whether it has."""
        try:
            async with asyncio.timeout(limit_s):
                while busy := [lane for lane in self._lanes.values() if not lane.idle.is_set()]:
                    await busy[0].idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """The incarnation has ended: refuse what waits, take nothing more, and let `run()` return."""
        self._closed.set()
        for lane in self._lanes.values():
            lane.wake.set()
        for state in self._peers.values():
            self._refuse_queued(state)

    def channel(self, peer: str) -> SendChannel | None:
        """The channel to a peer, if anything was ever sent to it."""
        state = self._peers.get(peer)
        return None if state is None else state.channel

    def note_generation(self, peer: str, generation: int) -> None:
        """Learn a receiver's mailbox generation from elsewhere than a push."""
        state = self._peers.get(peer)
        if state is not None and generation != state.channel.generation:
            self._moved(state, generation)

    def forget(self, peer: str) -> None:
        """The peer's lease has ended. What was not pushed is refused; of the rest the mailbox has told."""
        self._gone.add(peer)
        state = self._peers.pop(peer, None)
        if state is not None:
            for lane in self._lanes.values():
                lane.dirty.pop(state, None)
            if state.batch is not None and state.batch.unsure:
                state.batch = None
            self._drop(state, Refusal.OWNER_DOWN)

    async def reconnect(self) -> None:
        """What was written to is the master no more. What is under way will be in doubt."""
        for lane in self._lanes.values():
            await lane.line.drop()

    # -- lanes -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write until `close()`. A broken connection is tried again with jittered backoff.

        No command is cancelled on the way: what had become of it would not be known.
        """
        async with asyncio.TaskGroup() as self._tasks:
            for lane in self._lanes.values():
                self._start(lane)
            await self._closed.wait()

    def _lane(self, peer: str) -> _Lane:
        """The lane to the node that has a peer's mailbox."""
        node = "" if self._cluster is None else self._cluster.node_of(self._keys.lease(peer))
        return self._lanes.get(node) or self._open_lane(node)

    def _open_lane(self, node: str) -> _Lane:
        lane = self._lanes[node] = _Lane(node, self._make_line(node))
        lane.idle.set()
        if not self._closed.is_set():
            self._start(lane)
        return lane

    def _start(self, lane: _Lane) -> None:
        if self._tasks is not None:
            self._tasks.create_task(self._write(lane), name="leasehold-outbox")

    async def _write(self, lane: _Lane) -> None:
        low, high = BACKOFF_S
        delay = low
        try:
            while not self._closed.is_set():
                if not lane.dirty and lane.available:
                    lane.idle.set()
                    lane.wake.clear()
                    await lane.wake.wait()
                    continue
                if await self._write_turn(lane):
                    delay = low
                else:
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
                    delay = min(high, delay * 2)
                    if self._cluster is not None and not await self._leads_on(lane, self._cluster):
                        return
        finally:
            await lane.line.aclose()

    async def _leads_on(self, lane: _Lane, cluster: Cluster) -> bool:
        """Learn where what waits has to go; False when the node is no master any more, and the lane has ended."""
        try:
            await cluster.learn()
        except REDIS_FAILURES:
            return True
        self._sort(lane)
        if lane.dirty or lane.node in cluster.masters:
            return True
        del self._lanes[lane.node]
        lane.idle.set()
        return False

    def _sort(self, lane: _Lane) -> None:
        """Give receivers whose mailbox is on another node to the lane of that one."""
        for state in list(lane.dirty):
            other = self._lane(state.name)
            if other is not lane:
                del lane.dirty[state]
                _mark(other, state)

    def _again(self, state: Receiver) -> None:
        """There is more to write to a receiver, wherever its mailbox is now."""
        if self._peers.get(state.name) is state and not self._closed.is_set():
            _mark(self._lane(state.name), state)

    # -- one round trip --------------------------------------------------------------------------------------------

    async def _write_turn(self, lane: _Lane) -> bool:
        """Push one batch to every receiver that has something waiting; False when Redis did not answer."""
        if self._cluster is not None:
            self._sort(lane)
        turn: list[tuple[Receiver, Batch]] = []
        for state in lane.dirty:
            batch = state.batch
            if batch is None:
                batch = state.batch = state.seal()
                self._frames += batch.frames
                self._envelopes += batch.envelopes
            elif batch.in_flight:
                continue  # to where its mailbox was; what comes of that decides
            batch.in_flight = True
            turn.append((state, batch))
        lane.dirty.clear()
        answers: list[Any] = []
        try:
            async with overdue(COMMAND_TIMEOUT_S):
                if turn:
                    answers = await self._push(lane.line, turn)
                elif not lane.available:
                    await execute(lane.line, "PING")
        except REDIS_FAILURES as error:
            self._failed(lane, turn, error)
            return False
        finally:
            for _, batch in turn:
                batch.in_flight = False
        if not lane.available:
            logger.info("redis_writable node=%s", lane.node)
            lane.available = True
        results = [self._settle(lane, *entry, answer) for entry, answer in zip(turn, answers, strict=True)]
        return all(results)

    async def _push(self, line: Line, turn: Sequence[tuple[Receiver, Batch]]) -> list[Any]:
        self._pushes += 1
        commands = [self._command(*entry) for entry in turn]
        answers = await execute_all(line, commands, raise_on_error=False)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await scripts.MAILBOX_PUSH.load(line)
        return answers

    def _command(self, state: Receiver, batch: Batch) -> tuple[Argument, ...]:
        generation = state.channel.generation
        return scripts.MAILBOX_PUSH.command(
            [self._keys.lease(state.name), self._keys.mailbox(state.name, generation)],
            [
                generation,
                self._mailbox_limit,
                MAILBOX_TTL_MS,
                len(batch.requests),
                *(envelope for envelope, _ in batch.requests),
                *batch.others,
            ],
        )

    def _settle(self, lane: _Lane, state: Receiver, batch: Batch, answer: Any) -> bool:
        """Act on the answer to one push; False when it has to be tried again later."""
        if self._peers.get(state.name) is not state:
            # Forgotten while the push was under way: what it did push, the dead mailbox has told.
            if not batch.in_doubt and (isinstance(answer, Exception) or answer[0] != _PUSHED):
                self._refuse(batch, Refusal.OWNER_DOWN)
            return True
        if isinstance(answer, NoScriptError):
            self._again(state)
            return True
        if isinstance(answer, (AskError, TryAgainError)) and batch.moves < MAX_MOVES:
            batch.moves += 1
            if isinstance(answer, MovedError):
                self._again(state)
            else:  # nobody else waits for that
                asyncio.get_running_loop().call_later(MOVE_S, self._again, state)
            return True
        if isinstance(answer, Exception):
            # OOM, READONLY, LOADING, NOREPLICAS, CLUSTERDOWN: refused as a whole, so nothing was pushed.
            logger.warning("push_refused peer=%s error=%s", state.name[:8], type(answer).__name__)
            lane.available = False
            self._refuse(batch, Refusal.IN_DOUBT if batch.in_doubt else Refusal.UNAVAILABLE)
            self._refuse_queued(state)
            self._keep_or_drop(state, batch)
            return False
        status, generation = answer
        if status == _OWNER_DOWN:
            self._drop(state, Refusal.IN_DOUBT if batch.in_doubt else Refusal.OWNER_DOWN)
            self.on_owner_down(state.name)
            return True
        if status == _MOVED:
            self._again(state)
            self._moved(state, generation)
            return True
        if batch.in_doubt:
            state.ask = True
        elif status == _BUSY:
            self._refuse(batch, Refusal.BUSY)
        state.channel.pushed = batch.last
        state.batch = None
        if state.queue or state.ask:
            self._again(state)
        return True

    def _moved(self, state: Receiver, generation: int) -> None:
        known, state.channel.generation = state.channel.generation, generation
        if known:
            state.ask = True
            self._again(state)

    def _failed(self, lane: _Lane, turn: Sequence[tuple[Receiver, Batch]], error: BaseException) -> None:
        if lane.available:
            logger.warning("redis_not_writable node=%s error=%s", lane.node, type(error).__name__)
        for state, batch in turn:
            batch.tries += 1
            batch.in_doubt |= not isinstance(error, NotConnected)
            if self._peers.get(state.name) is not state:
                if not batch.in_doubt:
                    self._refuse(batch, Refusal.OWNER_DOWN)
                continue
            if batch.tries > 1:
                lane.available = False
                self._refuse(batch, Refusal.IN_DOUBT if batch.in_doubt else Refusal.UNAVAILABLE)
            self._keep_or_drop(state, batch)
        if not turn:
            lane.available = False
        if not lane.available:
            for state in self._peers.values():
                if self._cluster is None or self._lane(state.name) is lane:
                    self._refuse_queued(state)

    def _keep_or_drop(self, state: Receiver, batch: Batch) -> None:
        if not batch.requests and not batch.others:
            state.batch = None
        if state.batch is not None or state.queue or state.ask:
            self._again(state)

    def _drop(self, state: Receiver, reason: Refusal) -> None:
        """Drop everything that waits for one receiver; `reason` is for the batch that was being pushed."""
        state.ask = False
        batch, state.batch = state.batch, None
        queue, state.queue = state.queue, deque[Queued]()
        if batch is not None:
            self._refuse(batch, reason)
        for queued in queue:
            if queued.request and queued.ticket is not None:
                self._refuse_one(queued.ticket, Refusal.OWNER_DOWN)

    def _refuse_queued(self, state: Receiver) -> None:
        kept = [queued for queued in state.queue if not queued.request]
        refused = [queued.ticket for queued in state.queue if queued.request and queued.ticket is not None]
        state.queue = deque(kept)
        for ticket in refused:
            self._refuse_one(ticket, Refusal.UNAVAILABLE)

    def _refuse(self, batch: Batch, reason: Refusal) -> None:
        tickets = [ticket for _, group in batch.requests for ticket in group]
        batch.requests.clear()
        for ticket in tickets:
            self._refuse_one(ticket, reason)

    def _refuse_one(self, ticket: Ticket, reason: Refusal) -> None:
        self._refused[reason.value] += 1
        ticket.refused(reason)


def _mark(lane: _Lane, state: Receiver) -> None:
    """Something waits for a receiver."""
    lane.dirty[state] = None
    lane.idle.clear()
    lane.wake.set()


def _nobody(_peer: str) -> None:
    return None
