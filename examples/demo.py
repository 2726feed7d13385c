"""The main job, on real input: two stateful MCP servers behind a gateway of four workers, driven by an ordinary client.

A balancer that knows nothing of sessions sends every request on a new connection, so calls land on any worker. The
table says where each call landed, which worker owns its session, and what it returned. `--once` ends after the table.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from rich.console import Console
from rich.table import Table
from round_robin import RoundRobin

HERE = Path(__file__).resolve().parent
WORKERS = 4
CALLS = 12
START_LIMIT_S = 30
# The gateway shown here has a Redis of its own, whatever is set for another one.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("LEASEHOLD_") and k != "REDIS_URL"}


@contextmanager
def started(command: list[str], pattern: str, log: Path, **env: str) -> Iterator[str]:
    """Run a command until the end of the block; yields what `pattern` finds in its output."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**ENVIRONMENT, **env})
    try:
        until = time.monotonic() + START_LIMIT_S
        while not (found := re.search(pattern, log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command[:4])} did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield found.group(1)
    finally:
        process.terminate()
        process.wait()


def wait_ready(url: str) -> None:
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(f"{url}/readyz") as response:
            if response.status == 200:
                return
        time.sleep(0.05)
    raise SystemExit("the gateway did not become ready")


def kill_worker(gateway_log: Path, incarnation: str) -> int:
    """kill -9 the worker of that (shortened) incarnation; returns its process id."""
    found = re.search(rf"\[(\d+)\] lease_acquired incarnation={incarnation}", gateway_log.read_text())
    assert found is not None
    pid = int(found.group(1))
    os.kill(pid, signal.SIGKILL)
    # A request that it accepts while it dies would be lost with its connection; that is not what is shown here.
    until = time.monotonic() + START_LIMIT_S
    while f"pid={pid} code=-9" not in gateway_log.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    return pid


async def drive(console: Console, base: str, server: str, gateway_log: Path | None = None) -> set[str]:
    """Open one session, call it, and print the table; returns the workers the calls landed on.

    With `gateway_log`, the session's owner is killed before the last call.
    """
    seen: dict[str, str] = {}

    async def note(response: httpx2.Response) -> None:
        # Answers to calls only: the client also opens a stream and says goodbye.
        if response.request.method == "POST" and b"tools/call" in response.request.content:
            seen.update(response.headers)

    table = Table("call", "landed on", "owner", "way", "result", "ms", title=f"{server}: one session, {CALLS} calls")
    landed: set[str] = set()
    results: list[str] = []
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx2.AsyncClient(event_hooks={"response": [note]}, timeout=30))
        transport = streamable_http_client(f"{base}/servers/{server}/mcp", http_client=http)
        # "legacy": the era of protocol versions that have sessions. Servers of the newer era need no owner.
        client = await stack.enter_async_context(Client(transport, mode="legacy"))
        for number in range(1, CALLS + 1):
            if gateway_log is not None and number == CALLS:
                pid = kill_worker(gateway_log, seen["leasehold-owner"])
                table.add_section()
                table.add_row(f"kill -9 {pid}", "", "", "", "", "")
            began = time.perf_counter()
            result = await client.call_tool("increment", {"tag": f"demo-{number}"})
            ms = (time.perf_counter() - began) * 1000
            worker, owner = seen["leasehold-worker"], seen["leasehold-owner"]
            landed.add(worker)
            results.append(text_of(result))
            way = "local" if worker == owner else "forwarded"
            table.add_row("increment", worker, owner, way, results[-1], f"{ms:.1f}")
    console.print(table)
    if results != [str(number) for number in range(1, CALLS + 1)]:
        raise SystemExit(f"expected the counts 1 to {CALLS} in order, got {' '.join(results)}")
    return landed


def text_of(result: Any) -> str:
    return " ".join(block.text for block in result.content)


async def drive_all(console: Console, gateway: str, gateway_log: Path) -> None:
    async with RoundRobin([gateway]) as balancer:
        landed = await drive(console, balancer.url, "counter", gateway_log)
        landed |= await drive(console, balancer.url, "counter-stdio")
    console.print(
        f"\nEach session counted from 1 to {CALLS} in order, over {len(landed)} workers;"
        " the first one outlived the worker that owned it.\n"
    )


def demo(once: bool, port: int) -> None:
    console = Console(soft_wrap=True)  # what is printed to be copied stays in one piece
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(
            started([sys.executable, str(HERE / "counter_http.py")], r"listening on (\S+)", folder / "upstream.log")
        )
        config = folder / "mcp.json"
        stdio = {"command": sys.executable, "args": [str(HERE / "counter_stdio.py")]}
        config.write_text(json.dumps({"mcpServers": {"counter": {"url": upstream}, "counter-stdio": stdio}}, indent=2))
        command = [sys.executable, "-m", "leasehold.workers.cli", "serve", str(config)]
        command += ["--workers", str(WORKERS), "--port", str(port)]
        log = folder / "gateway.log"
        gateway = stack.enter_context(started(command, r"url=(http://[^/]+)", log, LEASEHOLD_ROUTE_HEADERS="true"))
        wait_ready(gateway)
        console.print(
            f"A gateway of {WORKERS} workers at {gateway}, one Redis of its own, two stateful servers behind it.\n"
        )
        asyncio.run(drive_all(console, gateway, log))
        console.print("Point your own client at it:")
        console.print(f'  {{"mcpServers": {{"counter": {{"url": "{gateway}/servers/counter/mcp"}}}}}}', markup=False)
        console.print(f"  npx @modelcontextprotocol/inspector --cli {gateway}/servers/counter/mcp --method tools/list")
        console.print("Serve your own servers: leasehold serve mcp.json --workers 4")
        if not once:
            console.print("\nServing until Ctrl-C.")
            signal.pause()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the table")
    parser.add_argument("--port", type=int, default=0, help="the gateway's port; 0 takes a free one")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        demo(arguments.once, arguments.port)


if __name__ == "__main__":
    main()
