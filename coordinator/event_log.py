"""The event log: what a session's own streams have said, for who comes back to them.

One Redis stream per session. A position in it is the epoch under which its owner wrote and a number that this owner
counts up, so positions grow from owner to owner, and Redis itself refuses what an owner of the past still writes. An
event has its position before it is written, and its id says where it is. Who has seen an id is past it whether or not
its event got in, so that a write whose answer was lost neither repeats nor hides anything.

One writer task for all sessions of a worker: what gathers during a round trip is the next batch. Redis that is slow or
away holds an event up for a moment only; it is sent all the same, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis

from .client import REDIS_FAILURES, Argument, execute, execute_all, overdue, translated
from .cluster import Cluster
from .errors import SealError
from .keys import Keys
from .sealing import Keyring

logger = logging.getLogger("leasehold.coordinator.event_log")

MAX_EVENTS: Final = 1000
"""Events kept of a session; Redis may keep some more (`MAXLEN ~`)."""
MAX_BYTES: Final = 4 * 1024 * 1024
"""Bytes of events kept that one owner wrote; also the largest event that is kept."""
WRITE_S: Final = 0.5
"""The longest that one write may take; an event waits for the write under way and for its own."""
PAUSE_S: Final = 1.0
"""After a write that failed no other is tried for so long: events are not held up one after the other."""

EVERYBODY: Final = b"--------"
"""The stream of events that concern all who listen to a session."""

_NAME: Final = re.compile(rb"leasehold-(([0-9a-f-]{8})-([0-9]{1,19})-([0-9]{1,19}))-([0-9a-f]{32})")
_MAC_BYTES: Final = 16
_LABEL: Final = b"event id"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where in a session's log an event is."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far somebody has read one stream of a session."""

    stream: bytes
    """Eight characters of hex."""
    position: Position


class Logged(NamedTuple):
    """An event that was given a place in the log: `name` is its id."""

    position: Position
    name: bytes
    event: bytes
    written: asyncio.Future[bool] | None = None
    """Done when it is in the log (true), or is waited for no more; None for what came out of the log."""


@dataclass(slots=True)
class EventStatistics:
    """Events since start: in the log before they were sent, sent again from it, and sent without being in it."""

    logged: int = 0
    replayed: int = 0
    not_logged: int = 0


@dataclass(slots=True, eq=False)
class _Write:
    """Something to be written under one key; the last of the commands says whether it was."""

    key: str
    ttl_ms: int
    commands: list[tuple[Argument, ...]]
    done: asyncio.Future[bool]


class EventLog:
    """The logs of all sessions, as one worker writes and reads them."""

    def __init__(self, client: Redis | Cluster, keys: Keys, keyring: Keyring) -> None:
        self._client = client
        self._keys = keys
        self._keyring = keyring
        self._waiting: list[_Write] = []
        self._writer: asyncio.Task[None] | None = None
        self._off_until = float("-inf")
        self.statistics = EventStatistics()

    def __repr__(self) -> str:
        return f"<EventLog waiting={len(self._waiting)} {self.statistics!r}>"

    def of(self, key: str, epoch: Callable[[], int], ttl_ms: int, *, anew: bool = False) -> SessionEvents:
        """The log of one session, for its owner. `epoch`: of its registration, now. `anew`: what may stand under this
        key is of a session that has ended."""
        return SessionEvents(self, key, epoch, ttl_ms, anew=anew)

    def name(self, cursor: Cursor) -> bytes:
        """The id of an event, or of the beginning of a stream."""
        where = b"%s-%d-%d" % (cursor.stream, cursor.position.epoch, cursor.position.number)
        return b"leasehold-%s-%s" % (where, self._keyring.mac(_LABEL, where)[:_MAC_BYTES].hex().encode())

    def read_name(self, name: bytes) -> Cursor | None:
        """Inverse of `name`; None for an id that this fleet did not make."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        where, stream, epoch, number, mac = found.groups()
        if not self._keyring.mac_matches(_LABEL, where, bytes.fromhex(mac.decode())):
            return None
        return Cursor(stream, Position(int(epoch), int(number)))

    async def read(self, key: str, after: Cursor) -> list[Logged]:
        """What the log has of a stream, and of everybody's, after a position: in order, at most as much as it keeps.

        Raises `Unavailable`.
        """
        async with translated("event log"):
            entries: list[tuple[bytes, dict[bytes, bytes] | list[bytes]]] = await execute(
                self._client, "XRANGE", self._keys.events(key), f"({after.position}", "+"
            )
        found: list[Logged] = []
        for where, fields in entries:
            epoch, _, number = where.partition(b"-")
            position = Position(int(epoch), int(number))
            try:
                sealed = fields[b"e"] if isinstance(fields, dict) else fields[1]  # redis-py's client makes it a dict
                opened = self._keyring.open_record(sealed, _context(key, position))
            except SealError:
                logger.warning("event_refused session=%s", key[:8])
                continue
            stream, event = opened[: len(EVERYBODY)], opened[len(EVERYBODY) :]
            if stream in (after.stream, EVERYBODY):
                found.append(Logged(position, self.name(Cursor(after.stream, position)), event))
        self.statistics.replayed += len(found)
        return found

    def add(
        self, key: str, ttl_ms: int, position: Position, sealed: bytes, trim: tuple[Argument, ...], *, anew: bool
    ) -> asyncio.Future[bool]:
        """Have an event written, with the next batch; never waits. `trim`: what XADD is to leave of those before."""
        name = self._keys.events(key)
        add = ("XADD", name, *trim, str(position), "e", sealed)
        return self._submit(name, ttl_ms, [("DEL", name), add] if anew else [add])

    def drop(self, key: str) -> None:
        """Have a session's log deleted, after what is still to be written; never waits."""
        name = self._keys.events(key)
        self._submit(name, 0, [("DEL", name)])

    def seal(self, key: str, position: Position, stream: bytes, event: bytes) -> bytes:
        """An entry as it rests in Redis: bound to its session and place."""
        return self._keyring.seal_record(stream + event, _context(key, position))

    @property
    def is_off(self) -> bool:
        """Whether nothing is written for now, because the last write failed."""
        return asyncio.get_running_loop().time() < self._off_until

    def _submit(self, name: str, ttl_ms: int, commands: list[tuple[Argument, ...]]) -> asyncio.Future[bool]:
        loop = asyncio.get_running_loop()
        write = _Write(name, ttl_ms, commands, loop.create_future())
        if self.is_off:
            write.done.set_result(False)
            return write.done
        self._waiting.append(write)
        if self._writer is None:
            self._writer = loop.create_task(self._run(), name="leasehold-events")
        return write.done

    async def _run(self) -> None:
        batch: list[_Write] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._write(batch)
        finally:
            self._writer = None
            for write in [*batch, *self._waiting]:
                if not write.done.done():
                    write.done.set_result(False)
            self._waiting = []

    async def _write(self, batch: list[_Write]) -> None:
        commands = [command for write in batch for command in write.commands]
        lifetimes = {write.key: write.ttl_ms for write in batch if write.ttl_ms}
        commands += [("PEXPIRE", name, ttl_ms) for name, ttl_ms in lifetimes.items()]
        try:
            async with overdue(WRITE_S):
                answers: list[Any] = await execute_all(self._client, commands, raise_on_error=False)
        except REDIS_FAILURES as error:
            logger.warning("events_not_logged error=%s", type(error).__name__)
            self._off_until = asyncio.get_running_loop().time() + PAUSE_S
            answers = [error] * len(commands)
        last = -1
        for write in batch:
            last += len(write.commands)
            if not write.done.done():
                write.done.set_result(not isinstance(answers[last], Exception))


