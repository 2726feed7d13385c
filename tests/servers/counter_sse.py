"""The counter server over HTTP+SSE. Its sessions are told apart by what they post to, as that transport does it."""

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from counter_http import serve
from counter_tools import Journal, build_server

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--journal", type=Path)
args = parser.parse_args()
sse_app = build_server(Journal(args.journal)).sse_app()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Shows the tools the session's id where streamable HTTP has it."""
    session = parse_qs(scope.get("query_string", b"")).get(b"session_id")
    if session:
        scope = {**scope, "headers": [*scope["headers"], (b"mcp-session-id", session[0])]}
    await sse_app(scope, receive, send)


serve(app, args.port)
