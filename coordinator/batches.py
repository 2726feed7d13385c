"""What waits for one receiver, and what of it was sealed and is being pushed. See `outbox.py`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from .channel import SendChannel
from .frames import FrameType, encode

MAX_ENVELOPE: Final = 256 * 1024
"""Bytes of frames after which an envelope is closed and the next one begun."""
MAX_PUSH: Final = 4 * 1024 * 1024
"""Bytes for one receiver in one round trip; the rest waits for the next."""


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
class Queued:
    """A frame, encoded."""

    data: bytes
    ticket: Ticket | None
    request: bool


@dataclass(slots=True)
class Batch:
    """Sealed envelopes for one receiver, kept until Redis has said what became of them."""

    requests: list[tuple[bytes, list[Ticket]]] = field(default_factory=list[tuple[bytes, list[Ticket]]])
    others: list[bytes] = field(default_factory=list[bytes])
    frames: int = 0
    last: int = 0
    """The highest counter."""
    tries: int = 0
    """Pushes that failed."""
    moves: int = 0
    """Pushes that were refused because the mailbox is on another node, or on its way to one."""
    in_doubt: bool = False
    """Whether one of those that failed may have been taken all the same."""
    in_flight: bool = False

    @property
    def unsure(self) -> bool:
        return self.in_doubt or self.in_flight

    @property
    def envelopes(self) -> int:
        return len(self.requests) + len(self.others)


@dataclass(slots=True, eq=False)
class Receiver:
    """All that is to be said to one incarnation."""

    name: str
    channel: SendChannel
    queue: deque[Queued] = field(default_factory=deque[Queued])
    batch: Batch | None = None
    ask: bool = False
    """Whether to ask which of the envelopes pushed so far did arrive."""

    def seal(self) -> Batch:
        """Take what waits, up to MAX_PUSH bytes, and seal it: requests first, the rest in order."""
        batch = Batch()
        requests: list[Queued] = []
        others: list[Queued] = []
        size = 0
        while self.queue and size < MAX_PUSH:
            queued = self.queue.popleft()
            size += len(queued.data)
            (requests if queued.request else others).append(queued)
        for group in _envelopes(requests):
            counter, envelope = self._seal_group(group, batch)
            tickets = [queued.ticket for queued in group if queued.ticket is not None]
            for ticket in tickets:
                ticket.request_counter = counter
            batch.requests.append((envelope, tickets))
        if self.ask:
            # Only now, for every earlier push has been answered: what was under way when we learned that frames may
            # have been lost is asked after too.
            self.ask = False
            others.insert(0, Queued(encode(FrameType.QUERY, self.channel.pushed), None, request=False))
        for group in _envelopes(others):
            _, envelope = self._seal_group(group, batch)
            batch.others.append(envelope)
        batch.last = self.channel.counter
        return batch

    def _seal_group(self, group: list[Queued], batch: Batch) -> tuple[int, bytes]:
        counter, envelope = self.channel.seal(b"".join([queued.data for queued in group]))
        batch.frames += len(group)
        for queued in group:
            ticket = queued.ticket
            if ticket is not None:
                ticket.first_counter = ticket.first_counter or counter
                ticket.last_counter = counter
        return counter, envelope


def _envelopes(queue: list[Queued]) -> list[list[Queued]]:
    """Cut a queue into groups of at most about MAX_ENVELOPE bytes."""
    groups: list[list[Queued]] = []
    size = MAX_ENVELOPE
    for queued in queue:
        if size >= MAX_ENVELOPE:
            groups.append([])
            size = 0
        groups[-1].append(queued)
        size += len(queued.data)
    return groups
