"""Clients of protocol 2026-07-28 on servers of the handshake era, through real workers: the SDK's client as it comes,
and requests as they are on the wire."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import mcp_types as types
import orjson
import pytest
from acceptance.driving import Traffic
from faults import eventually
from fleet import EXAMPLES, Fleet, run_example, run_fleet
from leasehold.pool.sse import events
from mcp import Client, MCPError
from mcp_http import HEADERS, RawSession
from mcp_types import methods

pytestmark = [pytest.mark.anyio, pytest.mark.process, pytest.mark.xdist_group("bridge_gateway")]

VERSION = "2026-07-28"
META = "io.modelcontextprotocol/"
ENVELOPE = {f"{META}protocolVersion": VERSION, f"{META}clientCapabilities": {}}
AFFINITIES = pytest.mark.parametrize("affinity", ["none", "principal"])
SERVERS = ["none", "principal", "none-http", "principal-http"]
LIBRARY = Path(__file__).parent / "library_server.py"


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bridge") / "notes"


@pytest.fixture(scope="module")
async def fleet(notes: Path) -> AsyncIterator[Fleet]:
    """Two workers; the library by stdio, and the counter by HTTP and by stdio, in both affinities."""
    library = {"command": sys.executable, "args": [str(LIBRARY), "--notes", str(notes)]}
    counter = {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]}
    broken = {"command": sys.executable, "args": ["-c", "raise SystemExit(3)"]}
    with run_example("counter_http.py", notes.parent) as upstream:
        servers: dict[str, Any] = {}
        for affinity in ("none", "principal"):
            pooled = {"leasehold": {"affinity": affinity}}
            servers[affinity] = {**library, **pooled}
            servers[f"{affinity}-http"] = {"url": upstream.url, **pooled}
            servers[f"{affinity}-counter"] = {**counter, **pooled}
            servers[f"{affinity}-broken"] = {**broken, **pooled}
        async with run_fleet(notes.parent, servers, workers=2) as fleet:
            yield fleet


def request(method: str, params: dict[str, Any] | None = None, id: Any = 7, **meta: Any) -> dict[str, Any]:  # noqa: A002
    params = {**(params or {}), "_meta": {**ENVELOPE, **meta}}
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


def headers_of(payload: dict[str, Any]) -> dict[str, str]:
    named = payload["params"].get("name") or payload["params"].get("uri")
    headers = {**HEADERS, "mcp-protocol-version": VERSION, "mcp-method": payload["method"]}
    return {**headers, "mcp-name": named} if named else headers


def clear(notes: Path) -> None:
    notes.write_text("")


async def ask(url: str, payload: dict[str, Any], **headers: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Status, content type and messages of one request on a connection of its own."""
    sent = {**headers_of(payload), **headers}
    async with aiohttp.ClientSession() as http:
        async with http.post(url, data=orjson.dumps(payload), headers=sent) as response:
            body = await response.read()
            assert "mcp-session-id" not in response.headers
    kind = response.content_type
    return response.status, kind, [orjson.loads(each) for each in (events(body) if "stream" in kind else [body])]


# -- real clients --------------------------------------------------------------------------------------------------


