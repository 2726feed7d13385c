"""`leasehold serve` as processes: its workers, its Redis, and what is left of them after each way to end."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import redis
from fleet import EXAMPLES, Running, get, run_example, run_gateway, run_process, wait_until, write_config
from leasehold.coordinator import Keys
from leasehold.coordinator.embedded import EmbeddedRedis
from mcp_http import RawSession

pytestmark = [pytest.mark.anyio, pytest.mark.process]

LEASE_MS = 10_000
"""So long that whatever waits for a lease to lapse is told from what does not."""
AT_ONCE_S = 5.0
"""Half a lease: machines that run tests are busy."""
WORKERS = 3


@dataclass
class Served:
    """One `leasehold serve` and the upstream behind it."""

    serve: Running
    upstream: Running
    tmp: Path
    """The temporary directory of its processes, in which nothing else appears."""

    def url(self, server: str = "http") -> str:
        return f"{self.serve.url}/servers/{server}/mcp"

    def log(self, pattern: str) -> list[Any]:
        return re.findall(pattern, self.serve.output())

    def wait_log(self, pattern: str, count: int = 1) -> None:
        wait_until(lambda: len(self.log(pattern)) >= count, f"not logged: {pattern}\n{self.serve.output()[-3000:]}")

    @property
    def workers(self) -> dict[str, int]:
        """Process ids of the living workers by their (shortened) incarnation."""
        names = {int(pid): name for pid, name in self.log(r"\[(\d+)\] worker_ready incarnation=(\w+)")}
        return {names[child.pid]: child.pid for child in self.children() if child.pid in names}

    def children(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.serve.pid).children() if lives(child)]

    def redis(self) -> psutil.Process:
        (server,) = (child for child in self.children() if "redis.sock" in " ".join(child.cmdline()))
        return server

    def wait_whole(self) -> None:
        """Until every worker is there."""
        wait_until(lambda: len(self.workers) == WORKERS, "a worker is missing")

    def metric(self, name: str) -> float:
        lines = get(f"{self.serve.url}/metrics")[1].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[ {{]", line))


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(processes: list[psutil.Process], timeout_s: float = 15) -> None:
    wait_until(
        lambda: not any(lives(process) for process in processes),
        f"still there: {[process for process in processes if lives(process)]}",
        timeout_s,
    )


@contextmanager
def serving(
    folder: Path, *arguments: str, redis_url: str | None = None, workers: int = WORKERS, **env: str
) -> Iterator[Served]:
    tmp = folder / "t"
    tmp.mkdir()
    with ExitStack() as stack:
        upstream = stack.enter_context(run_example("counter_http.py", folder))
        config = write_config(
            folder,
            {
                "http": {"url": upstream.url},
                "stdio": {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]},
            },
        )
        settings = {
            "LEASEHOLD_ROUTE_HEADERS": "true",
            "LEASEHOLD_LEASE_TTL_MS": str(LEASE_MS),
            "TMPDIR": str(tmp),
            **env,
        }
        serve = stack.enter_context(
            run_gateway(config, folder, "--workers", str(workers), *arguments, redis_url=redis_url, env=settings)
        )
        yield Served(serve, upstream, tmp)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three workers and a Redis of their own; a test leaves them whole."""
    with serving(tmp_path_factory.mktemp("s")) as served:
        served.wait_whole()
        yield served


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    # A connection of its own for each request, so that each may land on another worker.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0)) as client:
        yield client


async def count(session: RawSession) -> tuple[str, str]:
    """Count up; the result and the owner. Asks again where the gateway says that nothing ran."""
    while True:
        answer = await session.call("increment", tag="t")
        if answer.status != 503:
            return answer.text, answer.headers["leasehold-owner"]
        await asyncio.sleep(0.05)


