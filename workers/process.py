"""One worker process of `leasehold serve`: uvicorn around a Worker, from the fork to the last connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
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
    `announce`."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the supervisor passes on what it means
    uvloop.run(_serve(plan, listener, lifeline, announce))


async def _serve(plan: WorkerPlan, listener: socket.socket, lifeline: int, announce: int) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_reader(lifeline, stopping.set)
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
            timeout_graceful_shutdown=max(1, int(plan.settings.shutdown_grace_s)),
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
        loop.remove_reader(lifeline)
        worker.drain()
        server.should_exit = True
        stop.cancel()
        await serving


def _announce(pipe: int, incarnation: str) -> None:
    with contextlib.suppress(OSError):
        os.write(pipe, incarnation.encode() + b"\n")
