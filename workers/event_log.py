"""The owner's end of a client's own stream of messages that belong to no call: its GET.

An upstream that gives its events ids resumes its streams itself: they pass as the bytes they are, and so does the id
that a client comes back with. Others never say where one was: their events get ids of ours, are in the session's log
before they are sent, and are sent again from there. The first event that says something decides. Our ids are known by
their form and their MAC, and go to no upstream.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from ..coordinator import Unavailable
from ..coordinator.event_log import MAX_BYTES, Logged, SessionEvents, settled
from ..pool import Reply
from ..pool.calls import SENDABLE
from ..pool.sse import EventCutter, Piece, event_id, has_data
from .answers import Refused, unavailable
from .asgi import Headers, header, is_event_stream

LAST_EVENT_ID: Final = b"last-event-id"
BEGINS_AFTER: Final = b"leasehold-begins-after"
"""A header by which an owner tells the edge the id of the place where a stream begins, for it may be long until an
event has one. It goes no further: clients of older protocols trip over events that only set an id."""


class OwnStream:
    """One GET stream of one client."""

    def __init__(self, events: SessionEvents, headers: Headers, *, pinned: bool) -> None:
        """`headers`: of the request for it. `pinned`: the upstream's events never have ids."""
        self._events = events
        told = header(headers, LAST_EVENT_ID)
        self._after = None if told is None else events.cursor(told)
        self.resumes_upstream = told is not None and self._after is None
        """Whether an id is asked for that is not ours."""
        if self.resumes_upstream and (pinned or not SENDABLE.fullmatch(told or b"")):
            self.resumes_upstream = False  # an id that says nothing
        self._passes = False
        self._name = self._after.stream if self._after is not None else os.urandom(4).hex().encode()
        self.headers = headers if self.resumes_upstream else without_id(headers)
        """What the upstream is asked with."""

    def begin_anew(self) -> None:
        """The upstream has failed at its id, as some do that give none (500 of the Python SDK's server). Raises
        `Refused` where it may be one of its own after all: whatever came then would be of another stream."""
        if not self._events.has_begun:
            raise Refused(400, "The server cannot resume a stream after this event")
        self.resumes_upstream = False
        self.headers = without_id(self.headers)

    async def of(self, reply: Reply) -> Reply:
        """The upstream's answer, as the client gets it. Raises `Refused` when what was missed cannot be told."""
        if reply.status != 200 or not is_event_stream(reply.headers):
            return reply
        headers = reply.headers
        missed: list[Logged] = []
        if self._after is not None:
            try:
                missed = await self._events.after(self._after)
            except BaseException as error:
                await reply.chunks.aclose()
                if isinstance(error, Unavailable):
                    raise unavailable("Redis does not answer: what the stream has missed cannot be told") from error
                raise
        elif not self.resumes_upstream:
            headers = [*headers, (BEGINS_AFTER, self._events.now(self._name))]
        chunks = self._chunks(reply.chunks, missed)
        await anext(chunks)  # a generator that never began runs no clean-up when it is closed
        return Reply(reply.status, headers, chunks)

    async def _chunks(self, chunks: AsyncGenerator[bytes, None], missed: list[Logged]) -> AsyncGenerator[bytes, None]:
        async with aclosing(chunks):
            yield b""
            if missed:
                yield b"".join(with_id(event) for event in missed)
            cutter = EventCutter(MAX_BYTES)
            async for chunk in chunks:
                if self._passes:
                    yield chunk
                    continue
                # All of them in the turn in which they came: whoever is cancelled from here on, they will be written.
                taken = [self._take(piece) for piece in cutter.feed(chunk)]
                rest = cutter.rest() if self._passes else b""
                await settled(each for each in taken if isinstance(each, Logged))
                said = b"".join(with_id(each) if isinstance(each, Logged) else each for each in taken) + rest
                if said:
                    yield said

    def _take(self, piece: Piece) -> Logged | bytes:
        if self._passes or not piece.is_event or not has_data(piece.data):
            if piece.ends and not piece.is_event:
                self._events.too_large()
            return piece.data
        if event_id(piece.data) is not None:
            self._passes = True
            return piece.data
        return self._events.add(self._name, piece.data)


def with_id(logged: Logged) -> bytes:
    """An event of the log, as it is sent."""
    return b"id: " + logged.name + b"\n" + logged.event.lstrip(b"\r\n")


def without_id(headers: Headers) -> Headers:
    """Headers of a request for a stream that is to begin now."""
    return [pair for pair in headers if pair[0] != LAST_EVENT_ID]
