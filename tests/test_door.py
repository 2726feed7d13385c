"""The door: Host, Origin, token, Accept and Content-Type, as tables."""

from __future__ import annotations

from typing import Any

import pytest
from leasehold.workers.answers import Refused
from leasehold.workers.door import Door, check_get, check_post, named_version, read_message

LOCAL = Door(tokens=[], hosts=[], origins=[], loopback_only=True)
OPEN = Door(tokens=[], hosts=[], origins=[], loopback_only=False)
NAMED = Door(
    tokens=[],
    hosts=["mcp.example", "10.0.0.1:8333", "any.example:*"],
    origins=["https://app.example", "https://dev.example:*", "null"],
    loopback_only=False,
)
GUARDED = Door(tokens=[b"one", b"two"], hosts=[], origins=[], loopback_only=True)


def refusal(check: Any, *arguments: Any) -> Refused | None:
    try:
        check(*arguments)
    except Refused as refused:
        return refused
    return None


def status(door: Door, **headers: bytes) -> int:
    """200, or the status of the refusal."""
    refused = refusal(door.check, [(name.encode(), value) for name, value in headers.items()])
    return refused.status if refused else 200


@pytest.mark.parametrize(
    ("door", "host", "expected"),
    [
        (LOCAL, b"localhost", 200),
        (LOCAL, b"localhost:8333", 200),
        (LOCAL, b"LOCALHOST:1", 200),
        (LOCAL, b"127.0.0.1:8333", 200),
        (LOCAL, b"[::1]:8333", 200),
        (LOCAL, b"[::1]", 200),
        (LOCAL, b"evil.example", 421),
        (LOCAL, b"localhost.evil.example", 421),
        (LOCAL, b"127.0.0.1.evil.example:8333", 421),
        (LOCAL, b"evil.example:127.0.0.1", 421),
        (LOCAL, b"[::1].evil.example]", 200),  # no client can connect by such a name
        (LOCAL, b"[::2]:8333", 421),
        (LOCAL, b"", 421),
        (LOCAL, b"\xff", 421),
        (OPEN, b"whatever.example", 200),
        (NAMED, b"mcp.example", 200),
        (NAMED, b"mcp.example:443", 200),
        (NAMED, b"10.0.0.1:8333", 200),
        (NAMED, b"10.0.0.1:8334", 421),
        (NAMED, b"10.0.0.1", 421),
        (NAMED, b"any.example:7", 200),
        (NAMED, b"sub.mcp.example", 421),
        (NAMED, b"localhost", 421),
        (NAMED, b"", 421),
    ],
)
def test_a_host_that_is_not_served_here_is_misdirected(door: Door, host: bytes, expected: int) -> None:
    """B50"""
    assert status(door, host=host) == expected


@pytest.mark.parametrize(
    ("door", "host", "origin", "expected"),
    [
        (LOCAL, b"localhost:8333", b"http://localhost:6274", 200),
        (LOCAL, b"localhost:8333", b"http://127.0.0.1", 200),
        (LOCAL, b"localhost:8333", b"http://[::1]:1", 200),
        (LOCAL, b"localhost:8333", b"https://evil.example", 403),
        (LOCAL, b"localhost:8333", b"http://localhost.evil.example", 403),
        (LOCAL, b"localhost:8333", b"http://evil.example/localhost", 403),
        (LOCAL, b"localhost:8333", b"http://user@evil.example", 403),
        (LOCAL, b"localhost:8333", b"null", 403),
        (LOCAL, b"localhost:8333", b"", 403),
        (LOCAL, b"localhost:8333", b"http://[", 403),
        (LOCAL, b"localhost:8333", b"http://[::1", 403),
        (LOCAL, b"localhost:8333", b"\xff\xfe", 403),
        (NAMED, b"mcp.example", b"https://app.example", 200),
        (NAMED, b"mcp.example", b"HTTPS://APP.EXAMPLE", 200),
        (NAMED, b"mcp.example", b"http://app.example", 403),
        (NAMED, b"mcp.example", b"https://dev.example:9", 200),
        (NAMED, b"mcp.example", b"https://app.example.evil.example", 403),
        (NAMED, b"mcp.example", b"null", 200),
        (NAMED, b"mcp.example", b"https://mcp.example", 200),
        (NAMED, b"mcp.example", b"http://localhost", 403),
        # Without names to check the Host by, a page whose name was bound to this address anew would be same-origin.
        (OPEN, b"evil.example:8333", b"http://evil.example:8333", 403),
        (OPEN, b"", b"null", 403),
    ],
)
def test_a_page_of_another_origin_is_forbidden(door: Door, host: bytes, origin: bytes, expected: int) -> None:
    """B50"""
    assert status(door, host=host, origin=origin) == expected


