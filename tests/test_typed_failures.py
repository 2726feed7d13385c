"""The typed face when things go wrong: timeouts, cancellation, what is repeated and what is not, and sessions that the
upstream has forgotten. Against the SDK's own server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from faults import Proxy, eventually
from leasehold.pool import HttpTarget, Message, OpenFailed, SessionPool, Upstream, UpstreamLost
from leasehold.pool.dispatcher import CallFailed
from leasehold.pool.typed import Callbacks
from lending_pool import FILES, TalkingLink, lending
from mcp import ClientSession, MCPError
from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT
from talkers import SDK_LEAVES_STREAMS, Kind, Talker, talking

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings(SDK_LEAVES_STREAMS)]

KINDS: list[Kind] = ["http", "http-json", "sse", "stdio"]


@pytest.fixture
async def talker(request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncGenerator[Talker]:
    async with talking(request.param) as talker:
        yield talker


on_all = pytest.mark.parametrize("talker", KINDS, indirect=True)
on_http = pytest.mark.parametrize("talker", ["http"], indirect=True)
on_both_http = pytest.mark.parametrize("talker", ["http", "http-json"], indirect=True)


def text(result: Any) -> str:
    assert not result.is_error, result
    return result.content[0].text


async def until(session: ClientSession, tool: str, tag: str, *values: str) -> None:
    """Ask a tool until it says one of those values."""
    async with asyncio.timeout(10):
        while text(await session.call_tool(tool, {"tag": tag})).lower() not in values:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def cut_off(talker: Talker) -> AsyncGenerator[tuple[Proxy, Upstream]]:
    """A proxy before the talker, whose `break_all` breaks every connection."""
    async with Proxy(f"redis://127.0.0.1:{talker.port}") as proxy:
        yield proxy, talker.upstream(port=int(proxy.url.rpartition(":")[2]))


# -- timeouts and cancellation -----------------------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("tool", ["hang", "peek"])
async def test_a_timeout_is_typed_told_to_the_server_and_not_repeated(talker: Talker, tool: str) -> None:
    """B8: not even where the tool is safe, for the caller's time is up."""
    async with SessionPool() as pool, pool.session(talker.upstream()) as session:
        await session.list_tools()
        begun = time.monotonic()
        with pytest.raises(CallFailed, match=r"Timed out after 0\.3 s waiting for 'tools/call'") as caught:
            await session.call_tool(tool, {"tag": "t"}, read_timeout_seconds=0.3)
        assert time.monotonic() - begun < 5
        assert isinstance(caught.value, MCPError)
        assert (caught.value.outcome, caught.value.error.code) == ("unknown", REQUEST_TIMEOUT)
        assert caught.value.error.data == {"outcome": "unknown"}
        await until(session, "was_cancelled", "t", "true")
        assert text(await session.call_tool("count_of", {"tag": "t"})) == "1"


@on_all
async def test_a_cancelled_call_is_told_to_the_server_and_costs_nobody_else_anything(talker: Talker) -> None:
    """B20, B21"""
    async with (
        SessionPool() as pool,
        pool.session(talker.upstream(), affinity="x") as session,
        pool.session(talker.upstream(), affinity="x") as other,
    ):
        napping = asyncio.create_task(other.call_tool("nap", {"seconds": 1.0}))
        hanging = asyncio.create_task(session.call_tool("hang", {"tag": "c"}))
        await until(session, "count_of", "c", "1")
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        await until(other, "was_cancelled", "c", "true")
        assert text(await session.call_tool("increment")) == "1"
        assert text(await napping) == "slept 1.0"
        assert pool.statistics().opened == 1


@on_all
async def test_a_block_that_is_cancelled_in_mid_call_closes_its_session(talker: Talker) -> None:
    """B3, B6"""
    async with SessionPool() as pool:

        async def use() -> None:
            async with pool.session(talker.upstream()) as session:
                begun.set_result(session)
                await session.call_tool("hang", {"tag": "b"})

        begun: asyncio.Future[ClientSession] = asyncio.get_running_loop().create_future()
        using = asyncio.create_task(use())
        await until(await begun, "count_of", "b", "1")
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        await eventually(lambda: len(pool) == 0)
        assert pool.statistics().closed == {"discarded": 1}


# -- what is repeated --------------------------------------------------------------------------------------------------


@on_http
async def test_a_call_that_may_have_run_is_not_repeated(talker: Talker) -> None:
    """B8"""
    async with SessionPool() as pool, cut_off(talker) as (proxy, upstream):
        async with pool.session(talker.upstream("direct")) as watcher:
            with pytest.raises(CallFailed, match="Connection closed") as caught:  # noqa: PT012
                async with pool.session(upstream) as session:
                    await session.list_tools()
                    poking = asyncio.create_task(session.call_tool("poke", {"tag": "p"}))
                    await until(watcher, "count_of", "p", "1")
                    proxy.break_all()
                    await poking
            assert (caught.value.outcome, caught.value.error.code) == ("unknown", CONNECTION_CLOSED)
            await asyncio.sleep(0.05)
            assert text(await watcher.call_tool("count_of", {"tag": "p"})) == "1"
        await eventually(lambda: pool.statistics().closed == {"discarded": 1})


