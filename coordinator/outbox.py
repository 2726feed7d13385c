"""The outbox: one task that writes everything this worker has to say to others.

All frames of a loop turn for one receiver become one or two sealed envelopes, and the envelopes for all receivers one pipelined
write. While that write is under way the next turn's frames gather, so the batch grows with the load and a call costs a
share of a round trip.

What a push can come to:

* taken;
* refused in the same round trip: the receiver's lease has ended (OWNER_DOWN), or its mailbox is full (BUSY: only requests are
  refused, for a reader must never wait for an answer that waits for room);
* nothing pushed, because the receiver has a new mailbox generation: the same bytes go there, and a QUERY after them;
* in doubt, because the connection broke: the same bytes are pushed again under the same counters, and the receiver drops
  what it has seen. Requests are tried once more and then given up as `unknown`, for their callers are waiting; answers are
  tried until the receiver's lease ends or our own does.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from . import scripts
from .channel import SendChannel
from .client import REDIS_FAILURES
from .errors import Unavailable
from .frames import FrameType, encode
from .keys import Keys
from .sealing import Keyring

logger = logging.getLogger("leasehold.coordinator.outbox")

MAX_ENVELOPE: Final = 256 * 1024
"""Bytes of frames after which an envelope is closed and the next one begun."""
MAX_PUSH: Final = 4 * 1024 * 1024
"""Bytes for one receiver in one round trip; the rest waits for the next."""
MAILBOX_TTL_MS: Final = 60_000
"""How long a mailbox outlives its last push: time enough for callers to look what a dead owner had not read."""
BACKOFF_S: Final = (0.02, 1.0)

_PUSHED, _OWNER_DOWN, _MOVED, _BUSY = range(4)


class Refusal(Enum):
    """Why a REQUEST did not get into a mailbox. Only IN_DOUBT may have run."""

    OWNER_DOWN = "owner_down"
    BUSY = "busy"
    UNAVAILABLE = "redis_unavailable"
    IN_DOUBT = "in_doubt"


class Ticket(Protocol):
    """The sender's end of an exchange, as the outbox sees it: it notes which envelopes carry its frames."""

    request_counter: int
    """Envelope of the REQUEST frame; 0 until it was sealed."""
    first_counter: int
    last_counter: int

    def refused(self, reason: Refusal) -> None:
        """The REQUEST frame did not get through."""
        ...


@dataclass(slots=True)
class _Queued:
    data: bytes
    ticket: Ticket | None
    request: bool


@dataclass(slots=True)
class _Batch:
    """Sealed envelopes for one receiver, kept until Redis has said what became of them."""

    requests: list[tuple[bytes, list[Ticket]]] = field(default_factory=list[tuple[bytes, list[Ticket]]])
    others: list[bytes] = field(default_factory=list[bytes])
    last: int = 0
    doubts: int = 0


