"""One holder of a session that the fleet shares: his way to it, and the faces it has for him."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, cast

from mcp import ClientSession

from ..pool import Message, OpenFailed, PoolTimeout, SessionClosed, SessionReleased, Upstream, UpstreamLost
from ..pool.calls import call
from ..pool.dispatcher import LinkDispatcher
from ..pool.handshake import initialize_params
from ..pool.hosted import HostedClient
from ..pool.link import Headers, Reply
from ..pool.typed import Callbacks, capabilities
from .affinity import Affinity, Call, is_safe
from .answers import Refused
from .asgi import Message as AsgiMessage
from .errors import BrokenOff, Disconnected
from .guard import Guard
from .owned import Opens
from .shared import CALLBACKS

MAX_BEHIND: Final = 16
"""Pieces of an answer that may wait for their reader."""


class FleetWire:
    """One holder's way to a shared session, wherever its owner runs: each call is an exchange of its own."""

    def __init__(
        self, affinity: Affinity, upstream: Upstream, key: str, principal: str, headers: Callable[[], Headers]
    ) -> None:
        self._affinity = affinity
        self._upstream = upstream
        self._key = key
        self._principal = principal
        self._headers = headers
        self.initialize_result: dict[str, Any] = {}
        """What the server said when the session was opened; for the raw face."""
        self._ids = itertools.count(1)
        self._params: dict[str, Any] = {}
        # Names this holder to the owner, who keeps the ids of all holders apart.
        self._client = (b"mcp-session-id", os.urandom(12).hex().encode())
        self._calls: set[asyncio.Task[None]] = set()
        self.callbacks = b""
        """What this holder can be asked for."""
        self.is_closed = False

    def __repr__(self) -> str:
        return f"<FleetWire {self._upstream.name} session={self._key[:8]} calls={len(self._calls)}>"

    def next_id(self) -> int:
        """Of requests of this holder."""
        return next(self._ids)

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """See `Link.post`. A session that has ended is told of once; the call after that opens another."""
        if message.method == "initialize":
            self._params = message.params
        reply = await self._send("POST", message, body, headers)
        if reply.status == 404:
            await reply.chunks.aclose()
            raise SessionClosed("the upstream has ended the session; the next call begins another")
        return reply

    async def get(self, headers: Headers) -> Reply:
        """See `Link.get`."""
        return await self._send("GET", None, b"", [*headers, (CALLBACKS, self.callbacks)])

    async def aclose(self) -> None:
        """End the calls that are under way."""
        self.is_closed = True
        calls = list(self._calls)
        for each in calls:
            each.cancel()
        if calls:
            await asyncio.wait(calls)

    async def _send(self, method: str, message: Message | None, body: bytes, headers: Headers) -> Reply:
        if self.is_closed:
            raise SessionReleased("this session was given back")
        own = self._headers()
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": f"/servers/{self._upstream.name}/mcp",
            "query_string": b"",
            "headers": [*headers, *own, self._client],
            "client": None,
        }
        opens = Opens(self._upstream, self._principal, self._params, own)
        safe = is_safe(message, self._upstream.idempotent_tools) or (
            message is not None and message.method == "initialize"
        )
        call = Call(self._key, scope, message, body, safe, opens)
        answer = _Answer()
        task = asyncio.get_running_loop().create_task(self._dispatch(call, answer), name="leasehold-fleet-call")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(answer.done)
        try:
            status, received = await answer.begun
        except BaseException:
            answer.leave()
            raise
        chunks = answer.chunks()
        await anext(chunks)
        return Reply(status, received, chunks)

    async def _dispatch(self, call: Call, answer: _Answer) -> None:
        guard = Guard(answer.send, call.message if call.id is not None else None)
        try:
            await self._affinity.dispatch(call, answer.receive, guard)
        except Refused as refusal:
            refusal.id = refusal.id if refusal.id is not None else call.id
            await refusal.send(guard.send)


