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
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Final

from .clock import monotonic
from .errors import OpenFailed, PoolError, SessionClosed
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

ENDS_UPSTREAM: Final = frozenset({"idle", "shutdown", "unregistered", "not_initialized"})
"""Reasons to close after which the upstream session would live on unknown to anybody: it is told (DELETE)."""

OpenLink = Callable[[], Awaitable[Link]]


class PooledSession:
    """A live upstream session. Made by the pool; `link` is valid while `state` is READY."""

    def __init__(self, key: str, upstream: Upstream, principal: str) -> None:
        self.key = key
        self.upstream = upstream
        self.principal = principal
        self.state = State.OPENING
        self.in_flight = 0
        self.opened_at = self.used_at = monotonic()
        self.close_reason = ""
        self.keeps_record = False
        """Whether the session lives on elsewhere: its upstream side and its registration are not to be ended."""
        self._link: Link | None = None
        self._opening: asyncio.Timeout | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._close_asked = asyncio.Event()
        self._ended = asyncio.Event()

    def __repr__(self) -> str:
        return f"<PooledSession {self.key[:8]} {self.upstream.name} {self.state.value} in_flight={self.in_flight}>"

    @property
    def link(self) -> Link:
        """Raises `SessionClosed` before the session is open and after it began to close."""
        if self._link is None or self.state is not State.READY or self._link.is_closed:
            raise SessionClosed(f"the session is {self.state.value}")
        return self._link

    @property
    def is_closed(self) -> bool:
        """True as soon as the session can take no more calls."""
        return self.state in (State.CLOSING, State.CLOSED) or (self._link is not None and self._link.is_closed)

    @property
    def resume(self) -> ResumeRecord | None:
        """What another owner needs to continue the session; None for one that cannot move. Valid while it closes,
        too."""
        return None if self._link is None else self._link.resume

    @property
    def idle_s(self) -> float:
        """Seconds since its last use; 0 while a call or stream is open."""
        return 0.0 if self.in_flight else monotonic() - self.used_at

    def __enter__(self) -> PooledSession:
        """Mark a use: the session is not idle until it is left."""
        self.in_flight += 1
        return self

    def __exit__(self, *_exc: object) -> None:
        self.in_flight -= 1
        self.used_at = monotonic()

    async def wait_open(self) -> None:
        """Return when the link is open; raises `PoolError`. The caller may be cancelled: the opening goes on."""
        await asyncio.shield(self._opened)

    def close(self, reason: str) -> None:
        """Ask the owner task to close; never waits, may be called twice. An opening that is under way is cut short."""
        self.close_reason = self.close_reason or reason
        self._step(Event.CLOSE)
        self._close_asked.set()
        if self._opening is not None and not self._opening.expired():
            self._opening.reschedule(asyncio.get_running_loop().time())

    def abandon(self, reason: str) -> None:
        """Close our side only: another owner has the session, or may take it over."""
        self.keeps_record = True
        self.close(reason)

    async def wait_ended(self) -> None:
        """Return when nothing of the session is left, or its link has overstayed the time it has for closing."""
        await self._ended.wait()

    async def own(self, open_link: OpenLink, on_ended: Callable[[PooledSession], None]) -> None:
        """The owner task: opens the link, waits until it is lost or asked to close, closes it. Raises nothing.

        `on_ended` is called once, when `wait_ended` returns.
        """
        link: Link | None = None
        try:
            link = await self._open(open_link)
            if link is not None:
                self._step(Event.OPENED)
                self._opened.set_result(None)
                await self._until_closed(link)
        finally:
            if link is not None:
                await self._close_link(link, on_ended)
            else:
                self.close_reason = self.close_reason or "open_failed"
                self._end(Event.FAILED, on_ended)
            if not self._opened.done():  # the owner task itself was cancelled
                self._fail_open(OpenFailed("the pool is closing"))

    async def _open(self, open_link: OpenLink) -> Link | None:
        if self._close_asked.is_set():
            self._fail_open(OpenFailed("closed before it was open"))
            return None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S) as self._opening:
                self._link = await open_link()
        except Exception as error:
            if not isinstance(error, PoolError | OSError | TimeoutError):
                logger.exception("open_failed upstream=%s", self.upstream.name)
            self._fail_open(
                error if isinstance(error, PoolError) else OpenFailed(f"cannot open: {type(error).__name__}")
            )
        finally:
            self._opening = None
        return self._link

    def _fail_open(self, failure: PoolError) -> None:
        self._opened.set_exception(failure)
        self._opened.exception()  # retrieved: the opener may have gone away

    async def _until_closed(self, link: Link) -> None:
        waits = {asyncio.ensure_future(self._close_asked.wait()), asyncio.ensure_future(link.wait_closed())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self._close_asked.is_set():
            self.close_reason = self.close_reason or "lost"
            self._step(Event.LOST)

    async def _close_link(self, link: Link, on_ended: Callable[[PooledSession], None]) -> None:
        if self.state is State.READY:  # the owner task itself was cancelled
            self._step(Event.CLOSE)
        # A link that ignores its cancellation holds up this task, but nobody who waits for the session's end.
        give_up = asyncio.get_running_loop().call_later(
            CLOSE_TIMEOUT_S + CLOSE_GRACE_S, self._end, Event.CLOSED, on_ended
        )
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                try:
                    if self.close_reason in ENDS_UPSTREAM and not self.keeps_record and not link.is_closed:
                        await _end_upstream(link)
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
        if not self._ended.is_set():
            self._step(event)
            self._ended.set()
            on_ended(self)

    def _step(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]


async def _end_upstream(link: Link) -> None:
    resume = link.resume
    if resume is None:  # it has no id by which it could be told; a child process ends with its link
        return
    version = [(b"mcp-protocol-version", resume.protocol_version.encode())] if resume.protocol_version else []
    try:
        reply = await link.delete(version)
        await reply.chunks.aclose()
    except PoolError as error:
        logger.info("upstream_not_told error=%s", type(error).__name__)
