"""Builds what the acceptance tests run in: two Python environments and the Node packages. Quick when all is there."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON_PACKAGES = {"mcp1": ["mcp==1.30.*"], "fastmcp": ["fastmcp>=4,<5"]}
STAMP = ".ready"


class MissingToolError(Exception):
    """Raised when a program that the set-up needs is not installed."""


def python(name: str) -> Path:
    """The interpreter of one of the Python environments."""
    return ROOT / ".venvs" / name / "bin" / "python"


def node() -> Path:
    """The pinned Node, a plain binary out of a package without install scripts."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return HERE / "node_modules" / f"node-linux-{machine}" / "bin" / "node"


def node_environment() -> dict[str, str]:
    """The environment in which the pinned Node is the one on PATH, also for the children of a package."""
    return {**os.environ, "PATH": f"{node().parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def package(name: str, path: str) -> Path:
    """A file of an installed Node package."""
    return HERE / "node_modules" / name / path


def _tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise MissingToolError(f"{name} is needed to build the acceptance environments, and is not on PATH")
    return found


def _is_ready(folder: Path, wanted: str) -> bool:
    stamp = folder / STAMP
    return stamp.exists() and stamp.read_text() == wanted


def ensure_python(name: str) -> Path:
    """Build the Python environment unless it is there with the same requirements; returns its interpreter."""
    folder = ROOT / ".venvs" / name
    wanted = "\n".join(PYTHON_PACKAGES[name])
    if not _is_ready(folder, wanted):
        uv = _tool("uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python(name), *PYTHON_PACKAGES[name]]
        subprocess.run(install, check=True)
        (folder / STAMP).write_text(wanted)
    return python(name)


def ensure_node() -> Path:
    """Install the locked Node packages unless they are there; returns the pinned Node."""
    folder = HERE / "node_modules"
    wanted = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()
    if not _is_ready(folder, wanted):
        install = [_tool("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(install, cwd=HERE, check=True)
        (folder / STAMP).write_text(wanted)
    return node()


def main() -> int:
    try:
        for name in PYTHON_PACKAGES:
            print(ensure_python(name).relative_to(ROOT))
        print(ensure_node().relative_to(ROOT))
    except MissingToolError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"{error.cmd[0]} failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
