"""OAuth of the SDK over our links: against a protected server and an authorization server of the SDK."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import subprocess
import sys
import traceback
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import httpx2
import orjson
import pytest
from aiohttp import web
from cancelling import cancelled_at
from faults import eventually
from leasehold.pool import HttpClients, HttpLink, HttpTarget, Reply, Upstream, parse, parse_config
from leasehold.pool import client_credentials as client_credentials_module
from leasehold.pool.auth import AuthorizedLink, authorization
from leasehold.pool.auth_client import AuthClients
from leasehold.pool.errors import AuthFailed, ConfigError
from leasehold.pool.sse import events
from leasehold.pool.upstream import OAuth, StdioTarget
from mcp.client.auth import OAuthClientProvider
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull, OAuthClientMetadata, OAuthToken
from protected_server import CLIENT_ID, CLIENT_SECRET, REALM, ProtectedServer, protected
from scripted import scripted
from starlette.responses import JSONResponse, RedirectResponse, Response

pytestmark = pytest.mark.anyio

VERSION = "2025-11-25"
HEADERS = [
    (b"content-type", b"application/json"),
    (b"accept", b"application/json, text/event-stream"),
    (b"mcp-protocol-version", VERSION.encode()),
]
GATEWAY = OAuth(CLIENT_ID, CLIENT_SECRET)


class Session:
    """One MCP session over an authorized link."""

    def __init__(self, link: AuthorizedLink) -> None:
        self.link = link
        self.ids = itertools.count(1)

    async def send(self, method: str, params: dict[str, Any] | None = None) -> Reply:
        message = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        if not method.startswith("notifications/"):
            message["id"] = next(self.ids)
        body = orjson.dumps(message)
        return await self.link.post(parse(body), body, HEADERS)

    async def initialize(self) -> None:
        client = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        assert "serverInfo" in (await answer_of(await self.send("initialize", client)))["result"]
        reply = await self.send("notifications/initialized")
        await reply.chunks.aclose()
        assert reply.status == 202

    async def call(self, tool: str) -> str:
        answer = await answer_of(await self.send("tools/call", {"name": tool}))
        return answer["result"]["content"][0]["text"]


async def answer_of(reply: Reply) -> dict[str, Any]:
    async with aclosing(reply.chunks) as chunks:
        body = b"".join([chunk async for chunk in chunks])
    assert reply.status == 200, (reply.status, body)
    found = [body] if body.startswith(b"{") else events(body)
    return next(message for data in found if "id" in (message := orjson.loads(data)))


class Pool:
    """What a pool will hold: the clients, and per upstream one Auth for all sessions."""

    def __init__(self, server: ProtectedServer) -> None:
        self.target = HttpTarget(server.url)
        self.clients = HttpClients()
        self.auth_clients = AuthClients()

    def auth(self, oauth: OAuth = GATEWAY) -> httpx2.Auth:
        made = authorization(Upstream("protected", self.target, oauth=oauth))
        assert made is not None
        return made

    def session(self, auth: httpx2.Auth) -> Session:
        link = HttpLink(self.clients, self.target, call_timeout_s=60)
        return Session(AuthorizedLink(link, self.target.url, auth, self.auth_clients))


@asynccontextmanager
async def pool(server: ProtectedServer) -> AsyncGenerator[Pool]:
    made = Pool(server)
    try:
        yield made
    finally:
        server.gate.set()
        await made.auth_clients.aclose()
        await made.clients.aclose()


class Memory:
    tokens: OAuthToken | None = None
    client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.client = client_info


class Person:
    """Follows the redirect to the authorization server and comes back with the code."""

    def __init__(self) -> None:
        self.asked = 0
        self.returned = AuthorizationCodeResult(code="", state=None)

    async def redirect(self, url: str) -> None:
        self.asked += 1
        async with aiohttp.ClientSession() as browser, browser.get(url, allow_redirects=False) as response:
            query = parse_qs(urlsplit(response.headers["location"]).query)
        self.returned = AuthorizationCodeResult(code=query["code"][0], state=query["state"][0])

    async def callback(self) -> AuthorizationCodeResult:
        return self.returned

    def provider(self, server: ProtectedServer) -> OAuthClientProvider:
        metadata = OAuthClientMetadata.model_validate({"redirect_uris": ["http://127.0.0.1:1/back"]})
        return OAuthClientProvider(server.url, metadata, Memory(), self.redirect, self.callback)


class TestClientCredentials:
    @pytest.mark.parametrize("json_response", [False, True])
    async def test_b17_all_sessions_of_an_upstream_share_one_token(self, json_response: bool) -> None:
        """B17, B18: metadata, token and call in one go; the next sessions use the token that is there."""
        async with protected(json_response=json_response) as server, pool(server) as made:
            auth = made.auth()
            sessions = [made.session(auth) for _ in range(3)]
            for session in sessions:
                await session.initialize()
            assert await asyncio.gather(*(session.call("scopes") for session in sessions)) == [REALM] * 3
            assert server.authority.grants == {"client_credentials": 1}
            assert server.used == server.authority.issued * 3
            assert server.requests["GET /.well-known/oauth-protected-resource/mcp"] == 1
            reply = await sessions[0].link.delete(HEADERS)
            await reply.chunks.aclose()
            assert reply.status == 200

    async def test_b12_concurrent_first_calls_fetch_one_token(self) -> None:
        """B12: ten sessions without a token make one request for it."""
        async with protected() as server, pool(server) as made:
            auth = made.auth()
            await asyncio.gather(*(made.session(auth).initialize() for _ in range(10)))
            assert server.authority.grants == {"client_credentials": 1}

    async def test_what_is_asked_for_is_the_configured_scope(self) -> None:
        """The SDK's provider asks for what the server lists (python-sdk 3172); an operator's word counts for more."""
        async with protected() as server, pool(server) as made:
            auth = made.auth(OAuth(CLIENT_ID, CLIENT_SECRET, scope=f"{REALM} more"))
            session = made.session(auth)
            await session.initialize()
            assert await session.call("scopes") == f"{REALM} more"

    @pytest.mark.parametrize("how", ["expired", "revoked"])
    async def test_b18_a_token_that_is_over_is_replaced_on_the_next_call(self, how: str) -> None:
        """B18: by its time or by the server's word; calls at the same time fetch one token, and each runs once."""
        async with protected() as server, pool(server) as made:
            auth: Any = made.auth()
            sessions = [made.session(auth) for _ in range(4)]
            for session in sessions:
                await session.initialize()
            if how == "revoked":
                server.authority.revoke_all()
            else:
                auth.context.token_expiry_time = 1.0
            assert await asyncio.gather(*(session.call("scopes") for session in sessions)) == [REALM] * 4
            assert server.authority.grants.total() == 2
            assert server.used == [server.authority.issued[-1]] * 4

    async def test_b17_the_secret_is_shown_to_the_configured_issuer_only(self) -> None:
        """B17: an upstream that names another authorization server gets nothing out of the gateway."""
        async with protected() as server, protected() as other, pool(server) as made:
            auth = made.auth(OAuth(CLIENT_ID, CLIENT_SECRET, issuer=other.origin))
            with pytest.raises(AuthFailed) as caught:
                await made.session(auth).initialize()
            assert "issuer mismatch" in str(caught.value)
            assert not server.forms
            assert not other.forms

    async def test_b17_without_an_issuer_it_is_the_upstreams_own_origin(self) -> None:
        """B17: the same, for an upstream whose metadata lead elsewhere."""
        async with protected() as other:

            async def leading_away(request: web.Request) -> web.StreamResponse:
                if "oauth-protected-resource" in request.path:
                    document = {"resource": str(request.url.with_path("/mcp")), "authorization_servers": [other.origin]}
                    return web.json_response(document)
                return web.Response(status=401)

            async with scripted(leading_away) as server:
                auth = authorization(Upstream("evil", HttpTarget(server.url), oauth=GATEWAY))
                assert auth is not None
                clients, auth_clients = HttpClients(), AuthClients()
                link = HttpLink(clients, HttpTarget(server.url), call_timeout_s=60)
                with pytest.raises(AuthFailed):
                    await Session(AuthorizedLink(link, server.url, auth, auth_clients)).send("ping")
                assert not other.forms
                await auth_clients.aclose()
                await clients.aclose()

    async def test_b18_a_token_that_may_too_little_is_stepped_up_once(self) -> None:
        """B12, B18: calls at the same time that are refused for their scope get one token with more."""
        async with protected() as server, pool(server) as made:
            auth = made.auth()
            server.authority.granted = ["less"]
            assert await self.status(made.session(auth)) == 403
            server.authority.granted = None
            await asyncio.gather(*(made.session(auth).initialize() for _ in range(4)))
            assert server.authority.grants.total() == 2

    async def test_b40_scopes_that_do_not_suffice_are_the_servers_answer(self) -> None:
        """B40: a 403 that no new token changes is relayed, after one attempt to get one."""
        async with protected() as server, pool(server) as made:
            session = made.session(made.auth(OAuth(CLIENT_ID, CLIENT_SECRET, scope="less")))
            assert await self.status(session) == 403
            assert await self.status(session) == 403
            assert server.authority.grants.total() == 2
            assert server.requests["POST /mcp"] == 4
            assert not server.used

    async def status(self, session: Session) -> int:
        reply = await session.send("ping")
        await reply.chunks.aclose()
        return reply.status


