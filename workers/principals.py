"""Principals that are more than a credential: those that an authenticating proxy names, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

from ..coordinator import Keyring
from .answers import Refused
from .asgi import Scope
from .door import all_of, unauthorized
from .identity import Identity
from .settings import Settings

logger = logging.getLogger("leasehold.workers.principals")

LOOPBACK: Final = ("127.0.0.0/8", "::1")
MARK: Final = b"\0header\0"
"""In front of what the caller is known by: no credential begins like this, so that the two kinds never meet."""


class TrustedHeader:
    """Callers by a header that a proxy sets, which has checked who they are. Whoever else sends it is refused."""

    def __init__(self, name: str, proxies: Iterable[str]) -> None:
        """`proxies`: addresses and networks of the peers that may set it; none: loopback."""
        self._name = name.encode()
        self._proxies = [ip_network(proxy) for proxy in tuple(proxies) or LOOPBACK]
        self._is_proxy = lru_cache(maxsize=1024)(self._find)

    async def bound(self, scope: Scope) -> bytes:
        """Raises `Refused`: 403 for a peer that is no such proxy and sends the header, 400 for several, 401 for
        none."""
        values = all_of(scope["headers"], self._name)
        peer = _peer(scope)
        if peer is None or not self._is_proxy(peer):
            if values:
                raise Refused(403, "Forbidden: this peer is no trusted proxy and may not name the principal")
            raise unauthorized("requests have to come through the authenticating proxy")
        if len(values) > 1:
            raise Refused(400, "Bad request: the proxy names more than one principal")
        if not values or not values[0]:
            raise unauthorized("the proxy names no principal")
        return MARK + self._name + b"\0" + values[0]

    async def run(self) -> None:
        return

    def _find(self, peer: str) -> bool:
        try:
            address = ip_address(peer)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # a socket of both families
        found = any(address in network for network in self._proxies)
        if not found:
            logger.warning("untrusted_peer peer=%s: requests from there get 401, or 403 if they name a principal", peer)
        return found


def _peer(scope: Scope) -> str | None:
    """The address that a request comes from: of a unix socket, this machine's; None when it is not known.

    A TCP peer that has left by now has no address either: only what the socket itself is says that it is a local one.
    """
    client, server = scope.get("client"), scope.get("server")
    if client is not None:
        return client[0]
    return "127.0.0.1" if server is not None and server[1] is None else None


def make_identity(settings: Settings, keyring: Keyring) -> Identity:
    """Who calls, by what the settings say. Called in worker processes only."""
    if settings.principal_header is not None:
        return Identity(keyring, TrustedHeader(settings.principal_header, settings.trusted_proxies))
    if settings.verifies_tokens:
        from .tokens import make_source  # PyJWT, for those who need it

        return Identity(keyring, make_source(settings))
    return Identity(keyring)
