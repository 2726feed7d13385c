"""The stdio link: real child processes, and the routing rule without any."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.pool import duplex_link, jsonrpc
from leasehold.pool.errors import CallTimeout, Fenced, OpenFailed, SessionClosed, UpstreamLost
from leasehold.pool.line_stream import STREAM_BYTES, LineStream
from leasehold.pool.link import Link, Reply, unfenced
from leasehold.pool.reaper import Reaper, reaper
from leasehold.pool.routing import BACKLOG_BYTES, BACKLOG_MESSAGES, Router
from leasehold.pool.sse import STREAM_HEADERS as SSE
from leasehold.pool.sse import event
from leasehold.pool.stdio_lines import STRAY_LINE_CHARS, STRAY_LINES_PER_S, LineSplitter
from leasehold.pool.stdio_link import StdioLink

pytestmark = pytest.mark.anyio

SERVERS = Path(__file__).parent / "servers"
FAKE = ["-I", "-S", str(SERVERS / "fake_stdio.py")]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": os.environ.get("LEASEHOLD_TEST_LOOP") != "asyncio"}


def request(method: str, identifier: str | int = 1, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": identifier, "method": method, "params": params}).encode()


def notification(method: str, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params}).encode()


def with_token(token: str | int) -> dict[str, Any]:
    return {"_meta": {"progressToken": token}}


async def post(link: StdioLink, body: bytes) -> Reply:
    return await link.post(jsonrpc.parse(body), body, [])


async def body_of(reply: Reply) -> bytes:
    async with contextlib.aclosing(reply.chunks) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def call(link: StdioLink, method: str, identifier: str | int = "call", **params: Any) -> Any:
    """The result of a request, in whichever form it came."""
    body = await whole(link, request(method, identifier, **params))
    return json.loads(body.rpartition(b"data: ")[2])["result"]


async def whole(link: StdioLink, body: bytes) -> bytes:
    reply = await post(link, body)
    assert reply.status == 200
    return await body_of(reply)


async def until(condition: Callable[[], object], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def events(*lines: str) -> bytes:
    return b"".join(event(line.encode()) for line in lines)


def tasks() -> set[asyncio.Task[Any]]:
    """All tasks but those in which the test runner itself calls tests and fixtures."""
    return {task for task in asyncio.all_tasks() if "TestRunner" not in repr(task.get_coro())}


Opener = Callable[..., Awaitable[StdioLink]]


@pytest.fixture
async def open_link() -> AsyncIterator[Opener]:
    """Opens links to the fake server; afterwards no task, process group or registration may be left."""
    links: list[StdioLink] = []
    tasks_before = tasks()

    async def opener(args: list[str] = FAKE, **options: Any) -> StdioLink:
        settings: dict[str, Any] = {"name": "fake", "fence": unfenced, "call_timeout": 20.0} | options
        env, cwd = settings.pop("env", {}), settings.pop("cwd", None)
        link = await StdioLink.open(sys.executable, args, env, cwd, **settings)
        links.append(link)
        return link

    yield opener
    for link in links:
        await link.aclose()
        assert not lives(link.statistics().pid)
        assert link.statistics().pid not in reaper.groups
    await until(lambda: tasks() <= tasks_before)


@pytest.fixture
async def link(open_link: Opener) -> StdioLink:
    return await open_link()


# One call


async def test_a_response_that_comes_first_is_answered_as_json_with_the_bytes_it_came_in(link: StdioLink) -> None:
    port: Link = link
    line = '{"id" : 7,"jsonrpc":"2.0",   "result":{"u":"\\u00e9 \u00e9", "n":1.0, "nan": NaN}}'
    body = request("say", 7, mute=True, lines=[line])
    reply = await port.post(jsonrpc.parse(body), body, [])
    assert (reply.status, reply.headers) == (200, [(b"content-type", b"application/json")])
    assert await body_of(reply) == line.encode()


async def test_the_child_reads_the_bytes_of_the_body(link: StdioLink) -> None:
    body = b'{"id" : "a", "jsonrpc":"2.0",  "method":"heard" }'
    reply = await post(link, body)
    assert json.loads(await body_of(reply))["result"] == [body.decode()]


async def test_raw_line_breaks_in_a_body_cannot_smuggle_a_second_message(link: StdioLink) -> None:
    inner = '{"jsonrpc":"2.0","id":9,"method":"heard"}'
    body = ('{"jsonrpc":"2.0","id":1,"method":"heard","params":{"x":\r\n\n' + inner + "\n}}\n").encode()
    heard = json.loads(await body_of(await post(link, body)))["result"]
    assert len(heard) == 1
    assert json.loads(heard[0]) == json.loads(body)


async def test_carriage_returns_of_the_child_cannot_break_an_event(link: StdioLink) -> None:
    lines = ['{"jsonrpc":"2.0",\r"method":"notifications/a"}\r', '{"jsonrpc":"2.0","id":1,"result":{}}\r']
    reply = await post(link, request("say", 1, mute=True, lines=lines))
    expected = events('{"jsonrpc":"2.0", "method":"notifications/a"}', '{"jsonrpc":"2.0","id":1,"result":{}}')
    assert await body_of(reply) == expected


async def test_messages_before_the_response_make_an_event_stream_that_ends_with_it(link: StdioLink) -> None:
    lines = [
        '{"jsonrpc":"2.0", "method":"notifications/message", "params":{}}',
        '{"jsonrpc":"2.0","id":1,"method":"sampling/createMessage","params":{}}',
        '{"jsonrpc":"2.0","id":1,"result":{"done":true}}',
    ]
    reply = await post(link, request("say", 1, mute=True, lines=lines))
    assert (reply.status, reply.headers) == (200, SSE)
    assert await body_of(reply) == events(*lines)


async def test_silence_makes_an_event_stream_so_that_comments_can_be_sent(open_link: Opener) -> None:
    """By the worker that the client is connected to: from here nothing comes but what the server says."""
    link = await open_link(commit_after=0.02)
    reply = await post(link, request("hold", 1, name="a"))
    assert (reply.status, reply.headers) == (200, SSE)
    reading = asyncio.ensure_future(body_of(reply))
    await asyncio.sleep(0.1)
    assert not reading.done()
    await body_of(await post(link, request("release", 2, name="a")))
    assert await reading == events('{"jsonrpc": "2.0", "id": 1, "result": {"released": "a"}}')


@pytest.mark.parametrize(
    "body",
    [notification("notifications/initialized"), b'{"jsonrpc":"2.0","id":5,"result":{"roots":[]}}'],
    ids=["notification", "response"],
)
async def test_a_message_that_wants_no_answer_is_accepted_and_forwarded(link: StdioLink, body: bytes) -> None:
    reply = await post(link, body)
    assert (reply.status, reply.headers, await body_of(reply)) == (202, [], b"")
    assert (await call(link, "heard"))[0] == body.decode()


async def test_an_id_in_flight_is_refused_and_not_sent(link: StdioLink) -> None:
    first = asyncio.ensure_future(post(link, request("hold", 1, name="a")))
    other_type = asyncio.ensure_future(post(link, request("hold", "1", name="b")))
    await until(lambda: link.statistics().sent == 2)
    reply = await post(link, request("hold", 1, name="c"))
    error = json.loads(await body_of(reply))
    assert (reply.status, error["id"], error["error"]["code"]) == (400, 1, -32600)
    assert link.statistics().sent == 2
    await call(link, "release", name="b")
    await call(link, "release", name="a")
    assert json.loads(await body_of(await first)) == {"jsonrpc": "2.0", "id": 1, "result": {"released": "a"}}
    assert json.loads(await body_of(await other_type))["id"] == "1"


async def test_a_slow_call_delays_no_other(link: StdioLink) -> None:
    """B15."""
    slow = asyncio.ensure_future(post(link, request("hold", "slow", name="s")))
    assert await asyncio.gather(*(call(link, "size", i) for i in range(50)))
    assert not slow.done()
    await call(link, "release", name="s")
    assert json.loads(await body_of(await slow))["result"] == {"released": "s"}


async def test_lines_of_64_mib_pass_both_ways_beside_small_calls(link: StdioLink) -> None:
    size = 64 << 20
    big = asyncio.ensure_future(call(link, "big", "big", bytes=size))
    assert await call(link, "heard", "small")
    assert len(await big) == size
    assert await call(link, "size", "sent", x="y" * size) > size


async def test_large_bodies_written_at_once_do_not_mix(link: StdioLink) -> None:
    bodies = [request("size", i, x=str(i) * 300_000) for i in range(10)]
    replies = await asyncio.gather(*(post(link, body) for body in bodies))
    assert [json.loads(await body_of(reply))["result"] for reply in replies] == [len(body) for body in bodies]


# Cancellation, disconnection, time


async def test_a_cancelled_request_ends_with_an_error_and_its_late_response_is_dropped(link: StdioLink) -> None:
    """As an event: plain JSON at that moment fails an SDK client that is about to close."""
    waiting = asyncio.ensure_future(post(link, request("hold", 1, name="a")))
    await until(lambda: link.statistics().sent == 1)
    cancel = notification("notifications/cancelled", requestId=1)
    started = time.monotonic()
    assert (await post(link, cancel)).status == 202
    reply = await waiting
    assert 0.5 < time.monotonic() - started < 3
    assert reply.headers == SSE
    answer = json.loads((await body_of(reply)).rpartition(b"data: ")[2])
    assert answer == {"jsonrpc": "2.0", "id": 1, "error": {"code": -32800, "message": "Request cancelled"}}
    assert cancel.decode() in await call(link, "heard")
    # The id may be asked for once more only when the old answer cannot be taken for the new one.
    assert (await post(link, request("heard", 1))).status == 400
    await call(link, "release", name="a")
    assert link.statistics().streams.late_responses == 1
    assert await call(link, "heard", 1)


async def test_a_server_may_still_answer_a_cancelled_request(link: StdioLink) -> None:
    waiting = asyncio.ensure_future(post(link, request("hold", 1, name="a")))
    await until(lambda: link.statistics().sent == 1)
    await post(link, notification("notifications/cancelled", requestId=1))
    await call(link, "release", name="a")
    assert await body_of(await waiting) == events('{"jsonrpc": "2.0", "id": 1, "result": {"released": "a"}}')


async def test_a_cancelled_event_stream_ends_with_the_error(open_link: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplex_link, "CANCEL_GRACE_S", 0.05)
    link = await open_link(commit_after=0.01)
    reply = await post(link, request("hold", 1, name="a"))
    await post(link, notification("notifications/cancelled", requestId=1))
    assert b'"code":-32800' in (await body_of(reply)).split(b"data: ")[1]


@pytest.mark.parametrize("how", ["the wait is cancelled", "closed unread", "closed after a chunk", "cancelled in read"])
async def test_a_client_that_goes_away_cancels_nothing_and_leaves_nothing(open_link: Opener, how: str) -> None:
    """B3."""
    link = await open_link()
    tasks_before = tasks()
    lines = [] if how == "the wait is cancelled" else ['{"jsonrpc":"2.0","method":"notifications/a"}']
    waiting = asyncio.ensure_future(post(link, request("hold", 1, name="a", lines=lines)))
    if how == "the wait is cancelled":
        await until(lambda: link.statistics().sent == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
    else:
        chunks = (await waiting).chunks
        if how == "closed after a chunk":
            await anext(chunks)
        elif how == "cancelled in read":
            reading = asyncio.ensure_future(_exhaust(chunks))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
        await chunks.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
    assert link.statistics().streams.in_flight == 0
    assert link.statistics().streams.abandoned == 1
    assert tasks() == tasks_before
    assert len(await call(link, "heard")) == 2
    await call(link, "release", name="a")
    assert link.statistics().streams.abandoned == 0
    assert link.statistics().streams.late_responses == 1


async def _exhaust(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


async def test_a_silent_request_times_out_and_the_session_stays_usable(open_link: Opener) -> None:
    link = await open_link(call_timeout=0.1)
    with pytest.raises(CallTimeout):
        await post(link, request("hold", 1, name="a"))
    await call(link, "release", name="a")
    assert link.statistics().streams.late_responses == 1


async def test_a_process_that_has_just_begun_has_longer_than_a_call_to_answer_initialize(open_link: Opener) -> None:
    """However little time calls have: it may have much to load."""
    link = await open_link(call_timeout=0.001)
    await call(link, "initialize")
    with pytest.raises(CallTimeout):
        await post(link, request("hold", 1, name="a"))


async def test_an_event_stream_that_falls_silent_times_out(open_link: Opener) -> None:
    link = await open_link(call_timeout=0.2)
    line = '{"jsonrpc":"2.0","method":"notifications/a"}'
    chunks = (await post(link, request("hold", 1, name="a", lines=[line]))).chunks
    assert await anext(chunks) == events(line)
    started = time.monotonic()
    with pytest.raises(CallTimeout):
        await _exhaust(chunks)
    assert time.monotonic() - started > 0.1
    assert await call(link, "heard")


async def test_progress_postpones_the_timeout(open_link: Opener) -> None:
    link = await open_link(call_timeout=0.5)
    line = '{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":"t","progress":1}}'
    started = time.monotonic()
    reply = await post(link, request("hold", 1, name="a", lines=[line], **with_token("t")))
    assert await anext(reply.chunks) == events(line)
    while time.monotonic() - started < 0.8:
        await call(link, "say", lines=[line])
        assert await anext(reply.chunks) == events(line)
    await call(link, "release", name="a")
    assert b"released" in await body_of(reply)


async def test_nothing_is_written_after_the_fence(open_link: Opener) -> None:
    def fence() -> None:
        if fenced:
            raise Fenced("the lease is over")

    fenced: list[bool] = []
    link = await open_link(fence=fence)
    await call(link, "heard")
    fenced.append(True)
    for body in (request("heard", 2), notification("notifications/a")):
        with pytest.raises(Fenced):
            await post(link, body)
    assert link.statistics().sent == 1
    fenced.clear()
    assert len(await call(link, "heard", 2)) == 2


async def test_a_child_that_does_not_read_holds_each_call_to_its_own_deadline(
    open_link: Opener, tmp_path: Path
) -> None:
    fenced: list[bool] = []

    def fence() -> None:
        if fenced:
            raise Fenced("the lease is over")

    link = await open_link(call_timeout=0.3, fence=fence)
    wake = tmp_path / "wake"
    await call(link, "deaf", until=str(wake))
    full = asyncio.ensure_future(post(link, request("heard", "full", x="x" * (1 << 20))))
    await until(lambda: link.statistics().sent == 2)
    late = [post(link, request("heard", "late")), post(link, notification("notifications/late"))]
    results = await asyncio.gather(*late, return_exceptions=True)
    assert [type(result) for result in results] == [CallTimeout, CallTimeout]
    with pytest.raises(CallTimeout):
        await full
    gone = asyncio.ensure_future(post(link, request("heard", "gone")))
    late_fence = asyncio.ensure_future(post(link, request("heard", "fenced")))
    await until(lambda: link.statistics().unsent == 2)
    gone.cancel()
    await until(lambda: link.statistics().unsent == 1)
    fenced.append(True)
    wake.touch()
    with pytest.raises(Fenced):
        await late_fence
    fenced.clear()
    heard = await call(link, "heard", "late")
    assert [json.loads(line)["id"] for line in heard] == ["call", "full", "late"]


async def test_a_call_that_waits_for_a_child_to_read_is_sent_when_it_does(link: StdioLink, tmp_path: Path) -> None:
    wake = tmp_path / "wake"
    await call(link, "deaf", until=str(wake))
    full = asyncio.ensure_future(post(link, request("size", "full", x="x" * (1 << 20))))
    await until(lambda: link.statistics().sent == 2)
    told = asyncio.ensure_future(post(link, notification("notifications/a")))
    asked = asyncio.ensure_future(call(link, "heard", "asked"))
    await until(lambda: link.statistics().unsent == 2)
    wake.touch()
    assert (await told).status == 202
    assert [json.loads(line)["method"] for line in await asked] == ["deaf", "size", "notifications/a", "heard"]
    assert json.loads(await body_of(await full))["result"] > 1 << 20


# Streams


async def test_the_get_stream_carries_what_belongs_to_no_request(open_link: Opener) -> None:
    link = await open_link(commit_after=0.02)
    line = '{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}'
    reply = await link.get([])
    assert (reply.status, reply.headers) == (200, SSE)
    second = await link.get([])
    assert second.status == 409
    assert "error" in json.loads(await body_of(second))
    await call(link, "heard", lines=[])
    await post(link, request("say", 2, mute=True, lines=['{"jsonrpc":"2.0","id":2,"result":1}', line]))
    assert await anext(reply.chunks) == events(line)
    await reply.chunks.aclose()
    third = await link.get([])
    assert third.status == 200
    await third.chunks.aclose()


async def test_what_nobody_can_receive_yet_waits_for_the_next_stream(link: StdioLink) -> None:
    lines = ['{"jsonrpc":"2.0","id":2,"result":1}', '{"jsonrpc":"2.0","id":1,"method":"roots/list"}']
    await body_of(await post(link, request("say", 2, mute=True, lines=lines)))
    await until(lambda: link.statistics().streams.backlog == 1)
    reply = await link.get([])
    assert await anext(reply.chunks) == events(lines[1])
    assert link.statistics().streams.backlog == 0
    await reply.chunks.aclose()


async def test_a_client_that_does_not_read_is_cut_off_and_delays_nobody(link: StdioLink) -> None:
    stream = await link.get([])
    held = [asyncio.ensure_future(call(link, "hold", name, name=name)) for name in "ab"]
    await until(lambda: link.statistics().sent == 2)
    assert await asyncio.wait_for(call(link, "flood", "flood", count=20, bytes=1 << 20), 5) == {}
    assert link.statistics().streams.slow_streams == 1
    with pytest.raises(UpstreamLost, match="too slowly"):
        await _exhaust(stream.chunks)
    assert (await link.get([])).status == 200
    for name in "ab":
        await call(link, "release", f"release {name}", name=name)
    assert await asyncio.gather(*held) == [{"released": "a"}, {"released": "b"}]


async def test_delete_ends_session_and_process(link: StdioLink) -> None:
    stream = await link.get([])
    waiting = asyncio.ensure_future(post(link, request("hold", 1, name="a")))
    await until(lambda: link.statistics().sent == 1)
    reply = await link.delete([])
    assert (reply.status, await body_of(reply)) == (200, b"")
    assert link.is_closed
    assert link.resume is None
    await link.wait_closed()
    ended = await waiting
    assert ended.headers == SSE
    assert json.loads((await body_of(ended)).rpartition(b"data: ")[2])["error"]["data"] == {"outcome": "unknown"}
    assert await body_of(stream) == b""
    for refused in (post(link, request("heard", 2)), link.get([]), link.delete([])):
        with pytest.raises(SessionClosed):
            await refused
    await until(lambda: not lives(link.statistics().pid))


# The end of the child


@pytest.mark.parametrize("end", ["exits", "is killed", "exits and its child keeps the pipe", "closes stdout"])
async def test_an_upstream_that_dies_in_mid_call_fails_every_caller_at_once(open_link: Opener, end: str) -> None:
    """B9."""
    link = await open_link(commit_after=0.05)
    stream = await link.get([])
    streaming = (await post(link, request("hold", "streaming", name="s"))).chunks
    waiting = asyncio.ensure_future(whole(link, request("hold", "waiting", name="w")))
    await until(lambda: link.statistics().sent == 2)
    if end == "exits and its child keeps the pipe":
        await call(link, "child", keeps_stdout=True)
    started = time.monotonic()
    if end == "is killed":
        os.kill(link.statistics().pid, signal.SIGKILL)
    elif end == "closes stdout":
        ending = asyncio.ensure_future(whole(link, request("close", "end", fd=1)))
    else:
        ending = asyncio.ensure_future(whole(link, request("exit", "end", status=3)))
    for doomed in (waiting, _exhaust(streaming), *([] if end == "is killed" else [ending])):
        with pytest.raises(UpstreamLost) as caught:
            await doomed
        if end.startswith("exits"):
            assert "exited with status 3" in str(caught.value)
    await link.wait_closed()
    assert time.monotonic() - started < 1
    assert link.is_closed
    assert b"data" not in await body_of(stream)
    with pytest.raises(SessionClosed):
        await post(link, request("heard", 9))


async def test_a_child_that_listens_no_more_ends_its_session(link: StdioLink) -> None:
    closing = asyncio.ensure_future(post(link, request("close", 1, fd=0)))
    await until(lambda: link.statistics().sent == 1)
    # Some loops notice a closed pipe only when they write.
    with contextlib.suppress(UpstreamLost, SessionClosed):
        while not link.is_closed:
            await post(link, notification("notifications/a"))
            await asyncio.sleep(0.01)
    with pytest.raises(UpstreamLost):
        await closing


async def test_the_last_words_of_a_child_are_delivered_before_its_end(link: StdioLink) -> None:
    for_other = '{"jsonrpc":"2.0","id":"waiting","result":"last"}'
    waiting = asyncio.ensure_future(post(link, request("hold", "waiting", name="w")))
    await until(lambda: link.statistics().sent == 1)
    answered = await post(link, request("exit", 1, status=0, answer=True, lines=[for_other]))
    assert json.loads(await body_of(answered))["id"] == 1
    assert await body_of(await waiting) == for_other.encode()
    await link.wait_closed()


async def test_closing_ends_the_children_of_the_child(link: StdioLink) -> None:
    """B22."""
    pids = [await call(link, "child") for _ in range(2)]
    assert all(map(lives, pids))
    await link.aclose()
    assert not any(map(lives, [*pids, link.statistics().pid]))


async def test_a_child_that_exits_takes_its_children_with_it(link: StdioLink) -> None:
    """B22."""
    pid = await call(link, "child")
    with pytest.raises(UpstreamLost):
        await post(link, request("exit", 1, status=0))
    await until(lambda: not lives(pid), within=3)


async def test_closing_is_bounded_in_time_whatever_the_child_does(link: StdioLink) -> None:
    """B14."""
    grandchild = await call(link, "child", stubborn=True)
    await call(link, "stubborn")
    waiting = asyncio.ensure_future(post(link, request("hold", 1, name="a")))
    await until(lambda: link.statistics().sent == 3)
    started = time.monotonic()
    closing = asyncio.ensure_future(link.aclose())
    with pytest.raises(UpstreamLost):
        await waiting
    assert time.monotonic() - started < 1
    await closing
    assert time.monotonic() - started < 5.5
    assert not any(map(lives, [grandchild, link.statistics().pid]))


async def test_a_stopped_child_is_closed_in_bounded_time(link: StdioLink) -> None:
    """B14."""
    await call(link, "heard")
    os.kill(link.statistics().pid, signal.SIGSTOP)
    started = time.monotonic()
    await link.aclose()
    assert time.monotonic() - started < 5.5


async def test_a_cancelled_close_still_ends_the_process(link: StdioLink) -> None:
    """B3."""
    closing = asyncio.ensure_future(link.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    await until(lambda: not lives(link.statistics().pid))
    await asyncio.gather(link.aclose(), link.aclose())


# Opening


async def test_the_child_sees_only_safe_variables_and_the_configured_ones(
    open_link: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    monkeypatch.setenv("LEASEHOLD_SECRET", "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("TERM", "() { :; }")
    monkeypatch.setenv("USER", "inherited")
    link = await open_link(env={"API_KEY": "configured", "HOME": "/configured"}, cwd=str(tmp_path))
    seen = await call(link, "environment")
    assert set(seen) <= {"HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "USER", "API_KEY", "LC_CTYPE"}
    assert (seen["API_KEY"], seen["HOME"], seen["USER"]) == ("configured", "/configured", "inherited")
    assert await call(link, "where") == str(tmp_path)


@pytest.mark.parametrize(
    ("command", "args", "cwd"),
    [("no-such-command", [], None), (sys.executable, [], "no-such-directory"), (sys.executable, ["a\0b"], None)],
    ids=["command", "directory", "argument"],
)
async def test_a_process_that_cannot_start_is_an_open_failure(command: str, args: list[str], cwd: str | None) -> None:
    with pytest.raises(OpenFailed, match="cannot start"):
        await StdioLink.open(command, args, {}, cwd, name="bad", fence=unfenced, call_timeout=1)


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
async def test_an_opening_that_is_cancelled_leaves_no_process(turns: int) -> None:
    """B3."""
    groups, before = reaper.groups, {child.pid for child in psutil.Process().children()}
    opening = asyncio.ensure_future(
        StdioLink.open(sys.executable, FAKE, {}, None, name="fake", fence=unfenced, call_timeout=1)
    )
    for _ in range(turns):
        await asyncio.sleep(0)
    if opening.cancel():
        await asyncio.wait([opening])
    if not opening.cancelled():
        await opening.result().aclose()
    await until(lambda: reaper.groups == groups)
    others = {reaper.pid, *before}
    await until(lambda: not [child for child in psutil.Process().children() if child.pid not in others])


# What children say to humans


@pytest.fixture
def stray(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "leasehold.pool.stderr")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "leasehold.pool.stderr"]


async def test_stderr_goes_to_the_log_in_bounded_lines(link: StdioLink, stray: Callable[[], list[str]]) -> None:
    await call(link, "stderr", count=2, chars=100_000)
    await until(lambda: len(stray()) == 2)
    assert stray()[0].startswith("stderr upstream=fake text='yyy")
    assert len(stray()[0]) < STRAY_LINE_CHARS + 100


async def test_a_flood_on_stderr_is_dropped_and_counted_and_delays_nothing(
    link: StdioLink, stray: Callable[[], list[str]]
) -> None:
    await call(link, "stderr", count=20_000, chars=200)
    await until(lambda: link.statistics().stderr_lines + link.statistics().stderr_dropped == 20_000)
    assert link.statistics().stderr_lines <= 3 * STRAY_LINES_PER_S
    await link.aclose()
    assert any(line.startswith("stderr_dropped upstream=fake lines=") for line in stray())


async def test_lines_that_are_no_json_rpc_are_skipped_and_payloads_not_shown(
    link: StdioLink, stray: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["Server is running!\x1b[2J", "", "  ", '{"secret": 1}', '["secret"]', '{"secret"', '"just a string"']
    lines += ["[" * 5000, "9" * 100_000]
    assert await call(link, "say", lines=lines) == {}
    assert link.statistics().invalid_lines == 7
    assert any(r"stdout upstream=fake text='Server is running!\x1b[2J'" in line for line in stray())
    assert "line_skipped upstream=fake" in caplog.text
    assert "secret" not in caplog.text


# The worker's end


OWNER = """
import asyncio, json, sys, os
from leasehold.pool import jsonrpc
from leasehold.pool.link import unfenced
from leasehold.pool.stdio_link import StdioLink
from leasehold.pool.reaper import reaper

