"""The `is_success` guard: what each reply counts as, and that not a byte of it is changed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.pool.jsonrpc import Message, parse
from leasehold.pool.sse import KEEPALIVE, event
from leasehold.workers.guard import MAX_JUDGED, Guard, is_success

pytestmark = pytest.mark.anyio

REQUEST = parse(b'{"jsonrpc":"2.0","id":7,"method":"tools/call"}')
RESULT = b'{"jsonrpc":"2.0","id":7,"result":{"isError":true}}'
ERROR = b'{"jsonrpc":"2.0","id":7,"error":{"code":-32602,"message":"no such tool"}}'
OTHER = b'{"jsonrpc":"2.0","id":8,"result":{}}'
NOTIFICATION = b'{"jsonrpc":"2.0","method":"notifications/progress"}'
SERVER_REQUEST = b'{"jsonrpc":"2.0","id":7,"method":"sampling/createMessage"}'
JSON = b"application/json"
SSE = b"text/event-stream"


class Client:
    """Notes what reaches the client."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    async def send(self, message: Any) -> None:
        self.messages.append(dict(message))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


async def reply(
    status: int,
    chunks: list[bytes],
    *,
    content_type: bytes = JSON,
    request: Message | None = REQUEST,
    ends: bool = True,
) -> tuple[Guard, Client]:
    """Relay a reply through a guard; without `ends`, it breaks off."""
    client = Client()
    guard = Guard(client.send, request)
    sent: list[dict[str, Any]] = [
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]},
        *({"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks),
    ]
    if ends:
        sent.append({"type": "http.response.body", "body": b"", "more_body": False})
    for message in sent:
        await guard.send(message)
    assert client.messages == sent, "a guard changes nothing"
    return guard, client


@pytest.mark.parametrize("status", [400, 401, 404, 409, 429, 500, 502, 503, 301, 307])
@pytest.mark.parametrize("body", [RESULT, ERROR, b"", b"<html>"])
async def test_a_status_outside_2xx_is_an_error_whatever_its_body_says(status: int, body: bytes) -> None:
    """B40"""
    guard, client = await reply(status, [body])
    assert guard.verdict == "error"
    assert guard.status == status
    assert client.body == body, "the inner error survives"


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (RESULT, "ok"),  # a tool's own error is a result
        (ERROR, "error"),
        (OTHER, "error"),
        (b'{"jsonrpc":"2.0","id":"7","result":{}}', "error"),
        (b'{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"?"}}', "error"),
        (NOTIFICATION, "error"),
        (SERVER_REQUEST, "error"),
        (RESULT[:-1], "error"),
        (b"", "error"),
        (b"null", "error"),
        (b"[" + RESULT + b"]", "error"),
        (b"<html>login</html>", "error"),
        (RESULT + RESULT, "error"),
        (b" \n" + RESULT + b"\n", "ok"),
    ],
)
async def test_a_2xx_json_answer_to_a_request_must_be_its_one_complete_response(body: bytes, verdict: str) -> None:
    """B40"""
    guard, _ = await reply(200, [body[:10], body[10:]])
    assert guard.verdict == verdict
    assert is_success(200, body, REQUEST) is (verdict == "ok")


@pytest.mark.parametrize("status", [202, 204])
@pytest.mark.parametrize(("request_", "verdict"), [(None, "ok"), (REQUEST, "error")])
async def test_202_and_204_are_answers_to_what_is_no_request(
    status: int, request_: Message | None, verdict: str
) -> None:
    """B40"""
    guard, _ = await reply(status, [], request=request_)
    assert guard.verdict == verdict


async def test_a_notification_may_be_answered_by_anything_in_2xx() -> None:
    guard, _ = await reply(200, [b"thanks"], request=None)
    assert guard.verdict == "ok"


async def test_a_json_answer_that_broke_off_is_incomplete() -> None:
    guard, _ = await reply(200, [RESULT], ends=False)
    assert guard.verdict == "incomplete"


async def test_a_body_too_large_to_judge_counts_as_what_its_status_says() -> None:
    guard, _ = await reply(200, [b"x" * MAX_JUDGED, b"x"])
    assert guard.verdict == "ok"


@pytest.mark.parametrize(
    ("stream", "verdict"),
    [
        (event(NOTIFICATION) + event(RESULT), "ok"),
        (event(ERROR), "error"),
        (event(OTHER) + event(SERVER_REQUEST) + event(RESULT), "ok"),
        (event(NOTIFICATION), "incomplete"),
        (b"", "incomplete"),
        (b"id: 1\ndata:\n\n" + KEEPALIVE + event(RESULT), "ok"),
        (b'data: {"jsonrpc":"2.0","id":7,\ndata: "result":{}}\n\n', "ok"),
        (event(b"garbage") + event(RESULT), "ok"),
        (b"data: " + RESULT, "incomplete"),  # an event without its blank line is none
        (event(RESULT) + event(ERROR), "ok"),
    ],
)
async def test_a_stream_is_judged_by_the_event_that_answers_the_request(stream: bytes, verdict: str) -> None:
    """B40"""
    for content_type in (SSE, b"Text/Event-Stream; charset=utf-8"):
        guard, client = await reply(200, [stream], content_type=content_type)
        assert guard.is_stream
        assert guard.verdict == verdict
        assert client.body == stream


async def test_an_early_end_of_a_stream_is_passed_on_and_the_answer_before_it_counts() -> None:
    """B40"""
    guard, _ = await reply(200, [event(RESULT)], content_type=SSE, ends=False)
    assert guard.verdict == "ok"
    guard, _ = await reply(200, [event(NOTIFICATION)], content_type=SSE, ends=False)
    assert guard.verdict == "incomplete"


@pytest.mark.parametrize("ends", [True, False])
async def test_a_stream_that_answers_no_request_is_fine_however_it_ends(*, ends: bool) -> None:
    guard, _ = await reply(200, [event(NOTIFICATION)], content_type=SSE, request=None, ends=ends)
    assert guard.verdict == "ok"


@given(line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]), cuts=st.lists(st.integers(0, 400), max_size=10))
async def test_a_stream_is_judged_the_same_however_it_is_cut(line_end: bytes, cuts: list[int]) -> None:
    """B40"""
    for answer, verdict in ((RESULT, "ok"), (ERROR, "error"), (OTHER, "incomplete")):
        stream = (event(NOTIFICATION) + event(answer)).replace(b"\n", line_end)
        edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        guard, client = await reply(200, [stream[a:b] for a, b in pairwise(edges)], content_type=SSE)
        assert guard.verdict == verdict
        assert client.body == stream


async def test_a_guard_knows_when_the_client_has_its_status() -> None:
    guard = Guard(Client().send, REQUEST)
    assert not guard.started
    assert guard.verdict == "error"
    assert guard.first_byte_s is None
    await guard.send({"type": "http.response.start", "status": 200, "headers": []})
    assert guard.started
    assert guard.first_byte_s is not None
