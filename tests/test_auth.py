"""Calls that an `httpx2.Auth` authorizes, over links that speak aiohttp."""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing
from typing import Any

import httpx2
import pytest
from aiohttp import web
from cancelling import cancelled_at
from faults import eventually
from leasehold.pool import Fenced, HttpClients, HttpLink, HttpTarget, PoolError, Reply, UpstreamLost, parse
from leasehold.pool import auth_client as auth_client_module
from leasehold.pool.auth import MAX_REFUSAL_BYTES, AuthorizedLink
from leasehold.pool.auth_client import AuthClients
from leasehold.pool.errors import AuthFailed
from leasehold.pool.link import Fence, Headers, own_headers, unfenced
from scripted import Scripted, scripted

pytestmark = pytest.mark.anyio

HEADERS: Headers = [
    (b"content-type", b"application/json"),
    (b"accept", b"application/json, text/event-stream"),
    (b"mcp-protocol-version", b"2025-11-25"),
]
CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"pay"}}'
RESULT = b'{"jsonrpc":"2.0","id":1,"result":{}}'
SECRET = "hunter2-is-a-secret"


@pytest.fixture
async def clients() -> AsyncIterator[HttpClients]:
    made = HttpClients()
    yield made
    await made.aclose()


@pytest.fixture
async def auth_clients() -> AsyncIterator[AuthClients]:
    made = AuthClients()
    yield made
    await made.aclose()


class Links:
    """Makes links to one upstream."""

    def __init__(self, clients: HttpClients, auth_clients: AuthClients) -> None:
        self.clients = clients
        self.auth_clients = auth_clients

    def to(
        self, server: Scripted, auth: httpx2.Auth, *, fence: Fence = unfenced, headers: dict[str, str] | None = None
    ) -> AuthorizedLink:
        target = HttpTarget(server.url, tuple((headers or {}).items()))
        return AuthorizedLink(self.bare(target, fence), server.url, auth, self.auth_clients)

    def bare(self, target: HttpTarget, fence: Fence = unfenced) -> HttpLink:
        return HttpLink(self.clients, target, call_timeout_s=20, fence=fence)


@pytest.fixture
def links(clients: HttpClients, auth_clients: AuthClients) -> Links:
    return Links(clients, auth_clients)


async def post(link: AuthorizedLink | HttpLink, headers: Headers = HEADERS) -> Reply:
    return await link.post(parse(CALL), CALL, headers)


async def body_of(reply: Reply) -> bytes:
    async with aclosing(reply.chunks) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def outcome(link: AuthorizedLink) -> tuple[int, bytes]:
    reply = await post(link)
    return reply.status, await body_of(reply)


async def ok(_request: web.Request) -> web.StreamResponse:
    return web.Response(body=RESULT, content_type="application/json")


