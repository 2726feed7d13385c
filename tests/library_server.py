"""A server with everything that has a counterpart in both eras of the protocol: tools of each kind of content,
resources, templates, prompts, completion and errors. Run as a program it speaks stdio, which Leasehold speaks in the
words of the handshake era."""

from __future__ import annotations

import argparse
import asyncio
import base64
from pathlib import Path
from typing import Annotated, Any

import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.exceptions import MCPError
from pydantic import BaseModel, Field

PIXEL = base64.b64decode("R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=")
INSTRUCTIONS = "Ask for books by their title."
TITLES = ["Dune", "Dubliners", "Emma"]


class Book(BaseModel):
    title: str
    pages: int
    tags: list[str]


def build(notes: Path | None = None) -> MCPServer[Any]:
    """`notes`: a file to which a cancelled tool adds a line."""
    server: MCPServer[Any] = MCPServer(
        "library", title="A library", version="1.2.3", instructions=INSTRUCTIONS, log_level="CRITICAL"
    )

    @server.tool()
    def find(title: str) -> Book:
        """Structured output."""
        return Book(title=title, pages=412, tags=["sand"])

    @server.tool()
    def add(a: int, b: int) -> int:
        """Structured output of a value that is no object."""
        return a + b

    @server.tool(structured_output=False)
    def describe() -> list[Any]:
        """Every kind of content."""
        text = types.TextResourceContents(uri="book://dune", text="Arrakis", mime_type="text/plain")
        blob = types.BlobResourceContents(uri="book://cover", blob=base64.b64encode(PIXEL).decode())
        image = base64.b64encode(PIXEL).decode()
        return [
            types.TextContent(type="text", text="plain", annotations=types.Annotations(priority=0.5)),
            types.ImageContent(type="image", data=image, mime_type="image/gif"),
            types.AudioContent(type="audio", data=image, mime_type="audio/wav"),
            types.EmbeddedResource(type="resource", resource=text),
            types.EmbeddedResource(type="resource", resource=blob),
            types.ResourceLink(type="resource_link", name="dune", uri="book://dune", size=7),
        ]

    @server.tool()
    def tear(title: str) -> str:
        """An error of the tool."""
        raise ValueError(f"{title} is torn already")

    @server.tool()
    def refuse(code: int, data: dict[str, Any] | None = None) -> str:
        """An error of the protocol."""
        raise MCPError(code=code, message="refused", data=data)

    @server.tool()
    async def read_aloud(ctx: Context, pages: int) -> str:
        """Progress, and a log message of each level."""
        for page in range(pages):
            await ctx.report_progress(page + 1, pages, f"page {page + 1}")
        for level in ("debug", "info", "warning", "error"):
            params = types.LoggingMessageNotificationParams(level=level, data=level, logger="library")
            await ctx.session.send_notification(types.LoggingMessageNotification(params=params), ctx.request_id)
        await ctx.session.send_notification(types.ToolListChangedNotification(), ctx.request_id)
        return "read"

    @server.tool()
    async def ask(ctx: Context) -> str:
        """A request to the client, in the middle of a call."""
        try:
            await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)
        except MCPError as error:
            return f"refused with {error.error.code}"
        return "answered"

    @server.tool()
    async def wait(ctx: Context) -> str:
        """Go on until cancelled."""
        await ctx.report_progress(0, None, "waiting")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if notes is not None:
                with notes.open("a") as file:
                    file.write("cancelled\n")
            raise
        return "never"

    @server.tool()
    def lend(
        shelf: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Shelf"})],
        days: Annotated[int, Field(json_schema_extra={"x-mcp-header": "Days"})] = 7,
        renew: Annotated[bool | None, Field(json_schema_extra={"type": "boolean", "x-mcp-header": "Renew"})] = None,
    ) -> str:
        """Arguments that are repeated in headers."""
        return f"{shelf} for {days} days"

    @server.resource("book://dune", mime_type="text/plain")
    def dune() -> str:
        """A text."""
        return "Arrakis"

    @server.resource("book://cover", mime_type="image/gif")
    def cover() -> bytes:
        """Bytes."""
        return PIXEL

    @server.resource("book://{title}/{page}")
    def page(title: str, page: str) -> str:
        """A template."""
        return f"{title}, {page}"

    @server.prompt()
    def review(title: str, tone: str = "kind") -> str:
        """A prompt with arguments."""
        return f"Review {title} in a {tone} tone."

    @server.prompt()
    def look() -> list[Any]:
        """A prompt with other content than text."""
        image = types.ImageContent(type="image", data=base64.b64encode(PIXEL).decode(), mime_type="image/gif")
        return [{"role": "user", "content": image}, {"role": "assistant", "content": "A pixel."}]

    @server.completion()
    async def complete(ref: Any, argument: types.CompletionArgument, context: Any) -> types.Completion:
        values = [title for title in TITLES if title.startswith(argument.value)]
        return types.Completion(values=values, total=len(values), has_more=False)

    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notes", type=Path)
    build(parser.parse_args().notes).run("stdio")
