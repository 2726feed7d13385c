"""The link to a streamable-HTTP upstream: bytes in, bytes out, one call's failure is one call's error.

`aiohttp` carries it: measured four to six times cheaper than `httpx2` per POST, and a connection is used again after
an SSE answer that was read to its end. The SDK's own client transport is not used: one dropped POST ends its session
and every call in flight (modelcontextprotocol/python-sdk 3522), and with SSE answers it opens a connection per call
(3281).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final

import aiohttp
from aiohttp import ClientRequest, ClientResponse, ClientTimeout
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

from .errors import CallTimeout, Fenced, OpenFailed, SessionClosed, UpstreamLost
from .jsonrpc import Message
from .link import Fence, Headers, Reply, ResumeRecord, unfenced
from .upstream import HttpTarget

CONNECT_TIMEOUT_S: Final = 5.0
DELETE_TIMEOUT_S: Final = 5.0
KEEPALIVE_S: Final = 3.0
"""How long an idle connection is kept: less than the 5 s after which uvicorn and Node close theirs, for a POST on a
connection that closes under it may have run."""

SESSION_HEADER: Final = b"mcp-session-id"
VERSION_HEADER: Final = b"mcp-protocol-version"

REQUEST_HEADERS: Final = frozenset(
    {
        b"accept",
        b"content-type",
        b"last-event-id",
        b"mcp-method",
        b"mcp-name",
        b"traceparent",
        b"tracestate",
        VERSION_HEADER,
    }
)
"""Client headers that belong to the protocol and always reach the upstream; `mcp-param-*` does too."""
PARAM_PREFIX: Final = b"mcp-param-"

RESPONSE_HEADERS: Final = frozenset(
    {
        b"allow",
        b"cache-control",
        b"content-encoding",
        b"content-type",
        b"retry-after",
        b"www-authenticate",
        b"x-accel-buffering",
        VERSION_HEADER,
    }
)
"""Upstream headers that reach the client. Its session id and cookies are the link's own business."""


class HttpClients:
    """The HTTP client that all links of a worker share: making one costs tens of milliseconds for the CA bundle."""

    def __init__(self) -> None:
        self._client: aiohttp.ClientSession | None = None

    @property
    def client(self) -> aiohttp.ClientSession:
        """Made at first use, inside the loop."""
        if self._client is None:
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                request_class=_FencedRequest,
                auto_decompress=False,
                skip_auto_headers=("accept-encoding", "user-agent"),
                read_bufsize=256 * 1024,
            )
        return self._client

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None


class _Attempt:
    """Whether one HTTP request has begun to be written: the difference between `not_run` and `unknown`."""

    __slots__ = ("_fence", "fenced", "has_body", "started")

    def __init__(self, fence: Fence, *, has_body: bool) -> None:
        self._fence = fence
        self.fenced: Fenced | None = None
        self.has_body = has_body
        self.started = False

    def check(self) -> None:
        """Raises `Fenced`."""
        try:
            self._fence()
        except Fenced as error:
            self.fenced = error
            raise


_attempt: ContextVar[_Attempt] = ContextVar("attempt")


class _FencedRequest(ClientRequest):
    """Checks the fence when there is a connection and the request is about to be written."""

    async def send(self, conn: Any) -> ClientResponse:
        attempt = _attempt.get()
        attempt.check()
        attempt.started = not attempt.has_body
        return await super().send(conn)


class _Body(Payload):
    """A body that checks the fence in the turn in which it is written, and the headers, which are held back for it.

    aiohttp writes a body in a task of its own: before Python 3.12, one turn of the loop after the request was sent.
    """

    def __init__(self, value: bytes, attempt: _Attempt) -> None:
        super().__init__(value, content_type="application/json")
        self._size = len(value)
        self._attempt = attempt

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._attempt.check()
        self._attempt.started = True
        await writer.write(self._value)