@on_http
@pytest.mark.parametrize("safe_by", ["the server", "the configuration", "nobody"])
async def test_a_call_that_may_have_run_is_repeated_once_where_it_is_safe(talker: Talker, safe_by: str) -> None:
    """B8: as the server declares it in a list that was asked for, or the configuration does."""
    async with SessionPool() as pool, cut_off(talker) as (proxy, upstream):
        if safe_by == "the configuration":
            upstream = Upstream(upstream.name, upstream.target, idempotent_tools=frozenset({"poke"}))
        tool = "poke" if safe_by == "the configuration" else "peek"
        async with pool.session(talker.upstream("direct")) as watcher, pool.session(upstream) as session:
            if safe_by == "the server":
                await session.list_tools()
            calling = asyncio.create_task(session.call_tool(tool, {"tag": "s"}))
            await until(watcher, "count_of", "s", "1")
            proxy.break_all()
            if safe_by == "nobody":
                with pytest.raises(CallFailed):
                    await calling
                return
            assert text(await calling) == "2"
            ids = [seen.message["id"] for seen in talker.calls(tool)]
            assert len(set(ids)) == len(ids) == 2, "an id is not used again"
        await eventually(lambda: pool.statistics().in_flight == 0)
        assert pool.statistics().closed == {}, "the session was none the worse for it"


@on_http
async def test_an_upstream_that_refuses_the_connection_has_not_run_the_call(talker: Talker) -> None:
    """B8: tried twice, then told."""
    async with SessionPool() as pool, cut_off(talker) as (proxy, upstream):
        with pytest.raises(CallFailed, match="Connection closed: cannot connect to the upstream") as caught:  # noqa: PT012
            async with pool.session(upstream) as session:
                await session.call_tool("increment")
                await proxy.__aexit__()
                await session.call_tool("increment")
        assert caught.value.outcome == "not_run"
        assert len(talker.calls("increment")) == 1
        await eventually(lambda: len(pool) == 0)


@on_all
async def test_ids_are_never_used_again_on_a_session(talker: Talker) -> None:
    """B8: whoever holds it, whatever it is asked."""
    async with SessionPool() as pool:
        for _ in range(3):
            async with pool.session(talker.upstream()) as session:
                await session.list_tools()
                await asyncio.gather(*(session.call_tool("increment") for _ in range(5)))
            async with pool.link(talker.upstream()) as link:
                assert len({link.next_id() for _ in range(10)}) == 10
        ids = [seen.message["id"] for seen in talker.requests if "id" in seen.message]
        assert len(set(ids)) == len(ids)
        assert all(isinstance(one, str) and one.startswith("leasehold-") for one in ids)
        assert pool.statistics().opened == 1


# -- sessions that are gone --------------------------------------------------------------------------------------------


@on_both_http
async def test_a_session_that_was_forgotten_while_idle_is_replaced_before_its_first_call_is_lost(
    talker: Talker,
) -> None:
    """B7, B8: a 404 says that the call did not run."""
    async with SessionPool() as pool:
        async with pool.session(talker.upstream()) as session:
            assert text(await session.call_tool("increment")) == "1"
        talker.forget_all()
        async with pool.session(talker.upstream()) as session:
            calls = [session.call_tool("increment") for _ in range(4)]
            assert sorted(text(result) for result in await asyncio.gather(*calls)) == ["1", "2", "3", "4"]
            assert text(await session.call_tool("increment")) == "5"
        assert pool.statistics().opened == 2
        await eventually(lambda: pool.statistics().closed.keys() <= {"discarded", "lost"} and len(pool) == 1)


@on_both_http
async def test_a_session_that_was_forgotten_in_the_middle_of_a_loan_is_told(talker: Talker) -> None:
    """B7: what was done on it is lost, and only its holder knows what that means. The next loan gets a fresh one."""
    async with SessionPool() as pool:
        with pytest.raises(CallFailed, match="Connection closed: the upstream has ended the session") as caught:  # noqa: PT012
            async with pool.session(talker.upstream()) as session:
                assert text(await session.call_tool("increment")) == "1"
                talker.forget_all()
                await session.call_tool("increment")
        assert (caught.value.outcome, caught.value.error.data) == ("not_run", {"outcome": "not_run"})
        async with pool.session(talker.upstream()) as session:
            assert text(await session.call_tool("increment")) == "1"


