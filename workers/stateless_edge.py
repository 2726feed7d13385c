"""Clients of protocol 2026-07-28 on servers whose sessions are pooled (affinity `principal` and `none`).

What they ask is said in the words of the handshake era (`bridge.py`), on a session that Leasehold initialized, and
takes the same way as a request of an older client (`Ask`); the answer is put into their words on its way back
(`bridged_answer.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Final, cast

import orjson

from .. import __version__
from ..pool import Message, Upstream
from ..pool.handshake import NEWEST_VERSION
from ..pool.jsonrpc import INVALID_REQUEST, RequestId
from ..pool.sse import events
from .affinity import OWNER
from .answers import JSON, Refused, outcome_body
from .asgi import Kept, Send, is_event_stream, respond, silent
from .asgi import Message as AsgiMessage
from .bridge import answer_server, discover, response_to_stateless, status_of, to_handshake, to_handshake_headers
from .bridged_answer import BridgedAnswer
from .door import method_not_allowed
from .envelope import DISCOVER, check, check_notification
from .errors import BrokenOff, Disconnected, NotRun
from .identity import Caller
from .param_headers import Repeated, check_params, may_repeat, repeated_by_tool
from .request import Request

logger = logging.getLogger("leasehold.workers.stateless")

Ask = Callable[[Request, Send], Awaitable[None]]
"""Answers one message of a client of the handshake era; its scope names the client in `mcp-session-id`. Raises
`Refused`, `NotRun`, `Disconnected`, `BrokenOff`."""

REMEMBER_S: Final = 300.0
"""How long it is remembered what a server said of itself and of its tools."""
MAX_KNOWN: Final = 10_000
MAX_PAGES: Final = 100
TELL_S: Final = 1.0
"""How long telling the server something by the way, as that nobody waits any more, may take."""


class StatelessEdge:
    """Answers requests of the newer era. What servers said is remembered for each principal by itself."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    def __repr__(self) -> str:
        return f"<StatelessEdge known={len(self._known)}>"

    async def serve(self, request: Request, send: Send) -> None:
        """Answer one request. Raises what `Ask` raises, before anything was sent."""
        message, headers = request.message, request.headers
        if message is None:
            raise method_not_allowed(b"POST")
        if message.kind == "notification":
            check_notification(headers)
            await respond(send, 202, b"", [])
            return
        check(message, headers)
        call = _Call(self._ask, request, message)
        known = self._known_of(request.upstream, request.caller)
        if message.method == DISCOVER:
            await self._discover(call, known, send)
            return
        if may_repeat(message, headers):
            check_params(message, headers, await known.repeated(call))
        await known.introduce(call)
        await call.run(known, send)

    async def _discover(self, call: _Call, known: _Known, send: Send) -> None:
        answer = await call.aside("initialize", _INITIALIZE)
        result: Any = answer.get("result")
        if isinstance(result, dict):
            told = cast("dict[str, Any]", result)
            known.server_info, known.introduced_at = told.get("serverInfo"), monotonic()
            await respond(send, 200, discover(call.message, told), JSON)
            return
        made = response_to_stateless(DISCOVER, {**answer, "id": call.message.id})
        await respond(send, status_of(made), orjson.dumps(made), JSON)

    def _known_of(self, upstream: Upstream, caller: Caller) -> _Known:
        key = (upstream.name, caller.principal)
        known = self._known.setdefault(key, _Known())
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return known


_INITIALIZE: Final[dict[str, Any]] = {
    "protocolVersion": NEWEST_VERSION,
    "capabilities": {},
    "clientInfo": {"name": "leasehold", "version": __version__},
}


@dataclass(slots=True)
class _Known:
    """What a server said to one principal: who it is, and which arguments of its tools are repeated in headers."""

    server_info: Any = None
    introduced_at: float | None = None
    tools: dict[str, tuple[Repeated, ...]] = field(default_factory=dict[str, tuple[Repeated, ...]])
    listed_at: float | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def introduce(self, call: _Call) -> None:
        """Have `server_info`, if it is to be had: results say whose they are."""
        if _is_fresh(self.introduced_at):
            return
        async with self._lock:
            if not _is_fresh(self.introduced_at):
                result: Any = (await call.aside("initialize", _INITIALIZE)).get("result")
                if isinstance(result, dict):
                    self.server_info = cast("dict[str, Any]", result).get("serverInfo")
                self.introduced_at = monotonic()

    async def repeated(self, call: _Call) -> tuple[Repeated, ...]:
        """The arguments with headers of the tool that is called; the server is asked for its tools if need be.

        A list that cannot be had is none: the headers are not checked, and the call itself is the server's to judge.
        """
        if not _is_fresh(self.listed_at):
            async with self._lock:
                if not _is_fresh(self.listed_at):
                    self.tools = await _listed(call)
                    self.listed_at = monotonic()
        return self.tools.get(call.message.params["name"], ())

    def learn(self, result: Mapping[str, Any]) -> None:
        """A page of the server's tools passes by."""
        tools: Any = result.get("tools")
        if isinstance(tools, list) and self.listed_at is not None:
            for tool in cast("list[Any]", tools):
                name: Any = cast("dict[str, Any]", tool).get("name") if isinstance(tool, dict) else None
                if isinstance(name, str):
                    self.tools.pop(name, None)
            self.tools |= repeated_by_tool(tools)


