"""Both ends of an exchange against each other, in memory: what is in flight, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.coordinator import Refusal
from leasehold.coordinator.frames import (
    ABORT,
    FROM_OWNER,
    LAST,
    MAX_BODY,
    Frame,
    FrameType,
    RequestHead,
    decode,
    encode,
    unpack_head,
    unpack_request,
)
from leasehold.workers.errors import Disconnected, NotRun, OutcomeUnknown
from leasehold.workers.exchange import HOP, WINDOW, CallerExchange, OwnerExchange, nack, read_nack

pytestmark = pytest.mark.anyio

HEAD = RequestHead(
    session="5e55",
    epoch=3,
    expires_ms=1,
    clock=0,
    method="POST",
    scheme="https",
    path="/servers/a b/mcp",
    query="x=%20",
    root_path="/root",
    repeat=False,
    headers=[("accept", "*/*"), ("x-latin", "\xe9\xff")],
    client=("10.0.0.1", 4711),
)


class Wire:
    """Carries frames between the two ends at once, and counts the body bytes that nobody has read yet."""

    def __init__(self, body: bytes = b"") -> None:
        self.to_owner: list[Frame] = []
        self.to_caller: list[Frame] = []
        self.unread = self.most_unread = 0
        self.caller = CallerExchange(1, "owner", body, self._post_to_owner)
        self.owner: OwnerExchange | None = None

    def start(self) -> OwnerExchange:
        """Push the REQUEST, then as much of the body as the window holds, as the forwarder does."""
        (frame,) = decode(self.caller.request_frame(HEAD))
        head, piece = unpack_request(frame.payload)
        self.owner = OwnerExchange(1, "caller", head, piece, last=bool(frame.flags & LAST), post=self._post_to_caller)
        self.caller.send_body()
        return self.owner

    def _post_to_owner(self, data: bytes) -> None:
        for frame in decode(data):
            assert not frame.flags & FROM_OWNER
            assert len(frame.payload) <= MAX_BODY
            self.to_owner.append(frame)
            assert self.owner is not None
            match frame.type:
                case FrameType.CREDIT:
                    self.owner.credited(frame)
                case FrameType.CANCEL:
                    self.owner.disconnect()
                case _:
                    self.owner.feed(frame)

    def _post_to_caller(self, data: bytes) -> None:
        for frame in decode(data):
            assert frame.flags & FROM_OWNER
            assert len(frame.payload) <= MAX_BODY
            self.to_caller.append(frame)
            if frame.type is FrameType.CHUNK:
                self.unread += len(frame.payload)
                self.most_unread = max(self.most_unread, self.unread)
            self.caller.feed(frame)

    async def read(self) -> Frame:
        """Read one frame at the caller's end, and grant credit for it when it was body."""
        frame = await self.caller.next()
        if frame.type is FrameType.CHUNK:
            self.unread -= len(frame.payload)
            self.caller.grant(len(frame.payload))
        elif frame.type is FrameType.CREDIT:
            self.caller.credited(frame)
        return frame

    async def response(self) -> tuple[int, bytes, Frame]:
        """Status, body and the frame that ended the response."""
        status, body = 0, bytearray()
        while True:
            frame = await self.read()
            if frame.type is FrameType.HEAD:
                status, _ = unpack_head(frame.payload)
            elif frame.type is FrameType.CHUNK:
                body += frame.payload
            elif frame.type in (FrameType.END, FrameType.NACK):
                return status, bytes(body), frame


async def read_request(owner: OwnerExchange) -> bytes:
    body = bytearray()
    while True:
        message = await owner.receive()
        assert message["type"] == "http.request"
        body += message["body"]
        if not message["more_body"]:
            return bytes(body)


async def answer(owner: OwnerExchange, body: bytes, *, status: int = 200) -> None:
    await owner.send({"type": "http.response.start", "status": status, "headers": [(b"x", b"\xff")]})
    await owner.send({"type": "http.response.body", "body": body, "more_body": False})


async def waits(task: asyncio.Task[Any]) -> bool:
    """Whether a task gets no further by itself: nothing here waits for anything but the other end."""
    for _ in range(50):
        await asyncio.sleep(0)
    return not task.done()