@on_both_http
async def test_a_shared_session_that_was_forgotten_is_replaced_with_the_next_call(talker: Talker) -> None:
    """B7: every holder's call that finds out fails, and his next one does not."""
    async with SessionPool() as pool:
        async with pool.session(talker.upstream(), affinity="x") as session:
            async with pool.session(talker.upstream(), affinity="x") as other:
                assert text(await session.call_tool("increment")) == "1"
                talker.forget_all()
                with pytest.raises(CallFailed, match="Connection closed"):
                    await session.call_tool("increment")
                results = await asyncio.gather(*(session.call_tool("increment") for _ in range(3)))
                assert sorted(text(result) for result in results) == ["1", "2", "3"]
                with pytest.raises(CallFailed, match="Connection closed"):
                    await other.call_tool("increment")
                assert text(await other.call_tool("increment")) == "4"
        async with pool.session(talker.upstream(), affinity="x") as session:
            assert text(await session.call_tool("increment")) == "5"
        assert pool.statistics().opened == 2


@on_http
async def test_a_session_that_is_forgotten_breaks_off_no_sibling_call(talker: Talker) -> None:
    """B15: the answer to a call that was under way still comes."""
    async with SessionPool() as pool, pool.session(talker.upstream(), affinity="x") as session:
        napping = asyncio.create_task(session.call_tool("nap", {"seconds": 1.0}))
        await eventually(lambda: bool(talker.calls("nap")))
        talker.forget_all()
        with pytest.raises(CallFailed):
            await session.call_tool("increment")
        assert text(await napping) == "slept 1.0"


@on_http
async def test_what_a_holder_listened_for_moves_with_him_to_a_fresh_session(talker: Talker) -> None:
    """B7, B20"""
    logs: list[str] = []

    async def logging(params: Any) -> None:
        logs.append(params.data)

    async with SessionPool() as pool:
        callbacks = Callbacks(logging=logging)
        async with pool.session(talker.upstream()) as session:
            await session.send_ping()
        talker.forget_all()
        async with pool.session(talker.upstream(), callbacks=callbacks) as session:
            assert text(await session.call_tool("talk", {"steps": 1})) == "talked"
            await eventually(lambda: logs == ["log 1"])
            (fresh,) = {seen.session for seen in talker.calls("talk")} - talker.forgotten
            await eventually(lambda: any(seen.method == "GET" and seen.session == fresh for seen in talker.requests))
            await asyncio.sleep(0.05)
            await session.call_tool("announce", {"what": "news"})
            await eventually(lambda: logs == ["log 1", "news"])
        async with pool.session(talker.upstream()) as session:
            await session.send_ping()
        assert pool.statistics().opened == 2


@on_http
async def test_a_fresh_session_that_cannot_be_had_is_told_as_the_call_s_failure(talker: Talker) -> None:
    """B7: typed, with a message, and as something that did not run."""
    async with SessionPool() as pool, cut_off(talker) as (proxy, upstream):
        async with pool.session(upstream) as session:
            await session.send_ping()
        talker.forget_all()
        with pytest.raises(CallFailed, match="Connection closed: cannot connect") as caught:  # noqa: PT012
            async with pool.session(upstream) as session:

                async def gone(*_: Any) -> None:
                    await proxy.__aexit__()

                renew = session.loan_pool.renew  # type: ignore[attr-defined]
                session.loan_pool.renew = _after(gone, renew)  # type: ignore[attr-defined]
                await session.call_tool("increment")
        assert caught.value.outcome == "not_run"
        await eventually(lambda: len(pool) == 0)


def _after(first: Any, then: Any) -> Any:
    async def both(*args: Any, **kwargs: Any) -> Any:
        await first()
        return await then(*args, **kwargs)

    return both


async def test_an_upstream_that_is_not_there_is_an_error_with_words() -> None:
    """B54: never an empty message."""
    async with SessionPool() as pool:
        upstream = Upstream("nowhere", HttpTarget("http://127.0.0.1:1/mcp"))
        with pytest.raises(Exception, match="cannot connect to the upstream: ClientConnectorError"):
            async with pool.session(upstream):
                pass


async def test_a_repeated_call_that_could_not_be_sent_again_may_still_have_run() -> None:
    """B8: what is told is what is true of both tries."""

    async def answer(link: TalkingLink, message: Message) -> None:
        if message.method == "ping":
            raise UpstreamLost("broke") if link.methods().count("ping") == 1 else OpenFailed("cannot connect")

    async with lending() as pool:
        pool.answer = answer
        with pytest.raises(CallFailed, match="broke") as caught:
            async with pool.session(FILES) as session:
                await session.send_ping()
        assert caught.value.outcome == "unknown"
        assert pool.links[0].methods().count("ping") == 2
