"""What a hop costs: `make bench` (ARGS="--seconds 3 --json").

Everything runs side by side and is measured in turns, so that what disturbs the machine disturbs all alike: read the
ratios, not the figures. Two layers:

    exchange   two processes, a trivial application at the owner, no HTTP: what the channel alone costs
    json, sse  two one-worker gateways on one Redis, a stub upstream that answers in JSON or as event stream:
               direct     client to stub
               local      each request to the worker that owns its session
               forwarded  each request to the other worker

The figures are in results/hop.json too. The exit code says nothing about the goals.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
from child import Child
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT / "tests"))

from fleet import run_gateway, write_config  # noqa: E402
from leasehold.coordinator.embedded import EmbeddedRedis  # noqa: E402

IN_FLIGHT = (1, 32)
SESSIONS = 64
ROUNDS = 6
WARM_UP_S = 0.3
INSIDE_SCRIPTS = ("hget", "hmget", "llen", "rpush", "pexpire", "time", "exists", "pttl")
"""Redis counts what a script calls as commands too; we send these only inside scripts, or a few times per second."""

EXCHANGES_PER_S = 5_000
HOP_PER_EXCHANGE = 2.0
HOP_US = 1_500.0
THROUGHPUT_RATIO = 0.7


class Redis:
    """The private server and its counters."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client: Any = redis.Redis.from_url(url)
        self.pid = int(self._client.info("server")["process_id"])

    def commands(self) -> tuple[int, int]:
        """(sent by clients, all) since start."""
        counts = {name: row["calls"] for name, row in self._client.info("commandstats").items()}
        total = sum(counts.values())
        return total - sum(counts.get(f"cmdstat_{name}", 0) for name in INSIDE_SCRIPTS), total


