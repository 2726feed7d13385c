"""Lending: whoever wants a session gets one that is free, a new one, or the next that comes back. Performs what the
books (`ledger.py`) say: opens, grants, closes."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias

from .borrowing import Borrow, Want
from .errors import OpenFailed, PoolError, PoolFull, PoolTimeout
from .ledger import Close, Effects, Fail, Grant, Ledger, Limits, Open, Slot
from .link import Link
from .liveness import is_well
from .session import CLOSE_GRACE_S, PooledSession, State
from .statistics import Counts
from .upstream import Upstream

logger = logging.getLogger("leasehold.pool")

Waiter: TypeAlias = "asyncio.Future[PooledSession]"
_limits = lru_cache(maxsize=256)(Limits)


class Lending:
    """The lending desk of one pool. `make` makes a session of a slot for a `Want`, and begins to open it."""

    def __init__(
        self,
        make: Callable[[Want], PooledSession],
        authorize: Callable[[Link, Want], Link],
        counts: Counts,
        *,
        max_sessions: int,
        max_waiting: int,
        acquire_timeout_s: float,
    ) -> None:
        self.acquire_timeout_s = acquire_timeout_s
        self.ledger: Ledger[PooledSession, Waiter] = Ledger(max_sessions=max_sessions, max_waiting=max_waiting)
        self._make = make
        self._authorize = authorize
        self._counts = counts
        # How more of a slot are opened; the least of a slot; the one session of a slot that is shared, and its check.
        self._wants: dict[Slot, Want] = {}
        self._minimum: dict[Slot, int] = {}
        self._shared: dict[Slot, asyncio.Task[PooledSession]] = {}
        self._checks: dict[PooledSession, asyncio.Task[bool]] = {}
        self._creators: set[asyncio.Task[None]] = set()
        self._returned = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Lending {self.ledger!r} shared={len(self._shared)}>"

    # -- borrowing and returning -----------------------------------------------------------------------------------

    async def acquire(self, want: Want, *, timeout_s: float | None = None, sure: bool = False) -> Borrow:
        """See `SessionPool.acquire`."""
        session = self._take(want)
        if session is None or session.is_closed or session.is_expired or session.is_due or sure:
            session = await self._acquire(want, session, timeout_s, sure=sure)
        self._counts.loan(session)
        return Borrow(self, session, want)

    def give_back(self, borrow: Borrow, *, discard: bool) -> None:
        """What `Borrow.release` does."""
        session = borrow.session
        if borrow.is_shared:
            if discard:
                self.perform(self.ledger.close(session, "discarded"))
            elif self.ledger.is_closed and not session.in_flight:
                self.perform(self.ledger.close(session, "drained"))
        elif session.is_expired:
            self.perform(self.ledger.release(session, keep=False, reason="max_age"))
        else:
            reason = "lost" if session.is_closed else "discarded"
            self.perform(self.ledger.release(session, keep=not discard, reason=reason))
        self._returned.set()

    def authorized(self, link: Link, want: Want) -> Link:
        """A link through the flow of a caller's `auth`."""
        return self._authorize(link, want)

    async def renew(self, borrow: Borrow, lost: PooledSession, *, timeout_s: float | None = None) -> None:
        """Replace the session of a borrow that nothing was done on yet, by another one of its slot. Calls that have
        `lost` it together get one replacement. Raises what `acquire` raises, and `SessionReleased`."""
        async with borrow.renewing:
            borrow.check()
            if borrow.session is not lost:
                return
            self.perform(self.ledger.release(lost, keep=False))
            # What has ended one session may have ended the others.
            session = await self._acquire(borrow.want, None, timeout_s, sure=True)
            if borrow.is_released:  # meanwhile
                self.perform(self.ledger.release(session, keep=True))
            borrow.check()
            self._counts.loan(session)
            borrow.exchange(session)

    def prewarm(self, want: Want, minimum: int | None = None) -> None:
        """See `SessionPool.prewarm`."""
        self._know(want)
        self._minimum[want.slot] = want.upstream.min_sessions if minimum is None else minimum
        self.top_up(want.slot)
        if not self._minimum[want.slot]:
            del self._minimum[want.slot]
            self.forget(want.slot)

    async def drain(self, timeout_s: float) -> bool:
        """See `SessionPool.drain`."""
        self.stop()
        try:
            async with asyncio.timeout(timeout_s):
                while self.ledger.lent or any(session.in_flight for session in self._all_shared()):
                    self._returned.clear()
                    await self._returned.wait()
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """Lend no more, and open no more."""
        self.perform(self.ledger.drain())
        for session in self._all_shared():
            if not session.in_flight:
                self.perform(self.ledger.close(session, "drained"))

    async def aclose(self) -> None:
        """End what is still under way once all sessions have ended; bounded in time."""
        under_way: list[asyncio.Task[Any]] = [*self._creators, *self._checks.values()]
        for task in under_way:
            task.cancel()
        under_way += self._shared.values()
        if under_way:
            await asyncio.wait(under_way, timeout=CLOSE_GRACE_S)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _take(self, want: Want) -> PooledSession | None:
        slot = want.slot
        if want.affinity is None:
            return self.ledger.acquire(slot)
        if self.ledger.is_closed:
            raise PoolFull("the pool is not open")
        return self._shared_session(slot)

    async def _acquire(
        self, want: Want, session: PooledSession | None, timeout_s: float | None, *, sure: bool
    ) -> PooledSession:
        """With time and patience: wait, and check what was not heard of for a while; if it is to be `sure`, whatever
        is not new."""
        limit = self.acquire_timeout_s if timeout_s is None else timeout_s
        fault = ""
        try:
            async with asyncio.timeout(limit):
                while True:
                    if session is None:
                        session = self._take(want) or await self._wait(want)
                    try:
                        fault = await self._fault(session, want, sure=sure)
                    except BaseException:
                        self._drop(want, session, "discarded")
                        raise
                    if not fault:
                        return session
                    self._drop(want, session, fault)
                    session = None
        except TimeoutError:
            why = f" (the last one was {fault})" if fault else ""
            raise PoolTimeout(f"no session of {want.upstream.name} came free within {limit:g} s{why}") from None

    def _drop(self, want: Want, session: PooledSession, reason: str) -> None:
        if want.affinity is None:
            self.perform(self.ledger.release(session, keep=False, reason=reason))
        elif reason != "discarded":
            if self._shared_session(want.slot) is session:
                del self._shared[want.slot]
            self.perform(self.ledger.close(session, reason))

    async def _wait(self, want: Want) -> PooledSession:
        if want.affinity is None:
            return await self._queue(want)
        task = self._shared.get(want.slot)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._open_shared(want), name="leasehold-share")
            self._shared[want.slot] = task
            task.add_done_callback(lambda done: self._shared_done(want.slot, done))
        return await asyncio.shield(task)  # the opening goes on when its first caller is cancelled

    async def _open_shared(self, want: Want) -> PooledSession:
        async with asyncio.timeout(self.acquire_timeout_s):
            # One may be idle: it was opened for somebody who could not wait so long.
            session = self.ledger.acquire(want.slot) or await self._queue(want)
        self.ledger.keep_lent(session)
        return session

    def _shared_session(self, slot: Slot) -> PooledSession | None:
        task = self._shared.get(slot)
        opened = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return task.result() if task is not None and opened else None

    def _all_shared(self) -> list[PooledSession]:
        return [session for slot in self._shared if (session := self._shared_session(slot)) is not None]

    def _shared_done(self, slot: Slot, task: asyncio.Task[PooledSession]) -> None:
        failed = task.cancelled() or task.exception() is not None or task.result().is_closed
        if failed and self._shared.get(slot) is task:
            del self._shared[slot]

    async def _queue(self, want: Want) -> PooledSession:
        self._know(want)
        loop = asyncio.get_running_loop()
        waiter: Waiter = loop.create_future()
        try:
            effects = self.ledger.wait(waiter, want.slot)
        except PoolFull as full:
            raise self._counts.refusal(str(full)) from None
        began = loop.time()
        self.perform(effects)
        try:
            return await waiter
        except BaseException:
            if not self.ledger.leave(waiter) and waiter.done() and not waiter.cancelled() and not waiter.exception():
                self.perform(self.ledger.release(waiter.result(), keep=True))
            raise
        finally:
            self._counts.waited(loop.time() - began)
            self.forget(want.slot)

    def _know(self, want: Want) -> None:
        """Note the limits of a slot, and how its sessions are opened: as the last caller would."""
        self.limit(want.slot, want.upstream)
        self._wants[want.slot] = want

    def forget(self, slot: Slot) -> None:
        """What is known of a slot is of no use once it has no session and nobody waits for one."""
        if not self.ledger.is_used(slot) and slot not in self._minimum:
            self._wants.pop(slot, None)
            self.ledger.limits.pop(slot, None)

    async def _fault(self, session: PooledSession, want: Want, *, sure: bool) -> str:
        """Why a session cannot be lent; "" if it can."""
        if session.is_closed:
            return "lost"
        if session.is_expired and want.affinity is None:
            return "max_age"
        if not session.is_due and (session.is_new or not sure):
            return ""
        if want.affinity is None:
            is_well = await self._is_well(session, want)
        else:
            is_well = await asyncio.shield(self._shared_check(session, want))
        return "" if is_well else "lost" if session.is_closed else "unhealthy"

    def _shared_check(self, session: PooledSession, want: Want) -> asyncio.Task[bool]:
        """One check for all who want the same session now."""
        task = self._checks.get(session)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._check_shared(session, want), name="leasehold-check")
            self._checks[session] = task
            task.add_done_callback(lambda _: self._checks.pop(session))
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

    # -- creating --------------------------------------------------------------------------------------------------

    def perform(self, effects: Effects[PooledSession, Waiter], failure: PoolError | None = None) -> None:
        """Do what the books say; `failure` is why an opening failed."""
        pending = deque(effects)
        while pending:
            match pending.popleft():
                case Grant(waiter, session):
                    if waiter.done():  # cancelled in this very turn of the loop, maybe with all the others
                        pending.extend(self.ledger.release(session, keep=True))
                    else:
                        waiter.set_result(session)
                case Open(slot):
                    creator = asyncio.get_running_loop().create_task(self._create(slot), name="leasehold-create")
                    self._creators.add(creator)
                    creator.add_done_callback(partial(self._created, slot))
                case Fail(waiter):
                    if not waiter.done():
                        waiter.set_exception(failure or PoolFull("the pool is closing"))
                        waiter.exception()  # retrieved: who waited may have been cancelled in this very turn
                case Close(session, reason):
                    session.close(reason)

    async def _create(self, slot: Slot) -> None:
        """Open one session for whoever waits longest, if still somebody does."""
        if not self.ledger.is_wanted(slot, self._minimum.get(slot, 0)):
            self.perform(self.ledger.open_forgone(slot))
            self.forget(slot)
            return
        session: PooledSession | None = None
        try:
            session = self._make(self._wants[slot])
            await session.wait_open()
            if session.state is State.CLOSED:
                raise OpenFailed("the session ended as it was opened")
        except (Exception, asyncio.CancelledError) as error:  # cancelled: the pool is closing
            if session is not None:
                session.close("open_failed")
            if not isinstance(error, PoolError | asyncio.CancelledError):
                logger.exception("create_failed upstream=%s", slot.upstream)
            failure = error if isinstance(error, PoolError) else OpenFailed(f"cannot open: {type(error).__name__}")
            left = session if session is not None and session.state is not State.CLOSED else None
            self.perform(self.ledger.open_failed(slot, left), failure)
            self.forget(slot)
            return
        effects = self.ledger.opened(session, slot)
        session.is_new = any(isinstance(effect, Grant) for effect in effects)
        self.perform(effects)

    def _created(self, slot: Slot, creator: asyncio.Task[None]) -> None:
        self._creators.discard(creator)
        if creator.cancelled():  # before it began
            self.perform(self.ledger.open_forgone(slot))
            self.forget(slot)

    # -- keeping house ---------------------------------------------------------------------------------------------

    def limit(self, slot: Slot, upstream: Upstream) -> None:
        """Note the limits of a slot."""
        self.ledger.limits[slot] = _limits(upstream.max_sessions, upstream.max_sessions_per_principal)

    def ended(self, session: PooledSession) -> None:
        """Nothing is left of a session."""
        slot = self.ledger.slot_of(session)
        self.perform(self.ledger.ended(session))
        self._returned.set()
        if slot is None:
            return
        if self._shared_session(slot) is session:
            del self._shared[slot]
        self.top_up(slot)
        self.forget(slot)

    def top_up(self, slot: Slot) -> None:
        """Open what is missing of a slot."""
        minimum = self._minimum.get(slot)
        if minimum is not None:
            self.perform(self.ledger.top_up(slot, minimum))

    def top_up_all(self) -> None:
        """Open what is missing anywhere."""
        for slot in list(self._minimum):
            self.top_up(slot)

    def is_needed(self, session: PooledSession) -> bool:
        """Whether a session is one of the least number of its slot."""
        slot = self.ledger.slot_of(session)
        return slot is not None and slot in self._minimum and self.ledger.sessions_of(slot) <= self._minimum[slot]
