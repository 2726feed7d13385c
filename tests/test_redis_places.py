"""Where Redis is, when those that are asked do not agree: one that was cut off has news of yesterday."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from leasehold.coordinator import Cluster, RedisClients
from leasehold.coordinator.client import execute
from leasehold.coordinator.connection import NotConnected, Sentinels
from leasehold.coordinator.urls import RedisUrl
from redis.exceptions import ConnectionError as RedisConnectionError

pytestmark = pytest.mark.anyio

OLD, NEW = ("127.0.0.1", 7001), ("127.0.0.1", 7002)


class Told(Sentinels):
    """Sentinels that say what a test has them say, each after a while: (seconds, state, or None for no answer)."""

    def __init__(self, *said: tuple[float, dict[str, Any] | None]) -> None:
        super().__init__(RedisUrl.parse("redis+sentinel://a,b,c/main"))
        self.said = said

    async def _ask(self, client: Any) -> dict[str, Any]:
        delay_s, state = self.said[client]
        await asyncio.sleep(delay_s)
        if state is None:
            raise RedisConnectionError("gone")
        return state

    async def found(self) -> tuple[str, int]:
        clients: Any = range(len(self.said))
        return (await self.master(clients)).address


def state(address: tuple[str, int], epoch: int, *, down: bool = False) -> dict[str, Any]:
    where = {"ip": address[0], "port": address[1], "config-epoch": epoch}
    return {**where, "is_master": True, "is_sdown": down, "is_odown": False}


class TestSentinels:
    async def test_the_master_of_the_latest_failover_is_taken_whoever_answers_first(self) -> None:
        assert await Told((0, state(OLD, 1)), (0.02, state(NEW, 2)), (60, None)).found() == NEW
        assert await Told((0, state(NEW, 2)), (0.02, state(OLD, 1)), (60, None)).found() == NEW

    async def test_one_alone_is_believed_when_the_others_do_not_answer(self) -> None:
        assert await Told((0, None), (0.02, state(NEW, 2)), (0.01, None)).found() == NEW

    async def test_a_master_that_is_down_is_none(self) -> None:
        assert await Told((0, state(OLD, 1, down=True)), (0, {}), (0.01, state(NEW, 2))).found() == NEW
        for said in (state(OLD, 1, down=True), {}, None):
            with pytest.raises(NotConnected):
                await Told((0, said), (0, said), (0, said)).found()


class Node:
    """One that lets everybody in, and says what it knows of who has the slots of a cluster of one master."""

    def __init__(self, owner: tuple[str, int], epochs: dict[str, int]) -> None:
        self.owner = owner
        self.epochs = epochs
        self.asked = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.owner
        name = next(name for name in self.epochs if name.endswith(str(port)))
        slots = f"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n${len(host)}\r\n{host}\r\n:{port}\r\n${len(name)}\r\n{name}\r\n"
        nodes = "".join(f"{n} 127.0.0.1:1@2 master - 0 0 {epoch} connected\n" for n, epoch in self.epochs.items())
        while asked := await reader.read(65536):
            if b"SETNAME" in asked:
                writer.write(b"+OK\r\n")
            if b"SLOTS" in asked:
                self.asked += 1
                writer.write(f"{slots}${len(nodes)}\r\n{nodes}\r\n".encode())
        writer.close()


@asynccontextmanager
async def serving(*nodes: Node) -> AsyncGenerator[str]:
    servers = [await asyncio.start_server(node.serve, "127.0.0.1", 0) for node in nodes]
    try:
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{s.sockets[0].getsockname()[1]}" for s in servers)
    finally:
        for server in servers:
            server.close()


async def learned(cluster: Cluster) -> str:
    cluster.doubt()
    await cluster.learn()
    await asyncio.sleep(0.06)  # it is not asked for more often
    return cluster.node_of("any")


async def test_an_idle_connection_that_was_reset_is_made_again_before_anything_is_sent() -> None:
    """A reset is not the end of a stream: redis-py would send over it, and what was sent would be in doubt."""
    open_now: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.append(writer)
        try:
            while asked := await reader.read(65536):
                writer.write(b"+OK\r\n" if b"SETNAME" in asked else b"+PONG\r\n")
        finally:
            writer.close()

    def reset_all() -> None:
        while open_now:
            writer = open_now.pop()
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        clients = RedisClients(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        line, lookups = clients.writer(), clients.lookups()
        for _ in range(3):
            assert await execute(line, "PING")
            assert await execute(lookups, "ECHO", "x") == b"PONG"
            reset_all()
            await asyncio.sleep(0.05)
        await line.aclose()
        await lookups.aclose()


class TestCluster:
    async def test_a_node_with_an_old_map_changes_nothing_that_another_knew_better(self) -> None:
        node = Node(NEW, {"id-7001": 1, "id-7002": 2})
        async with serving(node) as url, RedisClients(url).lookups() as client:
            assert isinstance(client, Cluster)
            assert await learned(client) == "127.0.0.1:7002"
            version = client.version
            node.owner, node.epochs = OLD, {"id-7001": 1, "id-7002": 0}  # as if another one answered
            for _ in range(3):
                assert await learned(client) == "127.0.0.1:7002"
            assert client.version == version, "and nothing seems to have been gained"

    async def test_a_later_failover_and_a_cluster_made_anew_are_believed(self) -> None:
        node = Node(NEW, {"id-7001": 1, "id-7002": 2})
        async with serving(node) as url, RedisClients(url).lookups() as client:
            assert isinstance(client, Cluster)
            assert await learned(client) == "127.0.0.1:7002"
            node.owner, node.epochs = OLD, {"id-7001": 3, "id-7002": 2}
            assert await learned(client) == "127.0.0.1:7001"
            assert set(client.gained) == {"127.0.0.1:7001"}
            node.owner, node.epochs = NEW, {"other-7002": 1}
            assert await learned(client) == "127.0.0.1:7002"

    async def test_without_any_node_it_is_a_typed_error(self) -> None:
        async with RedisClients("redis+cluster://127.0.0.1:1,127.0.0.1:2").lookups() as client:
            assert isinstance(client, Cluster)
            with pytest.raises(NotConnected):
                await client.learn()
            assert client.node_of("any") == ""
