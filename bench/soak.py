"""Many users, one pool, for a long time: `make soak` (ARGS="--requests 607000 --state results/soak-full.json").

From 200 to 1,000 users at once, in one process, each borrow a session, call an echo tool that takes a moment, give the
session back, and pause. The pool has fewer sessions than there are users. Every answer is compared with its question,
and the calls that the upstream says it executed with those that were made.

Failures are counted by cause: `pool` (the pool's own refusals and time-outs, a session that was lent dead, another
user's answer, anything unforeseen), `transport` (connections to the upstream), `application` (the server's errors).

With --state a run that was stopped, or killed, goes on where it was; without, results/soak.json has its figures.
To leave it alone for long:  nohup .venv/bin/python bench/soak.py --requests 607000 --state FILE >LOG 2>&1 &
The exit code is 1 if any call failed, 2 if it stopped before the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import psutil
import uvloop
from child import Child
from leasehold.pool import HttpTarget, SessionPool, Upstream
from leasehold.pool.dispatcher import CallFailed
from leasehold.pool.errors import CallTimeout, CircuitOpen, Fenced, OpenFailed, PoolError, UpstreamLost, UpstreamRefused
from leasehold.pool.upstream import SseTarget
from mcp.shared.exceptions import MCPError

RESULTS = Path(__file__).resolve().parent.parent / "results"
TRANSPORT_ERRORS = (CallTimeout, CircuitOpen, Fenced, OpenFailed, UpstreamLost, UpstreamRefused)
CAUSES = ("pool", "transport", "application")
RAMP_SHARE = 0.5
"""Part of the requests in which the number of users grows; for the rest there are as many as there will be."""
SAVE_EVERY_S = 5.0
TELL_EVERY_S = 10.0
BUCKETS_PER_E = 50
"""Latencies are kept as a histogram whose steps are 2 % wide."""


@dataclass
class State:
    """What has been counted, over all runs of one soak."""

    requests: int = 0
    failures: dict[str, dict[str, int]] = field(default_factory=lambda: {cause: {} for cause in CAUSES})
    latencies: dict[str, int] = field(default_factory=dict[str, int])
    """Calls by step of the histogram: with waiting for a session, from the user's point of view."""
    by_transport: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0
    runs: int = 0
    executed: int = 0
    compared: int = 0
    """Calls of the runs that came to an end, and how many of those the upstream executed."""

    @classmethod
    def load(cls, path: Path | None) -> State:
        if path is None or not path.exists():
            return cls()
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        fresh.replace(path)

    def failed(self, cause: str, what: str) -> None:
        kinds = self.failures[cause]
        kinds[what] = kinds.get(what, 0) + 1

    def total(self, cause: str) -> int:
        return sum(self.failures[cause].values())

    def took(self, transport: str, seconds: float) -> None:
        self.requests += 1
        self.by_transport[transport] = self.by_transport.get(transport, 0) + 1
        step = str(round(math.log(max(seconds, 1e-6)) * BUCKETS_PER_E))
        self.latencies[step] = self.latencies.get(step, 0) + 1


def percentiles(latencies: dict[str, int], *percents: float) -> list[float]:
    """In ms."""
    steps = sorted((int(step), count) for step, count in latencies.items())
    total = sum(count for _, count in steps)
    found: list[float] = []
    for percent in percents:
        rank, seen = total * percent / 100, 0
        for step, count in steps:
            seen += count
            if seen >= rank:
                found.append(math.exp(step / BUCKETS_PER_E) * 1e3)
                break
    return found or [math.nan] * len(percents)


def cause_of(error: BaseException) -> tuple[str, str]:
    """Whose failure it is, and its name."""
    blamed = error.cause if isinstance(error, CallFailed) else error
    name = type(blamed).__name__
    if isinstance(blamed, TRANSPORT_ERRORS):
        return "transport", name
    if isinstance(blamed, MCPError) and not isinstance(blamed, PoolError):
        return "application", name
    return "pool", f"{name}: {blamed}"[:120]


