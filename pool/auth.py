"""Authorization of calls by an `httpx2.Auth`, over links that do not speak httpx2.

An `Auth` is a generator: it yields requests and is sent their responses. The call itself goes through the link, with
the headers that the flow gave it; whatever else the flow asks for (metadata, registration, tokens) goes through an
HTTP client of its own. A call is sent again only where the server refused it with 401 or 403 and the flow asks for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

import httpx2

from .auth_client import AuthClients, failure
from .clock import monotonic
from .errors import AuthFailed, ConfigError, PoolError
from .jsonrpc import Message
from .link import RESERVED_HEADERS, Headers, Link, LinkWrapper, OwnName, Reply, own_header
from .sdk_auth import Unlocked, is_from_sdk
from .upstream import StdioTarget, Upstream

logger = logging.getLogger("leasehold.pool.auth")

REFUSED: Final = frozenset({401, 403})
MAX_REQUESTS: Final = 32
"""Requests that one call's flow may make, itself included; the longest of the SDK's makes about a dozen."""
MAX_REFUSAL_BYTES: Final = 64 * 1024
REFUSAL_TIMEOUT_S: Final = 5.0
"""How much of a refusal's body a flow is given to read, and how long it may take to come."""

HIDDEN_HEADERS: Final = RESERVED_HEADERS | {b"authorization", b"cookie", b"proxy-authorization"}
"""Client headers that no flow sees: they are the link's business, or meant for us."""

Flow = AsyncGenerator[httpx2.Request, httpx2.Response]


def authorization(upstream: Upstream) -> httpx2.Auth | None:
    """What authorizes the calls of an upstream as it is configured; None where nothing does.

    It holds the tokens, so one is made per upstream and worker, for all its sessions. Raises `ConfigError`.
    """
    oauth, target = upstream.oauth, upstream.target
    if oauth is None or isinstance(target, StdioTarget):
        return None
    if oauth.token_url is not None:
        from .client_credentials import ClientCredentials

        return ClientCredentials(oauth.client_id, oauth.client_secret, oauth.token_url, oauth.scope)
    try:
        from .sdk_oauth import client_credentials
    except ImportError:
        raise ConfigError(f"{upstream.name}: oauth without a token_url needs the package mcp, 2.3 or later") from None
    return client_credentials(oauth, target.url)


class AuthorizedLink(LinkWrapper):
    """A link whose requests an `httpx2.Auth` authorizes; cheap enough to be made for one call.

    Any number of links and calls may share one `auth`. The flow learns of an answer as soon as its status is known. Of
    a refusal it may read the body; of other answers it sees status and headers only, for they stream through untouched.
    """

    def __init__(self, link: Link, url: str, auth: httpx2.Auth, clients: AuthClients) -> None:
        """`url`: the upstream's, as it is configured."""
        super().__init__(link)
        self._url = httpx2.URL(url)
        self._auth = Unlocked(auth) if is_from_sdk(auth) else auth
        self._clients = clients

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """As `Link.post`; besides, raises `AuthFailed`: the call was not run."""
        return await self._authorized("POST", body, headers, lambda changed: self.inner.post(message, body, changed))

    async def get(self, headers: Headers) -> Reply:
        """As `Link.get`; besides, raises `AuthFailed`."""
        return await self._authorized("GET", b"", headers, self.inner.get)

    async def delete(self, headers: Headers) -> Reply:
        """As `Link.delete`; besides, raises `AuthFailed`."""
        return await self._authorized("DELETE", b"", headers, self.inner.delete)

    async def _authorized(
        self, method: str, body: bytes, headers: Headers, send: Callable[[Headers], Awaitable[Reply]]
    ) -> Reply:
        begun = monotonic()
        call = httpx2.Request(method, self._url, headers=_shown(headers), content=body)
        before = call.headers.copy()
        reply: Reply | None = None
        said: httpx2.Response | None = None  # what the last request beside the call was answered with
        flow = self._auth.async_auth_flow(call)
        try:
            try:
                wanted = await _advance(flow, None, None)
                for _ in range(MAX_REQUESTS):
                    if wanted is None:
                        break
                    if self._is_call(wanted, call):
                        if reply is not None:
                            await reply.chunks.aclose()
                            reply = None
                        reply = await send(_with_changes(headers, before, wanted.headers))
                        if reply.status not in REFUSED:
                            await _tell(flow, wanted, reply)
                            break
                        content = await _read_some(reply.chunks)
                        reply.chunks = await _replayed(content, reply.chunks)
                        response = _response(wanted, reply, content)
                    else:
                        response = said = await self._clients.send(wanted, since=begun)
                    wanted = await _advance(flow, response, said)
                else:
                    raise AuthFailed("authorization failed: its flow comes to no end")
            finally:
                await _close(flow)
        except BaseException:
            if reply is not None:
                await reply.chunks.aclose()
            raise
        if reply is None:
            raise AuthFailed("authorization failed: its flow ended before the call was sent")
        return reply

    def _is_call(self, wanted: httpx2.Request, call: httpx2.Request) -> bool:
        """Whether a flow asks for the call to be sent. A request to its URL that says something else is none: a server
        may name any URL as its token endpoint."""
        if wanted is call:
            if wanted.url != self._url:
                raise AuthFailed("authorization failed: its flow changes the URL of the call, which is not supported")
            return True
        try:
            return (wanted.method, wanted.url, wanted.content) == (call.method, self._url, call.content)
        except httpx2.RequestNotRead:
            return False


