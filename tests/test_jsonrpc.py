"""The head of a JSON-RPC message: what is one, of which kind, and what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.pool.jsonrpc import INVALID_REQUEST, PARSE_ERROR, InvalidMessage, error_body, parse

IDS = st.one_of(st.text(max_size=20), st.integers(-(2**53), 2**53))
SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
VALUES: st.SearchStrategy[Any] = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.sampled_from(["_meta", "name", "x"]), SCALARS, max_size=2)
)


def encoded(**fields: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **fields}).encode()


@pytest.mark.parametrize(
    ("body", "kind", "identifier"),
    [
        (encoded(id=1, method="ping"), "request", 1),
        (encoded(id="a", method="ping"), "request", "a"),
        (encoded(id=0, method="ping"), "request", 0),
        (encoded(id="", method="ping"), "request", ""),
        (encoded(method="notifications/initialized"), "notification", None),
        (encoded(id=1, result={}), "response", 1),
        (encoded(id=1, result=None), "response", 1),
        (encoded(id=1, error={"code": 1, "message": ""}), "response", 1),
        (encoded(id=None, error={"code": 1, "message": ""}), "response", None),
        (encoded(error={"code": 1, "message": ""}), "response", None),
    ],
)
def test_the_three_kinds_of_message_are_told_apart(body: bytes, kind: str, identifier: object) -> None:
    message = parse(body)
    assert message.kind == kind
    assert message.id == identifier
    assert message.method == json.loads(body).get("method")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nope", b'{"jsonrpc":"2.0"', b"\xff\xfe", b'{"a":"\xff"}', b"{} {}", b"NaN", b"[" * 5000, b"\0"],
)
def test_what_is_not_json_is_a_parse_error(body: bytes) -> None:
    """B50"""
    with pytest.raises(InvalidMessage) as caught:
        parse(body)
    assert caught.value.code == PARSE_ERROR


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"[" + encoded(id=1, method="ping") + b"]",
        b"null",
        b"1",
        b'"ping"',
        b"{}",
        b'{"id":1,"method":"ping"}',
        b'{"jsonrpc":"1.0","id":1,"method":"ping"}',
        b'{"jsonrpc":2.0,"id":1,"method":"ping"}',
        encoded(id=None, method="ping"),
        encoded(id=1.5, method="ping"),
        encoded(id=True, method="ping"),
        encoded(id=[1], method="ping"),
        encoded(id={}, method="ping"),
        encoded(id=1, method=1),
        encoded(id=1),
        encoded(result={}),
        encoded(id=None, result={}),
        encoded(id=True, result={}),
        encoded(id=1, result={}, error={}),
    ],
)
def test_json_that_is_no_single_message_is_an_invalid_request(body: bytes) -> None:
    """B50"""
    with pytest.raises(InvalidMessage) as caught:
        parse(body)
    assert caught.value.code == INVALID_REQUEST


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused_with_a_code(body: bytes) -> None:
    try:
        outcome: object = parse(body).kind
    except InvalidMessage as error:
        outcome = error.code
    assert outcome in ("request", "notification", "response", PARSE_ERROR, INVALID_REQUEST)


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("id", "method", "params", "result", "error"), VALUES) | {"jsonrpc": st.just("2.0")}
    )
)
def test_any_object_is_a_message_or_refused_and_its_head_can_be_read(payload: dict[str, Any]) -> None:
    try:
        message = parse(json.dumps(payload).encode())
    except InvalidMessage:
        return
    assert isinstance(message.params, dict)
    assert message.progress_token is None or isinstance(message.progress_token, str | int)


@given(IDS, st.text(max_size=20), VALUES)
def test_a_request_keeps_its_id_method_and_parameters(identifier: str | int, method: str, params: Any) -> None:
    message = parse(encoded(id=identifier, method=method, params=params))
    assert (message.kind, message.id, message.method) == ("request", identifier, method)
    assert message.params == (params if isinstance(params, dict) else {})


@pytest.mark.parametrize(
    ("params", "token"),
    [
        ({"_meta": {"progressToken": "t"}}, "t"),
        ({"_meta": {"progressToken": 0}}, 0),
        ({"_meta": {"progressToken": []}}, None),
        ({"_meta": {}}, None),
        ({"_meta": "x"}, None),
        ({}, None),
        ([], None),
        (None, None),
    ],
)
def test_a_progress_token_is_found_where_there_is_one(params: object, token: object) -> None:
    assert parse(encoded(id=1, method="x", params=params)).progress_token == token


def test_an_error_is_a_response_that_parses_back() -> None:
    body = error_body(-32000, "no", id="a", data={"outcome": "unknown"})
    message = parse(body)
    assert (message.kind, message.id) == ("response", "a")
    assert message.payload["error"] == {"code": -32000, "message": "no", "data": {"outcome": "unknown"}}
    assert json.loads(error_body(1, "no"))["id"] is None
