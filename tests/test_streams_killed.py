"""Owners that are killed, or stopped, under open streams: real processes, and the SDK's servers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from fleet import EXAMPLES, Fleet, run_example, run_fleet
from leasehold.pool.sse import EventSplitter, event_data, event_id
from mcp_http import RawSession
from test_owner_death import kill

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.process,
    pytest.mark.acceptance,
    pytest.mark.xdist_group("streams_killed"),
]

LEASE_S = 1.0
GRACE_S = 1
PATIENCE_S = 15.0
RESUMABLE = Path(__file__).parent / "servers" / "counter_resumable.py"
KILLED, STOPPED, EDGE, ELSEWHERE = range(4)
"""The fleet's workers. Two own the sessions, and end; clients listen and call at the third one."""


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("streams_killed")
    journal = ["--journal", str(folder / "journal")]
    with (
        run_example("counter_http.py", folder, *journal) as plain,
        run_example(str(RESUMABLE), folder, *journal) as resumable,
    ):
        servers = {
            "plain": {"url": plain.url},
            "shared": {"url": plain.url, "leasehold": {"affinity": "principal"}},
            "resumable": {"url": resumable.url},
            "stdio": {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]},
        }
        env = {"LEASEHOLD_LEASE_TTL_MS": str(int(LEASE_S * 1000)), "LEASEHOLD_SHUTDOWN_GRACE_S": str(GRACE_S)}
        async with run_fleet(folder, servers, workers=4, env=env) as fleet:
            yield fleet


Death = Callable[[], Awaitable[None]]
"""Returns when the owner has been killed, which is when everybody waits for it."""


class Stream:
    """An event stream as a client reads it: (id, message) of each event, and whether it has ended."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.events: list[tuple[bytes | None, Any]] = []
        self.primed: bytes | None = None
        self._splitter = EventSplitter(1 << 24)

    async def read(self) -> bool:
        """Some more; false at its end."""
        async with asyncio.timeout(PATIENCE_S):
            chunk = await self.response.content.readany()
        for block in self._splitter.blocks(chunk):
            if data := event_data(block):
                self.events.append((event_id(block), orjson.loads(data)))
            else:
                self.primed = event_id(block) or self.primed
        return bool(chunk)

    async def heard(self, *tags: str) -> None:
        """Wait until these, and no others, were said by `notify_later`; each one twice, as it says them."""
        while len(self.told) < len(tags):
            assert await self.read(), "the stream ended early"
        assert self.told == list(tags)

    @property
    def told(self) -> list[str]:
        messages = [message for _, message in self.events]
        return [each["params"]["data"] for each in messages if each.get("method") == "notifications/message"]


@asynccontextmanager
async def session_at(fleet: Fleet, server: str, owner: int) -> AsyncIterator[RawSession]:
    """A session that this worker owns, and whose client is at the edge."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        session = RawSession(http, fleet.worker_url(owner, server))
        assert (await session.initialize()).status == 200
        session.url = fleet.worker_url(EDGE, server)
        yield session


@asynccontextmanager
async def listening(session: RawSession, **headers: str) -> AsyncIterator[Stream]:
    async with session.http.get(session.url, headers={**session.headers, **headers}) as response:
        assert response.status == 200
        yield Stream(response)


@asynccontextmanager
async def calling(session: RawSession, tool: str, **arguments: Any) -> AsyncIterator[Stream]:
    params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": "p"}}
    body = orjson.dumps({"jsonrpc": "2.0", "id": "call", "method": "tools/call", "params": params})
    async with session.http.post(session.url, data=body, headers=session.headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


async def notify(session: RawSession, tag: str) -> None:
    """Have the server say something on the stream; while the session changes hands, nothing runs."""
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await session.call("notify_later", seconds=0.05, tag=tag)).status == 503:
            await asyncio.sleep(0.05)
    assert answer.text == "scheduled"


def reattached(fleet: Fleet, what: str) -> float:
    return fleet.metric("leasehold_streams_reattached", reason=what)


