"""The library face of a fleet: real `ClientSession`s, whichever process owns what they talk to."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import mcp_types as types
import pytest
from aiohttp import web
from faults import eventually
from leasehold import Callbacks, CallFailed, Fleet, PoolTimeout, SessionReleased
from leasehold.pool.calls import call
from mcp import ClientSession
from mcp.shared.exceptions import MCPError

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).parent.parent / "examples"
SECRET = "a secret for tests only and long enough"


@asynccontextmanager
async def counter(*args: str) -> AsyncGenerator[str]:
    """The counter server in a process of its own; yields its URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "counter_http.py"), *args, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        yield line.split()[-1].decode()
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def fleets(redis_url: str, servers: dict[str, Any], count: int = 2) -> AsyncGenerator[list[Fleet]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                Fleet(redis_url, config={"mcpServers": servers}, secret=SECRET, lease_ttl_ms=3000, shutdown_grace_s=1)
            )
            for _ in range(count)
        ]


def text(result: Any) -> str:
    assert not result.is_error, result
    return result.content[0].text


@pytest.fixture(params=["http", "http-json", "stdio"])
async def servers(request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncGenerator[dict[str, Any]]:
    if request.param == "stdio":
        yield {"counter": {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]}}
        return
    async with counter(*(["--json-response"] if request.param == "http-json" else [])) as url:
        yield {"counter": {"url": url, "leasehold": {"forward_headers": ["authorization"]}}}


async def test_the_session_of_an_affinity_is_the_same_from_every_process(
    redis_url: str, servers: dict[str, Any]
) -> None:
    async with fleets(redis_url, servers) as (one, two):
        for expected, fleet in enumerate((one, two, two, one), start=1):
            async with fleet.session("counter", affinity="conversation-42") as session:
                assert isinstance(session, ClientSession)
                assert text(await session.call_tool("increment", {})) == str(expected)
        async with two.session("counter", affinity="another") as session:
            assert text(await session.call_tool("increment", {})) == "1"
        assert two.core.forwarder.statistics.answered > 0
        assert len(one.core.pool) == len(two.core.pool) == 1


async def test_b12_many_coroutines_of_two_processes_share_one_session(redis_url: str, servers: dict[str, Any]) -> None:
    async with fleets(redis_url, servers) as (one, two):

        async def use(fleet: Fleet) -> int:
            async with fleet.session("counter", affinity="all") as session:
                return int(text(await session.call_tool("increment", {})))

        counts = await asyncio.gather(*(use(fleet) for fleet in (one, two) * 10))
        assert sorted(counts) == list(range(1, 21))
        assert len(one.core.pool) + len(two.core.pool) == 1


