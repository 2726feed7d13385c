"""Redis clients: how Leasehold connects, and what it never does.

* No automatic retry anywhere: redis-py repeats a command whose answer was lost, and one RPUSH becomes two entries.
* A worker holds a constant number of connections to each node: one that blocks in its mailbox, one that writes, a few
  for look-ups.
* What of this depends on the form of the deployment is here, in `urls.py`, `connection.py` and `cluster.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, ReadOnlyError, RedisError, ResponseError

from .connection import REDIS_FAILURES, NotConnected, Sentinels, connection_options, forget_places
from .errors import Unavailable
from .urls import Address, Form, RedisUrl

if TYPE_CHECKING:
    from .cluster import Cluster

__all__ = ["REDIS_FAILURES", "NotConnected"]

COMMAND_TIMEOUT_S: Final = 2.0
"""Longest wait for the answer to one command; the connection is dropped after it."""
PATIENCE_S: Final = 0.05
"""What an answer that is overdue gets on top, once the loop runs again: see `overdue`."""
LOOKUP_CONNECTIONS: Final = 4
SCAN_COUNT: Final = 500

Argument = str | bytes | int | float


class RedisClients:
    """Makes the few clients of one worker. `url` may hold credentials and is never printed; raises `RedisUrlError`."""

    def __init__(self, url: str) -> None:
        self._url = RedisUrl.parse(url)
        self.sentinels = Sentinels(self._url) if self._url.form is Form.SENTINEL else None
        self._options = connection_options(self._url, self.sentinels)
        self._cluster: Cluster | None = None
        if self._url.form is Form.CLUSTER:
            from .cluster import Cluster

            self._cluster = Cluster(self._url, self._options)

    def blocking(self) -> Line:
        """One connection for blocking pops: the server ends them; no socket timeout may cut a pop in two."""
        return Line(make_client(self._options, 1)) if self._cluster is None else self._cluster.slot_line()

    def writer(self) -> Line:
        """One connection for pushes; the outbox bounds them with `overdue`, which costs less than a socket timeout.

        Of a cluster, each node has one of its own: see `Cluster.line`.
        """
        return Line(make_client(self._options, 1))

    def lookups(self) -> Redis | Cluster:
        """A few connections for everything else; a caller waits for a free one at most `COMMAND_TIMEOUT_S`."""
        return self._cluster or make_client(self._options, LOOKUP_CONNECTIONS, COMMAND_TIMEOUT_S)

    @property
    def place(self) -> str:
        """Where Redis is, without user or password: for logs and errors."""
        return str(self._url)


def make_client(options: dict[str, Any], connections: int, timeout_s: float | None = None) -> Redis:
    """A client of one node: `connection_options`, with `host` and `port`. `timeout_s`: for the answer to a command."""
    pool = BlockingConnectionPool(
        max_connections=connections, timeout=COMMAND_TIMEOUT_S, socket_timeout=timeout_s, **options
    )
    return Redis.from_pool(pool)


class Line:
    """One connection, held for good, a layer below redis-py's client, which costs four times as much a command.

    One caller at a time. It is made again when it broke, and when the node at its end is a master no more; what was
    under way when it broke raises `REDIS_FAILURES`.
    """

    node = ""
    """The node of a cluster to which it leads."""

    def __init__(self, client: Redis) -> None:
        self._client = client  # knows how to connect: address, credentials, TLS
        self._connection: AbstractConnection | None = None
        self._misplaced = False

    @property
    def address(self) -> Address | None:
        """Of the node at its end, while it is connected by TCP."""
        connection: Any = self._connection
        if connection is None or not connection.is_connected or not hasattr(connection, "port"):
            return None
        return str(connection.host), int(connection.port)

    async def aim(self, key: str) -> None:
        """Lead to the node that has `key`, in a cluster; raises `REDIS_FAILURES`."""

    async def ask(self, *commands: Sequence[Argument]) -> list[Any]:
        """Send commands in one write and read their answers in order; a refusal (`RedisError`) stands in its place."""
        connection = self._connection
        if connection is None:
            connection = self._connection = self._make()
        try:
            if self._misplaced:
                self._misplaced = False
                await connection.disconnect()
            await connection.connect()
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            return [await self._answer(connection) for _ in commands]
        except BaseException:
            # Answers that are still under way would be taken for those of the next commands.
            await connection.disconnect(nowait=True)
            raise

    def _make(self) -> AbstractConnection:
        return self._client.connection_pool.make_connection()

    async def _answer(self, connection: AbstractConnection) -> Any:
        try:
            return await connection.read_response()  # pyright: ignore[reportUnknownVariableType]
        except (ResponseError, BusyLoadingError) as refusal:
            self._misplaced |= isinstance(refusal, ReadOnlyError)
            return refusal

    async def drop(self) -> None:
        """Break the connection; whoever waits on it gets a `ConnectionError`."""
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        await self.drop()
        await self._client.aclose()


async def execute(client: Redis | Line | Cluster, *command: Argument) -> Any:
    """One command; raises `REDIS_FAILURES`."""
    (answer,) = await execute_all(client, [command])
    return answer


async def execute_all(
    client: Redis | Line | Cluster, commands: Sequence[Sequence[Argument]], *, raise_on_error: bool = True
) -> list[Any]:
    """Many commands in one round trip (to each node), no transaction; raises `REDIS_FAILURES`, or returns a refusal in
    its place."""
    answers = await (ask(client, commands) if isinstance(client, Redis) else client.ask(*commands))
    if raise_on_error:
        for answer in answers:
            if isinstance(answer, RedisError):
                raise answer
    return answers


async def ask(client: Redis, commands: Sequence[Sequence[Argument]]) -> list[Any]:
    """`Line.ask` of a client. Answers are as redis-py makes them: HGETALL's a dict."""
    answers: list[Any]
    if len(commands) == 1:
        try:
            answers = [await client.execute_command(*commands[0])]  # pyright: ignore[reportUnknownMemberType]
        except (ResponseError, BusyLoadingError) as refusal:
            answers = [refusal]
    else:
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)  # pyright: ignore[reportUnknownMemberType]
        answers = await pipeline.execute(raise_on_error=False)
    if any(isinstance(answer, ReadOnlyError) for answer in answers):
        await forget_places(client)
    return answers


