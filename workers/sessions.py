"""The sessions this worker owns: live in the pool, registered in the directory, under the current incarnation.

Redis is hints, owners are the truth: a session that is live here under a valid lease is served without asking. When the
lease was lost, each session is re-claimed by compare-and-set before its next upstream write; whoever took it over in
the meantime keeps it, and our copy is dropped without telling the upstream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import orjson

from ..coordinator import Keyring, Member, Registration, SealError, SessionRecord, Unavailable
from ..coordinator.frames import RequestHead
from ..pool import Fenced, PooledSession, ResumeRecord, SessionPool, Upstream

logger = logging.getLogger("leasehold.workers.sessions")

RECORD_TTL: Final = 2
"""A record outlives this many times the idle time after which its session is closed."""
REFRESH_EVERY: Final = 1 / 4
"""Records are refreshed at this share of the idle time, those that were used since."""
RECLAIM_AT_ONCE: Final = 64


@dataclass(slots=True)
class Owned:
    """A session and the registration under which this worker owns it; None until the first claim."""

    session: PooledSession
    registration: Registration | None = None
    created_ms: int = 0
    refreshed_at: float = 0.0
    adopted: bool = False


class Sessions:
    """Opens, adopts, re-claims and releases; the one writer of this worker's records."""

    def __init__(self, member: Member, pool: SessionPool, keyring: Keyring, upstreams: Mapping[str, Upstream]) -> None:
        self._member = member
        self._pool = pool
        self._keyring = keyring
        self._upstreams = upstreams
        self._owned: dict[str, Owned] = {}
        self._releasing: set[asyncio.Task[None]] = set()
        self.adopted = 0
        self.lost = 0
        pool.on_closed = self._session_closed

    def __repr__(self) -> str:
        return f"<Sessions owned={len(self._owned)}>"

    def get(self, key: str) -> Owned | None:
        """The session of that key if it is owned here and can take calls."""
        owned = self._owned.get(key)
        return None if owned is None or owned.session.is_closed else owned

    def all(self) -> list[Owned]:
        return list(self._owned.values())

    def holds(self, owned: Owned) -> bool:
        """Whether an upstream write of this session may start in this turn of the loop."""
        registration = owned.registration
        return self._member.may_write() and (registration is None or registration.owner == self._member.incarnation)

    def refuse(self, head: RequestHead) -> tuple[str, Registration | None] | None:
        """Admission of a forwarded request (see `Forwarder`)."""
        owned = self.get(head.session)
        if owned is None or owned.registration is None:
            return "not_owner", None
        if owned.registration.owner != self._member.incarnation:
            return "fenced", None
        if owned.registration.epoch != head.epoch:
            return "stale", owned.registration
        return None

    async def open(self, key: str, upstream: Upstream, principal: str) -> Owned:
        """Open a session that is not yet registered. Raises what `SessionPool.open` raises."""
        return await self._open(key, upstream, principal, None)

    async def register(self, owned: Owned) -> None:
        """Write the record of a session that was initialized; only then may its id leave. Raises `Unavailable`."""
        owned.created_ms = owned.created_ms or self._member.clock.time_ms()
        record = self._record(owned)
        claimed = await self._member.directory.claim(record, self._ttl_ms(owned))
        if not claimed.won or claimed.registration is None:
            raise Unavailable("claim: the session is registered by another worker")
        owned.registration = claimed.registration
        owned.refreshed_at = asyncio.get_running_loop().time()

    async def adopt(self, record: SessionRecord) -> Owned | None:
        """Take over a session whose owner's lease has ended, and continue the same upstream session.

        None when somebody else was quicker. Raises `Unavailable`, and `SealError` for a record that cannot be
        continued.
        """
        upstream = self._upstreams.get(record.upstream)
        if upstream is None or record.resume is None:
            raise SealError("not adoptable")
        resume = self._unseal(record.key, record.resume)
        claimed = await self._member.directory.take_over(
            record.key, record.registration, self._member.incarnation, self._ttl(upstream)
        )
        if not claimed.won or claimed.registration is None:
            return None
        owned = await self._open(record.key, upstream, record.principal, resume)
        owned.registration = claimed.registration
        owned.created_ms = record.created_ms
        owned.adopted = True
        self.adopted += 1
        logger.info("session_adopted session=%s from=%s", record.key[:8], record.registration.owner[:8])
        return owned

    async def reclaim(self) -> None:
        """After a lost lease, or when Redis may have forgotten: register every session again, by compare-and-set."""
        limit = asyncio.Semaphore(RECLAIM_AT_ONCE)

        async def one(owned: Owned) -> None:
            async with limit:
                await self._reclaim_one(owned)

        async with asyncio.TaskGroup() as tasks:
            for owned in self.all():
                if owned.registration is not None and not owned.session.is_closed:
                    tasks.create_task(one(owned))

    def end(self, owned: Owned, reason: str) -> None:
        """Close a session for good. Its record goes now: a child process may take seconds to go, and until then other
        workers would take the session for one that moves.
        """
        owned.session.close(reason)
        self._session_closed(owned.session)

    async def refresh(self) -> None:
        """Extend the lifetime of records whose sessions were used since the last time (B25)."""
        now = asyncio.get_running_loop().time()
        due = [
            owned
            for owned in self._owned.values()
            if owned.registration is not None
            and now - owned.refreshed_at > owned.session.upstream.idle_ttl_s * REFRESH_EVERY
        ]
        held = [
            (owned.session.key, owned.registration, self._ttl_ms(owned))
            for owned in due
            if owned.registration is not None
        ]
        gone = set(await self._member.directory.refresh(held))
        for owned in due:
            if owned.session.key in gone:
                await self._reclaim_one(owned)
            owned.refreshed_at = now

    async def settle(self) -> None:
        """Wait until the records of closed sessions are released."""
        if self._releasing:
            await asyncio.wait(self._releasing, timeout=2.0)

    async def _open(self, key: str, upstream: Upstream, principal: str, resume: ResumeRecord | None) -> Owned:
        owned: Owned | None = None

        def fence() -> None:
            held = self._member.may_write() if owned is None else self.holds(owned)
            if not held:
                raise Fenced("this worker's lease may have ended")

        session = await self._pool.open(key, upstream, principal, fence=fence, resume=resume)
        owned = self._owned[key] = Owned(session)
        return owned

    async def _reclaim_one(self, owned: Owned) -> None:
        assert owned.registration is not None
        member, key = self._member, owned.session.key
        try:
            claimed = await member.directory.take_over(key, owned.registration, member.incarnation, self._ttl_ms(owned))
            if not claimed.won and claimed.registration is None:
                claimed = await member.directory.claim(self._record(owned), self._ttl_ms(owned))
        except Unavailable as error:
            logger.warning("session_not_reclaimed session=%s error=%s", key[:8], error)
            return
        if claimed.won and claimed.registration is not None:
            owned.registration = claimed.registration
        else:
            # Taken over while our lease was over. The new owner continues the same upstream session: leave it alone.
            self.lost += 1
            owned.session.abandon("taken_over")

    def _session_closed(self, session: PooledSession) -> None:
        owned = self._owned.get(session.key)
        if owned is None or owned.session is not session:
            return
        del self._owned[session.key]
        if owned.registration is None or session.keeps_record:
            return
        task = asyncio.ensure_future(self._release(session.key, owned.registration))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release(self, key: str, registration: Registration) -> None:
        try:
            await self._member.directory.release(key, registration)
        except Unavailable as error:
            logger.warning("session_not_released session=%s error=%s", key[:8], error)  # its TTL will

    def _record(self, owned: Owned) -> SessionRecord:
        session = owned.session
        least = owned.registration.epoch + 1 if owned.registration is not None else 0
        return SessionRecord(
            key=session.key,
            registration=Registration(self._member.incarnation, least),
            upstream=session.upstream.name,
            principal=session.principal,
            created_ms=owned.created_ms,
            resume=self._seal(session),
        )

    def _seal(self, session: PooledSession) -> bytes | None:
        resume = session.link.resume
        if resume is None:
            return None
        plain = orjson.dumps([resume.session_id, resume.protocol_version, resume.cookies])
        return self._keyring.seal_record(plain, session.key.encode())

    def _unseal(self, key: str, sealed: bytes) -> ResumeRecord:
        try:
            session_id, version, cookies = orjson.loads(self._keyring.open_record(sealed, key.encode()))
        except (ValueError, TypeError) as error:
            raise SealError("resume record") from error
        return ResumeRecord(session_id, version, cookies)

    def _ttl(self, upstream: Upstream) -> int:
        return int(upstream.idle_ttl_s * 1000 * RECORD_TTL)

    def _ttl_ms(self, owned: Owned) -> int:
        return self._ttl(owned.session.upstream)
