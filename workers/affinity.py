"""Affinity: every request of a session reaches the session's owner, wherever the request landed.

    owned here, lease valid     -> served, without a Redis command
    owner known                 -> forwarded: one push each way
    owner unknown               -> looked up
    owner's lease has ended     -> taken over, and the same upstream session continued; pinned sessions end (404)
    no record                   -> 404, once absence is evidence; until then waited for, then 503
                                   (a session that is shared: opened here, by whoever claims it first)

A call that provably did not run is routed again, a bounded number of times. One that may have run is repeated only if
it is safe.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from ..coordinator import Fate, Member, Registration, SealError, SessionRecord, Unavailable
from ..pool import Message, PoolError
from ..pool.jsonrpc import RequestId
from ..pool.safety import is_safe_call
from .answers import JSON, Refused, outcome_body, session_not_found, turned_away, unavailable
from .asgi import Receive, Scope, Send, respond
from .errors import NotRun, OutcomeUnknown
from .exchange import REPEAT
from .forwarder import Forwarder
from .guard import Guard
from .owned import Opens, Owned
from .placement import Placement
from .sessions import Sessions

logger = logging.getLogger("leasehold.workers.affinity")

OWNER: Final = "leasehold.owner"
"""Scope key under which the incarnation that serves a request is noted, for whoever wants to show it."""

MAX_ROUTES: Final = 8
"""How often one request is routed before its caller is told to come back."""
BACKOFF_S: Final = (0.02, 0.2)
HOLD_MARGIN_S: Final = 0.5
"""A request waits this much longer than a lease for what may only be late: by then it is there, or its absence is
evidence."""
LOOK_AGAIN_S: Final = 0.05
MAX_ROUTES_KEPT: Final = 100_000


@dataclass(slots=True)
class Call:
    """One request of a session, read and checked. `message` is None for GET and DELETE."""

    key: str
    scope: Scope
    message: Message | None
    body: bytes
    safe: bool
    opens: Opens | None = None
    """How its session is opened where there is none: sessions that are shared begin with the first call for them."""

    @property
    def id(self) -> RequestId | None:
        """Of a request, for the answer to it; a client's response has the id of somebody else's request."""
        return self.message.id if self.message is not None and self.message.kind == "request" else None


Serve = Callable[[Owned, Call, Receive, Send], Awaitable[None]]
"""Runs a call on a session owned here."""


class Affinity:
    """Routes calls. Keeps a bounded cache of owners: a wrong entry costs a NACK, never a wrong execution."""

    def __init__(
        self, member: Member, sessions: Sessions, forwarder: Forwarder, placement: Placement, serve: Serve
    ) -> None:
        self._member = member
        self._sessions = sessions
        self._forwarder = forwarder
        self._placement = placement
        self._serve = serve
        self._routes: dict[str, Registration] = {}
        self._resolving: dict[str, asyncio.Task[Owned | Registration | None]] = {}
        self.local = self.forwarded = self.rerouted = self.repeated = 0

    async def dispatch(self, call: Call, receive: Receive, guard: Guard) -> None:
        """Answer a call. Raises `Refused`, `Disconnected`, and `BrokenOff` when an answer had begun."""
        try:
            await self._dispatch(call, receive, guard)
        except Refused as refusal:
            if REPEAT in call.scope and refusal.data == {"outcome": "not_run"}:
                refusal.data = {"outcome": "unknown"}  # an earlier try may have run
            raise

    async def _dispatch(self, call: Call, receive: Receive, guard: Guard) -> None:
        delay, longest = BACKOFF_S
        for attempt in range(MAX_ROUTES):
            if attempt > 1:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
                delay = min(longest, delay * 2)
            where = self._sessions.get(call.key) or self._routes.get(call.key) or await self._resolve(call)
            if isinstance(where, Owned):
                if not self._sessions.holds(where):
                    await self._wait_held(where, call)
                self.local += 1
                call.scope[OWNER] = self._member.incarnation
                try:
                    await self._serve(where, call, receive, guard.send)
                except NotRun as refusal:
                    self.rerouted += 1
                    logger.debug("not_run session=%s reason=%s", call.key[:8], refusal.reason)
                    continue
                return
            try:
                self.forwarded += 1
                call.scope[OWNER] = where.owner
                await self._forwarder.forward(where, call.key, call.scope, call.body, receive, guard.send)
                return
            except NotRun as refusal:
                self.rerouted += 1
                self._reroute(call.key, where, refusal)
            except OutcomeUnknown as unknown:
                self._routes.pop(call.key, None)
                if not call.safe or call.scope["method"] == "DELETE":
                    await self._tell_unknown(call, unknown, guard)
                    return
                self.repeated += 1
                call.scope[REPEAT] = True
            except Unavailable as error:
                raise unavailable(
                    "Redis does not answer: sessions of other workers cannot be reached", call.id
                ) from error
        raise unavailable("The session is moving between workers", call.id)

    async def _tell_unknown(self, call: Call, unknown: OutcomeUnknown, guard: Guard) -> None:
        if call.message is None or call.message.kind != "request":
            raise unavailable(str(unknown), call.id, "unknown") from unknown
        await respond(guard.send, 200, outcome_body(f"The call may have run: {unknown}", "unknown", call.id), JSON)

    def _reroute(self, key: str, tried: Registration, refusal: NotRun) -> None:
        logger.debug("not_run session=%s reason=%s", key[:8], refusal.reason)
        if refusal.reason == "busy":
            return
        if self._routes.get(key) == tried:
            del self._routes[key]
        if refusal.owner is not None and refusal.owner != tried:
            self._routes[key] = refusal.owner

    async def _wait_held(self, owned: Owned, call: Call) -> None:
        """Our lease ended: wait a moment for the new one and the re-claim, or until another owner has the session."""
        until = asyncio.get_running_loop().time() + self._member.lease_ttl_s + HOLD_MARGIN_S
        while not (owned.session.is_closed or self._sessions.holds(owned)):
            if not self._member.reachable or asyncio.get_running_loop().time() > until:
                raise unavailable("This worker's lease has ended; Redis does not answer", call.id)
            await asyncio.sleep(0.02)

    # -- finding the owner -----------------------------------------------------------------------------------------

    async def locate(self, key: str, opens: Opens | None = None) -> Owned | Registration | None:
        """Who owns a session now: this worker, if it has adopted or (`opens`) begun it, where nobody did. None: there
        is no such session. At most one look-up per session is under way. Raises `Unavailable` and `PoolError`."""
        task = self._resolving.get(key)
        if task is None:
            task = asyncio.ensure_future(self._find(key, opens))
            self._resolving[key] = task
            task.add_done_callback(lambda done: self._resolved(key, done))
        return await asyncio.shield(task)

    async def _resolve(self, call: Call) -> Owned | Registration:
        """`locate`, for an answer to the client. Raises `Refused`."""
        try:
            found = await self.locate(call.key, call.opens)
        except Unavailable as error:
            raise unavailable("Redis does not answer: the session's owner cannot be found", call.id) from error
        except PoolError as error:
            raise turned_away(error, call.id) from error
        if found is None:
            raise session_not_found(call.id)
        return found

    def _resolved(self, key: str, task: asyncio.Task[Owned | Registration | None]) -> None:
        self._resolving.pop(key, None)
        if not task.cancelled():
            task.exception()  # retrieved: who asked may have left

    async def _find(self, key: str, opens: Opens | None) -> Owned | Registration | None:
        until = asyncio.get_running_loop().time() + self._member.lease_ttl_s + HOLD_MARGIN_S
        while True:
            owned = self._sessions.get(key)
            if owned is not None:
                return owned
            found = _Absent(None) if self._sessions.is_leaving(key) else await self._look(key)
            if not isinstance(found, _Absent):
                return found
            if not self._sessions.is_leaving(key) and await self._member.believes_absence(
                key, found.record, certain=found.certain
            ):
                decided = await self._absent(found.record)
                if decided is None and opens is not None:
                    decided = await self._open(key, opens)
                if not isinstance(decided, _Absent):
                    return decided
            if asyncio.get_running_loop().time() > until:
                raise Unavailable("absence is not evidence yet")
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _open(self, key: str, opens: Opens) -> Owned | Registration | _Absent | None:
        """Begin a shared session: here, or, when this worker takes no more, at another."""
        if self._sessions.draining:
            return await self._placement.opened(key, opens) or _Absent(None)
        return await self._sessions.open_shared(key, opens) or await self._look(key)

    async def _look(self, key: str) -> Owned | Registration | _Absent:
        member = self._member
        record = await member.directory.look_up(key)
        if record is None:
            return _Absent(None)
        owner = record.registration.owner
        if not owner:
            return _Absent(record, certain=True)  # handed off
        if owner == member.incarnation:
            # Ours by the record, not live here: it has just ended, and its record is about to go.
            if self._sessions.has_ended(record):
                return _Absent(None, certain=True)
            return self._sessions.get(key) or _Absent(record)
        fate = await member.fate(owner)
        if fate is not Fate.ALIVE:
            return _Absent(record, certain=fate is Fate.ENDED)
        if len(self._routes) >= MAX_ROUTES_KEPT:
            self._routes.clear()
        self._routes[key] = record.registration
        return record.registration

    async def _absent(self, record: SessionRecord | None) -> Owned | Registration | _Absent | None:
        """No record, or a record whose owner is dead, on evidence. `_Absent` when it changed meanwhile: look again."""
        if record is None:
            return None
        if record.resume is None:
            if not await self._member.directory.release(record.key, record.registration):
                return await self._look(record.key)
            logger.info("pinned_session_ended session=%s", record.key[:8])
            return None
        if self._sessions.draining:
            return await self._placement.adopted(record.key) or await self._look(record.key)
        try:
            adopted = await self._sessions.adopt(record)
        except SealError:
            logger.warning("record_refused session=%s", record.key[:8])
            return None
        return adopted or await self._look(record.key)


@dataclass(frozen=True, slots=True)
class _Absent:
    """No record, or one whose owner has no lease; `certain` when the owner ended, or handed it off, on its own word."""

    record: SessionRecord | None
    certain: bool = False


def is_safe(message: Message | None, idempotent_tools: frozenset[str]) -> bool:
    """Whether a call may be repeated when its outcome is unknown. GET (None) may: it only listens."""
    if message is None:
        return True
    return message.kind == "request" and is_safe_call(message.method or "", message.params, idempotent_tools)
