"""Real clients count to fifty in twenty sessions each, every request of theirs on another worker."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from acceptance import environments as env
from acceptance.driving import Traffic, check_exactly_once, report
from fleet import EXAMPLES, Fleet, run_example, run_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.acceptance, pytest.mark.timeout(300)]

SESSIONS, CALLS = 20, 50
NODE = [env.node(), env.client("ts_client.mjs"), "--packages", env.PACKAGES]
CLIENTS = {
    "mcp-2": ([env.PYTHON_DEV, env.client("mcp_client.py")], "2.3."),
    "mcp-1": ([env.PYTHON_SDK1, env.client("mcp_client.py")], "1.30."),
    "fastmcp": ([env.PYTHON_FASTMCP, env.client("fastmcp_client.py")], "4."),
    "typescript-1": ([*NODE, "--sdk", "1"], "1."),
    "typescript-2": ([*NODE, "--sdk", "2"], "2."),
}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients") / "journal"


@pytest.fixture(scope="module")
async def fleet(journal: Path) -> AsyncIterator[Fleet]:
    folder = journal.parent
    with run_example("counter_http.py", folder, "--journal", str(journal)) as upstream:
        stdio = [str(EXAMPLES / "counter_stdio.py"), "--journal", str(journal)]
        servers = {"http": {"url": upstream.url}, "stdio": {"command": sys.executable, "args": stdio}}
        async with run_fleet(folder, servers) as fleet:
            yield fleet


@pytest.mark.parametrize("server", ["http", "stdio"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_each_session_counts_to_fifty_and_each_call_is_executed_once(
    fleet: Fleet, journal: Path, client: str, server: str
) -> None:
    command, version = CLIENTS[client]
    tag = f"{client}-{server}"
    before = await Traffic.of(fleet)
    load = ["--sessions", str(SESSIONS), "--calls", str(CALLS), "--tag", tag]
    done = await report([*command, "--url", fleet.url(server), *load], timeout_s=240, env=env.node_environment())
    assert done["errors"] == []
    assert done["version"].startswith(version)
    check_exactly_once(journal, tag, sessions=SESSIONS, calls=CALLS)
    traffic = (await Traffic.of(fleet)).since(before)
    print(f"{done['client']} {done['version']} {server}: {done['seconds']} s, {traffic}")
    assert traffic.local + traffic.forwarded >= SESSIONS * CALLS
    traffic.check_spread()
