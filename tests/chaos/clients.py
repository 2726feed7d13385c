"""The clients: raw JSON-RPC over HTTP, every request a connection of its own to the next worker, every attempt an id of
its own, and everything noted."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Protocol

import aiohttp
import orjson
from chaos.history import SHARED, Call, History, Told
from leasehold.pool.sse import events

VERSION: Final = "2025-11-25"
HEADERS: Final = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
KEPT: Final = 65536
"""An answer above this is counted rather than kept."""
GIVE_UP_S: Final = 5.0
"""Beyond its deadline, and the time that its worker was stopped, a call is not waited for."""
LEAVES: Final = 0.02
"""How often a client ends its session after a call: new workers get sessions of their own by that."""
PAUSE_S: Final = (0.05, 0.25)
"""What the tool `pause` takes."""


class Target(Protocol):
    """A worker: `url` is empty while it takes no calls."""

    name: str
    url: str


@dataclass
class Balancer:
    """Gives every request to the next worker; only a refused connection is tried again, on the one after it."""

    workers: Sequence[Target]
    http: aiohttp.ClientSession
    history: History
    patience_s: float
    """A call's deadline."""
    longest_pause_s: float
    turn: int = 0
    ids: int = 0
    in_flight: int = 0

    async def send(
        self, call: Call, server: str, body: bytes, headers: dict[str, str], via: Target | None = None
    ) -> tuple[int, bytes, str] | None:
        """Status, body and session id of the answer; None when there was none, and the call says why. `via`: this
        worker and no other."""
        self.history.calls.append(call)
        self.in_flight += 1
        try:
            return await self._send(call, server, body, headers, [via] if via else self._in_turn())
        finally:
            self.in_flight -= 1

    def _in_turn(self) -> list[Target]:
        start, self.turn = self.turn % len(self.workers), self.turn + 1
        return [*self.workers[start:], *self.workers[:start]]

    async def delete(self, server: str, headers: dict[str, str]) -> None:
        """End a session, if whoever is next takes that."""
        worker = self._in_turn()[0]
        limit = aiohttp.ClientTimeout(total=self.patience_s + self.longest_pause_s)
        self.in_flight += 1
        try:
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                url = f"{worker.url}/servers/{server}/mcp"
                async with self.http.delete(url, headers=headers, timeout=limit) as response:
                    await response.read()
        finally:
            self.in_flight -= 1

    async def _send(
        self, call: Call, server: str, body: bytes, headers: dict[str, str], workers: Sequence[Target]
    ) -> tuple[int, bytes, str] | None:
        limit = aiohttp.ClientTimeout(total=call.deadline - call.sent + self.longest_pause_s + GIVE_UP_S)
        for worker in workers:
            if not worker.url:
                continue
            call.edge = worker.name
            url = f"{worker.url}/servers/{server}/mcp"
            try:
                async with self.http.post(url, data=body, headers=headers, timeout=limit) as response:
                    return response.status, await _read(response), response.headers.get("mcp-session-id", "")
            except aiohttp.ClientConnectorError:
                continue  # nothing was sent
            except TimeoutError:
                return None  # it has no outcome
            except (aiohttp.ClientError, OSError) as error:
                call.outcome, call.detail = "lost", type(error).__name__
                return None
        call.edge, call.outcome, call.detail = "", "not_run", "every worker refuses connections"
        return None

    def call(self, client: Client, method: str, *, counts: bool, safe: bool, patience_s: float | None = None) -> Call:
        self.ids += 1
        now = monotonic()
        return Call(
            id=f"{client.name}-{self.ids}",
            client=client.name,
            principal=client.principal,
            home=client.home,
            edge="",
            method=method,
            counts=counts,
            safe=safe,
            sent=now,
            deadline=now + (patience_s or self.patience_s),
        )


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body; of a large one its head and its end, which still make an answer."""
    head, tail, size = b"", b"", 0
    async for piece in response.content.iter_chunked(KEPT):
        size += len(piece)
        if size <= KEPT:
            head += piece
        else:
            tail = (tail + piece)[-64:]
    if size <= KEPT:
        return head
    begun, quote, _ = head.partition(b'"text":"')
    ended = re.search(rb'x("\}.*)$', tail)
    return begun + quote + b"%d" % size + ended.group(1) if quote and ended else b""


def judge(call: Call, status: int, body: bytes) -> None:
    """Note what an answer says became of the call."""
    message: dict[str, Any] = {}
    for data in events(body) if not body.startswith(b"{") else [body]:
        with suppress(orjson.JSONDecodeError):
            found = orjson.loads(data)
            message = found if isinstance(found, dict) and "method" not in found else message
    call.rpc_id = message.get("id")
    error = message.get("error") or {}
    said = (error.get("data") or {}).get("outcome")
    call.detail = f"{status} {error.get('message', '')}".rstrip()
    result = message.get("result")
    if status == 200 and result is not None:
        call.outcome = "ok"
        if "structuredContent" in result:
            call.told = Told(**result["structuredContent"])
        elif "contents" in result:
            call.told = Told(**result["contents"])
    elif status == 404:
        call.outcome = "gone"
    elif said in ("not_run", "unknown"):
        call.outcome = said
    elif status == 200 and not message:
        call.outcome = "unknown"  # a stream may end before the answer
    else:
        call.outcome, call.detail = "error", f"{status} {body[:200]!r}"


@dataclass
class Client:
    """One MCP client. It makes calls one after the other in each of its lanes; told that its session is gone, it
    initializes again."""

    name: str
    server: str
    principal: str
    balancer: Balancer
    rng: random.Random
    lanes: int = 1
    think_s: tuple[float, float] = (0.02, 0.12)
    session_id: str = ""
    homes: int = 0
    going: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared, its lanes rest."""
    stopping: bool = False
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def home(self) -> str:
        return f"{SHARED}{self.principal}" if self.server == "shared" else f"{self.name}/{self.homes}"

    async def run(self) -> None:
        """Call until `stopping`."""
        async with asyncio.TaskGroup() as lanes:
            for _ in range(self.lanes):
                lanes.create_task(self._lane())

    async def _lane(self) -> None:
        while not self.stopping:
            await self.step(self.rng.choices(["count", "pause", "peek", "read", "events"], [10, 3, 2, 1, 3])[0])
            await asyncio.sleep(self.rng.uniform(*self.think_s))
            await self.going.wait()
            if self.lanes == 1 and self.server == "own" and self.rng.random() < LEAVES:
                await self.leave()

    async def step(
        self, what: str, *, via: Target | None = None, patience_s: float | None = None, **arguments: Any
    ) -> Call | None:
        """One call, on a session that is opened first where there is none; None when it could not be opened."""
        if not self.session_id and not await self.open(patience_s):
            await asyncio.sleep(0.05)
            return None
        call = await self._call(what, arguments, via, patience_s)
        if call.outcome == "not_run":
            await asyncio.sleep(0.05)
        return call

    async def open(self, patience_s: float | None = None) -> bool:
        """Initialize, unless another lane did meanwhile."""
        async with self._opening:
            if self.session_id:
                return True
            self.homes += 1
            call = self.balancer.call(self, "initialize", counts=False, safe=False, patience_s=patience_s)
            params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": self.name, "version": "1"}}
            self.session_id = await self._send(call, "initialize", params) or ""
            return call.outcome == "ok"

    async def leave(self) -> None:
        """End the session; the next call opens another one, wherever it lands."""
        async with self._opening:
            headers, self.session_id = self._headers(), ""
            self.balancer.history.closed[self.home] = monotonic()
            await self.balancer.delete(self.server, headers)

    def _headers(self) -> dict[str, str]:
        headers = {**HEADERS, "authorization": self.principal}
        if self.session_id:
            headers |= {"mcp-session-id": self.session_id, "mcp-protocol-version": VERSION}
        return headers

    async def _call(self, what: str, arguments: dict[str, Any], via: Target | None, patience_s: float | None) -> Call:
        safe = what in ("peek", "read")
        call = self.balancer.call(self, what, counts=not safe, safe=safe, patience_s=patience_s)
        session_id = self.session_id
        if what == "read":
            await self._send(call, "resources/read", {"uri": f"counter://{call.id}"}, via)
        else:
            given = {"tag": call.id, **arguments}
            if what == "pause":
                given["seconds"] = given.get("seconds", self.rng.uniform(*PAUSE_S))
            if what == "events":
                given["events"] = True
            await self._send(call, "tools/call", {"name": what, "arguments": given}, via)
        if call.outcome == "gone" and self.session_id == session_id:
            self.session_id = ""
        return call

    async def _send(self, call: Call, method: str, params: dict[str, Any], via: Target | None = None) -> str:
        """Send one request and note its outcome; the session id of the answer."""
        body = orjson.dumps({"jsonrpc": "2.0", "id": call.id, "method": method, "params": params})
        answer = await self.balancer.send(call, self.server, body, self._headers(), via)
        if answer is not None:
            judge(call, answer[0], answer[1])
        if call.outcome is not None:
            call.ended = monotonic()
        return answer[2] if answer is not None and call.outcome == "ok" else ""


def mixed_clients(count: int, balancer: Balancer, seed: int, *, principals: int = 3) -> list[Client]:
    """Every fifth has a session that it shares with all others of its principal; the rest have their own. Every third
    makes two calls at a time."""
    return [
        Client(
            name=f"c{number}",
            server="shared" if number % 5 == 4 else "own",
            principal=f"Bearer principal-{number % principals}",
            balancer=balancer,
            rng=random.Random(f"{seed}/{number}"),
            lanes=2 if number % 3 == 2 else 1,
        )
        for number in range(count)
    ]