class TestTogether:
    async def test_b47_every_worker_answers_under_an_incarnation_of_its_own(
        self, shared: Served, http: aiohttp.ClientSession
    ) -> None:
        workers = set(shared.workers)
        assert len(workers) == WORKERS
        seen = set[str]()

        async def ask() -> None:
            async with http.get(f"{shared.serve.url}/healthz") as response:
                seen.add(response.headers["leasehold-worker"])

        async with asyncio.timeout(30):
            while len(seen) < WORKERS:
                await asyncio.gather(*(ask() for _ in range(30)))
        assert seen == workers

    async def test_sessions_of_a_killed_worker_go_on_at_once_and_its_gauges_count_no_more(
        self, shared: Served, http: aiohttp.ClientSession
    ) -> None:
        before = shared.workers
        wait_until(lambda: shared.metric("leasehold_redis_reachable") == WORKERS, "not all are counted")
        # What a Redis has in its first second may be from a file, and is believed only after a lease.
        (url,) = re.findall(r"redis_embedded url=(\S+)", shared.serve.output())
        with redis.Redis.from_url(url) as client:
            wait_until(lambda: client.info("server")["uptime_in_seconds"] >= 2, "Redis does not stand")
        async with RawSession(http, shared.url()) as session:
            counted, owner = await count(session)
            assert counted == "1"
            pid = before[owner]
            os.kill(pid, signal.SIGKILL)
            # What it accepted while it died is lost with its connections; that is not the session's loss.
            shared.wait_log(f"worker_died index=. pid={pid} code=-9")
            killed = time.monotonic()
            # The worker that answers is not always the one that scrapes were answered by before.
            assert shared.metric("leasehold_redis_reachable") <= WORKERS
            counted, adopter = await count(session)
            assert counted == "2"
            assert adopter in shared.workers
            assert adopter != owner
            assert time.monotonic() - killed < AT_ONCE_S
            shared.wait_whole()
            assert owner not in shared.workers
            wait_until(lambda: shared.metric("leasehold_redis_reachable") == WORKERS, "the dead one is counted")
        assert not list(shared.tmp.glob(f"leasehold-metrics-*/gauge_live*_{pid}.db"))

    async def test_a_worker_that_is_terminated_alone_leaves_its_sessions_to_its_siblings(
        self, shared: Served, http: aiohttp.ClientSession
    ) -> None:
        """Also with a private Redis, which outlives it."""
        async with RawSession(http, shared.url()) as session:
            _, owner = await count(session)
            name = (await session.call("whoami")).text
            pid = shared.workers[owner]
            os.kill(pid, signal.SIGTERM)
            asked = time.monotonic()
            counted, other = owner, owner
            while other == owner:
                assert time.monotonic() - asked < AT_ONCE_S
                try:
                    counted, other = await count(session)
                except aiohttp.ClientError:  # accepted as it closed its door
                    continue
            assert int(counted) >= 2
            assert (await session.call("whoami")).text == name
            shared.wait_log(f"worker_died index=. pid={pid} code=0")
            shared.wait_whole()

    async def test_a_private_redis_that_died_is_started_again_where_it_was(
        self, shared: Served, http: aiohttp.ClientSession
    ) -> None:
        async with RawSession(http, shared.url()) as session:
            assert (await count(session))[0] == "1"
            url = shared.log(r"redis_embedded url=(\S+)")[0]
            before = set(shared.workers)
            shared.redis().kill()
            wait_until(lambda: len(shared.workers) == WORKERS and not before & set(shared.workers), "not rejoined")
            with redis.Redis.from_url(url) as client:
                assert client.info("server")["process_id"] == shared.redis().pid
            assert (await count(session))[0] == "2"