class TestAuthorizationCode:
    async def test_b18_a_persons_consent_is_asked_for_once_and_then_refreshed(self) -> None:
        """B18: registration, consent, PKCE and token; an expired token is refreshed before the next call is sent."""
        async with protected() as server, pool(server) as made:
            person = Person()
            provider = person.provider(server)
            session = made.session(provider)
            await session.initialize()
            provider.context.token_expiry_time = 1.0
            posts = server.requests["POST /mcp"]
            assert await session.call("scopes") == REALM
            assert await session.call("scopes") == REALM
            assert person.asked == 1
            assert server.authority.grants == {"authorization_code": 1, "refresh_token": 1}
            assert server.requests["POST /mcp"] == posts + 2, "no call was refused"
            assert server.requests["POST /register"] == 1

    async def test_b17_providers_do_not_mix(self) -> None:
        """B17: two principals with providers of their own, over the same clients."""
        async with protected() as server, pool(server) as made:
            providers = [Person().provider(server), Person().provider(server)]
            sessions = [made.session(provider) for provider in providers]
            await asyncio.gather(*(session.initialize() for session in sessions))
            for session in sessions:
                await session.call("scopes")
            tokens = [provider.context.current_tokens for provider in providers]
            assert [token.access_token for token in tokens if token] == server.used
            assert len(set(server.used)) == 2

    async def test_redirects_are_followed_within_their_origin_only(self) -> None:
        """B17: as the SDK does it: a token endpoint may move on its server, and not to another one."""
        async with protected() as server, protected() as other, pool(server) as made:
            server.token_answer = RedirectResponse(f"{other.origin}/token", 307)
            with pytest.raises(AuthFailed, match="HTTP status 307"):
                await made.session(Person().provider(server)).initialize()
            assert not other.forms
            server.token_answer = RedirectResponse("/token?again", 307)
            with pytest.raises(AuthFailed, match="HTTP status 307"):
                await made.session(Person().provider(server)).initialize()
            assert server.requests["POST /token"] > 3


