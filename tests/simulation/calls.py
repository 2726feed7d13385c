"""Clients, their sessions and their calls: each call is one ASGI request to a worker, and has one outcome."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson
from leasehold.coordinator import session_key
from leasehold.pool import HttpTarget, Message, StdioTarget, Upstream, parse
from leasehold.workers.affinity import Call, is_safe
from leasehold.workers.answers import Refused
from leasehold.workers.errors import BrokenOff, Disconnected
from leasehold.workers.guard import Guard
from leasehold.workers.identity import Caller, Identity
from leasehold.workers.owned import Opens
from leasehold.workers.request import Request

from .upstream import VERSION, Execution

if TYPE_CHECKING:
    from .process import Process
    from .world import World

CALL_TIMEOUT_S: Final = 5.0
IDLE_TTL_S: Final = 3600.0
READ: Final = "read"
"""The tool that may be called again."""


def _upstream(name: str, target: HttpTarget | StdioTarget, affinity: Any = "session") -> Upstream:
    return Upstream(
        name,
        target,
        affinity=affinity,
        call_timeout_s=CALL_TIMEOUT_S,
        idle_ttl_s=IDLE_TTL_S,
        idempotent_tools=frozenset({READ}),
    )


UPSTREAMS: Final = {
    "client": _upstream("client", HttpTarget("http://upstream.invalid/mcp")),
    "pinned": _upstream("pinned", StdioTarget("upstream")),
    "shared": _upstream("shared", HttpTarget("http://upstream.invalid/mcp"), "principal"),
}


@dataclass(eq=False)
class Client:
    """Who calls: one principal, and his session of one server."""

    name: str
    server: str
    principal: str
    identity: Identity
    session_id: str = ""

    @property
    def caller(self) -> Caller:
        return Caller(self.identity.principal(self.principal.encode()), self.principal.encode())

    @property
    def key(self) -> str:
        if self.server == "shared":
            return self.identity.shared_key(self.server, self.principal.encode())
        return session_key(self.session_id)

    @property
    def can_call(self) -> bool:
        return self.server == "shared" or bool(self.session_id)


@dataclass(eq=False)
class CallRecord:
    """One call of a client, from its request to its one outcome."""

    number: int
    client: Client
    process: Process
    safe: bool
    started: float
    ended: float | None = None
    outcome: str = ""
    """`ok`, `error`, `not_run`, `unknown`; `gone`: 404; `left`, `cut`: the client or its worker has gone."""
    detail: str = ""
    result: dict[str, Any] = field(default_factory=dict[str, Any])
    paused_s: float = 0.0
    """How long the worker that the client is connected to was paused."""
    leave: Any = None
    """Makes the client leave."""

    def __str__(self) -> str:
        return f"call {self.number} of {self.client.name} at {self.process.name}: {self.outcome} {self.detail}"


class Calls:
    """All calls of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.records: list[CallRecord] = []
        self._numbers = itertools.count(1)

    def client(self, server: str, principal: str) -> Client:
        """Somebody who calls."""
        return Client(f"{principal}@{server}{next(self._numbers)}", server, principal, self._world.identity)

    def waiting(self) -> list[CallRecord]:
        """Calls without an outcome."""
        return [call for call in self.records if call.ended is None]

    def open_session(self, client: Client, process: Process) -> CallRecord:
        """Have a client initialize a session of his own."""
        return self._begin(client, process, safe=True, work=self._open)

    def call(
        self, client: Client, process: Process, *, safe: bool = False, take: float = 0.0, fate: str = "answered"
    ) -> CallRecord:
        """Have a client call a tool: one that takes so long, and whose answer has that `fate` (see `SimLink`)."""
        tool = READ if safe else "write"

        async def work(call: CallRecord, respond: _Answer) -> None:
            arguments = {"call": call.number, "take": take, "fate": fate}
            await self._call(call, respond, {"name": tool, "arguments": arguments})

        return self._begin(client, process, safe=safe, work=work)

    def _begin(self, client: Client, process: Process, *, safe: bool, work: Callable[..., Any]) -> CallRecord:
        call = CallRecord(len(self.records), client, process, safe, self._world.now)
        self.records.append(call)
        self._world.note("call", call.number, client.name, process.name, safe)
        if not process.takes_calls:
            self.finish(call, "not_run", "connection refused")
            return call
        task = process.loop.create_task(self._answered(call, work), name=f"call-{call.number}")
        process.calls.add(task)
        task.add_done_callback(process.calls.discard)
        return call

    async def _answered(self, call: CallRecord, work: Callable[..., Any]) -> None:
        answer = _Answer()
        call.leave = answer.left.set
        cause: BaseException | None = None
        try:
            await work(call, answer)
        except Refused as refusal:
            cause = refusal.__cause__
            await refusal.send(answer.send)
        except BrokenOff as error:
            self.finish(call, "unknown", f"broke off: {error}")
            return
        except Disconnected:
            self.finish(call, "left", "")
            return
        except asyncio.CancelledError:
            self.finish(call, "cut", "its worker stopped")
            raise
        outcome, detail = answer.outcome()
        self.finish(call, outcome, f"{detail} ({cause})" if cause else detail, result=answer.result)

    async def _call(self, call: CallRecord, answer: _Answer, params: dict[str, Any]) -> None:
        client, process = call.client, call.process
        core = process.core
        assert core is not None
        upstream = UPSTREAMS[client.server]
        message, body = _request(call.number, "tools/call", params)
        headers = [(b"content-type", b"application/json"), (b"mcp-session-id", client.name.encode())]
        scope = {"type": "http", "method": "POST", "path": f"/servers/{client.server}/mcp", "headers": headers}
        opens = None
        if client.server == "shared":
            opens = Opens(upstream, client.caller.principal, _initialize(client.principal), [])
        made = Call(client.key, scope, message, body, is_safe(message, upstream.idempotent_tools), opens)
        await core.affinity.dispatch(made, answer.receive, Guard(answer.send, message))

    async def _open(self, call: CallRecord, answer: _Answer) -> None:
        client, process = call.client, call.process
        assert process.opening is not None
        message, body = _request(call.number, "initialize", _initialize(client.principal))
        scope = {"type": "http", "method": "POST", "path": f"/servers/{client.server}/mcp", "headers": []}
        upstream = UPSTREAMS[client.server]
        request = Request(upstream, client.caller, None, message, body, scope, answer.receive)
        await process.opening.open(request, message, answer.send)
        client.session_id = answer.headers.get(b"mcp-session-id", b"").decode()

    def finish(self, call: CallRecord, outcome: str, detail: str, *, result: dict[str, Any] | None = None) -> None:
        """A call has its outcome; what comes later is not heard any more."""
        if call.ended is not None or self._world.is_over:
            return
        call.ended, call.outcome, call.detail, call.result = self._world.now, outcome, detail, result or {}
        self._world.note("end", call.number, outcome, detail)
        if "call" in call.result or outcome != "ok":
            self._world.checker.ended(call)

    def executed(self, execution: Execution) -> None:
        """A call ran upstream."""
        self._world.note("ran", execution.call, execution.session)
        self._world.upstream.executions.setdefault(execution.call, []).append(execution)
        self._world.checker.executed(execution)


class _Answer:
    """The client's end of one ASGI request whose body was read."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.is_complete = False
        self.result: dict[str, Any] = {}

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "an answer began twice"
            self.status = message["status"]
            self.headers = dict(message.get("headers", ()))
        else:
            assert not self.is_complete, "an answer went on after its end"
            self.body += message.get("body", b"")
            self.is_complete = not message.get("more_body", False)

    def outcome(self) -> tuple[str, str]:
        """What the client was told, in one of the four words (or `gone`), and the words it was told in."""
        if not self.status or not self.is_complete:
            return "unknown", "no answer"
        if self.status == 404:
            return "gone", ""
        message = parse(self.body)
        if "result" in message.payload:
            self.result = message.payload["result"]
            return "ok", ""
        error: dict[str, Any] = message.payload["error"]
        return error.get("data", {}).get("outcome", "error"), f"{self.status} {error['message']}"


def _request(number: int, method: str, params: dict[str, Any]) -> tuple[Message, bytes]:
    body = orjson.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
    return parse(body), body


def _initialize(principal: str) -> dict[str, Any]:
    return {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": principal, "version": "1"}}
