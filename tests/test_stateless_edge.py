"""Requests of protocol 2026-07-28 on pooled sessions: what is asked on the way, what of an answer reaches the client
and how, and that who leaves cancels. The sessions themselves are played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from faults import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.pool import Message, Upstream, parse
from leasehold.pool.calls import LAST_EVENT_S
from leasehold.pool.jsonrpc import error_body
from leasehold.pool.sse import event, events
from leasehold.pool.upstream import HttpTarget
from leasehold.workers import stateless_edge
from leasehold.workers.answers import Refused, unavailable
from leasehold.workers.bridged_answer import BridgedAnswer
from leasehold.workers.envelope import CLIENT_CAPABILITIES_KEY, LOG_LEVEL_KEY, NAMED_BY, PROTOCOL_VERSION_KEY
from leasehold.workers.errors import BrokenOff, Disconnected, NotRun
from leasehold.workers.identity import Caller
from leasehold.workers.request import Request
from leasehold.workers.stateless_edge import StatelessEdge

pytestmark = pytest.mark.anyio

VERSION = "2026-07-28"
INFO = {"name": "played", "version": "1"}
JSON = (b"content-type", b"application/json")
SSE = (b"content-type", b"text/event-stream")
UPSTREAM = Upstream("played", HttpTarget("http://127.0.0.1:9/mcp"))
ALICE, BOB = Caller("alice", b"a"), Caller("bob", b"b")


def message(method: str = "tools/call", params: Any = None, **more: Any) -> Message:
    meta = {PROTOCOL_VERSION_KEY: VERSION, CLIENT_CAPABILITIES_KEY: {}, **more}
    params = {"name": "x", **(params or {})} if method == "tools/call" else params or {}
    return parse(
        orjson.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": {**params, "_meta": meta}}),
    )


def result_of(request_id: Any, result: Any) -> bytes:
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": result})


def note(method: str, **params: Any) -> bytes:
    return orjson.dumps({"jsonrpc": "2.0", "method": method, "params": params})


def content(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}


@dataclass
class Client:
    """What reaches it."""

    sent: list[dict[str, Any]] = field(default_factory=list)

    async def send(self, sent: Any) -> None:
        self.sent.append(dict(sent))

    @property
    def status(self) -> int:
        starts = [each["status"] for each in self.sent if each["type"] == "http.response.start"]
        assert len(starts) == 1
        assert self.sent[0]["type"] == "http.response.start"
        return starts[0]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(each.get("body", b"") for each in self.sent[1:])

    @property
    def is_whole(self) -> bool:
        """Whether there is an end, one, and nothing after it."""
        ends = [not each.get("more_body", False) for each in self.sent[1:]]
        return ends.count(True) == 1 and ends[-1]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Those of an event stream."""
        assert self.headers[b"content-type"] == b"text/event-stream"
        return [orjson.loads(data) for data in events(self.body)]

    @property
    def answer(self) -> dict[str, Any]:
        """That of a JSON answer."""
        assert self.headers[b"content-type"] == b"application/json"
        assert self.headers[b"content-length"] == b"%d" % len(self.body)
        return orjson.loads(self.body)


async def put(send: Any, status: int, headers: Any, *chunks: bytes, end: bool = True) -> None:
    """An answer of the handshake era, in pieces."""
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    for at, chunk in enumerate(chunks):
        await send({"type": "http.response.body", "body": chunk, "more_body": not end or at < len(chunks) - 1})


class Played:
    """One answer, translated."""

    def __init__(self, request: Message, **options: Any) -> None:
        self.client = Client()
        self.refused: list[Message] = []
        self.answer = BridgedAnswer(self.client.send, request, INFO, self._refuse, **options)

    async def _refuse(self, request: Message) -> None:
        self.refused.append(request)

    async def of(self, status: int, headers: Any, *chunks: bytes) -> Client:
        await put(self.answer.send, status, headers, *chunks)
        await self.answer.fail("ended", "unknown")
        self.answer.close()
        assert self.client.is_whole
        return self.client


STAMPED = {"_meta": {"io.modelcontextprotocol/serverInfo": INFO}, "resultType": "complete"}


