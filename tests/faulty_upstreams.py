"""Upstreams that are killed, frozen and restarted, and everybody who may call them: the library's loans, with and
without affinity, the fleet's library, and clients of a gateway with each affinity."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson
from faults import eventually
from fleet import EXAMPLES, SECRET
from leasehold import Fleet
from leasehold.pool import PooledSession, PoolError, SessionPool, parse_config
from leasehold.pool.sse import events
from mcp.shared.exceptions import MCPError
from mcp_http import VERSION
from whole_workers import Client, worker

HTTP, JSON, SSE, STDIO = "http", "http-json", "sse", "stdio"
TRANSPORTS = (HTTP, JSON, SSE, STDIO)

LOAN, SHARED, FLEET, SESSION, PRINCIPAL, NONE = "loan", "shared", "fleet", "session", "principal", "none"
FACES = (LOAN, SHARED, FLEET, SESSION, PRINCIPAL, NONE)
GATEWAY = (SESSION, PRINCIPAL, NONE)
BESIDE = "beside"

SERVERS = Path(__file__).parent / "servers"
START_S = 40.0


class Upstream:
    """The counter server on one transport, in a process of its own; on stdio, in one of each session's."""

    def __init__(self, transport: str, folder: Path) -> None:
        self.transport = transport
        self.journal = folder / f"{transport}.journal"
        self.journal.touch()
        self.command = folder / f"{transport}.sh"
        """What stdio sessions start: gone while the upstream is down."""
        self._log = folder / f"{transport}.log"
        self._process: asyncio.subprocess.Process | None = None
        self._port = 0
        self._killed: set[int] = set()

    async def __aenter__(self) -> Self:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self._port = taken.getsockname()[1]
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.kill()

    @property
    def knows_at_once(self) -> bool:
        """Whether its sessions end with something that is open all the time."""
        return self.transport in (SSE, STDIO)

    def config(self, **options: Any) -> dict[str, Any]:
        """How it stands in a configuration."""
        if self.transport == STDIO:
            args = [str(EXAMPLES / "counter_stdio.py"), "--journal", str(self.journal)]
            return {"command": str(self.command), "args": args, "leasehold": options}
        kind, path = ("sse", "sse") if self.transport == SSE else ("http", "mcp")
        return {"type": kind, "url": f"http://127.0.0.1:{self._port}/{path}", "leasehold": options}

    async def start(self) -> None:
        """Start it, or start it again where it was."""
        if self.transport == STDIO:
            self.command.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            self.command.chmod(0o755)
            return
        script = SERVERS / "counter_sse.py" if self.transport == SSE else EXAMPLES / "counter_http.py"
        arguments = ["--port", str(self._port), "--journal", str(self.journal)]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(script),
                *arguments,
                *(["--json-response"] if self.transport == JSON else []),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S):
            assert b"listening on" in await self._process.stdout.readline(), self._log.read_text()

    async def kill(self, *, stays_down: bool = False) -> None:
        """SIGKILL, to every process of it. On stdio another one is started for the next session, unless it
        `stays_down`."""
        self._signal(signal.SIGKILL)
        self._killed |= set(self.pids)
        if stays_down:
            self.command.unlink(missing_ok=True)
        if self._process is not None:
            await self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP, to every process of it."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    @property
    def pids(self) -> list[int]:
        """Its processes, as far as a tool was ever called on them."""
        if self._process is not None:
            return [self._process.pid] if self._process.returncode is None else []
        return sorted({line["pid"] for line in self._lines()} - self._killed)

    def runs(self, tag: str) -> int:
        """How often a call with that tag was executed."""
        return sum(line["tag"] == tag and not line["cancelled"] for line in self._lines())

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@dataclass
class Seen:
    """What a caller saw of one call: `ok`, an outcome, or a status of HTTP and an outcome; and when."""

    what: str
    text: str
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


