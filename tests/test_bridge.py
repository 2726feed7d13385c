"""Clients of protocol 2026-07-28 before servers of the handshake era: requests, answers and refusals in the words of
both, against a real server of the SDK that speaks both, and against the SDK's own tables and validators."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, get_args

import httpx2
import library_server
import mcp_types
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.pool import Message, parse
from leasehold.pool.jsonrpc import InvalidMessage
from leasehold.workers import answers, bridge, envelope, param_headers
from leasehold.workers.answers import HANDSHAKE_VERSIONS, Refused
from leasehold.workers.bridge import (
    answer_server,
    discover,
    error_to_stateless,
    passing,
    response_to_stateless,
    status_of,
    to_handshake,
    to_handshake_headers,
    to_stateless,
)
from leasehold.workers.envelope import check, check_notification, decoded
from leasehold.workers.param_headers import Repeated, check_params, may_repeat, repeated_by_tool, repeated_in
from mcp.shared import inbound
from mcp_types import methods
from mcp_types import version as versions
from pydantic import ValidationError

pytestmark = pytest.mark.anyio

VERSION = "2026-07-28"
Headers = list[tuple[bytes, bytes]]
ACCEPT = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
INFO = {"name": "library", "version": "1"}
PV, CI, CC, LL = (
    envelope.PROTOCOL_VERSION_KEY,
    envelope.CLIENT_INFO_KEY,
    envelope.CLIENT_CAPABILITIES_KEY,
    envelope.LOG_LEVEL_KEY,
)


def meta(**more: Any) -> dict[str, Any]:
    return {PV: VERSION, CI: {"name": "test", "version": "1"}, CC: {}, **more}


def request(method: str, params: Any = None, **head: Any) -> dict[str, Any]:
    """A conforming request; `params` without its envelope."""
    return {"jsonrpc": "2.0", "id": 7, "method": method, "params": {**(params or {}), "_meta": meta()}, **head}


def headers_of(payload: Mapping[str, Any]) -> dict[str, str]:
    """What a conforming client sends with it."""
    method, params = payload["method"], payload.get("params")
    found = {"mcp-protocol-version": VERSION, "mcp-method": method}
    key = envelope.NAMED_BY.get(method)
    if key and isinstance(params, dict) and isinstance(params.get(key), str):
        found["mcp-name"] = inbound.encode_header_value(params[key])
    return found


def asgi(headers: Mapping[str, str]) -> Headers:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def message(payload: Any) -> Message:
    return parse(orjson.dumps(payload))


def refused(payload: Any, headers: Headers) -> Refused | None:
    try:
        check(message(payload), headers)
    except Refused as refusal:
        return refusal
    return None


class Server:
    """The SDK's server, asked by HTTP in either era."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def old(self, method: str, params: Any = None, version: str = "2025-11-25") -> dict[str, Any]:
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params or {}}
        answer = await self._http.post("/mcp", json=body, headers={**ACCEPT, "mcp-protocol-version": version})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def initialize(self, version: str = "2025-11-25") -> dict[str, Any]:
        params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        result = (await self.old("initialize", params))["result"]
        assert result["protocolVersion"] == version
        return result

    async def new(self, payload: Any, headers: Mapping[str, str] | list[tuple[str, str]]) -> tuple[int, dict[str, Any]]:
        sent = [*ACCEPT.items(), *(headers.items() if isinstance(headers, Mapping) else headers)]
        answer = await self._http.post("/mcp", content=orjson.dumps(payload), headers=sent)
        return answer.status_code, answer.json() if answer.content else {}


@asynccontextmanager
async def sdk_server() -> AsyncGenerator[Server]:
    server = library_server.build()
    app = server.streamable_http_app(json_response=True, stateless_http=True)
    transport = httpx2.ASGITransport(app=app)
    async with server.session_manager.run():
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            yield Server(http)


# -- what must not drift -------------------------------------------------------------------------------------------


