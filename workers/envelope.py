"""What a request of protocol 2026-07-28 has to look like before anything is done for it: the metadata that each one
carries in `params._meta`, and the headers that repeat parts of its body.

The order of the checks, statuses and codes are those of the specification and of the SDK's own server: who sends both
a bad envelope and a bad header is told of the envelope.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Final, cast

from ..pool import Message
from ..pool.jsonrpc import INVALID_REQUEST, METHOD_NOT_FOUND, RequestId
from .answers import STATELESS_VERSIONS, Refused, unsupported_version
from .asgi import Headers, header

INVALID_PARAMS: Final = -32602
HEADER_MISMATCH: Final = -32020

PROTOCOL_VERSION_KEY: Final = "io.modelcontextprotocol/protocolVersion"
CLIENT_INFO_KEY: Final = "io.modelcontextprotocol/clientInfo"
CLIENT_CAPABILITIES_KEY: Final = "io.modelcontextprotocol/clientCapabilities"
LOG_LEVEL_KEY: Final = "io.modelcontextprotocol/logLevel"
ENVELOPE_KEYS: Final = frozenset({PROTOCOL_VERSION_KEY, CLIENT_INFO_KEY, CLIENT_CAPABILITIES_KEY, LOG_LEVEL_KEY})

LOG_LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
"""From the least to the most severe."""

VERSION_HEADER: Final = b"mcp-protocol-version"
METHOD_HEADER: Final = b"mcp-method"
NAME_HEADER: Final = b"mcp-name"
ROUTING_HEADERS: Final = (VERSION_HEADER, METHOD_HEADER, NAME_HEADER)
NAMED_BY: Final = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
"""The parameter that `Mcp-Name` repeats."""

DISCOVER: Final = "server/discover"
BRIDGED: Final = frozenset(
    {
        "completion/complete",
        "prompts/get",
        "prompts/list",
        "resources/list",
        "resources/read",
        "resources/templates/list",
        "tools/call",
        "tools/list",
    }
)
"""The methods of both eras, by the same names and with the same parameters."""

_NOT_HERE: Final = {
    "subscriptions/listen": "the servers behind it tell of changes by session, and no session is this client's own",
    "initialize": "protocol 2026-07-28 has no handshake; without its headers, this request opens a session",
    "ping": "not part of protocol 2026-07-28",
    "logging/setLevel": f"not part of protocol 2026-07-28: name {LOG_LEVEL_KEY} in _meta",
    "resources/subscribe": "not part of protocol 2026-07-28",
    "resources/unsubscribe": "not part of protocol 2026-07-28",
}
"""Why a method that is known is not served. All others, those of extensions too, could change what others share."""

_VISIBLE: Final = re.compile(rb"[\x20-\x7e\t]*")
_SENTINEL: Final = re.compile(r"=\?base64\?(.*)\?=", re.DOTALL)
_TEXTS: Final = ("title", "description", "websiteUrl")
_OBJECTS: Final = {"sampling": ("context", "tools"), "elicitation": ("form", "url")}


def check(message: Message, headers: Headers) -> None:
    """Raise `Refused` for a request that must not be served: 400, or 404 for a method that is not there.

    Which arguments a tool repeats in headers is known from the tool only: see `param_headers.py`.
    """
    if message.kind != "request" or not isinstance(message.payload.get("params"), dict | None):
        raise Refused(400, "Invalid request: expected one JSON-RPC request or notification", code=INVALID_REQUEST)
    id = message.id  # noqa: A001
    _check_unique(headers, id)
    meta = _envelope(message)
    version: Any = meta[PROTOCOL_VERSION_KEY]
    named = header(headers, VERSION_HEADER)
    if named is None or named.decode("latin-1").strip(" \t") != version:
        raise mismatch("MCP-Protocol-Version", f"_meta[{PROTOCOL_VERSION_KEY!r}]", id)
    if _text(headers, METHOD_HEADER) != message.method:
        raise mismatch("Mcp-Method", "method", id)
    key = NAMED_BY.get(message.method or "")
    name: Any = message.params.get(key) if key is not None else None
    if name is not None and decoded(header(headers, NAME_HEADER)) != name:
        raise mismatch("Mcp-Name", f"params.{key}", id)
    if version not in STATELESS_VERSIONS:
        raise unsupported_version(version, STATELESS_VERSIONS, id)
    if message.method != DISCOVER:
        check_method(message)
    if key is not None and not isinstance(name, str):
        raise invalid_params(f"params.{key} must be a string", id)
    _check_shapes(meta, id)


def check_notification(headers: Headers) -> None:
    """Raise `Refused` for a notification of a version that is not served. Any other is answered with 202 and goes
    nowhere: a client of this era has none to send, and tells that it left by leaving."""
    version = (header(headers, VERSION_HEADER) or b"").decode("latin-1").strip(" \t")
    if version not in STATELESS_VERSIONS:
        raise unsupported_version(version, STATELESS_VERSIONS)


def check_method(message: Message) -> None:
    """Raise `Refused` (404) for a method that has no counterpart in the handshake era."""
    if message.method not in BRIDGED:
        why = _NOT_HERE.get(message.method or "")
        told = "Method not found" if why is None else f"Method not found: {why}"
        raise Refused(404, told, code=METHOD_NOT_FOUND, id=message.id)


def invalid_params(what: str, id: RequestId | None) -> Refused:  # noqa: A002
    """400 and -32602."""
    return Refused(400, f"Invalid params: {what}", code=INVALID_PARAMS, id=id)


def mismatch(name: str, field: str, id: RequestId | None) -> Refused:  # noqa: A002
    """400 and -32020: a header that is missing, or does not say what the body says."""
    return Refused(400, f"Header mismatch: {name} does not match {field} of the body", code=HEADER_MISMATCH, id=id)


def decoded(value: bytes | None) -> str | None:
    """What a header says that may be written as `=?base64?...?=`; None for one that is absent or cannot be read."""
    if value is None or not _VISIBLE.fullmatch(value):
        return None
    text = value.decode().strip(" \t")
    written = _SENTINEL.fullmatch(text)
    if written is None:
        return text
    try:
        raw = base64.b64decode(written[1], validate=True)
        # Padding bits that are not zero are another spelling of the same bytes, which no encoder writes.
        return raw.decode() if base64.b64encode(raw).decode() == written[1] else None
    except (binascii.Error, UnicodeDecodeError):
        return None


def _text(headers: Headers, name: bytes) -> str | None:
    value = header(headers, name)
    return value.decode().strip(" \t") if value is not None and _VISIBLE.fullmatch(value) else None


def _check_unique(headers: Headers, id: RequestId | None) -> None:  # noqa: A002
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in ROUTING_HEADERS:
            if name in seen:
                told = f"Header mismatch: {name.decode()} appears more than once"
                raise Refused(400, told, code=HEADER_MISMATCH, id=id)
            seen.add(name)


def _envelope(message: Message) -> dict[str, Any]:
    found: Any = message.params.get("_meta")
    meta = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    missing = [key for key in (PROTOCOL_VERSION_KEY, CLIENT_CAPABILITIES_KEY) if key not in meta]
    if missing:
        raise invalid_params(f"params._meta must be an object with {' and '.join(missing)}", message.id)
    return meta


def _check_shapes(meta: dict[str, Any], id: RequestId | None) -> None:  # noqa: A002
    if not _are_capabilities(meta[CLIENT_CAPABILITIES_KEY]):
        raise invalid_params(f"_meta[{CLIENT_CAPABILITIES_KEY!r}] must be an object of capabilities", id)
    if not _is_implementation(meta.get(CLIENT_INFO_KEY)):
        raise invalid_params(f"_meta[{CLIENT_INFO_KEY!r}] must be an object with a name and a version", id)
    if meta.get(LOG_LEVEL_KEY) not in (None, *LOG_LEVELS):
        raise invalid_params(f"_meta[{LOG_LEVEL_KEY!r}] must be one of {', '.join(LOG_LEVELS)}", id)
    if not isinstance(meta.get("progressToken"), str | int | None):
        raise invalid_params("_meta.progressToken must be a string or an integer", id)


def _are_capabilities(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    capabilities = cast("dict[str, Any]", found)
    for key in ("roots", "sampling", "elicitation", "experimental", "extensions"):
        value: Any = capabilities.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            return False
        members = cast("dict[str, Any]", value)
        if key in _OBJECTS and not all(isinstance(members.get(name), dict | None) for name in _OBJECTS[key]):
            return False
        if key in ("experimental", "extensions") and not all(isinstance(each, dict) for each in members.values()):
            return False
    return True


def _is_implementation(found: Any) -> bool:
    if found is None:
        return True
    if not isinstance(found, dict):
        return False
    told = cast("dict[str, Any]", found)
    if not all(isinstance(told.get(key), str) for key in ("name", "version")):
        return False
    return all(isinstance(told.get(key), str | None) for key in _TEXTS)
