"""The public face: cheap to import, complete, and plain about what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import leasehold
import pytest

TYPED = ("Fleet", "Callbacks", "CallFailed")
ASKING_FOR_TYPES = f"""
import leasehold
from leasehold import HttpTarget, SessionPool, Upstream
pool, upstream = SessionPool(), Upstream("a", HttpTarget("http://127.0.0.1:1/mcp"))
pool.link(upstream)
for ask in (*(lambda name=name: getattr(leasehold, name) for name in {TYPED}), lambda: pool.session(upstream)):
    try:
        ask()
        print("there")
    except ImportError as error:
        print(error)
"""
# What an import of the parts brings along; `mcp` is the slow one.
LOADED = """
import sys
before = set(sys.modules)
{code}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - set(sys.stdlib_module_names) - {{"leasehold"}}))
"""


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_to_import_the_package_loads_nothing_but_itself() -> None:
    assert python(LOADED.format(code="import leasehold")) == ""


@pytest.mark.parametrize(
    "code",
    [
        "from leasehold import SessionPool, Upstream, HttpTarget",
        "import leasehold.coordinator",
        "import leasehold.workers.cli",
        "import leasehold.workers.worker",
        "import leasehold.workers.supervisor",
    ],
)
def test_neither_pool_nor_coordinator_nor_the_gateway_loads_the_sdk(code: str) -> None:
    loaded = python(LOADED.format(code=code)).split()
    assert "orjson" in loaded or "redis" in loaded, "it loads what it needs"
    assert {"mcp", "mcp_types"}.isdisjoint(loaded)


@pytest.mark.parametrize("name", leasehold.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(leasehold, name) is not None
    assert name in leasehold.__dir__()


def test_what_is_not_there_is_missed_in_the_usual_words() -> None:
    with pytest.raises(AttributeError, match="module 'leasehold' has no attribute 'Flet'"):
        _ = leasehold.Flet


@pytest.mark.parametrize("version", ["1.30.0", "2.2.9", "2.10.1"])
def test_an_older_sdk_is_named_in_one_sentence(tmp_path: Path, version: str) -> None:
    """Only where typed sessions are asked for: the rest works with any SDK, or none."""
    folder = tmp_path / f"mcp-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mcp\nVersion: {version}\n")
    check_refused(tmp_path, found=version, is_old=version in ("1.30.0", "2.2.9"))


def test_an_sdk_that_is_missing_is_too(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, sys\n"
        "def version(name):\n    raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
    )
    (tmp_path / "sitecustomize.py").write_text(code)
    check_refused(tmp_path, found="none", is_old=True)


def check_refused(path: Path, *, found: str, is_old: bool) -> None:
    told = python(ASKING_FOR_TYPES, PYTHONPATH=str(path)).splitlines()
    sentence = f"leasehold: typed sessions: needs mcp 2.3 or newer, found {found}"
    assert told == [sentence if is_old else "there"] * (len(TYPED) + 1)
