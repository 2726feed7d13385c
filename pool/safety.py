"""Which calls may be repeated although an earlier try may have run."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final, cast

SAFE_METHOD: Final = re.compile(r"ping|[a-z]+(/[a-z]+)*/(list|read|get)")
"""Methods that change nothing, by their names in the specification."""


def is_safe_call(method: str, params: Any, safe_tools: Collection[str]) -> bool:
    """Whether a request changes nothing, or does no more when it is run twice. `safe_tools`: those declared so."""
    if method == "tools/call":
        name = cast("dict[str, Any]", params).get("name") if isinstance(params, dict) else None
        return isinstance(name, str) and name in safe_tools
    return SAFE_METHOD.fullmatch(method) is not None


def declared_safe(tools: Any) -> set[str]:
    """The names of the tools of a `tools/list` result that the server declares read-only or idempotent."""
    found: set[str] = set()
    if not isinstance(tools, list):
        return found
    for item in cast("list[Any]", tools):
        if not isinstance(item, dict):
            continue
        tool = cast("dict[str, Any]", item)
        hints, name = tool.get("annotations"), tool.get("name")
        if isinstance(hints, dict) and isinstance(name, str):
            told = cast("dict[str, Any]", hints)
            if told.get("readOnlyHint") is True or told.get("idempotentHint") is True:
                found.add(name)
    return found
