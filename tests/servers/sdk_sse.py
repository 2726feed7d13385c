"""The SDK's own HTTP+SSE server, with the tools of `sdk_stdio.py` and some that wait or write. Prints its port."""

import socket
import warnings

import anyio
import uvicorn
from mcp.server.mcpserver import Context
from sdk_stdio import server

doors: dict[str, anyio.Event] = {}


@server.tool()
async def hold(name: str) -> str:
    await doors.setdefault(name, anyio.Event()).wait()
    return f"released {name}"


@server.tool()
async def held() -> str:
    return " ".join(sorted(doors))


@server.tool()
async def release(name: str) -> str:
    doors.setdefault(name, anyio.Event()).set()
    return "done"


@server.tool()
async def log(text: str, context: Context) -> str:
    with warnings.catch_warnings(action="ignore"):  # logging is on its way out of the protocol
        await context.info(text)
    return "logged"


@server.tool()
async def rename(context: Context) -> str:
    await context.session.send_tool_list_changed()
    return "renamed"


with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(server.sse_app(), log_level="error")
    uvicorn.Server(config).run(sockets=[listener])
