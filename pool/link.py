"""The port to one upstream session: bytes in, bytes out.

A link speaks for one client session to one upstream session. Its faces are those of streamable HTTP (POST one message,
GET the server's stream, DELETE the session), because that is what clients of the gateway speak; the stdio link
translates. Bodies and event streams cross as the bytes they are.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from .jsonrpc import Message

Headers = list[tuple[bytes, bytes]]
"""Header names in lower case and values, as in ASGI."""

RESERVED_HEADERS: Final = frozenset(
    {
        b"accept-encoding",
        b"connection",
        b"content-length",
        b"host",
        b"keep-alive",
        b"mcp-session-id",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers that are the link's own business: nobody else sets them."""

_NAME: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class OwnName(bytes):
    """The name of a header that comes from this process and not from a client.

    It always reaches the upstream, and wins over a client's and a configured header of that name. What came over the
    wire never has such a name, whatever it says: being one is a matter of type.
    """

    __slots__ = ()


def own_header(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header of our own for one request. Raises ValueError for what cannot be sent; the message shows no value."""
    if not _NAME.fullmatch(name) or _CONTROL.search(value):
        raise ValueError("not a header that can be sent: a name that is none, or a value with control characters")
    if name.lower() in RESERVED_HEADERS:
        raise ValueError(f"the header {name.decode()} is set by the link")
    return OwnName(name.lower()), value.strip(b" \t")


def own_headers(headers: Mapping[str, str]) -> Headers:
    """`own_header` for each of some headers."""
    try:
        return [own_header(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    except UnicodeEncodeError:
        raise ValueError("a header holds characters that cannot be sent") from None


OwnHeaders = Mapping[str, str] | Callable[[], Mapping[str, str]] | None
"""Headers of a caller: fixed, or a function that is asked for them with each call (a token that is renewed)."""


def headers_source(headers: OwnHeaders) -> Headers | Callable[[], Headers]:
    """`own_headers` of what a caller gave; of a function, a function. Raises ValueError."""
    if callable(headers):
        return lambda: own_headers(headers())
    return own_headers(headers or {})


Fence = Callable[[], None]
"""Called in the same turn of the loop in which an upstream write starts; raises `Fenced` when none may start."""


def unfenced() -> None:
    """The fence of a pool that shares its sessions with nobody."""


@dataclass(slots=True)
class Reply:
    """An upstream's answer. `chunks` is to be iterated to its end or closed; either releases the connection.

    Iterating raises `UpstreamLost` when the answer broke off and `CallTimeout` when the upstream stayed silent.
    """

    status: int
    headers: Headers
    chunks: AsyncGenerator[bytes, None]


@dataclass(frozen=True, slots=True)
class ResumeRecord:
    """What another worker needs to continue the same upstream session: sealed before it is stored."""

    session_id: str
    protocol_version: str | None = None
    cookies: dict[str, str] = field(default_factory=dict[str, str])
    initialize_result: dict[str, Any] | None = None
    """The server's result, where the session was initialized by its owner and not by a client."""


class Link(Protocol):
    """One upstream session. Every method may be called concurrently; one slow call delays no other."""

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """Send one client message (`body` is its bytes, `message` its parsed head).

        Raises `Fenced` or `SessionClosed` (nothing was sent), `OpenFailed` (no connection, nothing was sent),
        `UpstreamLost` or `CallTimeout` (it may have run).
        """
        ...

    def negotiated(self, protocol_version: str) -> None:
        """Note what `initialize` agreed on, for requests of our own and for the resume record."""
        ...

    async def get(self, headers: Headers) -> Reply:
        """Open the stream of server messages that belong to no request (an SSE body)."""
        ...

    async def delete(self, headers: Headers) -> Reply:
        """End the upstream session as the client asked to."""
        ...

    @property
    def is_closed(self) -> bool:
        """True as soon as the session is known to be gone: its process ended, or the upstream answered 404."""
        ...

    @property
    def resume(self) -> ResumeRecord | None:
        """What a new owner needs to continue this session; None while unknown, and for pinned sessions always."""
        ...

    async def wait_closed(self) -> None:
        """Return once `is_closed` is true."""
        ...

    async def aclose(self) -> None:
        """Free connections and processes, bounded in time. The GET stream just ends.

        Calls in flight end with `UpstreamLost` where the session ends with its link (stdio). Where another owner may
        continue the session, they go on to their answers.
        """
        ...


class LinkWrapper:
    """A `Link` that passes everything on to another; the base of those that do something besides."""

    __slots__ = ("inner",)

    def __init__(self, inner: Link) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.inner!r}>"

    @property
    def is_closed(self) -> bool:
        return self.inner.is_closed

    @property
    def resume(self) -> ResumeRecord | None:
        return self.inner.resume

    def negotiated(self, protocol_version: str) -> None:
        self.inner.negotiated(protocol_version)

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        return await self.inner.post(message, body, headers)

    async def get(self, headers: Headers) -> Reply:
        return await self.inner.get(headers)

    async def delete(self, headers: Headers) -> Reply:
        return await self.inner.delete(headers)

    async def wait_closed(self) -> None:
        await self.inner.wait_closed()

    async def aclose(self) -> None:
        await self.inner.aclose()
