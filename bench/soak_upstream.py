"""A cheap MCP server with state, an echo tool that takes its time, and two transports: what `soak.py` calls.

/mcp is streamable HTTP: sessions have ids, an unknown one gets 404, answers come as JSON and as event stream in turn.
/sse and /messages are the transport of protocol 2024-11-05: answers come on the stream of the session.

Arguments: mean delay of a call in s (uniform, from nothing to twice that), and the share of calls before whose
execution the server forgets the session (404). Says its URL on start. Each line of input is answered with what it has
counted; it ends when its input closes.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
import uvloop
from child import obey, say

KEEPALIVE_S = 15.0
VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
ECHO = {
    "name": "echo",
    "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    "annotations": {"readOnlyHint": False, "idempotentHint": False},
}


class Server:
    """What the connections share."""

    def __init__(self, delay_s: float, forget: float) -> None:
        self.delay_s = delay_s
        self.forget = forget
        self.sessions: set[str] = set()
        self.streams: dict[str, Connection] = {}
        self.counts: Counter[str] = Counter()

    async def statistics(self, _command: dict[str, Any]) -> dict[str, int]:
        return {**self.counts, "sessions": len(self.sessions), "streams": len(self.streams)}

    def new_session(self) -> str:
        return os.urandom(16).hex()

    def answer_to(self, message: dict[str, Any]) -> bytes:
        """The response to a request; a call counts as executed here."""
        method, params = message["method"], message.get("params") or {}
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
        if method == "initialize":
            asked = params.get("protocolVersion")
            answer["result"] = {
                "protocolVersion": asked if asked in VERSIONS else VERSIONS[-1],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "soak", "version": "1"},
            }
        elif method == "tools/call":
            self.counts["executed"] += 1
            text = params.get("arguments", {}).get("text", "")
            answer["result"] = {"content": [{"type": "text", "text": text}], "isError": False}
        elif method == "tools/list":
            answer["result"] = {"tools": [ECHO]}
        elif method == "ping":
            answer["result"] = {}
        else:
            answer["error"] = {"code": -32601, "message": "Method not found"}
        return orjson.dumps(answer)

    def delay_of(self, message: dict[str, Any]) -> float:
        return random.uniform(0, 2 * self.delay_s) if message["method"] == "tools/call" else 0.0


class Connection(asyncio.Protocol):
    """One client connection; requests on it come one after the other."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._session: str | None = None
        self._keepalive: asyncio.TimerHandle | None = None
        self._odd = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._server.counts["connections"] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if self._session is not None:
            del self._server.streams[self._session]
        if self._keepalive is not None:
            self._keepalive.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            request_line, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            after = end + 4 + int(headers.get("content-length", 0))
            if len(self._buffer) < after:
                return
            body = self._buffer[end + 4 : after]
            self._buffer = self._buffer[after:]
            method, target, _ = request_line.split(" ")
            self._route(method, urlsplit(target), headers.get("mcp-session-id", ""), body)

    def _route(self, method: str, target: Any, session: str, body: bytes) -> None:
        match method, target.path:
            case "POST", "/mcp":
                self._post(orjson.loads(body), session)
            case "DELETE", "/mcp":
                known = session in self._server.sessions
                self._server.sessions.discard(session)
                self._write("200 OK" if known else "404 Not Found")
            case "GET", "/sse":
                self._open_stream()
            case "POST", "/messages":
                self._post_message(orjson.loads(body), parse_qs(target.query).get("session", [""])[0])
            case "GET", "/mcp":
                self._write("405 Method Not Allowed", "allow: POST, DELETE\r\n")
            case _:
                self._write("404 Not Found")

    # -- streamable HTTP -------------------------------------------------------------------------------------------

    def _post(self, message: dict[str, Any], session: str) -> None:
        server = self._server
        extra = ""
        if message.get("method") == "initialize":
            session = server.new_session()
            server.sessions.add(session)
            extra = f"mcp-session-id: {session}\r\n"
        elif message.get("method") == "tools/call" and random.random() < server.forget:
            server.sessions.discard(session)
            server.counts["forgotten"] += 1
        if session not in server.sessions:
            self._write("404 Not Found")
        elif "id" not in message or "method" not in message:
            self._write("202 Accepted")
        elif delay_s := server.delay_of(message):
            self._loop.call_later(delay_s, self._answer, message, extra)
        else:
            self._answer(message, extra)

    def _answer(self, message: dict[str, Any], extra: str) -> None:
        if self._transport.is_closing():
            self._server.counts["gone"] += 1
            return
        body = self._server.answer_to(message)
        self._odd = not self._odd
        if not self._odd:
            self._write("200 OK", f"content-type: application/json\r\n{extra}", body)
            return
        self._transport.write(
            f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{extra}transfer-encoding: chunked\r\n\r\n".encode()
            + chunk(b"event: message\r\ndata: %b\r\n\r\n" % body)
        )
        self._loop.call_soon(self._transport.write, b"0\r\n\r\n")

    # -- the transport of 2024-11-05 -------------------------------------------------------------------------------

    def _open_stream(self) -> None:
        self._session = self._server.new_session()
        self._server.streams[self._session] = self
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
            + chunk(b"event: endpoint\r\ndata: /messages?session=%b\r\n\r\n" % self._session.encode())
        )
        self._keepalive = self._loop.call_later(KEEPALIVE_S, self._keep_alive)

    def _keep_alive(self) -> None:
        self._transport.write(chunk(b": keepalive\r\n\r\n"))
        self._keepalive = self._loop.call_later(KEEPALIVE_S, self._keep_alive)

    def _post_message(self, message: dict[str, Any], session: str) -> None:
        stream = self._server.streams.get(session)
        if stream is None:
            self._write("404 Not Found")
            return
        self._write("202 Accepted")
        if "id" in message and "method" in message:
            self._loop.call_later(self._server.delay_of(message), stream.tell, message)

    def tell(self, message: dict[str, Any]) -> None:
        if self._transport.is_closing():
            self._server.counts["gone"] += 1
            return
        self._transport.write(chunk(b"event: message\r\ndata: %b\r\n\r\n" % self._server.answer_to(message)))

    def _write(self, status: str, headers: str = "", body: bytes = b"") -> None:
        self._transport.write(f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def main(delay_s: float, forget: float) -> None:
    server = Server(delay_s, forget)
    listening = await asyncio.get_running_loop().create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=1024)
    say(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    await obey(server.statistics)


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1]), float(sys.argv[2])))
