"""Upstreams: the servers of a configuration, as data. `config.py` reads them from the `mcpServers` JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Affinity = Literal["session", "principal", "none"]


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """A streamable-HTTP endpoint. `url` holds no userinfo: it has become an `authorization` header."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    """Names in lower case, and values."""

    def __repr__(self) -> str:
        parts = urlsplit(self.url)
        query = "?..." if parts.query else ""
        names = ", ".join(name for name, _ in self.headers)
        return f"HttpTarget({parts.scheme}://{parts.netloc}{parts.path}{query}, headers: {names or 'none'})"


@dataclass(frozen=True, slots=True)
class StdioTarget:
    """A command that speaks MCP on its standard input and output; one process per session."""

    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to the environment that a child process gets anyway."""
    cwd: str | None = None

    def __repr__(self) -> str:
        return f"StdioTarget({self.command}, {len(self.args)} args, env: {', '.join(self.env) or 'none'})"


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server of the configuration, with the limits of its sessions. Limits count per worker."""

    name: str
    target: HttpTarget | StdioTarget
    affinity: Affinity = "session"
    max_sessions: int = 1000
    max_sessions_per_principal: int | None = None
    """None: no limit beside `max_sessions`."""
    idle_ttl_s: float = 1800.0
    call_timeout_s: float = 300.0
    """Longest silence of the upstream during a call."""
    idempotent_tools: frozenset[str] = frozenset()
    """Tools that may be called again although an earlier call may have run."""
    forward_headers: frozenset[str] = frozenset()
    """Names (lower case) of client headers that are passed to the upstream."""


@dataclass(frozen=True, slots=True)
class Config:
    """The servers of one configuration, in the order of the file."""

    source: str
    servers: Mapping[str, Upstream]
    disabled: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Keys that are tolerated without effect, one line each."""
