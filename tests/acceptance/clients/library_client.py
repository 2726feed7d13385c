"""A client as it comes (of FastMCP, or of the Python SDK), on the library server: the last line says what it found."""

import argparse
import asyncio
import importlib.metadata
import json
from typing import Any


async def run(url: str) -> dict[str, Any]:
    try:
        from fastmcp import Client

        package = "fastmcp"
    except ImportError:
        from mcp import Client

        package = "mcp"
    is_fastmcp = package == "fastmcp"
    seen: list[float] = []

    async def progressed(progress: float, _total: float | None, _message: str | None) -> None:
        seen.append(progress)

    async with Client(url) as client:
        more = {"progress_handler" if is_fastmcp else "progress_callback": progressed}
        tools, resources = await client.list_tools(), await client.list_resources()
        prompts = await client.list_prompts()
        contents = await client.read_resource("book://dune")
        await client.call_tool("read_aloud", {"pages": 3}, **more)
        return {
            "client": package,
            "version": importlib.metadata.version(package),
            "protocol": client.protocol_version,
            "tools": len(tools if is_fastmcp else tools.tools),
            "resources": len(resources if is_fastmcp else resources.resources),
            "prompts": len(prompts if is_fastmcp else prompts.prompts),
            "text": (contents if is_fastmcp else contents.contents)[0].text,
            "found": (await client.call_tool("find", {"title": "Dune"})).structured_content,
            "lent": (await client.call_tool("lend", {"shelf": "日本", "days": 3})).structured_content,
            "progress": seen,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    print(json.dumps(asyncio.run(run(parser.parse_args().url))))
