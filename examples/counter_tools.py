"""A stateful MCP server: a counter per session, a tool per feature of the protocol, a journal of every execution."""

import asyncio
import json
import os
import time
import uuid
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.message import ServerMessageMetadata

Level = Literal["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"]
EXIT_OF_CRASH = 70


class Journal:
    """Append-only JSON lines, one per execution of a tool; without a path it writes nothing."""

    def __init__(self, path: Path | None = None) -> None:
        # One write per line and no buffer, so that a line is there before the answer leaves and survives a kill.
        self._file = path.open("ab", buffering=0) if path else None

    def write(self, session: str, tool: str, tag: str, *, counter: int | None = None, cancelled: bool = False) -> None:
        """Record one execution; `time` is the wall clock, for readers only."""
        if self._file is None:
            return
        line = {
            "session": session,
            "tool": tool,
            "tag": tag,
            "counter": counter,
            "cancelled": cancelled,
            "time": time.time(),
            "pid": os.getpid(),
        }
        self._file.write(json.dumps(line).encode() + b"\n")


def text_of(content: Any) -> str:
    """The text of one content block or of a list of them."""
    blocks = content if isinstance(content, list) else [content]
    return " ".join(block.text for block in blocks if isinstance(block, types.TextContent))


def build_server(journal: Journal) -> MCPServer:
    """The counter server; its state lives in this process, keyed by the MCP session id."""
    server = MCPServer("counter", version="1.0.0", log_level="WARNING")
    alone = f"stdio-{uuid.uuid4().hex}"  # stdio has no session id: the process is the session
    counters: dict[str, int] = defaultdict(int)
    cancelled: dict[str, set[str]] = defaultdict(set)
    later: set[asyncio.Task[None]] = set()

    def session_of(ctx: Context) -> str:
        if ctx.headers is None:
            return alone
        return ctx.headers.get("mcp-session-id", "sessionless")

    def on_request(ctx: Context) -> ServerMessageMetadata:
        return ServerMessageMetadata(related_request_id=ctx.request_id)

    @contextmanager
    def noting_cancel(ctx: Context, tool: str, tag: str) -> Any:
        try:
            yield
        except asyncio.CancelledError:
            session = session_of(ctx)
            cancelled[session].add(tag)
            journal.write(session, tool, tag, cancelled=True)
            raise

    @server.tool()
    async def increment(ctx: Context, tag: str = "") -> int:
        """Add one to this session's counter and return it."""
        session = session_of(ctx)
        counters[session] += 1
        journal.write(session, "increment", tag, counter=counters[session])
        return counters[session]

    @server.tool()
    async def echo(ctx: Context, text: str) -> str:
        """Return the text."""
        journal.write(session_of(ctx), "echo", text)
        return text

    @server.tool()
    async def whoami(ctx: Context) -> str:
        """Return the session id this server knows the caller by."""
        return session_of(ctx)

    @server.tool()
    async def slow(ctx: Context, seconds: float = 1.0, steps: int = 4, tag: str = "") -> str:
        """Take some seconds, with one progress notification per step."""
        journal.write(session_of(ctx), "slow", tag)
        with noting_cancel(ctx, "slow", tag):
            for step in range(1, steps + 1):
                await asyncio.sleep(seconds / steps)
                await ctx.report_progress(step, steps, f"step {step}")
        return f"slow {tag} done"

    @server.tool()
    async def log(ctx: Context, level: Level, message: str, times: int = 1) -> str:
        """Send logging notifications on the stream of this request."""
        journal.write(session_of(ctx), "log", message)
        params = types.LoggingMessageNotificationParams(level=level, data=message, logger="counter")
        for _ in range(times):
            await ctx.session.send_notification(types.LoggingMessageNotification(params=params), ctx.request_id)
        return f"logged {message}"

    @server.tool()
    async def ask_sampling(ctx: Context, prompt: str) -> str:
        """Ask the client's model and return what it said."""
        journal.write(session_of(ctx), "ask_sampling", prompt)
        message = types.SamplingMessage(role="user", content=types.TextContent(type="text", text=prompt))
        request = types.CreateMessageRequest(
            params=types.CreateMessageRequestParams(messages=[message], max_tokens=100)
        )
        result = await ctx.session.send_request(request, types.CreateMessageResult, metadata=on_request(ctx))
        return f"sampled: {text_of(result.content)}"

    @server.tool()
    async def ask_elicitation(ctx: Context, message: str) -> str:
        """Ask the user and return the action and the answer."""
        journal.write(session_of(ctx), "ask_elicitation", message)
        schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
        result = await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)
        return f"{result.action}: {(result.content or {}).get('answer', '')}"

    @server.tool()
    async def list_roots(ctx: Context, standalone: bool = False) -> str:
        """Ask the client for its roots, on this request's stream or on the standalone GET stream."""
        journal.write(session_of(ctx), "list_roots", "")
        metadata = None if standalone else on_request(ctx)
        result = await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult, metadata=metadata)
        return ",".join(str(root.uri) for root in result.roots)

    @server.tool()
    async def notify_later(ctx: Context, seconds: float = 0.2, tag: str = "") -> str:
        """Answer at once; some seconds later send two notifications on the standalone GET stream."""
        journal.write(session_of(ctx), "notify_later", tag)
        session = ctx.session
        params = types.LoggingMessageNotificationParams(level="notice", data=tag, logger="notify_later")

        async def notify() -> None:
            await asyncio.sleep(seconds)
            await session.send_notification(types.LoggingMessageNotification(params=params))
            await session.send_notification(types.ResourceListChangedNotification())

        task = asyncio.create_task(notify())
        later.add(task)
        task.add_done_callback(later.discard)
        return "scheduled"

    @server.tool()
    async def wait_cancel(ctx: Context, tag: str = "") -> str:
        """Run until cancelled; one progress notification says that it runs."""
        journal.write(session_of(ctx), "wait_cancel", tag)
        with noting_cancel(ctx, "wait_cancel", tag):
            await ctx.report_progress(0, None, "waiting")
            await asyncio.Event().wait()
        return "never"

    @server.tool()
    async def was_cancelled(ctx: Context, tag: str) -> bool:
        """Whether a call with this tag was cancelled in this session."""
        return tag in cancelled[session_of(ctx)]

    @server.tool()
    async def crash(ctx: Context, tag: str = "") -> str:
        """End the server process at once, without an answer."""
        journal.write(session_of(ctx), "crash", tag)
        os._exit(EXIT_OF_CRASH)

    @server.resource("counter://about")
    def about() -> str:
        """What this server is for."""
        return "A counter per session."

    return server