class TestTheEnd:
    @pytest.mark.parametrize("private", [True, False], ids=["private-redis-SIGTERM", "given-redis-SIGINT"])
    async def test_nothing_is_left(
        self, private: bool, tmp_path_factory: pytest.TempPathFactory, http: aiohttp.ClientSession
    ) -> None:
        """B29; and open streams do not hold it up."""
        async with AsyncExitStack() as stack:
            given = None if private else stack.enter_context(EmbeddedRedis())
            served = stack.enter_context(serving(tmp_path_factory.mktemp("e"), redis_url=given and given.url))
            served.wait_whole()
            session = await RawSession(http, served.url()).__aenter__()
            assert (await count(session))[0] == "1"
            name = (await session.call("whoami")).text
            child = await RawSession(http, served.url("stdio")).__aenter__()
            assert (await count(child))[0] == "1"
            streams = [
                await stack.enter_async_context(http.get(each.url, headers=each.headers)) for each in (session, child)
            ]
            assert [stream.status for stream in streams] == [200, 200]

            below = psutil.Process(served.serve.pid).children(recursive=True)
            assert any("counter_stdio" in " ".join(process.cmdline()) for process in below)
            began = time.monotonic()
            served.serve.process.send_signal(signal.SIGTERM if private else signal.SIGINT)
            assert served.serve.process.wait(30) == 0
            assert time.monotonic() - began < 8, served.serve.output()  # the grace time is 10
            wait_gone(below)
            assert not list(served.tmp.iterdir())

            upstream = RawSession(http, served.upstream.url)
            upstream.headers |= {"mcp-session-id": name, "mcp-protocol-version": "2025-11-25"}
            left = await upstream.call("increment", tag="left")
            if given is None:
                assert left.status == 404, "its session should have been ended upstream"
                return
            assert left.text == "2", "its session should be there for other gateways of the fleet"
            with redis.Redis.from_url(given.url) as client:
                keys = list(client.scan_iter())
                assert Keys("leasehold").session(session.key).encode() in keys
                assert Keys("leasehold").session(child.key).encode() not in keys
                assert not list(client.scan_iter(Keys("leasehold").leases))
                assert all(client.pttl(key) > 0 for key in keys)

    async def test_workers_redis_and_children_end_with_a_killed_supervisor(
        self, tmp_path_factory: pytest.TempPathFactory, http: aiohttp.ClientSession
    ) -> None:
        with serving(tmp_path_factory.mktemp("k")) as served:
            served.wait_whole()
            await RawSession(http, served.url("stdio")).__aenter__()
            below = psutil.Process(served.serve.pid).children(recursive=True)
            assert len(below) >= WORKERS + 2
            served.serve.kill()
            wait_gone(below)

    async def test_calls_that_never_end_hold_up_the_stop_for_one_grace_time(
        self, tmp_path_factory: pytest.TempPathFactory, http: aiohttp.ClientSession
    ) -> None:
        """Those of its own clients and those it runs for others count from the same moment."""
        grace_s = 3.0
        with serving(tmp_path_factory.mktemp("g"), LEASEHOLD_SHUTDOWN_GRACE_S=str(grace_s)) as served:
            served.wait_whole()
            session = await RawSession(http, served.url()).__aenter__()
            calls: list[asyncio.Future[Any]] = []
            async with asyncio.timeout(30):
                # Until some run where they landed and some for another worker: where a connection lands is chance.
                while served.metric("leasehold_exchanges_executed_total") < 2 or len(calls) < 12:
                    slow = session.call("slow", seconds=60, steps=1, tag=str(len(calls)))
                    calls.append(asyncio.ensure_future(slow))
                    await asyncio.sleep(0.02)
            began = time.monotonic()
            served.serve.process.terminate()
            # In a thread: our end of the connections has to close for theirs to.
            assert await asyncio.to_thread(served.serve.process.wait, 30) == 0, served.serve.output()
            assert grace_s - 0.5 < time.monotonic() - began < 2 * grace_s
            await asyncio.gather(*calls, return_exceptions=True)

    async def test_a_second_ctrl_c_ends_everything_at_once_and_the_leases_of_the_killed(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with (
            EmbeddedRedis() as given,
            serving(tmp_path_factory.mktemp("c"), redis_url=given.url) as served,
            redis.Redis.from_url(given.url) as client,
        ):
            served.wait_whole()
            names = [key.decode() for key in client.scan_iter(Keys("leasehold").leases)]
            assert len(names) == WORKERS
            below = served.children()
            for pid in served.workers.values():
                os.kill(pid, signal.SIGSTOP)  # it will not hear of the stop
            served.serve.process.send_signal(signal.SIGINT)
            served.wait_log("stopping signal=SIGINT")
            served.serve.process.send_signal(signal.SIGINT)
            began = time.monotonic()
            assert served.serve.process.wait(30) == 1
            assert time.monotonic() - began < AT_ONCE_S
            wait_gone(below)
            assert not list(client.scan_iter(Keys("leasehold").leases))
            assert all(client.exists(Keys("leasehold").ended(Keys("leasehold").incarnation_of(name))) for name in names)

    def test_a_port_in_use_is_one_clear_line(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, {"a": {"command": "true"}})
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            command = [sys.executable, "-m", "leasehold.workers.cli", "serve", str(config), "--port", str(port)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 1
        assert ended.stderr == f"leasehold: cannot listen on 127.0.0.1:{port}: Address already in use\n"


class TestPrivateRedis:
    def test_when_it_cannot_be_started_again_serve_says_so_and_ends(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with serving(tmp_path_factory.mktemp("r"), workers=1) as served:
            below, server = served.children(), served.redis()
            (place,) = served.log(r"redis_embedded url=unix://(\S+)/redis.sock")
            shutil.rmtree(place)
            server.kill()
            assert served.serve.process.wait(30) == 1
            assert served.log("CRITICAL .* redis_not_restarted error=")
            wait_gone(below)

    def test_when_it_dies_again_and_again_serve_gives_up(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        with serving(tmp_path_factory.mktemp("r"), workers=1) as served:
            below = served.children()
            for deaths in range(1, 7):
                served.redis().kill()
                if deaths <= 5:
                    served.wait_log("redis_restarted", deaths)
            assert served.serve.process.wait(30) == 1
            assert served.log("CRITICAL .* redis_keeps_dying")
            wait_gone(below)


SUPERVISOR = """
    import os, signal, sys
    from contextlib import suppress
    from pathlib import Path
    from leasehold.pool import load_config
    from leasehold.workers.logs import configure_logs
    from leasehold.workers.settings import load_settings
    from leasehold.workers.supervisor import Supervisor

    class Changed(Supervisor):
        def work(self, index, lifeline, announce):
            {work}

    settings = load_settings({{}}, port=0)
    configure_logs("info", "text")
    sys.exit(Changed(settings, load_config(Path(sys.argv[1]), {{}})).run())
"""


class TestWorkersThatFail:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Iterator[Callable[[str], Running]]:
        """Run a supervisor whose workers do `work`."""
        config = write_config(tmp_path, {"a": {"command": "true"}})
        with ExitStack() as stack:

            def start(work: str) -> Running:
                program = textwrap.dedent(SUPERVISOR).format(work=textwrap.indent(work, " " * 8).strip())
                return stack.enter_context(run_process([sys.executable, "-c", program, str(config)], tmp_path))

            yield start

    def test_one_that_dies_at_every_start_is_restarted_more_and_more_slowly_and_said_to_keep_dying(
        self, run: Callable[[str], Running]
    ) -> None:
        serve = run("raise RuntimeError('no such thing')")
        wait_until(lambda: "worker_keeps_dying index=0 deaths=4" in serve.output(), serve.output())
        output = serve.output()
        assert re.findall(r"restart_in_s=(\S+)", output)[:4] == ["0.2", "0.4", "0.8", "1.6"]
        assert "joined=no" in output
        assert "RuntimeError: no such thing" in output
        began = time.monotonic()
        assert serve.stop() == 0  # in the middle of its wait
        assert time.monotonic() - began < AT_ONCE_S

    def test_one_that_joins_again_and_again_is_never_held_up_and_the_last_incarnation_counts(
        self, run: Callable[[str], Running]
    ) -> None:
        """10,000 incarnations are five times what the pipe holds."""
        serve = run(
            "for number in range(10_001):\n"
            "    with suppress(BlockingIOError):\n"
            "        os.write(announce, f'{number:08d}'.encode() + b'\\n')\n"
            "    number % 1_000 or __import__('time').sleep(0.1)\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        wait_until(lambda: "lease_ended" in serve.output(), serve.output())
        assert re.findall(r"lease_ended incarnation=(\d+)", serve.output())[0] == "00010000"
        assert serve.stop() == 0

    def test_one_that_joins_while_nobody_reads_is_not_held_up(self, run: Callable[[str], Running]) -> None:
        serve = run(
            "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
            "print('worker', os.getpid(), flush=True)\n"
            "signal.sigwait({signal.SIGUSR1})\n"
            "for number in range(10_000):\n"
            "    with suppress(BlockingIOError):\n"
            "        os.write(announce, f'{number:08d}'.encode() + b'\\n')\n"
            "print('through', flush=True)"
        )
        wait_until(lambda: "worker " in serve.output(), serve.output())
        worker = int(re.findall(r"worker (\d+)", serve.output())[0])
        serve.process.send_signal(signal.SIGSTOP)
        try:
            os.kill(worker, signal.SIGUSR1)
            wait_until(lambda: "through" in serve.output(), serve.output())
        finally:
            serve.process.send_signal(signal.SIGCONT)
        serve.stop()
