"""The answer of a server of the handshake era on its way to a client of the newer one.

A response that comes first is answered as JSON, with the HTTP status that its code has in the newer era; once there is
something to say before it, or it takes long, it comes on an event stream. Event ids stay here: no stream of the newer
era is resumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import orjson

from ..pool import InvalidMessage, Message, parse
from ..pool.calls import LAST_EVENT_S, MAX_ANSWER
from ..pool.errors import Outcome
from ..pool.sse import STREAM_HEADERS, EventSplitter, event
from .answers import JSON, outcome_body
from .asgi import Headers, Send, is_event_stream
from .asgi import Message as AsgiMessage
from .bridge import passing, response_to_stateless, status_of

COMMIT_AFTER_S: Final = 15.0
"""A stream begins after this time in any case, so that the comments on it can keep the connection open."""

_OWN_HEADERS: Final = frozenset({b"content-length", b"content-type", b"content-encoding"})


class BridgedAnswer:
    """Wraps the `send` of one request."""

    def __init__(
        self,
        send: Send,
        request: Message,
        server_info: Any,
        refuse: Callable[[Message], Awaitable[None]],
        on_result: Callable[[dict[str, Any]], None] | None = None,
        *,
        commit_after_s: float = COMMIT_AFTER_S,
    ) -> None:
        """`refuse` answers a request of the server; `on_result` sees the result."""
        self._send = send
        self._request = request
        self._server_info = server_info
        self._refuse = refuse
        self._on_result = on_result
        self._passes = passing(request)
        self._lock = asyncio.Lock()
        self._status = 0
        self._headers: Headers = []
        self._events: EventSplitter | None = None
        self._body = bytearray()
        self._is_stream = False
        self._is_over = False
        self.begun = False
        """Whether the client has got a status."""
        self.answered = False
        """Whether it has got, or is getting, the response."""
        self._task: asyncio.Task[None] | None = None
        self._timer = self._later(commit_after_s, self._begin_stream)

    def __repr__(self) -> str:
        return f"<BridgedAnswer begun={self.begun} answered={self.answered}>"

    def close(self) -> None:
        """Nothing is sent by itself any more."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    async def send(self, message: AsgiMessage) -> None:
        """ASGI `send` for the server's answer."""
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], message.get("headers", [])
            if 200 <= self._status < 300 and is_event_stream(self._headers):
                self._events = EventSplitter(MAX_ANSWER)
            return
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        if self._events is None:
            self._body += body
            if is_last and not self.answered:
                await self._whole()
        else:
            for data in self._events.feed(body):
                await self._event(data)
        if is_last and self.answered:
            await self._end()

    async def fail(self, text: str, outcome: Outcome) -> None:
        """The answer is over: if the response is not among it, say so instead."""
        if not self.answered:
            await self._respond(orjson.loads(outcome_body(text, outcome, self._request.id)), 200)
        if self._task is not None:
            await asyncio.wait({self._task})  # it may be about to say the last word
        await self._end()

    # -- what the server said --------------------------------------------------------------------------------------

    async def _whole(self) -> None:
        body = bytes(self._body)
        try:
            found = parse(body)
        except InvalidMessage:
            found = None
        if found is not None and found.kind == "response" and found.id in (self._request.id, None):
            await self._response(found.payload)
        elif not 200 <= self._status < 300 and not self.begun:
            # Not the server's words but its door's, or ours: who may come in, and when to come back.
            self.begun = self.answered = True
            self._timer.cancel()
            length = (b"content-length", b"%d" % len(body))
            kept = [pair for pair in self._headers if pair[0] != b"content-length"]
            await self._put({"type": "http.response.start", "status": self._status, "headers": [*kept, length]})
            await self._put({"type": "http.response.body", "body": body, "more_body": True})

    async def _event(self, data: bytes) -> None:
        if self.answered:
            return
        try:
            found = parse(data)
        except InvalidMessage:
            return
        if found.kind == "response":
            if found.id == self._request.id:
                await self._response(found.payload)
        elif found.kind == "request":
            await self._refuse(found)
        elif self._passes(found.payload):
            await self._begin_stream()
            await self._put({"type": "http.response.body", "body": event(_dumped(found.payload)), "more_body": True})

    async def _response(self, payload: dict[str, Any]) -> None:
        method = self._request.method or ""
        made = response_to_stateless(method, {**payload, "id": self._request.id}, self._server_info)
        if self._on_result is not None and "result" in made:
            self._on_result(made["result"])
        await self._respond(made, self._status if not 200 <= self._status < 300 else status_of(made))

    # -- what the client gets --------------------------------------------------------------------------------------

    async def _respond(self, response: dict[str, Any], status: int) -> None:
        self._timer.cancel()
        self.answered = True
        body = _dumped(response)
        # The last word is left for the end of the server's answer, if that comes soon: a client that has its response
        # may hang up, and what is left of the answer would be read by nobody, and its connection not be used again.
        self._timer = self._later(LAST_EVENT_S, self._end)
        if self._is_stream:
            await self._put({"type": "http.response.body", "body": event(body), "more_body": True})
            return
        self.begun = True
        kept = [] if 200 <= status < 300 else [pair for pair in self._headers if pair[0] not in _OWN_HEADERS]
        headers = [*kept, *JSON, (b"content-length", b"%d" % len(body))]
        await self._put({"type": "http.response.start", "status": status, "headers": headers})
        await self._put({"type": "http.response.body", "body": body, "more_body": True})

    def _later(self, seconds: float, step: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()

        def start() -> None:
            self._task = loop.create_task(step(), name="leasehold-bridged")

        return loop.call_later(seconds, start)

    async def _begin_stream(self) -> None:
        if not self.begun:
            self._timer.cancel()
            self.begun = self._is_stream = True
            await self._put({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})

    async def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    async def _put(self, message: AsgiMessage) -> None:
        async with self._lock:  # in the order in which they were decided on
            await self._send(message)


def _dumped(payload: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(payload)
    except TypeError:  # what may be read is nested deeper than what may be written
        return outcome_body("The server's answer is nested too deep", "unknown", payload.get("id"))
