"""Upstreams: the servers of a configuration, as data. `config.py` reads them from the `mcpServers` JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import blake2b
from typing import Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

Affinity = Literal["session", "principal", "none"]
Transport = Literal["http", "sse", "stdio"]


@dataclass(frozen=True, slots=True)
class _UrlTarget:
    url: str
    headers: tuple[tuple[str, str], ...] = ()
    """Names in lower case, and values."""

    def __repr__(self) -> str:
        parts = urlsplit(self.url)
        query = "?..." if parts.query else ""
        names = ", ".join(name for name, _ in self.headers)
        return f"{type(self).__name__}({parts.scheme}://{parts.netloc}{parts.path}{query}, headers: {names or 'none'})"


@dataclass(frozen=True, slots=True, repr=False)
class HttpTarget(_UrlTarget):
    """A streamable-HTTP endpoint. `url` holds no userinfo: it has become an `authorization` header."""

    transport: ClassVar[Transport] = "http"


@dataclass(frozen=True, slots=True, repr=False)
class SseTarget(_UrlTarget):
    """A server of the HTTP+SSE transport (protocol 2024-11-05), by the URL of its event stream; no userinfo either."""

    transport: ClassVar[Transport] = "sse"


@dataclass(frozen=True, slots=True)
class StdioTarget:
    """A command that speaks MCP on its standard input and output; one process per session."""

    transport: ClassVar[Transport] = "stdio"
    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to the environment that a child process gets anyway."""
    cwd: str | None = None

    def __repr__(self) -> str:
        return f"StdioTarget({self.command}, {len(self.args)} args, env: {', '.join(self.env) or 'none'})"


@dataclass(frozen=True, slots=True)
class OAuth:
    """How the tokens of an upstream are got: by the client-credentials grant, as one client for all who call."""

    client_id: str
    client_secret: str = field(repr=False)
    scope: str | None = None
    """None: what the server asks for."""
    issuer: str | None = None
    """The authorization server that alone may be shown the secret; None: the upstream's own origin."""
    token_url: str | None = field(default=None, repr=False)
    """Where tokens are got without looking for metadata; then there is no issuer."""


Target = HttpTarget | SseTarget | StdioTarget


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server of the configuration, with the limits of its sessions. Limits count per worker.

    One of the same name with other settings is another upstream, whose sessions are not those of this one. What goes by
    name is what concerns the server: its circuit, and how many sessions of it there are.
    """

    name: str
    target: Target
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
    health_check: tuple[str, ...] = ("ping", "skip")
    """Steps of the chain that is asked before a session is used again: see `health.py`."""
    health_check_interval_s: float = 60.0
    """A session that was used within this time is not checked."""
    health_check_timeout_s: float = 5.0
    """For the whole chain."""
    max_age_s: float | None = None
    """None: a session may grow old."""
    min_sessions: int = 0
    """Sessions that are kept ready, where sessions are shared."""
    oauth: OAuth | None = None
    """None: calls are authorized by headers, or not at all."""
    identity: str = field(init=False, repr=False, compare=False)
    """The same for upstreams that are equal, in this process, and for no others; shows nothing of them."""

    def __post_init__(self) -> None:
        digest = blake2b(repr(_plain(self)).encode(errors="surrogatepass"), key=_KEY, digest_size=16)
        object.__setattr__(self, "identity", digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Config:
    """The servers of one configuration, in the order of the file."""

    source: str
    servers: Mapping[str, Upstream]
    disabled: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Keys that are tolerated without effect, one line each."""


_KEY = os.urandom(32)


def _plain(value: Any) -> Any:
    """A value whose `repr` is the same for what is equal."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, *(_plain(getattr(value, one.name)) for one in fields(value) if one.compare)
    if isinstance(value, Mapping):
        return sorted(cast("Mapping[str, str]", value).items())
    if isinstance(value, frozenset | set):
        return sorted(cast("frozenset[str]", value))
    return float(value) if isinstance(value, int) else value