class Face(ABC):
    """One way to call an upstream."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def call(self, tool: str = "increment", **arguments: Any) -> Seen:
        """One call, and what was seen of it."""
        begun = time.monotonic()
        try:
            seen = await self.ask(tool, arguments)
        except PoolError as error:
            seen = Seen(error.outcome, str(error))
        except MCPError as error:
            seen = Seen("error", str(error))
        seen.seconds = time.monotonic() - begun
        assert seen.text.strip(), "B54: an error says something"
        return seen

    @abstractmethod
    async def ask(self, tool: str, arguments: dict[str, Any]) -> Seen:
        """As `call`, without the time."""

    async def begin(self) -> Seen | None:
        """Have a session, where calls do not see to that."""
        return None


class Library(Face):
    """`session()` gives what is to be entered for a call."""

    def __init__(self, name: str, session: Callable[[], Any]) -> None:
        super().__init__(name)
        self.session = session

    async def ask(self, tool: str, arguments: dict[str, Any]) -> Seen:
        async with self.session() as session:
            result = await session.call_tool(tool, arguments)
            return Seen("error" if result.is_error else "ok", result.content[0].text)


class Gateway(Face):
    """A client of a gateway."""

    def __init__(self, name: str, client: Client) -> None:
        super().__init__(name)
        self.client = client

    async def begin(self) -> Seen:
        """Initialize, as clients do; what was seen of that."""
        begun = time.monotonic()
        self.client.session_id = ""
        client = {"name": "test", "version": "1"}
        params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}
        seen = self._seen(*await self.client.send("POST", "initialize", params))
        seen.seconds = time.monotonic() - begun
        if seen.what == "ok":
            assert await self.client.tell("notifications/initialized") == 202
        return seen

    async def ask(self, tool: str, arguments: dict[str, Any]) -> Seen:
        return self._seen(*await self.client.send("POST", "tools/call", {"name": tool, "arguments": arguments}))

    def _seen(self, status: int, body: Any) -> Seen:
        headers = {name.decode(): value.decode() for name, value in self.client.answered}
        if isinstance(body, bytes):
            messages = [orjson.loads(data) for data in events(body) if data.startswith(b"{")]
            body = next(message for message in reversed(messages) if "method" not in message)
        if status == 200 and "result" in body:
            return Seen("ok", body["result"].get("content", [{"text": "initialized"}])[0]["text"], headers=headers)
        error: dict[str, Any] = body["error"]
        what = (error.get("data") or {}).get("outcome", "")
        return Seen(what if status == 200 else f"{status} {what}".strip(), error["message"], headers=headers)


@dataclass
class Callers:
    """All faces of one upstream. Each has sessions, and a circuit breaker, of its own."""

    upstream: Upstream
    faces: dict[str, Face]
    pools: dict[str, SessionPool]
    neighbours: list[Face]
    """Who call another upstream by the same pools and the same gateway."""

    def __getitem__(self, name: str) -> Face:
        return self.faces[name]

    def sessions(self) -> list[PooledSession]:
        """All that are open, of every face."""
        return [session for pool in set(self.pools.values()) for session in pool.sessions()]

    def circuit(self, name: str) -> str:
        """The state of a face's breaker."""
        return self.pools[name].breakers.upstream(name).state.value

    async def each(self, ask: Callable[[Face], Awaitable[Seen]], *names: str) -> dict[str, Seen]:
        """The same by all faces (or those) at once."""
        asked = [face for face in self.faces.values() if not names or face.name in names]
        seen = await asyncio.gather(*(ask(face) for face in asked))
        return {face.name: one for face, one in zip(asked, seen, strict=True)}

    async def call(self, *names: str) -> dict[str, Seen]:
        """A short call by all faces (or those)."""
        return await self.each(lambda face: face.call(), *names)

    async def running(self, tag: str) -> dict[str, asyncio.Task[Seen]]:
        """A call of each that runs until it is cancelled, and is being run."""
        calls = {
            name: asyncio.create_task(face.call("wait_cancel", tag=f"{tag}-{name}"))
            for name, face in self.faces.items()
        }
        await eventually(lambda: all(self.upstream.runs(f"{tag}-{name}") for name in calls), 30)
        return calls


@asynccontextmanager
async def callers(
    redis_url: str, upstream: Upstream, *, names: Sequence[str] = FACES, beside: Upstream | None = None, **options: Any
) -> AsyncGenerator[Callers]:
    """Everybody, or those who are named, with a session each. `options` are the upstream's; `beside` is another one."""
    servers = {name: upstream.config(**options, **({"affinity": name} if name in GATEWAY else {})) for name in FACES}
    if beside is not None:
        servers[BESIDE] = beside.config(affinity="none")
    config = parse_config(orjson.dumps({"mcpServers": servers}).decode(), "test", {})
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(SessionPool())
        fleet = await stack.enter_async_context(
            Fleet(redis_url, config=config, secret=SECRET, namespace="library", shutdown_grace_s=1)
        )
        gateway = await stack.enter_async_context(worker(redis_url, servers, LEASEHOLD_LEASE_TTL_MS="3000"))
        faces: list[Face] = [
            Library(LOAN, lambda: pool.session(config.servers[LOAN])),
            Library(SHARED, lambda: pool.session(config.servers[SHARED], affinity="a")),
            Library(FLEET, lambda: fleet.session(FLEET, affinity="a")),
            *(Gateway(name, Client(gateway, name)) for name in GATEWAY),
        ]
        pools = {LOAN: pool, SHARED: pool, FLEET: fleet.core.pool, **dict.fromkeys(GATEWAY, gateway.pool)}
        neighbours: list[Face] = [
            Library(BESIDE, lambda: pool.session(config.servers[BESIDE])),
            Library(BESIDE, lambda: fleet.session(BESIDE, affinity="a")),
            Gateway(BESIDE, Client(gateway, BESIDE)),
        ]
        made = Callers(
            upstream,
            {face.name: face for face in faces if face.name in names},
            pools,
            neighbours if beside is not None else [],
        )
        begun = await asyncio.gather(*(face.begin() for face in [*made.faces.values(), *made.neighbours]))
        assert all(one is None or one.what == "ok" for one in begun), begun
        seen = await made.call()
        assert set(whats(seen).values()) == {"ok"}, seen
        yield made


def whats(seen: dict[str, Seen]) -> dict[str, str]:
    """What each saw, without the details."""
    return {name: one.what for name, one in seen.items()}


def longest(seen: dict[str, Seen]) -> float:
    """Seconds until the last one saw something."""
    return max(one.seconds for one in seen.values())
