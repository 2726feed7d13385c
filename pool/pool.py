"""The pool: the live sessions of one worker, their limits, and the owner tasks that hold them. Knows no Redis."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from .errors import PoolFull
from .http_link import HttpClients, HttpLink
from .link import Fence, Link, ResumeRecord, unfenced
from .session import CLOSE_GRACE_S, CLOSE_TIMEOUT_S, PooledSession, State
from .stdio_link import StdioLink
from .upstream import HttpTarget, Upstream

logger = logging.getLogger("leasehold.pool")

K = TypeVar("K")

SWEEP_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Sessions now, and since start: opened, resumed from another owner's record, refused, closed by reason."""

    sessions: int
    in_flight: int
    opened: int
    resumed: int
    refused: int
    closed: dict[str, int]


class SessionPool:
    """Owns the sessions of this process. Run `run()` in a task; no owner task outlives it, unless its link ignores
    cancellation.

    `on_closed(session)` is called once when a session has ended, for whatever reason.
    """

    def __init__(self, *, max_sessions: int = 10_000) -> None:
        self.max_sessions = max_sessions
        self.on_closed: Callable[[PooledSession], None] = lambda _session: None
        self._clients = HttpClients()
        self._sessions: dict[str, PooledSession] = {}
        self._stateless: dict[str, HttpLink] = {}
        self._owners: set[asyncio.Task[None]] = set()
        self._is_open = False
        self._closing = asyncio.Event()
        self._opened = self._resumed = self._refused = 0
        self._closed: Counter[str] = Counter()
        # Invariant: what these count is in `_sessions`, or still closing; `open` adds, the end of the session takes.
        self._per_upstream: Counter[str] = Counter()
        self._per_principal: Counter[tuple[str, str]] = Counter()

    def __repr__(self) -> str:
        return f"<SessionPool sessions={len(self._sessions)}/{self.max_sessions}>"

    def __len__(self) -> int:
        return len(self._sessions)

    def statistics(self) -> PoolStatistics:
        in_flight = sum(session.in_flight for session in self._sessions.values())
        return PoolStatistics(
            len(self._sessions), in_flight, self._opened, self._resumed, self._refused, dict(self._closed)
        )

    def get(self, key: str) -> PooledSession | None:
        """The session of that key, if it is live here."""
        return self._sessions.get(key)

    def sessions(self) -> list[PooledSession]:
        return list(self._sessions.values())

    async def open(
        self,
        key: str,
        upstream: Upstream,
        principal: str,
        *,
        fence: Fence = unfenced,
        resume: ResumeRecord | None = None,
    ) -> PooledSession:
        """Open a session under a new key, or continue one of another owner from its `resume` record.

        Returns when the link is open: `initialize` has still to be sent through it, unless it was resumed. Raises
        `PoolFull` and `OpenFailed`. A resumed session is not refused for a limit: its user has it already.
        """
        if resume is None:
            self._check_limits(upstream, principal)
        if not self._is_open:
            raise PoolFull("the pool is closing")
        replaced = self._sessions.get(key)
        if replaced is not None:
            replaced.abandon("replaced")
        session = PooledSession(key, upstream, principal)
        self._sessions[key] = session
        self._per_upstream[upstream.name] += 1
        self._per_principal[upstream.name, principal] += 1
        owner = asyncio.get_running_loop().create_task(
            session.own(lambda: self._open_link(upstream, fence, resume), self._forget), name=f"owner-{key[:8]}"
        )
        self._owners.add(owner)
        owner.add_done_callback(self._owners.discard)
        try:
            await session.wait_open()
        except BaseException:
            session.close("open_failed")
            raise
        if resume is None:
            self._opened += 1
        else:
            self._resumed += 1
        return session

    def stateless(self, upstream: Upstream) -> HttpLink | None:
        """The link for requests that belong to no session; None where the upstream has no such thing (stdio)."""
        if not isinstance(upstream.target, HttpTarget):
            return None
        link = self._stateless.get(upstream.name)
        if link is None:
            link = self._stateless[upstream.name] = HttpLink(
                self._clients,
                upstream.target,
                call_timeout_s=upstream.call_timeout_s,
                forward_headers=upstream.forward_headers,
                stateless=True,
            )
        return link

    async def run(self) -> None:
        """End idle sessions, until `close()` or cancelled; then end all, bounded in time."""
        self._is_open = not self._closing.is_set()
        try:
            while not self._closing.is_set():
                try:
                    async with asyncio.timeout(SWEEP_EVERY_S):
                        await self._closing.wait()
                except TimeoutError:
                    self._sweep()
        finally:
            self._is_open = False
            for session in self.sessions():
                session.close("shutdown")
            if self._owners:
                _, overdue = await asyncio.wait(self._owners, timeout=CLOSE_TIMEOUT_S + 2 * CLOSE_GRACE_S)
                if overdue:
                    logger.error("owners_left_behind count=%d", len(overdue))
            await self._clients.aclose()

    def close(self) -> None:
        """Have `run()` end every session and return, at the latest after the time a link may take to close."""
        self._closing.set()

    def _check_limits(self, upstream: Upstream, principal: str) -> None:
        """Idle, active and opening sessions all count, and so do those that are closing: they still hold resources."""
        per_principal = upstream.max_sessions_per_principal
        reason = ""
        if len(self._sessions) >= self.max_sessions:
            reason = f"{self.max_sessions} sessions on this worker"
        elif self._per_upstream[upstream.name] >= upstream.max_sessions:
            reason = f"{upstream.max_sessions} sessions of {upstream.name}"
        elif per_principal is not None and self._per_principal[upstream.name, principal] >= per_principal:
            reason = f"{per_principal} sessions of {upstream.name} per principal"
        if reason:
            self._refused += 1
            raise PoolFull(f"limit reached: {reason}")

    async def _open_link(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        target = upstream.target
        if isinstance(target, HttpTarget):
            return HttpLink(
                self._clients,
                target,
                call_timeout_s=upstream.call_timeout_s,
                fence=fence,
                forward_headers=upstream.forward_headers,
                resume=resume,
            )
        return await StdioLink.open(
            target.command,
            target.args,
            target.env,
            target.cwd,
            name=upstream.name,
            fence=fence,
            call_timeout=upstream.call_timeout_s,
        )

    def _forget(self, session: PooledSession) -> None:
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
        _take_one(self._per_upstream, session.upstream.name)
        _take_one(self._per_principal, (session.upstream.name, session.principal))
        self._closed[session.close_reason or "lost"] += 1
        self.on_closed(session)

    def _sweep(self) -> None:
        for session in self.sessions():
            if session.state is State.READY and session.idle_s > session.upstream.idle_ttl_s:
                session.close("idle")


def _take_one(counter: Counter[K], key: K) -> None:
    """Count one down; what has come to nothing is forgotten, for principals come and go without end."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
