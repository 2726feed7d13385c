"""The edge's end of event streams: they go on for the client when their owner is lost.

A GET stream whose owner hands its session over, stops, dies or loses its lease is asked for again, after the last event
that the client got, wherever the session is by now; comments keep the client's response open meanwhile. So is the rest
of a call's answer, where the upstream has given its events ids (specification 2025-11-25, "Resumability and
Redelivery"): a GET with `Last-Event-ID` brings it, and runs nothing. What the upstream itself has ended stays ended.

A stream is passed on in whole events, so that it can be gone on with by another one's bytes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final, Literal

from ..pool.calls import SENDABLE
from ..pool.link import Headers
from ..pool.sse import EventCutter, Piece, event_id
from .affinity import Affinity, Call
from .answers import Refused
from .asgi import Message, Receive, Send, header, is_event_stream, until_disconnect
from .errors import BrokenOff
from .event_log import BEGINS_AFTER, LAST_EVENT_ID, without_id
from .guard import Guard

logger = logging.getLogger("leasehold.workers.reattach")

PATIENCE_S: Final = 5.0
"""A stream is given up when, for a lease and so long, nobody could go on with it."""
BACKOFF_S: Final = (0.02, 1.0)
SPREAD_S: Final = 0.001
"""So much longer a stream may wait for each other one that is lost now: an owner may leave thousands, and each costs a
look-up or an adoption."""
STEADY_S: Final = 1.0
"""A stream that went on for so long is no sequel to what was before."""
MAX_HELD: Final = 1024 * 1024
"""Bytes of an event that is not complete which are held back; a larger one passes in pieces, and if it is torn, its
stream has ended."""
TRY_AGAIN: Final = frozenset({409, 429, 500, 502, 503, 504})
"""Statuses after which another attempt may go well: 409 is the stream of an owner that is not quite gone."""

What = Literal["listening", "answer"]


class Streams:
    """Dispatches the calls of one edge."""

    def __init__(self, affinity: Affinity, reattached: Callable[[What], None], *, lease_ttl_s: float) -> None:
        """`reattached` is called for each stream that goes on elsewhere."""
        self._affinity = affinity
        self._reattached = reattached
        self._patience_s = lease_ttl_s + PATIENCE_S
        self._lost = 0

    async def dispatch(
        self, call: Call, receive: Receive, guard: Guard, *, call_timeout_s: float | None = None
    ) -> None:
        """`Affinity.dispatch`, but that streams go on; an answer for as long as it is not silent for longer than a call
        may be."""
        if call.scope["method"] == "GET":
            await self._listen(call, receive, guard)
            return
        try:
            await self._affinity.dispatch(call, receive, guard)
        except BrokenOff:
            # What a shared session's upstream gives ids to are messages of all its clients.
            is_own = call.opens is None and guard.is_resumable and SENDABLE.fullmatch(guard.last_event_id)
            if not is_own or not await self._resume(call, receive, guard, call_timeout_s):
                raise

    async def _listen(self, call: Call, receive: Receive, guard: Guard) -> None:
        tape = _Tape(guard.send, header(call.scope["headers"], LAST_EVENT_ID) or b"")
        try:
            await self._affinity.dispatch(call, receive, Guard(tape.send, None))
        except BrokenOff:
            if not tape.is_open:
                raise
            await self._go_on(call, receive, tape, "listening")
        if tape.is_open:
            await guard.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _resume(self, call: Call, receive: Receive, guard: Guard, call_timeout_s: float | None) -> bool:
        """Bring the rest of an answer; false if it could not be had."""
        headers = [
            pair for pair in call.scope["headers"] if pair[0] not in (b"accept", b"content-type", b"content-length")
        ]
        asking = replace(
            call,
            scope={**call.scope, "method": "GET", "headers": [(b"accept", b"text/event-stream"), *headers]},
            message=None,
            body=b"",
            safe=True,
        )
        with suppress(TimeoutError, _Done):
            async with asyncio.timeout(call_timeout_s) as silence:

                async def send(message: Message) -> None:
                    if call_timeout_s is not None:
                        silence.reschedule(asyncio.get_running_loop().time() + call_timeout_s)
                    await guard.send(message)

                tape = _Tape(send, guard.last_event_id, is_open=True, is_done=lambda: guard.is_answered)
                await self._go_on(asking, receive, tape, "answer")
        if guard.is_answered:
            await guard.send({"type": "http.response.body", "body": b"", "more_body": False})
        return guard.is_answered

    async def _go_on(self, call: Call, receive: Receive, tape: _Tape, what: What) -> None:
        """Ask for a stream again and again; returns when it has ended, or nobody goes on with it."""
        loop = asyncio.get_running_loop()
        lost_at = loop.time()
        delay, longest = BACKOFF_S
        while tape.can_go_on:
            await self._pause(delay, receive)
            tape.begin_anew(lambda: self._reattached(what))
            has_ended = False
            try:
                await self._affinity.dispatch(_after(call, tape.last_id), receive, Guard(tape.send, None))
                has_ended = tape.goes_on  # by the upstream's doing
            except Refused as refusal:
                tape.status = refusal.status
            except BrokenOff:
                pass
            if has_ended and what == "listening":
                return
            if tape.lived_s > STEADY_S:
                lost_at, delay = loop.time(), BACKOFF_S[0]
            elif not (tape.goes_on or tape.status in TRY_AGAIN or not tape.status):
                return
            elif loop.time() - lost_at > self._patience_s:
                logger.info("stream_given_up session=%s what=%s status=%d", call.key[:8], what, tape.status)
                return
            delay = min(longest, delay * 2)

    async def _pause(self, delay_s: float, receive: Receive) -> None:
        self._lost += 1
        try:
            with until_disconnect(receive):
                spread_s = random.uniform(0, self._lost * SPREAD_S)  # noqa: S311
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0) + spread_s)  # noqa: S311
        finally:
            self._lost -= 1


class _Done(Exception):
    """Raised to end a stream that has brought what it was asked for."""


class _Tape:
    """What of an event stream has reached the client, and the next part of it."""

    def __init__(
        self, send: Send, last_id: bytes, *, is_open: bool = False, is_done: Callable[[], bool] | None = None
    ) -> None:
        """`is_open`: the client has a part of the stream already. `is_done`: whether it has its last event."""
        self._send = send
        self.last_id = last_id
        self.is_open = is_open
        self.can_go_on = True
        """False in the middle of an event."""
        self.status = 0
        """Of the answer that should go on with the stream; 0: none."""
        self.goes_on = False
        """Whether it does."""
        self._is_done = is_done
        self._cutter = EventCutter(MAX_HELD)
        self._on_going_on: Callable[[], None] = lambda: None
        self._began_at = 0.0

    @property
    def lived_s(self) -> float:
        """For how long the last part has gone on."""
        return asyncio.get_running_loop().time() - self._began_at if self.goes_on else 0.0

    def begin_anew(self, on_going_on: Callable[[], None]) -> None:
        """The next part comes; what was not complete of the one before comes again."""
        self._cutter = EventCutter(MAX_HELD)
        self.status, self.goes_on = 0, False
        self._on_going_on = on_going_on

    async def send(self, message: Message) -> None:
        """ASGI `send`, of any number of answers one after the other; that the stream is over is not passed on."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif not self.is_open:
            await self._send(message)
        elif self.goes_on:
            pieces = [self._pass(piece) for piece in self._cutter.feed(message.get("body", b""))]
            # Where there is a last event, one at a time: what comes after it is not sent.
            for said in pieces if self._is_done is not None else [b"".join(pieces)]:
                if said:
                    await self._send({"type": "http.response.body", "body": said, "more_body": True})
                if self._is_done is not None and self._is_done():
                    raise _Done

    async def _begin(self, message: Message) -> None:
        self.status = message["status"]
        headers: Headers = message.get("headers", [])
        is_stream = self.status == 200 and is_event_stream(headers)
        if is_stream:
            self.goes_on = True
            self._began_at = asyncio.get_running_loop().time()
            self._on_going_on()
            self.last_id = header(headers, BEGINS_AFTER) or self.last_id
        if not self.is_open:
            self.is_open = is_stream
            headers = [pair for pair in headers if pair[0] != BEGINS_AFTER]
            await self._send({**message, "headers": headers})

    def _pass(self, piece: Piece) -> bytes:
        named = event_id(piece.data)
        if named is not None:
            self.last_id = named if SENDABLE.fullmatch(named) else b""
        self.can_go_on = piece.ends
        return piece.data


def _after(call: Call, last_id: bytes) -> Call:
    """The same request, for what came after an event."""
    headers = without_id(call.scope["headers"])
    if last_id:
        headers = [*headers, (LAST_EVENT_ID, last_id)]
    return replace(call, scope={**call.scope, "headers": headers})
