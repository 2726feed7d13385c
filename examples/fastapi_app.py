"""Tools of an MCP server for a web application: one session per conversation, whichever worker a request reaches.

    export COUNTER_URL=http://127.0.0.1:9000/mcp     # python examples/counter_http.py --port 9000
    export LEASEHOLD_REDIS_URL=redis://127.0.0.1:6379 LEASEHOLD_SECRET="$(openssl rand -base64 32)"
    gunicorn --preload -w 4 -k uvicorn_worker.UvicornWorker examples.fastapi_app:app

    curl -X POST http://127.0.0.1:8000/chat/42 -H 'x-user: alice' -H 'content-type: application/json' \
         -d '{"tool": "increment"}'
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse
from leasehold import CallFailed, Fleet, PoolError
from mcp import MCPError
from pydantic import BaseModel

SERVERS = {"mcpServers": {"counter": {"url": "${COUNTER_URL}"}}}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    # Here, not at import: what makes a worker of the fleet is made after the fork. On SIGTERM the server leaves this
    # block, and the sessions that this worker owns go on at the others.
    async with Fleet(config=SERVERS) as fleet:  # LEASEHOLD_REDIS_URL and LEASEHOLD_SECRET
        app.state.fleet = fleet
        yield


app = FastAPI(lifespan=lifespan)


class ToolCall(BaseModel):
    tool: str
    arguments: dict[str, Any] = {}


class Answer(BaseModel):
    text: str
    worker: int
    """The process that took the request; the session may be another one's."""


@app.post("/chat/{conversation}")
async def chat(conversation: str, call: ToolCall, x_user: Annotated[str, Header()], request: Request) -> Answer:
    """Call a tool in the session of a conversation. `x-user` stands in for your authentication: it says who calls, and
    nobody else's conversation of the same name is the same session."""
    fleet: Fleet = request.app.state.fleet
    async with fleet.session("counter", principal=x_user, affinity=conversation) as session:
        result = await session.call_tool(call.tool, call.arguments)
    text = " ".join(block.text for block in result.content if block.type == "text")
    if result.is_error:
        raise ToolError(text)
    return Answer(text=text, worker=os.getpid())


class ToolError(Exception):
    """Raised where the tool ran and answered with an error."""


@app.exception_handler(ToolError)
async def tool_error(_request: Request, error: ToolError) -> JSONResponse:
    return JSONResponse({"outcome": "error", "message": str(error)}, 422)


@app.exception_handler(MCPError)
async def server_error(_request: Request, error: MCPError) -> JSONResponse:
    """The server's answer is a JSON-RPC error."""
    return JSONResponse({"outcome": "error", "message": str(error), "code": error.error.code}, 422)


@app.exception_handler(CallFailed)  # a call got no answer: also an MCPError, and the closer class is looked up first
@app.exception_handler(PoolError)  # no session was to be had
async def no_answer(_request: Request, error: PoolError) -> JSONResponse:
    """Whoever reads `not_run` may try again; `unknown` may have run, and is not repeated without asking the user."""
    if error.outcome == "not_run":
        return JSONResponse({"outcome": "not_run", "message": str(error)}, 503, {"retry-after": "1"})
    return JSONResponse({"outcome": error.outcome, "message": str(error)}, 502)
