"""The outbox: one task that writes everything this worker has to say to others.

All frames of a loop turn for one receiver become one or two sealed envelopes, and the envelopes for all receivers one
pipelined write. While that write is under way the next turn's frames gather, so the batch grows with the load and a
call costs a share of a round trip.

What a push can come to:

* taken;
* refused in the same round trip: the receiver's lease has ended (OWNER_DOWN; an incarnation never comes back), or its
  mailbox is full (BUSY: only requests are refused, for a reader must never wait for an answer that waits for room);
* nothing pushed, because the receiver has a new mailbox generation: the same bytes go there, and a QUERY after them;
* in doubt, because the connection broke: the same bytes are pushed again under the same counters, and the receiver
  drops what it has seen. Requests are tried once more and then given up as `unknown`, for their callers are waiting;
  answers are tried until the receiver's lease ends or our own does. What the second push comes to says nothing about
  the first one: the first may have got in where the second is refused, or may have got in without its requests, so that
  those of the second come late and are dropped. So a QUERY follows, and the receipt tells.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol

from redis.exceptions import NoScriptError

from . import scripts
from .channel import SendChannel
from .client import COMMAND_TIMEOUT_S, REDIS_FAILURES, Argument, Line, NotConnected, execute, execute_all, overdue
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
    tries: int = 0
    """Pushes that failed."""
    in_doubt: bool = False
    """Whether one of these may have been taken all the same."""
    in_flight: bool = False

    @property
    def unsure(self) -> bool:
        return self.in_doubt or self.in_flight


@dataclass(slots=True)
class _Peer:
    channel: SendChannel
    queue: deque[_Queued] = field(default_factory=deque[_Queued])
    batch: _Batch | None = None
    ask: bool = False
    """Whether to ask which of the envelopes pushed so far did arrive."""


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
    """Everything one incarnation sends. `on_owner_down(peer)` is called when a push finds a receiver's lease ended."""

    def __init__(self, client: Line, keys: Keys, keyring: Keyring, incarnation: str, *, mailbox_limit: int) -> None:
        self._client = client
        self._keys = keys
        self._keyring = keyring
        self._incarnation = bytes.fromhex(incarnation)
        self._mailbox_limit = mailbox_limit
        self._peers: dict[str, _Peer] = {}
        self._dirty: dict[str, None] = {}
        # Invariant: no channel to a peer is made twice. Its counters would start again, under the same key.
        self._gone: set[str] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self.available = True
        self.on_owner_down: Callable[[str], None] = _nobody
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

        Raises `Unavailable` for a request while Redis cannot be written to: nothing was queued. A request to a peer
        that is known to be gone is refused before this returns; other frames for it are dropped.
        """
        if request and not self.available:
            self._refused[Refusal.UNAVAILABLE.value] += 1
            raise Unavailable("push: Redis does not answer")
        if self._closed:
            return
        if peer in self._gone:
            if request and ticket is not None:
                self._refuse_one(ticket, Refusal.OWNER_DOWN)
            return
        state = self._peers.get(peer)
        if state is None:
            channel = SendChannel(self._keyring, self._incarnation, bytes.fromhex(peer))
            state = self._peers[peer] = _Peer(channel)
        state.queue.append(_Queued(data, ticket, request))
        self._dirty[peer] = None
        self._idle.clear()
        self._wake.set()

    async def flush(self, limit_s: float) -> bool:
        """Wait, at most `limit_s`, until everything that was posted has been pushed or refused; whether it has."""
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """The incarnation has ended: refuse what waits, take nothing more, and let `run()` return."""
        self._closed = True
        self.available = False
        self._wake.set()
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
            self._moved(peer, state, generation)

    def forget(self, peer: str) -> None:
        """The peer's lease has ended. What was not pushed is refused; of the rest the mailbox has told."""
        self._gone.add(peer)
        self._dirty.pop(peer, None)
        state = self._peers.pop(peer, None)
        if state is not None:
            if state.batch is not None and state.batch.unsure:
                state.batch = None
            self._drop(state, Refusal.OWNER_DOWN)

    async def run(self) -> None:
        """Write until `close()`. A broken connection is tried again with jittered backoff.

        No command is cancelled on the way: what had become of it would not be known.
        """
        low, high = BACKOFF_S
        delay = low
        while not self._closed:
            if not self._dirty and self.available:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
                continue
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
            state.batch.in_flight = True
            turn.append((peer, state, state.batch))
        self._dirty.clear()
        answers: list[Any] = []
        try:
            async with overdue(COMMAND_TIMEOUT_S):
                if turn:
                    answers = await self._push(turn)
                else:
                    await execute(self._client, "PING")
        except REDIS_FAILURES as error:
            self._failed(turn, error)
            return False
        finally:
            for _, _, batch in turn:
                batch.in_flight = False
        if not self.available:
            logger.info("redis_writable")
            self.available = True
        results = [self._settle(*entry, answer) for entry, answer in zip(turn, answers, strict=True)]
        return all(results)

    async def _push(self, turn: list[tuple[str, _Peer, _Batch]]) -> list[Any]:
        self._pushes += 1
        commands = [self._command(peer, state, batch) for peer, state, batch in turn]
        answers = await execute_all(self._client, commands, raise_on_error=False)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self._load()
        return answers

    async def _load(self) -> None:
        await scripts.MAILBOX_PUSH.load(self._client)

    def _command(self, peer: str, state: _Peer, batch: _Batch) -> tuple[Argument, ...]:
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
        """Take what waits for one receiver, up to MAX_PUSH bytes, and seal it: requests first, the rest in order."""
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
        if state.ask:
            # Only now, for every earlier push has been answered: what was under way when we learned that frames may
            # have been lost is asked after too.
            state.ask = False
            others.insert(0, _Queued(encode(FrameType.QUERY, state.channel.pushed), None, request=False))
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
            # Forgotten while the push was under way: what it did push, the dead mailbox has told.
            if not batch.in_doubt and (isinstance(answer, Exception) or answer[0] != _PUSHED):
                self._refuse(batch, Refusal.OWNER_DOWN)
            return True
        if isinstance(answer, NoScriptError):
            self._dirty[peer] = None
            return True
        if isinstance(answer, Exception):
            # OOM, READONLY, LOADING: refused as a whole, so nothing was pushed.
            logger.warning("push_refused peer=%s error=%s", peer[:8], type(answer).__name__)
            self.available = False
            self._refuse(batch, Refusal.IN_DOUBT if batch.in_doubt else Refusal.UNAVAILABLE)
            self._refuse_queued(state)
            self._keep_or_drop(peer, state, batch)
            return False
        status, generation = answer
        if status == _OWNER_DOWN:
            self._drop(state, Refusal.IN_DOUBT if batch.in_doubt else Refusal.OWNER_DOWN)
            self.on_owner_down(peer)
            return True
        if status == _MOVED:
            self._dirty[peer] = None
            self._moved(peer, state, generation)
            return True
        if batch.in_doubt:
            state.ask = True
        elif status == _BUSY:
            self._refuse(batch, Refusal.BUSY)
        state.channel.pushed = batch.last
        state.batch = None
        if state.queue or state.ask:
            self._dirty[peer] = None
        return True

    def _moved(self, peer: str, state: _Peer, generation: int) -> None:
        known, state.channel.generation = state.channel.generation, generation
        if known and not self._closed:
            state.ask = True
            self._dirty[peer] = None
            self._idle.clear()
            self._wake.set()

    def _failed(self, turn: list[tuple[str, _Peer, _Batch]], error: BaseException) -> None:
        if self.available:
            logger.warning("redis_not_writable error=%s", type(error).__name__)
        for peer, state, batch in turn:
            batch.tries += 1
            batch.in_doubt |= not isinstance(error, NotConnected)
            if self._peers.get(peer) is not state:
                if not batch.in_doubt:
                    self._refuse(batch, Refusal.OWNER_DOWN)
                continue
            if batch.tries > 1:
                self.available = False
                self._refuse(batch, Refusal.IN_DOUBT if batch.in_doubt else Refusal.UNAVAILABLE)
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
            if state.queue or state.ask:
                self._dirty[peer] = None

    def _drop(self, state: _Peer, reason: Refusal) -> None:
        """Drop everything that waits for one receiver; `reason` is for the batch that was being pushed."""
        state.ask = False
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
