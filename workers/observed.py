"""What the parts of a worker have counted, as metrics: the one source of `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator

from .core import WorkerCore


def observed(core: WorkerCore, waiting: int) -> Iterator[tuple[str, dict[str, str], float]]:
    """(metric, labels, value) of everything; `waiting` is the number of requests being answered."""
    forwarder, pool, affinity = core.forwarder.statistics, core.pool.statistics(), core.affinity
    yield "calls_local", {}, affinity.local
    yield "calls_forwarded", {}, affinity.forwarded
    yield "calls_rerouted", {}, affinity.rerouted
    yield "calls_repeated", {}, affinity.repeated
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
    yield "sessions_adopted", {}, core.sessions.adopted
    yield "sessions_lost", {}, core.sessions.lost
    yield "sessions_refused", {}, pool.refused
    yield "lease_renewals", {}, core.member.renewals
    yield "lease_incarnations", {}, core.member.incarnations
    yield "sessions", {}, pool.sessions
    yield "sessions_in_flight", {}, pool.in_flight
    yield "calls_waiting", {}, waiting
    yield "redis_reachable", {}, float(core.member.reachable)
