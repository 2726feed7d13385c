"""The door: who may come in, and what a request must look like before anything is done for it.

Statuses and JSON-RPC errors follow the specification of the streamable HTTP transport (2025-11-25 and 2026-07-28): 403
for a bad Origin, 406 and 415 for wrong headers, 400 for what is no JSON-RPC message or no known protocol version.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

from ..pool.jsonrpc import INVALID_REQUEST, InvalidMessage, Message, parse
from .answers import Refused
from .asgi import Headers, header

LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")

_REFUSED_TYPE = re.compile(rb"\s*q\s*=\s*0(\.0*)?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Door:
    """Host, Origin and token checks. With no `hosts`, a gateway that listens on loopback lets in loopback names
    only."""

    tokens: Sequence[bytes]
    hosts: Sequence[str]
    origins: Sequence[str]
    loopback_only: bool

    def check(self, headers: Headers) -> None:
        """Raises `Refused`: 421 for the Host, 403 for the Origin, 401 for the token."""
        host = (header(headers, b"host") or b"").decode("latin-1").lower()
        if not self._host_allowed(host):
            raise Refused(421, "Misdirected request: this Host is not served here")
        origin = header(headers, b"origin")
        if origin is not None and not self._origin_allowed(origin.decode("latin-1").lower(), host):
            raise Refused(403, "Forbidden: this Origin may not call")
        if self.tokens and not self._token_valid(header(headers, b"authorization") or b""):
            raise unauthorized("a bearer token is needed")

    def _host_allowed(self, host: str) -> bool:
        if self.hosts:
            return any(_matches(host, allowed) for allowed in self.hosts)
        return not self.loopback_only or _name(host) in LOOPBACK

    def _origin_allowed(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:  # brackets that hold no address
            return False
        if any(_origin_matches(origin, parts, allowed) for allowed in self.origins):
            return True
        # The gateway's own pages, if its name was checked (or whoever rebinds a name to this address would pass), and
        # on loopback any page of this machine.
        own = bool(self.hosts) and parts.netloc == host
        return own or (self.loopback_only and _name(parts.netloc) in LOOPBACK)

    def _token_valid(self, authorization: bytes) -> bool:
        token = bearer(authorization)
        # Every token is compared: the time tells nothing about which one, or whether any, was close.
        return token is not None and sum(hmac.compare_digest(token, known) for known in self.tokens) > 0


def unauthorized(reason: str, error: str | None = None) -> Refused:
    """401; `error` is one of RFC 6750, for who has said who he is."""
    challenge = 'Bearer realm="leasehold"'
    if error is not None:
        challenge = f'Bearer error="{error}", error_description="{reason}", realm="leasehold"'
    return Refused(401, f"Unauthorized: {reason}", headers=[(b"www-authenticate", challenge.encode())])


def bearer(authorization: bytes) -> bytes | None:
    """The token in the value of an `Authorization` header; None for another scheme."""
    scheme, _, token = authorization.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None


def all_of(headers: Headers, name: bytes) -> list[bytes]:
    """Every value of a header (`name` in lower case) that who calls depends on, and that must not be there twice."""
    return [value.strip() for key, value in headers if key == name]


def _name(netloc: str) -> str:
    """The host without its port; brackets of an IPv6 address stay."""
    return netloc.partition("]")[0] + "]" if netloc.startswith("[") else netloc.partition(":")[0]


def _matches(host: str, allowed: str) -> bool:
    if allowed == "*":
        return True
    if allowed.endswith(":*"):
        return _name(host) == allowed[:-2]
    return host == allowed or (_name(allowed) == allowed and _name(host) == allowed)


def _origin_matches(origin: str, parts: SplitResult, allowed: str) -> bool:
    scheme, separator, netloc = allowed.partition("://")
    if not separator:
        return allowed in ("*", origin)
    return parts.scheme == scheme and _matches(parts.netloc, netloc)


def named_version(headers: Headers) -> str | None:
    """The protocol version a request names; None without the header."""
    raw = header(headers, b"mcp-protocol-version")
    return None if raw is None else raw.decode("latin-1").strip()


def check_post(headers: Headers) -> None:
    """Raises `Refused`: 415 for a body that is not JSON, 406 for a client that would not take either form of answer."""
    content_type = (header(headers, b"content-type") or b"").partition(b";")[0].strip().lower()
    if content_type != b"application/json":
        raise Refused(415, "Unsupported media type: expected Content-Type: application/json")
    if not (_accepts(headers, b"application", b"json") and _accepts(headers, b"text", b"event-stream")):
        raise Refused(406, "Not acceptable: the client must accept both application/json and text/event-stream")


def check_get(headers: Headers) -> None:
    """Raises `Refused` (406) for a client that does not take an event stream."""
    if not _accepts(headers, b"text", b"event-stream"):
        raise Refused(406, "Not acceptable: the client must accept text/event-stream")


def read_message(body: bytes) -> Message:
    """Parse a POST's body; raises `Refused` (400)."""
    try:
        return parse(body)
    except InvalidMessage as error:
        raise Refused(400, str(error), code=error.code) from None


def _accepts(headers: Headers, kind: bytes, subtype: bytes) -> bool:
    wanted = (kind + b"/" + subtype, kind + b"/*", b"*/*")
    for name, value in headers:
        if name == b"accept":
            for part in value.split(b","):
                media, *parameters = part.split(b";")
                if media.strip().lower() in wanted and not any(_REFUSED_TYPE.fullmatch(p) for p in parameters):
                    return True
    return False


def method_not_allowed(allowed: bytes) -> Refused:
    return Refused(405, "Method not allowed", code=INVALID_REQUEST, headers=[(b"allow", allowed)])