class HttpLink:
    """One session of a streamable-HTTP upstream; without `resume`, one that has yet to be initialized.

    With `stateless`, no session id is kept: the link of requests that belong to no session (protocol 2026-07-28, and
    upstreams that hand out no session id).
    """

    def __init__(
        self,
        clients: HttpClients,
        target: HttpTarget,
        *,
        call_timeout_s: float,
        fence: Fence = unfenced,
        forward_headers: frozenset[str] = frozenset(),
        resume: ResumeRecord | None = None,
        stateless: bool = False,
    ) -> None:
        self._clients = clients
        self._url = target.url
        self._static = dict(target.headers)
        self._passed = REQUEST_HEADERS | {name.encode("latin-1") for name in forward_headers}
        self._call_timeout_s = call_timeout_s
        self._fence = fence
        self._stateless = stateless
        self._session_id = resume.session_id if resume else None
        self._version = resume.protocol_version if resume else None
        self._cookies = dict(resume.cookies) if resume else {}
        self._closed = asyncio.Event()
        # GET streams, which end with the link: those whose answer has yet to begin, and those that are read.
        self._opening: set[asyncio.Timeout] = set()
        self._streams: set[ClientResponse] = set()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "stateless" if self._stateless else "open"
        return f"<HttpLink {state} streams={len(self._streams)}>"

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    @property
    def resume(self) -> ResumeRecord | None:
        if self._session_id is None:
            return None
        return ResumeRecord(self._session_id, self._version, dict(self._cookies))

    def negotiated(self, protocol_version: str) -> None:
        """Note what `initialize` agreed on, for requests of our own and for the resume record."""
        self._version = protocol_version

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        response = await self._request("POST", headers, body, read_timeout_s=self._call_timeout_s)
        if message.method == "initialize" and response.status == 200 and not self._stateless:
            self._session_id = response.headers.get("mcp-session-id")
        return await self._reply(response)

    async def get(self, headers: Headers) -> Reply:
        opening = asyncio.timeout(None)
        try:
            async with opening:
                self._opening.add(opening)
                response = await self._request("GET", headers, None, read_timeout_s=None)
        except TimeoutError:
            raise SessionClosed("the upstream session has ended") from None
        finally:
            self._opening.discard(opening)
        self._streams.add(response)
        return await self._reply(response)

    async def delete(self, headers: Headers) -> Reply:
        return await self._reply(await self._request("DELETE", headers, None, read_timeout_s=DELETE_TIMEOUT_S))

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def aclose(self) -> None:
        self._closed.set()
        for opening in self._opening:
            if not opening.expired():
                opening.reschedule(asyncio.get_running_loop().time())
        for response in list(self._streams):
            response.close()

    async def _request(
        self, method: str, headers: Headers, body: bytes | None, read_timeout_s: float | None
    ) -> ClientResponse:
        if self.is_closed:
            raise SessionClosed("the upstream session has ended")
        attempt = _Attempt(self._fence, has_body=body is not None)
        _attempt.set(attempt)
        try:
            response = await self._clients.client.request(
                method,
                self._url,
                data=None if body is None else _Body(body, attempt),
                headers=self._request_headers(headers),
                allow_redirects=False,
                timeout=ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s),
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if attempt.fenced is not None:
                raise attempt.fenced from None
            if not attempt.started:
                raise OpenFailed(f"cannot connect to the upstream: {type(error).__name__}") from error
            if isinstance(error, TimeoutError):
                raise CallTimeout(f"the upstream stayed silent for {read_timeout_s:g} s") from error
            raise UpstreamLost(f"the connection to the upstream broke: {type(error).__name__}") from error
        if response.status == 404 and self._session_id is not None:
            # The specification's one sign that a session is gone; a 503 or a dropped connection is none.
            self._closed.set()
        self._keep_cookies(response)
        return response

    def _request_headers(self, headers: Headers) -> list[tuple[str, str]]:
        passed = self._passed
        sent = [
            (name.decode("latin-1"), value.decode("latin-1").strip())
            for name, value in headers
            if (name in passed or name.startswith(PARAM_PREFIX)) and name.decode("latin-1") not in self._static
        ]
        sent.extend(self._static.items())
        sent.append(("accept-encoding", "identity"))
        if self._session_id is not None:
            sent.append(("mcp-session-id", self._session_id))
        if self._cookies:
            sent.append(("cookie", "; ".join(f"{name}={value}" for name, value in self._cookies.items())))
        return sent

    def _keep_cookies(self, response: ClientResponse) -> None:
        """Load balancers in front of upstreams pin sessions by cookie; each session has its own."""
        if self._stateless or "set-cookie" not in response.headers:
            return
        for line in response.headers.getall("set-cookie"):
            try:
                parsed = SimpleCookie(line)
            except CookieError:
                continue
            self._cookies.update({name: morsel.coded_value for name, morsel in parsed.items()})

    async def _reply(self, response: ClientResponse) -> Reply:
        kept = [(name.lower(), value) for name, value in response.raw_headers if name.lower() in RESPONSE_HEADERS]
        chunks = self._chunks(response)
        await anext(chunks)  # a generator that never began runs no clean-up when it is closed
        return Reply(response.status, kept, chunks)

    async def _chunks(self, response: ClientResponse) -> AsyncGenerator[bytes, None]:
        """The body as it comes, after one empty piece. Read to its end, the connection is used again; closed early,
        closed."""
        try:
            yield b""
            while chunk := await response.content.readany():
                yield chunk
        except TimeoutError as error:
            raise CallTimeout(f"the upstream stayed silent for {self._call_timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            # A GET stream just ends when its session does.
            if not (self.is_closed and response in self._streams):
                raise UpstreamLost(f"the upstream's answer broke off: {type(error).__name__}") from error
        finally:
            self._streams.discard(response)
            response.close()
