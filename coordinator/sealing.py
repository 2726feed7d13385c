"""The fleet secret and what is derived from it: channel keys, record keys, MAC keys.

Keys come from HKDF-SHA256 (RFC 5869) with a label for each purpose, sealing is AES-256-GCM (NIST SP 800-38D). With
several secrets, the first one seals and every one opens: to rotate, put the new one second everywhere, then first, then
drop the old one.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import SealError

KEY_BYTES = 32
NONCE_BYTES = 12
KEY_ID_BYTES = 4


class Secret:
    """One fleet secret; never printed."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    @cached_property
    def key_id(self) -> bytes:
        """Four bytes that name this secret on the wire without telling it."""
        return self.derive(b"key id")[:KEY_ID_BYTES]

    def derive(self, label: bytes) -> bytes:
        """32 bytes for one purpose."""
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"leasehold/1 " + label).derive(self._value)

    def __repr__(self) -> str:
        return "<Secret>"


class Keyring:
    """All secrets of the fleet: the first seals, each opens."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        if not secrets:
            raise ValueError("a keyring needs at least one secret")
        self.secrets = [Secret(value) for value in secrets]
        self._by_id = {secret.key_id: secret for secret in self.secrets}
        self._records = {secret.key_id: AESGCM(secret.derive(b"record")) for secret in self.secrets}
        self._macs: dict[bytes, list[bytes]] = {}

    @classmethod
    def random(cls) -> Keyring:
        """A keyring that lives as long as this fleet."""
        return cls([os.urandom(KEY_BYTES)])

    @property
    def primary(self) -> Secret:
        return self.secrets[0]

    def by_id(self, key_id: bytes) -> Secret | None:
        return self._by_id.get(key_id)

    def seal_record(self, plain: bytes, context: bytes) -> bytes:
        """Seal bytes that rest in Redis, bound to `context` (the session key): one moved elsewhere does not open."""
        key_id = self.primary.key_id
        nonce = os.urandom(NONCE_BYTES)
        return key_id + nonce + self._records[key_id].encrypt(nonce, plain, context)

    def open_record(self, sealed: bytes, context: bytes) -> bytes:
        """Inverse of `seal_record`; raises `SealError`."""
        aead = self._records.get(sealed[:KEY_ID_BYTES])
        start = KEY_ID_BYTES + NONCE_BYTES
        if aead is None or len(sealed) <= start:
            raise SealError("sealed record")
        try:
            return aead.decrypt(sealed[KEY_ID_BYTES:start], sealed[start:], context)
        except InvalidTag:
            raise SealError("sealed record") from None

    def mac(self, label: bytes, message: bytes) -> bytes:
        """HMAC-SHA256 of `message` under the first secret's key for `label`: 32 bytes."""
        return hmac.digest(self._mac_keys(label)[0], message, sha256)

    def mac_matches(self, label: bytes, message: bytes, tag: bytes) -> bool:
        """Whether `tag` is a prefix (16 bytes or more) of the MAC of `message` under any of the secrets."""
        if len(tag) < 16:
            return False
        return any(
            hmac.compare_digest(hmac.digest(key, message, sha256)[: len(tag)], tag) for key in self._mac_keys(label)
        )

    def _mac_keys(self, label: bytes) -> list[bytes]:
        keys = self._macs.get(label)
        if keys is None:
            keys = self._macs[label] = [secret.derive(b"mac " + label) for secret in self.secrets]
        return keys
