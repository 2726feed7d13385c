"""Counter client on the Python SDK, 2.x (handshake mode) or 1.x, whichever is installed."""

import argparse
import asyncio
import importlib.metadata
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

VERSION = importlib.metadata.version("mcp")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    """An initialized session: anything with `call_tool`."""
    if VERSION.startswith("1."):
        from mcp import ClientSession
        from mcp.client.streamable_http import streamable_http_client

        async with AsyncExitStack() as stack:
            read, write, *_ = await stack.enter_async_context(streamable_http_client(url))
            session = await stack.enter_async_context(ClientSession(read, write))
            await session.initialize()
            yield session
    else:
        from mcp import Client

        async with Client(url, mode="legacy") as client:
            yield client


async def count(url: str, index: int, calls: int, tag: str) -> list[str]:
    """Call `increment` and return what was wrong; the n-th call of a session returns n."""
    errors = []
    async with connected(url) as session:
        for expected in range(1, calls + 1):
            result = await session.call_tool("increment", {"tag": f"{tag}/{index}/{expected}"})
            got = result.content[0].text
            if got != str(expected):
                errors.append(f"session {index}: expected {expected}, got {got}")
    return errors


async def run(url: str, sessions: int, calls: int, tag: str) -> dict[str, Any]:
    started = time.perf_counter()
    outcomes = await asyncio.gather(*(count(url, i, calls, tag) for i in range(sessions)), return_exceptions=True)
    errors = []
    for index, outcome in enumerate(outcomes):
        errors.extend([f"session {index}: {outcome!r}"] if isinstance(outcome, BaseException) else outcome)
    return {
        "client": "mcp",
        "version": VERSION,
        "sessions": sessions,
        "calls": calls,
        "seconds": round(time.perf_counter() - started, 2),
        "errors": errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--tag", default="mcp")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = asyncio.run(run(args.url, args.sessions, args.calls, args.tag))
    line = json.dumps(report)
    print(line)
    if args.out:
        args.out.write_text(line + "\n")
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
