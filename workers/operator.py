"""What an operator does to a running fleet: `leasehold drain`, `leasehold sessions show|move|evict`.

For the time of one command this process is a member of the fleet that owns nothing: so what it asks for crosses as
everything else does, and it needs the fleet's secret.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

from ..coordinator import Keyring, PeerInfo, RedisClients, SessionRecord, Unavailable
from .control_client import ControlError, ask
from .core import WorkerCore
from .settings import Settings

ROLE: Final = "operator"
LEASE_MS: Final = 3000
LOOK_AGAIN_S: Final = 0.2


class Operator:
    """Asks workers for things. Workers and sessions are named by the beginning of what the listings show."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    async def drain(self, worker: str, wait_s: float) -> tuple[PeerInfo, dict[str, Any]]:
        """Have a worker take no more sessions and hand off those that can move; then wait up to `wait_s` until it has
        none, and nothing in flight. Returns it and its status. Raises `ControlError` and `Unavailable`."""
        peer = await self._worker(worker)
        status: dict[str, Any] = await ask(self._core.forwarder, peer.incarnation, "drain")
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while (status["sessions"] or status["in_flight"]) and loop.time() < until:
            await asyncio.sleep(LOOK_AGAIN_S)
            status = await ask(self._core.forwarder, peer.incarnation, "status")
        return peer, status

    async def show(self, session: str) -> dict[str, Any]:
        """What is known of a session: its record, and what its owner says. Raises `ControlError`, `Unavailable`."""
        record = await self._session(session)
        owner = record.registration.owner
        shown: dict[str, Any] = {
            "session": record.key,
            "server": record.upstream,
            "principal": record.principal,
            "owner": owner,
            "epoch": record.registration.epoch,
            "created_ms": record.created_ms,
            "ttl_ms": record.ttl_ms,
            "adoptable": record.resume is not None,
        }
        peer = await self._peer(owner)
        if peer is None:
            return {**shown, "state": "without an owner: the next caller's worker continues it"}
        shown |= {"host": peer.info.get("host", ""), "pid": peer.info.get("pid", 0)}
        return shown | await ask(self._core.forwarder, owner, "show", record.key)

    async def move(self, session: str, to: str | None) -> tuple[SessionRecord, str]:
        """Have another worker (any, or the one named) continue a session; returns its record and the new owner."""
        record = await self._session(session)
        target = "" if to is None else (await self._worker(to)).incarnation
        if await self._peer(record.registration.owner) is None:
            if not target:
                raise ControlError("the session has no owner: say where it is to go with --to WORKER")
            answer = await ask(self._core.forwarder, target, "adopt", record.key)
        else:
            answer = await ask(self._core.forwarder, record.registration.owner, "move", record.key, to=target)
        return record, answer["owner"]

    async def evict(self, session: str) -> SessionRecord:
        """End a session: its client is told 404, and has to initialize again; the upstream is told by its owner."""
        record = await self._session(session)
        if await self._peer(record.registration.owner) is not None:
            await ask(self._core.forwarder, record.registration.owner, "evict", record.key)
        elif not await self._core.member.directory.release(record.key, record.registration):
            raise ControlError("the session is changing hands: try again")
        return record

    async def _worker(self, name: str) -> PeerInfo:
        peers = [each for each in await self._core.member.peers() if each.info.get("role") != ROLE]
        found = [each for each in peers if each.incarnation.startswith(name.lower())]
        if len(found) != 1:
            raise ControlError(f"{name!r}: expected the beginning of one worker's name, {_are(len(found))}")
        return found[0]

    async def _peer(self, incarnation: str) -> PeerInfo | None:
        peers = await self._core.member.peers() if incarnation else []
        return next((each for each in peers if each.incarnation == incarnation), None)

    async def _session(self, name: str) -> SessionRecord:
        directory = self._core.member.directory
        if len(name) == 64 and (record := await directory.look_up(name)) is not None:
            return record
        found = {record.key: record async for record in directory.scan() if record.key.startswith(name.lower())}
        if len(found) != 1:
            raise ControlError(f"{name!r}: expected the beginning of one session's name, {_are(len(found))}")
        return found.popitem()[1]


def _are(count: int) -> str:
    return f"{count} begin so" if count else "none begins so"


@asynccontextmanager
async def operator(settings: Settings, redis: RedisClients) -> AsyncGenerator[Operator]:
    """Join the fleet for a command. Raises `Unavailable` when Redis does not answer."""
    core = WorkerCore(
        {},
        redis=redis,
        keyring=Keyring([secret.get_secret_value().encode() for secret in settings.secret]),
        namespace=settings.namespace,
        lease_ttl_ms=LEASE_MS,
        grace_s=0,
        max_body_bytes=settings.max_body_bytes,
        role=ROLE,
    )
    try:
        async with core.running():
            if not core.has_joined:
                raise Unavailable("joining the fleet: no answer")
            yield Operator(core)
    except ExceptionGroup as group:  # what was raised in the block is one of the group that a worker's life is
        only, *more = group.exceptions
        if more:
            raise
        raise only from None
