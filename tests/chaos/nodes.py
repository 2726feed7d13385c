"""The processes that faults happen to: workers, each a `leasehold serve` of its own with a way to Redis that can be
cut, and a Redis that can be killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path

from faults import Mode, Proxy
from fleet import SECRET, Running, get, run_process, wait_until
from leasehold.coordinator.embedded import EmbeddedRedis, EmbeddedRedisError

# A worker of ours blocks its own loop when it gets SIGUSR2; nothing of that is in the product.
BLOCKABLE = """
import signal, sys, time
seconds = float(sys.argv.pop(1))
signal.signal(signal.SIGUSR2, lambda *_: time.sleep(seconds))
from leasehold.workers.cli import main
sys.exit(main())
"""


class PatientProxy(Proxy):
    """Turns clients away while Redis is down, as a closed port does."""

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            await super()._accept(reader, writer)


class RedisServer:
    """A real Redis without a file; what kills it leaves it empty."""

    def __init__(self) -> None:
        self._server = EmbeddedRedis()

    def __enter__(self) -> RedisServer:
        self._server.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        return self._server.url

    def kill(self) -> None:
        assert self._server.pid is not None
        os.kill(self._server.pid, signal.SIGKILL)

    def restart(self) -> None:
        """Start the one that was killed again, empty."""

        def restarted() -> bool:
            try:
                self._server.restart()
            except EmbeddedRedisError as error:
                if "has not died" in str(error):
                    return False
                raise
            return True

        wait_until(restarted, "Redis does not start again")


class Node:
    """One worker of the fleet under its supervisor. Started again it is another one, at another port."""

    def __init__(
        self,
        name: str,
        folder: Path,
        config: Path,
        redis_url: str,
        env: Mapping[str, str],
        *,
        block_s: float = 0.0,
        proxied: bool = True,
    ) -> None:
        self.name = name
        self.block_s = block_s
        """For how long SIGUSR2 blocks its loop."""
        self.running: Running | None = None
        self.proxy = PatientProxy(redis_url)
        self.url = ""
        self._proxied = proxied
        self._redis_url = redis_url
        self._folder = folder
        self._config = config
        self._env = env
        self._process = ExitStack()
        self._logs: list[Path] = []

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.url or 'down'}>"

    @property
    def pids(self) -> list[int]:
        """The worker process; for a moment after its death, none."""
        if self.running is None:
            return []
        pid = self.running.pid
        with suppress(OSError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    async def start(self) -> None:
        """Return when it is ready."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        command = [sys.executable, "-c", BLOCKABLE, str(self.block_s), "serve", str(self._config), "--port", "0"]
        redis_url = self.proxy.url if self._proxied else self._redis_url
        settings = {"LEASEHOLD_REDIS_URL": redis_url, "LEASEHOLD_SECRET": SECRET, **self._env}
        process = ExitStack()
        running = process.enter_context(run_process(command, self._folder, settings))

        def ready() -> str | None:
            if running.process.poll() is not None:
                raise AssertionError(running.output())
            found = re.search(r"serving server=\S+ url=(http://[^/]+)", running.output())
            return found.group(1) if found and get(f"{found.group(1)}/readyz")[0] == 200 else None

        try:
            running.url = wait_until(ready, "a worker is not ready")
        except BaseException:
            process.close()
            raise
        self.running, self._process, self.url = running, process, running.url
        self._logs.append(running.log)

    async def wait_ready(self) -> None:
        """Until the worker that its supervisor has started again takes calls."""
        assert self.running is not None
        url = self.running.url
        await asyncio.to_thread(wait_until, lambda: get(f"{url}/readyz")[0] == 200, f"{self.name} is not ready")

    def signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    async def kill(self, *, noticed: bool) -> None:
        """SIGKILL. `noticed`: by its supervisor, which starts another one; else both die."""
        if noticed:
            self.signal(signal.SIGKILL)
            return
        assert self.running is not None
        pids = self.pids
        self.running.process.send_signal(signal.SIGSTOP)  # it must not see its worker die
        self.signal(signal.SIGKILL)
        self.running.process.kill()
        # Until they are gone their socket takes connections that nobody will serve.
        await asyncio.to_thread(wait_until, lambda: not any(map(lives, pids)), f"{self.name} lives on")
        await asyncio.to_thread(self._bury)

    async def stop(self) -> int:
        """SIGTERM, and wait; the exit code."""
        running = self.running
        assert running is not None
        code = await asyncio.to_thread(running.stop, 60)
        await asyncio.to_thread(self._bury)
        return code

    def _bury(self) -> None:
        self.running, self.url = None, ""
        process, self._process = self._process, ExitStack()
        process.close()

    async def __aenter__(self) -> Node:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.proxy)
            await self.start()
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        try:
            self.proxy.mode = Mode.OK
            if self.running is not None:
                self.signal(signal.SIGCONT)
                await asyncio.to_thread(self._bury)
        finally:
            await self._exit.aclose()

    def terminate(self) -> None:
        """Ask it to stop, so that waiting for all of them takes as long as for the slowest."""
        if self.running is not None:
            self.signal(signal.SIGCONT)
            self.running.process.terminate()

    def rss(self) -> int:
        """Bytes of memory that the worker holds."""
        total = 0
        for pid in self.pids:
            with suppress(OSError, IndexError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return total

    def log(self) -> str:
        """Of all that it has been."""
        return "".join(path.read_text(errors="replace") for path in self._logs)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
