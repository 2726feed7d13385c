"""The HTTP side of an HTTP+SSE server: getting its event stream, and judging what it answers."""

from __future__ import annotations

import asyncio
import socket
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

import aiohttp
from aiohttp import ClientResponse

from .errors import OpenFailed, UpstreamLost
from .http_request import HttpRequests, reply_headers
from .link import Headers
from .sse import is_event_stream

MAX_ENDPOINT_CHARS: Final = 8192
MAX_REFUSAL_BYTES: Final = 64 << 10
"""How much of the body of an answer is read, and passed on if the answer is a refusal."""
BODY_TIMEOUT_S: Final = 5.0

PASSED_ON: Final = frozenset({401, 403})
"""Refusals of the stream that are the caller's business: his credentials are wrong, or he has to get some."""
OF_A_POST: Final = frozenset({b"accept", b"content-type", b"last-event-id", b"mcp-method", b"mcp-name"})

KEEPALIVE_OPTIONS: Final = (("TCP_KEEPIDLE", 30), ("TCP_KEEPALIVE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
"""A peer that vanished without a word is noticed within a minute. In seconds, and probes; where the system has them."""


class Refused(UpstreamLost):
    """Raised for an HTTP answer that is no success. Who still waits for one gets it as it is."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(f"the upstream answered with HTTP status {status}")
        self.status = status
        self.headers = headers
        self.body = body


async def open_stream(http: HttpRequests, url: str, headers: Headers) -> ClientResponse:
    """Ask for the event stream, with what `headers` of a message say about who calls.

    Raises `Refused` where the caller is to see the answer, `OpenFailed` and whatever `HttpRequests.send` does.
    """
    about_caller = [pair for pair in headers if pair[0] not in OF_A_POST]
    about_caller.append((b"accept", b"text/event-stream"))
    own = (("cache-control", "no-store"),)
    response = await http.send("GET", url, about_caller, None, read_timeout_s=None, own=own)
    try:
        if response.status in PASSED_ON:
            raise Refused(response.status, reply_headers(response), await beginning(response))
        _check(response)
        _watch_peer(response)
    except BaseException:
        response.close()
        raise
    return response


def _check(response: ClientResponse) -> None:
    if response.status != 200:
        hint = ", and redirects are not followed" if 300 <= response.status < 400 else ""
        raise OpenFailed(f"it answered with HTTP status {response.status}{hint}")
    if not is_event_stream(reply_headers(response)):
        raise OpenFailed("it answered with no event stream")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise OpenFailed("its event stream is compressed, which was not asked for")


def _watch_peer(response: ClientResponse) -> None:
    """Have the system notice a peer that is gone: a silent stream may be a quiet server or a dead one."""
    connection = response.connection
    transport = None if connection is None else connection.transport
    peer = None if transport is None else transport.get_extra_info("socket")
    if peer is None:
        return  # it has ended already
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_OPTIONS:
        option = getattr(socket, name, None)
        if option is not None:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)


async def beginning(response: ClientResponse) -> bytes:
    """The first part of a body: that it breaks off or does not come changes nothing about the answer."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while len(read) < MAX_REFUSAL_BYTES and (chunk := await response.content.readany()):
                read += chunk
    except (aiohttp.ClientError, OSError):
        pass
    finally:
        response.close()
    return bytes(read[:MAX_REFUSAL_BYTES])


def endpoint_url(url: str, said: bytes) -> str:
    """Where to POST messages, by what the `endpoint` event of the stream at `url` said.

    Raises `OpenFailed` for a place of another origin: credentials of the configuration go to the configured one only.
    """
    try:
        text = said.decode()
        if not text or len(text) > MAX_ENDPOINT_CHARS or not text.isprintable() or " " in text:
            raise ValueError
        base, parts = urlsplit(url), urlsplit(urljoin(url, text))
        is_same = _origin(parts) == _origin(base)
    except ValueError:
        raise OpenFailed("its endpoint event holds no URL") from None
    if not is_same:
        raise OpenFailed("its endpoint event names another origin")
    return urlunsplit((base.scheme, base.netloc, parts.path, parts.query, ""))


def _origin(parts: SplitResult) -> tuple[str, str | None, str | None, int | None]:
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.username, parts.hostname, parts.port or default
