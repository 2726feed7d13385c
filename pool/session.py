"""One pooled session: its states, and the owner task that alone opens and closes its link.

Cancel scopes and processes belong to the task that entered them. So a link is opened and closed by its owner task;
request handlers, which come and go and are cancelled, only use it.

    OPENING --opened--> READY --close--> CLOSING --closed--> CLOSED
       |                  `-----lost------^                    ^
       `------------------failed / close-----------------------'
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from enum import Enum
from math import inf
from typing import Any, Final, Protocol

from .clock import monotonic
from .errors import OpenFailed, PoolError, SessionClosed
from .farewell import Farewell, as_nobody, end_soon, end_upstream
from .link import Link, ResumeRecord
from .upstream import Upstream

logger = logging.getLogger("leasehold.pool.session")

OPEN_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 10.0
CLOSE_GRACE_S: Final = 1.0
"""How long after its time a close that was cancelled may still take; then the session counts as ended without it."""


class State(Enum):
    """Where a session is in its life."""

    OPENING = "opening"
    READY = "ready"
    CLOSING = "closing"
    CLOSED = "closed"


class Event(Enum):
    """What happens to a session."""

    OPENED = "opened"
    FAILED = "failed"
    CLOSE = "close"
    LOST = "lost"
    CLOSED = "closed"


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.OPENING, Event.OPENED): State.READY,
    (State.OPENING, Event.FAILED): State.CLOSED,
    (State.OPENING, Event.CLOSE): State.CLOSING,
    (State.READY, Event.CLOSE): State.CLOSING,
    (State.READY, Event.LOST): State.CLOSING,
    (State.CLOSING, Event.OPENED): State.CLOSING,  # it opened after somebody asked it to close: close it
    (State.CLOSING, Event.FAILED): State.CLOSED,
    (State.CLOSING, Event.CLOSE): State.CLOSING,
    (State.CLOSING, Event.LOST): State.CLOSING,
    (State.CLOSING, Event.CLOSED): State.CLOSED,
    (State.CLOSED, Event.CLOSE): State.CLOSED,
}
"""Every transition there is; any other pair is a bug and raises KeyError."""

ENDS_UPSTREAM: Final = frozenset(
    {
        "discarded",
        "drained",
        "evicted",
        "idle",
        "max_age",
        "not_initialized",
        "open_failed",
        "shutdown",
        "unhealthy",
        "unregistered",
    }
)
"""Reasons to close after which the upstream session would live on unknown to anybody: it is told (DELETE)."""

OpenLink = Callable[[], Awaitable[Link]]
Handshake = Callable[[Link], Awaitable[dict[str, Any]]]
"""Initializes a session over its link; returns the server's result."""


class Face(Protocol):
    """Something that uses a session's link from tasks of its own."""

    async def aclose(self) -> None:
        """End them. Raises nothing."""
        ...


_AT_ONCE: Final = nullcontext()


