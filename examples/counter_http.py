"""The counter server over streamable HTTP, one session per `initialize`."""

import argparse
import asyncio
import socket
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import uvicorn
from counter_tools import Journal, build_server


class _Server(uvicorn.Server):
    """Says where it listens once it does, and ends with exit code 0 on SIGTERM and SIGINT."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        print(f"listening on http://127.0.0.1:{sockets[0].getsockname()[1]}/mcp", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True


def serve(app: Any, port: int, *, http: Literal["auto", "h11"] = "auto") -> None:
    """Serve an ASGI application on 127.0.0.1 until SIGTERM; port 0 takes a free one."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # or asyncio sets no TCP_NODELAY
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    config = uvicorn.Config(
        app, http=http, log_level="critical", access_log=False, timeout_graceful_shutdown=1, backlog=1024
    )
    asyncio.run(_Server(config).serve(sockets=[listener]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--journal", type=Path, help="append every execution to this file")
    parser.add_argument("--json-response", action="store_true", help="answer with JSON instead of SSE")
    args = parser.parse_args()
    server = build_server(Journal(args.journal))
    serve(server.streamable_http_app(json_response=args.json_response), args.port)


if __name__ == "__main__":
    main()
