"""The head of a JSON-RPC message: as much as a relay has to know. Bodies cross as untouched bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import orjson

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INTERNAL_ERROR: Final = -32603
SESSION_NOT_FOUND: Final = -32001
"""What the TypeScript SDK answers with 404; clients decide by the status, not by this code."""
SERVER_ERROR: Final = -32000
UNSUPPORTED_PROTOCOL_VERSION: Final = -32022
REQUEST_CANCELLED: Final = -32800

RequestId = str | int
Kind = Literal["request", "notification", "response"]


class InvalidMessage(ValueError):
    """Raised when a body is not one JSON-RPC message. `code` is the JSON-RPC error code to answer with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Message:
    """One parsed JSON-RPC message: `payload` is the decoded object, read-only by convention."""

    kind: Kind
    method: str | None
    id: RequestId | None
    payload: dict[str, Any]

    @property
    def params(self) -> dict[str, Any]:
        """The `params` object; empty when it is absent or not an object."""
        params = self.payload.get("params")
        return cast("dict[str, Any]", params) if isinstance(params, dict) else {}

    @property
    def progress_token(self) -> RequestId | None:
        """`params._meta.progressToken`, by which progress notifications name the request they belong to."""
        meta = self.params.get("_meta")
        token = cast("dict[str, Any]", meta).get("progressToken") if isinstance(meta, dict) else None
        return token if isinstance(token, str | int) else None


def parse(body: bytes | bytearray | memoryview) -> Message:
    """Parse one JSON-RPC message.

    Raises:
        InvalidMessage: not JSON (-32700), a batch, or not a JSON-RPC 2.0 request, notification or response (-32600).
    """
    try:
        decoded: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise InvalidMessage(PARSE_ERROR, "Parse error: the body is not valid JSON") from None
    if isinstance(decoded, list):
        raise InvalidMessage(INVALID_REQUEST, "Invalid request: JSON-RPC batches are not supported")
    if not isinstance(decoded, dict):
        raise InvalidMessage(INVALID_REQUEST, "Invalid request: expected a JSON-RPC object")
    return classify(cast("dict[str, Any]", decoded))


def classify(payload: dict[str, Any]) -> Message:
    """Say what kind of JSON-RPC message a decoded object is; raises `InvalidMessage` (-32600) if none."""
    if payload.get("jsonrpc") != "2.0":
        raise InvalidMessage(INVALID_REQUEST, 'Invalid request: expected "jsonrpc": "2.0"')
    method = payload.get("method")
    identifier = payload.get("id")
    has_id = isinstance(identifier, str | int) and not isinstance(identifier, bool)
    if isinstance(method, str):
        if "id" not in payload:
            return Message("notification", method, None, payload)
        if has_id:
            return Message("request", method, identifier, payload)
        raise InvalidMessage(INVALID_REQUEST, "Invalid request: id must be a string or an integer")
    if ("result" in payload) == ("error" in payload):
        raise InvalidMessage(INVALID_REQUEST, "Invalid request: expected exactly one of method, result, error")
    # An error response may carry no id: the request it answers could not be read.
    if has_id or "error" in payload:
        return Message("response", None, identifier if has_id else None, payload)
    raise InvalidMessage(INVALID_REQUEST, "Invalid request: a result needs the id of its request")


def error_body(code: int, message: str, *, id: RequestId | None = None, data: dict[str, Any] | None = None) -> bytes:  # noqa: A002
    """A JSON-RPC error response as bytes; `data` must hold no credential."""
    error: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return orjson.dumps({"jsonrpc": "2.0", "id": id, "error": error})