class TestConcurrency:
    async def test_b15_a_call_that_has_no_status_yet_delays_no_other(self) -> None:
        """B15: the SDK's providers hold a lock while a call is unanswered (python-sdk 3209); here other calls pass it.

        With JSON answers a slow tool has no status before it has a result.
        """
        async with protected(json_response=True) as server, pool(server) as made:
            session = made.session(made.auth())
            await session.initialize()
            slow = asyncio.create_task(session.call("wait"))
            await eventually(lambda: server.waiting == 1)
            async with asyncio.timeout(20):
                assert await session.call("scopes") == REALM
            assert not slow.done()
            server.gate.set()
            assert await slow == "waited"

    async def test_b15_an_open_stream_and_a_streaming_call_delay_no_other(self) -> None:
        """B15, B20: an SSE answer and the GET stream stay open while other calls run; events come as they are sent."""
        async with protected() as server, pool(server) as made:
            session = made.session(made.auth())
            await session.initialize()
            stream = await session.link.get(HEADERS)
            reply = await session.send("tools/call", {"name": "watch", "_meta": {"progressToken": "p"}})
            received = b""
            while b"begun" not in received:
                received += await anext(reply.chunks)
            async with asyncio.timeout(20):
                assert await session.call("scopes") == REALM
            server.gate.set()
            assert b"watched" in b"".join([chunk async for chunk in reply.chunks])
            await session.link.aclose()
            await stream.chunks.aclose()

    async def test_b15_a_token_is_renewed_while_a_call_is_under_way(self) -> None:
        """B15, B18: a call that runs under an old token goes on; the next one gets a new token at once."""
        async with protected(json_response=True) as server, pool(server) as made:
            session = made.session(made.auth())
            await session.initialize()
            slow = asyncio.create_task(session.call("wait"))
            await eventually(lambda: server.waiting == 1)
            server.authority.revoke_all()
            async with asyncio.timeout(20):
                assert await session.call("scopes") == REALM
            server.gate.set()
            assert await slow == "waited"
            assert server.used == server.authority.issued

    async def test_b3_cancellation_at_every_await_leaves_the_provider_usable(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """B3: the lock of the SDK's provider is released wherever a call is cancelled (python-sdk 3382), and no
        request goes on."""
        async with protected() as server, pool(server) as made:
            step = 0
            cancelled = True
            while cancelled:
                step += 1
                auth: Any = made.auth()
                task = asyncio.create_task(_ping(step, made.session(auth)))
                await asyncio.wait({task})
                cancelled = task.cancelled()
                assert not auth.context.lock.locked(), step
                await eventually(lambda: server.running == 0)
                async with asyncio.timeout(20):
                    await made.session(auth).initialize()
            assert step > 10, "every await of a flow with five requests"
        assert "auth_flow_not_closed" not in caplog.text


async def _ping(step: int, session: Session) -> None:
    reply = await cancelled_at(step, session.send("ping"))
    await reply.chunks.aclose()


class TestFailure:
    async def failure(self, made: Pool, oauth: OAuth = GATEWAY) -> str:
        with pytest.raises(AuthFailed) as caught:
            await made.session(made.auth(oauth)).initialize()
        assert caught.value.outcome == "not_run"
        text = "".join(traceback.format_exception(caught.value))
        assert CLIENT_SECRET not in text
        assert "Basic" not in text
        return str(caught.value)

    async def test_b9_a_token_endpoint_that_is_down_is_told_clearly(self) -> None:
        """B9: a failure of the authorization server ends the call, says so, and says that it was not run."""
        async with protected() as server, pool(server) as made:
            server.token_answer = Response("down", 503)
            assert await self.failure(made) == "authorization failed: OAuthTokenError after HTTP status 503"
            server.hidden = {"/.well-known/oauth-authorization-server", "/.well-known/openid-configuration"}
            assert "No authorization server metadata" in await self.failure(made)
            assert not server.used

    async def test_b9_and_works_again_when_it_is_back(self) -> None:
        """B9: the next call asks again."""
        async with protected() as server, pool(server) as made:
            session = made.session(made.auth())
            server.token_answer = Response("down", 503)
            with pytest.raises(AuthFailed):
                await session.initialize()
            server.token_answer = None
            await session.initialize()

    @pytest.mark.parametrize("broken", ["wrong secret", "echo", "half a token"])
    async def test_b19_nothing_secret_is_in_errors_and_logs(
        self, broken: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """B19: not even where the authorization server sends secrets back, which the SDK would quote."""
        caplog.set_level(logging.DEBUG)
        leak = "access-leaked-by-the-server"
        async with protected() as server, pool(server) as made:
            if broken == "echo":
                server.token_answer = JSONResponse({"error": f"no such secret: {CLIENT_SECRET} {leak}"}, 400)
            elif broken == "half a token":
                server.token_answer = JSONResponse({"access_token": leak, "expires_in": "never"})
            oauth = OAuth(CLIENT_ID, "wrong-secret") if broken == "wrong secret" else GATEWAY
            told = await self.failure(made, oauth)
            assert leak not in told
            if broken == "wrong secret":
                assert told == "authorization failed: OAuthTokenError after HTTP status 401 (invalid_client)"
        # As an operator's handler writes it, tracebacks included.
        written = "\n".join(logging.Formatter().format(record) for record in caplog.records)
        assert "OAuth flow error: OAuthTokenError" in written
        for secret in (leak, CLIENT_SECRET, "wrong-secret", "Basic "):
            assert secret not in written

    async def test_b19_nothing_secret_is_shown_while_all_goes_well(self, caplog: pytest.LogCaptureFixture) -> None:
        """B19: neither tokens nor secrets are in log lines or in the repr of what holds them."""
        caplog.set_level(logging.DEBUG)
        async with protected() as server, pool(server) as made:
            auth = made.auth()
            session = made.session(auth)
            await session.initialize()
            await session.call("scopes")
            upstream = Upstream("protected", made.target, oauth=GATEWAY)
            written = "\n".join(logging.Formatter().format(record) for record in caplog.records)
            written += f"{auth!r} {session.link!r} {upstream!r} {upstream.oauth}"
            for secret in (*server.authority.issued, CLIENT_SECRET, "Basic "):
                assert secret not in written


class TestTokenUrl:
    def auth(self, made: Pool, server: ProtectedServer) -> httpx2.Auth:
        return made.auth(OAuth(CLIENT_ID, CLIENT_SECRET, REALM, token_url=f"{server.origin}/token"))

    async def test_b18_a_token_is_there_before_the_first_call(self) -> None:
        """B12, B18: no metadata and no refused call; calls at the same time fetch one token."""
        async with protected() as server, pool(server) as made:
            server.hidden = {"/.well-known/oauth-protected-resource/mcp", "/.well-known/oauth-authorization-server"}
            auth = self.auth(made, server)
            sessions = [made.session(auth) for _ in range(5)]
            await asyncio.gather(*(session.initialize() for session in sessions))
            assert server.authority.grants == {"client_credentials": 1}
            assert server.requests["POST /mcp"] == 10
            server.authority.revoke_all()
            assert await asyncio.gather(*(session.call("scopes") for session in sessions)) == [REALM] * 5
            assert server.authority.grants == {"client_credentials": 2}
            assert server.used == [server.authority.issued[-1]] * 5

    async def test_b18_a_token_is_renewed_before_it_is_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """B18: in its last tenth, or its last half minute."""
        now = 1000.0
        monkeypatch.setattr(client_credentials_module, "monotonic", lambda: now)
        async with protected() as server, pool(server) as made:
            server.authority.expires_in = 100
            session = made.session(self.auth(made, server))
            await session.initialize()
            now += 89
            await session.call("scopes")
            assert len(server.authority.issued) == 1
            now += 2
            await session.call("scopes")
            assert server.used == server.authority.issued
            assert len(server.authority.issued) == 2

    async def test_b15_a_slow_call_delays_no_other(self) -> None:
        """B15: the lock covers tokens only."""
        async with protected(json_response=True) as server, pool(server) as made:
            session = made.session(self.auth(made, server))
            await session.initialize()
            slow = asyncio.create_task(session.call("wait"))
            await eventually(lambda: server.waiting == 1)
            async with asyncio.timeout(20):
                assert await session.call("scopes") == REALM
            server.gate.set()
            assert await slow == "waited"

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            (JSONResponse({"error": "invalid_scope"}, 400), "HTTP status 400 (invalid_scope)"),
            (Response("<html>", 502), "HTTP status 502"),
            (Response("{"), "no bearer token"),
            (JSONResponse(["access_token"]), "no bearer token"),
            (JSONResponse({"access_token": CLIENT_SECRET, "token_type": "mac"}), "no bearer token"),
            (JSONResponse({"access_token": 1, "token_type": "bearer"}), "no bearer token"),
        ],
    )
    async def test_b19_what_is_no_token_is_told_without_showing_it(self, answer: Response, told: str) -> None:
        """B9, B19: the status and the word of the standard, nothing else; the next call asks again."""
        async with protected() as server, pool(server) as made:
            session = made.session(self.auth(made, server))
            server.token_answer = answer
            with pytest.raises(AuthFailed) as caught:
                await session.initialize()
            assert told in str(caught.value)
            assert CLIENT_SECRET not in "".join(traceback.format_exception(caught.value))
            assert server.requests["POST /mcp"] == 0
            server.token_answer = None
            await session.initialize()


