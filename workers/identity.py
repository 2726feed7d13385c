"""Who calls, and which session he names.

A session id is a bearer secret: random bytes and a MAC over them, the server's name and what the caller is known by:
the credential he presents, or, where they are configured, the principal that a trusted proxy names or the claims of a
verified token. So an id that was made up, belongs to another server or to another principal fails the same check in
the same way, without a look-up, and is answered as an unknown one; and who is known by more than his credential keeps
his sessions when that changes.
"""

from __future__ import annotations

import binascii
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, Protocol

from ..coordinator import Keyring
from .asgi import Headers, Scope, header

NONCE_BYTES: Final = 18
TAG_BYTES: Final = 18
ID_CHARACTERS: Final = (NONCE_BYTES + TAG_BYTES) * 4 // 3

OF_THE_REQUEST: Final = frozenset(
    {
        b"accept-language",
        b"authorization",  # what callers are known by anyway
        b"baggage",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-correlation-id",
        b"x-request-id",
    }
)
"""Headers that say nothing of who calls."""

_SESSION: Final = b"session id"
_PRINCIPAL: Final = b"principal"
_SHARED: Final = b"shared session"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    principal: str
    """A name for him that does not tell who he is: for logs, limits and Redis."""
    bound: bytes = field(repr=False)
    """What he is known by, and his session ids are bound to: a credential or a person's name, never to be shown.
    Callers are the same principal exactly if this is the same."""


class Source(Protocol):
    """Where a request says who calls."""

    async def bound(self, scope: Scope) -> bytes:
        """What the caller is known by; raises `Refused`."""
        ...

    async def run(self) -> None:
        """What has to be done besides, as long as the worker lives; may end at once."""
        ...


class Credential:
    """Callers by the `Authorization` header they present: a new token is a new principal."""

    async def bound(self, scope: Scope) -> bytes:
        return header(scope["headers"], b"authorization") or b""

    async def run(self) -> None:
        return


class Identity:
    """Callers, session ids and principals under the fleet's secrets."""

    def __init__(self, keyring: Keyring, source: Source | None = None) -> None:
        self._keyring = keyring
        self._source = source or Credential()

    async def run(self) -> None:
        """Keep up to date what callers are known by; may end at once."""
        await self._source.run()

    async def caller(self, scope: Scope) -> Caller:
        """Who sent this request; raises `Refused`: 401 for who does not say, or not truly."""
        bound = await self._source.bound(scope)
        return Caller(self.principal(bound), bound)

    def sharing(self, caller: Caller, forwarded: Headers) -> Caller:
        """The caller for whom a session is shared, with the headers of his that the upstream sees.

        Who is known by the credential he presents is known by all of them: one key more, another principal. A header
        that is another one in each request belongs to `OF_THE_REQUEST`.
        """
        if not isinstance(self._source, Credential):
            return caller
        more = sorted(pair for pair in forwarded if pair[0] not in OF_THE_REQUEST)
        if not more:
            return caller
        bound = caller.bound + b"\0" + sha256(repr(more).encode()).digest()
        return Caller(self.principal(bound), bound)

    def principal(self, bound: bytes) -> str:
        """A name for who is known by `bound`, that does not tell it: 16 hex digits; "anonymous" for nothing."""
        return self._keyring.mac(_PRINCIPAL, bound)[:8].hex() if bound else "anonymous"

    def mint(self, server: str, bound: bytes) -> str:
        """A new session id: 48 characters of the URL-safe base64 alphabet."""
        nonce = os.urandom(NONCE_BYTES)
        tag = self._keyring.mac(_SESSION, _message(nonce, server, bound))[:TAG_BYTES]
        return urlsafe_b64encode(nonce + tag).decode()

    def shared_key(self, server: str, bound: bytes, name: bytes = b"") -> str:
        """The key of the one session of this server that who is known by `bound` has (under a name): 64 hex digits.

        No session id has it: keys of sessions with an id are hashes of that.
        """
        return self._keyring.mac(_SHARED, _message(len(name).to_bytes(4, "big") + name, server, bound)).hex()

    def issued(self, session_id: bytes, server: str, bound: bytes) -> bool:
        """Whether this fleet issued this id for this server to who is known by `bound`."""
        if len(session_id) != ID_CHARACTERS:
            return False
        try:
            raw = urlsafe_b64decode(session_id)
        except (binascii.Error, ValueError):
            return False
        # Base64 decoders skip what they do not know; and padding would make a shorter tag, of which a prefix is enough.
        if len(raw) != NONCE_BYTES + TAG_BYTES or urlsafe_b64encode(raw) != session_id:
            return False
        nonce, tag = raw[:NONCE_BYTES], raw[NONCE_BYTES:]
        return self._keyring.mac_matches(_SESSION, _message(nonce, server, bound), tag)


def _message(nonce: bytes, server: str, bound: bytes) -> bytes:
    name = server.encode()
    return nonce + len(name).to_bytes(2, "big") + name + bound