def check_progress(call: Stream, steps: int) -> Any:
    """Progress in order, none of it twice, and both of before and after; returns the response.

    The SDK's server (2.3) loses what it says between its last replayed event and going on live, so that one may be
    missing; that we lose none is checked against a server that does not (`test_streams_answers.py`).
    """
    *progress, response = [message for _, message in call.events]
    told = [each["params"]["progress"] for each in progress]
    assert told == sorted(set(told))
    assert told[0] == 1
    assert len(told) >= steps - 1
    return response


async def a_get_stream(fleet: Fleet, server: str, death: Death) -> None:
    """It goes on, on the same response, nothing twice; and its client may come back anywhere with an id of before."""
    async with session_at(fleet, server, KILLED) as session:
        async with listening(session) as stream:
            await notify(session, "one")
            await stream.heard("one")
            before = reattached(fleet, "listening")
            await death()
            while reattached(fleet, "listening") < before + 2:  # both of them
                await asyncio.sleep(0.02)
            await notify(session, "two")
            await stream.heard("one", "two")
        names = [name for name, _ in stream.events]
        assert len(set(names)) == len(names)
        assert names[0] is not None
        session.url = fleet.worker_url(ELSEWHERE, server)
        while True:
            async with session.http.get(
                session.url, headers={**session.headers, "last-event-id": names[0].decode()}
            ) as response:
                if response.status == 409:  # the upstream has yet to see that its stream was closed
                    await asyncio.sleep(0.05)
                    continue
                assert response.status == 200
                again = Stream(response)
                await again.heard("two")
                assert [name for name, _ in again.events][: len(names) - 1] == names[1:]
                return


async def an_answer(fleet: Fleet, death: Death) -> None:
    """B33: the call runs once, and its answer comes once."""
    async with session_at(fleet, "resumable", KILLED) as session:
        async with calling(session, "slow", seconds=4, steps=8, tag="k") as call:
            while len(call.events) < 2:
                assert await call.read()
            await death()
            while await call.read():
                pass
        response = check_progress(call, 8)
        assert (response["id"], response["result"]["content"][0]["text"]) == ("call", "slow k done")
        lines = (fleet.folder / "journal").read_text().splitlines()
        assert [json.loads(line)["tool"] for line in lines if json.loads(line)["tag"] == "k"] == ["slow"]


async def a_stream_of_a_pinned_session(fleet: Fleet, death: Death) -> None:
    """It goes on for as long as nobody knows; then the session has ended, and so does the stream."""
    async with session_at(fleet, "stdio", KILLED) as session, listening(session) as stream:
        await notify(session, "one")
        await stream.heard("one")
        assert all(name is not None and name.startswith(b"leasehold-") for name, _ in stream.events)
        await death()
        while await stream.read():
            pass
        assert (await session.request("ping")).status == 404


async def test_b43_streams_go_on_after_their_owner_was_killed(fleet: Fleet) -> None:
    """B42: GET streams with ids of ours and shared ones, and the answer of a call whose events have the upstream's."""
    waiting, killed = asyncio.Semaphore(0), asyncio.Event()
    before = reattached(fleet, "answer")

    async def death() -> None:
        waiting.release()
        await killed.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(a_get_stream(fleet, "plain", death))
        tasks.create_task(a_get_stream(fleet, "shared", death))
        tasks.create_task(an_answer(fleet, death))
        tasks.create_task(a_stream_of_a_pinned_session(fleet, death))
        for _ in range(4):
            await waiting.acquire()
        kill(fleet, KILLED)
        killed.set()
    assert reattached(fleet, "answer") == before + 1


async def test_b43_an_answer_goes_on_when_its_owner_stops_before_it_is_complete(fleet: Fleet) -> None:
    """B46: it takes longer than the owner's grace. A stream beside it goes on too, with the upstream's ids."""
    async with session_at(fleet, "resumable", STOPPED) as session:
        async with listening(session) as stream, calling(session, "slow", seconds=4, steps=8, tag="s") as call:
            while not call.events:
                assert await call.read()
            stopping = asyncio.create_task(asyncio.to_thread(fleet.workers[STOPPED].stop))
            while await call.read():
                pass
            assert await stopping == 0
            response = check_progress(call, 8)
            assert response["result"]["content"][0]["text"] == "slow s done"
            await notify(session, "after")
            await stream.heard("after")
            assert stream.events[0][0] is not None
            assert not stream.events[0][0].startswith(b"leasehold"), "the upstream's"
