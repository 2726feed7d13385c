"""The typed face: a real `ClientSession` against the SDK's own server, on every transport, in both directions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import mcp_types as types
import pytest
from faults import eventually
from leasehold.pool import HttpTarget, SessionPool, Upstream
from leasehold.pool.errors import SessionReleased
from leasehold.pool.typed import Callbacks
from mcp import ClientSession, MCPError
from mcp.client.session import ClientRequestContext
from talkers import SDK_LEAVES_STREAMS, Kind, Talker, talking

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings(SDK_LEAVES_STREAMS)]

KINDS: list[Kind] = ["http", "http-json", "sse", "stdio"]
DUPLEX: list[Kind] = ["http", "sse", "stdio"]
"""With JSON answers a server cannot say anything while it works on a call."""


@pytest.fixture
async def talker(request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncGenerator[Talker]:
    async with talking(request.param) as talker:
        yield talker


on_all = pytest.mark.parametrize("talker", KINDS, indirect=True)
on_duplex = pytest.mark.parametrize("talker", DUPLEX, indirect=True)
on_http = pytest.mark.parametrize("talker", ["http"], indirect=True)


def text(result: Any) -> str:
    assert not result.is_error, result
    return result.content[0].text


class Listener:
    """Callbacks that answer with its name and note what they were told."""

    def __init__(self, name: str = "alice") -> None:
        self.name = name
        self.logs: list[str] = []
        self.messages: list[str] = []
        self.asked_by: list[ClientSession] = []

    async def sampling(self, context: ClientRequestContext, params: types.CreateMessageRequestParams) -> Any:
        self.asked_by.append(context.session)
        asked = params.messages[0].content
        assert isinstance(asked, types.TextContent)
        answer = types.TextContent(type="text", text=f"{self.name} was told to {asked.text}")
        return types.CreateMessageResult(role="assistant", content=answer, model="none")

    async def elicitation(self, _context: ClientRequestContext, params: types.ElicitRequestParams) -> Any:
        return types.ElicitResult(action="accept", content={"answer": f"{params.message} says {self.name}"})

    async def list_roots(self, _context: ClientRequestContext) -> Any:
        return types.ListRootsResult(roots=[types.Root.model_validate({"uri": f"file:///{self.name}"})])

    async def logging(self, params: types.LoggingMessageNotificationParams) -> None:
        self.logs.append(str(params.data))

    async def message(self, message: Any) -> None:
        self.messages.append(type(message).__name__)

    @property
    def callbacks(self) -> Callbacks:
        return Callbacks(self.sampling, self.elicitation, self.list_roots, self.logging, self.message)


# -- what a client asks ------------------------------------------------------------------------------------------------


@on_all
async def test_tools_resources_and_prompts(talker: Talker) -> None:
    """B20"""
    async with SessionPool() as pool, pool.session(talker.upstream()) as session:
        assert isinstance(session, ClientSession)
        assert "increment" in [tool.name for tool in (await session.list_tools()).tools]
        assert [text(await session.call_tool("increment")) for _ in range(3)] == ["1", "2", "3"]
        (resource,) = (await session.list_resources()).resources
        (template,) = (await session.list_resource_templates()).resource_templates
        assert template.uri_template == "talker://books/{name}"
        for uri, told in ((str(resource.uri), "A talker."), ("talker://books/emma", "All of emma.")):
            (content,) = (await session.read_resource(uri)).contents
            assert getattr(content, "text", None) == told
        (prompt,) = (await session.list_prompts()).prompts
        (message,) = (await session.get_prompt(prompt.name, {"name": "bob"})).messages
        assert getattr(message.content, "text", None) == "Say hello to bob."
        await session.send_ping()


@on_all
async def test_what_the_server_said_of_itself_is_there_without_asking(talker: Talker) -> None:
    """The handshake was the pool's; entering or initializing once more changes nothing."""
    async with SessionPool() as pool, pool.session(talker.upstream()) as session:
        async with session as same:
            assert same is session
            result = await session.initialize()
        assert result.server_info.name == "talker"
        assert session.server_capabilities is not None
        assert session.server_capabilities.tools is not None
        assert text(await session.call_tool("increment")) == "1"


@on_all
async def test_an_error_of_a_tool_or_of_the_server_is_the_answer(talker: Talker) -> None:
    """B6"""
    async with SessionPool() as pool:
        async with pool.session(talker.upstream()) as session:
            result = await session.call_tool("fail")
            assert result.is_error
            assert "Error executing tool fail" in result.content[0].text
        with pytest.raises(MCPError) as caught:
            async with pool.session(talker.upstream()) as session:
                await session.read_resource("talker://nowhere/at/all")
        assert "Connection closed" not in str(caught.value)
        assert (pool.statistics().opened, pool.statistics().idle) == (1, 1)


