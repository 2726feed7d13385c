"""The Inspector's command line: each call is a session of its own, whose requests go to several workers."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from acceptance import environments as env
from acceptance.driving import Traffic, executed, run
from fleet import EXAMPLES, Fleet, run_example, run_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.acceptance, pytest.mark.timeout(300)]

CALLS = 20
AT_ONCE = 2
INSPECTOR = env.package("@modelcontextprotocol/inspector", "clients/launcher/build/index.js")


async def call_once(fleet: Fleet, server: str, tag: str, home: Path) -> str:
    """The text that one call of `increment` returns."""
    tool = ["--method", "tools/call", "--tool-name", "increment", "--tool-arg", f"tag={tag}"]
    target = [fleet.url(server), "--transport", "http", "--format", "json"]
    environment = {**env.node_environment(), "HOME": str(home)}
    finished = await run([env.node(), INSPECTOR, "--cli", *target, *tool], timeout_s=60, env=environment)
    assert finished.code == 0, finished
    answer = json.loads(finished.output)
    return answer.get("result", answer)["content"][0]["text"]


@pytest.mark.parametrize("server", ["http", "stdio"])
async def test_twenty_calls_are_answered_and_executed_once(tmp_path: Path, server: str) -> None:
    journal = tmp_path / "journal"
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> str:
        async with turn:
            return await call_once(fleet, server, f"call-{number}", tmp_path)

    with run_example("counter_http.py", tmp_path, "--journal", str(journal)) as upstream:
        stdio = [str(EXAMPLES / "counter_stdio.py"), "--journal", str(journal)]
        servers = {"http": {"url": upstream.url}, "stdio": {"command": sys.executable, "args": stdio}}
        async with run_fleet(tmp_path, servers) as fleet:
            before = await Traffic.of(fleet)
            answers = await asyncio.gather(*(one(number) for number in range(CALLS)))
            (await Traffic.of(fleet)).since(before).check_spread()
    assert answers == ["1"] * CALLS
    assert [len(executed(journal, f"call-{number}")) for number in range(CALLS)] == [1] * CALLS
