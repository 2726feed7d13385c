"""Leasehold: a distributed MCP session pool. Any worker answers any request.

async with SessionPool() as pool:                      # one process, no Redis
    async with pool.session(Upstream("files", HttpTarget("http://127.0.0.1:8000/mcp"))) as session:
        await session.call_tool("read", {"path": "a"})

async with Fleet("redis://...", config="mcp.json", secret="...") as fleet:
    async with fleet.session("files", affinity="conversation-42") as session:
        await session.call_tool("read", {"path": "a"})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .pool import (
        AuthFailed,
        CallTimeout,
        CircuitOpen,
        Config,
        ConfigError,
        Fenced,
        HttpTarget,
        OAuth,
        OpenFailed,
        PoolError,
        PoolFull,
        PoolTimeout,
        SessionClosed,
        SessionPool,
        SessionReleased,
        SseTarget,
        StdioTarget,
        Upstream,
        UpstreamLost,
        UpstreamRefused,
        Want,
        load_config,
        parse_config,
    )
    from .pool.dispatcher import CallFailed
    from .pool.typed import Callbacks
    from .workers.library import Fleet

# Resolved at first use: `import leasehold` costs nothing, and what needs no `mcp` does not load it.
_WHERE = {
    "Fleet": ".workers.library",
    "Callbacks": ".pool.typed",
    "CallFailed": ".pool.dispatcher",
    **dict.fromkeys(
        (
            "AuthFailed",
            "CallTimeout",
            "CircuitOpen",
            "Config",
            "ConfigError",
            "Fenced",
            "HttpTarget",
            "OAuth",
            "OpenFailed",
            "PoolError",
            "PoolFull",
            "PoolTimeout",
            "SessionClosed",
            "SessionPool",
            "SessionReleased",
            "SseTarget",
            "StdioTarget",
            "Upstream",
            "UpstreamLost",
            "UpstreamRefused",
            "Want",
            "load_config",
            "parse_config",
        ),
        ".pool",
    ),
}

# Made of the SDK.
_TYPED = frozenset({"Fleet", "Callbacks", "CallFailed"})

__all__ = [
    "AuthFailed",
    "CallFailed",
    "CallTimeout",
    "Callbacks",
    "CircuitOpen",
    "Config",
    "ConfigError",
    "Fenced",
    "Fleet",
    "HttpTarget",
    "OAuth",
    "OpenFailed",
    "PoolError",
    "PoolFull",
    "PoolTimeout",
    "SessionClosed",
    "SessionPool",
    "SessionReleased",
    "SseTarget",
    "StdioTarget",
    "Upstream",
    "UpstreamLost",
    "UpstreamRefused",
    "Want",
    "load_config",
    "parse_config",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _TYPED:
        import_module(".pool.sdk", __name__).require_sdk()
    return getattr(import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
