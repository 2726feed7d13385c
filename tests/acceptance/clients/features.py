"""Every feature of a session beyond plain calls, each in a session of its own, against the counter server."""

import argparse
import asyncio
import importlib.metadata
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx2
import mcp_types as types
from mcp import Client

PATIENCE_S = 15.0
SETTLE_S = 0.3
ROOT_URI = "file:///acceptance/root"


class Recorder:
    """A client's callbacks, which answer the server and remember what came."""

    def __init__(self) -> None:
        self.logs: list[tuple[str, Any]] = []
        self.others: list[str] = []
        self.declines = False

    async def on_log(self, params: types.LoggingMessageNotificationParams) -> None:
        self.logs.append((params.level, params.data))

    async def on_message(self, message: Any) -> None:
        if not isinstance(message, Exception):
            self.others.append(message.method)

    async def on_sampling(self, context: Any, params: types.CreateMessageRequestParams) -> types.CreateMessageResult:
        content = params.messages[0].content
        assert isinstance(content, types.TextContent)
        reply = types.TextContent(type="text", text=f"reply to {content.text}")
        return types.CreateMessageResult(role="assistant", content=reply, model="acceptance")

    async def on_elicitation(self, context: Any, params: types.ElicitRequestParams) -> types.ElicitResult:
        if self.declines:
            return types.ElicitResult(action="decline")
        return types.ElicitResult(action="accept", content={"answer": f"answer to {params.message}"})

    async def on_roots(self, context: Any) -> types.ListRootsResult:
        return types.ListRootsResult(roots=[types.Root(uri=ROOT_URI, name="root")])

    def client(self, url: str) -> Client:
        return Client(
            url,
            mode="legacy",
            read_timeout_seconds=PATIENCE_S,
            sampling_callback=self.on_sampling,
            elicitation_callback=self.on_elicitation,
            list_roots_callback=self.on_roots,
            logging_callback=self.on_log,
            message_handler=self.on_message,
        )


async def call(client: Client, tool: str, **arguments: Any) -> str:
    """The text of a tool's answer; an error result is a failure."""
    result = await client.call_tool(tool, arguments)
    content = result.content[0]
    assert isinstance(content, types.TextContent)
    assert not result.is_error, content.text
    return content.text


