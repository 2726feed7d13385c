"""What is done again after it may have run, and under which id; and what is not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest
from aiohttp import web
from leasehold.workers.errors import OutcomeUnknown
from leasehold.workers.worker import Worker
from whole_workers import VERSION, Client, worker

pytestmark = pytest.mark.anyio


class Recorder:
    """An upstream that notes each request it gets."""

    def __init__(self) -> None:
        self.url = ""
        self.got: list[tuple[str, Any]] = []

    async def serve(self, request: web.Request) -> web.Response:
        if request.method == "DELETE":
            return web.Response()
        message = orjson.loads(await request.read())
        result: Any = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
        if message["method"] != "initialize":
            self.got.append((message["method"], message["id"]))
            result = {"times": len(self.got)}
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
        assert (status, answer["id"], answer["result"]) == (200, 2, {"times": 2})
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