class Soak:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, state: State, base: str) -> None:
        self.state = state
        self.begun = 0
        """Calls that were made in this run."""
        self._wanted = arguments.requests - state.requests
        self._think_s = arguments.think
        self._first, self._last = arguments.users
        self._ramp = max(1.0, arguments.requests * RAMP_SHARE)
        self._principals = arguments.principals
        limits: dict[str, Any] = {"max_sessions": arguments.sessions, "call_timeout_s": 60.0}
        targets = {"http": HttpTarget(f"{base}/mcp"), "sse": SseTarget(f"{base}/sse")}
        self._upstreams = [Upstream(name, targets[name], **limits) for name in arguments.transports]
        self._users: set[asyncio.Task[None]] = set()
        self._numbers = iter(range(sys.maxsize))
        self.stopping = asyncio.Event()

    @property
    def users(self) -> int:
        return len(self._users)

    @property
    def is_over(self) -> bool:
        return self.stopping.is_set() or self.begun >= self._wanted

    async def run(self, pool: SessionPool, seconds: float) -> None:
        """Until all requests were made, or the time is over, or it was stopped; whatever has begun ends first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.is_over:
                    grown = min(1.0, self.state.requests / self._ramp)
                    for _ in range(round(self._first + (self._last - self._first) * grown) - self.users):
                        user = asyncio.create_task(self._user(pool, next(self._numbers)))
                        self._users.add(user)
                        user.add_done_callback(self._users.discard)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.5):
                            await self.stopping.wait()
        self.stopping.set()
        if self._users:
            await asyncio.wait(self._users)

    async def _user(self, pool: SessionPool, number: int) -> None:
        upstream = self._upstreams[number % len(self._upstreams)]
        principal = f"team-{number % self._principals}"
        while not self.is_over:
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0, 2 * self._think_s)):
                    await self.stopping.wait()
            if self.is_over:
                return
            self.begun += 1
            await self._call(pool, upstream, principal, f"user {number}, call {self.begun}")

    async def _call(self, pool: SessionPool, upstream: Upstream, principal: str, text: str) -> None:
        began = perf_counter()
        try:
            async with pool.session(upstream, principal=principal) as session:
                result = await session.call_tool("echo", {"text": text})
            answer: Any = result.content[0]
            if result.is_error:
                self.state.failed("application", "tool error")
            elif answer.text != text:
                self.state.failed("pool", "another call's answer")
        except Exception as error:
            self.state.failed(*cause_of(error))
        self.state.took(upstream.name, perf_counter() - began)


async def tell(soak: Soak, pool: SessionPool, requests: int) -> None:
    """A line every few seconds."""
    state, process = soak.state, psutil.Process()
    while True:
        done, spent, latencies = state.requests, process_time(), Counter(state.latencies)
        await asyncio.sleep(TELL_EVERY_S)
        p50, p99 = percentiles(dict(Counter(state.latencies) - latencies), 50, 99)
        failures = ", ".join(f"{cause} {state.total(cause)}" for cause in CAUSES)
        print(
            f"{state.requests:>7,}/{requests:,}  users {soak.users}  {(state.requests - done) / TELL_EVERY_S:,.0f}/s  "
            f"p50 {p50:,.0f} ms  p99 {p99:,.0f} ms  failures: {failures}  sessions {len(pool)}  "
            f"CPU {(process_time() - spent) / TELL_EVERY_S:.0%}  RSS {process.memory_info().rss / 2**20:.0f} MiB",
            flush=True,
        )


async def keep(state: State, path: Path) -> None:
    """Save now and then."""
    before, began = state.seconds, perf_counter()
    while True:
        await asyncio.sleep(SAVE_EVERY_S)
        state.seconds = before + perf_counter() - began
        state.save(path)


async def run(arguments: argparse.Namespace, state: State, path: Path) -> None:
    state.runs += 1
    before, began = state.seconds, perf_counter()
    with Child("soak_upstream.py", str(arguments.delay), str(arguments.forget)) as upstream:
        soak = Soak(arguments, state, upstream.read())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, soak.stopping.set)
        async with SessionPool(acquire_timeout_s=arguments.patience) as pool:
            watching = [
                asyncio.create_task(tell(soak, pool, arguments.requests)),
                asyncio.create_task(keep(state, path)),
            ]
            await soak.run(pool, arguments.minutes * 60)
            for task in watching:
                task.cancel()
            await asyncio.wait(watching)
            print(pool.statistics(), flush=True)
        counts = upstream.ask()
    print(f"upstream: {counts}", flush=True)
    state.seconds = before + perf_counter() - began
    state.compared += soak.begun
    state.executed += counts.get("executed", 0)
    state.save(path)


def report(state: State) -> None:
    names = (50, 90, 99, 99.9)
    told = ", ".join(f"p{n:g} {ms:,.1f} ms" for n, ms in zip(names, percentiles(state.latencies, *names), strict=True))
    by = ", ".join(f"{name} {count:,}" for name, count in state.by_transport.items())
    print(f"{state.requests:,} requests ({by}) in {state.seconds:,.0f} s and {state.runs} runs; {told}")
    print(f"executed by the upstream: {state.executed:,} of {state.compared:,} calls of the runs that ended in order")
    for cause in CAUSES:
        kinds = state.failures[cause]
        share = state.total(cause) / state.requests if state.requests else 0.0
        print(
            f"{cause:<12} {state.total(cause):>7,} failures ({share:.3%})"
            + "".join(f"\n    {k}" for k in kinds.items())
        )


def user_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("..")
    found = int(first), int(last or first)
    if not 1 <= found[0] <= found[1]:
        raise ValueError
    return found


def transports(text: str) -> list[str]:
    names = text.split(",")
    if not names or not set(names) <= {"http", "sse"}:
        raise ValueError
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--users", type=user_range, default=(200, 1000), help="from..to (200..1000)")
    parser.add_argument("--transports", type=transports, default=["http", "sse"], help="http,sse")
    parser.add_argument("--sessions", type=int, default=150, help="limit of the pool, per transport")
    parser.add_argument("--principals", type=int, default=1, help="whose sessions are never mixed")
    parser.add_argument("--think", type=float, default=0.5, help="mean pause of a user between calls, s")
    parser.add_argument("--delay", type=float, default=0.02, help="mean time that the tool takes, s")
    parser.add_argument(
        "--forget", type=float, default=0.0, help="share of calls at which the upstream loses a session"
    )
    parser.add_argument("--patience", type=float, default=30.0, help="how long a user waits for a session, s")
    parser.add_argument("--minutes", type=float, default=90.0, help="stop after so long, whatever is left")
    parser.add_argument("--state", type=Path, help="where the counts are kept")
    arguments = parser.parse_args()
    path = arguments.state or RESULTS / "soak.json"
    state = State.load(arguments.state)
    print(f"pid {os.getpid()}, {state.requests:,} of {arguments.requests:,} requests were made before", flush=True)
    if state.requests < arguments.requests:
        uvloop.run(run(arguments, state, path))
    report(state)
    if state.requests < arguments.requests:
        return 2
    return 1 if any(state.total(cause) for cause in CAUSES) else 0


if __name__ == "__main__":
    sys.exit(main())
