"""Telling an upstream that one of its sessions has ended: a DELETE, as the last holder would send it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from .errors import PoolError
from .link import Headers, Link

logger = logging.getLogger("leasehold.pool.session")

SOON_S: Final = 1.0
"""How long a server that does not answer is told for. Its session counts towards the limits meanwhile."""
ENDED: Final = frozenset({404, 405})
"""Answers that are as good as a success: there is no such session (any more), or the server ends them itself."""

Farewell = Callable[[Link], tuple[Link, Headers]]
"""The way to the upstream for its last message, and the headers of that. May raise whatever getting credentials
raises."""


def as_nobody(link: Link) -> tuple[Link, Headers]:
    """Without credentials."""
    return link, []


async def end_upstream(link: Link, farewell: Farewell, upstream: str) -> None:
    """Tell it. Raises nothing that the upstream or its credentials are to blame for."""
    resume = link.resume
    if resume is None:  # it has no id by which it could be told; a child process ends with its link
        return
    version = [(b"mcp-protocol-version", resume.protocol_version.encode())] if resume.protocol_version else []
    try:
        way, headers = farewell(link)
        reply = await way.delete([*version, *headers])
        await reply.chunks.aclose()
    except PoolError as error:
        logger.info("upstream_not_told upstream=%s error=%s", upstream, type(error).__name__)
        return
    except ValueError:  # headers that cannot be sent; what they are is nobody's business
        logger.warning("upstream_not_told upstream=%s error=ValueError", upstream)
        return
    if not 200 <= reply.status < 300 and reply.status not in ENDED:
        logger.warning("upstream_not_told upstream=%s status=%d", upstream, reply.status)


async def end_soon(link: Link, farewell: Farewell, upstream: str) -> None:
    """`end_upstream` for one that did not answer when it was asked last."""
    try:
        async with asyncio.timeout(SOON_S):
            await end_upstream(link, farewell, upstream)
    except TimeoutError:
        logger.info("upstream_not_told upstream=%s error=TimeoutError", upstream)
