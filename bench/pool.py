"""What a call costs through the pool, and what it costs without one: `make bench` (ARGS="--seconds 3").

One stub upstream in a process of its own, one process per way to call a tool of it, all measured in turns, so that what
disturbs the machine disturbs all alike: read the ratios, not the figures.

    per_call          a session of the SDK for each call: connect, initialize, call, close
    per_call_shared   the same with one HTTP client for all
    sdk               one session of the SDK for all calls
    sdk_wide          the same with an HTTP client that keeps as many connections as there are calls in flight
    typed             `pool.session()` for each call: an `mcp.ClientSession` on loan
    raw               `pool.link()` for each call: JSON-RPC as bytes
    floor             the same POST by bare aiohttp; nobody reads the answer

The figures are in results/pool.json too. The exit code says nothing about the goals.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from child import Child
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent.parent / "results"
WAYS = ("per_call", "per_call_shared", "sdk", "sdk_wide", "typed", "raw", "floor")
ANSWERS = ("json", "sse")
IN_FLIGHT = (1, 32, 100)
ROUNDS = 3
WARM_UP_S = 0.15
"""Before each run, not counted: connections that idled since the last one are gone."""
LENDS = 5_000

RAW_CPU_US = 500.0
RAW_RATIO = 4.0
PER_CALL_RATIO = 20.0
LEND_US = 20.0


@dataclass
class Series:
    """One line of the table: all rounds of one case; its calls/s are those of the middle one."""

    answers: str
    way: str
    in_flight: int
    run: Callable[[float], dict[str, Any]]
    rates: list[float] = field(default_factory=list[float])
    cpu_s: float = 0.0
    failed: int = 0
    latencies_us: list[int] = field(default_factory=list[int])

    def measure(self, seconds: float) -> None:
        result = self.run(seconds)
        self.rates.append(result["calls"] / result["seconds"])
        self.cpu_s += result["cpu_s"]
        self.failed += result["failed"]
        self.latencies_us += result["latencies_us"]

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.latencies_us)
        calls = len(ordered)
        return {
            "answers": self.answers,
            "way": self.way,
            "in_flight": self.in_flight,
            "calls": calls,
            "failed": self.failed,
            "calls_per_s": round(median(self.rates)),
            "p50_us": ordered[calls // 2],
            "p99_us": ordered[calls * 99 // 100],
            "cpu_us_per_call": round(self.cpu_s / calls * 1e6),
        }


def cases(stack: ExitStack, ways: tuple[str, ...]) -> Iterator[Series]:
    base = stack.enter_context(Child("stub_upstream.py")).read()
    clients = {way: stack.enter_context(Child("pool_client.py", way)) for way in ways}
    for client in clients.values():
        client.read()
    for answers in ANSWERS:
        url = f"{base}/{answers}/mcp"
        for in_flight in IN_FLIGHT:
            for way, client in clients.items():
                # What keeps nothing between calls needs no warming up.
                warm_up_s = 0.0 if way == "per_call" else WARM_UP_S

                def run(
                    seconds: float,
                    client: Child = client,
                    url: str = url,
                    in_flight: int = in_flight,
                    warm_up_s: float = warm_up_s,
                ) -> dict[str, Any]:
                    return client.ask(do="run", url=url, in_flight=in_flight, seconds=seconds, warm_up_s=warm_up_s)

                yield Series(answers, way, in_flight, run)


def measure_lending() -> dict[str, float]:
    """What borrowing costs by itself, in us of CPU."""
    with Child("stub_upstream.py") as stub, Child("pool_client.py", "typed") as client:
        base = stub.read()
        client.read()
        return client.ask(do="lend", url=f"{base}/json/mcp", times=LENDS)


@dataclass(frozen=True)
class Goal:
    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def goals(rows: list[dict[str, Any]], lending: dict[str, float]) -> Iterator[Goal]:
    """Ratios of figures of this run; of several cases, the worst."""
    by = {(row["way"], row["answers"], row["in_flight"]): row for row in rows}
    every = [(answers, in_flight) for answers in ANSWERS for in_flight in IN_FLIGHT]

    def faster(way: str, than: str, answers: str, in_flight: int) -> float:
        return by[way, answers, in_flight]["calls_per_s"] / by[than, answers, in_flight]["calls_per_s"]

    def cheaper(way: str, than: str, answers: str, in_flight: int) -> float:
        return by[than, answers, in_flight]["cpu_us_per_call"] / by[way, answers, in_flight]["cpu_us_per_call"]

    worst = min(faster("typed", sdk, *case) for sdk in ("sdk", "sdk_wide") for case in every)
    yield Goal("pooled typed calls/s / persistent SDK session", worst, 1, at_least=True)
    slowest = max(by["raw", *case]["cpu_us_per_call"] for case in every)
    yield Goal("raw link: CPU us per call", slowest, RAW_CPU_US, at_least=False)
    for in_flight in IN_FLIGHT:
        for way in ("raw", "floor"):
            worst = min(faster(way, sdk, a, in_flight) for sdk in ("sdk", "sdk_wide") for a in ANSWERS)
            note = " (no goal: what is possible)" if way == "floor" else ""
            yield Goal(f"{way} calls/s / SDK's, {in_flight} in flight{note}", worst, RAW_RATIO, at_least=True)
    for way in ("per_call", "per_call_shared"):
        rate, cpu = (min(ratio("typed", way, *case) for case in every) for ratio in (faster, cheaper))
        yield Goal(f"pooled typed calls/s / {way}", rate, PER_CALL_RATIO, at_least=True)
        yield Goal(f"{way} CPU / pooled typed", cpu, PER_CALL_RATIO, at_least=True)
    yield Goal("acquire and release together, us of CPU", lending["acquire_release"], LEND_US, at_least=False)


def show(rows: list[dict[str, Any]], lending: dict[str, float], reached: list[Goal], console: Console) -> None:
    floors = {(row["answers"], row["in_flight"]): row["cpu_us_per_call"] for row in rows if row["way"] == "floor"}
    table = Table("answers", "in flight", "way", "calls/s", "p50 us", "p99 us", "CPU us per call", "CPU / floor")
    for column in (table.columns[1], *table.columns[3:]):
        column.justify = "right"
    for row in rows:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        floor = floors.get((row["answers"], row["in_flight"]))
        figures = (row[name] for name in ("calls_per_s", "p50_us", "p99_us", "cpu_us_per_call"))
        ratio = f"{row['cpu_us_per_call'] / floor:,.1f}" if floor else ""
        in_flight = str(row["in_flight"])
        table.add_row(row["answers"], in_flight, row["way"] + failed, *(f"{figure:,}" for figure in figures), ratio)
    console.print(table)
    if lending:
        console.print("borrowing alone, us of CPU: " + ", ".join(f"{what} {us:.1f}" for what, us in lending.items()))
    for goal in reached:
        verdict, sign = "met    " if goal.met else "NOT MET", ">=" if goal.at_least else "<="
        console.print(f"{verdict}  {goal.what}: {goal.value:,.2f} (goal {sign} {goal.limit:,g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="measured per line of the table (42 lines)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--only", help="some ways, separated by commas, without the goals")
    arguments = parser.parse_args()
    ways = tuple(arguments.only.split(",")) if arguments.only else WAYS
    if not set(ways) <= set(WAYS):
        parser.error(f"expected ways out of {', '.join(WAYS)}")
    lending = {} if arguments.only else measure_lending()
    with ExitStack() as stack:
        series = list(cases(stack, ways))
        for case in series:
            case.run(0.1)  # imports, sessions, caches
        for _ in range(ROUNDS):
            for case in series:
                case.measure(arguments.seconds / ROUNDS)
        rows = [case.summary() for case in series]
    reached = [] if arguments.only else list(goals(rows, lending))
    report = {
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
        "seconds": arguments.seconds,
        "rows": rows,
        "lending_us": lending,
        "goals": [{"what": g.what, "value": round(g.value, 3), "limit": g.limit, "met": g.met} for g in reached],
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(report, indent=2)
    (RESULTS / "pool.json").write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        show(rows, lending, reached, Console(width=max(130, Console().width)))


if __name__ == "__main__":
    main()