class TestTables:
    def test_the_bridge_needs_no_sdk(self) -> None:
        """The gateway starts without it: importing it takes longer than everything else together."""
        names = "from leasehold.workers import bridge, envelope, param_headers"
        code = f"import sys; {names}; sys.exit(any(m.partition('.')[0] in ('mcp', 'mcp_types') for m in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

    def test_versions(self) -> None:
        assert versions.HANDSHAKE_PROTOCOL_VERSIONS == HANDSHAKE_VERSIONS
        assert versions.MODERN_PROTOCOL_VERSIONS == answers.STATELESS_VERSIONS

    def test_methods_of_both_eras(self) -> None:
        of = {
            v: {m for m, version in methods.CLIENT_REQUESTS if version == v} for v in versions.KNOWN_PROTOCOL_VERSIONS
        }
        both = of[VERSION].intersection(*of.values())
        assert both == envelope.BRIDGED
        assert of[VERSION] - both == {envelope.DISCOVER, "subscriptions/listen"}
        assert set(envelope._NOT_HERE) == methods.SPEC_CLIENT_METHODS - envelope.BRIDGED - {envelope.DISCOVER}

    def test_keys_and_headers(self) -> None:
        assert mcp_types.PROTOCOL_VERSION_META_KEY == PV
        assert mcp_types.CLIENT_INFO_META_KEY == CI
        assert mcp_types.CLIENT_CAPABILITIES_META_KEY == CC
        assert mcp_types.LOG_LEVEL_META_KEY == LL
        assert mcp_types.SERVER_INFO_META_KEY == bridge.SERVER_INFO_KEY
        assert dict(inbound.NAME_BEARING_METHODS) == envelope.NAMED_BY
        assert {name.decode() for name in envelope.ROUTING_HEADERS} == inbound._ROUTING_HEADER_NAMES
        assert inbound.MCP_PARAM_HEADER_PREFIX.lower() == param_headers.PREFIX
        assert param_headers.ANNOTATION == inbound.X_MCP_HEADER_KEY
        assert get_args(mcp_types.LoggingLevel) == envelope.LOG_LEVELS

    def test_codes_and_statuses(self) -> None:
        assert dict(inbound.ERROR_CODE_HTTP_STATUS) == bridge.STATUS
        assert mcp_types.URL_ELICITATION_REQUIRED in bridge.PROTOCOL_CODES
        assert all(
            code in bridge.PROTOCOL_CODES
            for code in (
                envelope.HEADER_MISMATCH,
                bridge.MISSING_CLIENT_CAPABILITY,
                mcp_types.UNSUPPORTED_PROTOCOL_VERSION,
            )
        )

    def test_what_results_carry(self) -> None:
        assert methods.CACHEABLE_METHODS == bridge.CACHEABLE
        offered = set(mcp_types.ServerCapabilities.model_fields)
        assert offered - set(bridge.CAPABILITIES) == {"experimental", "extensions", "tasks"}

    def test_what_a_server_may_say_while_it_works(self) -> None:
        """Whatever else the newer era knows belongs to subscriptions."""
        known = {name for name, version in methods.SERVER_NOTIFICATIONS if version == VERSION}
        assert {"notifications/progress", "notifications/message"} <= known
        rest = known - {"notifications/progress", "notifications/message", "notifications/cancelled"}
        assert all(name.endswith(("list_changed", "/updated", "/acknowledged")) for name in rest)
        assert not [name for name, version in methods.SERVER_REQUESTS if version == VERSION]


# -- answers -------------------------------------------------------------------------------------------------------

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("tools/list", {}),
    ("tools/call", {"name": "find", "arguments": {"title": "Dune"}}),
    ("tools/call", {"name": "add", "arguments": {"a": 1, "b": 2}}),
    ("tools/call", {"name": "describe", "arguments": {}}),
    ("tools/call", {"name": "describe"}),
    ("tools/call", {"name": "tear", "arguments": {"title": "Emma"}}),
    ("tools/call", {"name": "add", "arguments": {"a": "no number"}}),
    ("resources/list", {}),
    ("resources/templates/list", {}),
    ("resources/read", {"uri": "book://dune"}),
    ("resources/read", {"uri": "book://cover"}),
    ("resources/read", {"uri": "book://emma/12"}),
    ("prompts/list", {}),
    ("prompts/get", {"name": "review", "arguments": {"title": "Dune"}}),
    ("prompts/get", {"name": "look"}),
    (
        "completion/complete",
        {"ref": {"type": "ref/prompt", "name": "review"}, "argument": {"name": "title", "value": "Du"}},
    ),
]


