"""The keys that an issuer of tokens publishes: a JSON Web Key Set (RFC 7517), fetched and kept.

One task fetches: at the start, every few minutes, and when a token names a key that is not there. So there is one
fetch at a time, and however many tokens are made up, the issuer is asked once in a few seconds. When it does not
answer, the keys that were there last go on, for a day.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import jwt
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from .answers import unavailable
from .public_keys import Key, algorithms_for

logger = logging.getLogger("leasehold.workers.jwks")

REFRESH_S: Final = 300.0
"""After this time a key that was withdrawn is accepted no more."""
COOLDOWN_S: Final = 5.0
"""From the end of one fetch to the next, whoever asks for it."""
MAX_RETRY_S: Final = 60.0
FETCH_TIMEOUT_S: Final = 5.0
MAX_STALE_S: Final = 24 * 3600.0
MAX_BYTES: Final = 256 * 1024
MAX_KEYS: Final = 100
MAX_WAITING: Final = 1000
"""Requests that wait for a fetch; above it they get 503, or made-up tokens could fill the worker."""

READERS: Final = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}
"""By `kty`. No `oct`: a shared secret is not published."""


class UnknownKey(Exception):
    """Raised for a key that the issuer does not publish, or not for this algorithm."""


class BadKeySet(Exception):
    """Raised when what was fetched is no key set; the message is one word."""


@dataclass(frozen=True, slots=True)
class PublishedKey:
    """One key, and what it may be used with here."""

    kid: str | None
    algorithms: frozenset[str]
    key: Key


class Jwks:
    """The keys behind a URL; `run()` keeps them up to date."""

    def __init__(self, url: str, algorithms: Collection[str]) -> None:
        self._url = url
        self._allowed = frozenset(algorithms)
        self._keys: list[PublishedKey] = []
        self._document = b""
        self._fetched_at: float | None = None
        """None: never, or too long ago."""
        self._failures = 0
        self._cooling = False
        self._waiting = 0
        self._wanted = asyncio.Event()
        self._fetched = asyncio.Event()
        """Set when the fetch that is under way, or else the next one, has ended; then replaced."""
        self.version = 0

    async def find(self, kid: str | None, algorithm: str) -> Key:
        """The key of this name. For a token that names none: the only one there is for its algorithm.

        Raises `UnknownKey`, and `Refused` (503) when the issuer cannot be asked.
        """
        found = self._look_up(kid, algorithm)
        if found is None and not self._cooling:
            await self._wait_fetched()
            found = self._look_up(kid, algorithm)
        if found is not None:
            return found
        if self._failures or self._fetched_at is None:
            raise unavailable("The keys that tokens are verified with cannot be fetched")
        raise UnknownKey

    async def run(self) -> None:
        """Fetch, again and again."""
        parts = urlsplit(self._url)
        if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            logger.warning("jwks_in_clear: whoever is on the way can replace the keys; use https")
        timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as http:
            while True:
                await self._fetch(http)
                self._wanted.clear()
                self._cooling = True
                fetched, self._fetched = self._fetched, asyncio.Event()
                fetched.set()
                await asyncio.sleep(COOLDOWN_S)
                self._cooling = False
                rest_s = min(MAX_RETRY_S, COOLDOWN_S * 2.0 ** min(self._failures, 10)) if self._failures else REFRESH_S
                with suppress(TimeoutError):
                    async with asyncio.timeout(rest_s * random.uniform(0.9, 1.1)):  # noqa: S311
                        await self._wanted.wait()

    def _look_up(self, kid: str | None, algorithm: str) -> Key | None:
        found = [each.key for each in self._keys if algorithm in each.algorithms and kid in (None, each.kid)]
        return found[0] if found and (kid is not None or len(found) == 1) else None

    async def _wait_fetched(self) -> None:
        if self._waiting >= MAX_WAITING:
            raise unavailable("Too many requests wait for the keys that tokens are verified with")
        self._waiting += 1
        self._wanted.set()
        try:
            # A moment longer than a fetch may take: it has its own end, unless nobody fetches any more.
            async with asyncio.timeout(FETCH_TIMEOUT_S + 1):
                await self._fetched.wait()
        except TimeoutError:
            raise unavailable("The keys that tokens are verified with cannot be fetched") from None
        finally:
            self._waiting -= 1

    async def _fetch(self, http: aiohttp.ClientSession) -> None:
        try:
            document = await self._read(http)
            keys = read_key_set(document, self._allowed)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, BadKeySet) as error:
            self._failures += 1
            if self._fetched_at is not None and time.monotonic() - self._fetched_at > MAX_STALE_S:
                self._replace([], b"")
                self._fetched_at = None
            # Of others only the kind: their text may hold the URL, and that a password.
            why = str(error) if isinstance(error, BadKeySet) else type(error).__name__
            logger.warning("jwks_not_fetched failures=%d keys=%d error=%s", self._failures, len(self._keys), why)
            return
        self._failures = 0
        self._fetched_at = time.monotonic()
        if document != self._document:
            self._replace(keys, document)
            level = logging.INFO if keys else logging.WARNING
            logger.log(level, "jwks_fetched keys=%d algorithms=%s", len(keys), ",".join(sorted(self._allowed)))

    def _replace(self, keys: list[PublishedKey], document: bytes) -> None:
        self._keys, self._document = keys, document
        self.version += 1

    async def _read(self, http: aiohttp.ClientSession) -> bytes:
        # No redirects: one could lead from https to where anybody may answer.
        async with http.get(self._url, allow_redirects=False, headers={"accept": "application/json"}) as response:
            if response.status != 200:
                raise BadKeySet(f"status_{response.status}")
            document = bytearray()
            async for chunk in response.content.iter_chunked(65536):
                document += chunk
                if len(document) > MAX_BYTES:
                    raise BadKeySet("too_large")
            return bytes(document)


def read_key_set(document: bytes, allowed: frozenset[str]) -> list[PublishedKey]:
    """The keys that may be used with an allowed algorithm; raises `BadKeySet`. Others are passed over."""
    try:
        parsed: Any = orjson.loads(document)
    except ValueError:
        raise BadKeySet("no_json") from None
    entries: Any = parsed.get("keys") if isinstance(parsed, dict) else None  # pyright: ignore
    if not isinstance(entries, list):
        raise BadKeySet("no_key_set")
    if len(entries) > MAX_KEYS:  # pyright: ignore[reportUnknownArgumentType]
        raise BadKeySet("too_many_keys")
    keys: list[PublishedKey] = []
    for entry in entries:  # pyright: ignore[reportUnknownVariableType]
        key = _read_entry(entry, allowed) if isinstance(entry, dict) else None  # pyright: ignore
        if key is not None:
            keys.append(key)
    return keys


def _read_entry(entry: dict[str, Any], allowed: frozenset[str]) -> PublishedKey | None:
    kid, algorithm, operations = entry.get("kid"), entry.get("alg"), entry.get("key_ops")
    reader = READERS.get(str(entry.get("kty")))
    if reader is None or entry.get("use", "sig") != "sig" or "d" in entry:  # a private key, published by mistake
        return None
    if not isinstance(kid, str | None) or not isinstance(algorithm, str | None):
        return None
    if isinstance(operations, list) and "verify" not in operations:
        return None
    try:
        key = reader.from_jwk(entry)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, UnsupportedAlgorithm):
        return None
    fits = algorithms_for(key) & allowed & (allowed if algorithm is None else {algorithm})
    return PublishedKey(kid, fits, key) if fits else None  # pyright: ignore[reportArgumentType]
