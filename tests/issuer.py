"""An issuer of tokens for tests: keys, tokens of every kind, and an endpoint that publishes the keys."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from typing import Any

import jwt
import orjson
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER = "https://issuer.example"
AUDIENCE = "leasehold"
DAY_S = 24 * 3600
"""Tokens are made when tests are collected, which may be long before they run."""
SECRET = "a shared secret of more than thirty-two bytes"


def rsa_key(number: int = 0, bits: int = 2048) -> Any:
    """A private key; the same one for the same number."""
    return _rsa_key(number, bits)


@cache
def _rsa_key(_number: int, bits: int) -> Any:
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(curve: type[ec.EllipticCurve] = ec.SECP256R1) -> Any:
    return ec.generate_private_key(curve())


@cache
def ed_key() -> Any:
    return ed25519.Ed25519PrivateKey.generate()


def pem(key: Any) -> str:
    """The public half."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def private_pem(key: Any) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says; None leaves a claim out."""
    now = int(time.time())
    said = {"iss": ISSUER, "sub": "alice", "aud": AUDIENCE, "iat": now, "exp": now + 10 * DAY_S, **changes}
    return {name: value for name, value in said.items() if value is not None}


def token(key: Any = None, algorithm: str = "RS256", head: dict[str, Any] | None = None, **changes: Any) -> str:
    """A signed token; `head` adds to its header."""
    return jwt.PyJWS().encode(json.dumps(claims(**changes)).encode(), key or rsa_key(), algorithm, headers=head)


def signed(head: dict[str, Any], key: Any = None) -> str:
    """A rightly signed token (RS256) with a header that no library would write."""
    parts = b".".join([_encoded(orjson.dumps(head)), _encoded(orjson.dumps(claims()))])
    signature = (key or rsa_key()).sign(parts, padding.PKCS1v15(), SHA256())
    return b".".join([parts, _encoded(signature)]).decode()


def forged(head: dict[str, Any], secret: bytes | None = None, body: bytes | None = None) -> str:
    """A token that no library would make: any header, signed by HMAC, or not at all."""
    parts = [_encoded(orjson.dumps(head)), _encoded(body or orjson.dumps(claims()))]
    signature = hmac.digest(secret, b".".join(parts), sha256) if secret is not None else b""
    return b".".join([*parts, _encoded(signature)]).decode()


def jwk(key: Any, kid: str | None = "first", **members: Any) -> dict[str, Any]:
    """The public half, as it is published; None leaves a member out."""
    kinds = ((rsa.RSAPrivateKey, RSAAlgorithm), (ec.EllipticCurvePrivateKey, ECAlgorithm))
    algorithm = next((each for kind, each in kinds if isinstance(key, kind)), OKPAlgorithm)
    made = {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig", "key_ops": None, **members}
    return {name: value for name, value in made.items() if value is not None}


def _encoded(data: bytes) -> bytes:
    return urlsafe_b64encode(data).rstrip(b"=")


@dataclass
class Issuer:
    """Publishes `keys`; a `status` other than 200 or an `answer` instead is a fault. While `stalled`, it is silent."""

    url: str = ""
    keys: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    answer: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    speaks: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, _request: web.Request) -> web.Response:
        self.asked += 1
        await self.speaks.wait()
        body = self.answer if self.answer is not None else orjson.dumps({"keys": self.keys})
        return web.Response(status=self.status, body=body, headers=self.headers)


@asynccontextmanager
async def issuer(*keys: dict[str, Any]) -> AsyncGenerator[Issuer]:
    made = Issuer(keys=list(keys))
    made.speaks.set()
    app = web.Application()
    app.router.add_get("/keys", made.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/keys"
    try:
        yield made
    finally:
        made.speaks.set()
        await runner.cleanup()
