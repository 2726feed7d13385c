"""Live MCP sessions: opening, holding and closing them, and relaying messages to them. Knows no Redis."""

from .borrowing import Borrow, BorrowedLink, Want
from .breaker import Breaker, BreakerSettings, BreakerState, BreakerStatistics, Permit
from .breakers import Breakers, BreakersStatistics
from .config import load_config, parse_config
from .errors import (
    AuthFailed,
    CallTimeout,
    CircuitOpen,
    ConfigError,
    Fenced,
    OpenFailed,
    PoolError,
    PoolFull,
    PoolTimeout,
    SessionClosed,
    SessionReleased,
    UpstreamLost,
    UpstreamRefused,
)
from .http_link import HttpClients, HttpLink
from .jsonrpc import InvalidMessage, Message, error_body, parse
from .link import Link, Reply, ResumeRecord
from .pool import SessionPool
from .session import PooledSession
from .sse_link import SseLink
from .stdio_link import StdioLink
from .upstream import Config, HttpTarget, OAuth, SseTarget, StdioTarget, Upstream

__all__ = [
    "AuthFailed",
    "Borrow",
    "BorrowedLink",
    "Breaker",
    "BreakerSettings",
    "BreakerState",
    "BreakerStatistics",
    "Breakers",
    "BreakersStatistics",
    "CallTimeout",
    "CircuitOpen",
    "Config",
    "ConfigError",
    "Fenced",
    "HttpClients",
    "HttpLink",
    "HttpTarget",
    "InvalidMessage",
    "Link",
    "Message",
    "OAuth",
    "OpenFailed",
    "Permit",
    "PoolError",
    "PoolFull",
    "PoolTimeout",
    "PooledSession",
    "Reply",
    "ResumeRecord",
    "SessionClosed",
    "SessionPool",
    "SessionReleased",
    "SseLink",
    "SseTarget",
    "StdioLink",
    "StdioTarget",
    "Upstream",
    "UpstreamLost",
    "UpstreamRefused",
    "Want",
    "error_body",
    "load_config",
    "parse",
    "parse_config",
]
