"""The relay: one request to one link, and its reply back to the client, as bytes.

Runs at the owner, for requests that landed there and for those that came by a hop. A link's failure is this call's
failure only, told as a JSON-RPC error that says whether it may have run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from ..coordinator.event_log import SessionEvents
from ..pool import Fenced, Link, Message, PoolError, Reply, SessionClosed
from ..pool.calls import Posts
from ..pool.sse import STREAM_HEADERS, event
from .answers import JSON, outcome_body, pool_error_body, turned_away
from .asgi import Headers, Receive, Send, is_event_stream, respond, until_disconnect
from .errors import BrokenOff, NotRun
from .event_log import OwnStream

CONFLICT: Final = 409
GET_RETRY_S: Final = (0.1, 1.0)
GET_RETRY_FOR_S: Final = 10.0
"""How long an adopter goes on asking for the GET stream: a frozen owner may still hold it until its fence."""


async def relay_post(
    link: Posts,
    message: Message,
    body: bytes,
    headers: Headers,
    receive: Receive,
    send: Send,
    *,
    is_repeat: bool = False,
) -> None:
    """Send one message and stream the reply. `is_repeat`: an earlier try may have run, whatever becomes of this one.

    Raises `NotRun`, `Refused`, `Disconnected`, and `BrokenOff` after a reply had begun.
    """
    await _relay(lambda: link.post(message, body, headers), message, receive, send, is_repeat=is_repeat)


async def relay_get(
    link: Link, headers: Headers, receive: Receive, send: Send, *, adopted: bool, events: SessionEvents | None = None
) -> None:
    """Stream the server's messages. `adopted`: a 409 may be the previous owner's stream, so ask again for a while.
    `events`: the session's log, where it has one.

    Raises `BrokenOff` when the stream ends with its link: the session has moved, or ended. Else the upstream ended it.
    """
    stream = None if events is None else OwnStream(events, headers, pinned=link.resume is None)

    async def ask() -> Reply:
        patience_s = GET_RETRY_FOR_S if adopted else 0.0
        reply = await _open_stream(link, headers if stream is None else stream.headers, patience_s)
        if stream is not None:
            if reply.status == 500 and stream.resumes_upstream:
                await reply.chunks.aclose()
                stream.begin_anew()
                reply = await _open_stream(link, stream.headers, patience_s)
            reply = await stream.of(reply)
        if reply.status != 200 or not is_event_stream(reply.headers):
            return reply
        chunks = _until_moved(reply.chunks, link)
        await anext(chunks)
        return replace(reply, chunks=chunks)

    await _relay(ask, None, receive, send)


async def relay_delete(link: Link, headers: Headers, receive: Receive, send: Send) -> int:
    """End the upstream session; returns the upstream's status."""
    with until_disconnect(receive):
        try:
            reply = await link.delete(headers)
        except PoolError as error:
            raise _refusal(error) from error
        await _stream(reply, None, send)
    return reply.status


async def stream_out(events: AsyncGenerator[bytes, None], headers: Headers, send: Send) -> None:
    """A 200 with a stream of server-sent events of our own."""
    await _stream(Reply(200, [*STREAM_HEADERS, *headers], events), None, send)


async def _open_stream(link: Link, headers: Headers, patience_s: float) -> Reply:
    """Ask for the stream, and again for so long when the answer is 409."""
    loop = asyncio.get_running_loop()
    until = loop.time() + patience_s
    delay, longest = GET_RETRY_S
    while True:
        reply = await link.get(headers)
        if reply.status != CONFLICT or loop.time() >= until:
            return reply
        await reply.chunks.aclose()
        await asyncio.sleep(delay)
        delay = min(longest, delay * 2)


async def _until_moved(chunks: AsyncGenerator[bytes, None], link: Link) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        yield b""
        async for chunk in chunks:
            yield chunk
    if link.is_closed:
        raise BrokenOff("the session has moved, or ended")


async def _relay(
    ask: Callable[[], Awaitable[Reply]],
    message: Message | None,
    receive: Receive,
    send: Send,
    *,
    is_repeat: bool = False,
) -> None:
    request = message if message is not None and message.kind == "request" else None
    with until_disconnect(receive):
        try:
            reply = await ask()
        except PoolError as error:
            if request is None or isinstance(error, SessionClosed | Fenced):
                raise _refusal(error) from error
            outcome = "unknown" if is_repeat else error.outcome
            await respond(send, 200, outcome_body(str(error), outcome, request.id), JSON)
            return
        await _stream(reply, request, send)


def _refusal(error: PoolError) -> Exception:
    """Nothing was sent by a session that has ended here, or whose lease has: it may be found elsewhere by now."""
    if isinstance(error, SessionClosed | Fenced):
        return NotRun("fenced" if isinstance(error, Fenced) else "closed")
    return turned_away(error)


async def _stream(reply: Reply, request: Message | None, send: Send) -> None:
    headers = reply.headers
    is_stream = is_event_stream(headers)
    if is_stream:
        # Ours win: a proxy in front of us must not buffer or cache a stream.
        own = {name for name, _ in STREAM_HEADERS}
        headers = [*(pair for pair in headers if pair[0] not in own), *STREAM_HEADERS]
    last = b""
    async with aclosing(reply.chunks) as chunks:
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        try:
            async for chunk in chunks:
                if not is_stream:
                    # One piece behind: the last one, mostly the only one, then says itself that it is the last.
                    chunk, last = last, chunk
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except PoolError as error:
            if not is_stream:
                raise BrokenOff(str(error)) from error
            if request is not None:
                last = b"\n\n" + event(pool_error_body(error, request.id))
    await send({"type": "http.response.body", "body": last, "more_body": False})
