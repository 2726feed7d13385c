"""An MCP server that wants OAuth, with its authorization server, both of the SDK: in a thread, on a socket."""

from __future__ import annotations

import asyncio
import base64
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import (
    AccessToken,
    AuthorizationCode,
    AuthorizationParams,
    RefreshToken,
    construct_redirect_uri,
)
from mcp.server.auth.settings import AuthSettings, ClientRegistrationOptions
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from starlette.responses import JSONResponse, Response

CLIENT_ID = "gateway"
CLIENT_SECRET = "s3cret/of the:gateway"
REALM = "tools"


class Authority:
    """The authorization server: an `OAuthAuthorizationServerProvider` in memory. Every token is in `issued`."""

    def __init__(self, server: ProtectedServer) -> None:
        self._server = server
        self.clients: dict[str, OAuthClientInformationFull] = {}
        self.codes: dict[str, AuthorizationCode] = {}
        self.tokens: dict[str, AccessToken] = {}
        self.refreshes: dict[str, RefreshToken] = {}
        self.issued: list[str] = []
        self.grants: Counter[str] = Counter()
        self.expires_in = 3600
        self.granted: list[str] | None = None
        """Scopes of every token, whatever is asked for."""

    def revoke_all(self) -> None:
        """What was issued so far is no longer accepted."""
        self.tokens.clear()

    def issue(self, client_id: str, scopes: list[str], resource: str | None, *, refreshable: bool) -> OAuthToken:
        scopes = scopes if self.granted is None else self.granted
        access, refresh = f"access-{secrets.token_hex(8)}", f"refresh-{secrets.token_hex(8)}"
        self.tokens[access] = AccessToken(
            token=access, client_id=client_id, scopes=scopes, expires_at=int(time.time()) + 3600, resource=resource
        )
        self.issued.append(access)
        if refreshable:
            self.refreshes[refresh] = RefreshToken(token=refresh, client_id=client_id, scopes=scopes, resource=resource)
            self.issued.append(refresh)
        return OAuthToken(
            access_token=access,
            expires_in=self.expires_in,
            scope=" ".join(scopes),
            refresh_token=refresh if refreshable else None,
        )

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None:
        return self.clients.get(client_id)

    async def register_client(self, client_info: OAuthClientInformationFull) -> None:
        self.clients[client_info.client_id] = client_info

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        code = f"code-{secrets.token_hex(16)}"
        self.codes[code] = AuthorizationCode(
            code=code,
            scopes=params.scopes or [],
            expires_at=time.time() + 60,
            client_id=client.client_id,
            code_challenge=params.code_challenge,
            redirect_uri=params.redirect_uri,
            redirect_uri_provided_explicitly=params.redirect_uri_provided_explicitly,
            resource=params.resource,
        )
        return construct_redirect_uri(str(params.redirect_uri), code=code, state=params.state)

    async def load_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: str
    ) -> AuthorizationCode | None:
        return self.codes.get(authorization_code)

    async def exchange_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: AuthorizationCode
    ) -> OAuthToken:
        self.grants["authorization_code"] += 1
        del self.codes[authorization_code.code]
        return self.issue(client.client_id, authorization_code.scopes, authorization_code.resource, refreshable=True)

    async def load_refresh_token(self, client: OAuthClientInformationFull, refresh_token: str) -> RefreshToken | None:
        return self.refreshes.get(refresh_token)

    async def exchange_refresh_token(
        self, client: OAuthClientInformationFull, refresh_token: RefreshToken, scopes: list[str]
    ) -> OAuthToken:
        self.grants["refresh_token"] += 1
        del self.refreshes[refresh_token.token]
        return self.issue(client.client_id, scopes, refresh_token.resource, refreshable=True)

    async def load_access_token(self, token: str) -> AccessToken | None:
        return self.tokens.get(token)

    async def revoke_token(self, token: AccessToken | RefreshToken) -> None:
        self.tokens.pop(token.token, None)

    def client_credentials(self, authorization: str, form: dict[str, list[str]]) -> Response:
        """The grant that the SDK's own token endpoint does not have."""
        self.grants["client_credentials"] += 1
        pair = base64.b64decode(authorization.removeprefix("Basic ")).decode().split(":")
        if [unquote(part) for part in pair] != [CLIENT_ID, CLIENT_SECRET]:
            return JSONResponse({"error": "invalid_client", "error_description": authorization}, 401)
        scopes = form.get("scope", [REALM])[0].split()
        token = self.issue(CLIENT_ID, scopes, form.get("resource", [self._server.url])[0], refreshable=False)
        return JSONResponse(token.model_dump(exclude_none=True))


