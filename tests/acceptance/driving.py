"""Runs client programs as processes of their own, and checks afterwards what the upstream says it has executed."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet import Fleet, get


@dataclass
class Finished:
    """A program that has ended by itself."""

    code: int
    output: str
    errors: str

    def __repr__(self) -> str:
        return f"<Finished {self.code} {self.output[-2000:]}\n{self.errors[-2000:]}>"


async def run(command: Sequence[str | Path], *, timeout_s: float, env: dict[str, str] | None = None) -> Finished:
    """Run a program to its end, or kill it after `timeout_s`."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert process.returncode is not None
    return Finished(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))


async def report(command: Sequence[str | Path], *, timeout_s: float, env: dict[str, str] | None = None) -> Any:
    """The JSON line that one of our client programs ends with."""
    finished = await run(command, timeout_s=timeout_s, env=env)
    assert finished.output.strip(), finished
    return json.loads(finished.output.strip().splitlines()[-1])


async def shift(fleet: Fleet) -> None:
    """Let the balancer's next request go one worker further than it would have."""
    assert fleet.proxy is not None
    await asyncio.to_thread(get, f"{fleet.proxy.url}/healthz")


def executed(journal: Path, tag: str) -> list[dict[str, Any]]:
    """The upstream's executions whose tag is `tag` or begins with `tag/`, in their order."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return [line for line in lines if line["tag"] == tag or line["tag"].startswith(f"{tag}/")]


def check_exactly_once(journal: Path, tag: str, *, sessions: int, calls: int) -> None:
    """Calls tagged `tag/session/number`: each executed once, a session's in order and in one upstream session."""
    lines = executed(journal, tag)
    expected = {f"{tag}/{session}/{number}" for session in range(sessions) for number in range(1, calls + 1)}
    times = Counter(line["tag"] for line in lines)
    assert {name: count for name, count in times.items() if count > 1} == {}, "executed more than once"
    assert expected - set(times) == set(), "never executed"
    assert set(times) - expected == set(), "executed, but never called"
    seen: dict[str, list[tuple[str, int]]] = {}
    for line in lines:
        _, session, number = line["tag"].rsplit("/", 2)
        assert line["counter"] == int(number), line
        seen.setdefault(session, []).append((line["session"], int(number)))
    upstream_sessions = {entries[0][0] for entries in seen.values()}
    assert len(upstream_sessions) == sessions, "two clients share an upstream session"
    for session, entries in seen.items():
        owner = entries[0][0]
        assert entries == [(owner, number) for number in range(1, calls + 1)], session


@dataclass(frozen=True)
class Traffic:
    """What a fleet has served so far."""

    local: float
    forwarded: float
    served: tuple[int, ...]

    @classmethod
    async def of(cls, fleet: Fleet) -> Traffic:
        assert fleet.proxy is not None
        local, forwarded = await asyncio.gather(
            *(asyncio.to_thread(fleet.metric, f"leasehold_calls_{how}") for how in ("local", "forwarded"))
        )
        return cls(local, forwarded, tuple(fleet.proxy.served))

    def since(self, before: Traffic) -> Traffic:
        served = tuple(now - then for now, then in zip(self.served, before.served, strict=True))
        return Traffic(self.local - before.local, self.forwarded - before.forwarded, served)

    def check_spread(self) -> None:
        """At least half of it came to a worker that was not the owner, and every worker took its share."""
        assert self.forwarded > 0, self
        assert self.forwarded >= self.local, self
        assert min(self.served) >= 0.8 * sum(self.served) / len(self.served), self
