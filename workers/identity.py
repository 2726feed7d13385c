"""Who calls, and which session he names.

A session id is a bearer secret: random bytes and a MAC over them, the server's name and the credential it was issued
to. So an id that was made up, belongs to another server or to another principal fails the same check in the same way,
without a look-up, and is answered as an unknown one.
"""

from __future__ import annotations

import binascii
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final

from ..coordinator import Keyring

NONCE_BYTES: Final = 18
TAG_BYTES: Final = 18
ID_CHARACTERS: Final = (NONCE_BYTES + TAG_BYTES) * 4 // 3

_SESSION: Final = b"session id"
_PRINCIPAL: Final = b"principal"


class Identity:
    """Session ids and principals under the fleet's secrets."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def principal(self, credential: bytes) -> str:
        """A name for whoever holds a credential, that does not tell it: 16 hex digits; "anonymous" without one."""
        return self._keyring.mac(_PRINCIPAL, credential)[:8].hex() if credential else "anonymous"

    def mint(self, server: str, credential: bytes) -> str:
        """A new session id: 48 characters of the URL-safe base64 alphabet."""
        nonce = os.urandom(NONCE_BYTES)
        tag = self._keyring.mac(_SESSION, _bound(nonce, server, credential))[:TAG_BYTES]
        return urlsafe_b64encode(nonce + tag).decode()

    def issued(self, session_id: bytes, server: str, credential: bytes) -> bool:
        """Whether this fleet issued this id for this server to the holder of this credential."""
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
        return self._keyring.mac_matches(_SESSION, _bound(nonce, server, credential), tag)


def _bound(nonce: bytes, server: str, credential: bytes) -> bytes:
    name = server.encode()
    return nonce + len(name).to_bytes(2, "big") + name + credential
