"""Answers of calls whose owner is lost in mid-answer: gone on with where their events have ids, unknown elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from aiohttp import web
from faults import eventually
from leasehold.coordinator import Keys
from leasehold.coordinator.event_log import MAX_BYTES
from leasehold.pool.sse import event
from listening import HELLO, Listener, said
from redis.asyncio import Redis
from whole_workers import Client, worker

pytestmark = pytest.mark.anyio

CALL = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "tell"}})
RESULT: Any = {"jsonrpc": "2.0", "id": 1, "result": {"content": []}}


def told(name: str, data: bytes) -> bytes:
    return b"id: " + name.encode() + b"\n" + event(data)


@dataclass
class Answerer:
    """An upstream whose calls say what a test has them say, and whose streams can be resumed as it says."""

    url: str = ""
    calls: list[web.StreamResponse] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    """`Last-Event-ID` of each GET."""
    parts: list[int | bytes | None] = field(default_factory=list)
    """What the next GETs bring: a status, or an event stream, which ends if None comes after it."""
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            self.resumed.append(request.headers.get("last-event-id", ""))
            part = self.parts.pop(0) if self.parts else 409
            if not isinstance(part, bytes):
                return web.Response(status=part or 409)
            return await self._stream(request, part)
        message = orjson.loads(await request.read() or b"{}")
        if message.get("method") == "initialize":
            body = {"jsonrpc": "2.0", "id": message["id"], "result": HELLO}
            return web.json_response(body, headers={"mcp-session-id": "one"})
        if "id" not in message:
            return web.Response(status=202)
        return await self._stream(request, b"")

    async def _stream(self, request: web.Request, part: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if request.method == "POST":
            self.calls.append(response)
        if part:
            await response.write(part)
        if self.parts[:1] == [None]:
            del self.parts[0]
        else:
            await self.over.wait()
        return response


@asynccontextmanager
async def answering() -> AsyncGenerator[Answerer]:
    answerer = Answerer()
    app = web.Application()
    app.router.add_route("*", "/mcp", answerer.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    answerer.url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    try:
        yield answerer
    finally:
        answerer.over.set()
        await runner.cleanup()


Lose = Callable[[], Awaitable[None]]


@asynccontextmanager
async def asking(redis_url: str, answerer: Answerer, **options: Any) -> AsyncGenerator[tuple[Listener, Lose]]:
    """A call that runs at the first of two workers, of a client that is at the second; and how to lose the owner."""
    config: Any = {"counter": {"url": answerer.url, "leasehold": options}}
    async with worker(redis_url, config) as owner, worker(redis_url, config) as edge:
        client = Client(owner)
        await client.initialize()
        client.worker = edge
        call = Listener(client, body=CALL)
        await call.begun()

        async def lose() -> None:
            async with Redis.from_url(redis_url) as admin:
                await admin.delete(Keys("leasehold").lease(owner.member.incarnation))

        try:
            yield call, lose
        finally:
            await call.leave()


@pytest.fixture
async def answerer() -> AsyncGenerator[Answerer]:
    async with answering() as answerer:
        yield answerer


async def say(answerer: Answerer, call: Listener, data: bytes) -> None:
    """The upstream says it, and it has reached the client."""
    await answerer.calls[-1].write(data)
    await eventually(lambda: call.raw.endswith(data))


async def ended(call: Listener) -> Any:
    """The last message of an answer that has ended as it should."""
    await eventually(call.task.done, 20)
    assert call.task.exception() is None
    return orjson.loads(call.events[-1][1])


async def test_b43_an_answer_goes_on_after_its_last_id_until_the_response_has_come(
    redis_url: str, answerer: Answerer
) -> None:
    """In any number of parts; an event that was torn comes whole; and no further than the response, though the upstream
    keeps a resumed stream open."""
    async with asking(redis_url, answerer) as (call, lose):
        primer = b"id: a0\nretry: 100\ndata: \n\n"
        await say(answerer, call, primer + told("a1", said(1)))
        answerer.parts = [
            409,
            503,
            told("a2", said(2)) + b"id: a3\ndata: to",
            None,
            b"",
            None,
            told("a3", said(3)) + told("a4", orjson.dumps(RESULT)) + told("a5", said(5)),
        ]
        await lose()
        assert await ended(call) == RESULT
        assert [each["params"]["data"] for each in call.messages[:-1]] == [1, 2, 3]
        assert answerer.resumed == ["a1", "a1", "a1", "a2", "a2"]
        assert len(answerer.calls) == 1
        assert call.status == 200


async def test_b43_a_priming_event_is_enough_to_go_on_with(redis_url: str, answerer: Answerer) -> None:
    async with asking(redis_url, answerer) as (call, lose):
        await say(answerer, call, b"id: a0\ndata: \n\n")
        answerer.parts = [told("a1", orjson.dumps(RESULT))]
        await lose()
        assert await ended(call) == RESULT


@pytest.mark.parametrize(
    "cut_off",
    [
        event(said(1)),
        told("a1", said(1)) + b"id: a2\ndata: torn",
        told("a1", said(1)) + b"id:\n\n",
        told("a1", said(1)) + b"id: \xc3\xa4\n\n",
    ],
    ids=["no id", "torn", "id taken back", "id that nobody can send"],
)
async def test_b43_an_answer_that_cannot_be_gone_on_with_is_unknown(
    redis_url: str, answerer: Answerer, cut_off: bytes
) -> None:
    async with asking(redis_url, answerer) as (call, lose):
        await say(answerer, call, cut_off)
        await lose()
        last = await ended(call)
        assert (last["id"], last["error"]["data"]["outcome"]) == (1, "unknown")
        assert answerer.resumed == []


@pytest.mark.parametrize("refusal", [400, 401, 404, 405])
async def test_b43_what_the_upstream_will_not_resume_is_unknown_at_once(
    redis_url: str, answerer: Answerer, refusal: int
) -> None:
    async with asking(redis_url, answerer) as (call, lose):
        await say(answerer, call, told("a1", said(1)))
        answerer.parts = [refusal]
        await lose()
        assert (await ended(call))["error"]["data"]["outcome"] == "unknown"
        assert answerer.resumed == ["a1"]


async def test_b43_a_resumed_part_that_breaks_off_in_a_large_event_is_unknown(
    redis_url: str, answerer: Answerer
) -> None:
    async with asking(redis_url, answerer) as (call, lose):
        await say(answerer, call, told("a1", said(1)))
        answerer.parts = [b"id: a2\ndata: " + b"x" * 2 * MAX_BYTES, None]
        await lose()
        assert (await ended(call))["error"]["data"]["outcome"] == "unknown"
        assert answerer.resumed == ["a1"]


async def test_b43_an_upstream_that_takes_the_id_and_says_nothing_is_given_up_after_the_call_timeout(
    redis_url: str, answerer: Answerer
) -> None:
    async with asking(redis_url, answerer, call_timeout=1) as (call, lose):
        await say(answerer, call, told("a1", said(1)))
        answerer.parts = [told("a2", said(2))]
        await lose()
        assert (await ended(call))["error"]["data"]["outcome"] == "unknown"
        assert [each["params"]["data"] for each in call.messages[:-1]] == [1, 2]


async def test_ids_of_a_shared_session_are_nobodys_and_its_answers_are_not_resumed(
    redis_url: str, answerer: Answerer
) -> None:
    async with asking(redis_url, answerer, affinity="principal") as (call, lose):
        await say(answerer, call, told("a1", said(1)))
        await lose()
        assert (await ended(call))["error"]["data"]["outcome"] == "unknown"
        assert answerer.resumed == []