def test_any_origin_may_call_where_the_operator_says_so() -> None:
    door = Door(tokens=[], hosts=["*"], origins=["*"], loopback_only=False)
    assert status(door, host=b"a", origin=b"https://b.example") == 200
    assert status(door, host=b"a", origin=b"null") == 200


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (b"Bearer one", 200),
        (b"bearer two", 200),
        (b"Bearer  two ", 200),
        (b"Bearer three", 401),
        (b"Bearer on", 401),
        (b"Bearer onee", 401),
        (b"Bearer one two", 401),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"Basic one", 401),
        (b"one", 401),
        (b"", 401),
        (b"Bearer \xff", 401),
    ],
)
def test_a_door_with_tokens_opens_to_one_of_them(authorization: bytes, expected: int) -> None:
    """B50"""
    assert status(GUARDED, host=b"localhost", authorization=authorization) == expected


def test_a_missing_token_is_asked_for() -> None:
    """B50"""
    refused = refusal(GUARDED.check, [(b"host", b"localhost")])
    assert refused is not None
    assert refused.status == 401
    assert refused.headers == [(b"www-authenticate", b'Bearer realm="leasehold"')]


def test_no_token_shows_in_a_refusal() -> None:
    """B19"""
    refused = refusal(GUARDED.check, [(b"host", b"localhost"), (b"authorization", b"Bearer sesame")])
    assert refused is not None
    assert not {"sesame", "one", "two"} & set(str(refused).split())


BOTH = b"application/json, text/event-stream"


@pytest.mark.parametrize(
    ("accepts", "expected"),
    [
        ([BOTH], 200),
        ([b"text/event-stream", b"application/json"], 200),
        ([b"application/json;q=0.9,text/event-stream;q=0.1"], 200),
        ([b"*/*"], 200),
        ([b"application/*, text/*"], 200),
        ([b"Application/JSON, TEXT/event-stream"], 200),
        ([b"application/json"], 406),
        ([b"text/event-stream"], 406),
        ([b"text/html"], 406),
        ([b"application/json, text/event-stream;q=0"], 406),
        ([b"application/json, text/event-stream; q=0.000"], 406),
        ([b"application/json, text/event-stream; Q = 0"], 406),
        ([b"application/json-patch, text/event-streams"], 406),
        ([b""], 406),
        ([], 406),
    ],
)
def test_a_post_must_accept_both_forms_of_answer(accepts: list[bytes], expected: int) -> None:
    """B50"""
    headers = [(b"content-type", b"application/json"), *((b"accept", value) for value in accepts)]
    refused = refusal(check_post, headers)
    assert (refused.status if refused else 200) == expected


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"application/json", 200),
        (b"Application/JSON; charset=utf-8", 200),
        (b" application/json ;x", 200),
        (b"text/plain", 415),
        (b"application/jsonp", 415),
        (b"application/x-www-form-urlencoded", 415),
        (b"", 415),
        (None, 415),
    ],
)
def test_a_post_must_be_json(content_type: bytes | None, expected: int) -> None:
    """B50"""
    headers = [(b"accept", BOTH)] + ([] if content_type is None else [(b"content-type", content_type)])
    refused = refusal(check_post, headers)
    assert (refused.status if refused else 200) == expected


@pytest.mark.parametrize(
    ("accept", "expected"), [(b"text/event-stream", 200), (b"*/*", 200), (b"application/json", 406)]
)
def test_a_get_must_accept_an_event_stream(accept: bytes, expected: int) -> None:
    """B50"""
    refused = refusal(check_get, [(b"accept", accept)])
    assert (refused.status if refused else 200) == expected


@pytest.mark.parametrize(("body", "code"), [(b"{", -32700), (b"[]", -32600), (b"{}", -32600)])
def test_a_body_that_is_no_message_is_a_bad_request(body: bytes, code: int) -> None:
    """B50"""
    refused = refusal(read_message, body)
    assert refused is not None
    assert (refused.status, refused.code) == (400, code)


def test_the_protocol_version_is_what_the_header_names() -> None:
    assert named_version([]) is None
    assert named_version([(b"mcp-protocol-version", b" 2025-11-25 ")]) == "2025-11-25"
    assert named_version([(b"mcp-protocol-version", b"\xff")]) == "\xff"
