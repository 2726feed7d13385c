"""A stateful upstream that notes every write to it and every execution, and links to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from leasehold.pool import (
    CallTimeout,
    Link,
    Message,
    PooledSession,
    Reply,
    ResumeRecord,
    SessionClosed,
    SessionPool,
    StdioTarget,
    Upstream,
    UpstreamLost,
)
from leasehold.pool.link import Fence, Headers

if TYPE_CHECKING:
    from .process import Process
    from .world import World

VERSION = "2025-11-25"
JSON: Headers = [(b"content-type", b"application/json")]


@dataclass
class UpstreamSession:
    """What the upstream remembers of a session."""

    id: str
    principal: str
    count: int = 0
    epoch: int = 0
    """The highest epoch under which anybody wrote to it."""


@dataclass(frozen=True)
class Execution:
    """One call that ran."""

    call: int
    session: str
    principal: str
    """Whose session it ran on."""
    at: float


@dataclass
class SimUpstream:
    """All sessions of all simulated servers."""

    sessions: dict[str, UpstreamSession] = field(default_factory=dict)
    executions: dict[int, list[Execution]] = field(default_factory=dict)
    opened: int = 0

    def open(self, principal: str) -> UpstreamSession:
        self.opened += 1
        session = self.sessions[f"upstream-{self.opened}"] = UpstreamSession(f"upstream-{self.opened}", principal)
        return session


class SimLink:
    """A link to the simulated upstream. As in the real one, the fence is asked in the turn in which a request is
    written."""

    def __init__(
        self, process: Process, key: str, upstream: Upstream, fence: Fence, resume: ResumeRecord | None
    ) -> None:
        self._process = process
        self._world: World = process.world
        self.key = key
        self._upstream = upstream
        self._fence = fence
        self.is_pinned = isinstance(upstream.target, StdioTarget)
        self.session_id = resume.session_id if resume else None
        self._version = resume.protocol_version if resume else None
        self._closed = asyncio.Event()
        self.epoch = 0
        """Under which its session was registered last."""

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    @property
    def resume(self) -> ResumeRecord | None:
        if self.session_id is None or self.is_pinned:
            return None
        return ResumeRecord(self.session_id, self._version)

    def negotiated(self, protocol_version: str) -> None:
        self._version = protocol_version

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        params: dict[str, Any] = message.params.get("arguments", {})
        answered = await self._write(message.method or "", params, lambda: self._run(message, params))
        status, payload = answered
        if status == 404 and self.session_id is not None:
            self._closed.set()
        if message.method == "initialize" and status == 200:
            self.session_id = payload.pop("session")
        content = b"" if payload is None else orjson.dumps({"jsonrpc": "2.0", "id": message.id, "result": payload})
        return Reply(status, list(JSON), _once(content))

    async def get(self, headers: Headers) -> Reply:
        return Reply(405, [], _once(b""))

    async def delete(self, headers: Headers) -> Reply:
        status, _ = await self._write("DELETE", {}, self._end)
        return Reply(status, [], _once(b""))

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def aclose(self) -> None:
        self._closed.set()
        self.died()

    def died(self) -> None:
        """The process ended; a child of its ends with it."""
        if self.is_pinned and self.session_id is not None:
            self._world.upstream.sessions.pop(self.session_id, None)

    async def _write(self, method: str, params: dict[str, Any], run: Callable[[], Any]) -> Any:
        if self.is_closed:
            raise SessionClosed("the upstream session has ended")
        world = self._world
        await asyncio.sleep(world.rng.uniform(0, 0.002))  # until there is a connection
        self._fence()
        world.checker.wrote(self._process, self, method)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        fate, take_s = params.get("fate", "answered"), params.get("take", 0.0)

        def arrive() -> None:
            result = run() if fate != "lost before" else None
            if fate.startswith("lost"):
                world.after(take_s, lambda: _settle(answer, UpstreamLost("simulated")))
            elif fate != "silent":
                world.after(take_s + world.network.latency(), lambda: _settle(answer, result))

        world.after(world.network.latency(), arrive)
        try:
            async with asyncio.timeout(self._upstream.call_timeout_s):
                return await answer
        except TimeoutError:
            raise CallTimeout("simulated") from None

    def _run(self, message: Message, params: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        upstream = self._world.upstream
        if message.method == "initialize":
            session = upstream.open(message.params["clientInfo"]["name"])
            known = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
            return 200, {**known, "session": session.id}
        session = upstream.sessions.get(self.session_id or "")
        if session is None:
            return 404, None
        if message.kind != "request":
            return 202, None
        if message.method != "tools/call":
            return 200, {}
        session.count += 1
        self._world.calls.executed(Execution(params["call"], session.id, session.principal, self._world.now))
        return 200, {
            "call": params["call"],
            "session": session.id,
            "principal": session.principal,
            "count": session.count,
        }

    def _end(self) -> tuple[int, None]:
        return (404, None) if self._world.upstream.sessions.pop(self.session_id or "", None) is None else (200, None)


class SimPool(SessionPool):
    """The real pool, but for where its links lead."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self.links: dict[str, SimLink] = {}
        """The last one of each session key."""
        self._key = ""

    def begin(self, key: str, *args: Any, **options: Any) -> PooledSession:
        fence: Fence = options.pop("fence")
        return super().begin(key, *args, fence=_Keyed(key, fence), **options)

    async def _open_link(self, upstream: Upstream, fence: Fence, resume: ResumeRecord | None) -> Link:
        assert isinstance(fence, _Keyed)
        await asyncio.sleep(self._process.world.network.latency())
        link = self.links[fence.key] = SimLink(self._process, fence.key, upstream, fence, resume)
        return link


class _Keyed:
    """A fence that knows whose it is."""

    def __init__(self, key: str, fence: Fence) -> None:
        self.key = key
        self._fence = fence

    def __call__(self) -> None:
        self._fence()


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


async def _once(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content
