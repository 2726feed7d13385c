"""Metrics of a worker, for all workers of its process group in one exposition.

Counters and gauges are kept by the parts themselves (`statistics()`); Prometheus' multiprocess files carry what has to
be added up across processes. The directory for them is named before this module is imported (see `supervisor.py`); a
worker alone needs none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import (
    MultiProcessCollector,
    mark_process_dead,  # pyright: ignore[reportUnknownVariableType]
)

from .guard import Guard

MULTIPROCESS_DIR: Final = "PROMETHEUS_MULTIPROC_DIR"
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

Observe = Callable[[], Iterable[tuple[str, dict[str, str], float]]]
"""Yields (metric, labels, value) of everything that is counted elsewhere."""

_NAMES: Final = {
    "calls_local": "Calls served by the worker they landed on",
    "calls_forwarded": "Calls forwarded to another worker",
    "calls_rerouted": "Forwards that did not run and were routed again",
    "calls_repeated": "Safe calls repeated after an unknown outcome",
    "exchanges_sent": "Exchanges begun as caller",
    "exchanges_answered": "Exchanges that ended with a complete response",
    "exchanges_not_run": "Exchanges that provably did not run",
    "exchanges_unknown": "Exchanges whose outcome is unknown or that broke off",
    "exchanges_abandoned": "Exchanges whose client left",
    "exchanges_executed": "Exchanges run as owner",
    "exchanges_nacked": "Requests refused as owner, by reason",
    "frames_sent": "Frames sealed for other workers",
    "frames_received": "Frames received from other workers",
    "envelopes_repeated": "Envelopes dropped as seen before",
    "envelopes_refused": "Envelopes that were not ours, damaged or forged",
    "pushes_refused": "Requests that did not get into a mailbox, by reason",
    "sessions_opened": "Sessions opened",
    "sessions_adopted": "Sessions taken over from another worker",
    "sessions_handed_off": "Sessions given up for another worker: moved, or because this one drains",
    "sessions_lost": "Sessions another worker took over",
    "sessions_refused": "Sessions refused for a limit",
    "sessions_closed": "Sessions that have ended, by reason",
    "session_loans": "Sessions lent to calls and callers",
    "session_loans_reused": "Loans of a session that was not opened for them",
    "session_waits": "Loans that had to wait for a session",
    "session_wait_seconds": "Time that callers have waited for a session",
    "health_checks": "Health checks of sessions that were idle",
    "circuits_opened": "Times that this worker opened a circuit for failures that it saw",
    "circuit_refusals": "Calls not made because a circuit was open",
    "streams_reattached": "Streams that went on at another owner: of who listens, or of a call's answer",
    "events_logged": "Events of sessions' own streams that were in the log before they were sent",
    "events_replayed": "Events sent again from the log",
    "events_not_logged": "Events sent without being in the log, because Redis was slow or away, or for their size",
    "lease_renewals": "Renewals of the worker lease",
    "lease_incarnations": "Incarnations this process has had",
}
_GAUGES: Final = {
    "sessions": "Live sessions",
    "sessions_in_flight": "Calls and streams open on live sessions",
    "sessions_idle": "Sessions that are free to be lent",
    "sessions_lent": "Sessions that are lent now",
    "callers_waiting": "Callers that wait for a session",
    "circuits_open": "Circuits that are not closed, each worker's",
    "calls_waiting": "Requests being answered",
    "redis_reachable": "Workers whose last renewal was answered",
}


class Telemetry:
    """The metrics of one worker process; one instance per process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "leasehold_requests",
            "Requests answered, by outcome",
            ["server", "method", "outcome"],
            registry=self._registry,
        )
        self._duration = Histogram(
            "leasehold_request_seconds",
            "Time from a request's first byte to the first byte of its answer",
            ["server"],
            registry=self._registry,
            buckets=BUCKETS,
        )
        self._counters = {
            name: Counter(f"leasehold_{name}", text, ["reason"], registry=self._registry)
            for name, text in _NAMES.items()
        }
        self._gauges = {
            name: Gauge(f"leasehold_{name}", text, registry=self._registry, multiprocess_mode="livesum")
            for name, text in _GAUGES.items()
        }
        self._seen: dict[tuple[str, str], float] = {}
        self.observe: Observe = tuple

    def answered(self, server: str, method: str, guard: Guard) -> None:
        """Count one request by the guard's verdict; `server` is "" for one that is not configured."""
        outcome = guard.verdict if guard.started else "abandoned"
        self._answers.labels(server, method if method in ("POST", "GET", "DELETE") else "other", outcome).inc()
        if guard.first_byte_s is not None:
            self._duration.labels(server).observe(guard.first_byte_s)

    def reattached(self, what: str) -> None:
        """Count a stream that went on at another owner."""
        self._counters["streams_reattached"].labels(what).inc()

    def collect(self) -> None:
        """Bring what the parts have counted into the metrics; called every second and before an exposition."""
        for name, labels, value in self.observe():
            if name in self._gauges:
                self._gauges[name].set(value)
                continue
            reason = labels.get("reason", "")
            before = self._seen.get((name, reason), 0.0)
            if value > before:
                self._counters[name].labels(reason).inc(value - before)
                self._seen[name, reason] = value
            elif value < before:  # a part was made anew (a new incarnation's outbox)
                self._counters[name].labels(reason).inc(value)
                self._seen[name, reason] = value

    def exposition(self) -> tuple[bytes, bytes]:
        """(body, content type) of `/metrics`."""
        self.collect()
        registry = self._registry
        if os.environ.get(MULTIPROCESS_DIR):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST.encode()


def forget_process(pid: int, *, counted: bool) -> None:
    """Called for a worker of this group that has died: what it held counts no more, what it did still does.

    Not `counted`: it ended before it did anything, and its files go altogether. One that dies at every start would
    leave thousands.
    """
    folder = os.environ.get(MULTIPROCESS_DIR)
    if not folder:
        return
    mark_process_dead(pid, folder)
    if not counted:
        for file in Path(folder).glob(f"*_{pid}.db"):
            with suppress(FileNotFoundError):
                file.unlink()
