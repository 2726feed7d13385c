"""The directory: which worker owns which session, under which epoch.

A record is claimed when the session opens, taken over when its owner's lease has ended, and deleted when the session
ends. Each change names the registration it replaces (owner and epoch), so that of any number of concurrent claims one
wins, and each makes the epoch larger. A lost answer is no riddle: the record says whether the change happened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from . import scripts
from .client import Argument, execute, scan_hashes, translated
from .cluster import Cluster
from .keys import Keys
from .scripts import Call, Script


@dataclass(frozen=True, slots=True)
class Registration:
    """Who owns a session, and since which epoch. Two registrations are the same if both are.

    No owner (""): handed off, for whoever is asked for the session next.
    """

    owner: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """All that Redis knows of a session. `resume` is sealed; None means that the session cannot move."""

    key: str
    registration: Registration
    upstream: str
    principal: str
    created_ms: int
    resume: bytes | None
    ttl_ms: int = 0


@dataclass(frozen=True, slots=True)
class Claimed:
    """The result of a claim or takeover: the registration that stands now, and whether it is the caller's."""

    won: bool
    registration: Registration | None


class Directory:
    """Session records in Redis. Every method raises `Unavailable` when Redis does not answer."""

    def __init__(self, client: Redis | Cluster, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def claim(self, record: SessionRecord, ttl_ms: int) -> Claimed:
        """Register a session that is not registered; `record.registration.epoch` is the least epoch to get."""
        async with translated("claim"):
            answer = await scripts.SESSION_CLAIM.run(self._client, *self._claim(record, ttl_ms))
        return _claimed(answer, record.registration.owner)

    async def claim_all(self, records: Sequence[tuple[SessionRecord, int]]) -> list[Claimed]:
        """`claim` for many, in one round trip (to each node): (record, ttl_ms) each."""
        answers = await self._run_all(scripts.SESSION_CLAIM, [self._claim(*entry) for entry in records])
        return [
            _claimed(answer, record.registration.owner) for (record, _), answer in zip(records, answers, strict=True)
        ]

    async def take_over(self, key: str, seen: Registration, owner: str, ttl_ms: int) -> Claimed:
        """Replace the registration `seen` by `owner`'s."""
        async with translated("takeover"):
            answer = await scripts.SESSION_TAKEOVER.run(self._client, *self._take_over(key, seen, owner, ttl_ms))
        return _claimed(answer, owner)

    async def take_over_all(self, seen: Sequence[tuple[str, Registration, int]], owner: str) -> list[Claimed]:
        """`take_over` for many, in one round trip: (key, registration, ttl_ms) each."""
        calls = [self._take_over(key, registration, owner, ttl_ms) for key, registration, ttl_ms in seen]
        return [_claimed(answer, owner) for answer in await self._run_all(scripts.SESSION_TAKEOVER, calls)]

    async def release(self, key: str, held: Registration) -> bool:
        """Delete the registration if it is still `held`."""
        async with translated("release"):
            answer = await scripts.SESSION_RELEASE.run(
                self._client, [self._keys.session(key)], [held.owner, held.epoch]
            )
        return answer == 1

    async def hand_off(self, held: Sequence[tuple[str, Registration]]) -> None:
        """Give up many registrations that are still held, and keep their records: the next owner need not wait."""
        calls: list[Call] = [
            ([self._keys.session(key)], [registration.owner, registration.epoch]) for key, registration in held
        ]
        await self._run_all(scripts.SESSION_HAND_OFF, calls)

    async def refresh(
        self, held: Iterable[tuple[str, Registration, int]], resumes: Mapping[str, bytes] | None = None
    ) -> list[str]:
        """Extend the lifetime of many sessions in one round trip: (key, registration, ttl_ms) each.

        `resumes` are the resume records that have changed, by key. Returns the keys whose registration is gone or
        another's.
        """
        batch = list(held)
        changed = resumes or {}
        calls: list[Call] = [
            (
                [self._keys.session(key)],
                [registration.owner, registration.epoch, ttl_ms, changed.get(key, b"")],
            )
            for key, registration, ttl_ms in batch
        ]
        answers = await self._run_all(scripts.SESSION_REFRESH, calls)
        return [key for (key, _, _), answer in zip(batch, answers, strict=True) if answer != 1]

    async def look_up(self, key: str) -> SessionRecord | None:
        """The record of a session, or None. None is no proof at once: see `Member.absence_counts`."""
        async with translated("look-up"):
            fields: Mapping[bytes, bytes] = await execute(self._client, "HGETALL", self._keys.session(key))
        return _record(key, fields)

    async def scan(self) -> AsyncGenerator[SessionRecord, None]:
        """All records, in no order, some perhaps twice (SCAN); for listings."""
        found = scan_hashes(self._client, self._keys.sessions)
        while True:
            # Nothing is yielded inside `translated`: a consumer's own failures are none of Redis.
            async with translated("listing sessions"):
                page = await anext(found, None)
            if page is None:
                return
            for name, fields, ttl_ms in page:
                record = _record(self._keys.session_of(name), fields, max(0, ttl_ms))
                if record is not None:
                    yield record

    def _claim(self, record: SessionRecord, ttl_ms: int) -> Call:
        registration = record.registration
        return [self._keys.session(record.key)], [registration.owner, registration.epoch, ttl_ms, *_flat(record)]

    def _take_over(self, key: str, seen: Registration, owner: str, ttl_ms: int) -> Call:
        return [self._keys.session(key)], [seen.owner, seen.epoch, owner, ttl_ms]

    async def _run_all(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        if not calls:
            return []
        async with translated(script.name):
            return await script.run_all(self._client, calls)


def _flat(record: SessionRecord) -> list[Argument]:
    fields: dict[str, Argument] = {
        "upstream": record.upstream,
        "principal": record.principal,
        "created_ms": record.created_ms,
    }
    if record.resume is not None:
        fields["resume"] = record.resume
    return [item for pair in fields.items() for item in pair]


def _claimed(answer: tuple[int, bytes, bytes], claimant: str) -> Claimed:
    won, owner, epoch = answer
    registration = Registration(owner.decode(), int(epoch)) if owner else None
    # The claimant's own registration under "not won" is its earlier claim whose answer was lost.
    return Claimed(won == 1 or owner.decode() == claimant, registration)


def _record(key: str, fields: Mapping[bytes, bytes], ttl_ms: int = 0) -> SessionRecord | None:
    if b"owner" not in fields:
        return None
    return SessionRecord(
        key=key,
        registration=Registration(fields[b"owner"].decode(), int(fields[b"epoch"])),
        upstream=fields.get(b"upstream", b"").decode(),
        principal=fields.get(b"principal", b"").decode(),
        created_ms=int(fields.get(b"created_ms", b"0")),
        resume=fields.get(b"resume"),
        ttl_ms=ttl_ms,
    )
