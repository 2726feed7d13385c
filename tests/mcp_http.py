"""A lean MCP client for tests: raw streamable HTTP, so that a test sees statuses, headers and bytes as they are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import orjson
from leasehold.coordinator import session_key
from leasehold.pool.sse import events

HEADERS = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
VERSION = "2025-11-25"


@dataclass
class Answer:
    """One HTTP answer; `message` is the JSON-RPC response in it, whether it came as JSON or as an event."""

    status: int
    headers: dict[str, str]
    body: bytes
    message: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> Any:
        assert "result" in self.message, self
        return self.message["result"]

    @property
    def error(self) -> dict[str, Any]:
        assert "error" in self.message, self
        return self.message["error"]

    @property
    def text(self) -> str:
        """The text of a tool's result."""
        assert not self.result.get("isError"), self.result
        return self.result["content"][0]["text"]


class RawSession:
    """One MCP session; every request is a connection of its own unless the caller's client keeps them."""

    def __init__(self, http: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None) -> None:
        self.http = http
        self.url = url
        self.headers = {**HEADERS, **(headers or {})}
        self.ids = itertools.count(1)
        self.session_id = ""

    @property
    def key(self) -> str:
        return session_key(self.session_id)

    async def __aenter__(self) -> Self:
        answer = await self.initialize()
        assert answer.status == 200, answer
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.delete()

    async def initialize(self) -> Answer:
        params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
        answer = await self.request("initialize", params)
        self.session_id = answer.headers.get("mcp-session-id", "")
        if self.session_id:
            self.headers |= {"mcp-session-id": self.session_id, "mcp-protocol-version": VERSION}
            initialized = await self.post({"jsonrpc": "2.0", "method": "notifications/initialized"})
            assert initialized.status == 202, initialized
        return answer

    async def request(self, method: str, params: dict[str, Any] | None = None) -> Answer:
        body: dict[str, Any] = {"jsonrpc": "2.0", "id": next(self.ids), "method": method}
        if params is not None:
            body["params"] = params
        return await self.post(body)

    async def call(self, tool: str, **arguments: Any) -> Answer:
        return await self.request("tools/call", {"name": tool, "arguments": arguments})

    async def post(self, body: Any) -> Answer:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        async with self.http.post(self.url, data=data, headers=self.headers) as response:
            received = await response.read()
            answer = Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, received)
        content_type = answer.headers.get("content-type", "")
        wanted = body.get("id") if isinstance(body, dict) else None
        for data in events(received) if content_type.startswith("text/event-stream") else [received]:
            if data.startswith(b"{"):
                message = orjson.loads(data)
                if "method" not in message and (wanted is None or message.get("id") in (wanted, None)):
                    answer.message = message
        return answer

    async def delete(self) -> int:
        async with self.http.delete(self.url, headers=self.headers) as response:
            return response.status
