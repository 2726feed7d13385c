"""What is done again after it may have run, and under which id; and what is not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest
from aiohttp import web
from leasehold.pool import Message, OpenFailed
from leasehold.pool.http_link import HttpLink
from leasehold.workers.errors import OutcomeUnknown
from leasehold.workers.worker import Worker
from whole_workers import VERSION, Client, worker

pytestmark = pytest.mark.anyio


def tool(name: str, **annotations: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object"}, "annotations": annotations}


LISTED: dict[str | None, dict[str, Any]] = {
    None: {"tools": [tool("reads", readOnlyHint=True), tool("writes", readOnlyHint=False)], "nextCursor": "more"},
    "more": {"tools": [tool("settles", idempotentHint=True)]},
}


class Recorder:
    """An upstream that notes each request it gets."""

    def __init__(self) -> None:
        self.url = ""
        self.got: list[tuple[str, Any]] = []

    async def serve(self, request: web.Request) -> web.Response:
        if request.method == "DELETE":
            return web.Response()
        message = orjson.loads(await request.read())
        if "id" not in message:
            return web.Response(status=202)
        result: Any = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
        if message["method"] != "initialize":
            self.got.append((message["method"], message["id"]))
            result = {"times": len(self.got)}
        if message["method"] == "tools/list":
            result |= LISTED[message["params"].get("cursor")]
        body = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        return web.json_response(body, headers={"mcp-session-id": "one"})


@pytest.fixture
async def recorder(anyio_backend: Any) -> AsyncGenerator[Recorder]:
    made = Recorder()
    app = web.Application()
    app.router.add_route("*", "/mcp", made.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    yield made
    await runner.cleanup()


def lose_first_answer(worker: Worker) -> None:
    """The first forwarded call runs, and its caller does not learn of it."""
    forward = worker.forwarder.forward

    async def losing(to: Any, key: str, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        async def nowhere(_message: Any) -> None:
            pass

        worker.forwarder.forward = forward  # type: ignore[method-assign]
        await forward(to, key, scope, body, receive, nowhere)
        raise OutcomeUnknown("the owner died while the call was running")

    worker.forwarder.forward = losing  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("method", "params"), [("tools/list", {}), ("ping", {}), ("tools/call", {"name": "safe"})], ids=str
)
async def test_b8_a_safe_call_is_repeated_under_another_id(
    redis_url: str, recorder: Recorder, method: str, params: Any
) -> None:
    servers = {"counter": {"url": recorder.url, "leasehold": {"idempotent_tools": ["safe"]}}}
    async with worker(redis_url, servers) as one, worker(redis_url, servers) as two:
        client = Client(one)
        await client.initialize()
        client.worker = two
        lose_first_answer(two)
        status, answer = await client.send("POST", method, params)
        assert (status, answer["id"], answer["result"]["times"]) == (200, 2, 2)
        (_, first), (_, second) = recorder.got
        assert first == 2, "what is not repeated keeps its id"
        assert second not in (first, None), "the first one may still be running under its own"
        assert two.affinity.repeated == 1


async def test_b8_a_call_that_changes_something_is_not_repeated(redis_url: str, recorder: Recorder) -> None:
    servers = {"counter": {"url": recorder.url}}
    async with worker(redis_url, servers) as one, worker(redis_url, servers) as two:
        client = Client(one)
        await client.initialize()
        client.worker = two
        lose_first_answer(two)
        status, answer = await client.send("POST", "tools/call", {"name": "unsafe"})
        assert (status, answer["error"]["data"]) == (200, {"outcome": "unknown"})
        assert len(recorder.got) == 1
        assert two.affinity.repeated == 0


@pytest.mark.parametrize("affinity", ["session", "principal"])
@pytest.mark.parametrize(("name", "runs"), [("reads", 2), ("settles", 2), ("writes", 1), ("unlisted", 1)])
async def test_b8_a_tool_that_the_server_declares_harmless_is_repeated_for_who_has_seen_it_declared(
    redis_url: str, recorder: Recorder, affinity: str, name: str, runs: int
) -> None:
    servers = {"counter": {"url": recorder.url, "leasehold": {"affinity": affinity}}}
    async with worker(redis_url, servers) as one, worker(redis_url, servers) as two:
        client = Client(one)
        await client.initialize()
        client.worker = two
        call = ("POST", "tools/call", {"name": name})

        async def ran(client: Client) -> int:
            recorder.got.clear()
            lose_first_answer(two)
            status, answer = await client.send(*call)
            assert (status, "error" in answer) == (200, len(recorder.got) == 1)
            return len(recorder.got)

        assert await ran(client) == 1, "nobody has seen it declared"
        await client.send("POST", "tools/list", {})
        await client.send("POST", "tools/list", {"cursor": "more"})
        assert await ran(client) == runs
        other = Client(one, headers=[(b"authorization", b"Bearer other")])
        await other.initialize()
        other.worker = two
        assert await ran(other) == 1, "another principal may be told something else"
        before = LISTED[None]
        try:
            LISTED[None] = {"tools": []}
            await client.send("POST", "tools/list", {})
        finally:
            LISTED[None] = before
        assert await ran(client) == 1, "a new list says otherwise"


@pytest.mark.parametrize("affinity", ["session", "principal"])
async def test_b8_a_repetition_that_does_not_reach_the_server_is_not_told_as_a_call_that_did_not_run(
    redis_url: str, recorder: Recorder, affinity: str
) -> None:
    """The first try may have run."""
    servers = {"counter": {"url": recorder.url, "leasehold": {"affinity": affinity}}}
    async with worker(redis_url, servers) as one, worker(redis_url, servers) as two:
        client = Client(one)
        await client.initialize()
        client.worker = two
        lose_first_answer(two)
        post = HttpLink.post
        tries = 0

        async def failing(link: HttpLink, message: Message, body: bytes, headers: Any) -> Any:
            nonlocal tries
            tries += 1
            if tries > 1:
                raise OpenFailed("cannot connect")
            return await post(link, message, body, headers)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HttpLink, "post", failing)
            status, answer = await client.send("POST", "ping", {})
        assert (status, answer["error"]["data"]) == (200, {"outcome": "unknown"})
        assert tries == 2
