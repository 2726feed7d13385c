"""Clients of protocol 2026-07-28 on servers of the handshake era: those of other SDKs, and the conformance suite."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from acceptance import environments as env
from acceptance.conformance import run_suite
from acceptance.driving import report
from fleet import run_example, run_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.acceptance, pytest.mark.timeout(300)]

LIBRARY = Path(__file__).resolve().parent.parent / "library_server.py"
PYTHON = env.client("library_client.py")
CLIENTS: dict[str, tuple[list[str | Path], str]] = {
    "mcp": ([env.PYTHON_DEV, PYTHON], "2.3."),
    "fastmcp": ([env.PYTHON_FASTMCP, PYTHON], "4."),
    "typescript": ([env.node(), env.client("library_client.mjs"), "--packages", env.PACKAGES], "2."),
}
AFFINITIES = pytest.mark.parametrize("affinity", ["none", "principal"])
# What needs a server to ask the client in a result, which one of the handshake era cannot.
NEEDS_INPUT = "input-required-result-"
ASKS_ON_THE_WAY = "sep-2575-http-server-no-independent-requests-on-stream"
SUBSCRIPTIONS = {
    "sep-2575-server-sends-subscription-ack",
    "sep-2575-server-tags-subscription-id",
    "sep-2575-server-honors-notification-filter",
    "sep-2575-server-sends-prompts-list-changed-on-subscription",
    "sep-2575-server-sends-tools-list-changed-on-subscription",
}


@AFFINITIES
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_that_looks_for_the_newer_era_finds_it(tmp_path: Path, client: str, affinity: str) -> None:
    """B48"""
    command, version = CLIENTS[client]
    library: dict[str, Any] = {"command": sys.executable, "args": [str(LIBRARY)], "leasehold": {"affinity": affinity}}
    async with run_fleet(tmp_path, {"library": library}, workers=2) as fleet:
        url = fleet.url("library")
        found = await report([*command, "--url", url], timeout_s=100, env=env.node_environment())
    assert found.pop("version").startswith(version)
    assert found.pop("client")
    assert found == {
        "protocol": "2026-07-28",
        "tools": 9,
        "resources": 2,
        "prompts": 2,
        "text": "Arrakis",
        "found": {"title": "Dune", "pages": 412, "tags": ["sand"]},
        "lent": {"result": "日本 for 3 days"},
        "progress": [1, 2, 3],
    }


@AFFINITIES
async def test_the_conformance_suite_of_2026_07_28(tmp_path: Path, affinity: str) -> None:
    """B48, B50: all that passes directly passes, but what a server of the handshake era cannot do."""
    with run_example("conformance_upstream.py", tmp_path) as upstream:
        direct = await asyncio.to_thread(run_suite, upstream.url, "2026-07-28")
        server = {"url": upstream.url, "leasehold": {"affinity": affinity}}
        async with run_fleet(tmp_path, {"everything": server}, workers=2) as fleet:
            through = await asyncio.to_thread(run_suite, fleet.url("everything"), "2026-07-28")
    lacking = [each for each in through.lacks(direct) if not each.startswith(NEEDS_INPUT)]
    skipped = {each.split()[1] for each in lacking if each.endswith("is SKIPPED")}
    assert skipped == SUBSCRIPTIONS, "the suite asks for none where none are offered"
    failed = [each for each in lacking if not each.endswith("is SKIPPED")]
    assert failed == ["server-stateless", f"server-stateless: {ASKS_ON_THE_WAY} is FAILURE"]
