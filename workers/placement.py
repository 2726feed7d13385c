"""Where sessions go that this worker gives up, or does not take: to other workers of its kind.

New sessions stay on the worker they come to. Moved are those that an operator moves, those that a draining worker is
asked for, and, where `rebalance` is set, a few idle ones a minute from a worker that has more than its share.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Final

from ..coordinator import Member, PeerInfo, Registration, Unavailable
from ..coordinator.single_flight import SingleFlight
from .control_client import ControlError, ask
from .forwarder import Forwarder
from .owned import Opens, Owned
from .sessions import Sessions

logger = logging.getLogger("leasehold.workers.placement")

PEERS_FOR_S: Final = 1.0
"""For how long a list of the other workers is used."""
TRIES: Final = 3
"""Workers that are asked to take a session, one after the other."""
HOLD_S: Final = 2.0
"""How long callers wait at most for a session that is moved."""
SLACK: Final = 1.1
"""A worker that has up to this many times its share keeps what it has."""
IDLE_S: Final = 5.0
"""Only sessions that were not used for so long are moved to balance."""


class Placement:
    """Finds other workers for one worker's sessions."""

    def __init__(self, member: Member, sessions: Sessions, forwarder: Forwarder, role: str) -> None:
        """`role`: which workers are of this one's kind."""
        self._member = member
        self._sessions = sessions
        self._forwarder = forwarder
        self._role = role

        async def listed(_: str) -> list[PeerInfo]:
            return await member.peers()

        self._listed = SingleFlight(listed)  # a scan of all keys
        self._peers: list[str] = []
        self._peers_at = float("-inf")

    async def move(self, owned: Owned, to: str = "") -> Registration:
        """Have another worker (its incarnation; any, if "") continue a session that is owned here.

        Raises `ControlError`: then whoever is asked for it next continues it. Raises `Unavailable`.
        """
        key = owned.session.key
        peers = [to] if to else await self._others()
        if not peers:
            raise ControlError("there is no other worker")
        if to == self._member.incarnation:
            raise ControlError("the session is there already")
        async with self._sessions.leaving(owned) as left:
            if not left:
                raise ControlError("the session is changing hands")
            try:
                async with asyncio.timeout(HOLD_S):
                    registration = await self._first(peers, "adopt", key)
            except TimeoutError:
                registration = None
        if registration is None:
            record = await self._member.directory.look_up(key)
            if record is None or not record.registration.owner:
                raise ControlError("no worker took it: the one it is asked for next will")
            registration = record.registration
        return registration

    async def adopted(self, key: str) -> Registration | None:
        """Have another worker continue a session that was handed off; None where none does. Raises `Unavailable`."""
        return await self._first(await self._others(), "adopt", key)

    async def opened(self, key: str, opens: Opens) -> Registration | None:
        """Have another worker open a shared session; None where none does. Raises `Unavailable`."""
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in opens.headers]
        about: dict[str, Any] = {
            "upstream": opens.upstream.name,
            "principal": opens.principal,
            "params": opens.params,
            "headers": headers,
        }
        return await self._first(await self._others(), "open", key, **about)

    async def rebalance(self, per_minute: int) -> None:
        """Forever: once a minute, move up to so many idle sessions to the worker that has fewest."""
        while True:
            await asyncio.sleep(60 * random.uniform(0.9, 1.1))  # noqa: S311
            try:
                await self.rebalance_once(per_minute)
            except (ControlError, Unavailable) as error:
                logger.info("not_rebalanced error=%s", error)

    async def rebalance_once(self, most: int) -> int:
        """Move idle sessions until this worker has its share, at most so many; how many were moved."""
        own = len(self._sessions.all())
        found = {peer: await ask(self._forwarder, peer, "status") for peer in await self._others()}
        loads: dict[str, int] = {peer: told["sessions"] for peer, told in found.items() if not told["draining"]}
        if not loads or self._sessions.draining:
            return 0
        share = (own + sum(loads.values())) / (len(loads) + 1)
        if own <= share * SLACK + 1:
            return 0
        idle = [each for each in self._sessions.all() if each.session.resume and each.session.idle_s > IDLE_S]
        idle.sort(key=lambda each: each.session.idle_s, reverse=True)
        moved = 0
        for owned in idle[: min(most, int(own - share))]:
            to = min(loads, key=lambda peer: loads[peer])
            if loads[to] + 1 > share or self._sessions.get(owned.session.key) is not owned:
                break
            await self.move(owned, to)
            loads[to] += 1
            moved += 1
        logger.info("rebalanced moved=%d sessions=%d share=%.1f", moved, own, share)
        return moved

    async def _first(self, peers: list[str], operation: str, key: str, **about: Any) -> Registration | None:
        for peer in random.sample(peers, min(TRIES, len(peers))):
            try:
                answer = await ask(self._forwarder, peer, operation, key, **about)
            except ControlError as error:
                logger.info("not_placed session=%s error=%s", key[:8], error)
            else:
                return Registration(answer["owner"], answer["epoch"])
        return None

    async def _others(self) -> list[str]:
        now = asyncio.get_running_loop().time()
        if now - self._peers_at > PEERS_FOR_S:
            found = await self._listed("")
            self._peers = [each.incarnation for each in found if each.info.get("role") == self._role]
            self._peers_at = now
        return [peer for peer in self._peers if peer != self._member.incarnation]
