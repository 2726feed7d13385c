"""What the supervisor asks of Redis itself: a look at what was given, before serving begins, and the end of leases.

Each is a short event loop of its own, over by the time of the next fork.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..coordinator import Cluster, Keys, RedisClients, end_lease
from ..coordinator.client import REDIS_FAILURES, execute, execute_all
from .errors import ServeError

logger = logging.getLogger("leasehold.workers.supervisor")

OLDEST = (6, 2)


def check_redis(url: str) -> None:
    """Look at the Redis that was given, each node of it, and warn about what will hurt. Serving begins without it,
    unready. Raises `ServeError`."""
    place = RedisClients(url).place
    try:
        found = asyncio.run(_look(url))
    except REDIS_FAILURES as error:
        logger.error("redis_unreachable place=%s error=%s: serving 503 until it answers", place, type(error).__name__)  # noqa: TRY400
        return
    for node, version, policy in found:
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise ServeError(f"Redis at {node or place} is {version}; expected {OLDEST[0]}.{OLDEST[1]} or newer")
        if policy != "noeviction":
            logger.warning(
                "maxmemory_policy place=%s value=%s expected=noeviction: an evicted lease is a false death",
                node or place,
                policy,
            )


def end_leases(url: str, namespace: str, incarnations: Sequence[str], timeout_s: float) -> None:
    """Leave word that these workers have ended. Raises `REDIS_FAILURES`."""
    asyncio.run(_end(url, Keys(namespace), incarnations, timeout_s))


async def _look(url: str) -> list[tuple[str, str, str]]:
    """(node, version, maxmemory-policy) of each master; no name where there is one."""
    async with RedisClients(url).lookups() as client:
        if isinstance(client, Cluster):
            await client.learn()
            return [(node, *await _about(client.client(node))) for node in client.masters]
        return [("", *await _about(client))]


async def _about(client: Redis) -> tuple[str, str]:
    info: dict[str, Any] = await execute(client, "INFO", "server")
    try:
        policy: dict[str, str] = await execute(client, "CONFIG GET", "maxmemory-policy")
    except ResponseError:  # not for us, on hosted servers: then the best
        policy = {}
    return str(info["redis_version"]), str(policy.get("maxmemory-policy", "noeviction"))


async def _end(url: str, keys: Keys, incarnations: Sequence[str], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s), RedisClients(url).lookups() as client:
        await execute_all(client, [command for name in incarnations for command in end_lease(keys, name)])
