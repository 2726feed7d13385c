"""The gateway's own answers: status, JSON-RPC error, headers. Refusals before any attempt are told by status; how a
call ended by a JSON-RPC error in a 200, for clients of the 1.x SDKs end their whole session at a 5xx to one call."""

from __future__ import annotations

from math import ceil
from typing import Any, Final

from ..pool.errors import CircuitOpen, Outcome, PoolError
from ..pool.handshake import HANDSHAKE_VERSIONS as HANDSHAKE_VERSIONS
from ..pool.jsonrpc import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    SERVER_ERROR,
    SESSION_NOT_FOUND,
    UNSUPPORTED_PROTOCOL_VERSION,
    RequestId,
    error_body,
)
from .asgi import Headers, Send, respond

JSON: Final[Headers] = [(b"content-type", b"application/json")]
RETRY_AFTER_S: Final = 1

STATELESS_VERSIONS: Final = ("2026-07-28",)


class Refused(Exception):
    """Raised to answer a request without any attempt: HTTP status, JSON-RPC code and message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: int = INVALID_REQUEST,
        id: RequestId | None = None,  # noqa: A002
        data: dict[str, Any] | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.id = id
        self.data = data
        self.headers = headers or []

    async def send(self, send: Send) -> None:
        body = error_body(self.code, str(self), id=self.id, data=self.data)
        await respond(send, self.status, body, [*JSON, *self.headers])


def session_not_found(id: RequestId | None = None) -> Refused:  # noqa: A002
    """404: unknown, expired, or another principal's; the client initializes again."""
    return Refused(404, "Session not found", code=SESSION_NOT_FOUND, id=id)


def unavailable(
    message: str,
    id: RequestId | None = None,  # noqa: A002
    outcome: Outcome = "not_run",
    *,
    retry_after_s: float = RETRY_AFTER_S,
) -> Refused:
    """503 with Retry-After: nothing ran (unless `outcome` says otherwise), try again."""
    retry = [(b"retry-after", b"%d" % ceil(retry_after_s))]
    return Refused(503, message, code=SERVER_ERROR, id=id, data={"outcome": outcome}, headers=retry)


def turned_away(error: PoolError, id: RequestId | None = None) -> Refused:  # noqa: A002
    """`unavailable` for what the pool has refused; an open circuit says itself when to try again."""
    retry_after_s = error.retry_after_s if isinstance(error, CircuitOpen) else RETRY_AFTER_S
    return unavailable(str(error), id, error.outcome, retry_after_s=retry_after_s)


def too_large(limit: int) -> Refused:
    """413; `limit` in bytes."""
    return Refused(413, f"Payload too large: at most {limit} bytes")


def unsupported_version(requested: str, supported: tuple[str, ...], id: RequestId | None = None) -> Refused:  # noqa: A002
    """400 with the versions that are spoken here, which is how clients of the newer era fall back to `initialize`."""
    return Refused(
        400,
        "Unsupported protocol version",
        code=UNSUPPORTED_PROTOCOL_VERSION,
        id=id,
        data={"supported": list(supported), "requested": requested[:64]},
    )


def outcome_body(message: str, outcome: Outcome, id: RequestId | None) -> bytes:  # noqa: A002
    """A JSON-RPC error that says whether the call may have run."""
    return error_body(SERVER_ERROR, message, id=id, data={"outcome": outcome})


def pool_error_body(error: PoolError, id: RequestId | None) -> bytes:  # noqa: A002
    return outcome_body(str(error), error.outcome, id)


def internal_error_body(id: RequestId | None) -> bytes:  # noqa: A002
    return error_body(INTERNAL_ERROR, "Internal error", id=id, data={"outcome": "unknown"})
