"""What clients asked and were told, and what the upstream did: the journals of one run, all on one clock.

Times are seconds of the driver's monotonic clock: clients, upstream and faults live in one process.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import orjson

DRIVER = "driver"
"""The name of pauses of the driver itself: in them it sees no answer, whoever gives it."""

SHARED = "shared of "
"""How the name of a home begins whose session is not one client's own."""

Outcome = Literal["ok", "error", "not_run", "gone", "unknown", "lost"]
"""`gone`: 404, not run, and the client has to initialize again. `lost`: the client's own connection died after the
request was sent. `error`: anything that is neither an answer nor an honest outcome."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer says of itself, in the upstream's words."""

    request: str
    principal: str
    session: str
    counter: int


@dataclass(slots=True)
class Call:
    """One attempt of one client. `id` is never used twice; the upstream notes it."""

    id: str
    client: str
    principal: str
    home: str
    """Whose counter it is about: of a client's session, or of all that a principal has on a shared one."""
    edge: str
    """The worker that it was sent to; "" when none took it."""
    method: str
    """`initialize`, or the tool or method that was called."""
    counts: bool
    """Whether it adds to the counter; else it only reads it."""
    safe: bool
    """Whether it may be run more than once."""
    sent: float
    deadline: float
    ended: float | None = None
    outcome: Outcome | None = None
    rpc_id: Any = None
    """JSON-RPC id of the answer."""
    told: Told | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Execution:
    """One request that reached the upstream, with whose credentials, in whose session."""

    id: str
    at: float
    session: str
    opened_by: str
    """The principal that initialized the session."""
    principal: str
    counter: int
    method: str


@dataclass(frozen=True, slots=True)
class Opening:
    """A session that the upstream opened. `home` is "" but for servers whose sessions are shared."""

    session: str
    principal: str
    home: str
    at: float


@dataclass(frozen=True, slots=True)
class Ending:
    """A session that the upstream was told to end."""

    session: str
    at: float


@dataclass(slots=True)
class Span:
    """A time in which something was so: a fault, or a worker that could not run. Open while `end` is None."""

    name: str
    begin: float
    end: float | None = None

    def overlap(self, begin: float, end: float) -> float:
        """Seconds that it shares with [begin, end]."""
        return max(0.0, min(end, end if self.end is None else self.end) - max(begin, self.begin))


@dataclass(frozen=True, slots=True)
class Recovery:
    """How long after the end of a fault everything served again; None when it did not."""

    fault: str
    at: float
    seconds: float | None
    limit: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure that has a limit: the sessions opened for one cold key, the memory an answer took."""

    what: str
    at: float
    value: float
    limit: float


@dataclass
class History:
    """The journals. Lists are in order of time, but for calls, which are in the order they were sent."""

    calls: list[Call] = field(default_factory=list[Call])
    executions: list[Execution] = field(default_factory=list[Execution])
    openings: list[Opening] = field(default_factory=list[Opening])
    endings: list[Ending] = field(default_factory=list[Ending])
    closed: dict[str, float] = field(default_factory=dict[str, float])
    """When a client gave up a home itself, by home: what comes after is its own doing."""
    pauses: list[Span] = field(default_factory=list[Span])
    """Workers that could not run: what was sent to them has that much more time."""
    faults: list[Span] = field(default_factory=list[Span])
    recoveries: list[Recovery] = field(default_factory=list[Recovery])
    measured: list[Measured] = field(default_factory=list[Measured])

    @contextmanager
    def fault(self, name: str) -> Generator[Span]:
        span = Span(name, monotonic())
        self.faults.append(span)
        try:
            yield span
        finally:
            span.end = monotonic()

    @contextmanager
    def pause(self, worker: str) -> Generator[Span]:
        """For as long as the block lasts, `worker` cannot answer."""
        span = Span(worker, monotonic())
        self.pauses.append(span)
        try:
            yield span
        finally:
            span.end = monotonic()

    def fault_at(self, at: float) -> str:
        """The fault that began last before `at`."""
        before = [span for span in self.faults if span.begin <= at]
        return before[-1].name if before else "no fault yet"

    def write(self, path: Path) -> None:
        """JSON lines: kind and record."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for kind in ("faults", "pauses", "openings", "calls", "executions", "endings", "recoveries", "measured"):
                for record in getattr(self, kind):
                    file.write(orjson.dumps({"kind": kind, **asdict(record)}) + b"\n")