@AFFINITIES
async def test_the_sdk_s_client_as_it_comes_uses_everything_of_a_stdio_server(fleet: Fleet, affinity: str) -> None:
    """B48, B20: tools, resources, prompts, completion, progress and errors, each request on another worker."""
    seen: list[float] = []
    logs: list[Any] = []

    async def progressed(progress: float, _total: float | None, _message: str | None) -> None:
        seen.append(progress)

    async def logged(params: types.LoggingMessageNotificationParams) -> None:
        logs.append(params.data)

    async with Client(fleet.url(affinity), logging_callback=logged, log_level="warning") as client:
        assert client.protocol_version == VERSION, "it found the newer era by itself"
        assert client.server_info is not None
        assert (client.server_info.name, client.server_info.version) == ("library", "1.2.3")
        assert client.instructions == "Ask for books by their title."
        tools = (await client.list_tools()).tools
        assert {"find", "lend", "read_aloud"} <= {tool.name for tool in tools}
        found = await client.call_tool("find", {"title": "Dune"})
        assert found.structured_content == {"title": "Dune", "pages": 412, "tags": ["sand"]}
        kinds = [block.type for block in (await client.call_tool("describe")).content]
        assert kinds == ["text", "image", "audio", "resource", "resource", "resource_link"]
        assert (await client.call_tool("tear", {"title": "Emma"})).is_error
        assert (await client.call_tool("add", {"a": "no number"})).is_error
        lent = await client.call_tool("lend", {"shelf": "ü / 日本", "days": 3, "renew": True})
        assert lent.structured_content == {"result": "ü / 日本 for 3 days"}, "with headers for its arguments"
        read = await client.call_tool("read_aloud", {"pages": 3}, progress_callback=progressed)
        assert read.structured_content == {"result": "read"}
        assert seen == [1, 2, 3]
        assert logs == ["warning", "error"], "from the level that the client asked for"
        asked = await client.call_tool("ask")
        assert asked.structured_content == {"result": "refused with -32601"}, "there is nobody to be asked"
        assert len((await client.list_resources()).resources) == 2
        assert len((await client.list_resource_templates()).resource_templates) == 1
        for uri, text in (("book://dune", "Arrakis"), ("book://emma/12", "emma, 12")):
            (contents,) = (await client.read_resource(uri)).contents
            assert isinstance(contents, types.TextResourceContents)
            assert contents.text == text
        with pytest.raises(MCPError) as error:
            await client.read_resource("book://nowhere")
        assert error.value.error.code == -32602
        assert len((await client.list_prompts()).prompts) == 2
        (prompted,) = (await client.get_prompt("review", {"title": "Dune"})).messages
        assert isinstance(prompted.content, types.TextContent)
        assert prompted.content.text == "Review Dune in a kind tone."
        completed = await client.complete(types.PromptReference(name="review"), {"name": "title", "value": "Du"})
        assert completed.completion.values == ["Dune", "Dubliners"]


@AFFINITIES
async def test_both_eras_side_by_side(fleet: Fleet, affinity: str) -> None:
    """B48: the same server, at the same time, by clients of either era."""
    async with Client(fleet.url(affinity), mode="legacy") as old, Client(fleet.url(affinity), mode=VERSION) as new:
        assert (old.protocol_version, new.protocol_version) == ("2025-11-25", VERSION)
        calls = [client.call_tool("add", {"a": n, "b": n}) for n in range(10) for client in (old, new)]
        results = [result.structured_content for result in await asyncio.gather(*calls)]
        assert results == [{"result": 2 * n} for n in range(10) for _ in range(2)]


async def test_all_clients_of_a_principal_have_one_session_wherever_they_land(fleet: Fleet) -> None:
    """B12, B17: and so their state, which clients of the newer era have nowhere else."""
    before = await Traffic.of(fleet)
    url = fleet.url("principal-http")
    counts: list[int] = []
    for _ in range(3):
        async with Client(url) as client:
            for _ in range(4):
                result = await client.call_tool("increment")
                assert result.structured_content is not None
                counts.append(result.structured_content["result"])
    assert counts == list(range(1, 13))
    traffic = (await Traffic.of(fleet)).since(before)
    assert traffic.local > 0
    assert traffic.forwarded > 0
    other = request("tools/call", {"name": "increment", "arguments": {}})
    _, _, (answer,) = await ask(url, other, authorization="Bearer somebody else")
    assert answer["result"]["structuredContent"] == {"result": 1}