class TestAnswers:
    @pytest.mark.parametrize(
        ("headers", "body"),
        [([JSON], result_of(7, content("a"))), ([SSE], event(result_of(7, content("a"))))],
        ids=["json", "stream"],
    )
    async def test_a_response_that_comes_first_is_json(self, headers: Any, body: bytes) -> None:
        """B48"""
        client = await Played(message()).of(200, headers, body[:9], body[9:])
        assert client.status == 200
        assert client.answer == {"jsonrpc": "2.0", "id": 7, "result": {**content("a"), **STAMPED}}

    @pytest.mark.parametrize(
        ("code", "made", "status"),
        [(-32601, -32601, 404), (-32002, -32602, 400), (-32042, -32603, 200), (-32000, -32000, 200), (5, 5, 200)],
    )
    @pytest.mark.parametrize("headers", [[JSON], [SSE]], ids=["json", "stream"])
    async def test_b40_an_error_that_comes_first_has_the_status_of_its_code(
        self, code: int, made: int, status: int, headers: Any
    ) -> None:
        body = error_body(code, "told", id=7, data={"a": 1})
        client = await Played(message()).of(200, headers, event(body) if headers == [SSE] else body)
        assert client.status == status
        assert client.answer["error"] == {"code": made, "message": "told", "data": {"a": 1}}

    async def test_what_comes_before_the_response_makes_a_stream(self) -> None:
        """B20: its own progress and the logs that were asked for, in order; ids of events stay behind."""
        request = message(progressToken="mine", **{LOG_LEVEL_KEY: "info"})
        played = Played(request)
        said = [
            b"id: 1\ndata: \n\n: a comment\n\nretry: 5\n\n",
            b"id: 2\n" + event(note("notifications/message", level="debug", data="too low")),
            event(note("notifications/progress", progressToken="another's", progress=1)),
            event(note("notifications/tools/list_changed")),
            event(b"no json"),
            b"id: 3\n" + event(note("notifications/progress", progressToken="mine", progress=1)),
            event(note("notifications/message", level="error", data="high")),
            event(result_of(8, content("another's"))),
            event(result_of(7, content("a"))) + event(note("notifications/message", level="error", data="late")),
        ]
        client = await played.of(200, [SSE], *said)
        assert client.status == 200
        assert client.headers[b"x-accel-buffering"] == b"no"
        assert [each.get("method") for each in client.messages] == [
            "notifications/progress",
            "notifications/message",
            None,
        ]
        assert client.messages[-1]["result"] == {**content("a"), **STAMPED}
        assert b"id:" not in client.body

    async def test_an_error_on_a_stream_that_has_begun_is_an_event(self) -> None:
        played = Played(message(progressToken=1))
        begun = event(note("notifications/progress", progressToken=1, progress=1))
        client = await played.of(200, [SSE], begun, event(error_body(-32002, "told", id=7)))
        assert client.messages[-1]["error"] == {"code": -32602, "message": "told"}

    async def test_a_request_of_the_server_is_answered_here(self) -> None:
        played = Played(message(progressToken=1))
        asked = event(orjson.dumps({"jsonrpc": "2.0", "id": "s", "method": "roots/list"}))
        client = await played.of(200, [SSE], asked + event(result_of(7, content("a"))))
        assert [each.id for each in played.refused] == ["s"]
        assert "result" in client.answer

    @pytest.mark.parametrize("headers", [[JSON], [SSE]], ids=["json", "stream"])
    @pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"jsonrpc":"2.0","method":"x"}', result_of(8, {})])
    async def test_b40_an_answer_that_is_none_may_have_run(self, headers: Any, body: bytes) -> None:
        client = await Played(message()).of(200, headers, event(body) if headers == [SSE] else body)
        assert client.status == 200
        assert (client.answer["id"], client.answer["error"]["data"]) == (7, {"outcome": "unknown"})

    async def test_a_stream_that_ends_early_says_so(self) -> None:
        played = Played(message(progressToken=1))
        client = await played.of(200, [SSE], event(note("notifications/progress", progressToken=1, progress=1)))
        assert client.messages[-1]["error"]["data"] == {"outcome": "unknown"}

    @pytest.mark.parametrize("body", [b"", b"<html>", b'{"detail":"no"}'])
    async def test_a_refusal_in_other_words_is_passed_on(self, body: bytes) -> None:
        """B40"""
        headers = [(b"content-type", b"text/html"), (b"www-authenticate", b"Bearer"), (b"content-length", b"99")]
        client = await Played(message()).of(401, headers, body)
        assert (client.status, client.body) == (401, body)
        assert client.headers[b"www-authenticate"] == b"Bearer"
        assert client.headers[b"content-length"] == b"%d" % len(body)

    async def test_a_refusal_in_json_keeps_its_status_and_headers(self) -> None:
        headers = [JSON, (b"retry-after", b"1"), (b"content-length", b"9")]
        body = error_body(-32000, "busy", id=None, data={"outcome": "not_run"})
        client = await Played(message()).of(503, headers, body)
        assert (client.status, client.headers[b"retry-after"]) == (503, b"1")
        assert (client.answer["id"], client.answer["error"]["data"]) == (7, {"outcome": "not_run"})

    async def test_a_silent_call_becomes_a_stream_after_a_while(self) -> None:
        """So that comments can keep its connection; its error is an event then."""
        played = Played(message(), commit_after_s=0.01)
        await eventually(lambda: played.client.sent)
        client = await played.of(200, [JSON], error_body(-32601, "none", id=7))
        assert client.status == 200
        assert [each["error"]["code"] for each in client.messages] == [-32601]

    async def test_the_client_does_not_wait_for_a_stream_that_does_not_end(self) -> None:
        """B9: it has the response, and its connection is free for the next request."""
        played = Played(message())
        await put(played.answer.send, 200, [SSE], event(result_of(7, content("a"))), end=False)
        assert played.client.answer["result"]["content"] == content("a")["content"], "at once"
        await eventually(lambda: played.client.is_whole, LAST_EVENT_S + 5)
        played.answer.close()

    async def test_an_answer_that_is_nested_too_deep_is_none(self) -> None:
        """B30: what can be read of a server can be deeper than what can be written."""
        deep = b'{"jsonrpc":"2.0","id":7,"result":{"content":' + b"[" * 600 + b"]" * 600 + b"}}"
        client = await Played(message()).of(200, [JSON], deep)
        assert client.answer["error"]["data"] == {"outcome": "unknown"}


