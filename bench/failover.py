"""How long a fault lasts, and what it costs: `make failover` (ARGS="--json --only kill").

    kill      time from kill -9 of a worker to the next good answer on each of its sessions: where nobody sees it die,
              and where `serve` does
    rolling   calls lost while four workers are restarted in turn under load, again and again
    takeover  5,000 sessions of a worker that was killed, each called once: when the last one has answered
    sentinel  how long calls that need Redis wait when its master dies and Sentinel promotes the replica

Clients use a connection for each request, and another worker only where one refused it. A call whose connection broke
after it was sent is counted apart: it died with the process that held it. The figures are in results/failover.json too;
the exit code says nothing about the goals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import uvloop
from child import Child
from failover_clients import Balancer, Outcome, Session
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT / "tests"))

from chaos.nodes import Node  # noqa: E402
from chaos.sentinel import DOWN_AFTER_MS, sentinel_trio  # noqa: E402
from failover_stage import LIMIT_S, Figure, Stage, alone, supervised  # noqa: E402
from fleet import get, write_config  # noqa: E402
from leasehold.coordinator.embedded import EmbeddedRedis  # noqa: E402

LEASE_S = 3.0
"""The default."""
KILL_SESSIONS = 60
KILL_ROUNDS = 5
THINK_S = 0.15
SETTLE_S = 1.5
"""Before a kill: all sessions have made calls, and every worker knows who owns them."""
ROLLING_CLIENTS = 24
ROLLING_CALLS = 20_000
TAKEOVER_SESSIONS = 5_000
TAKEOVER_IN_FLIGHT = 64
SENTINEL_SESSIONS = 8


# -- kill ------------------------------------------------------------------------------------------------------------


@dataclass
class Gaps:
    """What a kill did to the sessions of the worker that died."""

    seconds: list[float] = field(default_factory=list[float])
    waiting: list[float] = field(default_factory=list[float])
    """Of those that waited for an answer when it died; they are among `seconds`, too."""
    outcomes: Counter[str] = field(default_factory=Counter[str])

    def figures(self, name: str, goal_s: float) -> list[Figure]:
        ordered = sorted(self.seconds)
        p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]
        failed = ", ".join(f"{outcome} {count}" for outcome, count in sorted(self.outcomes.items()) if outcome != "ok")
        note = f"{len(ordered)} sessions, {self.outcomes['ok']:,} good calls; others: {failed or 'none'}"
        return [
            Figure(f"{name}: to the next good answer, p50", p50, "s"),
            Figure(f"{name}: to the next good answer, p99", p99, "s", goal_s, note),
            Figure(f"{name}: to the next good answer, longest", ordered[-1], "s"),
            Figure(
                f"{name}: the same, of those with no call under way",
                max([gap for gap in ordered if gap not in self.waiting], default=0.0),
                "s",
                None,
                f"{len(self.waiting)} sessions waited for an answer when the worker died",
            ),
        ]


async def measure_gaps(
    sessions: Sequence[Session], mine: Sequence[Session], kill: Callable[[], Any], gaps: Gaps
) -> None:
    """All `sessions` call; `kill` ends the worker that owns `mine`."""
    over = False

    def note(outcome: Outcome) -> None:
        gaps.outcomes[outcome] += 1

    calling = [asyncio.create_task(session.calls_until(lambda: over, note, THINK_S)) for session in sessions]
    await asyncio.sleep(SETTLE_S)
    killed = perf_counter()
    waited = {session.id for session in mine if session.is_waiting}
    await kill()
    while any(session.first_good_after(killed) is None for session in mine) and perf_counter() < killed + LIMIT_S:
        await asyncio.sleep(0.05)
    over = True
    await asyncio.gather(*calling)
    for session in mine:
        gap = session.first_good_after(killed)
        gaps.seconds.append(LIMIT_S if gap is None else gap)
        if session.id in waited:
            gaps.waiting.append(gaps.seconds[-1])


async def kill_unseen(stage: Stage, rounds: int) -> list[Figure]:
    gaps = Gaps()
    async with alone(stage) as nodes:
        balancer = Balancer(nodes, "json")
        for number in range(rounds):
            victim = nodes[number % len(nodes)]
            mine = [await balancer.open(victim) for _ in range(KILL_SESSIONS)]
            await measure_gaps(mine, mine, lambda victim=victim: victim.kill(noticed=False), gaps)
            await victim.start()
    return gaps.figures(f"kill -9 that nobody sees, lease {LEASE_S:g} s", LEASE_S + 1)


async def kill_seen(stage: Stage, rounds: int) -> list[Figure]:
    gaps = Gaps()
    async with supervised(stage) as serve:
        balancer = Balancer([serve], "json")
        for _ in range(rounds):
            pids = await serve.whole()
            sessions = [await balancer.open() for _ in range(KILL_SESSIONS)]
            owner, _ = Counter(session.owner for session in sessions).most_common(1)[0]
            mine = [session for session in sessions if session.owner == owner]

            async def kill(pid: int = pids[owner]) -> None:
                os.kill(pid, signal.SIGKILL)

            await measure_gaps(sessions, mine, kill, gaps)
            await serve.whole(frozenset({pids[owner]}))
    return gaps.figures("kill -9 that serve sees", 0.5)


# -- rolling ---------------------------------------------------------------------------------------------------------


async def roll(name: str, balancer: Balancer, calls: int, restart_all: Callable[[], Any]) -> list[Figure]:
    """Load for so many calls, and restarts until they are made."""
    outcomes: Counter[str] = Counter()
    sessions = [await balancer.open() for _ in range(ROLLING_CLIENTS)]
    left, rounds, longest = calls, 0, 0.0

    def over() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def note(outcome: Outcome) -> None:
        outcomes[outcome] += 1

    calling = [asyncio.create_task(session.calls_until(over, note, 0.0)) for session in sessions]
    while left > 0 or not rounds:
        await restart_all()
        rounds += 1
    await asyncio.gather(*calling)
    for session in sessions:
        longest = max([longest, *(answered - sent for sent, answered in session.good)])
    lost = sum(outcomes[outcome] for outcome in ("not_run", "unknown", "gone", "error"))
    told = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(outcomes.items()))
    return [
        Figure(f"{name}: calls lost", lost, f"of {outcomes.total():,}", 0, f"{told}; {rounds} rounds of restarts"),
        Figure(f"{name}: calls whose connection died with a process", outcomes["connection"], ""),
        Figure(f"{name}: longest good call", longest, "s"),
    ]


async def rolling_alone(stage: Stage, calls: int) -> list[Figure]:
    async with alone(stage) as nodes:

        async def restart_all() -> None:
            for node in nodes:
                await node.stop()
                await node.start()

        return await roll("rolling restart, workers of their own", Balancer(nodes, "json"), calls, restart_all)


async def rolling_supervised(stage: Stage, calls: int) -> list[Figure]:
    async with supervised(stage) as serve:

        async def restart_all() -> None:
            for pid in (await serve.whole()).values():
                os.kill(pid, signal.SIGTERM)
                await serve.whole(frozenset({pid}))

        return await roll("rolling restart, under serve", Balancer([serve], "json"), calls, restart_all)


# -- takeover --------------------------------------------------------------------------------------------------------


def incarnations(node: Node) -> float:
    lines = get(f"{node.url}/metrics")[1].decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if re.match(r"leasehold_lease_incarnations_total", line)
    )


async def takeover(stage: Stage, count: int) -> list[Figure]:
    async with alone(stage) as nodes:
        victim, *others = nodes
        opening, calling = Balancer([victim], "json"), Balancer(others, "json")
        sessions: list[Session] = []

        async def open_share(number: int) -> None:
            sessions.extend([await opening.open() for _ in range(number, count, TAKEOVER_IN_FLIGHT)])

        await asyncio.gather(*(open_share(number) for number in range(TAKEOVER_IN_FLIGHT)))
        before = [incarnations(node) for node in others]
        waiting = [Session(calling, session.id, "") for session in sessions]
        outcomes: Counter[str] = Counter()

        async def call_share() -> None:
            while waiting:
                session = waiting.pop()
                while (outcome := await session.call()) != "ok" and session.calls < 100:
                    outcomes[outcome] += 1
                    await asyncio.sleep(0.05)
                outcomes[outcome] += 1

        killed = perf_counter()
        await victim.kill(noticed=True)
        await asyncio.gather(*(call_share() for _ in range(TAKEOVER_IN_FLIGHT)))
        seconds = perf_counter() - killed
        missed = sum(incarnations(node) - was for node, was in zip(others, before, strict=True))
    told = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(outcomes.items()))
    return [
        Figure(f"takeover of {count:,} sessions by three workers", seconds, "s", 5.0, told),
        Figure("takeover: leases missed meanwhile", missed, "", 0),
    ]


# -- sentinel --------------------------------------------------------------------------------------------------------


async def sentinel(stage: Stage) -> list[Figure]:
    """Each session is called at the worker that does not own it, so each call needs Redis."""
    async with sentinel_trio(stage.folder) as trio, alone(replace(stage, redis_url=trio.url), 2) as (one, other):
        sessions = [await Balancer([one], "json").open() for _ in range(SENTINEL_SESSIONS)]
        for session in sessions:
            session.balancer = Balancer([other], "json")
        gaps = Gaps()
        promoted_s = 0.0

        async def fail_over() -> None:
            nonlocal promoted_s
            begun = perf_counter()
            await trio.fail_over(0.0)
            promoted_s = perf_counter() - begun

        await measure_gaps(sessions, sessions, fail_over, gaps)
    ordered = sorted(gaps.seconds)
    note = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(gaps.outcomes.items()))
    return [
        Figure(
            "Sentinel failover: until the replica takes writes", promoted_s, "s", None, f"down after {DOWN_AFTER_MS} ms"
        ),
        Figure("Sentinel failover: write gap, longest of the sessions", ordered[-1], "s", None, note),
    ]


# -- all -------------------------------------------------------------------------------------------------------------


async def measure(stage: Stage, arguments: argparse.Namespace) -> list[Figure]:
    parts: dict[str, list[Callable[[], Any]]] = {
        "kill": [lambda: kill_unseen(stage, arguments.rounds), lambda: kill_seen(stage, arguments.rounds)],
        "rolling": [
            lambda: rolling_alone(stage, arguments.calls),
            lambda: rolling_supervised(stage, arguments.calls),
        ],
        "takeover": [lambda: takeover(stage, arguments.sessions)],
        "sentinel": [lambda: sentinel(stage)],
    }
    figures: list[Figure] = []
    for name, measurements in parts.items():
        if arguments.only in (None, name):
            for measured in measurements:
                figures += await measured()
    return figures


def show(figures: Sequence[Figure], console: Console) -> None:
    table = Table("what", "figure", "goal", "")
    for figure in figures:
        value = f"{figure.value:,.3f} {figure.unit}" if figure.unit == "s" else f"{figure.value:,.0f} {figure.unit}"
        goal = "" if figure.goal is None else f"{figure.goal:g}: {'met' if figure.met else 'NOT MET'}"
        table.add_row(figure.what, value, goal, figure.note)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("kill", "rolling", "takeover", "sentinel"))
    parser.add_argument("--rounds", type=int, default=KILL_ROUNDS, help="kills of each kind")
    parser.add_argument("--calls", type=int, default=ROLLING_CALLS, help="in a rolling restart")
    parser.add_argument("--sessions", type=int, default=TAKEOVER_SESSIONS, help="to be taken over")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as redis, Child("stub_upstream.py") as stub:
        options = {"max_sessions": arguments.sessions + 1000}
        config = write_config(Path(folder), {"json": {"url": f"{stub.read()}/json/mcp", "leasehold": options}})
        figures = uvloop.run(measure(Stage(Path(folder), config, redis.url), arguments))
    report = {
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
        "lease_s": LEASE_S,
        "figures": [{**asdict(figure), "value": round(figure.value, 4), "met": figure.met} for figure in figures],
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(report, indent=2)
    (RESULTS / "failover.json").write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        show(figures, Console(width=max(150, Console().width)))


if __name__ == "__main__":
    main()