class TestResults:
    @pytest.mark.parametrize("version", HANDSHAKE_VERSIONS)
    async def test_a_real_server_s_results_are_results_of_the_newer_era(self, version: str) -> None:
        """B48: each validates, keeps what the server said, and is what the same server says in the newer era."""
        async with sdk_server() as server:
            info = (await server.initialize(version))["serverInfo"]
            for method, params in CALLS:
                payload = request(method, params)
                headers = asgi(headers_of(payload))
                check(message(payload), headers)
                sent = to_handshake(message(payload))
                assert sent.method is not None
                answer = await server.old(sent.method, sent.params, version)
                with pytest.raises(ValidationError):
                    methods.validate_server_result(method, VERSION, answer["result"])
                made = response_to_stateless(method, answer, info)
                methods.validate_server_result(method, VERSION, made["result"])
                assert answer["result"].items() <= made["result"].items()
                assert made["result"]["_meta"] == {bridge.SERVER_INFO_KEY: info}
                assert status_of(made) == 200
                status, own = await server.new(payload, headers_of(payload))
                assert status == 200
                assert own == made, method

    async def test_discovery_says_what_the_server_said_of_itself(self) -> None:
        """B48: but neither changes nor subscriptions, which nobody could be told of."""
        async with sdk_server() as server:
            initialized = await server.initialize()
            status, own = await server.new(request("server/discover"), headers_of(request("server/discover")))
            assert status == 200
        made = orjson.loads(discover(message(request("server/discover", id="d")), initialized))
        assert made["id"] == "d"
        methods.validate_server_result("server/discover", VERSION, made["result"])
        assert made["result"] == {
            **own["result"],
            "capabilities": {name: {} for name in own["result"]["capabilities"]},
        }

    @pytest.mark.parametrize(
        "said",
        [
            {},
            {"capabilities": None, "serverInfo": None, "instructions": None},
            {"capabilities": [], "serverInfo": {"name": "no version"}, "instructions": 5},
            {"capabilities": {"tools": None, "prompts": True, "tasks": {}, "extensions": {"a/b": {}}}},
        ],
    )
    def test_discovery_of_a_server_that_said_odd_things(self, said: dict[str, Any]) -> None:
        result = orjson.loads(discover(message(request("server/discover")), said))["result"]
        methods.validate_server_result("server/discover", VERSION, result)
        assert result["capabilities"] == {}
        assert "instructions" not in result
        assert "_meta" not in result

    def test_names_that_mean_something_now_are_overwritten(self) -> None:
        """No server of the handshake era can ask for input in a result, or have it cached for everybody."""
        said = {"tools": [], "resultType": "input_required", "ttlMs": 10**9, "cacheScope": "public", "_meta": None}
        assert to_stateless("tools/list", said) == {
            "tools": [],
            "resultType": "complete",
            "ttlMs": 0,
            "cacheScope": "private",
            "_meta": {},
        }
        made = to_stateless("tools/call", {"content": [], "_meta": {"a": 1, bridge.SERVER_INFO_KEY: 0}}, INFO)
        assert made == {"content": [], "resultType": "complete", "_meta": {"a": 1, bridge.SERVER_INFO_KEY: INFO}}

    def test_what_is_translated_is_not_changed(self) -> None:
        said = {"tools": [], "_meta": {"a": 1}}
        to_stateless("tools/list", said, INFO)
        assert said == {"tools": [], "_meta": {"a": 1}}


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "data", "made", "status"),
        [
            (-32002, {"uri": "book://x"}, -32602, 400),
            (-32042, {"elicitations": []}, -32603, 200),
            (-32020, None, -32603, 200),
            (-32022, {"supported": ["2025-11-25"]}, -32603, 200),
            (-32021, None, -32603, 200),
            (-32021, {"requiredCapabilities": {"sampling": {}}}, -32021, 400),
            (-32099, None, -32603, 200),
            (-32019, None, -32019, 200),
            (-32000, {"outcome": "unknown"}, -32000, 200),
            (-32600, None, -32600, 400),
            (-32601, None, -32601, 404),
            (-32602, None, -32602, 400),
            (-32603, None, -32603, 200),
            (1234, None, 1234, 200),
            (0, None, 0, 200),
        ],
    )
    async def test_codes_that_the_newer_era_does_not_have(
        self, code: int, data: dict[str, Any] | None, made: int, status: int
    ) -> None:
        """B40: what the server meant survives; what it must not say any more does not reach the client."""
        async with sdk_server() as server:
            arguments = {"code": code, "data": data}
            answer = await server.old("tools/call", {"name": "refuse", "arguments": arguments})
            assert answer["error"]["code"] == code
            told = response_to_stateless("tools/call", answer)
            assert told["error"] == {**answer["error"], "code": made}
            assert status_of(told) == status
            if code == made:  # the same as what the SDK's own server does with this error in the newer era
                payload = request("tools/call", {"name": "refuse", "arguments": arguments})
                assert (await server.new(payload, headers_of(payload)))[0] == status

    async def test_a_resource_that_is_not_there(self) -> None:
        async with sdk_server() as server:
            payload = request("resources/read", {"uri": "book://nowhere"})
            answer = await server.old("resources/read", {"uri": "book://nowhere"})
            made = response_to_stateless("resources/read", answer)
            assert (status_of(made), made) == await server.new(payload, headers_of(payload))

    @pytest.mark.parametrize(
        "error", [None, 5, "x", [], {}, {"code": "x"}, {"code": True}, {"code": 1.5, "message": None}, {"message": 7}]
    )
    def test_an_error_that_is_none_is_an_internal_one(self, error: Any) -> None:
        assert error_to_stateless(error) == {"code": -32603, "message": ""}

    def test_a_response_without_a_result_is_an_error(self) -> None:
        for payload in ({"id": 7}, {"id": 7, "result": None}, {"id": 7, "result": [1]}):
            assert response_to_stateless("tools/call", payload)["error"]["code"] == -32603


# -- requests ------------------------------------------------------------------------------------------------------


