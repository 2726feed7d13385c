"""Keys that tokens are verified with, and the algorithms that each of them may be used with.

The key decides, not the token: a public key that is taken for a shared secret would let everybody sign.
"""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey
Key = PublicKey | bytes
"""Bytes are a shared secret."""

MIN_RSA_BITS: Final = 2048
RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
BY_CURVE: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
SHARED: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
"""The bytes that a shared secret must have at least (RFC 7518, 3.2)."""


def algorithms_for(key: object) -> frozenset[str]:
    """What a key may be used with; empty for one that is too weak, or of another kind."""
    match key:
        case RSAPublicKey():
            return RSA if key.key_size >= MIN_RSA_BITS else frozenset()
        case EllipticCurvePublicKey():
            return frozenset({BY_CURVE[key.curve.name]} if key.curve.name in BY_CURVE else ())
        case Ed25519PublicKey() | Ed448PublicKey():
            return frozenset({"EdDSA"})
        case bytes():
            return frozenset(name for name, length in SHARED.items() if len(key) >= length)
        case _:
            return frozenset()


def read_key(text: str) -> Key:
    """A PEM public key (its lines may be separated by a written `\\n`), or a shared secret.

    Raises `ValueError` for a key of which `algorithms_for` knows nothing, and for a shared secret that is a public key
    in another form.
    """
    if "-----BEGIN" in text:
        if text.count("-----BEGIN") > 1:
            raise ValueError("several keys")
        try:
            key = load_pem_public_key(text.replace("\\n", "\n").strip().encode())
        except UnsupportedAlgorithm:
            raise ValueError("a key of another kind") from None
    else:
        key = text.encode()
        if _is_public(text):
            raise ValueError("a public key as shared secret")
    if not algorithms_for(key):
        raise ValueError("no key for any algorithm")
    return key  # pyright: ignore[reportReturnType]


def _is_public(text: str) -> bool:
    """Whether this is a public key as OpenSSH, a JWK or bare base64 has it."""
    if text.startswith(("ssh-", "ecdsa-", "sk-")):
        return True
    try:
        return "kty" in json.loads(text)
    except (ValueError, TypeError, RecursionError):
        pass
    try:
        load_der_public_key(b64decode("".join(text.split()), validate=True))
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True
