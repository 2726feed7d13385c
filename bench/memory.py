"""What idle sessions weigh, and that nothing grows: `make memory` (ARGS=--quick for a tenth of it).

Two parts, in processes of their own:

    idle    sessions that were opened, used once and left alone: resident and traced bytes of this process for each
            (child processes of stdio servers are not counted), file descriptors, CPU while nothing happens
    churn   100,000 times borrowed and given back, with everything that can go wrong: discarded, cancelled anywhere,
            refused, not reachable, lost (404), its holder failing, evicted; what is left each time the pool is empty

The figures are in results/memory.json too. The exit code is 1 if something grew, whatever the other goals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from child import HERE, Child
from rich.console import Console
from rich.table import Table

RESULTS = HERE.parent / "results"
KINDS = ("http-raw", "http-typed", "sse-raw", "sse-typed", "stdio-raw", "stdio-typed")
COUNTS = {"http": 5_000, "sse": 1_000, "stdio": 50}
TRACED = 500
"""Sessions of the runs in which Python's allocations are traced, which changes the resident size."""
GOAL_BYTES = 40 * 1024
CYCLES = 100_000
STEPS = 10
WARM_UP_CYCLES = 1_000
MAY_GROW = {"objects": 500, "pooled_sessions": 0, "tasks": 0, "fds": 2, "rss": 8 * 2**20, "unforeseen": 0}
"""From the first step to the last; caches of strings and allocators come to rest in the first."""


def hold(kind: str, url: str, count: int) -> dict[str, float]:
    targets: dict[str, Any] = {
        "http": f"{url}/mcp",
        "sse": f"{url}/sse",
        "stdio": [sys.executable, str(HERE / "stdio_echo.py")],
    }
    target = targets[kind.partition("-")[0]]
    with Child("memory_worker.py") as worker:
        worker.read()
        found = worker.ask(do="hold", kind=kind, target=target, count=count, traced=False)
    with Child("memory_worker.py") as worker:
        worker.read()
        traced = worker.ask(do="hold", kind=kind, target=target, count=min(count, TRACED), traced=True)
    return {**found, "traced_bytes_each": traced["traced_bytes_each"]}


def churn(url: str, cycles: int) -> list[dict[str, Any]]:
    with Child("memory_worker.py") as worker:
        worker.read()
        worker.ask(do="churn", url=url, cycles=WARM_UP_CYCLES)  # what is made once
        return [worker.ask(do="churn", url=url, cycles=cycles // STEPS) for _ in range(STEPS)]


def show_idle(rows: dict[str, dict[str, float]], console: Console) -> None:
    names = ("sessions", "KiB each", "traced KiB each", "tasks each", "fds", "CPU idle", "opened in s", "closed in s")
    table = Table("idle", *names)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, row in rows.items():
        table.add_row(
            kind,
            f"{row['sessions']:,}",
            f"{row['bytes_each'] / 1024:.1f}",
            f"{row['traced_bytes_each'] / 1024:.1f}",
            f"{row['tasks_each']:.1f}",
            f"{row['fds']:,}",
            f"{row['idle_cpu']:.1%}",
            f"{row['open_s']:.1f}",
            f"{row['close_s']:.1f}",
        )
    console.print(table)
    for kind, row in rows.items():
        verdict = "met    " if row["bytes_each"] < GOAL_BYTES else "NOT MET"
        console.print(f"{verdict}  {kind}: {row['bytes_each'] / 1024:.1f} KiB per idle session (goal < 40)")


def grown(steps: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What is more at the end than it was after the first step, and by how much more than it may be."""
    return {
        name: steps[-1][name] - steps[0][name]
        for name, allowed in MAY_GROW.items()
        if steps[-1][name] - steps[0][name] > allowed
    }


def show_churn(steps: Sequence[dict[str, Any]], cycles: int, console: Console) -> None:
    table = Table("cycles", "objects", "pooled sessions", "tasks", "RSS MiB", "fds", "s")
    for column in table.columns:
        column.justify = "right"
    for number, step in enumerate(steps, 1):
        table.add_row(
            f"{cycles // STEPS * number:,}",
            f"{step['objects']:,}",
            str(step["pooled_sessions"]),
            str(step["tasks"]),
            f"{step['rss'] / 2**20:.1f}",
            str(step["fds"]),
            f"{step['seconds']:.1f}",
        )
    console.print(table)
    console.print(f"ended: {steps[-1]['outcomes']}")
    console.print(f"sessions closed: {steps[-1]['closed']}")
    more = grown(steps)
    console.print(f"NOT MET  grew: {more}" if more else "met      nothing grew")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the sessions and cycles")
    parser.add_argument("--only", help=f"kinds, separated by commas: {', '.join(KINDS)}, churn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    arguments = parser.parse_args()
    wanted = tuple(arguments.only.split(",")) if arguments.only else (*KINDS, "churn")
    if not set(wanted) <= {*KINDS, "churn"}:
        parser.error(f"expected kinds out of {', '.join(KINDS)}, churn")
    part = 10 if arguments.quick else 1
    rows: dict[str, dict[str, float]] = {}
    steps: list[dict[str, Any]] = []
    # Calls that take half a millisecond, so that there is something to cancel; three in a thousand sessions are lost.
    with Child("soak_upstream.py", "0", "0") as steady, Child("soak_upstream.py", "0.0005", "0.003") as shaky:
        steady_url, shaky_url = steady.read(), shaky.read()
        for kind in wanted:
            if kind != "churn":
                rows[kind] = hold(kind, steady_url, COUNTS[kind.partition("-")[0]] // part)
        if "churn" in wanted:
            steps = churn(shaky_url, CYCLES // part)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"idle": rows, "churn": steps}, indent=2)
    (RESULTS / "memory.json").write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        console = Console(width=max(120, Console().width))
        if rows:
            show_idle(rows, console)
        if steps:
            show_churn(steps, CYCLES // part, console)
    return 1 if grown(steps or [dict.fromkeys(MAY_GROW, 0)]) else 0


if __name__ == "__main__":
    sys.exit(main())
