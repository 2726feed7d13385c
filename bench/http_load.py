"""Load from a client that costs almost nothing: raw keep-alive HTTP/1.1, requests encoded beforehand.

One request is in flight per connection. Commands:

    open  url, count                                -> session ids
    run   targets [[url, ids]], in_flight, seconds  -> calls, failed, seconds, latencies_us
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvloop
from child import obey

VERSION = "2025-11-25"
HEADERS = {
    "accept": "application/json, text/event-stream",
    "content-type": "application/json",
    "mcp-protocol-version": VERSION,
    "user-agent": "bench",
}
INITIALIZE = {
    "protocolVersion": VERSION,
    "capabilities": {},
    "clientInfo": {"name": "bench", "version": "1"},
}


def open_sessions(url: str, count: int) -> list[str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    sessions: list[str] = []
    try:
        for _ in range(count):
            body = orjson.dumps({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": INITIALIZE})
            connection.request("POST", parts.path, body, HEADERS)
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(f"initialize: {response.status} {answer[:200]!r}")
            sessions.append(response.headers["mcp-session-id"])
            body = orjson.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"})
            connection.request("POST", parts.path, body, {**HEADERS, "mcp-session-id": sessions[-1]})
            connection.getresponse().read()
    finally:
        connection.close()
    return sessions


def encode_call(url: str, session: str, request_id: int) -> bytes:
    parts = urlsplit(url)
    arguments = {"name": "count", "arguments": {"text": "y" * 60}}
    body = orjson.dumps({"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": arguments})
    headers = {**HEADERS, "host": parts.netloc, "mcp-session-id": session, "content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {parts.path} HTTP/1.1\r\n{lines}\r\n".encode() + body


class Slot(asyncio.Protocol):
    """One connection that calls one session after the other until its time is over."""

    def __init__(self, requests: list[bytes], until: float, latencies: list[int]) -> None:
        self._requests = itertools.cycle(requests)
        self._until = until
        self._latencies = latencies
        self._buffer = b""
        self.failed = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._call()

    def _call(self) -> None:
        self._began = perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        complete = is_complete(self._buffer)
        if complete is None:
            return
        now = perf_counter()
        self._latencies.append(int((now - self._began) * 1e6))
        self.failed += not complete
        self._buffer = b""
        if now < self._until:
            self._call()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if perf_counter() < self._until:
            self.failed += 1
        if not self.done.done():
            self.done.set_result(None)


def is_complete(answer: bytes) -> bool | None:
    """None until a response is there to its end; then whether it is a result."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return None
    at = answer.find(b"content-length:", 0, end)
    if at >= 0:
        if len(answer) < end + 4 + int(answer[at + 15 : answer.find(b"\r\n", at)]):
            return None
    elif not answer.endswith(b"\r\n0\r\n\r\n"):
        return None
    return answer.startswith(b"HTTP/1.1 200") and answer.find(b'"result"', end) >= 0


async def run(targets: list[tuple[str, list[str]]], in_flight: int, seconds: float) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    latencies: list[int] = []
    slots: list[Slot] = []
    began = perf_counter()
    for number in range(in_flight):
        url, sessions = targets[number % len(targets)]
        start = number // len(targets) % len(sessions)
        requests = [encode_call(url, session, number + 1) for session in sessions[start:] + sessions[:start]]
        parts = urlsplit(url)
        slot = Slot(requests, began + seconds, latencies)
        slots.append(slot)
        await loop.create_connection(lambda slot=slot: slot, parts.hostname, parts.port)
    await asyncio.gather(*(slot.done for slot in slots))
    return {
        "calls": len(latencies),
        "failed": sum(slot.failed for slot in slots),
        "seconds": perf_counter() - began,
        "latencies_us": latencies,
    }


async def do(command: dict[str, Any]) -> Any:
    if command.pop("do") == "open":
        return open_sessions(**command)
    return await run(**command)


if __name__ == "__main__":
    uvloop.run(obey(do))
