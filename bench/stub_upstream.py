"""A streamable-HTTP MCP server that costs almost nothing: what is measured in front of it is not itself.

/json/mcp answers with one JSON body, /sse/mcp with an event stream of one event whose end comes a loop turn later.
Says its URL on start, and ends when its input closes.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import orjson
import uvloop
from child import obey, say

PADDING = "x" * 120
VERSION = "2025-11-25"


def answer_to(message: dict[str, Any]) -> bytes:
    """About 200 bytes for a tool call."""
    if message["method"] == "initialize":
        result: dict[str, Any] = {
            "protocolVersion": VERSION,
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "stub", "version": "1"},
        }
    elif message["method"] == "tools/list":
        result = {"tools": [{"name": "count", "inputSchema": {"type": "object"}}]}
    else:
        result = {"content": [{"type": "text", "text": PADDING}], "isError": False}
    return orjson.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result})


class Connection(asyncio.Protocol):
    """One client connection; requests on it come one after the other."""

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = 0
            if (at := head.find(b"\r\ncontent-length:")) >= 0:
                length = int(head[at + 17 :].split(b"\r\n", 1)[0])
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"post "):
            status = b"405 Method Not Allowed" if head.startswith(b"get ") else b"200 OK"
            self._transport.write(b"HTTP/1.1 %b\r\nallow: POST, DELETE\r\ncontent-length: 0\r\n\r\n" % status)
            return
        message = orjson.loads(body)
        if "id" not in message:
            self._transport.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
            return
        answer = answer_to(message)
        session = b""
        if message["method"] == "initialize":
            session = b"mcp-session-id: %b\r\n" % os.urandom(16).hex().encode()
        if b" /sse/" in head.split(b"\r\n", 1)[0]:
            event = b"event: message\r\ndata: %b\r\n\r\n" % answer
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n%b"
                b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (session, len(event), event)
            )
            asyncio.get_running_loop().call_soon(self._transport.write, b"0\r\n\r\n")
        else:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b"
                % (session, len(answer), answer)
            )


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    say(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await obey(lambda _command: asyncio.sleep(0))


if __name__ == "__main__":
    uvloop.run(main())
