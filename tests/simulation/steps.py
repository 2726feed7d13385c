"""Everything that a test may have happen in a world, each chosen by small numbers; and how a world comes to rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from .calls import Client
from .checker import CALL_LIMIT_S
from .network import Cut, Trap
from .process import Process
from .world import World

T = TypeVar("T")

PRINCIPALS: Final = ("alice", "bob")
SERVERS: Final = ("client", "pinned", "shared")
MOST_WORKERS: Final = 4
MOST_CLIENTS: Final = 5
TAKES_S: Final = (0.0, 0.02, 0.3, 1.0, 3.0)
"""How long a call runs upstream."""
FATES: Final = ("answered", "answered", "answered", "answered", "lost after", "lost before", "silent")
WAITS: Final = (0.0005, 0.002, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 10.0)
LEASES: Final = (0.05, 0.3, 0.7, 0.95, 1.05, 1.5, 3.0, 20.0)
"""Durations of faults, in leases."""
LAGS_S: Final = (0.0, 0.001, 0.01, 0.1, 0.5, 1.5, 5.0)
SKEWS: Final = (0.0, 0.0, -0.45, -0.2, 0.2, 0.45)
"""How far a promoted replica's clock is ahead, in leases: those of any two nodes agree within one."""
TRAPS: Final = (
    "lease_renew",
    "lease_acquire",
    "mailbox_push",
    "mailbox_rotate",
    "session_claim",
    "session_takeover",
    "session_release",
    "session_refresh",
    "session_hand_off",
    "POP",
    "LPOP",
    "HGETALL",
    "EXISTS",
)
RECOVERY_S: Final = 2.0
"""So long after a lease everything serves again, once faults have stopped."""