@on_all
async def test_a_session_keeps_its_state_from_loan_to_loan(talker: Talker) -> None:
    async with SessionPool() as pool:
        upstream = talker.upstream()
        for expected in ("1", "2", "3"):
            async with pool.session(upstream) as session:
                assert text(await session.call_tool("increment")) == expected
        assert pool.statistics().opened == 1


@on_all
async def test_calls_on_one_session_run_side_by_side(talker: Talker) -> None:
    """B15: a slow one delays no other."""
    async with SessionPool() as pool, pool.session(talker.upstream()) as session:
        slow = asyncio.create_task(session.call_tool("nap", {"seconds": 1.0}))
        quick = [session.call_tool("increment") for _ in range(20)]
        assert sorted(int(text(result)) for result in await asyncio.gather(*quick)) == list(range(1, 21))
        assert not slow.done()
        assert text(await slow) == "slept 1.0"


@on_all
async def test_a_session_is_used_cancelled_and_closed_from_any_task(talker: Talker) -> None:
    """B21, IBM/mcp-context-forge 3737"""

    async def in_a_task_of_its_own(work: Any) -> Any:
        return await asyncio.create_task(work)

    async with SessionPool() as pool:
        context = pool.session(talker.upstream())
        session = await in_a_task_of_its_own(context.__aenter__())
        assert text(await in_a_task_of_its_own(session.call_tool("increment"))) == "1"
        hanging = asyncio.create_task(session.call_tool("hang", {"tag": "b21"}))
        await until_run(session, "b21")
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert text(await in_a_task_of_its_own(session.call_tool("increment"))) == "2"
        await in_a_task_of_its_own(context.__aexit__(None, None, None))
        async with pool.session(talker.upstream()) as again:
            assert text(await again.call_tool("increment")) == "3"
        with pytest.raises(SessionReleased):
            await session.call_tool("increment")


async def until_run(session: ClientSession, tag: str) -> None:
    while text(await session.call_tool("count_of", {"tag": tag})) == "0":
        await asyncio.sleep(0.01)


# -- what a server says ------------------------------------------------------------------------------------------------


@on_duplex
async def test_progress_comes_in_order_and_before_the_result(talker: Talker) -> None:
    """B20"""
    told: list[Any] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        await asyncio.sleep(0)  # one that takes its time is not overtaken
        told.append((progress, total, message))

    async with SessionPool() as pool, pool.session(talker.upstream()) as session:
        result = await session.call_tool("talk", {"steps": 5}, progress_callback=on_progress)
        assert told == [(float(step), 5.0, f"step {step}") for step in range(1, 6)]
        assert text(result) == "talked"


@on_duplex
async def test_a_progress_callback_that_fails_costs_nothing_but_itself(
    talker: Talker, caplog: pytest.LogCaptureFixture
) -> None:
    async def on_progress(*_: Any) -> None:
        raise ValueError("a bug of the caller's")

    async with SessionPool() as pool, pool.session(talker.upstream()) as session:
        assert text(await session.call_tool("talk", {"steps": 2}, progress_callback=on_progress)) == "talked"
    assert "progress_callback_failed" in caplog.text


@on_duplex
async def test_logging_sampling_elicitation_roots_and_the_message_handler(talker: Talker) -> None:
    """B20"""
    listener = Listener()
    async with SessionPool() as pool, pool.session(talker.upstream(), callbacks=listener.callbacks) as session:
        assert text(await session.call_tool("ask", {"what": "sampling"})) == "alice was told to think"
        assert listener.asked_by == [session]
        assert text(await session.call_tool("ask", {"what": "elicitation"})) == "accept why? says alice"
        assert text(await session.call_tool("ask", {"what": "roots"})) == "file:///alice"
        await session.call_tool("talk", {"steps": 3})
        await eventually(lambda: listener.logs == ["log 1", "log 2", "log 3"])
        assert listener.messages.count("LoggingMessageNotification") == 3


@on_duplex
async def test_what_a_caller_has_no_callback_for_is_refused_in_words(talker: Talker) -> None:
    """B20: and the call ends, as with the SDK's own client."""
    async with SessionPool() as pool, pool.session(talker.upstream()) as session:
        for what, told in (("sampling", "Sampling not supported"), ("roots", "List roots not supported")):
            with pytest.raises(MCPError, match=told):
                await session.call_tool("ask", {"what": what})
        assert text(await session.call_tool("increment")) == "1"


