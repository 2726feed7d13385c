"""Principals by the claims of a JSON Web Token that is verified here.

A token is read only so far as to find the key it names; then PyJWT verifies it, with that key and one algorithm that
was allowed in the settings, is the token's, and is one that the key may be used with.
"""

from __future__ import annotations

import logging
import time
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any, Final, Protocol

import jwt
import orjson

from .answers import Refused
from .asgi import Scope
from .door import all_of, bearer, unauthorized
from .jwks import Jwks, UnknownKey
from .public_keys import Key, algorithms_for, read_key
from .settings import Settings

logger = logging.getLogger("leasehold.workers.tokens")

MAX_TOKEN_BYTES: Final = 16 * 1024
MAX_VERIFIED: Final = 10_000
"""Tokens remembered as verified, of which only a hash is kept."""
LEEWAY_S: Final = 30
"""How far the clock of who issues tokens may be from ours."""
MARK: Final = b"\0jwt\0"
"""In front of what the caller is known by: no credential begins like this, so that the two kinds never meet."""

REASONS: Final[dict[type[Exception], str]] = {
    jwt.ExpiredSignatureError: "the token has expired",
    jwt.ImmatureSignatureError: "the token is not valid yet",
    jwt.InvalidAudienceError: "the token is for another audience",
    jwt.InvalidIssuerError: "the token is of another issuer",
    jwt.MissingRequiredClaimError: "the token lacks a claim",
}
INVALID: Final = "the token is not valid"


class Keys(Protocol):
    """Where the keys come from."""

    @property
    def version(self) -> int:
        """Changes whenever a key may have been withdrawn."""
        ...

    async def find(self, kid: str | None, algorithm: str) -> Key:
        """The key of this name, for this algorithm; raises `UnknownKey`, and `Refused` when that cannot be said."""
        ...

    async def run(self) -> None: ...


class OneKey:
    """A key out of the settings, whatever tokens call it."""

    version = 0

    def __init__(self, key: Key) -> None:
        self._key = key
        self._algorithms = algorithms_for(key)

    async def find(self, kid: str | None, algorithm: str) -> Key:
        if algorithm not in self._algorithms:
            raise UnknownKey
        return self._key

    async def run(self) -> None:
        return


class TokenClaims:
    """Callers by claims of the token they present: a new token with the same claims is the same principal."""

    def __init__(
        self,
        keys: Keys,
        *,
        algorithms: Collection[str],
        audience: Sequence[str],
        issuer: Sequence[str],
        claims: Sequence[str],
    ) -> None:
        self._keys = keys
        self._algorithms = frozenset(algorithms)
        # None, unlike nothing: a token that names an audience is then refused, and any issuer will do.
        self._audience = list(audience) or None
        self._issuer = list(issuer) or None
        self._claims = tuple(claims)
        self._verified: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._version = keys.version

    async def bound(self, scope: Scope) -> bytes:
        """Raises `Refused`: 401 without a valid token, 400 for several `Authorization` headers, 503 while the keys
        cannot be fetched."""
        given = all_of(scope["headers"], b"authorization")
        if len(given) > 1:  # the upstream might take another one for the caller's
            raise Refused(400, "Bad request: more than one Authorization header")
        token = bearer(given[0]) if given else None
        if not token:
            raise unauthorized("a bearer token is needed")
        name = sha256(token).digest()
        self._forget_withdrawn()
        known = self._verified.get(name)
        if known is not None and time.time() < known[1]:
            self._verified.move_to_end(name)
            return known[0]
        bound, until = await self._verify(token)
        self._forget_withdrawn()
        self._verified[name] = bound, until
        while len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        return bound

    async def run(self) -> None:
        await self._keys.run()

    def _forget_withdrawn(self) -> None:
        if self._version != self._keys.version:
            self._version = self._keys.version
            self._verified.clear()

    async def _verify(self, token: bytes) -> tuple[bytes, float]:
        """What the token says, and until when (Unix time); raises `Refused`."""
        try:
            algorithm, kid = self._read_head(token)
            key = await self._keys.find(kid, algorithm)
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                options={"require": ["exp"]},
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
            )
            return self._principal(claims), int(claims["exp"]) + LEEWAY_S
        except UnknownKey:
            raise _invalid("the token is signed with an unknown key") from None
        # What PyJWT lets through when it meets what it does not expect is no failure of ours.
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _invalid(REASONS.get(type(error), INVALID)) from None

    def _read_head(self, token: bytes) -> tuple[str, str | None]:
        """(algorithm, key's name) as the token has them; raises `ValueError`."""
        if len(token) > MAX_TOKEN_BYTES:
            raise ValueError("too large")
        segment = token.partition(b".")[0]
        head: Any = orjson.loads(urlsafe_b64decode(segment + b"=" * (-len(segment) % 4)))
        if not isinstance(head, dict) or "crit" in head:  # a critical extension that we do not know
            raise ValueError("no head")
        algorithm, kid = head.get("alg"), head.get("kid")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if algorithm not in self._algorithms or not isinstance(kid, str | None):
            raise ValueError("another algorithm")
        return str(algorithm), kid  # pyright: ignore[reportUnknownArgumentType]

    def _principal(self, claims: dict[str, Any]) -> bytes:
        """The claims that make a principal, in a form that no others have."""
        values = [claims.get(name) for name in self._claims]
        for value in values:
            # A list or an object can be written in several ways; nothing, and nobody's name, are no principal.
            if not (isinstance(value, str) and value) and type(value) is not int:
                raise jwt.MissingRequiredClaimError("principal")
        return MARK + orjson.dumps(list(zip(self._claims, values, strict=True)))


def make_source(settings: Settings) -> TokenClaims:
    """By the settings, of which `load_settings` has checked that they go together."""
    algorithms = frozenset[str](settings.jwt_algorithms)
    if settings.jwt_jwks_url is not None:
        keys = Jwks(settings.jwt_jwks_url.get_secret_value(), algorithms)
    else:
        assert settings.jwt_key is not None
        keys = OneKey(read_key(settings.jwt_key.get_secret_value()))
    return TokenClaims(
        keys,
        algorithms=algorithms,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        claims=settings.jwt_claims,
    )


def _invalid(reason: str) -> Refused:
    logger.debug("token_refused reason=%s", reason.replace(" ", "_"))
    return unauthorized(reason, error="invalid_token")
