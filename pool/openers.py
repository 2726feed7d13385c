"""Opening links: one for each kind of target, over the HTTP client that all of them share."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .borrowing import number_of
from .breaker import TRANSPORT_FAILURES
from .breakers import Breakers
from .errors import OpenFailed, UpstreamRefused
from .guarded_link import GuardedLink
from .handshake import initialize
from .http_link import HttpClients, HttpLink
from .link import Fence, Headers, Link, ResumeRecord, unfenced
from .sse_link import SseLink
from .stdio_link import StdioLink
from .upstream import HttpTarget, StdioTarget, Upstream

if TYPE_CHECKING:
    import httpx2

    from .auth_client import AuthClients


T = TypeVar("T")

DENIED: Final = (401, 403)
MAX_UPSTREAMS: Final = 1000
"""Of which tokens and a link without a session are kept."""
HANDSHAKE_TIMEOUT_S: Final = 28.0
"""Less than what opening may take in all, so that it is known what took so long."""


class LinkOpener:
    """Opens the links of one pool."""

    def __init__(self, breakers: Breakers) -> None:
        self._breakers = breakers
        self._clients = HttpClients()
        self._auth_clients: AuthClients | None = None
        # By identity: an upstream of the same name may be another server, or have other credentials.
        self._auths: OrderedDict[str, httpx2.Auth] = OrderedDict()
        self._stateless: OrderedDict[str, Link] = OrderedDict()
        self._events = count(1)

    async def open(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> GuardedLink:
        """A link of its own for a new session, or for one that goes on. Raises `OpenFailed` and `CircuitOpen`."""
        link = await self._open(upstream, fence, resume)
        # A process or stream that dies under a hundred calls has failed once; HTTP calls fail each for itself.
        event = None if isinstance(upstream.target, HttpTarget) else next(self._events)
        return GuardedLink(link, self._breakers, upstream.name, event=event)

    async def initialize(
        self,
        link: Link,
        upstream: Upstream,
        principal: str,
        params: dict[str, Any],
        headers: Headers,
        auth: httpx2.Auth | None = None,
    ) -> dict[str, Any]:
        """Initialize a session that the pool opens for itself. Credentials that are refused again and again count for
        who presents them, not for the upstream. Raises `OpenFailed` and `CircuitOpen`."""
        permit = await self._breakers.admit_opening(upstream.name, principal, _fingerprint(upstream, headers, auth))
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                result = await initialize(link, params, headers)
        except TimeoutError:
            permit.failed()
            raise OpenFailed(f"the upstream did not answer the handshake within {HANDSHAKE_TIMEOUT_S:g} s") from None
        except OpenFailed as error:
            cause = error.__cause__
            if isinstance(cause, UpstreamRefused) and cause.status in DENIED:
                permit.denied()
            elif isinstance(cause, UpstreamRefused):
                permit.abandoned()
            else:
                permit.failed()
            raise
        except BaseException:
            permit.abandoned()
            raise
        permit.succeeded()
        return result

    async def _open(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        target = upstream.target
        if isinstance(target, StdioTarget):
            permit = await self._breakers.admit(upstream.name)
            try:
                link = await StdioLink.open(
                    target.command,
                    target.args,
                    target.env,
                    target.cwd,
                    name=upstream.name,
                    fence=fence,
                    call_timeout=upstream.call_timeout_s,
                )
            except TRANSPORT_FAILURES:
                permit.failed()
                raise
            except BaseException:
                permit.abandoned()
                raise
            permit.abandoned()  # a process that starts has not answered yet
            return link
        if upstream.oauth is not None and upstream.identity not in self._auths:
            await asyncio.to_thread(self._auth_of, upstream)  # what it imports takes long
        if isinstance(target, HttpTarget):
            return self._authorized(upstream, target.url, self._http_link(upstream, target, fence, resume))
        link = SseLink(
            self._clients,
            target,
            name=upstream.name,
            call_timeout_s=upstream.call_timeout_s,
            fence=fence,
            forward_headers=upstream.forward_headers,
        )
        return self._authorized(upstream, target.url, link)

    def stateless(self, upstream: Upstream) -> Link | None:
        """The link for requests that belong to no session; None where the upstream has no such thing (stdio, SSE)."""
        target = upstream.target
        if not isinstance(target, HttpTarget):
            return None
        link = self._stateless.get(upstream.identity)
        if link is None:
            made = self._authorized(
                upstream, target.url, self._http_link(upstream, target, unfenced, None, stateless=True)
            )
            link = GuardedLink(made, self._breakers, upstream.name)
            _remember(self._stateless, upstream.identity, link)
        return link

    def authorized(self, link: Link, url: str, auth: httpx2.Auth) -> Link:
        """A link whose every request goes through an authentication flow."""
        from .auth import AuthorizedLink
        from .auth_client import AuthClients

        if self._auth_clients is None:
            self._auth_clients = AuthClients()
        return AuthorizedLink(link, url, auth, self._auth_clients)

    async def aclose(self) -> None:
        """Close what the links shared."""
        await self._clients.aclose()
        if self._auth_clients is not None:
            await self._auth_clients.aclose()

    def _http_link(
        self,
        upstream: Upstream,
        target: HttpTarget,
        fence: Fence,
        resume: ResumeRecord | None,
        *,
        stateless: bool = False,
    ) -> HttpLink:
        return HttpLink(
            self._clients,
            target,
            call_timeout_s=upstream.call_timeout_s,
            fence=fence,
            forward_headers=upstream.forward_headers,
            resume=resume,
            stateless=stateless,
        )

    def _authorized(self, upstream: Upstream, url: str, link: Link) -> Link:
        return link if upstream.oauth is None else self.authorized(link, url, self._auth_of(upstream))

    def _auth_of(self, upstream: Upstream) -> httpx2.Auth:
        auth = self._auths.get(upstream.identity)
        if auth is None:
            from .auth import authorization

            made = authorization(upstream)
            assert made is not None
            auth = _remember(self._auths, upstream.identity, made)
        return auth


def _fingerprint(upstream: Upstream, headers: Headers, auth: httpx2.Auth | None) -> str:
    """Tells credentials apart without showing them."""
    return sha256(repr((upstream.identity, headers, number_of(auth))).encode()).hexdigest()[:16]


def _remember(known: OrderedDict[str, T], identity: str, made: T) -> T:
    """What is known of an upstream, from now on: the oldest one makes room for one too many. Who uses that keeps it."""
    found = known.setdefault(identity, made)
    if len(known) > MAX_UPSTREAMS:
        known.popitem(last=False)
    return found
