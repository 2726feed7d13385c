"""Redis clients: how Leasehold connects, and what it never does.

* No automatic retry anywhere: redis-py repeats a command whose answer was lost, and one RPUSH becomes two entries.
* A worker holds a constant number of connections: one that blocks in its mailbox, one that writes, a few for look-ups.
* The maker is the one place that knows the form of the deployment (one server today; Sentinel and Cluster fit in here).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from .errors import Unavailable

COMMAND_TIMEOUT_S: Final = 2.0
"""Longest wait for the answer to one command; the connection is dropped after it."""
CONNECT_TIMEOUT_S: Final = 2.0
LOOKUP_CONNECTIONS: Final = 4

REDIS_FAILURES: Final = (RedisError, OSError, TimeoutError)
"""What redis-py raises when Redis cannot be reached or does not do what was asked."""


class RedisClients:
    """Makes the few clients of one worker. `url` may hold credentials and is never printed."""

    def __init__(self, url: str) -> None:
        self._url = url

    def blocking(self) -> Redis:
        """One connection for blocking pops: the server ends them; no socket timeout may cut a pop in two."""
        return self._make(connections=1, timeout_s=None)

    def writer(self) -> Redis:
        """One connection for pushes."""
        return self._make(connections=1, timeout_s=COMMAND_TIMEOUT_S)

    def lookups(self) -> Redis:
        """A few connections for everything else; a caller waits for a free one at most `COMMAND_TIMEOUT_S`."""
        return self._make(connections=LOOKUP_CONNECTIONS, timeout_s=COMMAND_TIMEOUT_S)

    def _make(self, connections: int, timeout_s: float | None) -> Redis:
        pool = BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType]
            self._url,
            max_connections=connections,
            timeout=COMMAND_TIMEOUT_S,
            socket_timeout=timeout_s,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            client_name="leasehold",
        )
        return Redis.from_pool(pool)

    @property
    def place(self) -> str:
        """Where Redis is, without user or password: for logs and errors."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.path if parts.scheme == 'unix' else f'{parts.hostname}:{parts.port or 6379}'}"


@asynccontextmanager
async def translated(what: str) -> AsyncGenerator[None, None]:
    """Turn what redis-py raises into `Unavailable`, naming what was being done."""
    try:
        yield
    except REDIS_FAILURES as error:
        raise Unavailable(f"{what}: {type(error).__name__}") from error
