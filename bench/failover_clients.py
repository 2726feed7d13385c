"""Clients of the failover bench: one raw connection for each request, as behind a balancer that tries the next worker
only where a connection was refused."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import orjson
from http_load import HEADERS, INITIALIZE

Outcome = Literal["ok", "not_run", "unknown", "gone", "error", "connection"]
"""`connection`: the connection broke after the request had been sent; the balancer and its client cannot know more."""

ANSWER_LIMIT_S = 30.0


class Worker(Protocol):
    @property
    def url(self) -> str:
        """Where it listens; "" while it is down."""
        ...


class Exchange(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._buffer = b""
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        at = self._buffer.find(b"content-length:", 0, end)
        if end < 0 or (at >= 0 and len(self._buffer) < end + 4 + int(self._buffer[at + 15 :].split(b"\r", 1)[0])):
            return
        if at < 0 and not self._buffer.endswith(b"\r\n0\r\n\r\n"):
            return
        if not self.answer.done():
            self.answer.set_result(self._buffer)
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionResetError("before the answer"))


@dataclass
class Balancer:
    """Sends each request to the next worker."""

    workers: Sequence[Worker]
    server: str
    turn: itertools.count[int] = field(default_factory=itertools.count)

    async def ask(self, message: dict[str, Any], session: str = "", only: Worker | None = None) -> tuple[int, bytes]:
        """Status and the whole answer. Raises `ConnectionRefusedError` when nobody takes it, `ConnectionError` when its
        connection broke, and `TimeoutError`."""
        count = len(self.workers)
        start = next(self.turn)
        turns = [only] if only else [self.workers[(start + offset) % count] for offset in range(count)]
        for worker in turns:
            if not worker.url:
                continue
            parts = urlsplit(worker.url)
            request = encode(f"/servers/{self.server}/mcp", parts.netloc, session, message)
            try:
                _, exchange = await asyncio.get_running_loop().create_connection(
                    lambda request=request: Exchange(request), parts.hostname, parts.port
                )
            except ConnectionRefusedError:
                continue
            answer = await asyncio.wait_for(exchange.answer, ANSWER_LIMIT_S)
            return int(answer[9:12]), answer
        raise ConnectionRefusedError("nobody takes it")

    async def open(self, only: Worker | None = None) -> Session:
        """Initialize a session, at one worker if that is named."""
        status, answer = await self.ask(
            {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": INITIALIZE}, only=only
        )
        if status != 200:
            raise RuntimeError(f"initialize: {answer[:300]!r}")
        return Session(self, header(answer, b"mcp-session-id"), header(answer, b"leasehold-owner"))


@dataclass
class Session:
    """One client's session. `good` are the times at which calls were sent and answered well."""

    balancer: Balancer
    id: str
    owner: str
    """The worker that opened it, where the workers tell."""
    good: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    calls: int = 0
    is_waiting: bool = False
    """Whether it waits for an answer."""

    async def call(self) -> Outcome:
        self.is_waiting = True
        try:
            return await self._call()
        finally:
            self.is_waiting = False

    async def _call(self) -> Outcome:
        self.calls += 1
        sent = perf_counter()
        arguments = {"name": "count", "arguments": {"text": "y" * 60}}
        message = {"jsonrpc": "2.0", "id": self.calls, "method": "tools/call", "params": arguments}
        try:
            status, answer = await self.balancer.ask(message, self.id)
        except ConnectionRefusedError:
            return "not_run"
        except ConnectionError:
            return "connection"
        outcome = judge(status, answer)
        if outcome == "ok":
            self.good.append((sent, perf_counter()))
        return outcome

    async def calls_until(self, over: Callable[[], bool], note: Callable[[Outcome], None], think_s: float) -> None:
        """Call, one after the other."""
        while not over():
            outcome = await self.call()
            note(outcome)
            await asyncio.sleep(0.02 if outcome == "not_run" else think_s * random.uniform(0.5, 1.5))

    def first_good_after(self, moment: float) -> float | None:
        """Seconds from `moment` to the first good answer to a call that was sent after it."""
        return next((answered - moment for sent, answered in self.good if sent >= moment), None)


def judge(status: int, answer: bytes) -> Outcome:
    if status == 404:
        return "gone"
    if status == 200 and b'"result"' in answer:
        return "ok"
    for outcome in ("not_run", "unknown"):
        if b'"outcome":"%b"' % outcome.encode() in answer:
            return outcome
    return "error"


def encode(path: str, host: str, session: str, message: dict[str, Any]) -> bytes:
    body = orjson.dumps(message)
    headers = {**HEADERS, "host": host, "content-length": str(len(body))}
    if session:
        headers["mcp-session-id"] = session
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def header(answer: bytes, name: bytes) -> str:
    head = answer.partition(b"\r\n\r\n")[0]
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip().decode()
    return ""
