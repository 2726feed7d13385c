"""The pages say what is: defaults, metrics, events, files, tests and links that they name are the real ones."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from leasehold.pool import StdioTarget, Upstream
from leasehold.workers.settings import PREFIX, Settings
from leasehold.workers.telemetry import Telemetry

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
CODE_FOLDERS = ("pool", "coordinator", "workers")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def written(default: Any) -> str:
    """A default as it stands in a table."""
    if default is None or default in ((), ""):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, frozenset):
        return str(sorted(default))
    if isinstance(default, list):
        return json.dumps(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def documented(names: str, defaults: str) -> list[tuple[str, str]]:
    """`A`, `B` | `1`, `2` as pairs; words after "none:" and in brackets explain."""
    found = re.findall(r"`([A-Za-z_]+)`", re.sub(r"\(.*?\)", "", names))
    values = [value.strip("`").partition(":")[0] for value in defaults.split(", ")] if len(found) > 1 else [defaults]
    values = [value.strip("`") for value in values]
    return list(zip(found, ["none" if value.startswith("none") else value for value in values], strict=True))


def test_b53_the_defaults_of_settings_are_those_of_the_page() -> None:
    said = {
        name: value
        for cells in rows(CONFIGURATION)
        if cells[0].startswith(f"`{PREFIX}")
        for name, value in documented(cells[0], cells[1])
    }
    real = {PREFIX + name.upper(): written(field.default) for name, field in Settings.model_fields.items()}
    real[PREFIX + "CONFIG"] = "mcp.json"  # where `leasehold serve` looks
    assert said == real


def test_b53_the_defaults_of_servers_are_those_of_the_page() -> None:
    _, _, options = CONFIGURATION.partition("Under `leasehold`, per server:")
    table = rows(options.partition("## The process")[0])[2:]
    said = {name: value for cells in table for name, value in documented(cells[0], cells[1])}
    upstream = Upstream("a", StdioTarget("true"))
    real = {
        field.name.removesuffix("_s"): written(list(value) if isinstance(value, tuple) else value)
        for field in dataclasses.fields(Upstream)
        if field.init
        if field.name not in ("name", "target")
        for value in [getattr(upstream, field.name)]
    }
    assert said == real


def test_b53_the_default_configuration_file_is_that_of_the_page() -> None:
    assert '"mcp.json"' in (ROOT / "workers" / "cli.py").read_text()


@each_page
def test_every_metric_of_a_page_exists(page: Path) -> None:
    exposed = set(re.findall(r"^# HELP (\S+)", Telemetry().exposition()[0].decode(), re.MULTILINE))
    named = set(re.findall(r"`(leasehold_[a-z_]+)(?:\{[^}`]*\})?`", page.read_text()))
    assert named <= exposed


def test_every_event_that_the_failure_modes_name_is_logged() -> None:
    source = "".join(path.read_text() for name in CODE_FOLDERS for path in (ROOT / name).glob("*.py"))
    page = (ROOT / "docs" / "failure-modes.md").read_text()
    lists = re.findall(r"\blog ((?:`[a-z_]+`(?:, )?)+)", page)
    named = {event for names in lists for event in re.findall(r"\w+", names)}
    assert named
    assert {event for event in named if not re.search(rf'"{event}[ "]', source)} == set()


@each_page
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, target


@each_page
def test_every_file_and_test_of_a_page_exists(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|lua))`", text):
        places = [ROOT / folder / name for folder in ("", "tests", *CODE_FOLDERS)]
        assert any(place.is_file() for place in places), name
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)`", text):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert test in functions, f"{file}::{test}"


def test_every_failure_mode_has_a_test() -> None:
    table = [cells for cells in rows((ROOT / "docs" / "failure-modes.md").read_text()) if len(cells) == 5]
    modes = [cells for cells in table if cells[0] != "what happens" and not cells[0].startswith("---")]
    assert len(modes) > 20
    assert [cells[0] for cells in modes if "::test_" not in cells[4]] == []


@each_page
def test_every_setting_of_a_page_exists(page: Path) -> None:
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+", page.read_text()))
    assert named <= {PREFIX + name.upper() for name in Settings.model_fields} | {PREFIX}


def at_import(path: Path) -> set[str]:
    """What a module imports when it is imported itself: not in functions, not for type checkers. Relative imports as
    paths (`pool/typed.py`), others by the first part of their name."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            files = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
            found |= {str(file.relative_to(ROOT)) for file in files if file.is_file()}
        waiting.extend(ast.iter_child_nodes(node))
    return found


def test_the_modules_that_import_the_sdk_are_those_of_the_architecture_and_no_other_imports_them_at_once() -> None:
    _, _, page = (ROOT / "docs" / "architecture.md").read_text().partition("exactly\nthese modules do: ")
    said = set(re.findall(r"`((?:pool|workers|coordinator)/\w+\.py)`", page.partition(". ")[0]))
    files = [ROOT / "__init__.py", *(path for name in CODE_FOLDERS for path in (ROOT / name).glob("*.py"))]
    imports = {str(path.relative_to(ROOT)): at_import(path) for path in files}
    real = {name for name, what in imports.items() if what & {"mcp", "mcp_types"}}
    assert said == real
    assert {name: what & real for name, what in imports.items() if name not in real and what & real} == {}


@each_page
def test_every_block_of_python_compiles_and_names_what_there_is(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        tree = compile(code, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST, dont_inherit=True)
        compile(tree, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "leasehold":
                module = import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
