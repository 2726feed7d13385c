"""One worker process of `leasehold serve`: uvicorn around a Worker, from the fork to the last connection.

It stops in one of two ways. When the lifeline closes, everything stops, or the supervisor is dead. At SIGTERM it stops
alone, and its siblings go on with its sessions. One deadline, the grace time from then on, is for its own connections
and for what it runs for others; closing its sessions comes after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import uvicorn

from ..pool import Config
from .settings import Settings
from .worker import Worker

if sys.platform != "win32":
    import uvloop

logger = logging.getLogger("leasehold.workers.process")

SECOND_LOOK_S: Final = 0.2
"""Some service managers send SIGTERM to all processes at once: how long the lifeline has then to close, too."""
KEEP_ALIVE_S: Final = 75
"""How long an idle client connection is kept: longer than the 60 s of common load balancers."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What a worker process is started with. `secrets` is never printed."""

    settings: Settings
    config: Config
    redis_url: str
    secrets: list[bytes]
    ephemeral: bool
    index: int

    def __repr__(self) -> str:
        return f"<WorkerPlan {self.index}>"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: a stop begins with the drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def run_worker(plan: WorkerPlan, listener: socket.socket, *, lifeline: int, announce: int) -> None:
    """Serve until SIGTERM, or until `lifeline` (a pipe from the supervisor) closes; each incarnation is written to
    `announce`, a pipe that does not block."""
    uvloop.run(_serve(plan, listener, lifeline, announce))


async def _serve(plan: WorkerPlan, listener: socket.socket, lifeline: int, announce: int) -> None:
    loop = asyncio.get_running_loop()
    stopping, all_stop = asyncio.Event(), asyncio.Event()

    def lifeline_closed() -> None:
        loop.remove_reader(lifeline)
        all_stop.set()
        stopping.set()

    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_reader(lifeline, lifeline_closed)
    grace_s = plan.settings.shutdown_grace_s
    worker = Worker(
        plan.settings,
        plan.config,
        redis_url=plan.redis_url,
        secrets=plan.secrets,
        ephemeral=plan.ephemeral,
        index=plan.index,
    )
    worker.on_joined = lambda incarnation: _announce(announce, incarnation)
    server = _Server(
        uvicorn.Config(
            worker,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, math.ceil(grace_s)),
            backlog=2048,
        )
    )
    async with worker.running():
        # What is here now stays: without it in the way, a full collection takes milliseconds instead of a quarter
        # second.
        gc.collect()
        gc.freeze()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        stop_by = loop.time() + grace_s
        worker.ephemeral = plan.ephemeral and await _closes_soon(all_stop)
        worker.drain()
        server.should_exit = True
        await serving
        worker.grace_s = max(0.0, stop_by - loop.time())


async def _closes_soon(closed: asyncio.Event) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SECOND_LOOK_S):
            await closed.wait()
    return closed.is_set()


def _announce(pipe: int, incarnation: str) -> None:
    try:
        os.write(pipe, incarnation.encode() + b"\n")
    except OSError as error:  # full: the supervisor hangs; then it cannot end this lease early, and it lapses
        logger.warning("not_announced incarnation=%s error=%s", incarnation[:8], error.strerror)