class _Answer:
    """The other end of one ASGI call: what it sends is read as a `Reply`."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[tuple[int, Headers]] = asyncio.get_running_loop().create_future()
        self._pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(MAX_BEHIND)
        self._left = asyncio.Event()

    async def receive(self) -> AsgiMessage:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: AsgiMessage) -> None:
        if self._left.is_set():
            raise Disconnected
        if message["type"] == "http.response.start":
            if not self.begun.done():
                self.begun.set_result((message["status"], list(message.get("headers", ()))))
            return
        if message.get("body"):
            await self._pieces.put(message["body"])
        if not message.get("more_body", False):
            await self._pieces.put(None)

    def leave(self) -> None:
        """Nobody reads any more: what still comes is not waited for."""
        self._left.set()
        while not self._pieces.empty():
            self._pieces.get_nowait()

    def done(self, task: asyncio.Task[None]) -> None:
        """The call has ended; without an answer, or in the middle of one, that is an error."""
        error = None if task.cancelled() else task.exception()
        lost: Exception = UpstreamLost(
            f"the call broke off: {error}" if isinstance(error, BrokenOff) else "the call broke off"
        )
        if isinstance(error, Exception) and not isinstance(error, BrokenOff | Disconnected):
            lost = error
        if not self.begun.done():
            self.begun.set_exception(lost)
            self.begun.exception()  # retrieved: who asked may have left
        elif not self._left.is_set() and (error is not None or task.cancelled()):
            if self._pieces.full():
                self._pieces.get_nowait()  # what is lost with it is told by the error
            self._pieces.put_nowait(lost)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, after one empty piece."""
        try:
            yield b""
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.leave()


class FleetSession:
    """`async with`: one holder's `ClientSession` of a shared session."""

    def __init__(self, wire: FleetWire, callbacks: Callbacks, timeout_s: float) -> None:
        self._wire = wire
        self._callbacks = callbacks
        self._timeout_s = timeout_s
        self._dispatcher = LinkDispatcher(wire, tells_outcomes=True)
        self._hosted: HostedClient | None = None

    async def __aenter__(self) -> ClientSession:
        callbacks = self._callbacks
        client = ClientSession(
            dispatcher=self._dispatcher,
            sampling_callback=callbacks.sampling,
            elicitation_callback=callbacks.elicitation,
            list_roots_callback=callbacks.list_roots,
            logging_callback=callbacks.logging,
            message_handler=callbacks.message_handler,
        )
        self._hosted = HostedClient(client)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._hosted.wait_ready()
                await client.initialize()
        except TimeoutError:
            await self._aclose()
            raise PoolTimeout(f"no session within {self._timeout_s:g} s") from None
        except BaseException:
            await self._aclose()
            raise
        self._wire.callbacks = ",".join(capabilities(callbacks)).encode()
        if callbacks.listens:
            self._dispatcher.listen()
        return client

    async def __aexit__(self, *_exc: object) -> None:
        await self._aclose()

    async def _aclose(self) -> None:
        assert self._hosted is not None
        try:
            await self._dispatcher.settle()
            await self._hosted.aclose()
        finally:
            await self._wire.aclose()


class FleetLink:
    """`async with`: one holder's raw face of a shared session."""

    def __init__(self, wire: FleetWire, timeout_s: float) -> None:
        self._wire = wire
        self._timeout_s = timeout_s

    async def __aenter__(self) -> FleetWire:
        wire = self._wire
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await call(wire, "initialize", initialize_params(), id=wire.next_id())
        except TimeoutError:
            await wire.aclose()
            raise PoolTimeout(f"no session within {self._timeout_s:g} s") from None
        except BaseException:
            await wire.aclose()
            raise
        result: Any = answer.payload.get("result")
        if not isinstance(result, dict):
            await wire.aclose()
            error: Any = answer.payload.get("error")
            raise OpenFailed(
                str(cast("dict[str, Any]", error).get("message")) if isinstance(error, dict) else "no result"
            )
        wire.initialize_result = cast("dict[str, Any]", result)
        return wire

    async def __aexit__(self, *_exc: object) -> None:
        await self._wire.aclose()