SAID = [
    event(note("notifications/progress", progressToken=1, progress=1)),
    b": comment\n\n",
    event(note("notifications/tools/list_changed")),
    b"id: 4\r\n" + event(note("notifications/message", level="info", data="x")).replace(b"\n", b"\r\n"),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SAID), max_size=5), st.lists(st.integers(0, 600), max_size=6))
def test_however_the_bytes_are_cut(said: list[bytes], cuts: list[int]) -> None:
    """B42: the same messages in the same order."""
    whole = b"".join([*said, event(result_of(7, content("a")))])
    ends = sorted({min(cut, len(whole)) for cut in cuts} | {len(whole)})
    pieces = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    async def play() -> Client:
        return await Played(message(progressToken=1)).of(200, [SSE], *pieces)

    client = asyncio.run(play())
    if SAID[0] in said:
        methods = [each.get("method") for each in client.messages]
        assert methods == ["notifications/progress"] * said.count(SAID[0]) + [None]
    else:
        assert client.answer["result"]["content"] == content("a")["content"]


# -- the edge ------------------------------------------------------------------------------------------------------

Play = Callable[[Message, Any], Awaitable[None]]


@dataclass
class Sessions:
    """Answers what the edge asks; notes who asked what."""

    tools: Any = field(default_factory=list)
    play: Play | None = None
    asked: list[tuple[str, Message]] = field(default_factory=list)
    scopes: list[Any] = field(default_factory=list)

    async def ask(self, request: Request, send: Any) -> None:
        asked = request.message
        assert asked is not None
        assert orjson.loads(request.body) == asked.payload
        self.asked.append((request.caller.principal, asked))
        self.scopes.append(request.scope)
        if self.play is not None and not str(asked.id).startswith("leasehold-") and asked.kind == "request":
            await self.play(asked, send)
            return
        result: Any = content("done")
        if asked.method == "initialize":
            result = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": INFO}
        elif asked.method == "tools/list":
            page = self.tools if isinstance(self.tools, list) else self.tools(asked.params.get("cursor"))
            result = page if isinstance(page, dict) else {"tools": page}
        if asked.kind != "request":
            await put(send, 202, [], b"")
        else:
            await put(send, 200, [JSON], result_of(asked.id, result))

    def methods(self, principal: str | None = None) -> list[str | None]:
        return [asked.method for who, asked in self.asked if principal in (None, who)]


