"""The demonstration does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fleet import EXAMPLES

CALLS = 12


@pytest.mark.process
def test_the_demo_counts_in_order_over_several_workers_and_past_the_death_of_one(tmp_path: Path) -> None:
    # A Redis that somebody has set up for something else is not used.
    env = {**os.environ, "REDIS_URL": "redis://127.0.0.1:1", "COLUMNS": "80"}
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--once"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=tmp_path,
        env=env,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ended.stdout.splitlines() if "│" in line]
    calls = [row for row in rows if row[0] == "increment"]
    assert [row[4] for row in calls] == [str(number) for number in range(1, CALLS + 1)] * 2
    assert "forwarded" in [row[3] for row in calls]
    assert all((row[1] == row[2]) == (row[3] == "local") for row in calls)
    (kill,) = (index for index, row in enumerate(rows) if re.fullmatch(r"kill -9 \d+", row[0]))
    assert rows[kill - 1][2] != rows[kill + 1][2], "the session should have another owner after its owner was killed"
    assert rows[kill + 1][4] == str(CALLS)
    # What is printed to be copied is in one piece.
    assert re.search(
        r'^  \{"mcpServers": \{"counter": \{"url": "http://\S+/servers/counter/mcp"\}\}\}$', ended.stdout, re.M
    )