def parse_info(info: bytes) -> dict[str, str]:
    """The fields of an answer to INFO, as `Line` has it."""
    pairs = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}


def settled_for(server: Mapping[str, Any], replication: Mapping[str, Any]) -> float:
    """Seconds for which a node has certainly been what it is, out of INFO's two sections: 0 for a replica, and for one
    that was promoted (it does not say when)."""
    if replication.get("role") != "master" or str(replication.get("second_repl_offset")) != "-1":
        return 0.0
    return max(0.0, float(server.get("uptime_in_seconds") or 0) - 1)  # whole seconds, and rounded


def alone_since(server: Mapping[str, Any], replication: Mapping[str, Any]) -> float:
    """The node's time, in ms, from which on it has certainly written all that it has itself; infinite for a replica,
    and for one that was promoted. What it had before may be from a file or another node, and overwritten since."""
    if replication.get("role") != "master" or str(replication.get("second_repl_offset")) != "-1":
        return inf
    if "server_time_usec" not in server:
        return inf
    now_s = int(server["server_time_usec"]) // 1_000_000
    # Its uptime is the difference of two times in whole seconds: it may have started up to a second later.
    return (now_s - float(server.get("uptime_in_seconds") or 0) + 1) * 1000


async def scan_hashes(
    client: Redis | Cluster, pattern: str
) -> AsyncGenerator[list[tuple[str, dict[bytes, bytes], int]], None]:
    """Pages of (key, fields, PTTL) of all hashes that match; raises `REDIS_FAILURES`. A key may come twice (SCAN)."""
    for node in [client] if isinstance(client, Redis) else await client.each_node():
        cursor = 0
        while True:
            answer: tuple[bytes | int, list[bytes]] = await execute(
                node, "SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT
            )
            cursor, names = int(answer[0]), answer[1]
            answers = await execute_all(client, [(what, name) for name in names for what in ("HGETALL", "PTTL")])
            yield [
                (name.decode(), fields, ttl_ms)
                for name, fields, ttl_ms in zip(names, answers[::2], answers[1::2], strict=True)
            ]
            if not cursor:
                break


@asynccontextmanager
async def translated(what: str) -> AsyncGenerator[None, None]:
    """Turn what redis-py raises into `Unavailable`, naming what was being done."""
    try:
        yield
    except REDIS_FAILURES as error:
        raise Unavailable(f"{what}: {type(error).__name__}") from error


@asynccontextmanager
async def overdue(limit_s: float) -> AsyncGenerator[None, None]:
    """`asyncio.timeout` for commands. redis-py drops the connection of a command that is cut off, with its answer.

    In two steps, for a loop that was paused (a debugger, a long computation, SIGSTOP) finds both the timer and the
    answer due: the answer is to be read first.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        timer = loop.call_later(limit_s, lambda: timeout.reschedule(loop.time() + PATIENCE_S))
        try:
            yield
        finally:
            timer.cancel()