class _Call:
    """One request, and what has to be asked or told around it on the way that it takes. Upstream of here it is a
    client of its own, so that its ids meet nobody else's."""

    def __init__(self, ask: Ask, request: Request, message: Message) -> None:
        self.message = message
        self._ask = ask
        self._request = request
        self._client = b"stateless-" + os.urandom(9).hex().encode()

    async def run(self, known: _Known, send: Send) -> None:
        """Ask, and answer the client. Who leaves cancels, in this era."""
        sent = to_handshake(self.message)
        asked = self._handshake_request(sent, _encoded(sent))
        on_result = known.learn if self.message.method == "tools/list" else None
        told = False

        async def sending(message: AsgiMessage) -> None:
            if OWNER in asked.scope:
                self._request.scope[OWNER] = asked.scope[OWNER]
            await send(message)

        answer = BridgedAnswer(sending, self.message, known.server_info, self._refuse, on_result)

        async def receive() -> AsgiMessage:
            nonlocal told
            event = await self._request.receive()
            if event["type"] == "http.disconnect" and not answer.answered and not told:
                told = True
                params = {"requestId": self.message.id, "reason": "the client has left"}
                await self._tell(_notification("notifications/cancelled", params))
            return event

        try:
            await self._ask(replace(asked, receive=receive), answer.send)
        except Refused as refusal:
            if not answer.begun:
                raise
            await answer.fail(str(refusal), "not_run")
        except NotRun:
            if not answer.begun:
                raise
            await answer.fail("This worker is stopping", "not_run")
        except BrokenOff as error:
            await answer.fail(f"The answer broke off: {error}", "unknown")
        else:
            await answer.fail("The server's answer ended before the response", "unknown")
        finally:
            answer.close()

    async def aside(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Ask something else on the way; the response, or one that says that there was none. Raises as `Ask`."""
        id = f"leasehold-{method}"  # noqa: A001
        payload: dict[str, Any] = {"jsonrpc": "2.0", "id": id, "method": method, "params": params}
        kept = Kept()
        asked = Message("request", method, id, payload)
        try:
            await self._ask(self._handshake_request(asked, orjson.dumps(payload)), kept.send)
        except BrokenOff:
            pass
        except Refused as refusal:
            # Whatever became of this: the client's own request has not been sent.
            if refusal.data is not None and "outcome" in refusal.data:
                refusal.data = {**refusal.data, "outcome": "not_run"}
            refusal.id = self.message.id
            raise
        return _response(kept, id)

    async def _refuse(self, request: Message) -> None:
        """Answer a request of the server."""
        body = answer_server(request)
        await self._tell(Message("response", None, request.id, orjson.loads(body)))

    async def _tell(self, message: Message) -> None:
        told = replace(self._handshake_request(message, orjson.dumps(message.payload)), receive=silent)
        try:
            async with asyncio.timeout(TELL_S):
                await self._ask(told, Kept().send)
        except (TimeoutError, Refused, NotRun, BrokenOff, Disconnected) as error:
            logger.debug("not_told upstream=%s reason=%r", told.upstream.name, str(error)[:200])

    def _handshake_request(self, message: Message, body: bytes) -> Request:
        """A request of the handshake era, by the client that this call is upstream of here."""
        headers = [pair for pair in to_handshake_headers(self._request.headers) if pair[0] != b"mcp-session-id"]
        scope = {**self._request.scope, "headers": [*headers, (b"mcp-session-id", self._client)]}
        return replace(self._request, message=message, body=body, scope=scope)


def _response(kept: Kept, id: RequestId) -> dict[str, Any]:  # noqa: A002
    """The answer to what we asked ourselves."""
    bodies = list(events(bytes(kept.body))) if is_event_stream(kept.headers) else [bytes(kept.body)]
    for body in bodies:
        try:
            found: Any = orjson.loads(body)
        except orjson.JSONDecodeError:
            continue
        if isinstance(found, dict) and "method" not in found:
            answer = cast("dict[str, Any]", found)
            if answer.get("id") == id:
                return answer
    return orjson.loads(outcome_body("The server gave no answer", "unknown", id))


async def _listed(call: _Call) -> dict[str, tuple[Repeated, ...]]:
    found: dict[str, tuple[Repeated, ...]] = {}
    params: dict[str, Any] = {}
    for _ in range(MAX_PAGES):
        result: Any = (await call.aside("tools/list", params)).get("result")
        page = cast("dict[str, Any]", result) if isinstance(result, dict) else {}
        found |= repeated_by_tool(page.get("tools"))
        cursor: Any = page.get("nextCursor")
        if not isinstance(cursor, str) or cursor == params.get("cursor"):
            break
        params = {"cursor": cursor}
    return found


def _is_fresh(at: float | None) -> bool:
    return at is not None and monotonic() - at < REMEMBER_S


def _encoded(message: Message) -> bytes:
    try:
        return orjson.dumps(message.payload)
    except TypeError:  # what may be read is nested deeper than what may be written
        raise Refused(400, "Invalid request: nested too deep", code=INVALID_REQUEST, id=message.id) from None


def _notification(method: str, params: dict[str, Any]) -> Message:
    return Message("notification", method, None, {"jsonrpc": "2.0", "method": method, "params": params})