class Steps:
    """What happens in one world, step by step. A step that cannot be taken now does nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clients: list[Client] = [world.calls.client("shared", principal) for principal in PRINCIPALS]
        world.run_until(lambda: all(process.is_serving for process in world.processes), 10)

    # -- clients ---------------------------------------------------------------------------------------------------

    def open(self, server: int, principal: int, at: int) -> None:
        """A client initializes a session."""
        process = self._pick(self._serving(), at)
        if process is None or len(self.clients) >= MOST_CLIENTS + len(PRINCIPALS):
            return
        client = self.world.calls.client(SERVERS[server % 2], PRINCIPALS[principal % len(PRINCIPALS)])
        self.clients.append(client)
        self.world.calls.open_session(client, process)

    def call(self, who: int, at: int, take: int, fate: int, *, safe: bool) -> None:
        """A client calls, on whatever worker its request lands."""
        process, client = self._pick(self._serving(), at), self._pick(self._callers(), who)
        if process is not None and client is not None:
            self.world.calls.call(
                client, process, safe=safe, take=TAKES_S[take % len(TAKES_S)], fate=FATES[fate % len(FATES)]
            )

    def burst(self, who: int, at: int) -> None:
        """A client calls many times at once, on all workers."""
        client = self._pick(self._callers(), who)
        for number in range(6):
            process = self._pick(self._serving(), at + number)
            if process is not None and client is not None:
                self.world.calls.call(client, process, take=0.01)

    def leave(self, which: int) -> None:
        """A client hangs up."""
        call = self._pick(self.world.calls.waiting(), which)
        if call is not None and call.leave is not None:
            with call.process.loop.entered():
                call.leave()

    # -- workers ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """One worker more."""
        if len(self._alive()) < MOST_WORKERS:
            self.world.start()

    def pause(self, which: int, leases: int) -> None:
        """A worker is paused for a while."""
        process = self._pick(self._running(), which)
        if process is not None:
            self.world.pause(process)
            self.world.after(self._leases(leases), lambda: self._resume(process))

    def _resume(self, process: Process) -> None:
        if process.is_paused and process.is_alive:
            self.world.resume(process)

    def crash(self, which: int, *, silently: bool) -> None:
        """A worker dies."""
        process = self._pick(self._alive(), which)
        if process is not None:
            self.world.crash(process, silently=silently)

    def stop(self, which: int) -> None:
        """A worker is told to stop."""
        process = self._pick(self._serving(), which)
        if process is not None:
            self.world.stop(process)

    # -- Redis and the way there -----------------------------------------------------------------------------------

    def trap(self, which: int, command: int, lasts: int, *, ran: bool) -> None:
        """A connection breaks just before, or just after, the next command of a kind; perhaps there is none for a
        while."""
        process = self._pick(self._alive(), which)
        if process is not None:
            lasts_s = self._leases(lasts // 2) if lasts % 2 else 0.0
            self.world.note("trap", process.name, TRAPS[command % len(TRAPS)], ran, lasts_s)
            process.host.traps.append(Trap(TRAPS[command % len(TRAPS)], ran, lasts_s))

    def break_connections(self, which: int) -> None:
        """All connections of a worker to Redis break."""
        process = self._pick(self._alive(), which)
        if process is not None:
            self.world.note("break", process.name)
            for connection in list(process.host.connections):
                connection.reset()

    def forget(self, which: int) -> None:
        """Connections of a worker are dead without its knowledge."""
        process = self._pick(self._alive(), which)
        if process is not None:
            self.world.note("forget", process.name)
            self.world.network.forget(process.host)

    def cut(self, which: int, how: int, leases: int) -> None:
        """A worker is cut off from Redis for a while."""
        process = self._pick(self._alive(), which)
        hows = [Cut.BOTH, Cut.COMMANDS, Cut.ANSWERS, Cut.LOUD]
        if process is not None and process.host.cut is Cut.NONE:
            self.world.note("cut", process.name, hows[how % 4].value, leases)
            self.world.network.cut(process.host, hows[how % 4])
            self.world.after(self._leases(leases), lambda: self.world.network.heal(process.host))

    def restart_redis(self, gap: int, *, empty: bool) -> None:
        """Redis dies and is started again; with all it had, or with nothing."""
        self.world.lose_redis(self._leases(gap), lag_s=None if empty else 0.0)

    def fail_over(self, gap: int, lag: int, skew: int) -> None:
        """A replica that lags is promoted in place of the master that died."""
        self.world.lose_redis(
            self._leases(gap),
            lag_s=LAGS_S[lag % len(LAGS_S)],
            promoted=True,
            skew_s=SKEWS[skew % len(SKEWS)] * self.world.lease_ms / 1000,
        )

    def fill(self, leases: int) -> None:
        """Redis has no memory left for a while."""
        node = self.world.redis
        if node is not None and not node.is_full:
            self.world.note("full")
            node.is_full = True
            self.world.after(self._leases(leases), lambda: setattr(node, "is_full", False))

    def repeat(self) -> None:
        """An envelope that was once in a mailbox is pushed again."""
        self.world.repeat_envelope()

    def wait(self, which: int) -> None:
        """Time passes."""
        self.world.run(WAITS[which % len(WAITS)])

    # -- the end ---------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Faults stop: everybody is served again in time; then all workers stop, and leave nothing behind."""
        world = self.world
        world.heal()
        if not self._serving():
            world.start()
        world.run(world.lease_ms / 1000 + RECOVERY_S)
        probes = [world.calls.call(client, process) for client in self._callers() for process in self._serving()]
        assert probes
        world.run_until(lambda: not world.calls.waiting(), CALL_LIMIT_S)
        world.checker.waiting()
        for probe in probes:
            if probe.outcome not in ("ok", "gone"):
                world.checker.fail(f"{probe}, after all faults had stopped")
        world.checker.counters()
        stopping = self._alive()
        for process in stopping:
            world.stop(process)
        if not world.run_until(lambda: all(process.has_stopped for process in stopping), 30):
            world.checker.fail(f"{[process for process in stopping if not process.has_stopped]} did not stop")
        world.checker.counters()
        world.checker.left_behind(stopping)

    # -- whom ------------------------------------------------------------------------------------------------------

    def _leases(self, which: int) -> float:
        return LEASES[which % len(LEASES)] * self.world.lease_ms / 1000

    def _alive(self) -> list[Process]:
        return [process for process in self.world.processes if process.is_alive]

    def _running(self) -> list[Process]:
        return [process for process in self._alive() if not process.is_paused]

    def _serving(self) -> list[Process]:
        return [process for process in self._alive() if process.takes_calls]

    def _callers(self) -> list[Client]:
        return [client for client in self.clients if client.can_call]

    @staticmethod
    def _pick(among: Sequence[T], which: int) -> T | None:
        return among[which % len(among)] if among else None
