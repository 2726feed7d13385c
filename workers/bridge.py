"""Between the eras: a request of protocol 2026-07-28 in the words of the handshake era (2024-11-05 to 2025-11-25), and
the answer back in the words of the newer one.

For servers whose sessions are pooled: Leasehold initialized them, with no capabilities of a client, and no client has
one of its own. So there is nothing to subscribe to, no log level to set, and nobody for the server to ask. Everything
here is a function of what it is given; bodies are not validated, for whoever receives them does that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import orjson

from ..pool import Message
from ..pool.jsonrpc import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    UNSUPPORTED_PROTOCOL_VERSION,
    error_body,
)
from .answers import STATELESS_VERSIONS
from .asgi import Headers
from .envelope import (
    DISCOVER,
    ENVELOPE_KEYS,
    HEADER_MISMATCH,
    INVALID_PARAMS,
    LOG_LEVEL_KEY,
    LOG_LEVELS,
    ROUTING_HEADERS,
    check_method,
)

MISSING_CLIENT_CAPABILITY: Final = -32021
RESOURCE_NOT_FOUND: Final = -32002
"""Of the handshake era; the newer one says -32602, and its servers must not say this any more."""
PROTOCOL_CODES: Final = range(-32099, -32019)
"""What the newer era keeps for itself. To a server of the older one these mean something of its own, or, as -32042 did
(a URL to be visited first), what must not be said any more."""

STATUS: Final = {
    PARSE_ERROR: 400,
    INVALID_REQUEST: 400,
    INVALID_PARAMS: 400,
    HEADER_MISMATCH: 400,
    MISSING_CLIENT_CAPABILITY: 400,
    UNSUPPORTED_PROTOCOL_VERSION: 400,
    METHOD_NOT_FOUND: 404,
}

SERVER_INFO_KEY: Final = "io.modelcontextprotocol/serverInfo"
CACHEABLE: Final = frozenset(
    {DISCOVER, "prompts/list", "resources/list", "resources/read", "resources/templates/list", "tools/list"}
)
# Stale at once and nobody else's: the server said neither how long it holds nor for whom, and that it has changed
# could not be passed on.
_CACHING: Final[dict[str, Any]] = {"ttlMs": 0, "cacheScope": "private"}

CAPABILITIES: Final = ("tools", "resources", "prompts", "completions", "logging")
"""What a server offers in either era. Their details (`listChanged`, `subscribe`) need a subscription; tasks,
extensions and experiments need what no pooled session has agreed on."""

_FOREIGN_PARAMS: Final = frozenset({"inputResponses", "requestState", "task"})
"""Answers to what a server of the handshake era never asked in a result, and tasks, which the newer era asks for
otherwise."""

_STATELESS_HEADERS: Final = frozenset({*ROUTING_HEADERS, b"last-event-id"})
_PARAM_PREFIX: Final = b"mcp-param-"

# -- requests ------------------------------------------------------------------------------------------------------


def to_handshake(message: Message) -> Message:
    """The same request for a server of the handshake era: without the envelope; id and progress token stay.

    The request must have passed `envelope.check`. Raises `Refused` (404) where there is no counterpart.
    """
    check_method(message)
    payload: dict[str, Any] = {"jsonrpc": "2.0", "id": message.id, "method": message.method}
    params = {key: value for key, value in message.params.items() if key not in _FOREIGN_PARAMS and key != "_meta"}
    meta = {key: value for key, value in _meta(message.params).items() if key not in ENVELOPE_KEYS}
    if meta:
        params["_meta"] = meta
    if params:
        payload["params"] = params
    return Message("request", message.method, message.id, payload)


def to_handshake_headers(headers: Headers) -> Headers:
    """A client's headers without those that are of the newer era only."""
    return [pair for pair in headers if pair[0] not in _STATELESS_HEADERS and not pair[0].startswith(_PARAM_PREFIX)]


# -- answers -------------------------------------------------------------------------------------------------------


