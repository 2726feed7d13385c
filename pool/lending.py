"""Lending: whoever wants a session gets one that is free, a new one, or the next that comes back. Performs what the
books (`ledger.py`) say: opens, grants, closes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias

from .backoff import Backoff
from .borrowing import Borrow, Want
from .checks import Checks
from .effects import Close, Effects, Fail, Grant, Limits, Open, Slot
from .errors import OpenFailed, PoolError, PoolFull, PoolTimeout
from .ledger import Ledger
from .link import Link
from .session import CLOSE_GRACE_S, PooledSession, State
from .statistics import Counts
from .tally import take_one
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
        # How more of a slot are opened; the least of a slot, and when to try; the one session of a slot that is
        # shared, and how many are about to have it.
        self._wants: dict[Slot, Want] = {}
        self._minimum: dict[Slot, int] = {}
        self._backoff: dict[Slot, Backoff] = {}
        self._shared: dict[Slot, asyncio.Task[PooledSession]] = {}
        self._sharers: Counter[Slot] = Counter()
        self._checks = Checks(authorize)
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
        self._lend(session, want)
        return Borrow(self, session, want)

    def give_back(self, borrow: Borrow, *, discard: bool) -> None:
        """What `Borrow.release` does."""
        session = borrow.session
        if borrow.is_shared:
            if discard:
                self.perform(self.ledger.close(session, "discarded"))
            elif not session.in_flight:
                closed = self.ledger.is_closed
                self.perform(self.ledger.close(session, "drained") if closed else self.ledger.spare(session))
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
        """Replace the session of a borrow by another one of its slot: nothing was done on it yet, or others share it.
        Calls that have `lost` it together get one replacement. Raises what `acquire` raises, and `SessionReleased`."""
        async with borrow.renewing:
            borrow.check()
            if borrow.session is not lost:
                return
            self.perform(self.ledger.release(lost, keep=False))
            # What has ended one session may have ended the others.
            session = await self._acquire(borrow.want, None, timeout_s, sure=not borrow.is_shared)
            if borrow.is_released:  # meanwhile
                self.perform(self.ledger.release(session, keep=True))
                self._unused(borrow.want.slot)
            borrow.check()
            self._lend(session, borrow.want)
            borrow.exchange(session)

    def prewarm(self, want: Want, minimum: int | None = None) -> None:
        """See `SessionPool.prewarm`."""
        self._know(want)
        self._minimum[want.slot] = want.upstream.min_sessions if minimum is None else minimum
        self._backoff.pop(want.slot, None)
        self.top_up(want.slot)
        if not self._minimum[want.slot]:
            del self._minimum[want.slot]
            self.forget(want.slot)

    async def drain(self, timeout_s: float) -> bool:
        """See `SessionPool.drain`."""
        self.stop()
        shared = self._all_shared()  # none is lent any more, so one that nobody has stays so
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    while shared and not shared[-1].in_flight:
                        shared.pop()
                    if not shared and not self.ledger.lent:
                        break
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
        under_way: list[asyncio.Task[Any]] = [*self._creators, *self._checks.under_way()]
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
        self.ledger.check_open()
        return self._shared_session(slot)

    def _lend(self, session: PooledSession, want: Want) -> None:
        self._counts.loan(session)
        if want.affinity is not None:
            self.ledger.hold(session)

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
                        fault = await self._checks.fault(session, want, sure=sure)
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
        elif reason == "discarded":
            self._unused(want.slot)
        else:
            if self._shared_session(want.slot) is session:
                del self._shared[want.slot]
            self.perform(self.ledger.close(session, reason))

    async def _wait(self, want: Want) -> PooledSession:
        if want.affinity is None:
            return await self._queue(want)
        slot = want.slot
        task = self._shared.get(slot)
        if task is not None:
            try:
                self.ledger.join()
            except PoolFull as full:
                raise self._counts.refusal(str(full)) from None
        joined = task is not None
        if task is None:
            task = asyncio.get_running_loop().create_task(self._open_shared(want), name="leasehold-share")
            self._shared[slot] = task
            task.add_done_callback(lambda done: self._shared_done(slot, done))
        self._sharers[slot] += 1
        try:
            return await asyncio.shield(task)  # the opening goes on when its first caller is cancelled
        except BaseException:
            asyncio.get_running_loop().call_soon(self._unused, slot)
            raise
        finally:
            take_one(self._sharers, slot)
            if joined:
                self.ledger.part()

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

    def _unused(self, slot: Slot) -> None:
        """Who was about to have the shared session of a slot has gone: it may be that nobody has it."""
        session = self._shared_session(slot)
        if session is not None and not session.in_flight and not self._sharers[slot]:
            self.perform(self.ledger.spare(session))

    def _shared_done(self, slot: Slot, task: asyncio.Task[PooledSession]) -> None:
        failed = task.cancelled() or task.exception() is not None or task.result().is_closed
        if failed and self._shared.get(slot) is task:
            del self._shared[slot]
        if not failed and not self._sharers[slot]:  # all who wanted it have gone
            self._unused(slot)

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
            self._backoff.pop(slot, None)
            self.ledger.limits.pop(slot, None)

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
            self._failed(slot)
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
        if session.close_reason in ("lost", "open_failed"):
            self._failed(slot, session.age_s)
        self.top_up(slot)
        self.forget(slot)

    def top_up(self, slot: Slot) -> None:
        """Open what is missing of a slot."""
        minimum = self._minimum.get(slot)
        backoff = self._backoff.get(slot)
        if minimum is not None and not (backoff is not None and backoff.remaining_s):
            self.perform(self.ledger.top_up(slot, minimum))

    def top_up_all(self) -> None:
        """Open what is missing anywhere."""
        for slot in list(self._minimum):
            self.top_up(slot)

    def _failed(self, slot: Slot, lived_s: float = 0.0) -> None:
        """A session of a slot could not be opened, or was lost: what is kept ready is not opened anew at once."""
        if slot in self._minimum:
            self._backoff.setdefault(slot, Backoff()).failed(lived_s)

    def is_needed(self, session: PooledSession) -> bool:
        """Whether a session is one of the least number of its slot."""
        slot = self.ledger.slot_of(session)
        return slot is not None and slot in self._minimum and self.ledger.sessions_of(slot) <= self._minimum[slot]