class ProtectedServer:
    """`url` is its endpoint, `origin` that of its authorization server too."""

    def __init__(self, *, json_response: bool = False) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = f"{self.origin}/mcp"
        self.authority = Authority(self)
        self.token_answer: Response | None = None
        """What the token endpoint answers with, whatever it is asked."""
        self.hidden: set[str] = set()
        """Paths that are answered with 404."""
        self.requests: Counter[str] = Counter()
        """Requests by method and path."""
        self.forms: list[dict[str, list[str]]] = []
        """What the token endpoint was asked."""
        self.running = 0
        """Requests under way."""
        self.used: list[str] = []
        """The token of every tool that ran."""
        self.gate = threading.Event()
        """What `wait` and `watch` wait for."""
        self.waiting = 0
        self._app = self._mcp().streamable_http_app(json_response=json_response)
        self._server = uvicorn.Server(
            uvicorn.Config(self, log_level="critical", lifespan="on", timeout_graceful_shutdown=2)
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        self.requests[f"{scope['method']} {path}"] += 1
        self.running += 1
        try:
            if path in self.hidden:
                await Response(status_code=404)(scope, receive, send)
            elif path == "/token":
                await self._token(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        finally:
            self.running -= 1

    async def _token(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message.get("more_body")
        form = parse_qs(message["body"].decode())
        self.forms.append(form)
        if self.token_answer is not None:
            await self.token_answer(scope, receive, send)
        elif form["grant_type"] == ["client_credentials"]:
            headers = dict(scope["headers"])
            answer = self.authority.client_credentials(headers[b"authorization"].decode(), form)
            await answer(scope, receive, send)
        else:
            again = [message]

            async def replay() -> Any:
                return again.pop() if again else await receive()

            await self._app(scope, replay, send)

    def _mcp(self) -> MCPServer:
        settings = AuthSettings.model_validate(
            {
                "issuer_url": self.origin,
                "resource_server_url": self.url,
                "required_scopes": [REALM],
                "client_registration_options": ClientRegistrationOptions(
                    enabled=True, valid_scopes=[REALM], default_scopes=[REALM]
                ),
                "validate_token_resource": True,
            }
        )
        server = MCPServer("protected", auth=settings, auth_server_provider=self.authority, log_level="CRITICAL")

        def note() -> str:
            token = get_access_token()
            assert token is not None
            self.used.append(token.token)
            return " ".join(token.scopes)

        async def opened() -> None:
            self.waiting += 1
            try:
                while not self.gate.is_set():
                    await asyncio.sleep(0.005)
            finally:
                self.waiting -= 1

        @server.tool()
        async def scopes() -> str:
            """The scopes of the caller's token."""
            return note()

        @server.tool()
        async def wait() -> str:
            """Answer when the gate opens."""
            note()
            await opened()
            return "waited"

        @server.tool()
        async def watch(ctx: Context) -> str:
            """Say that it has begun, and answer when the gate opens."""
            note()
            await ctx.report_progress(1, 2, "begun")
            await opened()
            return "watched"

        return server

    def run(self) -> None:
        self._server.run(sockets=[self._socket])

    @property
    def has_started(self) -> bool:
        return self._server.started

    def stop(self) -> None:
        self.gate.set()
        self._server.should_exit = True


@asynccontextmanager
async def protected(*, json_response: bool = False) -> AsyncGenerator[ProtectedServer]:
    server = ProtectedServer(json_response=json_response)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.has_started:
            assert thread.is_alive()
            await asyncio.sleep(0.005)
        yield server
    finally:
        server.stop()
        await asyncio.to_thread(thread.join, 20)
        assert not thread.is_alive()
