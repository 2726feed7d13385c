"""docs/library.md is run: each of its blocks, in order, against a real server and a real Redis, and prints what the
page says."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from fleet import ROOT, SECRET, run_example

pytestmark = [pytest.mark.anyio, pytest.mark.process]

PAGE = (ROOT / "docs" / "library.md").read_text()
SERVER, REDIS = "http://127.0.0.1:9000/mcp", "redis://127.0.0.1:6379"
"""As they stand on the page."""


def blocks() -> list[tuple[int, str]]:
    """The Python of the page: the line it begins at, and the code."""
    return [
        (PAGE[: found.start()].count("\n") + 1, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    ]


async def test_every_block_runs_and_prints_what_the_page_says(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEASEHOLD_SECRET", SECRET)  # what the page sets would stay set
    names: dict[str, Any] = {}
    checked = 0
    with run_example("counter_http.py", tmp_path) as server:
        for line, code in blocks():
            printed: list[str] = []
            names["print"] = lambda *values, printed=printed: printed.append(" ".join(map(str, values)))
            source = code.replace(SERVER, server.url).replace(REDIS, redis_url)
            compiled = compile(source, f"library.md:{line}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            running = eval(compiled, names)
            if inspect.iscoroutine(running):
                await running
            expected = re.findall(r"# -> (.*)$", code, re.MULTILINE)
            assert printed == expected, f"line {line}"
            checked += len(expected)
    assert checked > 20


def test_the_table_of_errors_names_each_public_one() -> None:
    """And says of each what its `outcome` is."""
    import leasehold
    from leasehold import CallFailed, PoolError

    table = PAGE.partition("## Errors")[2].partition("`CallFailed` is raised")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `?(\w*)`? ?\|", table, re.MULTILINE))
    errors = [
        name
        for name in leasehold.__all__
        if inspect.isclass(error := getattr(leasehold, name)) and issubclass(error, PoolError)
    ]
    causes = set(re.findall(r"`(\w+)`", PAGE.partition("Its `cause` is one of")[2].partition("It is an `MCPError`")[0]))
    assert set(errors) <= set(told) | causes | {"PoolError"}
    for name in set(told) & set(errors):
        if getattr(leasehold, name) is not CallFailed:
            assert told[name] == getattr(leasehold, name).outcome, name
