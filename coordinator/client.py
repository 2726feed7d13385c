"""Redis clients: how Leasehold connects, and what it never does.

* No automatic retry anywhere: redis-py repeats a command whose answer was lost, and one RPUSH becomes two entries.
* A worker holds a constant number of connections: one that blocks in its mailbox, one that writes, a few for look-ups.
* The maker is the one place that knows the form of the deployment (one server today; Sentinel and Cluster fit in here).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from .errors import Unavailable

COMMAND_TIMEOUT_S: Final = 2.0
"""Longest wait for the answer to one command; the connection is dropped after it."""
PATIENCE_S: Final = 0.05
"""What an answer that is overdue gets on top, once the loop runs again: see `overdue`."""
CONNECT_TIMEOUT_S: Final = 2.0
LOOKUP_CONNECTIONS: Final = 4
SCAN_COUNT: Final = 500

REDIS_FAILURES: Final = (RedisError, OSError, TimeoutError)
"""What redis-py raises when Redis cannot be reached or does not do what was asked."""

Argument = str | bytes | int | float


class NotConnected(RedisConnectionError):
    """Raised by our clients when no connection could be made: nothing of the command was sent."""


class RedisClients:
    """Makes the few clients of one worker. `url` may hold credentials and is never printed."""

    def __init__(self, url: str) -> None:
        self._url = url

    def blocking(self) -> Line:
        """One connection for blocking pops: the server ends them; no socket timeout may cut a pop in two."""
        return Line(self._make(connections=1, timeout_s=None))

    def writer(self) -> Line:
        """One connection for pushes; the outbox bounds them with `overdue`, which costs less than a socket timeout."""
        return Line(self._make(connections=1, timeout_s=None))

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
            # With RESP3, redis-py 8 listens for maintenance notices, and so hands out idle connections without noticing
            # that they are broken: what is then sent over one is in doubt for no reason.
            protocol=2,
            client_name="leasehold",
        )
        pool.connection_class = _telling(pool.connection_class)
        return Redis.from_pool(pool)

    @property
    def place(self) -> str:
        """Where Redis is, without user or password: for logs and errors."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.path if parts.scheme == 'unix' else f'{parts.hostname}:{parts.port or 6379}'}"


class Line:
    """One connection, held for good, a layer below redis-py's client, which costs four times as much a command.

    One caller at a time. It is made again when it broke; what was under way then raises `REDIS_FAILURES`.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client  # knows how to connect: address, credentials, TLS
        self._connection: AbstractConnection | None = None

    async def ask(self, *commands: Sequence[Argument]) -> list[Any]:
        """Send commands in one write and read their answers in order; a refusal (`ResponseError`) stands in its
        place."""
        connection = self._connection
        if connection is None:
            connection = self._connection = self._client.connection_pool.make_connection()
        try:
            if getattr(connection, "closed_by_peer", False):
                await connection.disconnect()
            await connection.connect()
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            return [await _answer(connection) for _ in commands]
        except BaseException:
            # Answers that are still under way would be taken for those of the next commands.
            await connection.disconnect(nowait=True)
            raise

    async def drop(self) -> None:
        """Break the connection; whoever waits on it gets a `ConnectionError`."""
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        await self.drop()
        await self._client.aclose()


async def _answer(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()  # pyright: ignore[reportUnknownVariableType]
    except ResponseError as refusal:
        return refusal


async def execute(client: Redis | Line, *command: Argument) -> Any:
    """One command; raises `REDIS_FAILURES`."""
    if isinstance(client, Line):
        (answer,) = await client.ask(command)
        if isinstance(answer, ResponseError):
            raise answer
        return answer
    return await client.execute_command(*command)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


async def execute_all(
    client: Redis | Line, commands: Sequence[Sequence[Argument]], *, raise_on_error: bool = True
) -> list[Any]:
    """Many commands in one round trip, no transaction; raises `REDIS_FAILURES`, or returns a refusal in its place."""
    if isinstance(client, Line):
        answers = await client.ask(*commands)
        refusals = [answer for answer in answers if isinstance(answer, ResponseError)]
        if raise_on_error and refusals:
            raise refusals[0]
        return answers
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)  # pyright: ignore[reportUnknownMemberType]
    return await pipeline.execute(raise_on_error=raise_on_error)


def run_id(info: bytes) -> str:
    """The node's name for this run of its, out of the answer to INFO."""
    return _field(info, b"run_id")


def settled_for(server: bytes, replication: bytes) -> float:
    """Seconds for which a node has certainly been what it is, out of INFO's two sections: 0 for a replica, and for one
    that was promoted (it does not say when)."""
    if _field(replication, b"role") != "master" or _field(replication, b"second_repl_offset") != "-1":
        return 0.0
    return max(0.0, float(_field(server, b"uptime_in_seconds") or 0) - 1)  # whole seconds, and rounded


def _field(info: bytes, name: bytes) -> str:
    return (b"\r\n" + info).partition(b"\r\n" + name + b":")[2].partition(b"\r\n")[0].decode()


async def scan_hashes(client: Redis, pattern: str) -> AsyncGenerator[list[tuple[str, dict[bytes, bytes], int]], None]:
    """Pages of (key, fields, PTTL) of all hashes that match; raises `REDIS_FAILURES`. A key may come twice (SCAN)."""
    cursor = 0
    while True:
        answer: tuple[bytes | int, list[bytes]] = await execute(
            client, "SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT
        )
        cursor, names = int(answer[0]), answer[1]
        answers = await execute_all(client, [(what, name) for name in names for what in ("HGETALL", "PTTL")])
        yield [
            (name.decode(), fields, ttl_ms)
            for name, fields, ttl_ms in zip(names, answers[::2], answers[1::2], strict=True)
        ]
        if not cursor:
            return


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


@cache
def _telling(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """A connection class that tells "could not connect" from "broke after something was sent": redis-py does not."""

    class TellingConnection(kind):
        @property
        def closed_by_peer(self) -> bool:
            """Whether the server has closed it while nothing was asked."""
            reader = self._reader
            return reader is not None and reader.at_eof()

        async def connect(self) -> Any:
            try:
                return await super().connect()
            except REDIS_FAILURES as error:
                raise NotConnected(f"{type(error).__name__}: {error}") from error

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