class TestRequests:
    def test_only_the_envelope_is_taken_away(self) -> None:
        """B20, B52: progress token, trace context and a client's own metadata go on."""
        params = {"name": "find", "arguments": {"title": "Dune"}}
        kept = {"progressToken": "p", "traceparent": "00-1-2-01", "com.example/own": {"a": 1}}
        payload = request("tools/call", {})
        payload["params"] = {**params, "_meta": {**meta(**{LL: "info"}), **kept}}
        original = message(payload)
        made = to_handshake(original)
        assert made.payload == {
            "jsonrpc": "2.0",
            "id": 7,
            "method": "tools/call",
            "params": {**params, "_meta": kept},
        }
        assert (made.kind, made.method, made.id) == ("request", "tools/call", 7)
        assert original.payload == payload, "the message itself is not changed"
        methods.validate_client_request("tools/call", "2025-11-25", made.params)

    def test_nothing_that_is_empty_is_left(self) -> None:
        assert to_handshake(message(request("tools/list"))).payload == {
            "jsonrpc": "2.0",
            "id": 7,
            "method": "tools/list",
        }

    def test_what_only_one_era_knows_does_not_cross(self) -> None:
        """A pooled session has no tasks, and asked for no input."""
        params = {"name": "find", "task": {"ttl": 1}, "inputResponses": {}, "requestState": "x"}
        assert to_handshake(message(request("tools/call", params))).params == {"name": "find"}

    @pytest.mark.parametrize(
        "method",
        [
            "subscriptions/listen",
            "initialize",
            "ping",
            "logging/setLevel",
            "resources/subscribe",
            "resources/unsubscribe",
            "tasks/get",
            "tasks/list",
            "server/discover",
            "custom/method",
            "",
        ],
    )
    def test_a_method_without_a_counterpart_is_not_found(self, method: str) -> None:
        """Nothing reaches a session that others use too, if it could change it."""
        with pytest.raises(Refused) as refusal:
            to_handshake(message(request(method)))
        assert (refusal.value.status, refusal.value.code, refusal.value.id) == (404, -32601, 7)

    def test_headers_of_the_newer_era_stay_here(self) -> None:
        headers = asgi(
            {
                "mcp-protocol-version": VERSION,
                "mcp-method": "tools/call",
                "mcp-name": "x",
                "mcp-param-shelf": "x",
                "last-event-id": "1",
                "traceparent": "t",
                "authorization": "a",
            }
        )
        assert to_handshake_headers(headers) == asgi({"traceparent": "t", "authorization": "a"})


# -- refusals ------------------------------------------------------------------------------------------------------


def changed(payload: dict[str, Any], **envelope_changes: Any) -> dict[str, Any]:
    """With other keys in its envelope; None leaves one out."""
    found = {**payload["params"]["_meta"], **envelope_changes}
    kept = {key: value for key, value in found.items() if value is not None}
    return {**payload, "params": {**payload["params"], "_meta": kept}}


CALL = request("tools/call", {"name": "find", "arguments": {"title": "Dune"}})
LIST = request("tools/list")
READ = request("resources/read", {"uri": "book://dune"})

# What is wrong, the request, and what is changed in its headers (None: left out).
WRONG: list[tuple[str, Any, dict[str, str | None]]] = [
    ("no params", {key: value for key, value in LIST.items() if key != "params"}, {}),
    ("params are null", {**LIST, "params": None}, {}),
    ("params are a list", {**LIST, "params": []}, {}),
    ("params are a text", {**LIST, "params": "x"}, {}),
    ("no _meta", {**LIST, "params": {}}, {}),
    ("_meta is null", {**LIST, "params": {"_meta": None}}, {}),
    ("_meta is a list", {**LIST, "params": {"_meta": [PV, CC]}}, {}),
    ("no version", changed(LIST, **{PV: None}), {}),
    ("no capabilities", changed(LIST, **{CC: None}), {}),
    ("neither", changed(LIST, **{CC: None, PV: None}), {}),
    ("no version, nor a header", changed(LIST, **{PV: None}), {"mcp-method": None}),
    ("version is a number", changed(LIST, **{PV: 20260728}), {}),
    ("version is a list", changed(LIST, **{PV: [VERSION]}), {}),
    ("another version in the envelope", changed(LIST, **{PV: "2099-01-01"}), {}),
    ("an older version in the envelope", changed(LIST, **{PV: "2025-11-25"}), {}),
    ("capabilities are a list", changed(LIST, **{CC: []}), {}),
    ("capabilities are a text", changed(LIST, **{CC: "x"}), {}),
    ("a capability is a flag", changed(LIST, **{CC: {"sampling": True}}), {}),
    ("a capability's detail is a flag", changed(LIST, **{CC: {"elicitation": {"form": True}}}), {}),
    ("an extension is a flag", changed(LIST, **{CC: {"extensions": {"a/b": True}}}), {}),
    ("roots are a list", changed(LIST, **{CC: {"roots": []}}), {}),
    ("client info is a text", changed(LIST, **{CI: "x"}), {}),
    ("client info without a name", changed(LIST, **{CI: {"version": "1"}}), {}),
    ("client info without a version", changed(LIST, **{CI: {"name": "x"}}), {}),
    ("client info with an odd name", changed(LIST, **{CI: {"name": 1, "version": "1"}}), {}),
    ("client info with an odd title", changed(LIST, **{CI: {"name": "x", "version": "1", "title": 1}}), {}),
    ("an unknown log level", changed(LIST, **{LL: "loud"}), {}),
    ("a log level that is a number", changed(LIST, **{LL: 3}), {}),
    ("a progress token that is a list", changed(LIST, progressToken=[1]), {}),
    ("no Mcp-Method", LIST, {"mcp-method": None}),
    ("another Mcp-Method", LIST, {"mcp-method": "tools/call"}),
    ("Mcp-Method in capitals", LIST, {"mcp-method": "TOOLS/LIST"}),
    ("Mcp-Method, encoded", LIST, {"mcp-method": "=?base64?dG9vbHMvbGlzdA==?="}),
    ("no Mcp-Name", CALL, {"mcp-name": None}),
    ("another Mcp-Name", CALL, {"mcp-name": "add"}),
    ("Mcp-Name in capitals", CALL, {"mcp-name": "FIND"}),
    ("Mcp-Name with broken base64", CALL, {"mcp-name": "=?base64?Zm!uZA==?="}),
    ("Mcp-Name with base64 that nobody writes", CALL, {"mcp-name": "=?base64?ZmluZB==?="}),
    ("Mcp-Name with base64 that is no text", CALL, {"mcp-name": "=?base64?/w==?="}),
    ("no Mcp-Name for a resource", READ, {"mcp-name": None}),
    ("another resource", READ, {"mcp-name": "book://cover"}),
    ("no name", request("tools/call", {"arguments": {}}), {}),
    ("no name in the body", request("tools/call", {"arguments": {}}), {"mcp-name": "find"}),
    ("a name that is a number", request("tools/call", {"name": 5}), {"mcp-name": "5"}),
    ("no uri", request("resources/read"), {}),
    ("no prompt's name", request("prompts/get"), {}),
    ("an unknown method", request("custom/method"), {}),
    ("a method of the other era", request("ping"), {}),
    ("initialize", request("initialize"), {}),
    ("a method of the other era, and no envelope", {**LIST, "method": "ping", "params": {}}, {}),
    ("an unknown method and another Mcp-Method", request("custom/method"), {"mcp-method": "x"}),
    ("an unknown version in an unknown method", changed(request("x"), **{PV: "2099-01-01"}), {}),
    ("a bad envelope for discovery", changed(request("server/discover"), **{CC: "x"}), {}),
    ("a log level that is unknown, for discovery", changed(request("server/discover"), **{LL: "loud"}), {}),
]


