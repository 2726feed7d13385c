"""A borrowed session: what its holder may do with it, until it is given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakKeyDictionary

from .errors import CallTimeout, OpenFailed, PoolError, SessionClosed, SessionReleased, UpstreamLost
from .jsonrpc import Message
from .ledger import Slot
from .link import Headers, Link, Reply
from .liveness import HeardLink
from .session import PooledSession
from .upstream import Upstream

if TYPE_CHECKING:
    import httpx2

ANONYMOUS: Final = "anonymous"
_numbers: WeakKeyDictionary[httpx2.Auth, int] = WeakKeyDictionary()
_counter = count(1)


class Want:
    """What a caller asks the pool for. `headers` go with every call of his (`own_headers` of `pool/link.py`), and each
    call through the flow of `auth`."""

    __slots__ = ("_headers", "affinity", "auth", "capabilities", "slot", "upstream")

    def __init__(
        self,
        upstream: Upstream,
        *,
        principal: str | None = None,
        headers: Headers | Callable[[], Headers] | None = None,
        auth: httpx2.Auth | None = None,
        affinity: str | None = None,
        capabilities: dict[str, Any] | None = None,
    ) -> None:
        """Raises ValueError for an empty principal, and where headers that change would be who calls."""
        if principal == "" or (principal is None and callable(headers)):
            raise ValueError("expected the name of a principal: without one, the headers are who calls")
        self.upstream = upstream
        self._headers = headers or []
        self.auth = auth
        self.affinity = affinity
        self.capabilities = capabilities
        kind = f"{upstream.identity};{','.join(sorted(capabilities))}" if capabilities else upstream.identity
        if principal is None:
            # Without a name the credentials themselves are the principal: other credentials, other sessions.
            number = number_of(auth)
            principal = _digest(*self.headers, number) if headers or number else ANONYMOUS
            kind = f"{kind};unnamed"
        if affinity is not None:
            kind = f"{kind};{_digest(affinity)}"
        self.slot = Slot(upstream.name, principal, kind)

    @property
    def headers(self) -> Headers:
        """Of the call that is made now."""
        return self._headers() if callable(self._headers) else self._headers


class Lends(Protocol):
    """Where borrowed sessions come from and go back to."""

    async def acquire(self, want: Want, *, timeout_s: float | None = None) -> Borrow: ...

    def give_back(self, borrow: Borrow, *, discard: bool) -> None: ...

    def authorized(self, link: Link, want: Want) -> Link: ...

    async def renew(self, borrow: Borrow, lost: PooledSession, *, timeout_s: float | None = None) -> None: ...


class Borrow:
    """A session on loan. Everything raises `SessionReleased` once it was given back; `release` may be called twice."""

    __slots__ = ("_pool", "_released", "_renewing", "answered", "is_broken", "is_lost", "session", "want")

    def __init__(self, pool: Lends, session: PooledSession, want: Want) -> None:
        self._pool = pool
        self._released = False
        self._renewing: asyncio.Lock | None = None
        self.session = session
        self.want = want
        self.is_broken = False
        """A call failed in its transport: the session is closed when it comes back."""
        self.is_lost = False
        """A call has told that the session, which others may share, has ended: the next one needs another."""
        self.answered = 0
        self._hold(session)

    def __repr__(self) -> str:
        state = "released" if self._released else "broken" if self.is_broken else "held"
        return f"<Borrow {state} of {self.session!r}>"

    @property
    def lender(self) -> Lends:
        """Where it comes from."""
        return self._pool

    @property
    def is_shared(self) -> bool:
        """Whether others may hold the same session."""
        return self.want.affinity is not None

    @property
    def is_released(self) -> bool:
        return self._released

    @property
    def link(self) -> Link:
        """The session's link, with what this holder's calls have to go through. Raises `SessionClosed`."""
        link = self.session.link
        if self.want.auth is not None:
            link = self._pool.authorized(link, self.want)
        return HeardLink(link, self.session) if self.is_shared else link

    @property
    def renewing(self) -> asyncio.Lock:
        """Held while its session is replaced."""
        if self._renewing is None:
            self._renewing = asyncio.Lock()
        return self._renewing

    def check(self) -> None:
        """Raises `SessionReleased`."""
        if self._released:
            raise SessionReleased("this session was given back to its pool")

    def was_answered(self) -> None:
        """Note that a call was."""
        self.answered += 1
        self.session.heard()

    def failed(self, error: PoolError | None) -> None:
        """Note how a call ended. A session that others share is only lost when its transport says so."""
        if self.is_shared:
            self.is_lost = self.is_lost or self.session.is_closed
        elif isinstance(error, UpstreamLost | CallTimeout | OpenFailed | SessionClosed):
            self.is_broken = True

    def release(self, *, discard: bool = False) -> None:
        """Give the session back: to who waits, or for later use; with `discard`, or when it broke, it is closed."""
        if self._released:
            return
        self._released = True
        self.session.__exit__()
        self._pool.give_back(self, discard=discard or self.is_broken or self.session.is_closed)

    def exchange(self, session: PooledSession) -> None:
        """Hold another session in place of this one, which is closed."""
        old = self.session
        self.session, self.is_broken, self.is_lost = session, False, False
        self._hold(session)
        old.__exit__()

    def _hold(self, session: PooledSession) -> None:
        session.__enter__()
        session.farewell = partial(_farewell, self._pool, self.want)


class BorrowedLink:
    """The raw face of a borrowed session: bytes of JSON-RPC in, bytes out. Ids on one session must be unique: take
    them from `next_id`."""

    __slots__ = ("_borrow", "_pool")

    def __init__(self, borrow: Borrow) -> None:
        self._borrow = borrow
        self._pool = borrow.lender

    def __repr__(self) -> str:
        return f"<BorrowedLink {self._borrow!r}>"

    @property
    def is_closed(self) -> bool:
        """True as soon as it can take no more calls: the session ended, or was given back."""
        return self._borrow.is_released or self._borrow.session.is_closed

    @property
    def initialize_result(self) -> dict[str, Any]:
        """What the server said when the session was opened."""
        result = self._borrow.session.initialize_result
        assert result is not None
        return result

    def next_id(self) -> str:
        """An id for a request that no other request on this session has."""
        return self._borrow.session.next_id()

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """Send one client message; see `Link.post`."""
        return await self._use(lambda link: link.post(message, body, [*headers, *self._borrow.want.headers]))

    async def get(self, headers: Headers) -> Reply:
        """Open the stream of server messages that belong to no request; see `Link.get`."""
        return await self._use(lambda link: link.get([*headers, *self._borrow.want.headers]))

    async def _use(self, ask: Callable[[Link], Any]) -> Reply:
        borrow = self._borrow
        borrow.check()
        if borrow.is_lost:
            await self._pool.renew(borrow, borrow.session)
        session = borrow.session
        try:
            reply: Reply = await ask(borrow.link)
        except PoolError as error:
            if borrow.session is session:
                borrow.failed(error)
            raise
        if borrow.is_shared and borrow.session is session and session.is_closed:  # so this answer says
            borrow.is_lost = True
        reply.chunks = _watched(reply.chunks, borrow)
        await anext(reply.chunks)  # a generator that never began runs no clean-up when it is closed
        return reply


class RawContext:
    """`async with`: a borrowed session's raw face."""

    __slots__ = ("_borrow", "_pool", "_timeout_s", "_want")

    def __init__(self, pool: Lends, want: Want, timeout_s: float | None) -> None:
        self._pool = pool
        self._want = want
        self._timeout_s = timeout_s

    async def __aenter__(self) -> BorrowedLink:
        self._borrow = await self._pool.acquire(self._want, timeout_s=self._timeout_s)
        return BorrowedLink(self._borrow)

    async def __aexit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        self._borrow.release(discard=kind is not None and not self._borrow.is_shared)


async def _watched(chunks: AsyncGenerator[bytes, None], borrow: Borrow) -> AsyncGenerator[bytes, None]:
    try:
        yield b""
        async for chunk in chunks:
            yield chunk
        borrow.was_answered()
    except PoolError as error:
        borrow.failed(error)
        raise
    finally:
        await chunks.aclose()


def _farewell(pool: Lends, want: Want, link: Link) -> tuple[Link, Headers]:
    return link if want.auth is None else pool.authorized(link, want), want.headers


def number_of(auth: httpx2.Auth | None) -> str:
    """A name for an authentication object that no other one has, also not after its end."""
    if auth is None:
        return ""
    return str(_numbers.setdefault(auth, next(_counter)))


def _digest(*parts: object) -> str:
    return sha256(repr(parts).encode()).hexdigest()[:24]
