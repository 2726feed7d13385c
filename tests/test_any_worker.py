"""Any worker answers any request: a real client, and answers of the client that come by a third worker."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from acceptance import environments as env
from acceptance.driving import Traffic, check_exactly_once, report
from fleet import EXAMPLES, Fleet, run_example, run_fleet
from leasehold.pool.sse import EventSplitter
from mcp_http import Answer, RawSession

pytestmark = [pytest.mark.anyio, pytest.mark.process, pytest.mark.xdist_group("any_worker")]

SESSIONS, CALLS = 10, 20
FEATURES = 11
SERVERS = pytest.mark.parametrize("server", ["http", "sse", "stdio"])
BY_REAL_CLIENTS = pytest.mark.parametrize(
    "server", ["http", *(pytest.param(name, marks=pytest.mark.acceptance) for name in ("sse", "stdio"))]
)
"""Whole clients take their time: the other transports where minutes count less."""
SSE_SERVER = Path(__file__).parent / "servers" / "counter_sse.py"
PATIENCE_S = 15.0
CAPABILITIES = {"sampling": {}, "elicitation": {}, "roots": {}}
# Who gets which request: the owner has nothing to do with any but the first.
OWNER, LISTENER, CALLER, ANSWERER = range(4)


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any_worker") / "journal"


@pytest.fixture(scope="module")
async def fleet(journal: Path) -> AsyncIterator[Fleet]:
    folder = journal.parent
    with (
        run_example("counter_http.py", folder, "--journal", str(journal)) as upstream,
        run_example(str(SSE_SERVER), folder, "--journal", str(journal)) as sse,
    ):
        stdio = [str(EXAMPLES / "counter_stdio.py"), "--journal", str(journal)]
        servers = {
            "http": {"url": upstream.url},
            "sse": {"type": "sse", "url": sse.url.replace("/mcp", "/sse")},
            "stdio": {"command": sys.executable, "args": stdio},
        }
        async with run_fleet(folder, servers) as fleet:
            yield fleet


@BY_REAL_CLIENTS
async def test_every_call_of_a_real_client_is_executed_once_and_in_order(
    fleet: Fleet, journal: Path, server: str
) -> None:
    before = await Traffic.of(fleet)
    tag = f"count-{server}"
    load = ["--sessions", str(SESSIONS), "--calls", str(CALLS), "--tag", tag]
    command = [env.PYTHON_DEV, env.client("mcp_client.py"), "--url", fleet.url(server), *load]
    assert (await report(command, timeout_s=60))["errors"] == []
    check_exactly_once(journal, tag, sessions=SESSIONS, calls=CALLS)
    (await Traffic.of(fleet)).since(before).check_spread()


@BY_REAL_CLIENTS
async def test_every_feature_of_a_session_works(fleet: Fleet, server: str) -> None:
    command = [env.PYTHON_DEV, env.client("features.py"), "--url", fleet.url(server), "--at-once", "3"]
    done = await report(command, timeout_s=60)
    assert done["errors"] == {}
    assert len(done["passed"]) == FEATURES


class CapableSession(RawSession):
    """One whose client can be asked for something."""

    async def request(self, method: str, params: dict[str, Any] | None = None) -> Answer:
        if method == "initialize":
            params = {**(params or {}), "capabilities": CAPABILITIES}
        return await super().request(method, params)


class Stream:
    """The messages of one event stream, one after the other."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._splitter = EventSplitter(1 << 20)
        self._messages: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while not self._messages:
                chunk = await self._response.content.readany()
                assert chunk, "the stream ended early"
                self._messages += [orjson.loads(data) for data in self._splitter.feed(chunk) if data]
        return self._messages.pop(0)

    async def next_of(self, method: str) -> dict[str, Any]:
        while (message := await self.next()).get("method") != method:
            pass
        return message