class TestRefusals:
    @pytest.mark.parametrize(("payload", "headers"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
    async def test_what_the_sdk_s_server_refuses_is_refused_in_the_same_way(
        self, payload: Any, headers: dict[str, str | None]
    ) -> None:
        """B50: the same status, the same code, the id of the request."""
        sent = {name: value for name, value in {**headers_of(payload), **headers}.items() if value is not None}
        refusal = refused(payload, asgi(sent))
        assert refusal is not None
        async with sdk_server() as server:
            status, body = await server.new(payload, sent)
        assert (refusal.status, refusal.code) == (status, body["error"]["code"])
        assert refusal.id in (7, None)
        assert body["id"] in (refusal.id, None)
        assert refusal.data == (body["error"].get("data") if refusal.code == -32022 else None)

    @pytest.mark.parametrize("name", ["mcp-protocol-version", "mcp-method", "mcp-name"])
    async def test_a_header_twice_is_refused_even_if_both_say_the_same(self, name: str) -> None:
        """B50: who reads the first and who reads the last must not be told two things."""
        headers = [*headers_of(CALL).items(), (name, headers_of(CALL)[name])]
        refusal = refused(CALL, [(key.encode(), value.encode()) for key, value in headers])
        assert refusal is not None
        async with sdk_server() as server:
            status, body = await server.new(CALL, headers)
        assert (refusal.status, refusal.code) == (status, body["error"]["code"]) == (400, -32020)

    async def test_an_unknown_version_is_told_the_known_ones(self) -> None:
        payload = changed(LIST, **{PV: "2099-01-01"})
        refusal = refused(payload, asgi({**headers_of(payload), "mcp-protocol-version": "2099-01-01"}))
        assert refusal is not None
        assert (refusal.status, refusal.code, refusal.id) == (400, -32022, 7)
        assert refusal.data == {"supported": [VERSION], "requested": "2099-01-01"}

    def test_a_request_without_the_version_header_is_refused(self) -> None:
        refusal = refused(LIST, asgi({"mcp-method": "tools/list"}))
        assert refusal is not None
        assert (refusal.status, refusal.code) == (400, -32020)

    @pytest.mark.parametrize("value", [b"\xe9t\xe9", b"caf\xc3\xa9", b"a\x00b", b"a\x7f"])
    def test_a_header_value_that_is_none_is_refused(self, value: bytes) -> None:
        """B30: whatever it says when it is read as Latin-1."""
        payload = request("tools/call", {"name": value.decode("latin-1")})
        headers = [(name, value if name == b"mcp-name" else said) for name, said in asgi(headers_of(payload))]
        refusal = refused(payload, headers)
        assert refusal is not None
        assert (refusal.status, refusal.code) == (400, -32020)

    @pytest.mark.parametrize("name", ["find", "été", " padded ", "=?base64?ZmluZA==?=", "", "a\nb", "日本語"])
    def test_a_name_is_accepted_as_clients_write_it(self, name: str) -> None:
        payload = request("tools/call", {"name": name})
        assert refused(payload, asgi(headers_of(payload))) is None
        spaced = {**headers_of(payload), "mcp-name": f" {headers_of(payload)['mcp-name']}\t"}
        assert refused(payload, asgi(spaced)) is None, "spaces around a value are no part of it"

    @pytest.mark.parametrize("more", [{CI: None}, {LL: "debug"}, {"progressToken": 5}, {"progressToken": "x"}])
    def test_what_may_be_left_out_may_be(self, more: dict[str, Any]) -> None:
        assert refused(changed(LIST, **more), asgi(headers_of(LIST))) is None

    def test_discovery_passes(self) -> None:
        payload = request("server/discover")
        assert refused(payload, asgi(headers_of(payload))) is None

    @pytest.mark.parametrize(
        "payload",
        [
            {"jsonrpc": "2.0", "id": 1, "result": {}},
            {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        ],
    )
    def test_what_is_no_request_is_none(self, payload: Any) -> None:
        refusal = refused(payload, asgi(headers_of(LIST)))
        assert refusal is not None
        assert (refusal.status, refusal.code) == (400, -32600)

    async def test_notifications_are_taken_or_refused_as_the_sdk_s_server_does(self) -> None:
        """B50"""
        payload = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
        async with sdk_server() as server:
            check_notification(asgi({"mcp-protocol-version": VERSION}))
            assert (await server.new(payload, {"mcp-protocol-version": VERSION}))[0] == 202
        for unknown in ({"mcp-protocol-version": "2099-01-01"}, {}):
            with pytest.raises(Refused) as refusal:
                check_notification(asgi(unknown))
            assert (refusal.value.status, refusal.value.code) == (400, -32022)


# -- anything at all -----------------------------------------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.text(max_size=6), ANY, max_size=3)
METHOD = st.sampled_from(sorted(methods.SPEC_CLIENT_METHODS)) | st.text(max_size=10)
CAPABILITIES = st.dictionaries(
    st.sampled_from(["sampling", "elicitation", "roots", "experimental", "extensions", "other"]),
    st.dictionaries(st.sampled_from(["form", "url", "tools", "context", "a/b"]), st.just({}) | ANY, max_size=2) | ANY,
    max_size=3,
)
IMPLEMENTATION = st.fixed_dictionaries(
    {}, optional={"name": st.just("x") | ANY, "version": st.just("1") | ANY, "title": ANY}
)
TOKEN = st.none() | st.text(max_size=4) | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=1)
META = st.fixed_dictionaries(
    {},
    optional={
        PV: st.just(VERSION) | ANY,
        CC: CAPABILITIES | ANY,
        CI: IMPLEMENTATION | ANY,
        LL: st.sampled_from(envelope.LOG_LEVELS) | ANY,
        "progressToken": TOKEN,
    },
)
PARAMS = st.builds(lambda params, found: {**params, "_meta": found}, OBJECT, META | ANY) | ANY
HEADER_VALUE = st.just(VERSION) | st.text(st.characters(max_codepoint=255), max_size=12)


@settings(max_examples=400, deadline=None)
@given(
    METHOD,
    PARAMS,
    st.lists(st.tuples(st.sampled_from(["mcp-protocol-version", "mcp-method", "mcp-name"]), HEADER_VALUE), max_size=3),
    st.booleans(),
)
def test_whatever_comes_is_passed_or_refused_in_words(
    method: str, params: Any, headers: list[tuple[str, str]], conforming: bool
) -> None:
    """B30: never a stack trace; and what passes can be said to a server of the handshake era."""
    payload = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    if conforming:
        sent = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers_of(payload).items()]
    refusal = refused(payload, sent)
    if refusal is not None:
        assert refusal.status in (400, 404)
        assert refusal.code in bridge.STATUS
        return
    assert inbound.find_duplicated_routing_header((n.decode(), v.decode("latin-1")) for n, v in sent) is None
    if method == envelope.DISCOVER:
        return
    made = to_handshake(message(payload))
    assert orjson.loads(orjson.dumps(made.payload)) == made.payload
    assert not envelope.ENVELOPE_KEYS & set(made.params.get("_meta", ()))
    passing(made)({"method": "notifications/message", "params": {"level": "info"}})


@settings(max_examples=400, deadline=None)
@given(META)
def test_envelopes_are_judged_as_the_schema_judges_them(found: dict[str, Any]) -> None:
    """B50: all that differs is what the SDK reads more generously than the specification: a number for a token."""
    payload = {"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": {"_meta": found}}
    headers = headers_of(payload)
    verdict = inbound.classify_inbound_request(payload, headers=headers)
    code = verdict.code if isinstance(verdict, inbound.InboundLadderRejection) else None
    if code is None:
        try:
            methods.validate_client_request("tools/list", VERSION, payload["params"])
        except ValidationError:
            code = -32602
    refusal = refused(payload, asgi(headers))
    assert (refusal.code if refusal is not None else None) == code


@given(st.binary(max_size=200))
def test_bytes_of_any_kind(body: bytes) -> None:
    try:
        found = parse(body)
    except InvalidMessage:
        return
    with pytest.raises(Refused):
        check(found, [])


@given(st.text(st.characters(max_codepoint=255), max_size=20) | st.text(max_size=20).map(inbound.encode_header_value))
def test_header_values_are_read_as_the_sdk_reads_them(value: str) -> None:
    """All but what the specification calls invalid characters, which are refused."""
    read = decoded(value.encode("latin-1"))
    if all(" " <= char <= "~" or char == "\t" for char in value):
        assert read == inbound.decode_header_value(value.strip(" \t"))
    else:
        assert read is None


@given(st.text(max_size=20))
def test_what_a_client_encodes_is_read_back(value: str) -> None:
    assert decoded(inbound.encode_header_value(value).encode()) == value


# -- notifications and requests of the server ----------------------------------------------------------------------


def log(level: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": level, "data": 1}}


def progress(token: Any) -> dict[str, Any]:
    params = {"progressToken": token, "progress": 1}
    return {"jsonrpc": "2.0", "method": "notifications/progress", "params": params}


class TestOnTheStream:
    def test_progress_of_this_request_passes(self) -> None:
        """B20"""
        passes = passing(message(changed(LIST, progressToken="mine")))
        assert passes(progress("mine"))
        assert not passes(progress("another's"))
        assert not passes(progress(None))
        assert not passing(message(LIST))(progress(None)), "nobody asked for any"

    def test_logs_pass_from_the_level_that_was_asked_for(self) -> None:
        """B20"""
        for at, level in enumerate(envelope.LOG_LEVELS):
            passes = passing(message(changed(LIST, **{LL: level})))
            assert [name for name in envelope.LOG_LEVELS if passes(log(name))] == list(envelope.LOG_LEVELS[at:])
            assert not passes(log("loud"))
            assert not passes(log(None))
        assert not any(passing(message(LIST))(log(level)) for level in envelope.LOG_LEVELS)

    @pytest.mark.parametrize(
        "payload",
        [
            {"method": "notifications/tools/list_changed"},
            {"method": "notifications/tools/list_changed", "params": {}},
            {"method": "notifications/resources/updated", "params": {"uri": "x"}},
            {"method": "notifications/cancelled", "params": {"requestId": 7}},
            {"method": "notifications/elicitation/complete", "params": {"elicitationId": "x"}},
            {"method": "notifications/tasks/status", "params": {}},
            {"method": "notifications/message"},
            {"method": "notifications/message", "params": []},
            {"method": "notifications/progress", "params": None},
            {"method": "sampling/createMessage", "id": 1, "params": {}},
            {"method": "notifications/message", "id": 1, "params": {"level": "error"}},
            {"id": 7, "result": {}},
            {},
        ],
    )
    def test_nothing_else_passes(self, payload: dict[str, Any]) -> None:
        passes = passing(message(changed(LIST, progressToken=1, **{LL: "debug"})))
        assert not passes({"jsonrpc": "2.0", **payload})

    def test_requests_of_the_server_are_answered_for_the_client(self) -> None:
        for method in ("sampling/createMessage", "elicitation/create", "roots/list", "custom/x"):
            body = orjson.loads(answer_server(message({"jsonrpc": "2.0", "id": "s-1", "method": method})))
            assert (body["id"], body["error"]["code"]) == ("s-1", -32601)
        body = orjson.loads(answer_server(message({"jsonrpc": "2.0", "id": 0, "method": "ping"})))
        assert body == {"jsonrpc": "2.0", "id": 0, "result": {}}


# -- arguments in headers ------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
TOKENS = st.sampled_from(["One", "one", "Two", "Three", "not a token", "", 5, None])
LEAF = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["string", "integer", "boolean", "number", "object", ["string"], None]),
        "x-mcp-header": TOKENS,
        "default": st.just({"x-mcp-header": "Data"}),
    },
)
SCHEMA = st.recursive(
    LEAF,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "string", "integer"]),
            "x-mcp-header": TOKENS,
            "properties": st.dictionaries(NAMES, inner, max_size=3) | st.just([]),
            "items": inner,
            "anyOf": st.lists(inner, max_size=2),
            "$defs": st.dictionaries(NAMES, inner, max_size=1),
            "not": inner,
        },
    ),
    max_leaves=6,
)
VALID = st.dictionaries(
    NAMES,
    st.builds(
        lambda kind, token, inner: {"type": kind, **token, **inner},
        st.sampled_from(["string", "integer", "boolean"]),
        st.sampled_from([{}, {"x-mcp-header": "One"}, {"x-mcp-header": "Two"}]),
        st.sampled_from([{}, {"properties": {"c": {"type": "string", "x-mcp-header": "Three"}}}]),
    ),
    max_size=3,
).map(lambda properties: {"type": "object", "properties": properties})
VALUE = (
    st.none()
    | st.booleans()
    | st.integers(-50, 50)
    | st.sampled_from([42, 42.0, 42.5, 2**60, 1e300, "42", "é", " x ", "true"])
    | st.dictionaries(st.just("c"), st.text(max_size=3), max_size=1)
)
SAID = st.sampled_from(["42", "42.0", "042", "42.5", "-7", "true", "True", "x", "=?base64?w6k=?=", "=?base64?!?=", ""])