@dataclass
class Series:
    """One line of the table: all rounds of one case."""

    layer: str
    route: str
    in_flight: int
    sides: dict[str, list[int]]
    """Whose CPU time is counted: a name and the ids of its processes."""
    run: Callable[[float], dict[str, Any]]
    redis: Redis
    seconds: float = 0.0
    failed: int = 0
    latencies_us: list[int] = field(default_factory=list[int])
    cpu_s: dict[str, float] = field(default_factory=dict[str, float])
    sent: int = 0
    commands: int = 0

    def measure(self, seconds: float) -> None:
        sent, commands = self.redis.commands()
        before = {side: cpu_seconds(pids) for side, pids in self.sides.items()}
        result = self.run(seconds)
        for side, pids in self.sides.items():
            self.cpu_s[side] = self.cpu_s.get(side, 0.0) + cpu_seconds(pids) - before[side]
        sent_now, commands_now = self.redis.commands()
        self.sent += sent_now - sent
        self.commands += commands_now - commands
        self.seconds += result["seconds"]
        self.failed += result["failed"]
        self.latencies_us += result["latencies_us"]

    def summary(self) -> dict[str, Any]:
        calls = len(self.latencies_us)
        ordered = sorted(self.latencies_us)
        return {
            "layer": self.layer,
            "route": self.route,
            "in_flight": self.in_flight,
            "calls": calls,
            "failed": self.failed,
            "calls_per_s": round(calls / self.seconds),
            "p50_us": ordered[calls // 2],
            "p99_us": ordered[calls * 99 // 100],
            "cpu_us_per_call": {side: round(seconds / calls * 1e6) for side, seconds in self.cpu_s.items()},
            "redis_commands_per_call": round(self.sent / calls, 2),
            "redis_commands_per_call_with_scripts": round(self.commands / calls, 2),
        }


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of some processes so far."""
    return sum(times.user + times.system for times in (psutil.Process(pid).cpu_times() for pid in pids))


def family(pid: int) -> list[int]:
    """A supervisor and its workers."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def exchange_cases(stack: ExitStack, server: Redis) -> Iterator[Series]:
    caller, owner = (stack.enter_context(Child("exchange_end.py", server.url)) for _ in range(2))
    caller.read()
    incarnation = owner.read()
    sides = {"caller": [caller.pid], "owner": [owner.pid], "redis": [server.pid]}
    for in_flight in IN_FLIGHT:

        def run(seconds: float, in_flight: int = in_flight) -> dict[str, Any]:
            return caller.ask(owner=incarnation, in_flight=in_flight, seconds=seconds)

        yield Series("exchange", "sealed", in_flight, sides, run, server)


def gateway_cases(stack: ExitStack, server: Redis, folder: Path) -> Iterator[Series]:
    stub = stack.enter_context(Child("stub_upstream.py"))
    load = stack.enter_context(Child("http_load.py"))
    stub_url = stub.read()
    config = write_config(folder, {name: {"url": f"{stub_url}/{name}/mcp"} for name in ("json", "sse")})
    gateways = [stack.enter_context(run_gateway(config, folder, redis_url=server.url)) for _ in range(2)]
    sides = {
        "gateways": [pid for gateway in gateways for pid in family(gateway.pid)],
        "redis": [server.pid],
        "stub": [stub.pid],
        "client": [load.pid],
    }
    for name in ("json", "sse"):
        stub_at = f"{stub_url}/{name}/mcp"
        first, second = (f"{gateway.url}/servers/{name}/mcp" for gateway in gateways)
        mine, yours = (load.ask(do="open", url=url, count=SESSIONS // 2) for url in (first, second))
        routes = {
            "direct": [(stub_at, load.ask(do="open", url=stub_at, count=SESSIONS))],
            "local": [(first, mine), (second, yours)],
            "forwarded": [(first, yours), (second, mine)],
        }
        for in_flight in IN_FLIGHT:
            for route, targets in routes.items():

                def run(seconds: float, targets: Any = targets, in_flight: int = in_flight) -> dict[str, Any]:
                    return load.ask(do="run", targets=targets, in_flight=in_flight, seconds=seconds)

                yield Series(name, route, in_flight, sides, run, server)


@dataclass(frozen=True)
class Goal:
    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def goals(rows: list[dict[str, Any]]) -> Iterator[Goal]:
    """Ratios of figures of this run."""
    by = {(row["layer"], row["route"], row["in_flight"]): row for row in rows}
    low, high = IN_FLIGHT
    bare = by["exchange", "sealed", low]["p50_us"]
    rate = by["exchange", "sealed", high]["calls_per_s"]
    yield Goal(f"exchange layer alone, {high} in flight: exchanges/s", rate, EXCHANGES_PER_S, at_least=True)
    for layer in ("json", "sse"):
        extra = by[layer, "forwarded", low]["p50_us"] - by[layer, "local", low]["p50_us"]
        what = f"{layer}: what a hop adds to p50 / p50 of a bare exchange"
        yield Goal(what, extra / bare, HOP_PER_EXCHANGE, at_least=False)
        yield Goal(f"{layer}: what a hop adds to p50, us", extra, HOP_US, at_least=False)
        ratio = by[layer, "forwarded", high]["calls_per_s"] / by[layer, "local", high]["calls_per_s"]
        yield Goal(f"{layer}: throughput forwarded / local, {high} in flight", ratio, THROUGHPUT_RATIO, at_least=True)


def show(rows: list[dict[str, Any]], reached: list[Goal], console: Console) -> None:
    table = Table("layer", "route", "in flight", "calls/s", "p50 us", "p99 us", "CPU us per call", "Redis commands")
    for column in table.columns[2:6]:
        column.justify = "right"
    for row in rows:
        cpu = ", ".join(f"{side} {us}" for side, us in row["cpu_us_per_call"].items())
        commands = f"{row['redis_commands_per_call']} (in scripts too: {row['redis_commands_per_call_with_scripts']})"
        figures = (row[name] for name in ("in_flight", "calls_per_s", "p50_us", "p99_us"))
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        table.add_row(row["layer"], row["route"] + failed, *(f"{figure:,}" for figure in figures), cpu, commands)
    console.print(table)
    for goal in reached:
        verdict, sign = "met    " if goal.met else "NOT MET", ">=" if goal.at_least else "<="
        console.print(f"{verdict}  {goal.what}: {goal.value:,.2f} (goal {sign} {goal.limit:,g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured per line of the table (14 lines)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--only", choices=("exchange", "json", "sse"), help="one layer, without the goals")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = Redis(stack.enter_context(EmbeddedRedis()).url)
        cases = [*exchange_cases(stack, server), *gateway_cases(stack, server, folder)]
        cases = [case for case in cases if arguments.only in (None, case.layer)]
        for case in cases:
            case.run(WARM_UP_S)
        for _ in range(ROUNDS):
            for case in cases:
                case.measure(arguments.seconds / ROUNDS)
        rows = [case.summary() for case in cases]
    reached = [] if arguments.only else list(goals(rows))
    report = {
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
        "seconds": arguments.seconds,
        "rows": rows,
        "goals": [{"what": g.what, "value": round(g.value, 3), "limit": g.limit, "met": g.met} for g in reached],
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(report, indent=2)
    (RESULTS / "hop.json").write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        show(rows, reached, Console(width=max(150, Console().width)))


if __name__ == "__main__":
    main()