# -- on the wire ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
async def test_answers_are_those_of_the_newer_era(fleet: Fleet, server: str) -> None:
    """B48: JSON for what is answered at once, whatever the server makes of it; each result validates."""
    for method, params in (
        ("server/discover", {}),
        ("tools/list", {}),
        ("resources/list", {}),
        ("resources/templates/list", {}),
        ("prompts/list", {}),
        ("tools/call", {"name": "echo" if "http" in server else "find", "arguments": {"text": "x", "title": "x"}}),
        ("resources/read", {"uri": "counter://about" if "http" in server else "book://dune"}),
    ):
        payload = request(method, params, id="é")
        status, kind, (answer,) = await ask(fleet.url(server), payload)
        assert (status, kind, answer["id"]) == (200, "application/json", "é"), answer
        methods.validate_server_result(method, VERSION, answer["result"])
        assert answer["result"]["_meta"][f"{META}serverInfo"]["name"], "who said it"


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    ("payload", "headers", "status", "code"),
    [
        (request("ping"), {}, 404, -32601),
        (request("subscriptions/listen", {"notifications": {}}), {}, 404, -32601),
        (request("logging/setLevel", {"level": "debug"}), {}, 404, -32601),
        (request("tools/list"), {"mcp-method": "tools/call"}, 400, -32020),
        (request("tools/call", {"name": "x", "arguments": {}}), {"mcp-name": "y"}, 400, -32020),
        (request("tools/list", **{f"{META}clientCapabilities": 5}), {}, 400, -32602),
        (request("tools/list", **{f"{META}logLevel": "loud"}), {}, 400, -32602),
        (request("tools/list"), {"mcp-protocol-version": "2099-01-01"}, 400, -32020),
        (
            request("tools/list", **{f"{META}protocolVersion": "2099-01-01"}),
            {"mcp-protocol-version": "2099-01-01"},
            400,
            -32022,
        ),
        (request("completion/complete", {"ref": {"type": "ref/prompt", "name": "x"}}), {}, None, None),
        (request("resources/read", {"uri": "book://nowhere"}), {}, 400, -32602),
    ],
)
async def test_refusals_have_their_status(
    fleet: Fleet, server: str, payload: dict[str, Any], headers: dict[str, str], status: int | None, code: int | None
) -> None:
    """B50"""
    got, kind, (answer,) = await ask(fleet.url(server), payload, **headers)
    assert (kind, answer["id"]) == ("application/json", 7)
    if code is not None:
        assert (got, answer["error"]["code"]) == (status, code)
    else:  # the server's own refusal: what it says differs, that it refuses does not
        assert (got, answer["error"]["code"]) in ((400, -32602), (404, -32601))


@pytest.mark.parametrize("server", SERVERS)
async def test_what_is_no_request(fleet: Fleet, server: str) -> None:
    """B50"""
    headers = {**HEADERS, "mcp-protocol-version": VERSION}
    async with aiohttp.ClientSession() as http:
        for method in ("GET", "DELETE"):
            async with http.request(method, fleet.url(server), headers=headers) as response:
                assert (response.status, response.headers["allow"]) == (405, "POST")
        for body, status in (
            ({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}, 202),
            ({"jsonrpc": "2.0", "id": 1, "result": {}}, 400),
            ([request("tools/list")], 400),
        ):
            async with http.post(fleet.url(server), data=orjson.dumps(body), headers=headers) as response:
                assert response.status == status


@AFFINITIES
async def test_a_stream_holds_what_was_asked_for_and_the_answer(fleet: Fleet, affinity: str) -> None:
    """B20, B42: on both workers, so also by a hop."""
    call = {"name": "read_aloud", "arguments": {"pages": 2}}
    for index in range(2):
        url = fleet.worker_url(index, affinity)
        status, kind, messages = await ask(url, request("tools/call", call, progressToken="t"))
        assert (status, kind) == (200, "text/event-stream")
        assert [each["params"]["progress"] for each in messages[:-1]] == [1, 2]
        assert {each["params"]["progressToken"] for each in messages[:-1]} == {"t"}
        assert messages[-1]["result"]["resultType"] == "complete"
        _, _, messages = await ask(url, request("tools/call", call, **{f"{META}logLevel": "error"}))
        assert [each["params"]["data"] for each in messages[:-1]] == ["error"]
        status, kind, (answer,) = await ask(url, request("tools/call", call))
        assert (status, kind) == (200, "application/json"), "nothing was asked for"
        assert answer["result"]["content"][0]["text"] == "read"