def params_refused(payload: Any, headers: Headers, repeated: tuple[Repeated, ...]) -> Refused | None:
    try:
        check_params(message(payload), headers, repeated)
    except Refused as refusal:
        return refusal
    return None


def outcome(found: inbound.InboundLadderRejection | None) -> int | None:
    return found.code if found is not None else None


@settings(max_examples=500, deadline=None)
@given(SCHEMA | VALID, st.dictionaries(NAMES, VALUE, max_size=3), st.dictionaries(TOKENS.map(str), SAID, max_size=3))
def test_arguments_in_headers_are_judged_as_the_sdk_s_server_judges_them(
    schema: Any, arguments: dict[str, Any], said: dict[str, str]
) -> None:
    """B50: with the headers of a conforming client, and with others."""
    call = request("tools/call", {"name": "lend", "arguments": arguments})
    repeated = repeated_in(schema)
    conforming = inbound.mcp_param_headers(inbound.x_mcp_header_map(schema), arguments) if repeated else {}
    assert {each.path: each.header for each in repeated} == (
        {path: f"mcp-param-{token.lower()}" for path, token in inbound.x_mcp_header_map(schema).items()}
        if inbound.find_invalid_x_mcp_header(schema) is None
        else {}
    )
    for headers in (conforming, {**conforming, **{f"Mcp-Param-{token}": value for token, value in said.items()}}):
        low = {name.lower(): value for name, value in headers.items()}
        expected = outcome(inbound.validate_mcp_param_headers(schema, arguments, low))
        refusal = params_refused(call, asgi(low), repeated)
        assert (refusal and refusal.code) == expected
        assert refusal is None or (refusal.status, refusal.id) == (400, 7)


