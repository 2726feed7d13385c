"""`leasehold serve`: one listening socket, N worker processes, and a private Redis where none is given.

The supervisor forks before it has any thread or event loop, waits for signals and for what its workers announce in one
place, restarts a worker that died, and ends a dead worker's lease at once, so that its sessions move without waiting
for it to lapse.

A worker learns how it is to stop from how it is asked. The *lifeline* is a pipe whose writing end only the supervisor
holds: it closes when everything is to stop, and when the supervisor dies, however that happens. SIGTERM to one worker
is for that one: it leaves its sessions to its siblings, and is restarted.

A private Redis that died is started again at the same place. It is empty then; the workers take new incarnations and
register their sessions again, so what is lost is the calls that were between two workers at that moment.
"""

from __future__ import annotations

import importlib
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from ..coordinator.client import REDIS_FAILURES
from ..coordinator.embedded import EmbeddedRedis, EmbeddedRedisError
from ..pool import Config
from .errors import ServeError
from .redis_check import check_redis, end_leases
from .settings import Settings
from .signal_pipe import SIGNALS, SignalPipe

logger = logging.getLogger("leasehold.workers.supervisor")

RESTART_BACKOFF_S: Final = (0.1, 5.0)
STABLE_S: Final = 10.0
"""A worker that lived this long is restarted at once."""
DEATHS_TO_REPORT: Final = 3
"""After as many short lives in a row it is no accident."""
REDIS_RESTARTS: Final = (5, 60.0)
"""So many restarts of the private Redis in so many seconds; one more, and something is wrong that a restart cannot
mend."""
CLOSING_S: Final = 30.0
"""Beyond the grace time, before a worker is killed. Each step of its end is bounded: its connections 1 s, its sessions
15 s, their records 2 s, its membership 9 s."""
NOTICE_TIMEOUT_S: Final = 0.2
TICK_S: Final = 0.5
TELL_AGAIN_S: Final = 0.1


@dataclass(slots=True)
class _Child:
    """A worker process and what it has announced: its incarnations, one a line."""

    index: int
    pid: int
    announced: int
    incarnation: str = ""
    unread: bytes = b""
    started: float = field(default_factory=time.monotonic)

    def read(self) -> bool:
        """Take in what it has announced, of which only the last counts; False when nothing more can come."""
        with suppress(BlockingIOError):
            while piece := os.read(self.announced, 65536):
                *lines, self.unread = (self.unread + piece).split(b"\n")
                if lines:
                    self.incarnation = lines[-1].decode()
            return False
        return True


