"""What must hold of a simulated fleet: at every instant, at every write upstream, and of each call at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calls import CallRecord
    from .process import Process
    from .upstream import Execution, SimLink
    from .world import World

CALL_LIMIT_S = 45.0
"""By then every call has its outcome, whatever fails meanwhile: the 30 s for which a request may wait in a mailbox, the
upstream's timeout, and the time in which a death is known."""


class Violation(AssertionError):
    """Raised when a guarantee was broken; says which, when, and by what."""


class Checker:
    """Watches a world. Every method raises `Violation`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._epochs: dict[str, int] = {}
        self._leases: dict[str, float] = {}
        """Until when each incarnation has had a lease, in true time."""
        self.ran: dict[str, int] = {}
        """How often each check found something to check."""

    def fail(self, what: str) -> None:
        """Tell of a violation. The world ends with it, also where this is raised to somebody who swallows it."""
        self._world.problem(what)
        raise Violation(what)

    def _count(self, check: str) -> None:
        self.ran[check] = self.ran.get(check, 0) + 1

    # -- as it happens ---------------------------------------------------------------------------------------------

    def script_ran(self, name: str, keys: list[bytes], args: list[bytes], answer: Any) -> None:
        """B27: with each change of owner the epoch grows."""
        world = self._world
        if name in ("lease_acquire", "lease_renew"):
            if answer[0]:
                incarnation = keys[0].decode().partition("{w:")[2].partition("}")[0]
                self._leases[incarnation] = world.now + int(args[0]) / 1000
        elif name in ("session_claim", "session_takeover") and answer[0]:
            key, epoch = keys[0].decode(), int(answer[2])
            world.note("registered", key[-8:], answer[1].decode()[:8], epoch)
            before = self._epochs.get(key, 0)
            self._epochs[key] = max(epoch, before)
            self._count("epoch")
            if epoch <= before:
                self.fail(f"epoch {epoch} of session {key[-8:]} follows {before}")

    def owners(self) -> None:
        """No key has two owners that may both write."""
        world = self._world
        held: dict[str, Process] = {}
        for process in world.processes:
            if not process.is_alive or process.core is None:
                continue
            with world.as_seen_by(process):
                for owned in process.core.sessions.all():
                    registration = owned.registration
                    if registration is None or owned.session.is_closed:
                        continue
                    key = owned.session.key
                    link = process.pool.links.get(key)
                    if link is not None:
                        link.epoch = max(link.epoch, registration.epoch)
                    if not process.core.sessions.holds(owned):
                        continue
                    other = held.setdefault(key, process)
                    self._count("owner")
                    if other is not process:
                        self.fail(f"session {key[:8]} is owned by {other.name} and {process.name} at once")

    def wrote(self, process: Process, link: SimLink, method: str) -> None:
        """B28: no write upstream starts after the fence, nor under an epoch after a larger one was used."""
        world = self._world
        world.note("write", process.name, link.key[:8], method)
        if not link.epoch or world.is_over:
            return
        self._count("write")
        assert process.core is not None
        until = self._leases.get(process.core.member.incarnation, 0.0)
        if world.now > until:
            late_s = world.now - until
            self.fail(f"{process.name} wrote {method} to {link.session_id} {late_s:.3f} s after its lease had ended")
        session = world.upstream.sessions.get(link.session_id or "")
        if session is None:
            return
        if link.epoch < session.epoch:
            self.fail(
                f"{process.name} wrote {method} to {session.id} under epoch {link.epoch} after {session.epoch} was used"
            )
        session.epoch = link.epoch

    def executed(self, execution: Execution) -> None:
        """B33: one request means at most one execution, on its own principal's session."""
        call = self._world.calls.records[execution.call]
        runs = self._world.upstream.executions[execution.call]
        self._count("execution")
        if execution.principal != call.client.principal:
            self.fail(f"{call} ran on the session of {execution.principal}")
        if len(runs) > 1 and not call.safe:
            self.fail(f"{call} ran {len(runs)} times")
        if call.outcome == "not_run" or (call.outcome == "gone" and not call.safe):
            self.fail(f"{call} ran after its caller was told that it did not")

    def ended(self, call: CallRecord) -> None:
        """What a caller is told is true."""
        runs = self._world.upstream.executions.get(call.number, [])
        self._count(f"outcome {call.outcome}")
        if runs and (call.outcome == "not_run" or (call.outcome == "gone" and not call.safe)):
            self.fail(f"{call} had run")
        if call.outcome == "ok":
            if not runs:
                self.fail(f"{call} had not run")
            told = (call.result.get("call"), call.result.get("principal"))
            if told != (call.number, call.client.principal):
                self.fail(f"{call} got the answer to {told}")
            if call.result.get("session") not in {run.session for run in runs}:
                self.fail(f"{call} got an answer from {call.result.get('session')}, where it did not run")
        if call.outcome == "gone" and (holder := self._world.owner_of(call.client)) is not None:
            self.fail(f"{call}, while {holder.name} owns the session")
        assert call.ended is not None
        took = call.ended - call.started - call.paused_s
        if took > CALL_LIMIT_S:
            self.fail(f"{call} took {took:.1f} s")

    def waiting(self) -> None:
        """No call waits for ever."""
        world = self._world
        for call in world.calls.waiting():
            if not call.process.is_paused and world.now - call.started - call.paused_s > CALL_LIMIT_S:
                self.fail(f"{call} has no outcome after {world.now - call.started:.1f} s")

    # -- at the end ------------------------------------------------------------------------------------------------

    def counters(self) -> None:
        """Every request and every envelope is counted in exactly one counter."""
        for process in self._world.processes:
            if process.core is None or process.has_crashed:
                continue
            forwarder = process.core.forwarder
            s = forwarder.statistics
            ended = s.answered + s.not_run + s.unknown + s.abandoned
            self._count("counters")
            if s.sent != ended + forwarder.calling:
                self.fail(f"{process.name} sent {s.sent} requests, {ended} ended, {forwarder.calling} are open")
        for name, count in self._world.received.items():
            told, counted = count
            if told != counted:
                self.fail(f"the inbox of {name} was given {told} envelopes and has counted {counted}")

    def left_behind(self, stopped: list[Process]) -> None:
        """B29: a clean stop leaves nothing in Redis without an owner or a TTL."""
        node = self._world.redis
        assert node is not None
        ended = {process.core.member.incarnation.encode() for process in stopped if process.core is not None}
        for key in list(node.data):
            entry = node.get(key)
            if entry is not None and entry.expires_ms is None:
                self.fail(f"{key!r} has no TTL")
            name = key.partition(b"{w:")[2].partition(b"}")[0]
            if entry is not None and name in ended and key.endswith(b":lease"):
                self.fail(f"{key!r} is the lease of a worker that has stopped")
