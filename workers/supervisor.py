"""`leasehold serve`: one listening socket, N worker processes, and a private Redis where none is given.

The supervisor forks before it has any thread or event loop, waits for signals in one place, restarts a worker that
died, and ends a dead worker's lease at once, so that its sessions move without waiting for it to lapse.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

import redis

from ..coordinator import Keys, RedisClients, end_lease
from ..coordinator.embedded import EmbeddedRedis
from ..pool import Config
from .errors import ServeError
from .settings import Settings

logger = logging.getLogger("leasehold.workers.supervisor")

SIGNALS: Final = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
RESTART_BACKOFF_S: Final = (0.1, 5.0)
STABLE_S: Final = 10.0
"""A worker that lived this long is restarted at once."""
STOP_MARGIN_S: Final = 20.0
"""Beyond the grace time, for closing sessions (bounded each) before a worker is killed."""
NOTICE_TIMEOUT_S: Final = 0.2


@dataclass(slots=True)
class _Child:
    index: int
    pid: int
    announced: int
    started: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs in the main thread of its process; `run()` returns the exit code."""

    def __init__(self, settings: Settings, config: Config) -> None:
        self._settings = settings
        self._config = config
        self._children: dict[int, _Child] = {}
        self._restart_at: dict[int, float] = {}
        self._delays: dict[int, float] = {}
        self._stopping = False
        self._redis_url = ""
        self._secrets: list[bytes] = []

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Raises `ServeError`."""
        with ExitStack() as resources:
            listener = resources.enter_context(_listen(self._settings.host, self._settings.port))
            self._find_redis(resources)
            # Named before the metrics library is imported: it decides then how values are kept.
            metrics = tempfile.mkdtemp(prefix="leasehold-metrics-")
            resources.callback(shutil.rmtree, metrics, ignore_errors=True)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
            importlib.import_module(".process", __package__)  # once, before the forks, which share its memory

            lifeline_read, lifeline_write = os.pipe()
            resources.callback(os.close, lifeline_write)
            resources.callback(os.close, lifeline_read)
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                for index in range(self._settings.workers):
                    self._fork(index, listener, lifeline_read, lifeline_write)
                self._greet(listener)
                self._supervise(listener, lifeline_read, lifeline_write)
                self._stop_children()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        logger.info("stopped")
        return 0

    def _find_redis(self, resources: ExitStack) -> None:
        if self._settings.redis_url is None:
            self._redis_url = resources.enter_context(EmbeddedRedis()).url
            self._secrets = [os.urandom(32)]
            logger.info("redis_embedded url=%s", self._redis_url)
            return
        self._redis_url = self._settings.redis_url.get_secret_value()
        self._secrets = [secret.get_secret_value().encode() for secret in self._settings.secret]
        check_redis(self._redis_url)

    def _greet(self, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        for name in self._config.servers:
            logger.info("serving server=%s url=http://%s:%d/servers/%s/mcp", name, shown, port, name)
        if not self._settings.tokens and host not in ("127.0.0.1", "::1"):
            logger.warning(
                "open_to_all host=%s: set LEASEHOLD_TOKENS, or whoever reaches it can use every server", shown
            )

    def _supervise(self, listener: socket.socket, lifeline_read: int, lifeline_write: int) -> None:
        while not self._stopping:
            received = signal.sigtimedwait(SIGNALS, 0.5)
            if received is not None and received.si_signo in (signal.SIGTERM, signal.SIGINT):
                logger.info("stopping signal=%s", signal.Signals(received.si_signo).name)
                self._stopping = True
                return
            self._reap()
            now = time.monotonic()
            for index, due in list(self._restart_at.items()):
                if now >= due:
                    del self._restart_at[index]
                    self._fork(index, listener, lifeline_read, lifeline_write)

    def _fork(self, index: int, listener: socket.socket, lifeline_read: int, lifeline_write: int) -> None:
        announced, announce = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(lifeline_write)  # or no worker would ever see the supervisor die
            os.close(announced)
            for child in self._children.values():
                os.close(child.announced)
            _be_worker(self, index, listener, lifeline_read, announce)
        os.close(announce)
        os.set_blocking(announced, False)
        self._children[pid] = _Child(index, pid, announced)

    def work(self, index: int, listener: socket.socket, lifeline: int, announce: int) -> None:
        """In the child: serve."""
        from .process import WorkerPlan, run_worker  # see run()

        plan = WorkerPlan(
            self._settings,
            self._config,
            self._redis_url,
            self._secrets,
            ephemeral=self._settings.redis_url is None,
            index=index,
        )
        run_worker(plan, listener, lifeline=lifeline, announce=announce)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self._children.pop(pid, None)
            if child is None:
                continue  # the embedded Redis
            self._bury(child, status)

    def _bury(self, child: _Child, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        incarnations = _drain(child.announced)
        if not self._stopping or code != 0:
            logger.warning("worker_died index=%d pid=%d code=%d", child.index, child.pid, code)
        if code != 0 and incarnations:
            self._end_lease(incarnations[-1])
        if self._stopping:
            return
        low, high = RESTART_BACKOFF_S
        lived = time.monotonic() - child.started
        delay = low if lived > STABLE_S else min(high, self._delays.get(child.index, low) * 2)
        self._delays[child.index] = delay
        self._restart_at[child.index] = time.monotonic() + delay

    def _end_lease(self, incarnation: str) -> None:
        """Incarnations are random, so deleting by name can never hit the worker's successor."""
        with suppress(redis.RedisError, OSError):
            client = _sync_client(self._redis_url, NOTICE_TIMEOUT_S)
            with client:
                for command in end_lease(Keys(self._settings.namespace), incarnation):
                    client.execute_command(*command)  # pyright: ignore[reportUnknownMemberType]
            logger.info("lease_ended incarnation=%s", incarnation[:8])

    def _stop_children(self) -> None:
        self._signal_all(signal.SIGTERM)
        until = time.monotonic() + self._settings.shutdown_grace_s + STOP_MARGIN_S
        while self._children and time.monotonic() < until:
            received = signal.sigtimedwait(SIGNALS, 0.2)
            if received is not None and received.si_signo == signal.SIGINT:
                logger.warning("stopping_at_once")  # a second Ctrl-C
                break
            self._reap()
        self._signal_all(signal.SIGKILL)
        for child in list(self._children.values()):
            with suppress(ChildProcessError):
                os.waitpid(child.pid, 0)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._children:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _be_worker(supervisor: Supervisor, index: int, listener: socket.socket, lifeline: int, announce: int) -> None:
    """Never returns: nothing of the supervisor's stack (its Redis, its directories) may be unwound in a child."""
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        supervisor.work(index, listener, lifeline, announce)
        code = 0
    except BaseException:
        logger.critical("worker_failed index=%d", index, exc_info=True)
    finally:
        logging.shutdown()
        os._exit(code)


def _listen(host: str, port: int) -> socket.socket:
    """One socket for all workers: with SO_REUSEPORT, a worker that closes its own would drop the connections queued on
    it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _sync_client(url: str, timeout_s: float) -> redis.Redis:
    return redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
    )


def check_redis(url: str) -> None:
    """Look at the Redis that was given, and warn about what will hurt. Serving begins without it, unready."""
    place = RedisClients(url).place
    try:
        with _sync_client(url, 2.0) as client:
            version = str(client.info("server")["redis_version"])  # pyright: ignore
            policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")  # pyright: ignore
    except (redis.RedisError, OSError) as error:
        logger.error("redis_unreachable place=%s error=%s: serving 503 until it answers", place, type(error).__name__)  # noqa: TRY400
        return
    if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
        raise ServeError(f"Redis at {place} is {version}; expected 6.2 or newer")
    if policy != "noeviction":
        logger.warning("maxmemory_policy value=%s expected=noeviction: an evicted lease is a false death", policy)


def _drain(pipe: int) -> list[str]:
    """The incarnations a worker has announced, oldest first; closes the pipe."""
    read = b""
    with suppress(BlockingIOError):
        while piece := os.read(pipe, 65536):
            read += piece
    os.close(pipe)
    return read.decode().split()
