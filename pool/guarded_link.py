"""A link behind its upstream's circuit breaker: each request asks for leave, and says how it ended."""

from __future__ import annotations

from .breaker import TRANSPORT_FAILURES
from .breakers import Breakers
from .errors import CallTimeout
from .jsonrpc import Message
from .link import Headers, Link, LinkWrapper, Reply


class GuardedLink(LinkWrapper):
    """A `Link` whose requests are not made while the circuit is open: they raise `CircuitOpen`, and did not run."""

    __slots__ = ("_breakers", "_event", "_upstream")

    def __init__(self, inner: Link, breakers: Breakers, upstream: str, *, event: int | None = None) -> None:
        """`event`: a number of its own, for a process or stream that ends under all of its calls at once: that counts
        as one failure."""
        super().__init__(inner)
        self._event = event
        self._breakers = breakers
        self._upstream = upstream

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        permit = await self._breakers.admit(self._upstream)
        try:
            reply = await self.inner.post(message, body, headers)
        except TRANSPORT_FAILURES:
            permit.failed(event=self._event)
            raise
        except CallTimeout:
            # Silence may be work; but nothing works on this.
            if message.method == "initialize":
                permit.failed()
            else:
                permit.abandoned()
            raise
        except BaseException:
            permit.abandoned()
            raise
        permit.succeeded()  # it answers; how long that takes is no matter here
        return reply

    async def get(self, headers: Headers) -> Reply:
        permit = await self._breakers.admit(self._upstream)
        with permit:
            return await self.inner.get(headers)
