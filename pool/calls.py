"""One call over a link: a request of our own, and the one answer to it read out of a reply."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Final, Protocol

import orjson

from .errors import PoolError, UpstreamLost, UpstreamRefused
from .jsonrpc import InvalidMessage, Message, RequestId, classify, parse
from .link import Headers, Reply
from .sse import EventSplitter, event_data, event_id, is_event_stream

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes of an answer, or of one event, above which a call is given up: it is held in memory."""
LAST_EVENT_S: Final = 0.05
"""How long an event stream that has given the answer may take to end, so that its connection can be used again."""

JSON_HEADERS: Final[Headers] = [
    (b"accept", b"application/json, text/event-stream"),
    (b"content-type", b"application/json"),
]

CANNOT_RESUME: Final = frozenset({400, 410, 500})
"""What servers say to the id of an event that they do not know, or if they know none."""
SENDABLE: Final = re.compile(rb"[\x20-\x7e]{1,1024}")
"""Ids of events that can stand in a header. There may be others, but nobody can ask for what came after them."""

OnMessage = Callable[[Message], Awaitable[None]]
"""Takes what else comes on the stream of an answer: notifications, and requests of the server."""


class Posts(Protocol):
    """As much of a link as making a call needs."""

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply: ...


class Listens(Protocol):
    """As much of a link as reading its stream needs."""

    async def get(self, headers: Headers) -> Reply: ...


def request(id: RequestId, method: str, params: dict[str, Any] | None = None) -> tuple[Message, bytes]:  # noqa: A002
    """A JSON-RPC request: its head and its bytes."""
    payload: dict[str, Any] = {"jsonrpc": "2.0", "id": id, "method": method}
    if params is not None:
        payload["params"] = params
    return Message("request", method, id, payload), orjson.dumps(payload)


def notification(method: str, params: dict[str, Any] | None = None) -> tuple[Message, bytes]:
    """A JSON-RPC notification: its head and its bytes."""
    payload: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    if params is not None:
        payload["params"] = params
    return Message("notification", method, None, payload), orjson.dumps(payload)


async def call(
    link: Posts,
    method: str,
    params: dict[str, Any] | None = None,
    *,
    id: RequestId,  # noqa: A002
    headers: Headers = JSON_HEADERS,
) -> Message:
    """Ask, and return the response, which may be a JSON-RPC error. Raises `PoolError`."""
    message, body = request(id, method, params)
    return await answer(await link.post(message, body, headers), id)


async def notify(
    link: Posts, method: str, params: dict[str, Any] | None = None, *, headers: Headers = JSON_HEADERS
) -> None:
    """Tell. Raises `PoolError`, `UpstreamRefused` where the upstream did not take it."""
    message, body = notification(method, params)
    reply = await link.post(message, body, headers)
    await reply.chunks.aclose()
    if not 200 <= reply.status < 300:
        raise UpstreamRefused(reply.status)


async def answer(reply: Reply, id: RequestId, on_message: OnMessage | None = None) -> Message:  # noqa: A002
    """Read a reply as far as the response with that id; what else is on its stream goes to `on_message`.

    Raises `UpstreamRefused` for a status that is no success and no JSON-RPC error either, and `UpstreamLost` for a
    stream that ends, or a body that is complete, without the response.
    """
    async with aclosing(reply.chunks) as chunks:
        if is_event_stream(reply.headers):
            return await _from_events(reply, id, on_message)
        body = await anext(chunks, b"")
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_ANSWER:
                raise UpstreamLost(f"the answer is larger than {MAX_ANSWER} bytes")
    try:
        message = parse(body)
    except InvalidMessage:
        message = None
    if message is not None and message.kind == "response" and message.id in (id, None):
        if 200 <= reply.status < 300 and message.id == id:
            return message
        if "error" in message.payload and reply.status not in (401, 403, 404):
            return message  # refused in words: the error is the answer
    if not 200 <= reply.status < 300:
        raise UpstreamRefused(reply.status)
    raise UpstreamLost("the upstream's answer is no JSON-RPC response to the call")


class Place:
    """How far a stream was read that is opened again and again, where its events have ids."""

    __slots__ = ("_empty", "last_id")

    def __init__(self) -> None:
        self.last_id = b""
        self._empty = 0

    @property
    def headers(self) -> Headers:
        return [(b"last-event-id", self.last_id)] if SENDABLE.fullmatch(self.last_id) else []

    def ended(self, *, empty: bool) -> None:
        """A stream has ended. Twice in a row without a word is how some servers say that they do not know the id."""
        self._empty = self._empty + 1 if empty else 0
        if self._empty > 1:
            self.last_id = b""


@asynccontextmanager
async def session_stream(
    link: Listens, headers: Headers, place: Place | None = None
) -> AsyncGenerator[tuple[int, AsyncGenerator[Message, None]], None]:
    """Open the stream of messages that belong to no request, after `place`: its status, and the messages. Raises
    `PoolError`."""
    place = place or Place()
    reply = await link.get([(b"accept", b"text/event-stream"), *headers, *place.headers])
    if reply.status in CANNOT_RESUME:
        place.last_id = b""
    messages = _messages(reply, place)
    try:
        yield reply.status, messages
    finally:
        await messages.aclose()
        await reply.chunks.aclose()


async def _messages(reply: Reply, place: Place) -> AsyncGenerator[Message, None]:
    splitter = EventSplitter(MAX_ANSWER)
    is_empty = True
    async for chunk in reply.chunks:
        for block in splitter.blocks(chunk):
            is_empty = False
            with suppress(InvalidMessage, ValueError, AttributeError):
                yield classify(orjson.loads(event_data(block)))
            named = event_id(block)
            if named is not None:
                place.last_id = named
    place.ended(empty=is_empty)


async def _from_events(reply: Reply, id: RequestId, on_message: OnMessage | None) -> Message:  # noqa: A002
    if not 200 <= reply.status < 300:
        raise UpstreamRefused(reply.status)
    splitter = EventSplitter(MAX_ANSWER)
    found: Message | None = None
    async for chunk in reply.chunks:
        for data in splitter.feed(chunk):
            try:
                # orjson accepts what it reads once; a server's own NaN is that event's loss only.
                message = classify(orjson.loads(data))
            except (InvalidMessage, ValueError, AttributeError):
                continue
            if message.kind == "response":
                if message.id == id:
                    found = message
            elif on_message is not None:
                await on_message(message)
        if found is not None:
            await let_end(reply.chunks)
            return found
    raise UpstreamLost("the upstream's answer ended before the response")


async def let_end(chunks: AsyncGenerator[bytes, None]) -> None:
    """A stream that has given its answer should end now. If it does not, nothing more is waited for."""
    with suppress(TimeoutError, PoolError):
        async with asyncio.timeout(LAST_EVENT_S):
            async for _ in chunks:
                pass
