"""An agent loop under asyncio: several conversations at once, each in an MCP session of its own, from two processes.

    python examples/agent_loop.py                  starts what it needs: a server, a private Redis, a second process
    python examples/agent_loop.py --processes 1    one process; any number of them, on any machines, are one fleet
                                                   where LEASEHOLD_REDIS_URL, LEASEHOLD_SECRET and COUNTER_URL are set

Every process is a worker of one fleet. A conversation has one session, wherever it is owned: so the counter, which the
server keeps per session, goes on from one process to the other. Errors say whether a call may have run.
"""

import argparse
import asyncio
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mcp_types as types
from counter_process import STDIO, counter_server, text_of
from leasehold import Callbacks, CallFailed, Fleet
from leasehold.coordinator.embedded import EmbeddedRedis
from mcp import ClientSession, MCPError

CONVERSATIONS = ("alice", "bob", "carol")
THIS = str(Path(__file__).resolve())
RETRY_S = (0.1, 0.5, 2.0)


@dataclass
class Script:
    """Stands in for a language model: says which tool to call next, and reads what came of it."""

    steps: list[tuple[str, dict[str, Any]]]
    heard: list[str] = field(default_factory=list)

    def choose(self, tools: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from (step for step in self.steps if step[0] in tools)

    async def sample(self, _context: Any, params: types.CreateMessageRequestParams) -> types.CreateMessageResult:
        """The server asks the model (sampling)."""
        content = types.TextContent(type="text", text=f"the model read {params.messages[0].content.text!r}")
        return types.CreateMessageResult(role="assistant", content=content, model="script")

    async def ask_user(self, _context: Any, params: types.ElicitRequestParams) -> types.ElicitResult:
        """The server asks the user (elicitation)."""
        return types.ElicitResult(action="accept", content={"answer": f"yes to {params.message!r}"})


STEPS = [
    ("increment", {}),
    ("slow", {"seconds": 0.3, "steps": 3}),
    ("ask_sampling", {"prompt": "what now?"}),
    ("ask_elicitation", {"message": "go on?"}),
    ("increment", {}),
    ("echo", {}),  # without its argument: the tool's answer is an error
    ("increment", {}),
]
CRASHING = [("increment", {}), ("crash", {}), ("increment", {})]


class Agent:
    """The conversations of one process."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet = fleet
        self.name = name

    async def converse(self, server: str, conversation: str, script: Script) -> None:
        """One conversation, until its model has nothing more to do."""
        callbacks = Callbacks(sampling=script.sample, elicitation=script.ask_user)
        async with self.fleet.session(server, affinity=conversation, callbacks=callbacks) as session:
            tools = [tool.name for tool in (await session.list_tools()).tools]
            for tool, arguments in script.choose(tools):
                said = await self.call(session, tool, arguments)
                script.heard.append(said)
                print(f"{self.name:10} {conversation:8} {tool:16} {said}", flush=True)

    async def call(self, session: ClientSession, tool: str, arguments: dict[str, Any]) -> str:
        """What the model is to read: the answer, or what is known of the failure."""
        steps: list[str] = []

        async def on_progress(progress: float, total: float | None, _message: str | None) -> None:
            steps.append(f"{progress:g}/{total:g}" if total else f"{progress:g}")

        for delay in (*RETRY_S, None):
            try:
                result = await session.call_tool(tool, arguments, progress_callback=on_progress)
            except CallFailed as failure:  # no answer
                if failure.outcome == "not_run" and delay is not None:
                    await asyncio.sleep(delay)  # it did not run, so trying again is safe
                    continue
                may = "it may have run" if failure.outcome == "unknown" else "it did not run"
                return f"failed, {may}: {failure}"
            except MCPError as error:  # the server's answer is an error
                return f"refused by the server: {error}"
            text = text_of(result).partition("\n")[0]
            if result.is_error:  # the tool's answer is an error: the model can read it, and do better
                return f"tool error: {text}"
            return f"{text}  (progress {' '.join(steps)})" if steps else text
        raise AssertionError("unreachable")


async def converse_all(agent: Agent) -> None:
    async with asyncio.TaskGroup() as tasks:
        for conversation in CONVERSATIONS:
            tasks.create_task(agent.converse("counter", conversation, Script(STEPS)))


async def other_process(number: int, environ: dict[str, str], joined: asyncio.Event) -> None:
    """Another one that converses; prints what it prints."""
    command = [sys.executable, THIS, "--join", str(number)]
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            joined.set()
            print(line.decode(), end="", flush=True)
    except BaseException:
        process.terminate()
        raise
    if await process.wait():
        raise RuntimeError(f"process {number} failed")


async def lead(agent: Agent, environ: dict[str, str], processes: int) -> None:
    """Converse here and in other processes at once; then count once more in every conversation."""
    async with asyncio.TaskGroup() as tasks:
        joined = [asyncio.Event() for _ in range(2, processes + 1)]
        for number, event in enumerate(joined, start=2):
            tasks.create_task(other_process(number, environ, event))
        for event in joined:
            await event.wait()
        tasks.create_task(agent.converse("workshop", "dana", Script(CRASHING)))
        await converse_all(agent)
    print(f"\nAll but {agent.name} have left; sessions that they owned go on here.")
    for conversation in CONVERSATIONS:
        async with agent.fleet.session("counter", affinity=conversation) as session:
            count = text_of(await session.call_tool("increment", {}))
        print(f"{conversation}: {count} increments by {processes} processes and one more, all in one session")


async def run(environ: dict[str, str], name: str, processes: int) -> None:
    servers = {
        "counter": {"url": environ["COUNTER_URL"]},
        "workshop": {"command": STDIO[0], "args": STDIO[1:]},
    }
    fleet = Fleet(
        environ["LEASEHOLD_REDIS_URL"], config={"mcpServers": servers}, secret=environ["LEASEHOLD_SECRET"].split(",")
    )
    async with fleet:
        print(f"{name:10} has joined", flush=True)
        agent = Agent(fleet, name)
        await (lead(agent, environ, processes) if processes else converse_all(agent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many converse at once")
    parser.add_argument("--join", metavar="NUMBER", help="be one of the others: for the example itself")
    arguments = parser.parse_args()
    environ = dict(os.environ)
    with ExitStack() as stack:
        if not environ.get("LEASEHOLD_REDIS_URL"):
            environ["LEASEHOLD_REDIS_URL"] = environ.get("REDIS_URL") or stack.enter_context(EmbeddedRedis()).url
        if not environ.get("LEASEHOLD_SECRET"):
            environ["LEASEHOLD_SECRET"] = secrets.token_urlsafe(32)
        if not environ.get("COUNTER_URL"):
            environ["COUNTER_URL"] = stack.enter_context(counter_server())
        name = f"process {arguments.join or 1}"
        asyncio.run(run(environ, name, 0 if arguments.join else arguments.processes))


if __name__ == "__main__":
    main()
