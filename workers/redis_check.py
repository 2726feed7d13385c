"""A look at the Redis that was given, before serving begins; and the synchronous client of the supervisor."""

from __future__ import annotations

import logging

import redis

from ..coordinator import RedisClients
from .errors import ServeError

logger = logging.getLogger("leasehold.workers.supervisor")


def _policy(client: redis.Redis) -> str:
    """What it does when memory is short; where CONFIG is not for us (hosted servers), the best."""
    try:
        return client.config_get("maxmemory-policy")["maxmemory-policy"]  # pyright: ignore
    except (redis.ResponseError, KeyError):
        return "noeviction"


def sync_client(url: str, timeout_s: float) -> redis.Redis:
    return redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
    )


def check_redis(url: str) -> None:
    """Look at the Redis that was given, and warn about what will hurt. Serving begins without it, unready."""
    place = RedisClients(url).place
    try:
        with sync_client(url, 2.0) as client:
            version = str(client.info("server")["redis_version"])  # pyright: ignore
            policy = _policy(client)
    except (redis.RedisError, OSError) as error:
        logger.error("redis_unreachable place=%s error=%s: serving 503 until it answers", place, type(error).__name__)  # noqa: TRY400
        return
    if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
        raise ServeError(f"Redis at {place} is {version}; expected 6.2 or newer")
    if policy != "noeviction":
        logger.warning("maxmemory_policy value=%s expected=noeviction: an evicted lease is a false death", policy)