def accepting(*tokens: str) -> Any:
    """Lets calls with these tokens pass, and answers `/token` with the last of them."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return web.json_response({"token": tokens[-1]})
        if request.headers.get("authorization") in [f"Bearer {token}" for token in tokens]:
            return await ok(request)
        return web.json_response({"error": "refused"}, status=401, headers={"www-authenticate": 'Bearer error="x"'})

    return answer


class Renewing(httpx2.Auth):
    """A bearer token; when the server refuses it, another one from `/token` of the same origin."""

    def __init__(self, token: str, token_url: str = "") -> None:
        self.token = token
        self.token_url = token_url
        self.seen: list[tuple[int, bytes]] = []
        self.open = 0

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        self.open += 1
        try:
            request.headers["Authorization"] = f"Bearer {self.token}"
            response = yield request
            self.seen.append((response.status_code, await response.aread()))
            if response.status_code == 401:
                url = self.token_url or str(request.url.join("/token"))
                answer = yield httpx2.Request("POST", url, data={"secret": SECRET})
                self.token = answer.json()["token"]
                request.headers["Authorization"] = f"Bearer {self.token}"
                response = yield request
                self.seen.append((response.status_code, await response.aread()))
        finally:
            self.open -= 1


class Flow(httpx2.Auth):
    """A flow in the plain, synchronous form."""

    def __init__(self, flow: Any) -> None:
        self._flow = flow

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        yield from self._flow(request)


class TestOwnHeaders:
    async def test_b18_a_header_of_our_own_always_passes_and_wins(self, links: Links) -> None:
        """B18: a credential that comes with a call replaces the configured one and the client's, on every method."""
        async with scripted(ok) as server:
            link = links.bare(HttpTarget(server.url, (("authorization", "Bearer static"), ("x-team", "blue"))))
            own = own_headers({"Authorization": "Bearer own", "X-Other": "1", "Accept": "text/plain"})
            client = [(b"authorization", b"Bearer client"), (b"x-other", b"client")]
            for reply in (
                await post(link, [*HEADERS, *client, *own]),
                await link.get([*own, *client]),
                await link.delete([*client, *own]),
            ):
                await reply.chunks.aclose()
        for headers in server.headers:
            sent = [headers[name] for name in ("authorization", "x-other", "accept", "x-team")]
            assert sent == ["Bearer own", "1", "text/plain", "blue"]

    async def test_b17_what_a_client_sends_is_never_our_own(self, links: Links) -> None:
        """B17: a client's header of the same name stays behind, and the configured one wins over it."""
        async with scripted(ok) as server:
            link = links.bare(HttpTarget(server.url, (("authorization", "Bearer static"),)))
            await body_of(await post(link, [*HEADERS, (b"authorization", b"Bearer client"), (b"x-other", b"client")]))
        (headers,) = server.headers
        assert headers["authorization"] == "Bearer static"
        assert "x-other" not in headers

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("Mcp-Session-Id", SECRET),
            ("Host", SECRET),
            ("a b", SECRET),
            ("", SECRET),
            ("x", f"{SECRET}\r\nx: y"),
            ("x", f"{SECRET}\0"),
            ("x", f"{SECRET}€"),
        ],
    )
    async def test_b19_what_cannot_be_sent_is_refused_and_not_shown(self, name: str, value: str) -> None:
        """B19, B30: no header can be smuggled in, and a refusal does not quote it."""
        with pytest.raises(ValueError, match="header") as caught:
            own_headers({name: value})
        assert SECRET not in "".join(traceback.format_exception(caught.value))


