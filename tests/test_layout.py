"""The repository is the package: what keeps that true, and its files fit for any machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import leasehold.pool.link
import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("pool", "coordinator", "workers")
# In two parts each, so that this file does not name them.
REGISTRIES = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "registry.npm" + "js.org",
    "registry.yarn" + "pkg.com",
    "npm" + "mirror.com",
]


def committed_files() -> list[Path]:
    """What is, or by its place would be, in version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


class TestOneCopy:
    def test_the_package_is_this_checkout(self) -> None:
        assert Path(leasehold.pool.link.__file__).resolve() == ROOT / "pool" / "link.py"

    def test_no_module_of_the_package_is_imported_under_a_second_name(self) -> None:
        folders = [ROOT / name for name in CODE_FOLDERS]
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and any(Path(file).resolve().is_relative_to(folder) for folder in folders):
                assert name.split(".")[0] == "leasehold", f"{file} is imported as {name}"

    @pytest.mark.parametrize("name", CODE_FOLDERS)
    def test_its_folders_are_no_packages_of_their_own(self, name: str) -> None:
        # Without the current directory, which `python -m pytest` adds.
        path = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
        assert PathFinder.find_spec(name, path) is None


def test_the_list_of_packages_names_every_folder_with_code() -> None:
    listed = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["setuptools"]["packages"]
    folders = {ROOT}
    for name in CODE_FOLDERS:
        folders |= {path.parent for pattern in ("*.py", "*.lua") for path in (ROOT / name).rglob(pattern)}
    packages = [".".join(("leasehold", *folder.relative_to(ROOT).parts)) for folder in folders]
    assert sorted(listed) == sorted(packages)


class TestFilesFitForAnyMachine:
    def test_no_file_names_a_package_registry(self) -> None:
        found = [(str(path), host) for path in committed_files() for host in REGISTRIES if host in text_of(path)]
        assert not found

    def test_no_file_names_a_path_of_the_machine_it_was_written_on(self) -> None:
        # A root like /app is a word of its own in Dockerfiles, so only longer ones are looked for.
        own = [str(path) for path in (ROOT, Path.home(), Path(sys.prefix)) if len(path.parts) > 2]
        pattern = re.compile(
            "|".join([*map(re.escape, own), r"/(?:home|Users)/[a-z]+/", r"file:///(?:home|root|opt|tmp)"])
        )
        found = [(str(path), match[0]) for path in committed_files() if (match := pattern.search(text_of(path)))]
        assert not found

    @pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.lock")), ids=lambda path: path.name)
    def test_a_lock_holds_versions_and_hashes_only(self, path: Path) -> None:
        lines = text_of(path).splitlines()
        pinned = [line for line in lines if line and not line.startswith((" ", "#"))]
        assert pinned
        assert all(re.match(r"[a-z0-9.-]+(\[[a-z0-9,-]+\])?==\S+( ;.*)? \\$", line) for line in pinned)
        assert all(line.startswith(("    --hash=sha256:", "    #")) for line in lines if line not in pinned)


@pytest.mark.parametrize("script", sorted((ROOT / "coordinator" / "scripts").glob("*.lua")), ids=lambda path: path.name)
def test_a_script_declares_keys_arguments_and_result_in_its_head(script: Path) -> None:
    lines = text_of(script).splitlines()
    head = [line for i, line in enumerate(lines) if all(above.startswith("--") for above in lines[: i + 1])]
    body = "\n".join(lines[len(head) :])
    assert len(head) > 1, "the first line says what the script does"
    assert any(line.startswith("-- Result ") for line in head)
    for name in ("KEYS", "ARGV"):
        # Every index used in the body stands in the head; `ARGV[5+]` declares the rest.
        used = {int(index) for index in re.findall(rf"{name}\[(\d+)\]", body)}
        declared = {int(index) for index in re.findall(rf"{name}\[(\d+)\+?\]", "\n".join(head))}
        assert used <= declared
        assert declared or name not in body