def headers_of(asked: Message, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    found = [(b"mcp-protocol-version", VERSION.encode()), (b"mcp-method", (asked.method or "").encode())]
    if asked.method in NAMED_BY:
        found.append((b"mcp-name", asked.params[NAMED_BY[asked.method]].encode()))
    return [*found, *more]


def method_of(request: Request) -> str | None:
    assert request.message is not None
    return request.message.method


def id_of(request: Request) -> Any:
    assert request.message is not None
    return request.message.id


async def never() -> Any:
    await asyncio.get_running_loop().create_future()


async def serve(
    edge: StatelessEdge,
    asked: Message | None,
    *more: tuple[bytes, bytes],
    caller: Caller = ALICE,
    receive: Any = never,
    method: str = "POST",
) -> Client:
    client = Client()
    scope = {"type": "http", "method": method, "headers": headers_of(asked, *more) if asked else list(more)}
    await edge.serve(Request(UPSTREAM, caller, VERSION, asked, b"", scope, receive), client.send)
    assert client.is_whole
    return client


TOOLS = [
    {"name": "x", "inputSchema": {"type": "object", "properties": {"a": {"type": "string", "x-mcp-header": "A"}}}},
    {"name": "y", "inputSchema": {"type": "object"}},
]
WITH_A = {"arguments": {"a": "1"}}


class TestEdge:
    async def test_a_call_goes_upstream_in_the_words_of_the_handshake_era(self) -> None:
        """B48: under a client's name that no other has, and without the headers of the newer era."""
        sessions = Sessions()
        edge = StatelessEdge(sessions.ask)
        for _ in range(2):
            client = await serve(edge, message(), (b"mcp-session-id", b"made up"), (b"authorization", b"a"))
            assert client.answer["result"] == {**content("done"), **STAMPED}
        assert sessions.methods() == ["initialize", "tools/call", "tools/call"]
        assert sessions.asked[-1][1].payload["params"] == {"name": "x"}
        names = set()
        for scope in sessions.scopes[1:]:
            headers = dict(scope["headers"])
            names.add(headers.pop(b"mcp-session-id"))
            assert headers == {b"authorization": b"a"}
        assert len(names) == 2
        assert b"made up" not in names

    async def test_discovery_is_what_the_server_said_when_it_was_initialized(self) -> None:
        sessions = Sessions()
        edge = StatelessEdge(sessions.ask)
        result = (await serve(edge, message("server/discover"))).answer["result"]
        assert result["supportedVersions"] == [VERSION]
        assert result["capabilities"] == {"tools": {}}
        await serve(edge, message())
        assert sessions.methods() == ["initialize", "tools/call"], "and need not be asked again"

    async def test_discovery_of_a_server_that_cannot_be_reached(self) -> None:
        async def refused(*_: Any) -> None:
            raise unavailable("it died", "leasehold-initialize", "unknown")

        for method in ("server/discover", "tools/call"):
            with pytest.raises(Refused) as refusal:
                await serve(StatelessEdge(refused), message(method))
            assert (refusal.value.status, refusal.value.id) == (503, 7)
            assert refusal.value.data == {"outcome": "not_run"}, "whatever became of what was asked before it"

        async def failing(request: Request, send: Any) -> None:
            died = error_body(-32000, "died", id=id_of(request), data={"outcome": "not_run"})
            await put(send, 200, [JSON], died)

        client = await serve(StatelessEdge(failing), message("server/discover"))
        assert (client.answer["id"], client.answer["error"]["data"]) == (7, {"outcome": "not_run"})

    async def test_what_is_no_post_of_a_request(self) -> None:
        """B50"""
        edge = StatelessEdge(Sessions().ask)
        for method in ("GET", "DELETE"):
            with pytest.raises(Refused) as refusal:
                await serve(edge, None, method=method)
            assert (refusal.value.status, dict(refusal.value.headers)[b"allow"]) == (405, b"POST")
        cancelled = parse(note("notifications/cancelled", requestId=7))
        client = await serve(edge, cancelled)
        assert (client.status, client.body) == (202, b"")

    async def test_nothing_is_asked_for_a_request_that_is_refused(self) -> None:
        sessions = Sessions()
        edge = StatelessEdge(sessions.ask)
        for asked in (message("subscriptions/listen"), message("ping"), message(params={"name": 5})):
            request = Request(UPSTREAM, ALICE, VERSION, asked, b"", {"headers": []}, never)
            with pytest.raises(Refused):
                await edge.serve(request, Client().send)
        assert sessions.asked == []

    async def test_a_request_that_is_nested_too_deep_is_refused(self) -> None:
        """B30"""
        deep: Any = []
        for _ in range(400):
            deep = [deep]
        head = message(params={"arguments": {}})
        arguments = {**head.params, "arguments": {"deep": deep}}
        asked = Message("request", "tools/call", 7, {**head.payload, "params": arguments})
        with pytest.raises(Refused) as refusal:
            await serve(StatelessEdge(Sessions().ask), asked)
        assert (refusal.value.status, refusal.value.code) == (400, -32600)

    @pytest.mark.parametrize(
        ("raised", "outcome"),
        [(BrokenOff("gone"), "unknown"), (NotRun("closed"), "not_run"), (unavailable("moving"), "not_run")],
    )
    async def test_what_fails_on_a_stream_that_has_begun_is_told_on_it(self, raised: Exception, outcome: str) -> None:
        """B9, B34"""

        async def play(_asked: Message, send: Any) -> None:
            await put(send, 200, [SSE], event(note("notifications/progress", progressToken=1, progress=1)), end=False)
            raise raised

        edge = StatelessEdge(Sessions(play=play).ask)
        client = await serve(edge, message(progressToken=1))
        assert client.messages[-1]["error"]["data"] == {"outcome": outcome}

    async def test_what_fails_before_anything_was_said(self) -> None:
        """B8: a refusal is the gateway's to tell, an answer that broke off may have run."""
        raised: list[Exception] = [NotRun("closed"), unavailable("moving"), BrokenOff("gone")]

        async def play(_asked: Message, _send: Any) -> None:
            raise raised[0]

        edge = StatelessEdge(Sessions(play=play).ask)
        for kind in (NotRun, Refused):
            with pytest.raises(kind):
                await serve(edge, message())
            raised.pop(0)
        assert (await serve(edge, message())).answer["error"]["data"] == {"outcome": "unknown"}


class TestHeadersOfArguments:
    async def test_the_server_is_asked_for_its_tools_once(self) -> None:
        """B50: and not at all where it cannot matter."""
        sessions = Sessions(tools=TOOLS)
        edge = StatelessEdge(sessions.ask)
        await serve(edge, message())
        assert "tools/list" not in sessions.methods()
        for _ in range(2):
            with pytest.raises(Refused) as refusal:
                await serve(edge, message(params=WITH_A))
            assert (refusal.value.status, refusal.value.code) == (400, -32020)
            await serve(edge, message(params=WITH_A), (b"mcp-param-a", b"1"))
        await serve(edge, message(params={"name": "y", **WITH_A}))
        assert sessions.methods().count("tools/list") == 1

    async def test_calls_at_the_same_time_ask_once(self) -> None:
        """B12"""
        sessions = Sessions(tools=TOOLS)
        edge = StatelessEdge(sessions.ask)
        asked = [serve(edge, message(params=WITH_A), (b"mcp-param-a", b"1")) for _ in range(20)]
        assert {client.status for client in await asyncio.gather(*asked)} == {200}
        assert sessions.methods().count("tools/list") == sessions.methods().count("initialize") == 1

    async def test_b17_what_one_principal_may_see_says_nothing_to_another(self) -> None:
        sessions = Sessions(tools=TOOLS)
        edge = StatelessEdge(sessions.ask)
        for caller in (ALICE, BOB):
            await serve(edge, message(params=WITH_A), (b"mcp-param-a", b"1"), caller=caller)
        for caller in (ALICE, BOB):
            assert sessions.methods(caller.principal) == ["tools/list", "initialize", "tools/call"]

    async def test_a_list_that_passes_by_is_learnt_from(self) -> None:
        """A client that learns of a header from a list is checked by the same list."""
        sessions = Sessions(tools=[TOOLS[1], {**TOOLS[1], "name": "x"}])
        edge = StatelessEdge(sessions.ask)
        await serve(edge, message(params=WITH_A))
        sessions.tools = TOOLS
        await serve(edge, message("tools/list"))
        with pytest.raises(Refused):
            await serve(edge, message(params=WITH_A))
        sessions.tools = [{**TOOLS[1], "name": "x"}]
        await serve(edge, message("tools/list"))
        await serve(edge, message(params=WITH_A))

    async def test_every_page_is_read_and_a_circle_is_left(self) -> None:
        pages: dict[Any, Any] = {
            None: {"tools": [TOOLS[1]], "nextCursor": "2"},
            "2": {"tools": [TOOLS[0]], "nextCursor": "2"},
        }
        sessions = Sessions(tools=pages.get)
        edge = StatelessEdge(sessions.ask)
        with pytest.raises(Refused):
            await serve(edge, message(params=WITH_A))
        assert sessions.methods() == ["tools/list", "tools/list"]

    async def test_pages_without_end_are_bounded(self) -> None:
        """B44"""
        count = iter(range(10**6))
        sessions = Sessions(tools=lambda _cursor: {"tools": [], "nextCursor": str(next(count))})
        await serve(StatelessEdge(sessions.ask), message(params=WITH_A))
        assert sessions.methods().count("tools/list") == stateless_edge.MAX_PAGES

    @pytest.mark.parametrize("tools", [{"tools": 5}, {}, {"tools": [1, {}, {"name": []}]}])
    async def test_a_server_without_a_list_is_called_all_the_same(self, tools: Any) -> None:
        sessions = Sessions(tools=lambda _cursor: tools)
        client = await serve(StatelessEdge(sessions.ask), message(params=WITH_A), (b"mcp-param-a", b"2"))
        assert client.status == 200

    async def test_what_is_remembered_is_forgotten_in_time_and_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """B44"""
        now = 1000.0
        monkeypatch.setattr(stateless_edge, "monotonic", lambda: now)
        monkeypatch.setattr(stateless_edge, "MAX_KNOWN", 2)
        sessions = Sessions(tools=[])
        edge = StatelessEdge(sessions.ask)
        await serve(edge, message(params=WITH_A))
        now += stateless_edge.REMEMBER_S - 1
        await serve(edge, message(params=WITH_A))
        assert len(sessions.asked) == 4
        now += 2
        await serve(edge, message(params=WITH_A))
        assert len(sessions.asked) == 7
        for name in ("b", "c", "d"):
            await serve(edge, message(), caller=Caller(name, b"x"))
        assert repr(edge) == "<StatelessEdge known=2>"


class TestLeaving:
    async def test_who_leaves_cancels(self) -> None:
        """B42: in this era; told once, upstream, under the request's own id and name."""
        left = asyncio.Event()

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        sessions = Sessions()

        async def ask(request: Request, send: Any) -> None:
            if method_of(request) != "tools/call":
                await sessions.ask(request, send)
                return
            sessions.scopes.append(request.scope)
            left.set()
            for _ in range(3):
                assert (await request.receive())["type"] == "http.disconnect"
            raise Disconnected

        with pytest.raises(Disconnected):
            await serve(StatelessEdge(ask), message(), receive=receive)
        assert sessions.methods() == ["initialize", "notifications/cancelled"]
        assert sessions.asked[-1][1].params["requestId"] == 7
        call, cancel = (dict(scope["headers"])[b"mcp-session-id"] for scope in sessions.scopes[-2:])
        assert call == cancel

    async def test_who_has_his_answer_may_leave(self) -> None:
        async def receive() -> Any:
            return {"type": "http.disconnect"}

        sessions = Sessions()

        async def ask(request: Request, send: Any) -> None:
            await sessions.ask(request, send)
            if method_of(request) == "tools/call":
                await request.receive()

        await serve(StatelessEdge(ask), message(), receive=receive)
        assert "notifications/cancelled" not in sessions.methods()

    async def test_b14_telling_takes_no_longer_than_a_moment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stateless_edge, "TELL_S", 0.05)

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        sessions = Sessions()

        async def ask(request: Request, send: Any) -> None:
            if method_of(request) == "notifications/cancelled":
                await never()
            elif method_of(request) == "tools/call":
                await request.receive()
                raise Disconnected
            else:
                await sessions.ask(request, send)

        async with asyncio.timeout(10):
            with pytest.raises(Disconnected):
                await serve(StatelessEdge(ask), message(), receive=receive)

    async def test_a_request_of_the_server_is_refused_on_the_session_that_asked(self) -> None:
        async def play(_asked: Message, send: Any) -> None:
            asked = event(orjson.dumps({"jsonrpc": "2.0", "id": "s", "method": "roots/list"}))
            await put(send, 200, [SSE], asked, event(result_of(7, content("a"))))

        sessions = Sessions(play=play)
        await serve(StatelessEdge(sessions.ask), message())
        told = sessions.asked[-1][1]
        assert (told.kind, told.id, told.payload["error"]["code"]) == ("response", "s", -32601)
        call, answer = (dict(scope["headers"])[b"mcp-session-id"] for scope in sessions.scopes[-2:])
        assert call == answer