class Host:
    """A holder's callbacks, and what they were told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.told: list[str] = []
        self.progress: list[float] = []
        self.callbacks = Callbacks(
            sampling=self.sampling,
            elicitation=self.elicitation,
            list_roots=self.roots,
            logging=self.logging,
            message_handler=self.message,
        )

    async def sampling(self, context: Any, params: types.CreateMessageRequestParams) -> types.CreateMessageResult:
        content = types.TextContent(type="text", text=f"{self.name} heard {params.messages[0].content.text}")
        return types.CreateMessageResult(role="assistant", content=content, model="test")

    async def elicitation(self, context: Any, params: types.ElicitRequestParams) -> types.ElicitResult:
        return types.ElicitResult(action="accept", content={"answer": f"{self.name} says {params.message}"})

    async def roots(self, context: Any) -> types.ListRootsResult:
        return types.ListRootsResult(roots=[types.Root(uri=f"file:///{self.name}")])

    async def logging(self, params: types.LoggingMessageNotificationParams) -> None:
        self.told.append(f"log {params.data}")

    async def message(self, message: Any) -> None:
        self.told.append(type(message).__name__)

    async def on_progress(self, progress: float, total: float | None, message: str | None) -> None:
        self.progress.append(progress)


async def test_b20_b42_callbacks_work_across_the_hop(redis_url: str) -> None:
    """Each holder's calls ask that holder; what belongs to no call is told to all who listen."""
    async with counter() as url, fleets(redis_url, {"counter": {"url": url}}) as (one, two):
        alice, bob = Host("alice"), Host("bob")
        async with (
            one.session("counter", affinity="a", callbacks=alice.callbacks) as first,
            two.session("counter", affinity="a", callbacks=bob.callbacks) as second,
        ):
            for host, session in ((alice, first), (bob, second)):
                name = host.name
                sampled = await session.call_tool("ask_sampling", {"prompt": "hello"})
                assert text(sampled) == f"sampled: {name} heard hello"
                assert text(await session.call_tool("ask_elicitation", {"message": "hi"})) == f"accept: {name} says hi"
                assert text(await session.call_tool("list_roots", {})) == f"file:///{name}"
                await session.call_tool("log", {"level": "info", "message": name, "times": 3})
                await eventually(lambda host=host, name=name: host.told.count(f"log {name}") == 3)
                calling = session.call_tool("slow", {"seconds": 0.2, "steps": 4}, progress_callback=host.on_progress)
                assert text(await calling) == "slow  done"
                assert host.progress == [1, 2, 3, 4], "in order, and before the result"
            assert "log bob" not in alice.told
            await first.call_tool("notify_later", {"seconds": 0.3, "tag": "news"})
            for host in (alice, bob):
                await eventually(lambda host=host: "log news" in host.told)
                await eventually(lambda host=host: "ResourceListChangedNotification" in host.told)


async def test_a_cancelled_call_is_cancelled_at_the_server_and_costs_nobody_else(redis_url: str) -> None:
    """B37"""
    async with counter() as url, fleets(redis_url, {"counter": {"url": url}}) as (one, two):
        async with one.session("counter", affinity="a") as first, two.session("counter", affinity="a") as second:
            for holder, tag in ((first, "x"), (second, "y")):
                running = asyncio.Event()

                async def on_progress(*_: Any, running: asyncio.Event = running) -> None:
                    running.set()

                call = asyncio.create_task(holder.call_tool("wait_cancel", {"tag": tag}, progress_callback=on_progress))
                await asyncio.wait_for(running.wait(), 10)
                other = asyncio.create_task(first.call_tool("slow", {"seconds": 0.5}))
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert text(await other) == "slow  done"
                for _ in range(100):
                    if text(await second.call_tool("was_cancelled", {"tag": tag})) == "true":
                        break
                    await asyncio.sleep(0.05)
                else:
                    pytest.fail("the server was not told")


async def test_a_call_that_was_running_on_a_killed_owner_ends_as_unknown(redis_url: str) -> None:
    """B34: errors are typed and say whether the call may have run; safe ones are repeated."""
    servers = {"counter": {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]}}
    async with fleets(redis_url, servers) as (one, two):
        async with one.session("counter", affinity="a") as first, two.session("counter", affinity="a") as second:
            for session in (first, second):
                with pytest.raises(CallFailed) as caught:
                    await session.call_tool("crash", {})
                assert caught.value.outcome == "unknown"
                assert str(caught.value)
                # B7: the next call begins another session.
                assert text(await session.call_tool("increment", {})) == "1"


async def test_an_error_of_the_server_is_an_error_of_the_call(redis_url: str, servers: dict[str, Any]) -> None:
    """B6"""
    async with fleets(redis_url, servers) as (one, two):
        async with one.session("counter", affinity="a") as first, two.session("counter", affinity="a") as session:
            assert (await session.call_tool("no such tool", {})).is_error
            with pytest.raises(MCPError) as caught:
                await session.read_resource("nowhere://x")
            assert not isinstance(caught.value, CallFailed)
            assert text(await first.call_tool("increment", {})) == "1"


async def test_b23_a_session_is_of_no_use_after_its_block(redis_url: str, servers: dict[str, Any]) -> None:
    async with fleets(redis_url, servers, 1) as (one,):
        async with one.session("counter", affinity="a") as session:
            await session.send_ping()
        with pytest.raises(SessionReleased):
            await session.send_ping()


