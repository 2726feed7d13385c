"""The health of upstreams, fleet-wide: which circuits are open, who may probe, and failures that many workers share.

One hash holds the upstreams in trouble, as a rule none. A worker exchanges what it knows for what the fleet knows: one
command and one round trip a second, and one more at once when something changed, however many upstreams and calls there
are. Within a second every worker knows of an opening or closing; of all that ask to probe one gets leave, for
`LEAVE_MS` at a time. All times are taken and compared on the Redis node.

What is kept here are hints. When it is lost or out of reach, workers go by what they see themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from redis.asyncio import Redis

from . import scripts
from .client import Argument, translated
from .cluster import Cluster
from .errors import Unavailable
from .keys import Keys

LEAVE_MS: Final = 5_000
"""Leave to probe, renewed with every exchange while the probe is under way."""
WINDOW_MS: Final = 10_000
FLEET_THRESHOLD: Final = 10
"""Failures of all workers within the window, and no success since, that open a circuit."""
OPEN_MS: Final = 1_000
"""For how long it opens then."""
TELL_MS: Final = 120_000
"""How long a closing is told: longer than any opening lasts, so that who missed it has probed himself."""
MEMORY_MS: Final = 300_000
"""How long an open circuit is remembered that nobody probes."""
MOST_CIRCUITS: Final = 500
"""So many upstreams in trouble are shared; that bounds what an exchange costs."""


class Report(Protocol):
    """What a worker has to say of an upstream."""

    @property
    def kind(self) -> str:
        """`opened` for `open_s`, the `openings`th in a row; `closed`; new `failures`, or a success, that its own
        breaker did not act on: `failed`, `succeeded`; or `probe`: it wants to make the probe, or needs more time."""
        ...

    @property
    def upstream(self) -> str: ...
    @property
    def open_s(self) -> float: ...
    @property
    def age_s(self) -> float:
        """`probe`: since when it is open for this worker."""
        ...

    @property
    def openings(self) -> int: ...
    @property
    def failures(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Circuit:
    """What the fleet knows of an upstream."""

    upstream: str
    state: str
    """`open`, `closed` (a while ago), or `failing`: neither, but failures are counted."""
    age_s: float
    remaining_s: float
    """`open`: seconds until a probe is due, 0 when it is."""
    openings: int
    """In a row."""
    probe_s: float
    """Seconds for which somebody has leave to probe; 0 when nobody has."""
    mine: bool
    """Whether that is the worker that asks."""
    failures: int


class UpstreamHealth:
    """The shared half of all circuit breakers. Every method raises `Unavailable` when Redis does not answer."""

    def __init__(self, client: Redis | Cluster, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def exchange(self, worker: str, reports: Iterable[Report]) -> list[Circuit]:
        """Tell what `worker` (its incarnation) has to say, in order; returns all circuits of upstreams in trouble."""
        if not worker:
            raise Unavailable("circuits: not joined yet")
        return await self._run(worker, [argument for report in reports for argument in _arguments(report)])

    async def circuits(self) -> list[Circuit]:
        """All circuits, for listings."""
        return await self._run("-", [])

    async def _run(self, worker: str, reports: list[Argument]) -> list[Circuit]:
        settings = (LEAVE_MS, WINDOW_MS, FLEET_THRESHOLD, OPEN_MS, TELL_MS, MEMORY_MS, MOST_CIRCUITS)
        async with translated("circuits"):
            answer: list[list[Any]] = await scripts.CIRCUITS_EXCHANGE.run(
                self._client, [self._keys.circuits], [worker, *settings, *reports]
            )
        return [_circuit(*entry) for entry in answer]


def _arguments(report: Report) -> tuple[Argument, Argument, Argument, Argument]:
    upstream = report.upstream.encode("utf-8", "surrogatepass")
    if report.kind == "opened":
        return report.kind, upstream, _ms(report.open_s), report.openings
    if report.kind == "probe":
        return report.kind, upstream, _ms(report.age_s), report.openings
    return report.kind, upstream, report.failures, 0


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _circuit(
    upstream: bytes,
    state: bytes,
    age_ms: int,
    remaining_ms: int,
    openings: int,
    probe_ms: int,
    mine: int,
    failures: int,
) -> Circuit:
    return Circuit(
        # Where the bytes are no text, they name no upstream of anybody's.
        upstream.decode("utf-8", "replace"),
        state.decode(),
        age_ms / 1000,
        remaining_ms / 1000,
        openings,
        probe_ms / 1000,
        mine == 1,
        failures,
    )
