"""What workers know of each other: who lives, who said that it ended, and what a worker hears of the others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import orjson
from redis.asyncio import Redis

from .channel import Receipt
from .client import scan_hashes, translated
from .cluster import Cluster
from .frames import Frame
from .keys import Keys
from .outbox import MAILBOX_TTL_MS


class Fate(Enum):
    """What is known of another worker."""

    ALIVE = "alive"
    ENDED = "ended"
    """It ended, on its own or its supervisor's word."""
    ABSENT = "absent"
    """It has no lease; what that means, see `Member.absence_counts`."""


def end_lease(keys: Keys, incarnation: str) -> list[tuple[str | int, ...]]:
    """The commands that end a lease at once. Incarnations are random: a worker's successor can never be hit.

    The mark is evidence where the mere absence of a lease is none yet: whoever sees it need not wait.
    """
    return [
        ("DEL", keys.lease(incarnation)),
        ("SET", keys.ended(incarnation), 1, "PX", MAILBOX_TTL_MS),
    ]


class Listener(Protocol):
    """Who acts on what a member learns. All but `joined` are called from the reader and must not wait."""

    async def joined(self, incarnation: str, *, again: bool) -> None:
        """A new incarnation has its lease; `again` when an earlier one was lost: sessions have to be re-claimed.

        Called in a task of its own, and again after a pause when it raises `Unavailable`; frames may arrive before it
        returns. Cancelled when that incarnation ends.
        """
        ...

    def lost(self, incarnation: str) -> None:
        """The lease ended: exchanges of this incarnation cannot go on."""
        ...

    def redis_changed(self) -> None:
        """Another Redis node answers: records may have gone, owners publish theirs again."""
        ...

    def rotated(self) -> None:
        """Frames to us may have been lost, and whatever was not has been delivered: ask after what is still open."""
        ...

    def frame(self, sender: str, frame: Frame) -> None:
        """A frame from another worker."""
        ...

    def receipt(self, sender: str, receipt: Receipt) -> None:
        """What a receiver says did arrive."""
        ...

    def peer_down(self, peer: str, unread: frozenset[int]) -> None:
        """A watched peer's lease ended; `unread` are the counters of our envelopes that it had not read."""
        ...


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A worker as others see it; for listings."""

    incarnation: str
    generation: int
    lease_ms: int
    info: dict[str, Any]


async def list_peers(client: Redis | Cluster, keys: Keys) -> list[PeerInfo]:
    """All workers with a lease, by incarnation. Raises `Unavailable`."""
    found: dict[str, PeerInfo] = {}
    async with translated("listing workers"):
        async for page in scan_hashes(client, keys.leases):
            for name, fields, ttl_ms in page:
                if b"gen" in fields and ttl_ms > 0:
                    incarnation = keys.incarnation_of(name)
                    info = orjson.loads(fields.get(b"info", b"{}"))
                    found[incarnation] = PeerInfo(incarnation, int(fields[b"gen"]), ttl_ms, info)
    return [found[incarnation] for incarnation in sorted(found)]