class PooledSession:
    """A live upstream session. Made by the pool; `link` is valid while `state` is READY."""

    def __init__(
        self,
        key: str,
        upstream: Upstream,
        principal: str,
        *,
        handshake: Handshake | None = None,
        resume: ResumeRecord | None = None,
    ) -> None:
        """`handshake`: the session is ours to initialize, not a client's; unless `resume` says that it has been."""
        self.key = key
        self.upstream = upstream
        self.principal = principal
        self.state = State.OPENING
        self.in_flight = 0
        self.calls = 0
        """Requests of those who share it that have no answer yet: `in_flight` counts holders and streams, too."""
        self.opened_at = self.used_at = self.heard_at = monotonic()
        self.is_doubted = False
        """A call of theirs had no answer in its time, and nothing was heard since."""
        self.expires_at = inf
        """When it is too old to be lent once more (`monotonic`)."""
        self.close_reason = ""
        self.keeps_record = False
        """Whether the session lives on elsewhere: its upstream side and its registration are not to be ended."""
        self.initialize_result = resume.initialize_result if resume else None
        """What the server said to the pool's own `initialize`; None where a client did the handshake."""
        self.on_opened: Callable[[], None] = lambda: None
        self.on_checked: Callable[[], None] = lambda: None
        self.face: Face | None = None
        """What was put on top of the link, and has to go before it."""
        self.is_new = False
        """Opened for somebody who has yet to get it."""
        self.telling: AbstractAsyncContextManager[Any] = _AT_ONCE
        """Held while the upstream is told of the end."""
        self.farewell: Farewell = as_nobody
        """How the upstream is told of the end."""
        self.safe_tools: set[str] = set()
        """Tools that the server has declared read-only or idempotent, as far as they were listed."""
        self._ids = 0
        self._id_prefix = f"leasehold-{os.urandom(4).hex()}-"
        self._handshake = handshake
        self._link: Link | None = None
        self._opening: asyncio.Timeout | None = None
        # Futures, not events: those weigh 700 bytes each.
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = loop.create_future()
        self._close_asked: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()

    def __repr__(self) -> str:
        return f"<PooledSession {self.key[:8]} {self.upstream.name} {self.state.value} in_flight={self.in_flight}>"

    @property
    def link(self) -> Link:
        """Raises `SessionClosed` before the session is open and after it began to close."""
        if self._link is None or self.state is not State.READY or self.is_closed:
            state = "gone" if self.state is State.READY else self.state.value
            raise SessionClosed(f"the session is {state}")
        return self._link

    @property
    def is_closed(self) -> bool:
        """True as soon as the session can take no more calls; never raises."""
        if self.state in (State.CLOSING, State.CLOSED):
            return True
        try:
            return self._link is not None and self._link.is_closed
        except Exception:  # noqa: BLE001 - a link that cannot even say that
            return True

    @property
    def is_pool_initialized(self) -> bool:
        """Whether its owner initialized it, and not a client for itself."""
        return self._handshake is not None or self.initialize_result is not None

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return monotonic() - self.opened_at

    @property
    def resume(self) -> ResumeRecord | None:
        """What another owner needs to continue the session; None for one that cannot move. Valid while it closes,
        too."""
        record = None if self._link is None else self._link.resume
        if record is None or self.initialize_result is None:
            return record
        return replace(record, initialize_result=self.initialize_result)

    @property
    def idle_s(self) -> float:
        """Seconds since its last use; 0 while a call or stream is open."""
        return 0.0 if self.in_flight else monotonic() - self.used_at

    @property
    def is_due(self) -> bool:
        """Whether it is to be checked before it is used: it was not heard of for `health_check_interval`.

        Not while a call is in flight, for a server may be too busy with that to answer; but for certain after one that
        had no answer in its time.
        """
        if self.is_doubted:
            return True
        return not self.calls and monotonic() - self.heard_at > self.upstream.health_check_interval_s

    @property
    def is_expired(self) -> bool:
        """Whether it is past its maximum age."""
        return monotonic() > self.expires_at

    @property
    def is_opening(self) -> bool:
        return self.state is State.OPENING

    def next_id(self) -> str:
        """An id for a request of our own: like no client's, and like none of another owner of this session."""
        self._ids += 1
        return f"{self._id_prefix}{self._ids}"

    def __enter__(self) -> PooledSession:
        """Mark a use: the session is not idle until it is left."""
        self.in_flight += 1
        return self

    def __exit__(self, *_exc: object) -> None:
        self.in_flight -= 1
        self.touch()

    def touch(self) -> None:
        """Note a use."""
        self.used_at = monotonic()

    def heard(self) -> None:
        """Note that the upstream has answered."""
        self.heard_at = monotonic()
        self.is_doubted = False

    async def wait_open(self) -> None:
        """Return when the link is open; raises `PoolError`. The caller may be cancelled: the opening goes on."""
        await asyncio.shield(self._opened)

    def close(self, reason: str) -> None:
        """Ask the owner task to close; never waits, may be called twice. An opening that is under way is cut short."""
        self.close_reason = self.close_reason or reason
        self._step(Event.CLOSE)
        if not self._close_asked.done():
            self._close_asked.set_result(None)
        if self._opening is not None and not self._opening.expired():
            self._opening.reschedule(asyncio.get_running_loop().time())

    def abandon(self, reason: str) -> None:
        """Close our side only: another owner has the session, or may take it over."""
        self.keeps_record = True
        self.close(reason)

    async def wait_ended(self) -> None:
        """Return when nothing of the session is left, or its link has overstayed the time it has for closing."""
        await asyncio.shield(self._ended)

    async def own(self, open_link: OpenLink, on_ended: Callable[[PooledSession], None]) -> None:
        """The owner task: opens the link, waits until it is lost or asked to close, closes it. Raises nothing.

        `on_ended` is called once, when `wait_ended` returns.
        """
        try:
            if await self._open(open_link):
                self._step(Event.OPENED)
                self.heard()
                self.on_opened()
                self._opened.set_result(None)
                await self._until_closed(self._running())
        finally:
            if self._link is not None:
                await self._close_link(self._link, on_ended)
            else:
                self.close_reason = self.close_reason or "open_failed"
                self._end(Event.FAILED, on_ended)
            if not self._opened.done():  # the owner task itself was cancelled
                self._fail_open(OpenFailed("the pool is closing"))

    def orphaned(self, on_ended: Callable[[PooledSession], None]) -> None:
        """The owner task is done. One that was cancelled before its first step has ended nothing: do so."""
        if not self._ended.done():
            self._fail_open(OpenFailed("the pool is closing"))
            self.close_reason = self.close_reason or "open_failed"
            self._end(Event.FAILED, on_ended)

    async def _open(self, open_link: OpenLink) -> bool:
        if self._close_asked.done():
            self._fail_open(OpenFailed("closed before it was open"))
            return False
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S) as self._opening:
                self._link = await open_link()
                if self._handshake is not None and self.initialize_result is None:
                    self.initialize_result = await self._handshake(self._link)
        except Exception as error:
            if not isinstance(error, PoolError | OSError | TimeoutError):
                logger.exception("open_failed upstream=%s", self.upstream.name)
            self._fail_open(error if isinstance(error, PoolError) else OpenFailed(self._why_not_open(error)))
            self.close_reason = self.close_reason or "open_failed"
            return False
        finally:
            self._opening = None
        return True

    def _why_not_open(self, error: Exception) -> str:
        if not isinstance(error, TimeoutError):
            return f"cannot open: {type(error).__name__}"
        return "closed before it was open" if self._close_asked.done() else f"not open within {OPEN_TIMEOUT_S:g} s"

    def _running(self) -> Link:
        assert self._link is not None
        return self._link

    def _fail_open(self, failure: PoolError) -> None:
        self._opened.set_exception(failure)
        self._opened.exception()  # retrieved: the opener may have gone away

    async def _until_closed(self, link: Link) -> None:
        lost = asyncio.ensure_future(link.wait_closed())
        try:
            await asyncio.wait({self._close_asked, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not lost.cancel() and not lost.cancelled():
                lost.exception()  # retrieved: a link that cannot wait for its end is lost, too
        if not self._close_asked.done():
            self.close_reason = self.close_reason or "lost"
            self._step(Event.LOST)

    async def _close_link(self, link: Link, on_ended: Callable[[PooledSession], None]) -> None:
        if self.state in (State.OPENING, State.READY):  # the handshake failed, or the owner task itself was cancelled
            self._step(Event.CLOSE)
        # A link that ignores its cancellation holds up this task, but nobody who waits for the session's end.
        give_up = asyncio.get_running_loop().call_later(
            CLOSE_TIMEOUT_S + CLOSE_GRACE_S, self._end, Event.CLOSED, on_ended
        )
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                try:
                    if self.face is not None:
                        await self.face.aclose()
                    if self.close_reason in ENDS_UPSTREAM and not self.keeps_record and not link.is_closed:
                        async with self.telling:
                            tell = end_soon if self.close_reason == "unhealthy" else end_upstream
                            await tell(link, self.farewell, self.upstream.name)
                finally:
                    await link.aclose()
        except TimeoutError:
            logger.error("close_overdue upstream=%s timeout_s=%g", self.upstream.name, CLOSE_TIMEOUT_S)  # noqa: TRY400
        except Exception:
            logger.exception("close_failed upstream=%s", self.upstream.name)
        finally:
            give_up.cancel()
            self._end(Event.CLOSED, on_ended)

    def _end(self, event: Event, on_ended: Callable[[PooledSession], None]) -> None:
        if not self._ended.done():
            self._step(event)
            self._ended.set_result(None)
            on_ended(self)

    def _step(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]
