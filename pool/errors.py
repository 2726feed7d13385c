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
    """Raised when a limit on sessions or on callers who wait is reached, or the pool is closing; nothing was sent."""


class PoolTimeout(PoolFull):
    """Raised when no session came free in the time the caller had; nothing was sent."""


class SessionReleased(PoolError):
    """Raised when a borrowed session is used after it was given back; nothing was sent."""


class OpenFailed(PoolError):
    """Raised when an upstream session cannot be opened: the process did not start, the connection was refused."""


class CircuitOpen(PoolError):
    """Raised instead of trying an upstream that has failed again and again; nothing was sent."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which it may be worth trying again; more than 0."""


class AuthFailed(PoolError):
    """Raised when the credentials for a call could not be had; the call was not sent, or refused with 401 or 403."""


class UpstreamLost(PoolError):
    """Raised when the connection to the upstream (or its process) ended while the call was in flight."""

    outcome: ClassVar[Outcome] = "unknown"


class CallTimeout(PoolError):
    """Raised when the upstream stayed silent for longer than `call_timeout`."""

    outcome: ClassVar[Outcome] = "unknown"


class UpstreamRefused(PoolError):
    """Raised when the upstream answered a request of ours with an HTTP status that is no success."""

    outcome: ClassVar[Outcome] = "error"

    def __init__(self, status: int) -> None:
        super().__init__(f"the upstream answered with HTTP status {status}")
        self.status = status
