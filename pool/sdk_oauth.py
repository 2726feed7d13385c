"""The client-credentials grant through the SDK: finds the token endpoint by the metadata of server and issuer.

Imports `mcp`: to be imported only where such a grant is configured.
"""

from __future__ import annotations

import httpx2
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken

from .upstream import OAuth

if httpx2.Auth not in ClientCredentialsOAuthProvider.__mro__:
    raise ImportError("the providers of this SDK are not made for httpx2")


def client_credentials(oauth: OAuth, url: str) -> httpx2.Auth:
    """The provider of one upstream, with its tokens in memory."""
    return _Provider(oauth, url)


class _Memory:
    """The SDK's token storage; dies with the worker."""

    def __init__(self) -> None:
        self._tokens: OAuthToken | None = None
        self._client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self._tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self._tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self._client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self._client = client_info


class _Provider(ClientCredentialsOAuthProvider):
    """Asks for the configured scope, where there is one; the SDK's asks for whatever the server lists
    (modelcontextprotocol/python-sdk 3172)."""

    def __init__(self, oauth: OAuth, url: str) -> None:
        parts = httpx2.URL(url)
        super().__init__(
            server_url=url,
            storage=_Memory(),
            client_id=oauth.client_id,
            client_secret=oauth.client_secret,
            scope=oauth.scope,
            # Without an issuer the upstream would decide who is shown the client's secret.
            issuer=oauth.issuer or f"{parts.scheme}://{parts.netloc.decode()}",
        )
        self._configured_scope = oauth.scope

    async def _perform_authorization(self) -> httpx2.Request:
        if self._configured_scope is not None:
            self.context.client_metadata.scope = self._configured_scope
        return await super()._perform_authorization()
