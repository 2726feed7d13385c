"""The SDK's own stdio server, with a tool for each kind of message that flows against the stream."""

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.types import SamplingMessage, TextContent
from pydantic import BaseModel

server = MCPServer("everything")


class Answer(BaseModel):
    name: str


@server.tool()
async def count(upto: int, context: Context) -> str:
    for step in range(upto):
        await context.report_progress(step + 1, upto)
    return f"counted to {upto}"


@server.tool()
async def ask(context: Context) -> str:
    result = await context.elicit("What is your name?", Answer)
    return f"hello {result.data.name}" if result.action == "accept" else result.action


@server.tool()
async def sample(context: Context) -> str:
    message = SamplingMessage(role="user", content=TextContent(type="text", text="think"))
    result = await context.session.create_message([message], max_tokens=10)
    return f"thought {result.content.text}"


@server.tool()
async def roots(context: Context) -> str:
    result = await context.session.list_roots()
    return f"{len(result.roots)} roots"


if __name__ == "__main__":
    server.run("stdio")
