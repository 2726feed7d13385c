"""The HTTP client of authorization flows: metadata, registration and token endpoints; and what is told when they fail.

That is kinds, statuses and words of the standards, and never what a server wrote.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final, cast

import httpx2

from .clock import monotonic
from .errors import AuthFailed

TIMEOUT_S: Final = 10.0
"""For one request and its answer, whole."""
CONNECT_TIMEOUT_S: Final = 5.0
KEEPALIVE_S: Final = 3.0
MAX_BYTES: Final = 1024 * 1024
MAX_FAILURES: Final = 256
SHARED_FAILURE_S: Final = 5.0
"""How long a failure is shared with the flows that were under way."""

FRAMING_HEADERS: Final = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})

CODES: Final = frozenset(
    {
        "access_denied",
        "insufficient_scope",
        "invalid_client",
        "invalid_client_metadata",
        "invalid_grant",
        "invalid_redirect_uri",
        "invalid_request",
        "invalid_scope",
        "invalid_target",
        "invalid_token",
        "server_error",
        "temporarily_unavailable",
        "unauthorized_client",
        "unsupported_grant_type",
    }
)
"""Error codes of RFC 6749, 6750, 7591 and 8707."""

PLAIN: Final = (
    "Authorization server metadata issuer mismatch",
    "No authorization server metadata",
    "Protected resource ",
    "Protected Resource ",
    "Token endpoint ",
)
"""Beginnings of those messages of the SDK that name issuers and statuses, and nothing a token could be part of."""


class AuthClients:
    """The client that all flows of a pool share; keeps no cookies, for principals share it.

    Redirects are not followed: the SDK's own flows follow those that stay within their origin, themselves.
    """

    def __init__(self) -> None:
        self._client: httpx2.AsyncClient | None = None
        self._is_closed = False
        self._failed_at: dict[tuple[str, str, int | None], float] = {}

    async def send(self, request: httpx2.Request, *, since: float) -> httpx2.Response:
        """One request of a flow that began at `since` (monotonic); its answer, read to the end. Raises `AuthFailed`.

        Flows wait for each other. So one that has waited while the same server could not be reached shares that
        failure: a hundred calls wait for a dead token endpoint as long as one.
        """
        if self._is_closed:
            raise AuthFailed("authorization failed: the pool is closing")
        place = (request.url.scheme, request.url.host, request.url.port)
        if self._failed_at.get(place, -1.0) >= max(since, monotonic() - SHARED_FAILURE_S):
            raise AuthFailed("authorization failed: the authorization server could not be reached a moment ago")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._exchange(request)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:  # TimeoutError is an OSError
            if len(self._failed_at) >= MAX_FAILURES:
                self._failed_at.clear()
            self._failed_at[place] = monotonic()
            name = type(error).__name__
            raise AuthFailed(f"authorization failed: cannot reach the authorization server: {name}") from None

    async def aclose(self) -> None:
        self._is_closed = True
        if self._client is not None:
            await self._client.aclose()

    async def _exchange(self, request: httpx2.Request) -> httpx2.Response:
        # An explicit Auth that does nothing: no credentials out of the URL or the environment.
        response = await self._made().send(request, stream=True, auth=httpx2.Auth(), follow_redirects=False)
        try:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise AuthFailed(f"authorization failed: an answer of the server is larger than {MAX_BYTES} bytes")
        finally:
            await response.aclose()
        headers = [pair for pair in response.headers.raw if pair[0].lower() not in FRAMING_HEADERS]
        read = httpx2.Response(response.status_code, headers=headers, content=bytes(content), request=request)
        read.next_request = response.next_request
        return read

    def _made(self) -> httpx2.AsyncClient:
        if self._client is None:
            self._client = httpx2.AsyncClient(
                verify=ssl.create_default_context(),  # as for links: the same trust, and no proxies either
                trust_env=False,
                timeout=httpx2.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                limits=httpx2.Limits(max_connections=100, keepalive_expiry=KEEPALIVE_S),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            )
        return self._client


def failure(error: Exception, said: httpx2.Response | None) -> AuthFailed:
    """`error` was raised by a flow; `said`: the last answer of the authorization server, if there was one."""
    told = str(error)
    detail = f": {told[:300]}" if told.startswith(PLAIN) and told.isprintable() else ""
    if not detail and said is not None:
        detail = f" after {answered(said)}"
    return AuthFailed(f"authorization failed: {type(error).__name__}{detail}")


def answered(response: httpx2.Response) -> str:
    """Status and error code of an answer whose body has been read."""
    try:
        body: Any = json.loads(response.content)
    except ValueError:
        body = None
    code: Any = cast("dict[str, Any]", body).get("error") if isinstance(body, dict) else None
    known = f" ({code})" if isinstance(code, str) and code in CODES else ""
    return f"HTTP status {response.status_code}{known}"