class SessionEvents:
    """The log of one session, at its owner, who alone writes to it."""

    def __init__(self, log: EventLog, key: str, epoch: Callable[[], int], ttl_ms: int, *, anew: bool) -> None:
        self._log = log
        self._key = key
        self._epoch = epoch
        self._ttl_ms = ttl_ms
        self._anew = anew
        self._number = 0
        # What this owner wrote that is still kept: position and size.
        self._kept: deque[tuple[Position, int]] = deque()
        self._bytes = 0
        self._is_dropped = False

    def __repr__(self) -> str:
        return f"<SessionEvents {self._key[:8]} events={self._number} bytes={self._bytes}>"

    @property
    def has_begun(self) -> bool:
        """Whether this owner has given ids to events."""
        return self._number > 0

    def now(self, stream: bytes) -> bytes:
        """The id of the place where a stream that begins now begins."""
        return self.name(stream, Position(self._epoch(), self._number))

    def name(self, stream: bytes, position: Position) -> bytes:
        """The id of an event on one of the streams that it is for."""
        return self._log.name(Cursor(stream, position))

    def cursor(self, name: bytes) -> Cursor | None:
        """What an id says that this fleet made, for whichever session; None for one that it did not make."""
        return self._log.read_name(name)

    def add(self, stream: bytes, event: bytes) -> Logged:
        """Give an event its id, and have it written; never waits. It may be sent once `settled`."""
        self._number += 1
        position = Position(self._epoch(), self._number)
        logged = Logged(position, self._log.name(Cursor(stream, position)), event)
        if len(event) > MAX_BYTES or self._is_dropped or self._log.is_off:
            self._log.statistics.not_logged += 1
            return logged
        trim = self._make_room(position, len(event))
        sealed = self._log.seal(self._key, position, stream, event)
        written = self._log.add(self._key, self._ttl_ms, position, sealed, trim, anew=self._anew)
        self._anew = False
        written.add_done_callback(self._count)
        return logged._replace(written=written)

    def too_large(self) -> None:
        """An event was sent that nobody holds in memory."""
        self._log.statistics.not_logged += 1

    async def after(self, cursor: Cursor) -> list[Logged]:
        """What came after that on its stream. Raises `Unavailable`."""
        return await self._log.read(self._key, cursor)

    def drop(self) -> None:
        """The session has ended."""
        self._is_dropped = True
        if self._number:
            self._log.drop(self._key)

    def _make_room(self, position: Position, size: int) -> tuple[Argument, ...]:
        kept = self._kept
        kept.append((position, size))
        self._bytes += size
        while len(kept) > MAX_EVENTS:
            self._bytes -= kept.popleft()[1]
        if self._bytes <= MAX_BYTES:
            return "MAXLEN", "~", MAX_EVENTS
        while self._bytes > MAX_BYTES:
            self._bytes -= kept.popleft()[1]
        return "MINID", str(kept[0][0])

    def _count(self, written: asyncio.Future[bool]) -> None:
        statistics = self._log.statistics
        if written.result():
            statistics.logged += 1
        else:
            statistics.not_logged += 1


async def settled(events: Iterable[Logged]) -> None:
    """Return when all of them are in the log, or are waited for no more. Who waits may be cancelled."""
    for event in events:
        if event.written is not None:
            await asyncio.shield(event.written)


def _context(key: str, position: Position) -> bytes:
    return f"{key}:events:{position}".encode()