@on_all
async def test_notifications_that_belong_to_no_call(talker: Talker) -> None:
    """B20: over HTTP they come on the GET stream."""
    listener = Listener()
    async with SessionPool() as pool, pool.session(talker.upstream(), callbacks=listener.callbacks) as session:
        if talker.port and talker.kind != "sse":
            await eventually(lambda: any(seen.method == "GET" for seen in talker.requests))
            await asyncio.sleep(0.05)  # it has come; that it is being served cannot be seen from here
        assert text(await session.call_tool("announce", {"what": "news"})) == "announced"
        await eventually(lambda: listener.logs == ["news"] and len(listener.messages) == 2)
        assert listener.messages == ["LoggingMessageNotification", "ResourceListChangedNotification"]


@on_http
async def test_each_holder_of_a_shared_session_gets_what_belongs_to_his_own_calls(talker: Talker) -> None:
    """B20: where it says to which call it belongs, as over streamable HTTP."""
    alice, bob = Listener("alice"), Listener("bob")
    async with (
        SessionPool() as pool,
        pool.session(talker.upstream(), affinity="x", callbacks=alice.callbacks) as hers,
        pool.session(talker.upstream(), affinity="x", callbacks=bob.callbacks) as his,
    ):
        asked = [session.call_tool("ask", {"what": "sampling"}) for session in (hers, his, hers, his)]
        told = [text(result).split()[0] for result in await asyncio.gather(*asked)]
        assert told == ["alice", "bob", "alice", "bob"]
        await asyncio.gather(hers.call_tool("talk", {"steps": 2}), his.call_tool("talk", {"steps": 1}))
        await eventually(lambda: (len(alice.logs), len(bob.logs)) == (2, 1))
        assert pool.statistics().opened == 1


# -- credentials -------------------------------------------------------------------------------------------------------


@on_http
async def test_a_principal_s_new_token_is_seen_with_the_next_loan(talker: Talker) -> None:
    """B18"""
    async with SessionPool() as pool:
        for token in ("one", "two"):
            headers = {"Authorization": f"Bearer {token}"}
            async with pool.session(talker.upstream(), principal="alice", headers=headers) as session:
                assert text(await session.call_tool("seen_token")) == f"Bearer {token}"
        assert pool.statistics().opened == 1


@on_http
async def test_without_a_name_other_credentials_are_somebody_else(talker: Talker) -> None:
    """B17"""
    async with SessionPool() as pool:
        for token in ("one", "two", "one"):
            async with pool.session(talker.upstream(), headers={"Authorization": f"Bearer {token}"}) as session:
                assert text(await session.call_tool("seen_token")) == f"Bearer {token}"
        assert pool.statistics().opened == 2


@on_http
async def test_every_request_of_a_session_goes_with_the_credentials_of_its_holder(talker: Talker) -> None:
    """B17, B18: the stream that belongs to no call, answers to the server, cancellations and the end included."""
    listener = Listener()
    headers = {"Authorization": "Bearer hers"}
    async with SessionPool() as pool:
        async with pool.session(
            talker.upstream(), principal="alice", headers=headers, callbacks=listener.callbacks
        ) as session:
            await eventually(lambda: any(seen.method == "GET" for seen in talker.requests))
            await session.call_tool("ask", {"what": "sampling"})
            with pytest.raises(MCPError):
                await session.call_tool("hang", {"tag": "late"}, read_timeout_seconds=0.2)
            await eventually(
                lambda: any(seen.message.get("method") == "notifications/cancelled" for seen in talker.requests)
            )
    without = [seen for seen in talker.requests if seen.authorization != "Bearer hers"]
    assert {(seen.method, seen.message.get("method")) for seen in without} <= {("DELETE", None)}


@on_http
async def test_a_callback_that_calls_somebody_else_takes_no_credentials_along(talker: Talker) -> None:
    """B17: a callback runs in the context of the call that it belongs to."""
    other = Upstream("other", HttpTarget(f"http://127.0.0.1:{talker.port}/mcp"))
    bob = Listener("bob")
    async with SessionPool() as pool:

        async def sampling(_context: ClientRequestContext, _params: types.CreateMessageRequestParams) -> Any:
            begun = len(talker.requests)
            his = {"Authorization": "Bearer bob"}
            async with pool.session(other, principal="bob", headers=his, callbacks=bob.callbacks) as session:
                assert text(await session.call_tool("seen_token")) == "Bearer bob"
                await eventually(lambda: any(seen.method == "GET" for seen in talker.requests[begun:]))
            assert {seen.authorization for seen in talker.requests[begun:]} == {"Bearer bob"}
            answer = types.TextContent(type="text", text="asked bob")
            return types.CreateMessageResult(role="assistant", content=answer, model="none")

        headers = {"Authorization": "Bearer alice"}
        callbacks = Callbacks(sampling=sampling)
        async with pool.session(talker.upstream(), principal="alice", headers=headers, callbacks=callbacks) as session:
            await eventually(lambda: any(seen.method == "GET" for seen in talker.requests))
            assert text(await session.call_tool("ask", {"what": "sampling"})) == "asked bob"
