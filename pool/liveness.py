"""Whether a session is alive: what its calls tell of that by the way, and a check where they told nothing for long.

When a check is due is `PooledSession.is_due`. What is asked is the chain of `health.py`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from .calls import answer, request
from .errors import AuthFailed, CallTimeout, CircuitOpen, Fenced, UpstreamRefused
from .handshake import session_headers
from .health import check
from .jsonrpc import Message
from .link import Headers, Link, LinkWrapper, Reply
from .session import PooledSession

logger = logging.getLogger("leasehold.pool")

THE_CALLERS: Final = frozenset({401, 403, 429})
"""Refusals that are about who asks, and say nothing of the session."""


async def is_well(
    session: PooledSession, headers: Headers, authorized: Callable[[Link], Link] = lambda link: link
) -> bool:
    """The health check, with the `headers` and credentials of the caller who wants the session.

    Where nothing was learnt (the circuit is open, the lease over, the credentials no good) the session is not blamed:
    the call itself will be told.
    """
    session.on_checked()
    upstream, result = session.upstream, session.initialize_result or {}
    headers = session_headers(str(result.get("protocolVersion", "")), headers)
    learnt = True

    async def ask(method: str) -> dict[str, Any]:
        nonlocal learnt
        id = session.next_id()  # noqa: A001
        message, body = request(id, method)
        try:
            reply = await authorized(session.link).post(message, body, headers)
            if reply.status >= 500:  # whatever its body says: that is how one speaks for a server that is gone
                await reply.chunks.aclose()
                raise UpstreamRefused(reply.status)
            return (await answer(reply, id)).payload
        except (CircuitOpen, Fenced, AuthFailed):
            learnt = False
            raise
        except UpstreamRefused as error:
            learnt = error.status not in THE_CALLERS
            raise

    verdict = await check(ask, upstream.health_check, upstream.health_check_timeout_s)
    if verdict.healthy:
        session.touch()
        session.heard()
    elif learnt:
        logger.info("unhealthy session=%s upstream=%s reason=%s", session.key[:8], upstream.name, verdict.reason)
        return False
    return not session.is_closed


class HeardLink(LinkWrapper):
    """The link of a session that is shared, as its holders use it: the session notes what is heard, and what is
    not."""

    __slots__ = ("_session",)

    def __init__(self, inner: Link, session: PooledSession) -> None:
        super().__init__(inner)
        self._session = session

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """As `Link.post`."""
        if message.kind != "request":
            return await self.inner.post(message, body, headers)
        session = self._session
        session.calls += 1
        try:
            reply = await self.inner.post(message, body, headers)
        except BaseException as error:
            session.calls -= 1
            session.is_doubted = session.is_doubted or isinstance(error, CallTimeout)
            raise
        chunks = self._chunks(reply)
        await anext(chunks)  # a generator that never began runs no clean-up when it is closed
        return Reply(reply.status, reply.headers, chunks)

    async def _chunks(self, reply: Reply) -> AsyncGenerator[bytes, None]:
        session = self._session
        try:
            yield b""
            async for chunk in reply.chunks:
                if reply.status < 500:
                    session.heard()
                yield chunk
        except CallTimeout:
            session.is_doubted = True
            raise
        finally:
            session.calls -= 1
            await reply.chunks.aclose()
