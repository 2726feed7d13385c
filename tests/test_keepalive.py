"""Comments on silent event streams: only there, only between events, and nobody waits for a slow reader."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from leasehold.pool.sse import KEEPALIVE, event
from leasehold.workers.keepalive import KeptResponse, StreamKeeper

pytestmark = pytest.mark.anyio

SSE = [(b"content-type", b"text/event-stream")]
EVERY_S = 0.03


class Client:
    """Reads, unless it is `stalled`; counts the comments it got."""

    def __init__(self) -> None:
        self.body = b""
        self.comments = 0
        self.commented = asyncio.Event()
        self.stalled: asyncio.Event | None = None

    async def send(self, message: Any) -> None:
        if self.stalled is not None:
            await self.stalled.wait()
        body: bytes = message.get("body", b"")
        self.body += body
        if body == KEEPALIVE:
            self.comments += 1
            self.commented.set()


async def begin(keeper: StreamKeeper, client: Client, headers: Any = SSE) -> KeptResponse:
    kept = keeper.wrap(client.send)
    await kept.send({"type": "http.response.start", "status": 200, "headers": headers})
    return kept


async def chunk(kept: KeptResponse, body: bytes, *, more: bool = True) -> None:
    await kept.send({"type": "http.response.body", "body": body, "more_body": more})


async def test_a_silent_stream_gets_comments_and_no_other_answer_does() -> None:
    keeper = StreamKeeper(EVERY_S)
    stream, plain, over, closed = Client(), Client(), Client(), Client()
    await begin(keeper, stream, [(b"content-type", b"Text/Event-Stream;charset=utf-8")])
    await begin(keeper, plain, [(b"content-type", b"application/json")])
    await chunk(await begin(keeper, over), event(b"{}"), more=False)
    (await begin(keeper, closed)).close()
    running = asyncio.create_task(keeper.run())
    for _ in range(3):
        stream.commented.clear()
        await asyncio.wait_for(stream.commented.wait(), 5)
    running.cancel()
    assert stream.body == KEEPALIVE * stream.comments
    assert plain.comments == over.comments == closed.comments == 0


@pytest.mark.parametrize(
    ("tail", "between"),
    [
        (b"", True),
        (b"data: 1\n\n", True),
        (b"data: 1\r\n\r\n", True),
        (b"data: 1\r\r", True),
        (b"data: 1\n\r\n", True),
        (b"data: 1\r\n\n", True),
        (b"data: 1\r\r\n", True),
        (b"data: 1\n", False),
        (b"data: 1\r\n", False),
        (b"data: 1\r", False),
        (b"data: 1", False),
        (b"data: 1\n\ndata", False),
    ],
)
async def test_a_comment_never_splits_an_event(tail: bytes, *, between: bool) -> None:
    for size in (1, 2, 3, 100):
        client = Client()
        kept = await begin(StreamKeeper(EVERY_S), client)
        for at in range(0, len(tail), size):
            await chunk(kept, tail[at : at + size])
        await kept.comment()
        assert client.comments == between
        assert client.body.startswith(tail)


async def test_a_reader_that_stalls_keeps_no_other_stream_from_its_comments() -> None:
    keeper = StreamKeeper(EVERY_S)
    stalled = [Client() for _ in range(20)]
    for client in stalled:
        await begin(keeper, client)
        client.stalled = asyncio.Event()
    reader = Client()
    await begin(keeper, reader)
    running = asyncio.create_task(keeper.run())
    await asyncio.wait_for(reader.commented.wait(), 5)
    reader.commented.clear()
    # Each of the others holds a comment for at most a second, and all of them at once.
    await asyncio.wait_for(reader.commented.wait(), 5)
    running.cancel()
    for client in stalled:
        assert client.stalled is not None
        client.stalled.set()


async def test_a_stream_whose_connection_broke_is_left_alone() -> None:
    keeper = StreamKeeper(EVERY_S)

    async def broken(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError

    kept = keeper.wrap(broken)
    await kept.send({"type": "http.response.start", "status": 200, "headers": SSE})
    await kept.comment()
    reader = Client()
    await begin(keeper, reader)
    running = asyncio.create_task(keeper.run())
    await asyncio.wait_for(reader.commented.wait(), 5)
    running.cancel()