async def main():
    link = await StdioLink.open(sys.executable, sys.argv[1:], {}, None, name="x", fence=unfenced, call_timeout=10)
    pids = [reaper.pid, link.statistics().pid]
    for number, params in enumerate(({}, {"stubborn": True})):
        body = json.dumps({"jsonrpc": "2.0", "id": number, "method": "child", "params": params}).encode()
        reply = await link.post(jsonrpc.parse(body), body, [])
        pids.append(json.loads(b"".join([chunk async for chunk in reply.chunks]))["result"])
    print(json.dumps(pids), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.process
async def test_a_worker_killed_outright_takes_its_children_and_theirs_with_it() -> None:
    """B22."""
    worker = subprocess.Popen(  # noqa: ASYNC220 - it is not ours to await: it will be killed
        [sys.executable, "-c", OWNER, *FAKE], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert worker.stdout is not None
        pids = json.loads(await asyncio.to_thread(worker.stdout.readline))
        assert len(pids) == 4
        assert all(map(lives, pids))
        # Neither the terminal nor a supervisor that signals everything ends the helper before its time.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pids[0], number)
    finally:
        worker.kill()
        worker.wait()
    await until(lambda: not any(map(lives, pids)), within=3)
    worker.stdout.close()


def test_a_forked_process_has_a_reaper_of_its_own_and_does_not_hide_its_parents_death() -> None:
    script = """
    import os, subprocess, sys, time
    from leasehold.pool.reaper import reaper

    sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    reaper.add(sleeper.pid)
    child = os.fork()
    if child == 0:
        assert reaper.pid is None and not reaper.groups
        time.sleep(1000)
    print(reaper.pid, sleeper.pid, child, flush=True)
    time.sleep(1000)
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    helper, sleeper, child = map(int, worker.stdout.readline().split())
    try:
        worker.kill()
        worker.wait()
        deadline = time.monotonic() + 3
        while lives(sleeper) or lives(helper):
            assert time.monotonic() < deadline
        assert lives(child)
    finally:
        os.kill(child, signal.SIGKILL)
        worker.stdout.close()


def _wait_dead(pid: int) -> None:
    deadline = time.monotonic() + 3
    while lives(pid):
        assert time.monotonic() < deadline


@pytest.fixture
def own_reaper() -> Reaper:
    return Reaper()


@pytest.fixture
def sleepers() -> Any:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "1000"], start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_reaper_is_started_again_when_it_died_and_still_knows_every_group(
    own_reaper: Reaper, sleepers: Any
) -> None:
    first, second = sleepers(), sleepers()
    assert own_reaper.pid is None
    own_reaper.add(first.pid)
    before = own_reaper.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    _wait_dead(before)
    assert lives(first.pid)
    own_reaper.add(second.pid)
    assert own_reaper.pid not in (None, before)
    assert own_reaper.groups == {first.pid, second.pid}
    own_reaper.close()
    assert first.wait(3) == second.wait(3) == -signal.SIGTERM


def test_a_group_that_was_removed_is_not_touched(own_reaper: Reaper, sleepers: Any) -> None:
    kept, ended = sleepers(), sleepers()
    own_reaper.add(kept.pid)
    own_reaper.add(ended.pid)
    own_reaper.remove(kept.pid)
    own_reaper.remove(kept.pid)
    helper = own_reaper.pid
    assert helper is not None
    own_reaper.close()
    assert ended.wait(3) == -signal.SIGTERM
    _wait_dead(helper)
    assert kept.poll() is None


def test_the_reaper_holds_none_of_the_workers_files_open(own_reaper: Reaper, sleepers: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        own_reaper.add(sleepers().pid)
        helper = psutil.Process(own_reaper.pid)
        assert helper.net_connections() == []
        assert helper.num_fds() <= 4
        assert helper.cwd() == "/"
    own_reaper.close()


# The routing rule


def message(raw: str | bytes) -> tuple[jsonrpc.Message, bytes]:
    line = raw.encode() if isinstance(raw, str) else raw
    return jsonrpc.parse(line), line


def response(identifier: str | int | None) -> tuple[jsonrpc.Message, bytes]:
    body: dict[str, Any] = {"jsonrpc": "2.0", "id": identifier}
    return message(json.dumps(body | ({"error": {}} if identifier is None else {"result": {}})))


LOG = message(notification("notifications/message"))


def opened(router: Router, *streams: LineStream) -> None:
    for stream in streams:
        router.open(stream)


def test_a_response_goes_to_the_request_of_exactly_its_id() -> None:
    router, number, text = Router(), LineStream(1), LineStream("1")
    opened(router, number, text)
    router.route(*response("1"))
    assert (number.ended, text.ended, text.is_answer) == (False, True, True)
    router.route(*response(1))
    router.route(*response(1))
    router.route(*response(None))
    assert number.is_answer
    assert router.statistics().unmatched_responses == 2
    assert router.statistics().in_flight == 0


def test_progress_goes_to_the_request_that_gave_the_token() -> None:
    router, streams = Router(), [LineStream(1, "t"), LineStream(2, 1), LineStream(3, True), LineStream()]
    opened(router, *streams)
    for token, expected in (("t", 0), (1, 1), ("1", 3), (True, 3), ([], 3)):
        router.route(*message(notification("notifications/progress", progressToken=token)))
        assert [index for index, stream in enumerate(streams) if stream.pop()] == [expected]


def test_late_progress_of_a_request_whose_client_left_disturbs_nobody() -> None:
    router, gone, other = Router(), LineStream(1, "t"), LineStream(2)
    opened(router, gone, other)
    router.leave(gone)
    router.route(*message(notification("notifications/progress", progressToken="t")))
    assert len(other) == 0
    assert router.statistics().late_progress == 1


def test_other_messages_go_to_the_only_request_else_the_listener_else_the_oldest_request() -> None:
    router, first, second, listener = Router(), LineStream(1), LineStream(2), LineStream()
    opened(router, first)
    router.route(*LOG)
    assert len(first) == 1
    opened(router, second)
    router.route(*LOG)
    assert (len(first), len(second)) == (2, 0)
    opened(router, listener)
    router.route(*LOG)
    assert (len(first), len(second), len(listener)) == (2, 0, 1)
    router.leave(second)
    router.route(*LOG)
    assert (len(first), len(listener)) == (3, 1)
    router.leave(first)
    router.route(*LOG)
    assert len(listener) == 2


def test_a_servers_cancellation_follows_the_request_it_cancels() -> None:
    router, first, second, listener = Router(), LineStream(1), LineStream(2), LineStream()
    opened(router, first)
    router.route(*message(request("sampling/createMessage", "s")))
    router.route(*message(request("sampling/createMessage", "answered")))
    router.answered("answered")
    opened(router, second, listener)
    router.route(*message(notification("notifications/cancelled", requestId="s")))
    router.route(*message(notification("notifications/cancelled", requestId="answered")))
    assert (len(first), len(second), len(listener)) == (3, 0, 1)


def test_a_servers_cancellation_follows_a_request_that_waited_in_the_backlog() -> None:
    router, first, listener = Router(), LineStream(1), LineStream()
    router.route(*message(request("roots/list", 5)))
    opened(router, first, LineStream(2), listener)
    router.route(*message(notification("notifications/cancelled", requestId=5)))
    assert (len(first), len(listener)) == (2, 0)


def test_the_backlog_is_bounded_in_messages_and_bytes_and_keeps_the_newest() -> None:
    router = Router()
    for number in range(BACKLOG_MESSAGES + 10):
        router.route(*message(notification("notifications/n", n=number)))
    assert router.statistics().backlog_dropped == 10
    big = message(notification("notifications/n", x="x" * (BACKLOG_BYTES // 3)))
    for _ in range(5):
        router.route(*big)
    assert router.statistics().backlog == 2
    listener = LineStream()
    opened(router, listener)
    assert (listener.pop(), listener.pop(), listener.pop()) == (big[1], big[1], None)


def test_what_a_slow_client_cannot_take_goes_to_another() -> None:
    router, slow, listener = Router(), LineStream(1, limit=10), LineStream()
    opened(router, slow, listener)
    router.route(*LOG)
    assert (len(slow), len(listener)) == (1, 0)
    router.route(*LOG)
    assert isinstance(slow.error, UpstreamLost)
    assert (len(slow), len(listener)) == (0, 1)
    assert router.is_taken(1)
    router.route(*response(1))
    assert not router.is_taken(1)
    assert router.statistics().slow_streams == router.statistics().late_responses == 1


def test_b43_what_a_listener_did_not_get_before_it_left_goes_to_the_next_one() -> None:
    router, listener, again, asked = Router(), LineStream(), LineStream(), LineStream(1)
    lines = [message(notification("notifications/n", n=number)) for number in range(4)]
    opened(router, listener)
    for each in lines[:3]:
        router.route(*each)
    assert listener.pop() == lines[0][1]
    router.leave(listener)
    assert router.statistics().backlog == 2
    router.route(*lines[3])
    opened(router, again)
    assert [again.pop() for _ in range(4)] == [line for _, line in lines[1:]] + [None]
    router.route(*message(request("roots/list", 5)))
    opened(router, asked)
    router.leave(again)
    assert len(asked) == 1, "the server's request, for whoever can answer it"
    router.leave(again)
    router.end("it ended")
    router.leave(asked)


def test_a_message_larger_than_the_limit_passes_when_nothing_waits() -> None:
    stream = LineStream(1)
    assert stream.push(b"x" * (2 * STREAM_BYTES))
    assert not stream.push(b"y")


def test_the_end_is_told_after_what_was_already_there() -> None:
    router, asked, listener = Router(), LineStream(1), LineStream()
    opened(router, asked, listener)
    router.route(*LOG)
    router.end("it crashed")
    assert asked.pop() == LOG[1]
    assert isinstance(asked.error, UpstreamLost)
    assert (listener.ended, listener.error) == (True, None)


@given(st.binary(max_size=60).map(lambda data: data.replace(b"a", b"\n")), st.lists(st.integers(0, 60)))
def test_lines_are_the_same_however_they_arrive(data: bytes, cuts: list[int]) -> None:
    splitter, lines, start = LineSplitter(1000), [], 0
    for cut in [*sorted(cuts), len(data)]:
        lines += splitter.feed(data[start:cut])
        start = max(start, cut)
    assert [*lines, splitter.rest()] == data.split(b"\n")
    assert not splitter.overran


def test_an_endless_line_takes_no_endless_memory() -> None:
    splitter = LineSplitter(10)
    for _ in range(100):
        assert splitter.feed(b"xxx") == []
    assert splitter.overran
    assert splitter.feed(b"\nab") == [b"x" * 10]
    assert splitter.rest() == b"ab"


# The SDK's server


@pytest.mark.process
async def test_everything_that_flows_against_the_stream_passes_the_sdks_server(open_link: Opener) -> None:
    """B20: progress, elicitation, sampling and roots, in both directions."""
    link = await open_link([str(SERVERS / "sdk_stdio.py")], name="sdk")
    capabilities = {"sampling": {}, "elicitation": {}, "roots": {}}
    client = {"name": "test", "version": "1"}
    result = await call(
        link, "initialize", 0, protocolVersion="2025-11-25", capabilities=capabilities, clientInfo=client
    )
    assert result["serverInfo"]["name"] == "everything"
    assert (await post(link, notification("notifications/initialized"))).status == 202
    assert {tool["name"] for tool in (await call(link, "tools/list", 1))["tools"]} == {
        "count",
        "ask",
        "sample",
        "roots",
    }

    async def use(tool: str, identifier: int, answer: dict[str, Any] | None = None, **arguments: Any) -> list[Any]:
        body = request("tools/call", identifier, name=tool, arguments=arguments, **with_token(f"token-{identifier}"))
        reply = await post(link, body)
        assert reply.headers == SSE
        seen: list[Any] = []
        async for chunk in reply.chunks:
            seen.append(json.loads(chunk.removeprefix(b"event: message\ndata: ")))
            if "id" in seen[-1] and "method" in seen[-1]:
                response = json.dumps({"jsonrpc": "2.0", "id": seen[-1]["id"], "result": answer}).encode()
                assert (await post(link, response)).status == 202
        return seen

    *progress, last = await use("count", 2, upto=3)
    assert [step["params"]["progress"] for step in progress] == [1, 2, 3]
    assert last["result"]["content"][0]["text"] == "counted to 3"
    answers = {
        "ask": ({"action": "accept", "content": {"name": "Ada"}}, "elicitation/create", "hello Ada"),
        "sample": (
            {"role": "assistant", "content": {"type": "text", "text": "hard"}, "model": "m"},
            "sampling/createMessage",
            "thought hard",
        ),
        "roots": ({"roots": [{"uri": "file:///a"}]}, "roots/list", "1 roots"),
    }
    for identifier, (tool, (answer, method, text)) in enumerate(answers.items(), start=3):
        asked, last = await use(tool, identifier, answer)
        assert asked["method"] == method
        assert last["result"]["content"][0]["text"] == text