@AFFINITIES
@pytest.mark.parametrize("index", [0, 1])
async def test_who_leaves_cancels(fleet: Fleet, notes: Path, affinity: str, index: int) -> None:
    """B42: the server is told, in its own words, also by a hop; the session is as good as before."""
    clear(notes)
    url = fleet.worker_url(index, affinity)
    payload = request("tools/call", {"name": "wait", "arguments": {}}, progressToken=1)
    async with aiohttp.ClientSession() as http:
        async with http.post(url, data=orjson.dumps(payload), headers=headers_of(payload)) as response:
            assert b"notifications/progress" in await response.content.readany()
    await eventually(lambda: notes.read_text() == "cancelled\n")
    status, _, (answer,) = await ask(url, request("tools/call", {"name": "add", "arguments": {"a": 1, "b": 1}}))
    assert (status, answer["result"]["structuredContent"]) == (200, {"result": 2})


@AFFINITIES
async def test_b9_a_server_that_dies_in_mid_call_is_told_at_once(fleet: Fleet, affinity: str) -> None:
    """As what it is: a call that may have run. The next call has a server again."""
    url = fleet.url(f"{affinity}-counter")
    status, _, (answer,) = await ask(url, request("tools/call", {"name": "crash", "arguments": {}}))
    assert status == 200
    assert answer["error"]["data"] == {"outcome": "unknown"}
    payload = request("tools/call", {"name": "increment", "arguments": {}})

    async def counts() -> bool:
        status, _, (answer,) = await ask(url, payload)
        return status == 200 and "result" in answer

    async with asyncio.timeout(20):
        while not await counts():
            await asyncio.sleep(0.05)


@AFFINITIES
@pytest.mark.parametrize("method", ["server/discover", "tools/list"])
async def test_a_server_that_does_not_start_is_unavailable(fleet: Fleet, affinity: str, method: str) -> None:
    """B8: nothing ran, and the client may come back."""
    status, kind, (answer,) = await ask(fleet.url(f"{affinity}-broken"), request(method))
    assert (status, kind) == (503, "application/json")
    assert answer["error"]["data"] == {"outcome": "not_run"}


@AFFINITIES
async def test_clients_of_the_handshake_era_see_none_of_it(fleet: Fleet, affinity: str) -> None:
    async with aiohttp.ClientSession() as http, RawSession(http, fleet.url(affinity)) as session:
        result = (await session.request("tools/list")).result
        assert not {"resultType", "ttlMs", "cacheScope"} & set(result)
        assert (await session.request("ping")).result == {}


@AFFINITIES
async def test_a_server_that_does_not_start_opens_no_session_of_either_era(fleet: Fleet, affinity: str) -> None:
    """B8"""
    async with aiohttp.ClientSession() as http:
        answer = await RawSession(http, fleet.url(f"{affinity}-broken")).initialize()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


@AFFINITIES
async def test_b30_what_is_nested_too_deep_to_be_written_again(fleet: Fleet, affinity: str) -> None:
    """In either era: an error, and no trace of a stack."""
    payload = orjson.dumps(request("tools/call", {"name": "find", "arguments": {}}))
    payload = payload.replace(b'"arguments":{}', b'"arguments":{"title":' + b"[" * 300 + b"]" * 300 + b"}")
    headers = headers_of(request("tools/call", {"name": "find"}))
    async with aiohttp.ClientSession() as http:
        async with http.post(fleet.url(affinity), data=payload, headers=headers) as response:
            answer = await response.json()
            assert (response.status, answer["id"], answer["error"]["code"]) == (400, 7, -32600)
        async with RawSession(http, fleet.url(affinity)) as session:
            payload = payload.replace(b'"_meta"', b'"other"')
            answer = await session.post(payload)
            assert (answer.status, answer.error["data"]) == (200, {"outcome": "not_run"})
    assert not any("request_failed" in worker.output() for worker in fleet.workers)
