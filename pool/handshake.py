"""The handshake of a session that the pool opens for itself (protocol 2024-11-05 to 2025-11-25)."""

from __future__ import annotations

from typing import Any, Final, cast

from .. import __version__
from .calls import JSON_HEADERS, call, notify
from .errors import CallTimeout, OpenFailed, SessionClosed, UpstreamLost, UpstreamRefused
from .link import Headers, Link

NEWEST_VERSION: Final = "2025-11-25"
HANDSHAKE_VERSIONS: Final = ("2024-11-05", "2025-03-26", "2025-06-18", NEWEST_VERSION)
INITIALIZE_ID: Final = "leasehold-initialize"
"""Our own requests have string ids with a prefix: no client's id on the same upstream session can be the same."""


def initialize_params(capabilities: dict[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of `initialize` for a client with these capabilities."""
    return {
        "protocolVersion": NEWEST_VERSION,
        "capabilities": capabilities or {},
        "clientInfo": {"name": "leasehold", "version": __version__},
    }


async def initialize(link: Link, params: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """Initialize a session and return the server's result; `headers` are the caller's own.

    Raises `OpenFailed` where the server refuses or answers with what is no `InitializeResult`.
    """
    try:
        answer = await call(link, "initialize", params, id=INITIALIZE_ID, headers=[*JSON_HEADERS, *headers])
    except UpstreamRefused as error:
        raise OpenFailed(f"the upstream refused to open a session: HTTP status {error.status}") from error
    except (UpstreamLost, CallTimeout, SessionClosed) as error:  # whatever became of the session, no call of it has run
        raise OpenFailed(f"the upstream broke off the handshake: {error}") from error
    error: Any = answer.payload.get("error")
    if error is not None:
        told = cast("dict[str, Any]", error).get("message", "") if isinstance(error, dict) else ""
        raise OpenFailed(f"the upstream refused to open a session: {str(told)[:200]}")
    result: Any = answer.payload.get("result")
    version: Any = cast("dict[str, Any]", result).get("protocolVersion") if isinstance(result, dict) else None
    if version not in HANDSHAKE_VERSIONS:
        raise OpenFailed("the upstream's answer to initialize names no protocol version that is known")
    link.negotiated(version)
    try:
        await notify(link, "notifications/initialized", headers=session_headers(version, headers))
    except (UpstreamRefused, UpstreamLost, CallTimeout, SessionClosed) as failure:
        raise OpenFailed(f"the upstream broke off the handshake: {failure}") from failure
    return cast("dict[str, Any]", result)


def session_headers(version: str, headers: Headers) -> Headers:
    """Headers of a request of our own on an initialized session."""
    return [*JSON_HEADERS, (b"mcp-protocol-version", version.encode()), *headers]
