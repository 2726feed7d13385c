"""Errors of the pool. Flat, few, and each says whether the call may have run.

`outcome` is one of the four words of the vocabulary: `not_run` (the upstream never saw the call), `unknown` (it may
have run), `error` (it ran, or was refused, and the upstream said so).
"""

from __future__ import annotations

from typing import ClassVar, Literal

Outcome = Literal["ok", "error", "not_run", "unknown"]


class PoolError(Exception):
    """Base of everything the pool raises on purpose."""

    outcome: ClassVar[Outcome] = "not_run"


class ConfigError(PoolError):
    """Raised when a configuration file or value is wrong; the message names file, key and the expected value."""


class SessionClosed(PoolError):
    """Raised when a session is used that has ended; nothing was sent."""


class Fenced(PoolError):
    """Raised instead of an upstream write when this worker's lease may be over; nothing was sent."""


class PoolFull(PoolError):
    """Raised when a limit on sessions is reached; nothing was opened."""


class OpenFailed(PoolError):
    """Raised when an upstream session cannot be opened: the process did not start, the connection was refused."""


class UpstreamLost(PoolError):
    """Raised when the connection to the upstream (or its process) ended while the call was in flight."""

    outcome: ClassVar[Outcome] = "unknown"


class CallTimeout(PoolError):
    """Raised when the upstream stayed silent for longer than `call_timeout`."""

    outcome: ClassVar[Outcome] = "unknown"
