"""Whether a session may be lent now: one check for all who want the same one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .borrowing import Want
from .link import Link
from .liveness import is_well
from .session import PooledSession


class Checks:
    """The checks of one pool."""

    def __init__(self, authorize: Callable[[Link, Want], Link]) -> None:
        self._authorize = authorize
        self._tasks: dict[PooledSession, asyncio.Task[bool]] = {}

    def __repr__(self) -> str:
        return f"<Checks under_way={len(self._tasks)}>"

    def under_way(self) -> list[asyncio.Task[bool]]:
        """Those of shared sessions."""
        return list(self._tasks.values())

    async def fault(self, session: PooledSession, want: Want, *, sure: bool) -> str:
        """Why a session cannot be lent; "" if it can."""
        if session.is_closed:
            return "lost"
        if session.is_expired and want.affinity is None:
            return "max_age"
        if not session.is_due and (session.is_new or not sure):
            return ""
        if want.affinity is None:
            well = await self._is_well(session, want)
        else:
            well = await asyncio.shield(self._shared_check(session, want))
        return "" if well else "lost" if session.is_closed else "unhealthy"

    def _shared_check(self, session: PooledSession, want: Want) -> asyncio.Task[bool]:
        task = self._tasks.get(session)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._check_shared(session, want), name="leasehold-check")
            self._tasks[session] = task
            task.add_done_callback(lambda _: self._tasks.pop(session))
        return task

    async def _check_shared(self, session: PooledSession, want: Want) -> bool:
        try:
            return await self._is_well(session, want)
        except asyncio.CancelledError:  # the pool is closing; nobody who waits for this was cancelled
            return False

    async def _is_well(self, session: PooledSession, want: Want) -> bool:
        if want.auth is None:
            return await is_well(session, want.headers)
        return await is_well(session, want.headers, lambda link: self._authorize(link, want))