def test_the_scope_is_the_request_s_and_says_that_it_came_by_a_hop() -> None:
    wire = Wire(b"x")
    scope = wire.start().scope
    assert scope["method"] == "POST"
    assert (scope["path"], scope["query_string"], scope["root_path"]) == ("/servers/a b/mcp", b"x=%20", "/root")
    assert scope["headers"] == [(b"accept", b"*/*"), (b"x-latin", b"\xe9\xff")]
    assert scope["client"] == ("10.0.0.1", 4711)
    assert scope[HOP] == HEAD


@pytest.mark.parametrize(
    "size", [0, 1, MAX_BODY - 1, MAX_BODY, MAX_BODY + 1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 7]
)
async def test_a_body_of_any_size_arrives_whole_in_both_directions(size: int) -> None:
    """B44"""
    body = bytes(i % 251 for i in range(size))
    wire = Wire(body)
    owner = wire.start()

    async def run() -> None:
        assert await read_request(owner) == body
        await answer(owner, body[::-1])

    running = asyncio.create_task(run())
    status, received, end = await wire.response()
    assert (status, received) == (200, body[::-1])
    assert (end.type, end.flags) == (FrameType.END, FROM_OWNER)
    await running


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3 * MAX_BODY), max_size=6))
async def test_chunks_of_any_sizes_arrive_in_order(sizes: list[int]) -> None:
    """B42"""
    wire = Wire()
    owner = wire.start()
    chunks = [bytes([i]) * size for i, size in enumerate(sizes)]

    async def run() -> None:
        await owner.send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in chunks:
            await owner.send({"type": "http.response.body", "body": chunk, "more_body": True})
        await owner.send({"type": "http.response.body", "body": b""})

    running = asyncio.create_task(run())
    _, received, _ = await wire.response()
    assert received == b"".join(chunks)
    await running


async def test_a_slow_reader_holds_a_large_response_at_the_window() -> None:
    """B44: 10 MB, of which at most 256 KiB are under way."""
    body = bytes(10 * 1024 * 1024)
    wire = Wire()
    owner = wire.start()
    running = asyncio.create_task(answer(owner, body))
    assert await waits(running)
    assert wire.unread == WINDOW, "nobody reads: the window is full, and no more is sent"
    received = 0
    while (frame := await wire.read()).type is not FrameType.END:
        received += len(frame.payload) if frame.type is FrameType.CHUNK else 0
    assert received == len(body)
    assert wire.most_unread == WINDOW
    await running


async def test_an_application_that_does_not_read_holds_a_large_request_at_the_window() -> None:
    """B44"""
    body = bytes(10 * 1024 * 1024)
    wire = Wire(body)
    owner = wire.start()
    sent = MAX_BODY + sum(len(frame.payload) for frame in wire.to_owner)
    assert sent == WINDOW
    reading = asyncio.create_task(read_request(owner))
    while not reading.done():
        credits_ = [frame for frame in wire.to_caller if frame.type is FrameType.CREDIT]
        granted = sum(int.from_bytes(frame.payload, "big") for frame in credits_)
        sent = MAX_BODY + sum(len(frame.payload) for frame in wire.to_owner)
        assert sent <= WINDOW + granted
        pump = asyncio.create_task(wire.read())
        await asyncio.wait({pump, reading}, return_when=asyncio.FIRST_COMPLETED)
        pump.cancel()
    assert await reading == body


async def test_a_caller_that_leaves_is_a_disconnect_for_the_application() -> None:
    """B42"""
    wire = Wire(b"x")
    owner = wire.start()
    await read_request(owner)
    waiting = asyncio.create_task(owner.receive())
    assert await waits(waiting)
    wire.caller.post(encode(FrameType.CANCEL, 1))
    assert (await waiting)["type"] == "http.disconnect"
    assert (await owner.receive())["type"] == "http.disconnect", "every time it asks"
    with pytest.raises(Disconnected):
        await owner.send({"type": "http.response.body", "body": b"late", "more_body": True})


