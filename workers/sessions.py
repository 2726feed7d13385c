"""The sessions this worker owns: live in the pool, registered in the directory, under the current incarnation.

Redis is hints, owners are the truth: a session that is live here under a valid lease is served without asking. What the
directory says is brought in line by `reconcile`, again and again until it succeeds: sessions whose registration is of
an earlier incarnation, or that a Redis node may have forgotten, are re-claimed by compare-and-set before their next
upstream write; whoever took one over in the meantime keeps it, and our copy is dropped without telling the upstream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from ..coordinator import Claimed, Keyring, Member, Registration, SealError, SessionRecord, Unavailable
from ..coordinator.frames import RequestHead
from ..pool import Fenced, PooledSession, PoolError, ResumeRecord, SessionPool, Upstream
from ..pool.session import Handshake
from .owned import Opens, Owned, open_resume, seal_resume

logger = logging.getLogger("leasehold.workers.sessions")

T = TypeVar("T")

RECORD_TTL: Final = 2
"""A record outlives this many times the idle time after which its session is closed."""
REFRESH_EVERY: Final = 1 / 4
"""Records are refreshed at this share of the idle time."""
BATCH: Final = 256
"""Records written in one round trip."""


class Sessions:
    """Opens, adopts, re-claims and releases; the one writer of this worker's records."""

    def __init__(self, member: Member, pool: SessionPool, keyring: Keyring, upstreams: Mapping[str, Upstream]) -> None:
        self._member = member
        self._pool = pool
        self._keyring = keyring
        self._upstreams = upstreams
        self._owned: dict[str, Owned] = {}
        self._reconciling = asyncio.Lock()
        self._unreleased: dict[str, Registration] = {}
        """Records that are to go: of sessions that have ended, and of claims whose answer was lost (epoch 0)."""
        self._leaving: dict[str, Owned] = {}
        """Given up here, and still to be handed off in the directory."""
        self._returning: dict[str, Registration] = {}
        """Adopted in the directory and not here (epoch 0: perhaps): to be handed off, for whoever is asked next."""
        self._held: set[str] = set()
        """Keys of sessions that are being moved: who asks for them waits."""
        self._adopting: set[str] = set()
        self._claiming: set[str] = set()
        """Keys of shared sessions whose claim is under way: what is written under them is not to be released."""
        self.due = asyncio.Event()
        """Set when something should be reconciled now rather than at the next turn."""
        self.draining = False
        self.adopted = self.handed_off = self.lost = 0
        pool.on_closed = self._forget

    def __repr__(self) -> str:
        return f"<Sessions owned={len(self._owned)} unreleased={len(self._unreleased)}>"

    def get(self, key: str) -> Owned | None:
        """The session of that key if it is owned here and can take calls."""
        owned = self._owned.get(key)
        return None if owned is None or owned.session.is_closed else owned

    def has_ended(self, record: SessionRecord) -> bool:
        """Whether this is the record of a session that has ended here, and is to go."""
        return record.key not in self._owned and self._unreleased.get(record.key) == record.registration

    def all(self) -> list[Owned]:
        return list(self._owned.values())

    def is_leaving(self, key: str) -> bool:
        """Whether a session is on its way from here to another owner: who asks for it waits a moment."""
        return key in self._leaving or key in self._held

    def holds(self, owned: Owned) -> bool:
        """Whether an upstream write of this session may start in this turn of the loop."""
        registration = owned.registration
        if owned.has_left:
            return False
        if registration is None:
            return True  # nobody else knows of it yet
        return self._member.may_write() and registration.owner == self._member.incarnation

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
        key = owned.session.key
        owned.created_ms = owned.created_ms or self._member.clock.time_ms()
        record = self._record(owned)
        self.doubt(key)
        claimed = await self._member.directory.claim(record, self._ttl_ms(owned))
        self._unreleased.pop(key, None)
        if not claimed.won or claimed.registration is None:
            raise Unavailable("claim: the session is registered by another worker")
        if self._owned.get(key) is not owned:  # its link died meanwhile
            self._unreleased[key] = claimed.registration
            self.due.set()
            raise Unavailable("claim: the session ended while it was registered")
        self._note(owned, claimed.registration)

    async def open_shared(self, key: str, opens: Opens) -> Owned | None:
        """Claim a shared session and begin to open it; None when another worker was quicker.

        The claim comes first: of any number of first callers on any workers, one opens a session upstream. Who comes
        meanwhile waits for it here. Raises `Unavailable` and `PoolFull`.
        """
        if self.draining:
            raise Unavailable("this worker takes no more sessions")
        upstream, member = opens.upstream, self._member
        created_ms = member.clock.time_ms()
        registration = Registration(member.incarnation, 0)
        record = SessionRecord(key, registration, upstream.name, opens.principal, created_ms, None)
        await self._release_one(key)  # of the one before, where that has just ended here
        self.doubt(key)
        self._claiming.add(key)
        try:
            claimed = await member.directory.claim(record, self._ttl(upstream))
        finally:
            self._claiming.discard(key)
        self._unreleased.pop(key, None)
        if not claimed.won or claimed.registration is None:
            return None
        if self.draining:  # since it was claimed
            await member.directory.release(key, claimed.registration)
            raise Unavailable("this worker takes no more sessions")

        handshake = self._pool.handshake(upstream, opens.principal, opens.params, opens.headers)
        try:
            owned = self._begin(key, upstream, opens.principal, handshake=handshake)
        except PoolError:
            self._unreleased[key] = claimed.registration
            self.due.set()
            raise
        owned.created_ms = created_ms
        self._note(owned, claimed.registration)
        return owned

    async def opened(self, owned: Owned) -> None:
        """Wait for a shared session that is being opened, and have its resume record written. Raises `PoolError`."""
        await owned.session.wait_open()
        if owned.sealed != owned.session.resume:
            self.due.set()

    def doubt(self, key: str) -> None:
        """A record may come to stand in our name without our knowing: it is to go, unless its session is owned."""
        self._unreleased[key] = Registration(self._member.incarnation, 0)

    async def adopt(self, record: SessionRecord) -> Owned | None:
        """`_adopt`, once at a time for each session."""
        self._adopting.add(record.key)
        try:
            return await self._adopt(record)
        finally:
            self._adopting.discard(record.key)
            if record.key in self._returning:
                self.due.set()

    async def _adopt(self, record: SessionRecord) -> Owned | None:
        """Take over a session whose owner's lease has ended, and continue the same upstream session.

        None when somebody else was quicker. Raises `Unavailable`, and `SealError` for a record that cannot be
        continued.
        """
        upstream = self._upstreams.get(record.upstream)
        if upstream is None or record.resume is None:
            raise SealError("not adoptable")
        if self.draining:
            raise Unavailable("this worker takes no more sessions")
        key, incarnation = record.key, self._member.incarnation
        resume = open_resume(self._keyring, key, record.resume)
        # Whatever becomes of this, a record in our name that is in nobody's books would turn every caller away.
        self._returning[key] = Registration(incarnation, 0)
        claimed = await self._member.directory.take_over(key, record.registration, incarnation, self._ttl(upstream))
        if not claimed.won or claimed.registration is None:
            self._returning.pop(key, None)
            return None
        self._returning[key] = claimed.registration
        owned = await self._open(key, upstream, record.principal, resume)
        self._returning.pop(key, None)
        owned.created_ms = record.created_ms
        owned.adopted_at = asyncio.get_running_loop().time()
        self._note(owned, claimed.registration)
        self.adopted += 1
        logger.info("session_adopted session=%s from=%s", record.key[:8], record.registration.owner[:8])
        return owned

    async def reconcile(self) -> None:
        """Bring the directory in line with what is owned here: re-claim, refresh, release. Raises `Unavailable`."""
        async with self._reconciling:
            for owned in self.all():
                if owned.session.is_closed:  # its child process may take seconds to go, its record need not
                    self._forget(owned.session)
            await self._hand_over()
            for batch in _batches(self._to_claim()):
                await self._reclaim(batch)
            for batch in _batches(self._to_refresh()):
                await self._refresh(batch)
            await self._release_ended()

    def end(self, owned: Owned, reason: str) -> None:
        """Close a session for good. Its record goes now: a child process may take seconds to go, and until then other
        workers would take the session for one that moves.
        """
        owned.session.close(reason)
        self._forget(owned.session)

    async def hand_off(self) -> None:
        """Take no more sessions, and give up every one that can move, so that the next caller's worker adopts it.
        Calls that run go on here. Raises `Unavailable`; `reconcile` then goes on."""
        self.draining = True
        async with self._reconciling:
            count = await self._hand_over()
        logger.info("sessions_handed_off count=%d", count)
        if self._leaving:
            raise Unavailable("hand-off: Redis is out of reach")

    @asynccontextmanager
    async def leaving(self, owned: Owned) -> AsyncGenerator[bool, None]:
        """Give one session up; inside the block it is handed off, and who asks for it here waits.

        Yields whether it was: not if it has ended, or is changing hands already. Raises `Unavailable`.
        """
        key = owned.session.key
        if self._owned.get(key) is not owned or owned.registration is None:
            yield False
            return
        self._held.add(key)
        try:
            self._leave(owned)
            async with self._reconciling:
                await self._hand_over()
            if key in self._leaving:
                raise Unavailable("hand-off: Redis is out of reach")
            yield True
        finally:
            self._held.discard(key)

    def _leave(self, owned: Owned) -> None:
        """No upstream write of the session starts here from this turn on; calls that run go on to their answers."""
        del self._owned[owned.session.key]
        self._leaving[owned.session.key] = owned
        owned.has_left = True
        owned.session.abandon("handed_off")

    async def _hand_over(self) -> int:
        """Hand off in the directory what has left; when draining, whatever can leave."""
        if self.draining:
            for owned in self.all():
                if owned.registration is not None and owned.session.resume is not None and self._reaches(owned):
                    self._leave(owned)
        # What is out of reach would hold up the others.
        leaving = [owned for owned in self._leaving.values() if self._reaches(owned)]
        for batch in _batches(leaving):
            await self._refresh(batch)  # the last cookies go along
            await self._write_again([owned for owned in batch if owned.node == 0])
            held = [(owned.session.key, owned.registration) for owned in batch if owned.registration is not None]
            await self._member.directory.hand_off(held)
            self.handed_off += len(batch)
            for owned in batch:
                if self._leaving.get(owned.session.key) is owned:
                    del self._leaving[owned.session.key]
        await self._give_back()
        return len(leaving)

    def _reaches(self, owned: Owned) -> bool:
        return self._member.record_node(owned.session.key) is not None

    async def _write_again(self, lost: Sequence[Owned]) -> None:
        """Write records that Redis has lost, of sessions that are leaving. Where there is another one by now, it
        stands."""
        if lost:
            written = await self._member.directory.claim_all([(self._record(o), self._ttl_ms(o)) for o in lost])
            for owned, result in zip(lost, written, strict=True):
                if result.won:
                    owned.registration = result.registration

    async def _give_back(self) -> None:
        """Hand off what was adopted in the directory and could not be opened here."""
        for key, registration in list(self._returning.items()):
            if key in self._owned or key in self._adopting:
                continue
            if registration.epoch == 0:
                record = await self._member.directory.look_up(key)
                ours = record is not None and record.registration.owner == registration.owner
                found = record.registration if record is not None and ours else None
            else:
                found = registration
            if found is not None:
                await self._member.directory.hand_off([(key, found)])
            if self._returning.get(key) is registration:
                del self._returning[key]

    async def settle(self) -> None:
        """Release what has ended, before the worker stops."""
        try:
            await self._release_ended()
        except Unavailable as error:
            logger.warning("sessions_not_released count=%d error=%s", len(self._unreleased), error)  # their TTL will

    # -- keeping records -------------------------------------------------------------------------------------------

    def _to_claim(self) -> list[Owned]:
        """What is registered under an earlier incarnation, or where it may have been forgotten. Not what is out of
        reach: it would hold up the others."""
        incarnation = self._member.incarnation
        found: list[Owned] = []
        for owned in self._owned.values():
            registration = owned.registration
            if registration is None or owned.session.is_closed:
                continue
            node = self._member.record_node(owned.session.key)
            if node is not None and (registration.owner != incarnation or node != owned.node):
                found.append(owned)
        return found

    def _to_refresh(self) -> list[Owned]:
        now = asyncio.get_running_loop().time()
        return [
            owned
            for owned in self._owned.values()
            if owned.registration is not None
            and not owned.session.is_closed
            and (
                now - owned.refreshed_at > owned.session.upstream.idle_ttl_s * REFRESH_EVERY
                or owned.sealed != owned.session.resume
            )
        ]

    async def _reclaim(self, batch: Sequence[Owned]) -> None:
        """Take our own registrations over, under this incarnation; write again what Redis has lost."""
        directory, incarnation = self._member.directory, self._member.incarnation
        seen = [(o.session.key, o.registration, self._ttl_ms(o)) for o in batch if o.registration is not None]
        claimed = await directory.take_over_all(seen, incarnation)
        gone = [o for o, result in zip(batch, claimed, strict=True) if not result.won and result.registration is None]
        for owned, result in zip(batch, claimed, strict=True):
            if owned not in gone:
                self._settle_claim(owned, result)
        # A pinned session whose record went from a node that had it was ended by another worker, its client was told.
        ended = [o for o in gone if o.session.resume is None and o.node == self._member.record_node(o.session.key)]
        for owned in ended:
            owned.session.close("released")
        lost = [o for o in gone if o not in ended and not o.session.is_closed]
        results = await directory.claim_all([(self._record(o), self._ttl_ms(o)) for o in lost])
        for owned, result in zip(lost, results, strict=True):
            self._settle_claim(owned, result)

    def _settle_claim(self, owned: Owned, result: Claimed) -> None:
        if result.won and result.registration is not None:
            self._note(owned, result.registration)
        else:
            # Taken over while our lease was over. The new owner continues the same upstream session: leave it alone.
            self.lost += 1
            logger.info("session_lost session=%s", owned.session.key[:8])
            owned.session.abandon("taken_over")

    async def _refresh(self, batch: Sequence[Owned]) -> None:
        now = asyncio.get_running_loop().time()
        held = [(o.session.key, o.registration, self._ttl_ms(o)) for o in batch if o.registration is not None]
        changed: dict[str, bytes] = {}
        resumes = {owned.session.key: owned.session.resume for owned in batch}
        for owned in batch:
            resume = resumes[owned.session.key]
            if resume is not None and resume != owned.sealed:
                changed[owned.session.key] = seal_resume(self._keyring, owned.session.key, resume)
        gone = set(await self._member.directory.refresh(held, changed))
        for owned in batch:
            if owned.session.key in gone:
                owned.node = 0  # claimed again in the next round
            else:
                owned.refreshed_at = now
                owned.sealed = resumes[owned.session.key]

    async def _release_ended(self) -> None:
        for key in list(self._unreleased):
            await self._release_one(key)

    def _is_to_go(self, key: str, registration: Registration) -> bool:
        claimed_anew = key in self._owned or key in self._claiming
        return self._unreleased.get(key) is registration and not claimed_anew

    async def _release_one(self, key: str) -> None:
        registration = self._unreleased.get(key)
        if registration is None or not self._is_to_go(key, registration):
            return
        directory = self._member.directory
        if registration.epoch == 0:  # a claim whose answer was lost: whatever stands in that name is ours
            record = await directory.look_up(key)
            # Unless it was claimed once more since: then it stands for a session that lives.
            ours = record is not None and record.registration.owner == registration.owner
            if record is not None and ours and self._is_to_go(key, registration):
                await directory.release(key, record.registration)
        else:
            await directory.release(key, registration)
        if self._unreleased.get(key) is registration:
            del self._unreleased[key]

    def _note(self, owned: Owned, registration: Registration) -> None:
        owned.registration = registration
        key = owned.session.key
        if self._owned.get(key) is not owned and key not in self._owned and key not in self._leaving:
            self._unreleased[key] = registration  # it has ended meanwhile
            self.due.set()
        owned.node = self._member.record_node(owned.session.key) or 0
        owned.sealed = owned.session.resume
        owned.refreshed_at = asyncio.get_running_loop().time()

    def _forget(self, session: PooledSession) -> None:
        owned = self._owned.get(session.key)
        if owned is None or owned.session is not session:
            return
        del self._owned[session.key]
        if owned.registration is not None and not session.keeps_record:
            self._unreleased[session.key] = owned.registration
            self.due.set()

    # -- opening and records ---------------------------------------------------------------------------------------

    async def _open(self, key: str, upstream: Upstream, principal: str, resume: ResumeRecord | None) -> Owned:
        owned = self._begin(key, upstream, principal, resume=resume)
        try:
            await owned.session.wait_open()
        except BaseException:
            owned.session.close("open_failed")
            raise
        return owned

    def _begin(
        self,
        key: str,
        upstream: Upstream,
        principal: str,
        *,
        resume: ResumeRecord | None = None,
        handshake: Handshake | None = None,
    ) -> Owned:
        owned: Owned | None = None

        def fence() -> None:
            held = self._member.may_write() if owned is None else self.holds(owned)
            if not held:
                raise Fenced("this worker's lease may have ended")

        session = self._pool.begin(key, upstream, principal, fence=fence, resume=resume, handshake=handshake)
        owned = self._owned[key] = Owned(session)
        return owned

    def _record(self, owned: Owned) -> SessionRecord:
        session = owned.session
        least = owned.registration.epoch + 1 if owned.registration is not None else 0
        resume = session.resume
        return SessionRecord(
            key=session.key,
            registration=Registration(self._member.incarnation, least),
            upstream=session.upstream.name,
            principal=session.principal,
            created_ms=owned.created_ms,
            resume=None if resume is None else seal_resume(self._keyring, session.key, resume),
        )

    def _ttl(self, upstream: Upstream) -> int:
        return int(upstream.idle_ttl_s * 1000 * RECORD_TTL)

    def _ttl_ms(self, owned: Owned) -> int:
        return self._ttl(owned.session.upstream)


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