async def _advance(flow: Flow, response: httpx2.Response | None, said: httpx2.Response | None) -> httpx2.Request | None:
    """The next request of a flow; None when it has ended. Raises `AuthFailed` for whatever goes wrong in it."""
    try:
        return await (anext(flow) if response is None else flow.asend(response))
    except StopAsyncIteration:
        return None
    except PoolError:
        raise
    except Exception as error:  # noqa: BLE001
        # Not chained: messages of the SDK quote what the authorization server said.
        raise failure(error, said) from None


async def _tell(flow: Flow, call: httpx2.Request, reply: Reply) -> None:
    """Have a flow see an answer that is no refusal. The call has run: nothing the flow does now may hide its answer,
    and nothing that it still wants is sent."""
    try:
        if await _advance(flow, _response(call, reply, b""), None) is not None:
            logger.info("auth_flow_cut_short status=%d", reply.status)
    except PoolError as error:
        logger.warning("auth_flow_failed_after_the_call error=%s", type(error).__name__)


async def _close(flow: Flow) -> None:
    """End a flow in the task that ran it: locks that it holds may be released by no other."""
    try:
        await flow.aclose()
    except Exception as error:  # noqa: BLE001
        logger.warning("auth_flow_not_closed error=%s", type(error).__name__)


def _shown(headers: Headers) -> Headers:
    return [pair for pair in headers if isinstance(pair[0], OwnName) or pair[0] not in HIDDEN_HEADERS]


def _with_changes(headers: Headers, before: httpx2.Headers, after: httpx2.Headers) -> Headers:
    """The headers of a call with what its flow has changed. Raises `AuthFailed`."""
    old, new = _by_name(before), _by_name(after)
    touched = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} - RESERVED_HEADERS
    kept = [pair for pair in headers if pair[0] not in touched]
    try:
        return [*kept, *(own_header(name, value) for name in sorted(touched) for value in new.get(name, ()))]
    except ValueError as error:
        raise AuthFailed(f"authorization failed: {error}") from None


def _by_name(headers: httpx2.Headers) -> dict[bytes, list[bytes]]:
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers.raw:
        values.setdefault(name.lower(), []).append(value)
    return values


def _response(call: httpx2.Request, reply: Reply, content: bytes) -> httpx2.Response:
    headers = [(name, value) for name, value in reply.headers if name != b"content-encoding"]
    return httpx2.Response(reply.status, headers=headers, content=content, request=call)


async def _read_some(chunks: AsyncGenerator[bytes, None]) -> bytes:
    """The body of a refusal, or its beginning; that it broke off or does not come changes nothing about the refusal."""
    read = bytearray()
    try:
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            async for chunk in chunks:
                read += chunk
                if len(read) >= MAX_REFUSAL_BYTES:
                    break
    except (PoolError, TimeoutError) as error:
        logger.info("refusal_broke_off error=%s", type(error).__name__)
    return bytes(read)


async def _replayed(content: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """A body whose beginning was read already."""
    chunks = _chained(content, rest)
    await anext(chunks)  # a generator that never began runs no clean-up when it is closed
    return chunks


async def _chained(content: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield b""
        if content:
            yield content
        async for chunk in rest:
            yield chunk
    finally:
        await rest.aclose()