@dataclass(slots=True)
class _Peer:
    channel: SendChannel
    queue: deque[_Queued] = field(default_factory=deque[_Queued])
    batch: _Batch | None = None


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
    """Everything one incarnation sends. `on_owner_down(peer)` is called when a push finds the receiver's lease ended."""

    def __init__(self, client: Redis, keys: Keys, keyring: Keyring, incarnation: str, *, mailbox_limit: int) -> None:
        self._client = client
        self._keys = keys
        self._keyring = keyring
        self._incarnation = bytes.fromhex(incarnation)
        self._mailbox_limit = mailbox_limit
        self._peers: dict[str, _Peer] = {}
        self._dirty: dict[str, None] = {}
        self._wake = asyncio.Event()
        self.available = True
        self.on_owner_down = _nobody
        self._frames = self._envelopes = self._pushes = 0
        self._refused = dict.fromkeys((reason.value for reason in Refusal), 0)

    def __repr__(self) -> str:
        return f"<Outbox peers={len(self._peers)} dirty={len(self._dirty)} available={self.available}>"

    def statistics(self) -> OutboxStatistics:
        return OutboxStatistics(
            self._frames, self._envelopes, self._pushes, dict(self._refused), len(self._peers), self.available
        )

    def post(self, peer: str, data: bytes, ticket: Ticket | None = None, *, request: bool = False) -> None:
        """Queue one encoded frame for `peer` (an incarnation). Never waits.

        Raises `Unavailable` for a request while Redis cannot be written to: nothing was queued.
        """
        if request and not self.available:
            self._refused[Refusal.UNAVAILABLE.value] += 1
            raise Unavailable("push: Redis does not answer")
        state = self._peers.get(peer)
        if state is None:
            channel = SendChannel(self._keyring, self._incarnation, bytes.fromhex(peer))
            state = self._peers[peer] = _Peer(channel)
        state.queue.append(_Queued(data, ticket, request))
        self._dirty[peer] = None
        self._wake.set()

    def channel(self, peer: str) -> SendChannel | None:
        """The channel to a peer, if anything was ever sent to it."""
        state = self._peers.get(peer)
        return None if state is None else state.channel

    def note_generation(self, peer: str, generation: int) -> None:
        """Learn a receiver's mailbox generation from elsewhere than a push."""
        state = self._peers.get(peer)
        if state is not None and generation != state.channel.generation:
            self._moved(peer, state, generation)

    def forget(self, peer: str) -> None:
        """The peer's lease has ended, and nobody here waits for it any more."""
        state = self._peers.pop(peer, None)
        self._dirty.pop(peer, None)
        if state is not None:
            in_doubt = state.batch is not None and state.batch.doubts > 0
            self._drop(state, Refusal.IN_DOUBT if in_doubt else Refusal.OWNER_DOWN)

    async def run(self) -> None:
        """Write until cancelled. A broken connection is tried again with jittered backoff."""
        low, high = BACKOFF_S
        delay = low
        while True:
            if not self._dirty and self.available:
                self._wake.clear()
                await self._wake.wait()
            if await self._write_turn():
                delay = low
            else:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
                delay = min(high, delay * 2)

    async def _write_turn(self) -> bool:
        """Push one batch to every receiver that has something waiting; False when Redis did not answer."""
        turn: list[tuple[str, _Peer, _Batch]] = []
        for peer in list(self._dirty):
            state = self._peers[peer]
            if state.batch is None:
                state.batch = self._seal(state)
            turn.append((peer, state, state.batch))
        self._dirty.clear()
        try:
            if not turn:
                await self._client.ping()  # pyright: ignore[reportUnknownMemberType, reportGeneralTypeIssues]
                answers: list[Any] = []
            else:
                answers = await self._push(turn)
        except REDIS_FAILURES as error:
            self._in_doubt(turn, error)
            return False
        if not self.available:
            logger.info("redis_writable")
            self.available = True
        results = [self._settle(*entry, answer) for entry, answer in zip(turn, answers, strict=True)]
        return all(results)

    async def _push(self, turn: list[tuple[str, _Peer, _Batch]]) -> list[Any]:
        self._pushes += 1
        commands = [self._command(peer, state, batch) for peer, state, batch in turn]
        if len(commands) == 1:  # the usual case; a pipeline of one costs twice a command
            try:
                return [await self._client.execute_command(*commands[0])]
            except NoScriptError as error:
                await self._load()
                return [error]
            except ResponseError as error:
                return [error]
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self._load()
        return answers

    async def _load(self) -> None:
        await self._client.script_load(scripts.MAILBOX_PUSH.source)  # pyright: ignore[reportUnknownMemberType]

    def _command(self, peer: str, state: _Peer, batch: _Batch) -> tuple[Any, ...]:
        generation = state.channel.generation
        return scripts.MAILBOX_PUSH.command(
            [self._keys.lease(peer), self._keys.mailbox(peer, generation)],
            [
                generation,
                self._mailbox_limit,
                MAILBOX_TTL_MS,
                len(batch.requests),
                *(envelope for envelope, _ in batch.requests),
                *batch.others,
            ],
        )

    def _seal(self, state: _Peer) -> _Batch:
        """Take what waits for one receiver, up to MAX_PUSH bytes, and seal it: requests first, then the rest in order."""
        batch = _Batch()
        requests: list[_Queued] = []
        others: list[_Queued] = []
        size = 0
        while state.queue and size < MAX_PUSH:
            queued = state.queue.popleft()
            size += len(queued.data)
            (requests if queued.request else others).append(queued)
        for group in _envelopes(requests):
            counter, envelope = self._seal_group(state.channel, group)
            tickets = [queued.ticket for queued in group if queued.ticket is not None]
            for ticket in tickets:
                ticket.request_counter = counter
            batch.requests.append((envelope, tickets))
        for group in _envelopes(others):
            _, envelope = self._seal_group(state.channel, group)
            batch.others.append(envelope)
        batch.last = state.channel.counter
        return batch

    def _seal_group(self, channel: SendChannel, group: list[_Queued]) -> tuple[int, bytes]:
        counter, envelope = channel.seal(b"".join([queued.data for queued in group]))
        self._frames += len(group)
        self._envelopes += 1
        for queued in group:
            ticket = queued.ticket
            if ticket is not None:
                ticket.first_counter = ticket.first_counter or counter
                ticket.last_counter = counter
        return counter, envelope

    def _settle(self, peer: str, state: _Peer, batch: _Batch, answer: Any) -> bool:
        """Act on the answer to one push; False when it has to be tried again later."""
        if self._peers.get(peer) is not state:
            return True  # forgotten while the push was under way
        if isinstance(answer, NoScriptError):
            self._dirty[peer] = None
            return True
        if isinstance(answer, Exception):
            # OOM, READONLY, LOADING: refused as a whole, so nothing was pushed.
            logger.warning("push_refused peer=%s error=%s", peer[:8], type(answer).__name__)
            self._refuse(batch, Refusal.UNAVAILABLE)
            self._keep_or_drop(peer, state, batch)
            return False
        status, generation = answer
        if status == _OWNER_DOWN:
            self._drop(state, Refusal.OWNER_DOWN)
            self.on_owner_down(peer)
            return True
        if status == _MOVED:
            self._dirty[peer] = None
            self._moved(peer, state, generation)
            return True
        if status == _BUSY:
            self._refuse(batch, Refusal.BUSY)
        state.channel.pushed = batch.last
        state.batch = None
        if state.queue:
            self._dirty[peer] = None
        return True

    def _moved(self, peer: str, state: _Peer, generation: int) -> None:
        known, state.channel.generation = state.channel.generation, generation
        if known:
            query = encode(FrameType.QUERY, state.channel.pushed)
            state.queue.appendleft(_Queued(query, None, request=False))
            self._dirty[peer] = None
            self._wake.set()

    def _in_doubt(self, turn: list[tuple[str, _Peer, _Batch]], error: BaseException) -> None:
        if self.available:
            logger.warning("redis_not_writable error=%s", type(error).__name__)
        for peer, state, batch in turn:
            if self._peers.get(peer) is not state:
                continue
            batch.doubts += 1
            if batch.doubts > 1:
                self.available = False
                self._refuse(batch, Refusal.IN_DOUBT)
            self._keep_or_drop(peer, state, batch)
        if not turn:
            self.available = False
        if not self.available:
            for state in self._peers.values():
                self._refuse_queued(state)

    def _keep_or_drop(self, peer: str, state: _Peer, batch: _Batch) -> None:
        if batch.requests or batch.others:
            self._dirty[peer] = None
        else:
            state.batch = None
            if state.queue:
                self._dirty[peer] = None

    def _drop(self, state: _Peer, reason: Refusal) -> None:
        """Drop everything that waits for one receiver; `reason` is for the batch that was being pushed."""
        batch, state.batch = state.batch, None
        queue, state.queue = state.queue, deque()
        if batch is not None:
            self._refuse(batch, reason)
        for queued in queue:
            if queued.request and queued.ticket is not None:
                self._refuse_one(queued.ticket, Refusal.OWNER_DOWN)

    def _refuse_queued(self, state: _Peer) -> None:
        kept = [queued for queued in state.queue if not queued.request]
        refused = [queued.ticket for queued in state.queue if queued.request and queued.ticket is not None]
        state.queue = deque(kept)
        for ticket in refused:
            self._refuse_one(ticket, Refusal.UNAVAILABLE)

    def _refuse(self, batch: _Batch, reason: Refusal) -> None:
        tickets = [ticket for _, group in batch.requests for ticket in group]
        batch.requests.clear()
        for ticket in tickets:
            self._refuse_one(ticket, reason)

    def _refuse_one(self, ticket: Ticket, reason: Refusal) -> None:
        self._refused[reason.value] += 1
        ticket.refused(reason)


def _nobody(_peer: str) -> None:
    return None


def _envelopes(queue: list[_Queued]) -> list[list[_Queued]]:
    """Cut a queue into groups of at most about MAX_ENVELOPE bytes."""
    groups: list[list[_Queued]] = []
    size = MAX_ENVELOPE
    for queued in queue:
        if size >= MAX_ENVELOPE:
            groups.append([])
            size = 0
        groups[-1].append(queued)
        size += len(queued.data)
    return groups