class TestConfiguration:
    def parse(self, oauth: object, **entry: object) -> Upstream:
        server = {"url": "https://h.example/mcp", **entry, "leasehold": {"oauth": oauth}}
        if "forward_headers" in server:
            server["leasehold"] = {"oauth": oauth, "forward_headers": server.pop("forward_headers")}
        if "command" in server:
            del server["url"]
        text = json.dumps({"mcpServers": {"x": server}})
        return parse_config(text, "mcp.json", {"SECRET": CLIENT_SECRET}).servers["x"]

    def problems(self, oauth: object, **entry: object) -> str:
        with pytest.raises(ConfigError) as caught:
            self.parse(oauth, **entry)
        assert CLIENT_SECRET not in str(caught.value)
        return str(caught.value)

    def test_what_is_accepted_arrives(self) -> None:
        plain = {"client_id": "a", "client_secret": "${SECRET}"}
        assert self.parse(plain).oauth == OAuth("a", CLIENT_SECRET)
        issued = {**plain, "scope": "a:b c", "issuer": "https://auth.example"}
        assert self.parse(issued).oauth == OAuth("a", CLIENT_SECRET, "a:b c", "https://auth.example")
        found = self.parse({**plain, "token_url": "https://auth.example/token?p=1"}).oauth
        assert found == OAuth("a", CLIENT_SECRET, token_url="https://auth.example/token?p=1")

    def test_b19_the_secret_is_in_no_repr(self) -> None:
        """B19: an upstream may be logged."""
        upstream = self.parse({"client_id": "a", "client_secret": "${SECRET}"})
        assert CLIENT_SECRET not in f"{upstream} {upstream!r} {upstream.oauth}"
        assert "client_id='a'" in repr(upstream.oauth)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"client_id": ""}, "oauth.client_id: expected a string, got an empty string"),
            ({"client_secret": None}, "oauth.client_secret: expected a string, got nothing"),
            ({"client_secret": "${NONE}"}, "oauth.client_secret: expected the environment variable NONE to be set"),
            ({"secret": "a"}, 'oauth.secret: expected no such key; did you mean "client_secret"?'),
            ({"audience": "a"}, "oauth.audience: expected no such key; known are client_id,"),
            ({"scope": "a  b"}, "oauth.scope: expected names of scopes"),
            ({"scope": ["a"]}, "oauth.scope: expected a string, got a list"),
            ({"issuer": "auth.example"}, "oauth.issuer: expected an http:// or https:// URL"),
            ({"token_url": "https://a:b@h/token"}, "oauth.token_url: expected no user and password"),
            ({"issuer": "https://h", "token_url": "https://h/t"}, 'oauth: expected either "issuer" or "token_url"'),
        ],
    )
    def test_b49_what_is_wrong_is_named(self, change: dict[str, object], expected: str) -> None:
        """B49: file, key and expected value."""
        told = self.problems({"client_id": "a", "client_secret": "${SECRET}", **change})
        assert told.startswith("mcp.json: mcpServers.x.leasehold.")
        assert expected in told

    @pytest.mark.parametrize(
        ("oauth", "entry", "expected"),
        [
            ("a", {}, "oauth: expected an object, got a string"),
            (None, {}, "oauth: expected an object, got nothing"),
            ({}, {}, "oauth.client_id: expected a string, got nothing"),
            (..., {"headers": {"Authorization": "x"}}, "oauth: expected no oauth beside an Authorization header"),
            (..., {"url": "https://a:b@h/mcp"}, "oauth: expected no oauth beside an Authorization header"),
            (..., {"forward_headers": ["Authorization"]}, 'oauth: expected no oauth beside "authorization"'),
            (..., {"command": "x"}, "oauth: expected only with a url"),
        ],
    )
    def test_b49_who_authorizes_must_be_clear(self, oauth: object, entry: dict[str, object], expected: str) -> None:
        """B49: a key that would have no effect, or two, is refused."""
        value = {"client_id": "a", "client_secret": "${SECRET}"} if oauth is ... else oauth
        assert expected in self.problems(value, **entry)

    def test_only_what_is_configured_is_authorized(self) -> None:
        assert authorization(Upstream("a", HttpTarget("http://h/mcp"))) is None
        assert authorization(Upstream("a", StdioTarget("true"), oauth=GATEWAY)) is None

    def test_the_sdk_is_imported_only_for_a_grant_that_needs_it(self) -> None:
        """A gateway without such a grant does not load the SDK."""
        code = """
import sys
from leasehold.pool import HttpTarget, Upstream
from leasehold.pool.auth import authorization
from leasehold.pool.upstream import OAuth
for kwargs in ({"token_url": "http://h/token"}, {}):
    assert authorization(Upstream("a", HttpTarget("http://h/mcp"), oauth=OAuth("i", "s", **kwargs)))
    print("mcp" in sys.modules)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert run.stdout.split() == ["False", "True"]

    def test_without_the_sdk_the_configuration_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """B49: an SDK that is missing or too old is named, with the server that needs it."""
        monkeypatch.delitem(sys.modules, "leasehold.pool.sdk_oauth", raising=False)
        monkeypatch.setitem(sys.modules, "mcp.client.auth.extensions.client_credentials", None)
        with pytest.raises(ConfigError, match=r"x: oauth .* needs the package mcp, 2.3 or later"):
            authorization(Upstream("x", HttpTarget("http://h/mcp"), oauth=GATEWAY))
