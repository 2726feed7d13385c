"""Whether the installed SDK is one that the typed face can be made of. Imports no SDK."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

OLDEST: Final = (2, 3)
"""The first with `mcp.shared.dispatcher` and `mcp_types` as they are used here."""


@cache
def require_sdk() -> None:
    """Raises ImportError, with what is needed and what was found."""
    try:
        found = version("mcp")
    except PackageNotFoundError:
        found = "none"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(f"leasehold: typed sessions: needs mcp {needed} or newer, found {found}")