class TestRotation:
    async def test_b18_each_call_carries_the_token_that_is_valid_when_it_is_made(self, links: Links) -> None:
        """B18: a rotated token takes effect on the next call, of each method, beside calls that are under way."""
        held = asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.headers["authorization"] == "Bearer 0":
                await held.wait()
            return await ok(request)

        async with scripted(answer) as server:
            auth = Renewing("0")
            link = links.to(server, auth, headers={"authorization": "Bearer static"})
            slow = asyncio.create_task(outcome(link))
            await eventually(lambda: server.running == 1)
            auth.token = "1"
            assert await outcome(link) == (200, RESULT)
            auth.token = "2"
            await body_of(await link.get(HEADERS))
            auth.token = "3"
            await body_of(await link.delete(HEADERS))
            held.set()
            assert await slow == (200, RESULT)
        assert server.requests == [
            "POST /mcp Bearer 0",
            "POST /mcp Bearer 1",
            "GET /mcp Bearer 2",
            "DELETE /mcp Bearer 3",
        ]
        assert auth.open == 0

    async def test_b8_a_refused_call_is_sent_once_more_with_a_fresh_token(self, links: Links) -> None:
        """B8, B18: the flow reads the refusal, gets a token elsewhere, and the same call is sent again, once."""
        async with scripted(accepting("new")) as server:
            auth = Renewing("old")
            link = links.to(server, auth)
            assert await outcome(link) == (200, RESULT)
            assert await outcome(link) == (200, RESULT)
        new = "POST /mcp Bearer new"
        assert server.requests == ["POST /mcp Bearer old", "POST /token -", new, new]
        assert auth.seen == [(401, b'{"error": "refused"}'), (200, b""), (200, b"")]

    async def test_b40_a_second_refusal_is_the_answer_with_its_body(self, links: Links) -> None:
        """B40: what the server says last is relayed, status, challenge and body."""
        async with scripted(accepting()) as server:
            server.answer = self._refusing_all
            reply = await post(links.to(server, Renewing("old")))
            assert (reply.status, await body_of(reply)) == (401, b"no")
            assert (b"www-authenticate", b"Bearer") in reply.headers
        assert server.requests.count("POST /mcp Bearer old") == 1
        assert len(server.requests) == 3

    @staticmethod
    async def _refusing_all(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return web.json_response({"token": "new"})
        return web.Response(status=401, body=b"no", headers={"www-authenticate": "Bearer"})

    async def test_b44_of_a_long_refusal_the_flow_sees_the_beginning_and_the_client_all(self, links: Links) -> None:
        """B44: a refusal's body is read up to a bound, and is passed on whole."""
        long = bytes(range(256)) * 4096

        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.Response(status=403, body=long)

        async with scripted(answer) as server:
            auth = Renewing("t")
            assert await outcome(links.to(server, auth)) == (403, long)
        ((status, seen),) = auth.seen
        assert status == 403
        assert MAX_REFUSAL_BYTES <= len(seen) < len(long)
        assert long.startswith(seen)

    async def test_a_refusal_whose_body_breaks_off_is_a_refusal(self, links: Links) -> None:
        """B8: the status alone says that the call was not run, so it may be sent again."""

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.headers.get("authorization") != "Bearer old":
                return await accepting("new")(request)
            response = web.StreamResponse(status=401, headers={"content-length": "1000"})
            await response.prepare(request)
            await response.write(b"half")
            assert request.transport is not None
            request.transport.close()
            return response

        async with scripted(answer) as server:
            auth = Renewing("old")
            assert await outcome(links.to(server, auth)) == (200, RESULT)
        assert auth.seen[0] == (401, b"half")


class TestAtMostOnce:
    @pytest.mark.parametrize("status", [200, 202, 404, 407, 500, 503])
    async def test_b8_only_a_refusal_lets_a_flow_send_a_call_again(self, links: Links, status: int) -> None:
        """B8: after any other answer the call may have run; what a flow wants then is not sent."""

        def insisting(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            while True:
                yield request

        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=b"once")

        async with scripted(answer) as server:
            assert await outcome(links.to(server, Flow(insisting))) == (status, b"once")
            assert len(server.requests) == 1

    async def test_b8_a_flow_that_fails_after_the_call_does_not_hide_its_answer(
        self, links: Links, caplog: pytest.LogCaptureFixture
    ) -> None:
        """B8: an error there would say of a call that has run that it was not."""

        def failing(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            yield request
            raise RuntimeError(SECRET)

        async with scripted(ok) as server:
            assert await outcome(links.to(server, Flow(failing))) == (200, RESULT)
        assert "auth_flow_failed_after_the_call error=AuthFailed" in caplog.text
        assert SECRET not in caplog.text

    async def test_b28_the_fence_holds_for_the_second_sending_too(self, links: Links) -> None:
        """B28: a lease that ends while a token is fetched lets nothing more be written."""
        open_fence = True

        def fence() -> None:
            if not open_fence:
                raise Fenced("over")

        async def answer(request: web.Request) -> web.StreamResponse:
            nonlocal open_fence
            if request.path == "/token":
                open_fence = False
            return await accepting("new")(request)

        async with scripted(answer) as server:
            auth = Renewing("old")
            link = links.to(server, auth, fence=fence)
            with pytest.raises(Fenced):
                await post(link)
            assert server.requests == ["POST /mcp Bearer old", "POST /token -"]
            with pytest.raises(Fenced):
                await post(link)
            assert len(server.requests) == 2
        assert auth.open == 0

    async def test_b33_a_token_endpoint_at_the_servers_own_url_does_not_run_the_call(self, links: Links) -> None:
        """B33: a server may name any URL as its token endpoint; what goes there is the flow's request, not the call."""
        bodies: list[bytes] = []

        async def answer(request: web.Request) -> web.StreamResponse:
            bodies.append(await request.read())
            return await accepting()(request)

        async with scripted(answer) as server:
            with pytest.raises(AuthFailed):
                await post(links.to(server, Renewing("old", server.url)))
        assert bodies == [CALL, f"secret={SECRET}".encode()]

    async def test_b8_a_call_that_breaks_off_is_unknown_and_not_sent_again(self, links: Links) -> None:
        """B8: a broken connection is no refusal."""

        async def answer(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.close()
            return await ok(request)

        async with scripted(answer) as server:
            auth = Renewing("t")
            with pytest.raises(UpstreamLost):
                await post(links.to(server, auth))
            assert len(server.requests) == 1
        assert auth.open == 0


class TestWhatAFlowSees:
    async def test_b17_no_flow_sees_or_sends_what_a_client_told_us(self, links: Links) -> None:
        """B17: a client's credentials for the gateway are neither a flow's to read nor the upstream's."""
        seen: list[httpx2.Headers] = []

        def looking(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            seen.append(request.headers.copy())
            yield request

        hidden = [(b"authorization", b"Bearer ours"), (b"cookie", b"a=b"), (b"mcp-session-id", b"ours")]
        async with scripted(ok) as server:
            own = own_headers({"x-own": "1"})
            await body_of(await post(links.to(server, Flow(looking)), [*HEADERS, *hidden, *own]))
        (headers,) = seen
        assert headers["mcp-protocol-version"] == "2025-11-25"
        assert headers["x-own"] == "1"
        assert not {"authorization", "cookie", "mcp-session-id"} & set(headers)
        assert not {"authorization", "cookie", "mcp-session-id"} & set(server.headers[0])
        assert server.headers[0]["x-own"] == "1"

    async def test_b18_a_flow_may_add_change_and_remove_headers(self, links: Links) -> None:
        """B18: whatever it sets is sent, Authorization or not."""

        def changing(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            assert request.content == CALL
            request.headers["X-Signature"] = "s"
            request.headers["Accept"] = "application/json"
            del request.headers["traceparent"]
            request.headers["Host"] = "elsewhere"
            yield request

        async with scripted(ok) as server:
            await body_of(await post(links.to(server, Flow(changing)), [*HEADERS, (b"traceparent", b"t")]))
        (headers,) = server.headers
        assert (headers["x-signature"], headers["accept"]) == ("s", "application/json")
        assert "traceparent" not in headers
        assert headers["host"] in server.origin

    async def test_b20_an_answer_streams_after_the_flow_is_over(self, links: Links) -> None:
        """B15, B20: the flow sees a status, not a stream; events arrive while the server still writes."""
        more = asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: 1\n\n")
            await more.wait()
            await response.write(b"data: 2\n\n")
            return response

        async with scripted(answer) as server:
            auth = Renewing("t")
            reply = await post(links.to(server, auth))
            assert (auth.open, auth.seen) == (0, [(200, b"")])
            async with aclosing(reply.chunks) as chunks:
                received = b""
                while b"1" not in received:
                    received += await anext(chunks)
                assert received == b"data: 1\n\n"
                more.set()
                assert b"".join([chunk async for chunk in chunks]) == b"data: 2\n\n"

    async def test_its_face_is_that_of_the_link(self, links: Links) -> None:
        async with scripted(ok) as server:
            link = links.to(server, Renewing(SECRET))
            assert not link.is_closed
            assert link.resume is None
            assert repr(link) == "<AuthorizedLink of <HttpLink open streams=0>>"
            link.negotiated("2025-11-25")
            await link.aclose()
            await link.wait_closed()
            assert link.is_closed


class TestFailure:
    async def failure(self, links: Links, server: Scripted, auth: httpx2.Auth) -> AuthFailed:
        with pytest.raises(AuthFailed, match="authorization failed") as caught:
            await post(links.to(server, auth))
        error = caught.value
        assert isinstance(error, PoolError)
        assert error.outcome == "not_run"
        assert SECRET not in "".join(traceback.format_exception(error))
        return error

    async def test_b19_an_error_of_a_flow_is_typed_and_shows_nothing(self, links: Links) -> None:
        """B19: errors of a flow may quote what it holds."""

        def failing(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            yield httpx2.Request("GET", request.url.join("/token"), headers={"x": SECRET})
            raise LookupError(SECRET)

        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.json_response({"error": "invalid_grant", "error_description": SECRET}, status=400)

        async with scripted(answer) as server:
            error = await self.failure(links, server, Flow(failing))
            assert str(error) == "authorization failed: LookupError after HTTP status 400 (invalid_grant)"
            assert server.requests == ["GET /token -"]

    async def test_b19_a_word_of_the_server_is_quoted_only_if_it_is_one_of_the_standard(self, links: Links) -> None:
        """B19: an authorization server may send back what it was sent."""

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path == "/token":
                return web.json_response({"error": SECRET}, status=400)
            return web.Response(status=401)

        async with scripted(answer) as server:
            error = await self.failure(links, server, Renewing(SECRET))
            assert str(error) == "authorization failed: KeyError after HTTP status 400"

    async def test_flows_that_do_not_do_what_a_flow_does(self, links: Links) -> None:
        """B14: a flow that sends nothing, never ends, or sends elsewhere ends the call, and the call is not run."""

        def endless(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            while True:
                yield httpx2.Request("GET", request.url.join("/other"))

        def refusing(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            while True:
                yield request

        def moving(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            request.url = request.url.copy_add_param("key", SECRET)
            yield request

        def breaking(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            request.headers["authorization"] = f"Bearer {SECRET}\r\nx: y"
            yield request

        class Silent(httpx2.Auth):
            async def async_auth_flow(self, request: httpx2.Request) -> Any:
                if not request:
                    yield request

        async with scripted(accepting()) as server:
            assert "comes to no end" in str(await self.failure(links, server, Flow(endless)))
            assert "comes to no end" in str(await self.failure(links, server, Flow(refusing)))
            calls = len(server.requests)
            assert "ended before" in str(await self.failure(links, server, Silent()))
            assert "changes the URL" in str(await self.failure(links, server, Flow(moving)))
            assert "not a header" in str(await self.failure(links, server, Flow(breaking)))
            assert len(server.requests) == calls

    async def test_b9_a_token_endpoint_that_is_down_fails_the_call_clearly(self, links: Links) -> None:
        """B9: who waits for a token learns at once that there is none."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        async with scripted(accepting("new")) as server:
            auth = Renewing("old", f"http://127.0.0.1:{port}/token")
            error = await self.failure(links, server, auth)
            assert str(error) == "authorization failed: cannot reach the authorization server: ConnectError"
        assert auth.open == 0

    async def test_b3_a_refusal_that_does_not_end_is_let_go_when_its_flow_fails(self, links: Links) -> None:
        """B3: its connection is closed at once, also while somebody still holds the error."""

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path == "/token":
                return web.Response(status=500)
            response = web.StreamResponse(status=401)
            await response.prepare(request)
            while True:
                await response.write(b" " * 10_000)

        async with scripted(answer) as server:
            error = await self.failure(links, server, Renewing("old"))
            assert error.__traceback__ is not None
            await eventually(lambda: server.running == 0)

    async def test_b9_calls_that_wait_for_each_other_wait_for_a_silent_endpoint_once(
        self, links: Links, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """B9, B37: forty calls behind one lock take one time limit, not forty."""
        monkeypatch.setattr(auth_client_module, "TIMEOUT_S", 0.3)
        silent = asyncio.Event()

        class Locking(Renewing):
            lock = asyncio.Lock()

            async def async_auth_flow(self, request: httpx2.Request) -> Any:
                async with self.lock, aclosing(super().async_auth_flow(request)) as flow:
                    wanted = await anext(flow)
                    while True:
                        response = yield wanted
                        wanted = await flow.asend(response)

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path == "/token":
                await silent.wait()
            return await accepting()(request)

        async with scripted(answer) as server:
            auth = Locking("old")
            link = links.to(server, auth)
            ends = await asyncio.gather(*(post(link) for _ in range(40)), return_exceptions=True)
            assert {type(end) for end in ends} == {AuthFailed}
            assert server.requests.count("POST /token -") == 1
            with pytest.raises(AuthFailed, match="TimeoutError"):
                await post(link)  # a later call asks for itself
            assert server.requests.count("POST /token -") == 2
            silent.set()

    async def test_b44_an_endless_answer_of_a_token_endpoint_is_cut_off(
        self, links: Links, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """B44: no more is read than a bound."""
        monkeypatch.setattr(auth_client_module, "MAX_BYTES", 10_000)

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path != "/token":
                return web.Response(status=401)
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(b" " * 1000)

        async with scripted(answer) as server:
            assert "larger than 10000 bytes" in str(await self.failure(links, server, Renewing("old")))
            await eventually(lambda: server.running == 0)

    async def test_b17_credentials_for_one_server_follow_no_redirect(self, links: Links) -> None:
        """B17: a token endpoint cannot send a request with a client's secret elsewhere."""

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path == "/token":
                return web.Response(status=307, headers={"location": "/elsewhere"})
            return web.Response(status=401)

        async with scripted(answer) as server:
            await self.failure(links, server, Renewing("old"))
            assert server.requests == ["POST /mcp Bearer old", "POST /token -"]

    async def test_b17_cookies_of_a_token_endpoint_are_not_kept(self, links: Links) -> None:
        """B17: the client is shared by all principals; what one was told reaches no request of another."""

        def following(request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            answer = yield httpx2.Request("GET", request.url.join("/token"))
            assert answer.next_request is not None
            yield answer.next_request
            yield request

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path == "/token":
                return web.Response(status=307, headers={"location": "/moved", "set-cookie": "who=principal-1; Path=/"})
            return await ok(request)

        async with scripted(answer) as server:
            for _ in range(2):
                assert await outcome(links.to(server, Flow(following))) == (200, RESULT)
            assert server.requests == ["GET /token -", "GET /moved -", "POST /mcp -"] * 2
            assert not any("cookie" in headers for headers in server.headers)

    async def test_a_closed_pool_fetches_no_tokens(self, links: Links, auth_clients: AuthClients) -> None:
        """B14: nothing opens a client again that was closed with its pool."""
        async with scripted(accepting("new")) as server:
            await auth_clients.aclose()
            assert "closing" in str(await self.failure(links, server, Renewing("old")))
            assert "POST /token -" not in server.requests


async def test_b3_cancellation_at_every_await_leaves_nothing(
    clients: HttpClients, caplog: pytest.LogCaptureFixture
) -> None:
    """B3: wherever a call is cancelled, its flow is over, no request goes on, and the next call is served."""
    caplog.set_level(logging.WARNING)

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/mcp" and request.headers["authorization"] == "Bearer old":
            # In two parts, so that there is a wait for the body.
            response = web.StreamResponse(status=401)
            await response.prepare(request)
            await response.write(b"no")
            await asyncio.sleep(0.01)
            return response
        await asyncio.sleep(0.01)
        return await accepting("new")(request)

    async with scripted(answer) as server:
        step = 0
        cancelled = True
        while cancelled:
            step += 1
            auth_clients = AuthClients()
            links = Links(clients, auth_clients)
            auth = Renewing("old")
            link = links.to(server, auth)
            before = asyncio.all_tasks()
            task = asyncio.create_task(_cancelled_post(step, link))
            await asyncio.wait({task})
            cancelled = task.cancelled()
            assert auth.open == 0, step
            await eventually(lambda: server.running == 0)
            assert await outcome(link) == (200, RESULT), step
            await auth_clients.aclose()
            await eventually(lambda seen=before: not asyncio.all_tasks() - seen - _served(server))
        assert step > 8, "every await of a flow with three requests"
    assert "auth_flow_not_closed" not in caplog.text


async def _cancelled_post(step: int, link: AuthorizedLink) -> None:
    reply = await cancelled_at(step, post(link))
    await body_of(reply)


def _served(_server: Scripted) -> set[asyncio.Task[Any]]:
    """The tasks of the server's own connections."""
    return {task for task in asyncio.all_tasks() if "RequestHandler" in repr(task.get_coro())}
