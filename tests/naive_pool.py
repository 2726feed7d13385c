"""The pool that one writes first, and stories that it does not survive. Run as a program, it tells one of them with the
naive pool and prints what each caller saw, as JSON: what it leaves behind would fail the test that it ran in."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

EXAMPLES = Path(__file__).parent.parent / "examples"

Borrow = Callable[[], AbstractAsyncContextManager[ClientSession]]


class NaivePool:
    """Idle sessions in a queue. Each was entered by the request handler that needed it first, and is given back by
    whoever has it, whatever became of it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._idle: asyncio.Queue[ClientSession] = asyncio.Queue()
        self._stacks: list[AsyncExitStack] = []

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[ClientSession]:
        session = await self._open() if self._idle.empty() else self._idle.get_nowait()
        try:
            yield session
        finally:
            self._idle.put_nowait(session)

    async def aclose(self) -> None:
        for stack in self._stacks:
            await stack.aclose()

    async def _open(self) -> ClientSession:
        stack = AsyncExitStack()
        streams = await stack.enter_async_context(streamable_http_client(self._url))
        session = await stack.enter_async_context(ClientSession(streams[0], streams[1]))
        await session.initialize()
        self._stacks.append(stack)
        return session


class Counter:
    """The counter server in a process of its own, which is killed and started again on its port."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    def start(self) -> None:
        command = [sys.executable, str(EXAMPLES / "counter_http.py"), "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        with self._process.stdout as told:
            found = re.search(r":(\d+)/", told.readline().decode())
        assert found is not None
        self.port = int(found[1])

    def kill(self) -> None:
        """Without a word to anybody."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


async def increment(borrow: Borrow) -> str:
    async with borrow() as session:
        result: Any = await session.call_tool("increment")
        return result.content[0].text


async def handled(work: Awaitable[Any]) -> str:
    """What becomes of a request, in a handler task of its own."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task}, timeout=30)
    if not task.done():
        return "hangs"
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return f"ok: {task.result()}" if error is None else f"error: {error}"


# -- stories -----------------------------------------------------------------------------------------------------------


async def broken_in_mid_call(borrow: Borrow, upstream: Counter) -> list[str]:
    """The upstream dies in mid-call and comes back; then others call (IBM/mcp-context-forge 3520)."""
    told = [await handled(increment(borrow))]
    under_way = asyncio.Event()

    async def slowly() -> str:
        async def on_progress(*_: Any) -> None:
            under_way.set()

        async with borrow() as session:
            await session.call_tool("slow", {"seconds": 60.0, "steps": 600}, progress_callback=on_progress)
        return "done"

    calling = asyncio.create_task(handled(slowly()))
    await under_way.wait()
    upstream.kill()
    told.append(await calling)
    upstream.start()
    return told + [await handled(increment(borrow)) for _ in range(3)]


async def sibling_fails(borrow: Borrow, upstream: Counter) -> list[str]:
    """A handler that can cope with a call's failure goes on with its work (IBM/mcp-context-forge 3737)."""

    async def cope() -> str:
        said = ""
        async with borrow() as session:
            await session.call_tool("increment")
            upstream.kill()
            try:
                await session.call_tool("increment")
            except Exception as error:
                said = str(error)
        await asyncio.sleep(0.01)
        return f"went on after {said!r}"

    return [await handled(cope())]


async def closed_elsewhere(borrow: Borrow, _upstream: Counter, close: Callable[[], Awaitable[None]]) -> list[str]:
    """A session that one request's task has opened is closed by another's (IBM/mcp-context-forge 3737)."""
    return [await handled(increment(borrow)), await handled(close())]


async def idle_and_dead(borrow: Borrow, upstream: Counter, pass_time: Callable[[], None], *, back: bool) -> list[str]:
    """Used once, idle for longer than the health check's interval, killed without a word, then called (B54): when it is
    `back`, or while it is down and once more when it is back."""
    told = [await handled(increment(borrow))]
    upstream.kill()
    pass_time()
    if not back:
        told.append(await handled(increment(borrow)))
    upstream.start()
    return [*told, await handled(increment(borrow))]


async def told_by_the_naive_pool(story: str) -> list[str]:
    with Counter() as upstream:
        pool = NaivePool(upstream.url)
        match story:
            case "broken_in_mid_call":
                return await broken_in_mid_call(pool.session, upstream)
            case "sibling_fails":
                return await sibling_fails(pool.session, upstream)
            case "closed_elsewhere":
                return await closed_elsewhere(pool.session, upstream, pool.aclose)
            case _:
                return await idle_and_dead(pool.session, upstream, lambda: None, back=story == "idle_and_back")


if __name__ == "__main__":

    async def main() -> None:
        print(json.dumps(await told_by_the_naive_pool(sys.argv[1])), flush=True)

    asyncio.run(main())
