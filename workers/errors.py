"""What a worker raises to itself on the way to an answer."""

from __future__ import annotations

from ..coordinator import Registration


class WorkerError(Exception):
    """Base of everything in this module."""


class Disconnected(WorkerError):
    """Raised when the client (or the caller at the other end of a hop) has gone away."""


class BodyTooLarge(WorkerError):
    """Raised when a body passes the limit; `limit` in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes")
        self.limit = limit


class NotRun(WorkerError):
    """Raised when a forwarded call provably did not run; `owner` is the registration that stands, where the refuser
    knew."""

    def __init__(self, reason: str, owner: Registration | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.owner = owner


class OutcomeUnknown(WorkerError):
    """Raised when a forwarded call may or may not have run."""


class BrokenOff(WorkerError):
    """Raised when a response ended before it was complete: the client must see that, too."""


class ServeError(WorkerError):
    """Raised when serving cannot begin; the message is for the operator."""
