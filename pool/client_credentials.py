"""The client-credentials grant (RFC 6749, 4.4) at a token endpoint that is configured: needs no metadata and no SDK."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from typing import Any, Final, cast
from urllib.parse import quote

import httpx2
import orjson

from .auth_client import answered
from .clock import monotonic
from .errors import AuthFailed

RENEW_BEFORE: Final = 0.1
RENEW_BEFORE_S: Final = 30.0
"""A token is renewed when a tenth of its life is left, at most 30 s."""


class ClientCredentials(httpx2.Auth):
    """Gets a token before the first call, keeps it while it is valid, and gets another where a call is refused."""

    def __init__(self, client_id: str, client_secret: str, token_url: str, scope: str | None = None) -> None:
        pair = f"{quote(client_id, safe='')}:{quote(client_secret, safe='')}"
        self._basic = "Basic " + base64.b64encode(pair.encode()).decode()
        self._url = httpx2.URL(token_url)
        self._form = {"grant_type": "client_credentials", **({"scope": scope} if scope else {})}
        self._token: str | None = None
        self._valid_until = 0.0
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<ClientCredentials {self._url.host}>"

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        refused: str | None = None
        for _ in range(2):
            async with self._lock:
                if self._token is None or self._token == refused or monotonic() >= self._valid_until:
                    asked_at = monotonic()
                    self._keep((yield self._request()), asked_at)
                refused = self._token
            request.headers["authorization"] = f"Bearer {refused}"
            response = yield request
            if response.status_code != 401:
                return

    def _request(self) -> httpx2.Request:
        headers = {"authorization": self._basic, "accept": "application/json"}
        return httpx2.Request("POST", self._url, data=self._form, headers=headers)

    def _keep(self, answer: httpx2.Response, asked_at: float) -> None:
        if answer.status_code != 200:
            raise AuthFailed(f"authorization failed: the token endpoint answered with {answered(answer)}")
        try:
            body: Any = orjson.loads(answer.content)
        except ValueError:
            body = None
        told = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
        token, kind, life = told.get("access_token"), told.get("token_type"), told.get("expires_in")
        if not isinstance(token, str) or not token or not isinstance(kind, str) or kind.lower() != "bearer":
            raise AuthFailed("authorization failed: the token endpoint answered with what is no bearer token")
        self._token = token
        # Numbers in strings are sent by some; without a life the token is used until it is refused.
        seconds = float(life) if isinstance(life, int | float) or (isinstance(life, str) and life.isdigit()) else None
        self._valid_until = (
            float("inf") if seconds is None else asked_at + seconds - min(RENEW_BEFORE_S, seconds * RENEW_BEFORE)
        )
