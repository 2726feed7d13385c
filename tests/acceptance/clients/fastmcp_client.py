"""Counter client on FastMCP."""

import argparse
import asyncio
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from fastmcp import Client


async def count(url: str, index: int, calls: int, tag: str) -> list[str]:
    """Call `increment` and return what was wrong; the n-th call of a session returns n."""
    errors = []
    async with Client(url, mode="legacy") as client:
        for expected in range(1, calls + 1):
            result = await client.call_tool("increment", {"tag": f"{tag}/{index}/{expected}"})
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
        "client": "fastmcp",
        "version": importlib.metadata.version("fastmcp"),
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
    parser.add_argument("--tag", default="fastmcp")
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