def discover(message: Message, initialize_result: dict[str, Any]) -> bytes:
    """The answer to `server/discover`, from what the server said when its session was initialized."""
    told: Any = initialize_result.get("capabilities")
    offered = cast("dict[str, Any]", told) if isinstance(told, dict) else {}
    result: dict[str, Any] = {
        "supportedVersions": list(STATELESS_VERSIONS),
        "capabilities": {name: {} for name in CAPABILITIES if isinstance(offered.get(name), dict)},
    }
    instructions = initialize_result.get("instructions")
    if isinstance(instructions, str):
        result["instructions"] = instructions
    result = to_stateless(DISCOVER, result, initialize_result.get("serverInfo"))
    return orjson.dumps({"jsonrpc": "2.0", "id": message.id, "result": result})


def to_stateless(method: str, result: dict[str, Any], server_info: Any = None) -> dict[str, Any]:
    """A result of the handshake era as the newer one wants it: `server_info` is what `initialize` said it is."""
    # Last, so that they win: in the older era these are names like any other.
    made = {**result, "resultType": "complete"}
    if method in CACHEABLE:
        made |= _CACHING
    meta = _meta(result)
    if _is_implementation(server_info):
        made["_meta"] = {**meta, SERVER_INFO_KEY: server_info}
    elif "_meta" in result:
        made["_meta"] = meta
    return made


def error_to_stateless(error: Any) -> dict[str, Any]:
    """The `error` of a response with a code of the newer era; message and data stay."""
    found = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
    code, text = found.get("code"), found.get("message")
    made: dict[str, Any] = {"code": _code(code, found.get("data")), "message": text if isinstance(text, str) else ""}
    if "data" in found:
        made["data"] = found["data"]
    return made


def response_to_stateless(method: str, payload: dict[str, Any], server_info: Any = None) -> dict[str, Any]:
    """A whole response, whichever it is."""
    result = payload.get("result")
    if "error" in payload or not isinstance(result, dict):
        return {"jsonrpc": "2.0", "id": payload.get("id"), "error": error_to_stateless(payload.get("error"))}
    made = to_stateless(method, cast("dict[str, Any]", result), server_info)
    return {"jsonrpc": "2.0", "id": payload.get("id"), "result": made}


def status_of(response: dict[str, Any]) -> int:
    """The HTTP status of a response that is not part of a stream."""
    error: Any = response.get("error")
    return STATUS.get(cast("dict[str, Any]", error).get("code", 0), 200) if isinstance(error, dict) else 200


# -- what else a server says while it works on a request -----------------------------------------------------------


def passing(message: Message) -> Callable[[dict[str, Any]], bool]:
    """Which messages of the server may be put on the stream of the answer to this request.

    Its own progress, and log messages from the level that it names in its envelope, none without. Nothing else: changes
    need a subscription, only subscriptions are cancelled by a server, and requests have no place on any stream.
    """
    token = message.progress_token
    level = _meta(message.params).get(LOG_LEVEL_KEY)
    levels = LOG_LEVELS[LOG_LEVELS.index(level) :] if level in LOG_LEVELS else ()

    def passes(payload: dict[str, Any]) -> bool:
        method, params = payload.get("method"), payload.get("params")
        if "id" in payload or not isinstance(params, dict):
            return False
        told = cast("dict[str, Any]", params)
        if method == "notifications/progress":
            return token is not None and told.get("progressToken") == token
        return method == "notifications/message" and told.get("level") in levels

    return passes


def answer_server(request: Message) -> bytes:
    """The body that answers a request of the server: there is no client whom it could reach."""
    if request.method == "ping":
        return orjson.dumps({"jsonrpc": "2.0", "id": request.id, "result": {}})
    return error_body(METHOD_NOT_FOUND, "Method not found: no client of this session can be asked", id=request.id)


def _meta(holder: dict[str, Any]) -> dict[str, Any]:
    meta = holder.get("_meta")
    return cast("dict[str, Any]", meta) if isinstance(meta, dict) else {}


def _is_implementation(found: Any) -> bool:
    told = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    return isinstance(told.get("name"), str) and isinstance(told.get("version"), str)


def _code(code: Any, data: Any) -> int:
    if not isinstance(code, int) or isinstance(code, bool):
        return INTERNAL_ERROR
    if code == RESOURCE_NOT_FOUND:
        return INVALID_PARAMS
    if code == MISSING_CLIENT_CAPABILITY and _names_capabilities(data):
        return code
    return INTERNAL_ERROR if code in PROTOCOL_CODES else code


def _names_capabilities(data: Any) -> bool:
    told = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    return isinstance(told.get("requiredCapabilities"), dict)
