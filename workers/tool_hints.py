"""Which tools of a server may be called again when an earlier call may have run, by what the server says of them.

Learnt from the lists of tools that pass by on their way to clients: `readOnlyHint` and `idempotentHint`. A server may
tell each principal something else, so nobody's list speaks for others. What was not listed here is not repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, cast

from ..pool import Upstream
from ..pool.safety import declared_safe

MAX_KNOWN: Final = 10_000
"""Lists that are remembered, of a server and a principal each."""
MAX_TOOLS: Final = 1_000
"""Names that are remembered of each."""


class ToolHints:
    """What servers have declared, as far as this worker has seen it."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], set[str]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<ToolHints lists={len(self._known)}>"

    def learn(self, upstream: Upstream, principal: str, params: Mapping[str, Any], result: Any) -> None:
        """Note a page of a `tools/list`, whose request had these `params`. The first page begins a new list."""
        if not isinstance(result, dict):
            return
        tools: Any = cast("dict[str, Any]", result).get("tools")
        key = (upstream.name, principal)
        known = self._known.setdefault(key, set())
        self._known.move_to_end(key)
        if params.get("cursor") is None:
            known.clear()
        named = declared_safe(tools)
        if len(known) + len(named) <= MAX_TOOLS:
            known |= named
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def safe(self, upstream: Upstream, principal: str) -> frozenset[str]:
        """Tools that may be repeated: those, and the configured ones."""
        known = self._known.get((upstream.name, principal))
        return upstream.idempotent_tools if not known else upstream.idempotent_tools | known
