"""The pool: the live sessions of one process, their limits, and the owner tasks that hold them. Knows no Redis.

Sessions are held in two ways. `open` holds one under a key of its own, for a client that comes back with that key (the
gateway). `session`, `link` and `acquire` lend any session of the same upstream, principal and credentials; with an
`affinity` they lend the one session that all who name it share. Both ways count towards the same limits.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final, Self
from weakref import WeakValueDictionary

from .borrowing import Borrow, BorrowedLink, RawContext, Want
from .breakers import Breakers
from .guarded_link import GuardedLink
from .handshake import initialize_params
from .ledger import Slot
from .lending import Lending
from .link import Fence, Headers, Link, OwnHeaders, ResumeRecord, headers_source, unfenced
from .openers import LinkOpener
from .sdk import require_sdk
from .session import CLOSE_GRACE_S, CLOSE_TIMEOUT_S, Handshake, PooledSession, State
from .statistics import Counts, PoolStatistics, SessionStatistics, session_statistics
from .upstream import StdioTarget, Upstream

if TYPE_CHECKING:
    import httpx2
    from mcp import ClientSession

    from .typed import Callbacks

logger = logging.getLogger("leasehold.pool")

SWEEP_EVERY_S: Final = 1.0
TELL_AT_ONCE: Final = 64
"""Sessions of an upstream whose end it is told of at a time. Thousands end together when a pool closes, and idle ones
hold no connection."""
MAX_AGE_JITTER: Final = 0.1
"""Sessions live up to a tenth less than their maximum age, each by another part: they do not all end at once."""


class SessionPool:
    """Owns the sessions of this process: `async with SessionPool() as pool`, or `run()` in a task. No owner task
    outlives it, unless its link ignores cancellation.

    `on_closed(session)` is called once when a session has ended, for whatever reason.
    """

    def __init__(
        self, *, max_sessions: int = 10_000, max_waiting: int = 1_000, acquire_timeout_s: float = 30.0
    ) -> None:
        """At most so many sessions in all, and callers that wait for one, each for so long unless it says
        otherwise."""
        self.on_closed: Callable[[PooledSession], None] = lambda _session: None
        self.breakers = Breakers()
        self._opener = LinkOpener(self.breakers)
        self._counts = Counts()
        self._lending = Lending(
            self._make_wanted,
            self._authorized,
            self._counts,
            max_sessions=max_sessions,
            max_waiting=max_waiting,
            acquire_timeout_s=acquire_timeout_s,
        )
        self._ledger = self._lending.ledger
        # All that have not ended, and those of them that have a key of their own.
        self._sessions: set[PooledSession] = set()
        self._keyed: dict[str, PooledSession] = {}
        self._owners: set[asyncio.Task[None]] = set()
        self._telling: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._numbers = itertools.count(1)
        self._ledger.is_closed = True  # until it runs
        self._ledger.has_begun = False
        self._closing = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<SessionPool in_flight={sum(s.in_flight for s in self._sessions)} {self._ledger!r}>"

    def __len__(self) -> int:
        return len(self._sessions)

    def __bool__(self) -> bool:
        """An empty pool is a pool."""
        return True

    @property
    def max_sessions(self) -> int:
        return self._ledger.max_sessions

    def statistics(self) -> PoolStatistics:
        """A snapshot; O(sessions)."""
        return self._counts.statistics(
            list(self._sessions), self._ledger.place_of, self._ledger.waiting, self.breakers.statistics()
        )

    def session_statistics(self) -> list[SessionStatistics]:
        """A snapshot of each session that has not ended."""
        return [session_statistics(session) for session in self._sessions]

    # -- life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._begin()
        self._running = asyncio.get_running_loop().create_task(self.run(), name="leasehold-pool")
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def run(self) -> None:
        """Keep house, until `close()` or cancelled; then end all sessions, bounded in time."""
        if self._running is None:
            self._begin()
        try:
            while not self._closing.is_set():
                try:
                    async with asyncio.timeout(SWEEP_EVERY_S):
                        await self._closing.wait()
                except TimeoutError:
                    self._sweep()
        finally:
            self._lending.stop()
            for session in list(self._sessions):
                session.close("shutdown")
            if self._owners:
                _, overdue = await asyncio.wait(self._owners, timeout=CLOSE_TIMEOUT_S + 2 * CLOSE_GRACE_S)
                if overdue:
                    logger.error("owners_left_behind count=%d", len(overdue))
            await self._lending.aclose()
            await self._opener.aclose()

    def _begin(self) -> None:
        self._ledger.is_closed = self._closing.is_set()
        self._ledger.has_begun = True

    def close(self) -> None:
        """Have `run()` end every session and return, at the latest after the time a link may take to close."""
        self._closing.set()

    async def aclose(self) -> None:
        """End every session and return when that is done: 12 s at most, whatever ignores its cancellation."""
        self.close()
        if self._running is not None:
            await asyncio.shield(self._running)

    async def drain(self, timeout_s: float) -> bool:
        """Lend no more, close what is idle, and wait until all that is lent came back; False if the time ran out
        first. Callers that wait are told `PoolFull`."""
        return await self._lending.drain(timeout_s)

    # -- sessions under a key of their own ---------------------------------------------------------------------------

    def get(self, key: str) -> PooledSession | None:
        """The session of that key, if it is live here."""
        return self._keyed.get(key)

    def sessions(self) -> list[PooledSession]:
        """All that have not ended."""
        return list(self._sessions)

    async def open(
        self,
        key: str,
        upstream: Upstream,
        principal: str,
        *,
        fence: Fence = unfenced,
        resume: ResumeRecord | None = None,
        handshake: Handshake | None = None,
    ) -> PooledSession:
        """Open a session under a new key, or continue one of another owner from its `resume` record.

        Returns when the link is open, and the session initialized if there is a `handshake`; else `initialize` has
        still to be sent through it, unless it was resumed. Raises `PoolFull` and `OpenFailed`. A resumed session is
        not refused for a limit: its user has it already. At a limit an idle session that is in the way is closed, and
        the new one opened once that has ended.
        """
        session = self.begin(key, upstream, principal, fence=fence, resume=resume, handshake=handshake)
        try:
            await session.wait_open()
        except BaseException:
            session.close("open_failed")
            raise
        return session

    def begin(
        self,
        key: str,
        upstream: Upstream,
        principal: str,
        *,
        fence: Fence = unfenced,
        resume: ResumeRecord | None = None,
        handshake: Handshake | None = None,
    ) -> PooledSession:
        """`open`, without waiting for it. Raises `PoolFull`."""
        self._ledger.check_open()
        slot = Slot(upstream.name, principal, upstream.identity)
        self._lending.limit(slot, upstream)
        full = None if resume is not None else self._ledger.blocked_by(slot)
        makes_room = None
        if full is not None:
            effects = self._ledger.make_room(slot)
            if not effects:
                self._lending.forget(slot)
                raise self._counts.refusal(f"limit reached: {full}")
            makes_room = effects[0].session
            self._lending.perform([*effects])
        replaced = self._keyed.get(key)
        if replaced is not None:
            replaced.abandon("replaced")
        session = self._make(
            key, upstream, principal, fence=fence, resume=resume, handshake=handshake, after=makes_room
        )
        self._ledger.keep(session, slot, force=True)
        self._keyed[key] = session
        return session

    def handshake(
        self,
        upstream: Upstream,
        principal: str,
        params: dict[str, Any],
        headers: Headers,
        auth: httpx2.Auth | None = None,
    ) -> Handshake:
        """How to initialize a session that no client does it for; for `open` and `begin`."""

        async def shake(link: Link) -> dict[str, Any]:
            # Its own permit stands for the whole handshake; a link behind the breaker would ask for one once more.
            bare = link.inner if isinstance(link, GuardedLink) else link
            through = self._through(bare, upstream, auth)
            return await self._opener.initialize(through, upstream, principal, params, headers, auth)

        return shake

    def stateless(self, upstream: Upstream) -> Link | None:
        """The link for requests that belong to no session; None where the upstream has no such thing (stdio)."""
        return self._opener.stateless(upstream)

    # -- lending ---------------------------------------------------------------------------------------------------

    async def acquire(self, want: Want, *, timeout_s: float | None = None, sure: bool = False) -> Borrow:
        """Borrow a session: one that is free, a new one, or the next that comes back, in order of arrival. One that
        was idle for longer than `health_check_interval` is checked first; to be `sure`, any that is not new.

        Raises `PoolTimeout` after `timeout_s` (default: the pool's), `PoolFull` when too many wait already or the pool
        closes, RuntimeError before the pool is entered, and what opening one raised. Cancelled at any moment, it leaves
        nothing behind.
        """
        return await self._lending.acquire(want, timeout_s=timeout_s, sure=sure)

    def prewarm(self, want: Want, minimum: int | None = None) -> None:
        """Have at least so many sessions ready for what is wanted (default: the upstream's `min_sessions`), now and
        after others have ended."""
        self._lending.prewarm(want, minimum)

    def session(
        self,
        upstream: Upstream,
        *,
        principal: str | None = None,
        headers: OwnHeaders = None,
        auth: httpx2.Auth | None = None,
        affinity: str | None = None,
        timeout_s: float | None = None,
        callbacks: Callbacks | None = None,
    ) -> AbstractAsyncContextManager[ClientSession]:
        """Borrow a session as an `mcp.ClientSession`.

        `principal` names whom the session belongs to; without it, the `headers` and the `auth` do: they go with every
        call, and may change from one loan to the next where there is a name. `affinity`: share the one session of that
        name instead of having one alone; where it has ended, the call that finds out fails, and the next one goes to
        another. Leaving the block on an exception that is no answer of the server (`MCPError`) closes the session,
        unless it has an `affinity`: others may use it. Raises what `acquire` raises.
        """
        require_sdk()
        from .typed import Callbacks, TypedContext, capabilities

        callbacks = callbacks or Callbacks()
        want = Want(
            upstream,
            principal=principal,
            headers=headers_source(headers),
            auth=auth,
            affinity=affinity,
            capabilities=capabilities(callbacks),
        )
        return TypedContext(self._lending, want, callbacks, timeout_s)

    def link(
        self,
        upstream: Upstream,
        *,
        principal: str | None = None,
        headers: OwnHeaders = None,
        auth: httpx2.Auth | None = None,
        affinity: str | None = None,
        timeout_s: float | None = None,
    ) -> AbstractAsyncContextManager[BorrowedLink]:
        """Borrow a session as its raw face: bytes of JSON-RPC in, bytes out. Any exception closes the session,
        unless it has an `affinity`."""
        return RawContext(
            self._lending,
            Want(upstream, principal=principal, headers=headers_source(headers), auth=auth, affinity=affinity),
            timeout_s,
        )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _make_wanted(self, want: Want) -> PooledSession:
        upstream, principal = want.upstream, want.slot.principal
        shake = self.handshake(upstream, principal, initialize_params(want.capabilities), want.headers, want.auth)
        session = self._make(f"{upstream.name}-{next(self._numbers)}", upstream, principal, handshake=shake)
        session.farewell = lambda link: (self._authorized(link, want), want.headers)
        return session

    def _authorized(self, link: Link, want: Want) -> Link:
        return self._through(link, want.upstream, want.auth)

    def _through(self, link: Link, upstream: Upstream, auth: httpx2.Auth | None) -> Link:
        if auth is None or isinstance(upstream.target, StdioTarget):
            return link
        return self._opener.authorized(link, upstream.target.url, auth)

    def _make(
        self,
        key: str,
        upstream: Upstream,
        principal: str,
        *,
        fence: Fence = unfenced,
        resume: ResumeRecord | None = None,
        handshake: Handshake | None = None,
        after: PooledSession | None = None,
    ) -> PooledSession:
        """A session and its owner task, which begins to open it; `after` another one, in whose room it goes, has
        ended."""
        session = PooledSession(key, upstream, principal, handshake=handshake, resume=resume)
        if upstream.max_age_s is not None:
            session.expires_at = session.opened_at + upstream.max_age_s * (1 - MAX_AGE_JITTER * random.random())  # noqa: S311
        session.telling = self._telling.setdefault(upstream.name, asyncio.Semaphore(TELL_AT_ONCE))

        async def open_link() -> Link:
            if after is not None:
                await after.wait_ended()
            return await self._open_link(upstream, fence, resume)

        session.on_opened = self._counts.resumption if resume is not None else self._counts.opening
        session.on_checked = self._counts.check
        self._sessions.add(session)
        owner = asyncio.get_running_loop().create_task(session.own(open_link, self._forget), name=f"owner-{key[:8]}")
        self._owners.add(owner)
        owner.add_done_callback(self._owners.discard)
        owner.add_done_callback(lambda _: session.orphaned(self._forget))
        return session

    async def _open_link(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        return await self._opener.open(upstream, fence, resume)

    # -- keeping house ---------------------------------------------------------------------------------------------

    def _forget(self, session: PooledSession) -> None:
        self._sessions.discard(session)
        if self._keyed.get(session.key) is session:
            del self._keyed[session.key]
        self._counts.closed[session.close_reason or "lost"] += 1
        self._lending.ended(session)
        self.on_closed(session)

    def _sweep(self) -> None:
        """Close what was idle for too long, or is too old; open what is missing."""
        for session in list(self._sessions):
            if session.state is not State.READY or session.in_flight:
                continue
            if session.is_expired:
                self._lending.perform(self._ledger.close(session, "max_age"))
            elif session.idle_s > session.upstream.idle_ttl_s and not self._lending.is_needed(session):
                self._lending.perform(self._ledger.close(session, "idle"))
        self._lending.top_up_all()
