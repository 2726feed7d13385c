"""Connections to Redis: redis-py's, taught to say what its own do not.

* Whether a command may have run: "could not connect" is told from "broke after something was sent".
* Where the master is: with Sentinel it is asked for at every connection, and what answers there must say that it is
  one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from .urls import Address, Form, RedisUrl

CONNECT_TIMEOUT_S: Final = 2.0
SENTINEL_TIMEOUT_S: Final = 0.5
"""How long a Sentinel's answer is waited for, where too few others answer."""

REDIS_FAILURES: Final = (RedisError, OSError, TimeoutError)
"""What redis-py raises when Redis cannot be reached or does not do what was asked."""

Locate = Callable[[], Awaitable[Address]]


class NotConnected(RedisConnectionError):
    """Raised by our clients when no connection could be made: nothing of the command was sent."""


def connection_options(url: RedisUrl, sentinels: Sentinels | None) -> dict[str, Any]:
    """For a pool of connections to the Redis nodes of a deployment; in a cluster, to its first one."""
    kind: type[AbstractConnection] = SSLConnection if url.tls else Connection
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        # With RESP3, redis-py 8 listens for maintenance notices, and so hands out idle connections without noticing
        # that they are broken: what is then sent over one is in doubt for no reason.
        "protocol": 2,
        "client_name": "leasehold",
        **url.options,
    }
    if url.form is Form.SOCKET:
        kind = UnixDomainSocketConnection
        options["path"] = url.path
    elif sentinels is not None:
        options["locate"] = sentinels.locate
    else:
        options["host"], options["port"] = url.addresses[0]
    return {"connection_class": _telling(kind), **options}


class Master(NamedTuple):
    """A master as a Sentinel knows it: where, and its run. One node may be known by several addresses."""

    address: Address
    run_id: str


class Sentinels:
    """The Sentinels of a deployment. Asked all at once: one that was cut off may name a master of the past."""

    def __init__(self, url: RedisUrl) -> None:
        self._service = url.service
        self._addresses = url.addresses
        self._options: dict[str, Any] = {
            **url.sentinel_options,
            "ssl": url.tls,
            "socket_timeout": SENTINEL_TIMEOUT_S,
            "socket_connect_timeout": SENTINEL_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[list[Redis], None]:
        """Clients of them all, for as long as the block lasts."""
        clients = [Redis(host=host, port=port, **self._options) for host, port in self._addresses]
        try:
            yield clients
        finally:
            for client in clients:
                await client.aclose()

    async def locate(self) -> Address:
        """Where the master is, of Sentinels to which nothing is connected."""
        async with self.connected() as clients:
            return (await self.master(clients)).address

    async def master(self, clients: Sequence[Redis]) -> Master:
        """The master now: what the latest failover made it, as far as most of them know.

        Raises `NotConnected` when none knows one that is up.
        """
        asking = [asyncio.ensure_future(self._ask(client)) for client in clients]
        found: list[tuple[int, Master]] = []
        heard = 0
        try:
            for answer in asyncio.as_completed(asking):
                try:
                    state = await answer
                except REDIS_FAILURES:
                    continue
                heard += 1
                if state.get("is_master") and not state["is_sdown"] and not state["is_odown"]:
                    known = Master((str(state["ip"]), int(state["port"])), str(state.get("runid", "")))
                    found.append((int(state.get("config-epoch", 0)), known))
                if found and heard > len(asking) // 2:
                    break
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
        if not found:
            raise NotConnected("no Sentinel knows a master that is up")
        return max(found)[1]

    async def _ask(self, client: Redis) -> Mapping[str, Any]:
        """What one knows of the service; nothing if it watches none of that name."""
        masters: Mapping[str, Mapping[str, Any]] = await client.sentinel_masters()  # pyright: ignore
        return masters.get(self._service, {})


@cache
def _telling(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    class TellingConnection(kind):
        def __init__(self, *, locate: Locate | None = None, **options: Any) -> None:
            super().__init__(**options)  # pyright: ignore[reportUnknownMemberType]
            self._locate = locate
            # No CLIENT SETINFO: where it is not known, no ACL can grant it. Names of redis-py 8 and 6.
            self.driver_info = self.lib_name = self.lib_version = None

        @property
        def closed_by_peer(self) -> bool:
            """Whether it was closed, or reset, while nothing was asked."""
            reader = self._reader
            return reader is not None and (reader.at_eof() or reader.exception() is not None)

        async def can_read(self, *args: Any, **options: Any) -> bool:
            # The pool asks whether a connection is as good as new; redis-py does not notice one that was reset.
            return self.closed_by_peer or await super().can_read(*args, **options)

        async def connect(self) -> Any:
            if self.is_connected:
                if not self.closed_by_peer:
                    return
                await self.disconnect(nowait=True)
            try:
                if self._locate is not None:
                    self.host, self.port = await self._locate()
                await super().connect()
                if self._locate is not None:
                    await self._must_be_master()
            except REDIS_FAILURES as error:
                raise NotConnected(f"{type(error).__name__}: {error}") from error

        async def _must_be_master(self) -> None:
            try:
                await self.send_command("ROLE")
                role: Any = await self.read_response()  # pyright: ignore[reportUnknownVariableType]
                if role[0] not in (b"master", "master"):
                    raise NotConnected("the master that the Sentinels name is none")
            except BaseException:
                await self.disconnect(nowait=True)
                raise

        async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
            task = asyncio.current_task()
            asked = task.cancelling() if task else 0
            try:
                await super().send_packed_command(command, check_health)
            except RuntimeError as error:
                # What uvloop raises for a write to a connection that has just closed.
                raise NotConnected(str(error)) from error
            if task and task.cancelling() > asked:
                # redis-py sends by `asyncio.wait_for`, and that of Python 3.11 loses a cancellation that comes just as
                # it ends: whoever waits for the end of the task would wait for ever.
                await self.disconnect(nowait=True)
                raise asyncio.CancelledError

    return TellingConnection


def forget_places(client: Redis) -> Awaitable[None]:
    """Close the idle connections of a client: the node they lead to is a master no more."""
    return client.connection_pool.disconnect(inuse_connections=False)
