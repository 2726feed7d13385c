"""A server of the SDK that talks back, counts its runs and remembers what was cancelled; as a program: on stdio."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.message import ServerMessageMetadata

SAFE = types.ToolAnnotations(read_only_hint=True)


def build() -> MCPServer[Any]:
    server: MCPServer[Any] = MCPServer("talker", log_level="CRITICAL")
    counters: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    cancelled: set[str] = set()

    def session_of(ctx: Context) -> str:
        return (ctx.headers or {}).get("mcp-session-id", "")

    async def log(ctx: Context, data: str, *, related: bool = True) -> None:
        params = types.LoggingMessageNotificationParams(level="info", data=data, logger="talker")
        notification = types.LoggingMessageNotification(params=params)
        await ctx.session.send_notification(notification, ctx.request_id if related else None)

    async def hold(ctx: Context, tag: str) -> None:
        """Until cancelled."""
        try:
            await ctx.report_progress(0, None, "begun")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.add(tag)
            raise

    @server.tool()
    async def increment(ctx: Context) -> int:
        """Count in this session."""
        counters[session_of(ctx)] += 1
        return counters[session_of(ctx)]

    @server.tool()
    async def seen_token(ctx: Context) -> str:
        """What came as `Authorization`."""
        return (ctx.headers or {}).get("authorization", "")

    @server.tool()
    async def talk(ctx: Context, steps: int) -> str:
        """Progress and a log message for each step."""
        for step in range(1, steps + 1):
            await ctx.report_progress(step, steps, f"step {step}")
            await log(ctx, f"log {step}")
        return "talked"

    @server.tool()
    async def ask(ctx: Context, what: str) -> str:
        """Ask the client something."""
        related = ServerMessageMetadata(related_request_id=ctx.request_id)
        if what == "roots":
            roots = await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult, metadata=related)
            return ",".join(str(root.uri) for root in roots.roots)
        if what == "elicitation":
            schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
            answer = await ctx.session.elicit_form("why?", schema, related_request_id=ctx.request_id)
            return f"{answer.action} {(answer.content or {}).get('answer')}"
        message = types.SamplingMessage(role="user", content=types.TextContent(type="text", text="think"))
        request = types.CreateMessageRequest(params=types.CreateMessageRequestParams(messages=[message], max_tokens=10))
        sampled = await ctx.session.send_request(request, types.CreateMessageResult, metadata=related)
        return getattr(sampled.content, "text", "?")

    @server.tool()
    async def announce(ctx: Context, what: str) -> str:
        """Say something that belongs to no call."""
        await log(ctx, what, related=False)
        await ctx.session.send_notification(types.ResourceListChangedNotification())
        return "announced"

    @server.tool()
    async def hang(ctx: Context, tag: str) -> str:
        """Until cancelled."""
        runs[tag] += 1
        await hold(ctx, tag)
        return "never"

    @server.tool(annotations=SAFE)
    async def peek(ctx: Context, tag: str) -> int:
        """Hangs the first time; declared as safe."""
        runs[tag] += 1
        if runs[tag] == 1:
            await hold(ctx, tag)
        return runs[tag]

    @server.tool()
    async def poke(ctx: Context, tag: str) -> int:
        """Hangs the first time."""
        runs[tag] += 1
        if runs[tag] == 1:
            await hold(ctx, tag)
        return runs[tag]

    @server.tool()
    async def count_of(tag: str) -> int:
        """How many runs of that tag there were."""
        return runs[tag]

    @server.tool()
    async def was_cancelled(tag: str) -> bool:
        """Whether a run of that tag was cancelled."""
        return tag in cancelled

    @server.tool()
    async def nap(seconds: float) -> str:
        """Take a while."""
        await asyncio.sleep(seconds)
        return f"slept {seconds}"

    @server.tool()
    async def fail() -> str:
        """An error of the tool."""
        raise ValueError("it failed")

    @server.resource("talker://about")
    def about() -> str:
        """What this is."""
        return "A talker."

    @server.resource("talker://books/{name}")
    def book(name: str) -> str:
        """A book."""
        return f"All of {name}."

    @server.prompt()
    def greet(name: str) -> str:
        """A greeting."""
        return f"Say hello to {name}."

    return server


if __name__ == "__main__":
    build().run("stdio")
