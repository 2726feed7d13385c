"""The public reference server, streamable HTTP and stdio: tagged echoes come back once, and to who asked."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from acceptance import environments as env
from acceptance.driving import Traffic
from fleet import Fleet, get, run_fleet, run_process, wait_until
from leasehold.pool.sse import events
from mcp import Client
from mcp_http import RawSession

pytestmark = [pytest.mark.anyio, pytest.mark.acceptance, pytest.mark.timeout(180)]

SESSIONS, CALLS, AT_ONCE = 8, 40, 8
EVERYTHING = env.package("@modelcontextprotocol/server-everything", "dist/index.js")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder, port = tmp_path_factory.mktemp("everything"), free_port()
    url = f"http://127.0.0.1:{port}/mcp"
    command = [str(env.node()), str(EVERYTHING)]
    with run_process([*command, "streamableHttp"], folder, {"PORT": str(port)}):
        wait_until(lambda: get(url)[0], "the server does not listen")
        servers = {"http": {"url": url}, "stdio": {"command": command[0], "args": [command[1], "stdio"]}}
        async with run_fleet(folder, servers) as fleet:
            yield fleet


async def echoed(session: RawSession, text: str) -> list[str]:
    """All that the answer to one `echo` holds; the sessions' JSON-RPC ids are the same."""
    answer = await session.call("echo", message=text)
    assert answer.status == 200, answer
    stream = answer.headers["content-type"].startswith("text/event-stream")
    messages = [json.loads(data) for data in (events(answer.body) if stream else [answer.body]) if data]
    return [message["result"]["content"][0]["text"] for message in messages if "method" not in message]


@pytest.mark.parametrize("server", ["http", "stdio"])
async def test_each_echo_is_answered_once_and_to_its_session(fleet: Fleet, server: str) -> None:
    before = await Traffic.of(fleet)

    async def drive(index: int, http: aiohttp.ClientSession) -> None:
        async with RawSession(http, fleet.url(server)) as session:
            for first in range(0, CALLS, AT_ONCE):
                tags = [f"session {index} call {number}" for number in range(first, first + AT_ONCE)]
                answers = await asyncio.gather(*(echoed(session, tag) for tag in tags))
                assert answers == [[f"Echo: {tag}"] for tag in tags]

    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as group:
        for index in range(SESSIONS):
            group.create_task(drive(index, http))
    (await Traffic.of(fleet)).since(before).check_spread()


@pytest.mark.parametrize("server", ["http", "stdio"])
async def test_a_real_client_uses_it(fleet: Fleet, server: str) -> None:
    async def drive(index: int) -> None:
        async with Client(fleet.url(server), mode="legacy") as client:
            assert "echo" in {tool.name for tool in (await client.list_tools()).tools}
            for number in range(10):
                result = await client.call_tool("echo", {"message": f"{index}/{number}"})
                assert result.content[0].text == f"Echo: {index}/{number}"

    async with asyncio.TaskGroup() as group:
        for index in range(SESSIONS):
            group.create_task(drive(index))
