"""A simulated fleet: virtual time, worker processes, clients and their calls, faults, and how everything comes to rest.

Everything random comes from one seed, and nothing from the machine: the same seed and the same steps have the same
history.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from leasehold.coordinator import Keyring
from leasehold.coordinator import scripts as coordinator_scripts
from leasehold.coordinator.scripts import Script
from leasehold.workers.identity import Identity

from .calls import Calls, Client
from .checker import Checker, Violation
from .network import Network
from .process import NAMESPACE, Process
from .replaced import replaced
from .server import SCRIPT_NAMES, Entry, RedisNode
from .upstream import SimUpstream

SECRET: Final = b"a secret of the simulation" * 2
SPIN_LIMIT: Final = 20_000
"""So many turns without a moment passing: somebody waits by turning round."""
BEGINNING_S: Final = 1000.0


class World:
    """Everything there is. `close()` it: it replaces clocks and randomness of the code under test."""

    def __init__(self, seed: int, *, lease_ms: int = 3000, workers: int = 3) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.lease_ms = lease_ms
        self.now = BEGINNING_S
        self.history: list[tuple[Any, ...]] = []
        self.calls = Calls(self)
        self.processes: list[Process] = []
        self.upstream = SimUpstream()
        self.received: dict[str, tuple[int, int]] = {}
        """Envelopes that each inbox was given, and has counted."""
        self.turns = 0
        self.is_over = False
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._names = itertools.count(1)
        self._current: Process | None = None
        self._base: dict[bytes, Entry] = {}
        self._journal: list[tuple[float, bytes, Entry | None]] = []
        self._pushed: list[bytes] = []
        self._problem: Violation | None = None
        for script in vars(coordinator_scripts).values():
            if isinstance(script, Script):
                SCRIPT_NAMES[script.digest.encode()] = script.name
        self._end = ExitStack()
        self._end.enter_context(replaced(self, self._monotonic))
        self.keyring = Keyring([SECRET])
        self.identity = Identity(self.keyring)
        self.checker = Checker(self)
        self.network = Network(self, self.rng, _name_of)
        self._serve(RedisNode(lambda: self.now, self.rng))
        self.network.master.started_at -= 100  # type: ignore[union-attr]
        for _ in range(workers):
            self.start()

    # -- time ------------------------------------------------------------------------------------------------------

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Have something happen later, outside of all processes."""
        heapq.heappush(self._events, (self.now + max(0.0, delay_s), next(self._numbers), action))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Let time pass until a condition holds, at most so long; whether it does."""
        end = self.now + limit_s
        spins = 0
        while not condition():
            if self._problem is not None:
                raise self._problem
            if self._turn():
                spins += 1
                if spins > SPIN_LIMIT:
                    self.checker.fail("a process turns round and round")
                continue
            spins = 0
            upcoming = self._upcoming()
            if upcoming is None or upcoming > end:
                self.now = end
                return condition()
            self.now = max(self.now, upcoming)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self.checker.waiting()
        return True

    def _turn(self) -> bool:
        """One turn of each process that has work now."""
        running = [p for p in self.processes if p.is_alive and not p.is_paused and p.loop.has_work]
        if len(running) > 1:
            self.rng.shuffle(running)
        for process in running:
            with self.as_seen_by(process):
                process.loop.turn()
            self.turns += 1
            self.checker.owners()
        return bool(running)

    def _upcoming(self) -> float | None:
        running = [process for process in self.processes if process.is_alive and not process.is_paused]
        times = [due - process.skew_s for process in running if (due := process.loop.next_timer) is not None]
        return min([*times, *(at for at, _, _ in self._events[:1])], default=None)

    @contextmanager
    def as_seen_by(self, process: Process) -> Generator[None, None, None]:
        """Inside, monotonic time is that process's."""
        before, self._current = self._current, process
        try:
            yield
        finally:
            self._current = before

    def _monotonic(self, *_clock: int) -> float:
        return self.now + (self._current.skew_s if self._current is not None else 0.0)

    def note(self, *what: Any) -> None:
        """Write the history on."""
        if not self.is_over:
            self.history.append((round(self.now, 6), *what))

    def unhandled(self, process: Process, context: dict[str, Any]) -> None:
        """Nobody took care of an error."""
        if not self.is_over:
            self.problem(f"{process.name}: {context.get('message')}", context.get("exception"))

    def problem(self, what: str, cause: BaseException | None = None) -> None:
        """Note what must not happen; the run ends with it, for whoever is told of it now may swallow it."""
        if self._problem is None:
            self._problem = Violation(f"{what} (at {self.now:.4f})")
            self._problem.__cause__ = cause

    # -- worker processes ------------------------------------------------------------------------------------------

    def start(self) -> Process:
        """Start another worker; its clock may be an hour off."""
        process = Process(self, f"w{next(self._names)}", self.rng.choice([0.0, self.rng.uniform(-900, 3600)]))
        self.network.join(process.host)
        self.processes.append(process)
        self.note("start", process.name)
        return process

    def pause(self, process: Process) -> None:
        """As by SIGSTOP, or a blocked loop: what comes in waits."""
        self.note("pause", process.name)
        process.paused_at = self.now

    def resume(self, process: Process) -> None:
        """As by SIGCONT."""
        self.note("resume", process.name)
        assert process.paused_at is not None
        for call in self.calls.waiting():
            if call.process is process:
                call.paused_s += self.now - max(process.paused_at, call.started)
        process.paused_at = None

    def crash(self, process: Process, *, silently: bool = False) -> None:
        """As by SIGKILL, or `silently` with its machine: then Redis does not learn of it."""
        self.note("crash", process.name)
        process.has_crashed = True
        self.network.kill(process.host, silently=silently)
        if process.core is not None:
            for link in process.pool.links.values():
                link.died()
        for call in self.calls.waiting():
            if call.process is process:
                self.calls.finish(call, "cut", "its worker died")

    def stop(self, process: Process) -> None:
        """As by SIGTERM."""
        self.note("stop", process.name)
        with self.as_seen_by(process), process.loop.entered():
            process.stop()

    def owner_of(self, client: Client) -> Process | None:
        """The worker that owns a client's session and may write to it."""
        for process in self.processes:
            if process.is_alive and process.core is not None and not process.is_paused:
                with self.as_seen_by(process):
                    owned = process.core.sessions.get(client.key)
                    if owned is not None and owned.registration is not None and process.core.sessions.holds(owned):
                        return process
        return None

    # -- Redis -----------------------------------------------------------------------------------------------------

    @property
    def redis(self) -> RedisNode | None:
        return self.network.master

    def _serve(self, node: RedisNode) -> None:
        node.on_script = self.checker.script_ran
        node.on_write = self._written
        self._base, self._journal = dict(node.data), []
        self.network.master = node

    def _written(self, key: bytes, entry: Entry | None) -> None:
        self._journal.append((self.now, key, entry))
        if entry is not None and isinstance(entry.value, list):
            self._pushed.extend(element for element in entry.value[-1:] if element)
            del self._pushed[:-50]

    def lose_redis(self, gap_s: float, *, lag_s: float | None, promoted: bool = False, skew_s: float = 0.0) -> None:
        """The node dies; after `gap_s` there is another one, with what was written more than `lag_s` ago (None: with
        nothing): the replica that was `promoted`, whose clock is another, or the same server started again."""
        self.note("redis lost", gap_s, lag_s, promoted)
        node = self.network.master
        if node is None:
            return
        kept: dict[bytes, Entry] = {}
        if lag_s is not None:
            kept = dict(self._base)
            for at, key, entry in self._journal:
                if at > self.now - lag_s:
                    break
                if entry is None:
                    kept.pop(key, None)
                else:
                    kept[key] = entry
        self.network.master = None
        self.network.reset_all()

        def back() -> None:
            self.note("redis back")
            skew = skew_s if promoted else node.skew_s
            self._serve(RedisNode(lambda: self.now, self.rng, skew_s=skew, data=kept, promoted=promoted))

        self.after(gap_s, back)

    def repeat_envelope(self) -> None:
        """Somebody who can write to Redis pushes what he has seen there once more, to any worker."""
        node = self.network.master
        if node is None or not self._pushed:
            return
        boxes = [f"{NAMESPACE}:{{w:{name}}}:box:1".encode() for name in self._incarnations()]
        if boxes:
            self.note("repeat")
            box = self.rng.choice(boxes)
            self.network.run(node, [b"RPUSH", box, self.rng.choice(self._pushed)])
            self.network.run(node, [b"PEXPIRE", box, b"60000"])

    def _incarnations(self) -> list[str]:
        return [
            p.core.member.incarnation for p in self.processes if p.is_alive and p.core and p.core.member.incarnation
        ]

    # -- the end ---------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No more faults: Redis answers everybody, and who was paused goes on."""
        self.note("heal")
        for process in self.processes:
            process.host.traps.clear()
            self.network.heal(process.host)
            if process.is_paused and process.is_alive:
                self.resume(process)
        self.run_until(lambda: self.redis is not None, 120)
        assert self.redis is not None
        self.redis.is_full = False

    def close(self) -> None:
        """End everything without a word."""
        if self.is_over:
            return
        self.is_over = True
        try:
            for process in self.processes:
                self._bury(process)
        finally:
            self._end.close()

    def _bury(self, process: Process) -> None:
        """End what runs there, and close what is open: the garbage collector is to find nothing to tell of."""
        process.host.alive = True
        self.network.master = None
        loop = process.loop
        if not process.has_stopped:
            self._exhaust(process, cancel=True)
            if process.core is not None:
                loop.create_task(process.core.member.aclose(), name="bury")
            self._exhaust(process, cancel=False)

    def _exhaust(self, process: Process, *, cancel: bool) -> None:
        loop = process.loop
        with self.as_seen_by(process):
            for _ in range(1000):
                tasks = asyncio.all_tasks(loop)
                if not tasks:
                    return
                if cancel:
                    for task in sorted(tasks, key=lambda task: task.get_name()):
                        task.cancel()
                while loop.has_work and asyncio.all_tasks(loop):
                    loop.turn()
                due = loop.next_timer
                if due is not None:
                    self.now = max(self.now, due - process.skew_s)
        raise AssertionError(f"{process.name} does not end: {asyncio.all_tasks(loop)}")


def _name_of(command: Sequence[bytes]) -> str:
    if command[0].upper() == b"EVALSHA":
        return SCRIPT_NAMES.get(command[1], "")
    return command[0].upper().decode()
