"""Live MCP sessions: opening, holding and closing them, and relaying messages to them. Knows no Redis."""

from .config import load_config, parse_config
from .errors import (
    CallTimeout,
    ConfigError,
    Fenced,
    OpenFailed,
    PoolError,
    PoolFull,
    SessionClosed,
    UpstreamLost,
)
from .http_link import HttpClients, HttpLink
from .jsonrpc import InvalidMessage, Message, error_body, parse
from .link import Link, Reply, ResumeRecord
from .pool import SessionPool
from .session import PooledSession
from .stdio_link import StdioLink
from .upstream import Config, HttpTarget, StdioTarget, Upstream

__all__ = [
    "CallTimeout",
    "Config",
    "ConfigError",
    "Fenced",
    "HttpClients",
    "HttpLink",
    "HttpTarget",
    "InvalidMessage",
    "Link",
    "Message",
    "OpenFailed",
    "PoolError",
    "PoolFull",
    "PooledSession",
    "Reply",
    "ResumeRecord",
    "SessionClosed",
    "SessionPool",
    "StdioLink",
    "StdioTarget",
    "Upstream",
    "UpstreamLost",
    "error_body",
    "load_config",
    "parse",
    "parse_config",
]