class Supervisor:
    """Runs in the main thread of its process; `run()` returns the exit code."""

    def __init__(self, settings: Settings, config: Config) -> None:
        self._settings = settings
        self._config = config
        self._children: dict[int, _Child] = {}
        self._restart_at: dict[int, float] = {}
        self._short_lives: dict[int, int] = {}
        self._dead: dict[str, float] = {}
        """Incarnations whose end has still to be told, and until when that is of use."""
        self._redis: EmbeddedRedis | None = None
        self._redis_url = ""
        self._redis_died = False
        self._redis_restarts: list[float] = []
        self._secrets: list[bytes] = []
        self._lifeline = -1
        self._hold: int | None = None
        """Our end of the lifeline; None before everything is started, and from when everything is to stop."""
        self._code = 0

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT. 0 for a clean end, 1 when workers had to be killed or nothing could be saved.
        Raises `ServeError`."""
        with ExitStack() as resources:
            # First: whoever stops us while we start has waited for no more than the start, and nothing is left behind.
            self._signals = resources.enter_context(SignalPipe())
            self._selector = resources.enter_context(selectors.PollSelector())  # has no state that forks would share
            self._selector.register(self._signals.reading, selectors.EVENT_READ)
            self._listener = resources.enter_context(_listen(self._settings.host, self._settings.port))
            self._find_redis(resources)
            # Named before the metrics library is imported: it decides then how values are kept.
            metrics = tempfile.mkdtemp(prefix="leasehold-metrics-")
            resources.callback(shutil.rmtree, metrics, ignore_errors=True)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
            importlib.import_module(".process", __package__)  # once, before the forks, which share its memory
            self._supervise()
        logger.info("stopped code=%d", self._code)
        return self._code

    def work(self, index: int, lifeline: int, announce: int) -> None:
        """In the child: serve."""
        from .process import WorkerPlan, run_worker  # see run()

        plan = WorkerPlan(
            self._settings,
            self._config,
            self._redis_url,
            self._secrets,
            ephemeral=self._redis is not None,
            index=index,
        )
        run_worker(plan, self._listener, lifeline=lifeline, announce=announce)

    def _find_redis(self, resources: ExitStack) -> None:
        if self._settings.redis_url is None:
            self._redis = resources.enter_context(EmbeddedRedis())
            self._redis_url = self._redis.url
            self._secrets = [os.urandom(32)]
            logger.info("redis_embedded url=%s", self._redis_url)
            return
        self._redis_url = self._settings.redis_url.get_secret_value()
        self._secrets = [secret.get_secret_value().encode() for secret in self._settings.secret]
        check_redis(self._redis_url)

    def _greet(self) -> None:
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        for name in self._config.servers:
            logger.info("serving server=%s url=http://%s:%d/servers/%s/mcp", name, shown, port, name)
        if self._settings.is_open and host not in ("127.0.0.1", "::1"):
            logger.warning(
                "open_to_all host=%s: set LEASEHOLD_TOKENS, or whoever reaches it can use every server", shown
            )

    # -- while it serves -------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        if self._asked_to_stop(self._wait(0)):
            return
        self._lifeline, self._hold = os.pipe()
        try:
            self._restart_at = dict.fromkeys(range(self._settings.workers), 0.0)
            self._fork_due()
            self._greet()
            while not self._asked_to_stop(self._wait(self._until_due())):
                self._reap()
                if self._redis_died and not self._restart_redis():
                    self._code = 1
                    break
                self._fork_due()
            self._stop()
        finally:
            self._let_go()
            os.close(self._lifeline)

    def _wait(self, timeout_s: float) -> list[signal.Signals]:
        """Until a signal comes or a worker announces something, at most `timeout_s`."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Child) and not key.data.read():
                self._selector.unregister(key.fileobj)  # it has closed its end: its death is under way
        return self._signals.take()

    def _asked_to_stop(self, received: Iterable[signal.Signals]) -> bool:
        asked = [number for number in received if number != signal.SIGCHLD]
        if asked:
            logger.info("stopping signal=%s", asked[0].name)
        return bool(asked)

    def _until_due(self) -> float:
        longest = TELL_AGAIN_S if self._dead else TICK_S
        return max(0.0, min([longest, *(due - time.monotonic() for due in self._restart_at.values())]))

    def _fork_due(self) -> None:
        now = time.monotonic()
        for index in [index for index, due in self._restart_at.items() if due <= now]:
            try:
                self._fork(index)
            except OSError as error:  # no memory, processes or files left: the others go on
                logger.error("worker_not_started index=%d error=%s", index, error.strerror)  # noqa: TRY400
                self._restart_at[index] = now + RESTART_BACKOFF_S[1]
            else:
                del self._restart_at[index]

    def _fork(self, index: int) -> None:
        with ExitStack() as on_failure:
            announced, announce = os.pipe()
            for end in (announced, announce):
                on_failure.callback(os.close, end)
                os.set_blocking(end, False)
            pid = self._fork_worker(index, announced, announce)
            on_failure.pop_all()
        os.close(announce)
        child = self._children[pid] = _Child(index, pid, announced)
        self._selector.register(announced, selectors.EVENT_READ, child)

    def _fork_worker(self, index: int, announced: int, announce: int) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that came to the child before it has left the pipe would be taken for one to its parent.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_worker(index, announced, announce)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _be_worker(self, index: int, announced: int, announce: int) -> None:
        """Never returns: nothing of the supervisor's stack (its Redis, its directories) may be unwound in a child."""
        code = 1
        try:
            self._signals.leave()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._let_go()  # or no worker would ever see the supervisor die
            os.close(announced)
            for child in self._children.values():
                os.close(child.announced)
            self.work(index, self._lifeline, announce)
            code = 0
        except BaseException:
            logger.critical("worker_failed index=%d", index, exc_info=True)
        finally:
            logging.shutdown()
            os._exit(code)

    def _reap(self) -> None:
        """Bury every child that has ended; as the first process of a container, strangers too."""
        deaths: list[tuple[_Child, int]] = []
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                if self._redis is not None and pid == self._redis.pid:
                    logger.error("redis_died pid=%d code=%d", pid, os.waitstatus_to_exitcode(status))
                    self._redis_died = True
                elif (child := self._children.pop(pid, None)) is not None:
                    deaths.append((child, os.waitstatus_to_exitcode(status)))
        self._bury(deaths)

    def _bury(self, deaths: list[tuple[_Child, int]]) -> None:
        from .telemetry import forget_process  # see run()

        for child, code in deaths:
            child.read()
            with suppress(KeyError):
                self._selector.unregister(child.announced)
            os.close(child.announced)
            forget_process(child.pid, counted=bool(child.incarnation))
            self._tell_death(child, code)
        # One that ended by itself has released its lease.
        until = time.monotonic() + self._settings.lease_ttl_ms / 1000
        self._dead |= {child.incarnation: until for child, code in deaths if code != 0 and child.incarnation}
        self._end_leases()

    def _tell_death(self, child: _Child, code: int) -> None:
        if self._hold is None:  # everything stops
            if code != 0:
                logger.warning("worker_died index=%d pid=%d code=%d", child.index, child.pid, code)
            return
        lived_s = time.monotonic() - child.started
        lives = 0 if lived_s > STABLE_S else self._short_lives.get(child.index, 0) + 1
        low, high = RESTART_BACKOFF_S
        delay_s = min(high, low * 2 ** min(lives, 10))
        self._short_lives[child.index] = lives
        self._restart_at[child.index] = time.monotonic() + delay_s
        logger.warning("worker_died index=%d pid=%d code=%d restart_in_s=%.1f", child.index, child.pid, code, delay_s)
        if lives >= DEATHS_TO_REPORT:
            logger.error(
                "worker_keeps_dying index=%d deaths=%d lived_s=%.1f joined=%s: see what it logged before it ended",
                child.index,
                lives,
                lived_s,
                "yes" if child.incarnation else "no",
            )

    def _end_leases(self) -> None:
        """Leave word that workers have ended; what could not be told is told again, for as long as leases last.

        Incarnations are random, so deleting by name can never hit a worker's successor.
        """
        now = time.monotonic()
        self._dead = {incarnation: until for incarnation, until in self._dead.items() if until > now}
        if not self._dead or self._redis_died:
            return
        wanted = list(self._dead)
        try:
            end_leases(self._redis_url, self._settings.namespace, wanted, NOTICE_TIMEOUT_S)
        except REDIS_FAILURES as error:
            logger.warning("leases_not_ended count=%d error=%s", len(wanted), type(error).__name__)
            return
        self._dead.clear()
        for incarnation in wanted:
            logger.info("lease_ended incarnation=%s", incarnation[:8])

    def _restart_redis(self) -> bool:
        assert self._redis is not None
        most, window_s = REDIS_RESTARTS
        now = time.monotonic()
        self._redis_restarts = [at for at in self._redis_restarts if now - at < window_s]
        if len(self._redis_restarts) >= most:
            logger.critical("redis_keeps_dying deaths=%d window_s=%.0f", most + 1, window_s)
            return False
        self._redis_restarts.append(now)
        try:
            self._redis.restart()
        except (EmbeddedRedisError, OSError) as error:
            logger.critical("redis_not_restarted error=%s", error)
            return False
        self._redis_died = False
        logger.warning(
            "redis_restarted pid=%d: it is empty, the workers register their sessions again", self._redis.pid
        )
        return True

    # -- the end ---------------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Close our end of the lifeline, if it is still open."""
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None

    def _stop(self) -> None:
        """End all workers: kindly, then, when they overstay or at a second Ctrl-C, by force."""
        self._let_go()
        self._listener.close()  # or connections queue up where nobody takes them any more
        until = time.monotonic() + self._settings.shutdown_grace_s + CLOSING_S
        self._reap()
        while self._children and time.monotonic() < until:
            if signal.SIGINT in self._wait(TICK_S):
                logger.warning("stopping_at_once")  # a second Ctrl-C
                break
            self._reap()
        if self._children:
            self._kill_all()

    def _kill_all(self) -> None:
        self._code = 1
        logger.error("killing workers=%d", len(self._children))
        for pid in self._children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deaths: list[tuple[_Child, int]] = []
        for pid, child in self._children.items():
            with suppress(ChildProcessError):
                deaths.append((child, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        self._children.clear()
        self._bury(deaths)


def _listen(host: str, port: int) -> socket.socket:
    """One socket for all workers: with SO_REUSEPORT, a worker that closes its own would drop the connections queued on
    it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]  # it repeats the address
        raise ServeError(f"cannot listen on {host}:{port}: {why}") from None
