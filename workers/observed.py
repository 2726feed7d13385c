"""What the parts of a worker have counted, as metrics: the one source of `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator

from ..pool.breaker import BreakerState
from .core import WorkerCore


def observed(core: WorkerCore, waiting: int) -> Iterator[tuple[str, dict[str, str], float]]:
    """(metric, labels, value) of everything; `waiting` is the number of requests being answered."""
    worker = core.statistics()
    forwarder, pool = worker.forwarder, worker.pool
    yield "calls_local", {}, worker.calls_local
    yield "calls_forwarded", {}, worker.calls_forwarded
    yield "calls_rerouted", {}, worker.calls_rerouted
    yield "calls_repeated", {}, worker.calls_repeated
    yield "exchanges_sent", {}, forwarder.sent
    yield "exchanges_answered", {}, forwarder.answered
    yield "exchanges_not_run", {}, forwarder.not_run
    yield "exchanges_unknown", {}, forwarder.unknown
    yield "exchanges_abandoned", {}, forwarder.abandoned
    yield "exchanges_executed", {}, forwarder.executed
    for reason, count in forwarder.nacked.items():
        yield "exchanges_nacked", {"reason": reason}, count
    if core.member.incarnation:
        outbox, inbox = core.member.outbox.statistics(), core.member.inbox.statistics
        yield "frames_sent", {}, outbox.frames
        yield "frames_received", {}, inbox.frames
        yield "envelopes_repeated", {}, inbox.repeated
        yield "envelopes_refused", {}, inbox.refused
        for reason, count in outbox.refused.items():
            yield "pushes_refused", {"reason": reason}, count
    yield "sessions_opened", {}, pool.opened
    yield "sessions_adopted", {}, worker.sessions_adopted
    yield "sessions_handed_off", {}, worker.sessions_handed_off
    yield "sessions_lost", {}, worker.sessions_lost
    yield "sessions_refused", {}, pool.refused
    for reason, count in pool.closed.items():
        yield "sessions_closed", {"reason": reason}, count
    yield "session_loans", {}, pool.loans
    yield "session_loans_reused", {}, pool.reused
    yield "session_waits", {}, pool.waits
    yield "session_wait_seconds", {}, pool.wait_s
    yield "health_checks", {}, pool.health_checks
    circuits = pool.breakers.upstreams.values()
    yield "circuits_opened", {}, sum(circuit.opened for circuit in circuits)
    yield "circuit_refusals", {}, sum(circuit.refused for circuit in circuits)
    yield "circuits_open", {}, sum(circuit.state is not BreakerState.CLOSED for circuit in circuits)
    yield "sessions_idle", {}, pool.idle
    yield "sessions_lent", {}, pool.lent
    yield "callers_waiting", {}, pool.waiting
    events = core.member.events.statistics
    yield "events_logged", {}, events.logged
    yield "events_replayed", {}, events.replayed
    yield "events_not_logged", {}, events.not_logged
    yield "lease_renewals", {}, core.member.renewals
    yield "lease_incarnations", {}, worker.incarnations
    yield "sessions", {}, pool.sessions
    yield "sessions_in_flight", {}, pool.in_flight
    yield "calls_waiting", {}, waiting
    yield "redis_reachable", {}, float(worker.redis_reachable)