@asynccontextmanager
async def spread_session(fleet: Fleet, server: str) -> AsyncIterator[RawSession]:
    """A session that the first worker owns."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        async with CapableSession(http, fleet.worker_url(OWNER, server)) as session:
            yield session


@asynccontextmanager
async def listening(fleet: Fleet, server: str, session: RawSession) -> AsyncIterator[Stream]:
    """The GET stream, at a worker that is not the owner."""
    async with session.http.get(fleet.worker_url(LISTENER, server), headers=session.headers) as response:
        assert response.status == 200
        yield Stream(response)


@asynccontextmanager
async def calling(fleet: Fleet, server: str, session: RawSession, tool: str, **arguments: Any) -> AsyncIterator[Stream]:
    """A tool's call, at a worker that neither owns nor listens; its id is "call"."""
    params = {"name": tool, "arguments": arguments}
    body = orjson.dumps({"jsonrpc": "2.0", "id": "call", "method": "tools/call", "params": params})
    url = fleet.worker_url(CALLER, server)
    async with session.http.post(url, data=body, headers=session.headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


async def answer(fleet: Fleet, server: str, session: RawSession, request: dict[str, Any], result: Any) -> None:
    """The client's answer to the server, at a worker that has seen nothing of the session."""
    session.url = fleet.worker_url(ANSWERER, server)
    accepted = await session.post({"jsonrpc": "2.0", "id": request["id"], "result": result})
    assert accepted.status == 202


def text(response: dict[str, Any]) -> str:
    assert response["id"] == "call"
    return response["result"]["content"][0]["text"]


@SERVERS
async def test_sampling_is_answered_by_a_third_worker(fleet: Fleet, server: str) -> None:
    async with (
        spread_session(fleet, server) as session,
        calling(fleet, server, session, "ask_sampling", prompt="one") as call,
    ):
        request = await call.next_of("sampling/createMessage")
        reply = {"role": "assistant", "content": {"type": "text", "text": "two"}, "model": "test"}
        await answer(fleet, server, session, request, reply)
        assert text(await call.next()) == "sampled: two"


@SERVERS
async def test_elicitation_is_answered_by_a_third_worker(fleet: Fleet, server: str) -> None:
    async with (
        spread_session(fleet, server) as session,
        calling(fleet, server, session, "ask_elicitation", message="name?") as call,
    ):
        request = await call.next_of("elicitation/create")
        await answer(fleet, server, session, request, {"action": "accept", "content": {"answer": "Ada"}})
        assert text(await call.next()) == "accept: Ada"


async def test_a_request_on_the_get_stream_is_answered_by_a_fourth_worker(fleet: Fleet) -> None:
    """Owner, listener, caller and answerer are four workers."""
    async with (
        spread_session(fleet, "http") as session,
        listening(fleet, "http", session) as stream,
        calling(fleet, "http", session, "list_roots", standalone=True) as call,
    ):
        request = await stream.next_of("roots/list")
        await answer(fleet, "http", session, request, {"roots": [{"uri": "file:///somewhere"}]})
        assert text(await call.next()) == "file:///somewhere"


@SERVERS
async def test_a_notification_reaches_the_get_stream_at_another_worker(fleet: Fleet, server: str) -> None:
    async with spread_session(fleet, server) as session, listening(fleet, server, session) as stream:
        session.url = fleet.worker_url(CALLER, server)
        for tag in ("first", "second"):
            assert (await session.call("notify_later", seconds=0.1, tag=tag)).text == "scheduled"
            assert (await stream.next_of("notifications/message"))["params"]["data"] == tag


@SERVERS
async def test_a_cancellation_by_a_third_worker_ends_the_call(fleet: Fleet, server: str) -> None:
    async with spread_session(fleet, server) as session:
        params = {"name": "wait_cancel", "arguments": {"tag": "third"}}
        body = {"jsonrpc": "2.0", "id": "call", "method": "tools/call", "params": params}
        session.url = fleet.worker_url(CALLER, server)
        waiting = asyncio.create_task(session.post(body))
        await asyncio.sleep(0.3)
        session.url = fleet.worker_url(ANSWERER, server)
        cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "call"}}
        assert (await session.post(cancel)).status == 202
        async with asyncio.timeout(PATIENCE_S):
            ended = await waiting
            assert (ended.status, ended.error["code"]) == (200, -32800)
            assert ended.headers["content-type"].startswith("text/event-stream")
            while (await session.call("was_cancelled", tag="third")).text != "true":
                await asyncio.sleep(0.05)


@SERVERS
async def test_a_session_that_one_worker_deletes_is_gone_for_all(fleet: Fleet, server: str) -> None:
    async with spread_session(fleet, server) as session:
        session.url = fleet.worker_url(CALLER, server)
        assert await session.delete() == 200
        for worker in range(4):
            session.url = fleet.worker_url(worker, server)
            assert (await session.request("ping")).status == 404