async def test_b3_a_fleet_that_is_cancelled_while_it_joins_leaves_nothing() -> None:
    """The runner of these tests fails one that leaves a task behind."""
    config = {"mcpServers": {"a": {"url": "http://127.0.0.1:1/mcp"}}}
    for turns in (0, 3, 200):
        fleet = Fleet("redis://127.0.0.1:1", config=config, secret=SECRET)
        joining = asyncio.create_task(fleet.__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        joining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joining
        with pytest.raises(RuntimeError, match="async with"):
            fleet.core  # noqa: B018


async def test_b45_a_member_whose_background_work_fails_says_so_and_ends_cleanly(redis_url: str) -> None:
    servers = {"counter": {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]}}
    async with fleets(redis_url, servers, 1) as (one,):
        async with one.session("counter", affinity="a") as session:
            await session.send_ping()
        core = one.core

        def fail() -> None:
            raise ZeroDivisionError

        core.tick = fail  # type: ignore[method-assign]
        await eventually(lambda: one._hosted is not None and one._hosted.failure is not None, 30)
        with pytest.raises(RuntimeError, match="has stopped"):
            one.session("counter", affinity="a")
    assert len(core.pool) == 0


async def test_b18_headers_may_be_a_function_that_is_asked_with_each_call(redis_url: str) -> None:
    seen: list[str] = []

    async def serve(request: web.Request) -> web.Response:
        seen.append(request.headers.get("authorization", ""))
        message = await request.json() if request.method == "POST" else {}
        if "id" not in message:
            return web.Response(status=202)
        result: Any = {}
        if message["method"] == "initialize":
            info = {"name": "s", "version": "1"}
            result = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": info}
        answer = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        return web.json_response(answer, headers={"mcp-session-id": "one"})

    app = web.Application()
    app.router.add_route("*", "/mcp", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    servers = {"counter": {"url": url, "leasehold": {"forward_headers": ["authorization"]}}}
    token = "first"

    def headers() -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    try:
        async with fleets(redis_url, servers) as (one, two):
            with pytest.raises(ValueError, match="principal"):
                one.session("counter", affinity="a", headers=headers)
            async with (
                one.session("counter", affinity="a", principal="alice", headers=headers) as first,
                two.session("counter", affinity="a", principal="alice", headers=headers) as second,
                one.session("counter", principal="alice", headers=headers) as third,
            ):
                for session in (first, second, third):
                    token = f"token of {session!r}"
                    await session.send_ping()
                    assert seen[-1] == f"Bearer {token}"
    finally:
        await runner.cleanup()


async def test_the_raw_face_is_bytes_in_and_bytes_out_across_the_hop(redis_url: str, servers: dict[str, Any]) -> None:
    async with fleets(redis_url, servers) as (one, two):
        async with one.link("counter", affinity="a") as first, two.link("counter", affinity="a") as second:
            assert first.initialize_result["serverInfo"]["name"] == "counter"
            for expected, link in enumerate((first, second), start=1):
                params = {"name": "increment", "arguments": {}}
                answer = await call(link, "tools/call", params, id=link.next_id())
                assert answer.payload["result"]["content"][0]["text"] == str(expected)


async def test_a_server_of_affinity_principal_has_one_session_for_each_and_time_is_bounded(redis_url: str) -> None:
    """B12"""
    server = {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]}
    servers = {"counter": server | {"leasehold": {"affinity": "principal"}}}
    async with fleets(redis_url, servers) as (one, two):
        for expected, (fleet, who) in enumerate(((one, "alice"), (two, "alice")), start=1):
            async with fleet.session("counter", principal=who) as session:
                assert text(await session.call_tool("increment", {})) == str(expected)
        with pytest.raises(PoolTimeout):
            async with two.session("counter", principal="bob", timeout_s=0.001):
                pytest.fail("a process starts in no time")
