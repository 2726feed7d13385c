"""Where `make acceptance` and `make conformance` put the clients, the servers and the Node that runs them."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / ".venvs"
PACKAGES = ENVIRONMENTS / "node" / "node_modules"
MACHINES = {"x86_64": "x64", "aarch64": "arm64"}

PYTHON_DEV = Path(sys.executable)
PYTHON_SDK1 = ENVIRONMENTS / "sdk1" / "bin" / "python"
PYTHON_FASTMCP = ENVIRONMENTS / "fastmcp" / "bin" / "python"


def client(name: str) -> Path:
    """One of our client programs."""
    return HERE / "clients" / name


def node() -> Path:
    """The pinned Node: a plain binary out of a package."""
    machine = MACHINES.get(platform.machine(), platform.machine())
    return PACKAGES / f"node-linux-{machine}" / "bin" / "node"


def node_environment() -> dict[str, str]:
    """The environment in which the pinned Node is the one on PATH, also for the children of a package."""
    return {**os.environ, "PATH": f"{node().parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def package(name: str, path: str) -> Path:
    """A file of an installed Node package."""
    return PACKAGES / name / path