class TestArgumentsInHeaders:
    async def test_a_real_server_s_tool(self) -> None:
        """B50: learnt from its list of the handshake era, refused as it refuses itself."""
        async with sdk_server() as server:
            listed = (await server.old("tools/list"))["result"]["tools"]
            repeated = repeated_by_tool(listed)
            assert set(repeated) == {"lend"}
            assert Repeated(("days",), "mcp-param-days", is_integer=True) in repeated["lend"]
            payload = request("tools/call", {"name": "lend", "arguments": {"shelf": "ü", "days": 3}})
            good = {"mcp-param-shelf": "=?base64?w7w=?=", "mcp-param-days": "3.0"}
            for change, expected in (
                ({}, 200),
                ({"mcp-param-days": "4"}, 400),
                ({"mcp-param-days": None}, 400),
                ({"mcp-param-shelf": "ü"}, 400),
                ({"mcp-param-renew": "true"}, 400),
                ({"mcp-param-other": "x"}, 200),
            ):
                headers = {**headers_of(payload), **good, **change}
                sent = {name: value for name, value in headers.items() if value is not None}
                assert may_repeat(message(payload), asgi(sent))
                if "ü" not in sent["mcp-param-shelf"]:  # Latin-1: invalid by the specification, read by the SDK
                    assert (await server.new(payload, sent))[0] == expected
                refusal = params_refused(payload, asgi(sent), repeated["lend"])
                assert (200 if refusal is None else refusal.status) == expected, change

    def test_the_same_header_twice_is_refused(self) -> None:
        payload = request("tools/call", {"name": "lend", "arguments": {"days": 3}})
        repeated = (Repeated(("days",), "mcp-param-days", is_integer=True),)
        refusal = params_refused(payload, [(b"mcp-param-days", b"3"), (b"mcp-param-days", b"3")], repeated)
        assert refusal is not None
        assert (refusal.status, refusal.code) == (400, -32020)

    @pytest.mark.parametrize(
        ("payload", "headers", "expected"),
        [
            (request("tools/call", {"name": "x"}), {}, False),
            (request("tools/call", {"name": "x", "arguments": {}}), {}, False),
            (request("tools/call", {"name": "x", "arguments": {}}), {"mcp-param-a": "1"}, True),
            (request("tools/call", {"name": "x", "arguments": {"a": 1}}), {}, True),
            (request("tools/call", {"name": "x", "arguments": []}), {"mcp-param-a": "1"}, False),
            (request("tools/call", {"name": 1, "arguments": {"a": 1}}), {}, False),
            (request("prompts/get", {"name": "x", "arguments": {"a": "1"}}), {"mcp-param-a": "1"}, False),
        ],
    )
    def test_a_tool_s_schema_is_needed_only_where_it_can_matter(
        self, payload: Any, headers: dict[str, str], expected: bool
    ) -> None:
        """No list is asked for otherwise: it costs a call."""
        assert may_repeat(message(payload), asgi(headers)) is expected

    @pytest.mark.parametrize("tools", [None, 5, {}, [None, 5, {}, {"name": 1}, {"name": "x", "inputSchema": "y"}]])
    def test_a_list_that_is_none(self, tools: Any) -> None:
        assert repeated_by_tool(tools) == {}