async def eventually(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        await asyncio.sleep(0.02)


async def open_get_stream(client: Client, recorder: Recorder) -> None:
    """Wait until the standalone stream carries something: the client opens it some time after `initialize`."""
    for attempt in range(50):
        await call(client, "notify_later", seconds=0, tag=f"probe {attempt}")
        await asyncio.sleep(0.1)
        if recorder.logs:
            await asyncio.sleep(SETTLE_S)
            recorder.logs.clear()
            recorder.others.clear()
            return
    raise AssertionError("the GET stream never opened")


async def progress(url: str) -> None:
    """Progress arrives in order, each once, and while the call runs."""
    seen: list[float] = []
    times: list[float] = []

    async def on_progress(value: float, total: float | None, message: str | None) -> None:
        assert total == 5
        assert message == f"step {value:.0f}"
        seen.append(value)
        times.append(time.monotonic())

    async with Recorder().client(url) as client:
        arguments = {"seconds": 2.0, "steps": 5, "tag": "progress"}
        result = await client.call_tool("slow", arguments, progress_callback=on_progress)
        assert not result.is_error
        await eventually(lambda: len(seen) >= 5, "five progress notifications")
    assert seen == [1, 2, 3, 4, 5], seen
    assert times[-1] - times[0] > 0.4, "progress came in one piece: somebody buffers"


async def logging(url: str) -> None:
    """Log messages arrive, each once."""
    recorder = Recorder()
    async with recorder.client(url) as client:
        await call(client, "log", level="warning", message="hello", times=3)
        await eventually(lambda: len(recorder.logs) >= 3, "three log messages")
        await asyncio.sleep(SETTLE_S)
    assert recorder.logs == [("warning", "hello")] * 3, recorder.logs


async def sampling(url: str) -> None:
    """The server's request reaches this client, and its answer the call that waits for it."""
    async with Recorder().client(url) as client:
        for number in range(5):
            prompt = f"prompt {number}"
            assert await call(client, "ask_sampling", prompt=prompt) == f"sampled: reply to {prompt}"


async def elicitation(url: str) -> None:
    """Accepted and declined."""
    recorder = Recorder()
    async with recorder.client(url) as client:
        for number in range(5):
            message = f"question {number}"
            assert await call(client, "ask_elicitation", message=message) == f"accept: answer to {message}"
        recorder.declines = True
        assert await call(client, "ask_elicitation", message="no") == "decline: "


async def roots(url: str) -> None:
    """Asked on the stream of the call."""
    async with Recorder().client(url) as client:
        for _ in range(5):
            assert await call(client, "list_roots") == ROOT_URI


async def roots_on_get_stream(url: str) -> None:
    """Asked on the standalone stream."""
    recorder = Recorder()
    async with recorder.client(url) as client:
        await open_get_stream(client, recorder)
        for _ in range(5):
            assert await call(client, "list_roots", standalone=True) == ROOT_URI


async def get_stream(url: str) -> None:
    """What the server sends outside any call arrives on the standalone stream, each once."""
    recorder = Recorder()
    async with recorder.client(url) as client:
        await open_get_stream(client, recorder)
        for number in range(3):
            await call(client, "notify_later", seconds=0.1, tag=f"later {number}")
        await eventually(lambda: len(recorder.logs) >= 3, "three notifications")
        await asyncio.sleep(SETTLE_S)
    assert sorted(data for _, data in recorder.logs) == ["later 0", "later 1", "later 2"], recorder.logs
    assert recorder.others.count("notifications/resources/list_changed") == 3, recorder.others


async def cancellation(url: str) -> None:
    """A cancelled call ends at the server, and the session goes on."""
    running = asyncio.Event()

    async def on_progress(value: float, total: float | None, message: str | None) -> None:
        running.set()

    async with Recorder().client(url) as client:
        for _ in range(3):
            tag = uuid.uuid4().hex
            running.clear()
            call_it = client.call_tool("wait_cancel", {"tag": tag}, progress_callback=on_progress)
            waiting = asyncio.create_task(call_it)
            # A cancellation that overtakes its request means nothing to the server.
            await asyncio.wait_for(running.wait(), PATIENCE_S)
            assert not waiting.done(), "wait_cancel answered before it was cancelled"
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            deadline = time.monotonic() + PATIENCE_S
            while await call(client, "was_cancelled", tag=tag) != "true":
                assert time.monotonic() < deadline, "the server was not told of the cancellation"
                await asyncio.sleep(0.05)
        assert await call(client, "increment") == "1"


async def cancel_and_close(url: str) -> None:
    """A client that leaves right after it has cancelled ends cleanly, whatever is still on its way."""

    async def leave(after_s: float) -> None:
        async with Recorder().client(url) as client:
            waiting = asyncio.create_task(client.call_tool("wait_cancel", {"tag": uuid.uuid4().hex}))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            await asyncio.sleep(after_s)

    await asyncio.gather(*(leave(after_s) for after_s in (0, 0.3, 0.9)))


async def concurrency(url: str) -> None:
    """A slow call does not hold up others of the same session."""
    async with Recorder().client(url) as client:
        slow = asyncio.create_task(call(client, "slow", seconds=4.0, steps=1, tag="slow"))
        for expected in range(1, 11):
            assert await call(client, "increment") == str(expected)
        assert not slow.done(), "the fast calls waited for the slow one"
        assert await slow == "slow slow done"


async def deletion(url: str) -> None:
    """DELETE ends the session, for every worker; its id is then answered 404."""
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "features", "version": "1"}}
    headers = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
    async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE_S) as http:
        answer = await http.post(url, json={"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params})
        assert answer.status_code == 200, answer.status_code
        session = {"mcp-session-id": answer.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}
        ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert (await http.post(url, json=ready, headers=session)).status_code == 202
        ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
        assert (await http.post(url, json=ping, headers=session)).status_code == 200
        deleted = await http.delete(url, headers=session)
        assert 200 <= deleted.status_code < 300, deleted.status_code
        for _ in range(8):
            status = (await http.post(url, json=ping, headers=session)).status_code
            assert status == 404, f"{status} after DELETE"
        assert (await http.get(url, headers={**session, "accept": "text/event-stream"})).status_code == 404


FEATURES: list[Callable[[str], Awaitable[None]]] = [
    progress,
    logging,
    sampling,
    elicitation,
    roots,
    roots_on_get_stream,
    get_stream,
    cancellation,
    cancel_and_close,
    concurrency,
    deletion,
]


def reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)


async def run(url: str, names: list[str], timeout_s: float, at_once: int) -> dict[str, Any]:
    passed = []
    failed = {}
    turn = asyncio.Semaphore(at_once)

    async def check(feature: Callable[[str], Awaitable[None]]) -> None:
        name = feature.__name__
        try:
            async with turn, asyncio.timeout(timeout_s):
                await feature(url)
            passed.append(name)
        except Exception as error:
            failed[name] = reason(error)

    await asyncio.gather(*(check(feature) for feature in FEATURES if not names or feature.__name__ in names))
    version = importlib.metadata.version("mcp")
    return {"client": "features", "version": version, "passed": passed, "errors": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per feature")
    parser.add_argument("--at-once", type=int, default=1, help="how many features to try at the same time")
    parser.add_argument("--only", nargs="*", default=[], choices=[feature.__name__ for feature in FEATURES])
    args = parser.parse_args()
    report = asyncio.run(run(args.url, args.only, args.timeout, args.at_once))
    print(json.dumps(report))
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
