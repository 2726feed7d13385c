"""Real SDK servers on sockets: in a thread of their own, with every request noted on its way in."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sys
import threading
import warnings
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn
from leasehold.pool import HttpTarget, StdioTarget, Upstream
from leasehold.pool.upstream import SseTarget

SERVERS = Path(__file__).parent / "servers"
sys.path.append(str(SERVERS))

import sdk_talker  # noqa: E402

Kind = Literal["http", "http-json", "sse", "stdio"]
SESSION = b"mcp-session-id"
SDK_LEAVES_STREAMS = "ignore:Unclosed <MemoryObject:ResourceWarning"
"""For `filterwarnings`: see `talking`."""


@dataclass(frozen=True)
class Seen:
    """A request as it came. `message`: its JSON-RPC message, if it had one."""

    method: str
    authorization: str
    session: str
    message: dict[str, Any]


@dataclass
class Talker:
    """The talker on HTTP; `port` is 0 for stdio."""

    kind: Kind
    port: int = 0
    requests: list[Seen] = field(default_factory=list)
    forgotten: set[str] = field(default_factory=set)

    def upstream(self, name: str = "talker", *, port: int = 0, **options: Any) -> Upstream:
        """As it is, or through another port."""
        if self.kind == "stdio":
            target: Any = StdioTarget(sys.executable, (str(SERVERS / "sdk_talker.py"),))
        elif self.kind == "sse":
            target = SseTarget(f"http://127.0.0.1:{port or self.port}/sse")
        else:
            target = HttpTarget(f"http://127.0.0.1:{port or self.port}/mcp")
        return Upstream(name, target, **options)

    def forget_all(self) -> None:
        """Answer 404 to every session that has been seen so far."""
        self.forgotten |= {seen.session for seen in self.requests if seen.session}

    def calls(self, tool: str) -> list[Seen]:
        """The calls of a tool that came."""
        return [
            seen
            for seen in self.requests
            if seen.message.get("method") == "tools/call" and seen.message["params"]["name"] == tool
        ]

    async def __call__(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        session = headers.get(SESSION, b"").decode()
        authorization = headers.get(b"authorization", b"").decode()
        decoded = json.loads(body) if body else {}
        self.requests.append(Seen(scope["method"], authorization, session, decoded))
        if session in self.forgotten:
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return first.pop() if first else await receive()

        await app(scope, again, send)


@asynccontextmanager
async def talking(kind: Kind) -> AsyncGenerator[Talker]:
    """Start it; on stdio each session has a process of its own, and there is nothing to start."""
    if kind == "stdio":
        yield Talker(kind)
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        talker = Talker(kind, listener.getsockname()[1])
        served = uvicorn.Server(
            uvicorn.Config(_app(talker), log_level="critical", lifespan="on", timeout_graceful_shutdown=1, ws="none")
        )
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not served.started:
                assert thread.is_alive()
                await asyncio.sleep(0.005)
            yield talker
        finally:
            served.should_exit = True
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()
            del served, thread
            # The SDK's server leaves streams of cut connections unclosed: no leak of the test that comes next.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()


def _app(talker: Talker) -> Any:
    server = sdk_talker.build()
    if talker.kind == "sse":
        app: Any = server.sse_app()
    else:
        app = server.streamable_http_app(json_response=talker.kind == "http-json")

    async def seen(scope: Any, receive: Any, send: Any) -> None:
        await talker(app, scope, receive, send)

    return seen