async def test_a_caller_that_leaves_frees_an_application_that_waits_for_its_credit() -> None:
    """B42, B44"""
    wire = Wire()
    owner = wire.start()
    running = asyncio.create_task(answer(owner, bytes(2 * WINDOW)))
    assert await waits(running)
    wire.caller.post(encode(FrameType.CANCEL, 1))
    with pytest.raises(Disconnected):
        await running


async def test_a_body_that_arrived_before_the_disconnect_is_read_first() -> None:
    wire = Wire(bytes(MAX_BODY + 1))
    owner = wire.start()
    wire.caller.post(encode(FrameType.CANCEL, 1))
    assert await read_request(owner) == bytes(MAX_BODY + 1)
    assert (await owner.receive())["type"] == "http.disconnect"


async def test_an_abort_tells_the_caller_that_the_response_is_not_all() -> None:
    wire = Wire()
    owner = wire.start()
    await owner.send({"type": "http.response.start", "status": 200, "headers": []})
    await owner.send({"type": "http.response.body", "body": b"half", "more_body": True})
    owner.end(abort=True)
    status, body, end = await wire.response()
    assert (status, body, end.type) == (200, b"half", FrameType.END)
    assert end.flags & ABORT
    assert not wire.caller.take_end()


async def test_a_response_ends_once() -> None:
    """An abort after a complete response says nothing, nor does a refusal."""
    wire = Wire()
    owner = wire.start()
    await answer(owner, b"all")
    owner.end(abort=True)
    owner.refuse("closed")
    assert [frame.type for frame in wire.to_caller] == [FrameType.HEAD, FrameType.CHUNK, FrameType.END]


async def test_the_end_that_came_along_with_the_last_chunk_is_taken_with_it() -> None:
    wire = Wire()
    await answer(wire.start(), b"all")
    assert (await wire.read()).type is FrameType.HEAD
    assert not wire.caller.take_end()
    assert (await wire.read()).type is FrameType.CHUNK
    assert wire.caller.take_end()
    assert not wire.caller.take_end()


async def test_a_request_that_is_refused_after_all_is_a_nack_with_its_reason() -> None:
    """B34"""
    wire = Wire()
    owner = wire.start()
    owner.refuse("fenced")
    owner.end(abort=True)
    frame = await wire.caller.next()
    assert frame.type is FrameType.NACK
    assert read_nack(frame) == ("fenced", "", 0)
    assert [sent.type for sent in wire.to_caller] == [FrameType.NACK]


def test_a_nack_names_the_registration_that_stands() -> None:
    (frame,) = decode(nack(9, "stale", "ab" * 16, 7))
    assert frame.exchange == 9
    assert frame.flags & FROM_OWNER
    assert read_nack(frame) == ("stale", "ab" * 16, 7)


async def test_frames_that_came_before_a_failure_are_read_before_it_is_raised() -> None:
    """B34"""
    wire = Wire()
    owner = wire.start()
    await owner.send({"type": "http.response.start", "status": 200, "headers": []})
    wire.caller.fail(OutcomeUnknown("the owner died"))
    wire.caller.fail(NotRun("too late: the first failure stands"))
    assert (await wire.caller.next()).type is FrameType.HEAD
    for _ in range(2):
        with pytest.raises(OutcomeUnknown):
            await wire.caller.next()


async def test_a_failure_wakes_a_caller_that_waits() -> None:
    wire = Wire()
    wire.start()
    waiting = asyncio.create_task(wire.caller.next())
    assert await waits(waiting)
    wire.caller.fail(NotRun("owner_down"))
    with pytest.raises(NotRun):
        await waiting


@pytest.mark.parametrize("reason", list(Refusal))
async def test_only_a_push_in_doubt_may_have_run(reason: Refusal) -> None:
    """B33"""
    wire = Wire()
    wire.start()
    wire.caller.refused(reason)
    with pytest.raises(OutcomeUnknown if reason is Refusal.IN_DOUBT else NotRun):
        await wire.caller.next()


def test_a_dead_peer_ran_what_it_had_read_and_nothing_else() -> None:
    """B33, B34"""
    caller = Wire().caller
    assert not caller.peer_read(frozenset()), "never pushed"
    caller.request_counter = 5
    assert caller.peer_read(frozenset({4, 6}))
    assert not caller.peer_read(frozenset({5}))
