"""The public conformance suite: what passes directly passes through four workers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from acceptance.conformance import Results, run_suite
from fleet import run_example, run_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.acceptance, pytest.mark.timeout(600)]


async def run(folder: Path, requirements: str, runs: int) -> tuple[Results, list[Results]]:
    """The results of one run against the upstream itself, and of some through a fleet."""
    with run_example("conformance_upstream.py", folder) as upstream:
        direct = await asyncio.to_thread(run_suite, upstream.url, requirements)
        async with run_fleet(folder, {"everything": {"url": upstream.url}}) as fleet:
            url = fleet.url("everything")
            return direct, [await asyncio.to_thread(run_suite, url, requirements) for _ in range(runs)]


async def test_of_2025_11_25_all_pass_in_three_runs(tmp_path: Path) -> None:
    direct, through = await run(tmp_path, "2025-11-25", runs=3)
    assert [result.lacks(direct) for result in through] == [[], [], []]
    assert direct.passed == 33
    assert [(result.passed, len(result.scenarios)) for result in through] == [(33, 33)] * 3


async def test_of_2026_07_28_all_pass_that_pass_directly(tmp_path: Path) -> None:
    direct, [through] = await run(tmp_path, "2026-07-28", runs=1)
    assert through.lacks(direct) == []
    assert through.passed >= direct.passed >= 37
