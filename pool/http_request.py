"""Requests to an HTTP upstream: fenced, with the headers and cookies of one session, and errors that say what may have
run.

`aiohttp` carries them: measured four to six times cheaper than `httpx2` per POST, and a connection is used again after
an SSE answer that was read to its end.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final

import aiohttp
from aiohttp import ClientRequest, ClientResponse, ClientTimeout, StreamReader
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.payload import Payload

from .errors import CallTimeout, Fenced, OpenFailed, UpstreamLost
from .link import Fence, Headers, OwnName

CONNECT_TIMEOUT_S: Final = 5.0
KEEPALIVE_S: Final = 3.0
"""How long an idle connection is kept: less than the 5 s after which uvicorn and Node close theirs, for a POST on a
connection that closes under it may have run."""

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
        # The body that each open connection is in the middle of, or was last.
        self._bodies: dict[ResponseHandler, StreamReader] = {}

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

    def watch(self, response: ClientResponse) -> None:
        """Have who reads this body learn that its connection has ended.

        aiohttp sees to that, but for a body that is not HTTP (the size of a chunk is no number): its reader would wait
        for ever, for the read timeout is dropped as well.
        """
        connection = response.connection
        protocol = None if connection is None else connection.protocol
        if protocol is None:
            return  # the body is here already
        closed = protocol.closed
        if closed is None:
            _break_off(response.content)
            return
        if protocol not in self._bodies:
            closed.add_done_callback(lambda closed: self._on_closed(protocol, closed))
        self._bodies[protocol] = response.content

    def _on_closed(self, protocol: ResponseHandler, closed: asyncio.Future[None]) -> None:
        if not closed.cancelled():
            closed.exception()  # retrieved: why it ended is told to the reader, if there is one
        _break_off(self._bodies.pop(protocol))


def _break_off(body: StreamReader) -> None:
    if not body.is_eof() and body.exception() is None:
        body.set_exception(aiohttp.ClientPayloadError("the connection ended before the body"))


class Attempt:
    """Whether one HTTP request has begun to be written: the difference between `not_run` and `unknown`."""

    __slots__ = ("_fence", "_is_withdrawn", "fenced", "has_body", "started")

    def __init__(self, fence: Fence, *, has_body: bool) -> None:
        self._fence = fence
        self._is_withdrawn = False
        self.fenced: Fenced | None = None
        self.has_body = has_body
        self.started = False

    def check(self) -> None:
        """Called in the turn of the loop in which the first byte is written. Raises `Fenced`."""
        try:
            if self._is_withdrawn:
                raise Fenced("the caller left before the request was sent")
            self._fence()
        except Fenced as error:
            self.fenced = error
            raise

    def withdraw(self) -> bool:
        """Have nothing be written; false when something may have been."""
        self._is_withdrawn = not self.started
        return self._is_withdrawn


_attempt: ContextVar[Attempt] = ContextVar("attempt")


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

    def __init__(self, value: bytes, attempt: Attempt) -> None:
        super().__init__(value, content_type="application/json")
        self._size = len(value)
        self._attempt = attempt

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._attempt.check()
        self._attempt.started = True
        await writer.write(self._value)


class HttpRequests:
    """What the requests of one upstream session have in common."""

    def __init__(
        self,
        clients: HttpClients,
        static: tuple[tuple[str, str], ...],
        *,
        fence: Fence,
        forward_headers: frozenset[str],
        cookies: dict[str, str] | None,
    ) -> None:
        """`static`: headers of the configuration. `cookies`: those the session has; None to keep none."""
        self._clients = clients
        self._static = dict(static)
        self._fence = fence
        # Most sessions share the one set.
        self._passed = REQUEST_HEADERS
        if forward_headers:
            self._passed = REQUEST_HEADERS | {name.encode("latin-1") for name in forward_headers}
        self.cookies = {} if cookies is None else dict(cookies)
        self._keeps_cookies = cookies is not None

    def attempt(self, *, has_body: bool) -> Attempt:
        """To be handed to one `send`, by a caller who wants to know how far it came, or may withdraw it."""
        return Attempt(self._fence, has_body=has_body)

    async def send(
        self,
        method: str,
        url: str,
        headers: Headers,
        body: bytes | None,
        *,
        read_timeout_s: float | None,
        own: tuple[tuple[str, str], ...] = (),
        attempt: Attempt | None = None,
    ) -> ClientResponse:
        """Send one request, once. `headers`: the client's, of which some are passed on; `own`: the link's.

        Raises `Fenced` and `OpenFailed` (nothing was sent), `UpstreamLost` and `CallTimeout` (it may have run).
        """
        attempt = attempt or self.attempt(has_body=body is not None)
        _attempt.set(attempt)
        try:
            response = await self._clients.client.request(
                method,
                url,
                data=None if body is None else _Body(body, attempt),
                headers=self._headers(headers, own),
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
        self._clients.watch(response)
        self._keep_cookies(response)
        return response

    def _headers(self, headers: Headers, own: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
        passed = self._passed
        ours = {name for name, _ in headers if isinstance(name, OwnName)}
        sent = [
            (name.decode("latin-1"), value.decode("latin-1").strip())
            for name, value in headers
            if isinstance(name, OwnName)
            or (
                (name in passed or name.startswith(PARAM_PREFIX))
                and name not in ours
                and name.decode("latin-1") not in self._static
            )
        ]
        sent.extend((name, value) for name, value in self._static.items() if name.encode("latin-1") not in ours)
        sent.append(("accept-encoding", "identity"))
        sent.extend(own)
        if self.cookies:
            sent.append(("cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items())))
        return sent

    def _keep_cookies(self, response: ClientResponse) -> None:
        """Load balancers in front of upstreams pin sessions by cookie; each session has its own."""
        if not self._keeps_cookies or "set-cookie" not in response.headers:
            return
        for line in response.headers.getall("set-cookie"):
            try:
                parsed = SimpleCookie(line)
            except CookieError:
                continue
            self.cookies.update({name: morsel.coded_value for name, morsel in parsed.items()})


def reply_headers(response: ClientResponse) -> Headers:
    """Those headers of an answer that reach the client."""
    return [(name.lower(), value) for name, value in response.raw_headers if name.lower() in RESPONSE_HEADERS]
