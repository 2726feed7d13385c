"""Real processes for tests and benches: upstreams, gateway workers, a Redis, and a balancer that knows nothing of
sessions."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leasehold.coordinator.embedded import EmbeddedRedis

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SECRET = "a secret for tests only and long enough"
START_TIMEOUT_S = 30

if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))

from round_robin import RoundRobin  # noqa: E402


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = START_TIMEOUT_S) -> Any:
    """Poll until `condition()` is true; returns its value."""
    until = time.monotonic() + timeout_s
    while True:
        with suppress(OSError):
            if value := condition():
                return value
        if time.monotonic() > until:
            raise TimeoutError(what)
        time.sleep(0.02)


def get(url: str, timeout_s: float = 5) -> tuple[int, bytes]:
    """Status and body of a GET; refused connections raise OSError."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@dataclass
class Running:
    """A started process, its log and where it listens."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 20) -> int:
        """SIGTERM; the exit code, or an error when it does not end in time."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not stop within {timeout_s} s:\n{self.output()[-4000:]}") from None


@contextmanager
def run_process(arguments: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Start a process whose output goes to a log file; ended at the end of the block."""
    handle, name = tempfile.mkstemp(suffix=".log", dir=folder)
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=handle,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(env or {})},
        cwd=folder,
    )
    os.close(handle)
    running = Running(process, Path(name))
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        running.stop()


@contextmanager
def run_example(name: str, folder: Path, *arguments: str) -> Iterator[Running]:
    """Start one of our example upstreams on a free port."""
    command = [sys.executable, str(EXAMPLES / name), "--port", "0", *arguments]
    with run_process(command, folder) as running:

        def listening() -> str | None:
            if running.process.poll() is not None:
                raise AssertionError(running.output())
            found = re.search(r"listening on (\S+)", running.output())
            return found.group(1) if found else None

        running.url = wait_until(listening, f"{name} does not listen")
        yield running


@contextmanager
def run_gateway(
    config: Path, folder: Path, *arguments: str, redis_url: str | None, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start `leasehold serve` on a free port and wait until it is ready."""
    command = [sys.executable, "-m", "leasehold.workers.cli", "serve", str(config), "--port", "0", *arguments]
    settings = {"LEASEHOLD_LOG_LEVEL": "info", **(env or {})}
    if redis_url is not None:
        settings |= {"LEASEHOLD_REDIS_URL": redis_url, "LEASEHOLD_SECRET": SECRET}
    with run_process(command, folder, settings) as running:

        def ready() -> bool:
            if running.process.poll() is not None:
                raise AssertionError(running.output())
            found = re.search(r"serving server=\S+ url=(http://[^/]+)", running.output())
            if found is None:
                return False
            running.url = found.group(1)
            return get(f"{running.url}/readyz")[0] == 200

        wait_until(ready, f"the gateway is not ready:\n{running.output()}")
        yield running


def write_config(folder: Path, servers: Mapping[str, Mapping[str, Any]]) -> Path:
    """An mcp.json of its own."""
    handle, name = tempfile.mkstemp(suffix=".json", dir=folder)
    with os.fdopen(handle, "w") as file:
        json.dump({"mcpServers": servers}, file)
    return Path(name)


@dataclass
class Fleet:
    """N one-worker gateways that share one Redis, and a balancer in front that sends each request to the next one."""

    folder: Path
    redis_url: str
    workers: list[Running] = field(default_factory=list)
    proxy: RoundRobin | None = None

    def url(self, server: str) -> str:
        """Through the balancer."""
        assert self.proxy is not None
        return f"{self.proxy.url}/servers/{server}/mcp"

    def worker_url(self, index: int, server: str) -> str:
        return f"{self.workers[index].url}/servers/{server}/mcp"

    def terminate(self) -> None:
        """Ask all to stop at once, so that waiting for them one by one takes as long as for the slowest."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)
                worker.process.terminate()

    def metric(self, name: str, **labels: str) -> float:
        """A metric's sum over all workers that answer."""
        total = 0.0
        for worker in self.workers:
            with suppress(OSError):
                for line in get(f"{worker.url}/metrics")[1].decode().splitlines():
                    if re.match(rf"{name}(_total)?[ {{]", line) and all(
                        f'{k}="{v}"' in line for k, v in labels.items()
                    ):
                        total += float(line.rsplit(" ", 1)[1])
        return total


@asynccontextmanager
async def run_fleet(
    folder: Path,
    servers: Mapping[str, Mapping[str, Any]],
    *,
    workers: int = 4,
    redis_url: str | None = None,
    env: Mapping[str, str] | None = None,
    at_random: bool = False,
) -> AsyncIterator[Fleet]:
    """Start a fleet; without `redis_url` with a Redis of its own."""
    config = write_config(folder, servers)
    async with AsyncExitStack() as stack:
        if redis_url is None:
            redis_url = stack.enter_context(EmbeddedRedis()).url
        fleet = Fleet(folder, redis_url)
        starting = [run_gateway(config, folder, redis_url=redis_url, env=env) for _ in range(workers)]
        # Started side by side: a worker takes half a second to import what it needs.
        fleet.workers = list(await asyncio.gather(*(asyncio.to_thread(start.__enter__) for start in starting)))
        for start in starting:
            stack.push(start.__exit__)
        stack.callback(fleet.terminate)
        fleet.proxy = await stack.enter_async_context(
            RoundRobin([worker.url for worker in fleet.workers], at_random=at_random)
        )
        yield fleet
