"""A `ClientSession` in a task of its own, so that whoever uses it may do so, and end it, from any task."""

from __future__ import annotations

import asyncio

from mcp import ClientSession

from .errors import SessionClosed


class HostedClient:
    """Enters a client, keeps it entered until `aclose`, and leaves it: all in one task."""

    def __init__(self, client: ClientSession) -> None:
        self._client = client
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._ending: asyncio.Future[None] = loop.create_future()
        self._task = loop.create_task(self._run(), name="leasehold-client")

    @property
    def is_ready(self) -> bool:
        """Whether what the server sends is taken."""
        return self._ready.done()

    async def wait_ready(self) -> None:
        """Return when it is ready; the caller may be cancelled."""
        await asyncio.shield(self._ready)

    async def aclose(self) -> None:
        """End its tasks; callbacks that still run are cancelled."""
        if not self._ending.done():
            self._ending.set_result(None)
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        try:
            async with self._client:
                self._ready.set_result(None)
                await self._ending
        except BaseException as error:
            if self._ready.done():
                raise
            failure = error if isinstance(error, Exception) else SessionClosed("it ended as it was opened")
            self._ready.set_exception(failure)
            self._ready.exception()  # retrieved: who waits may have been cancelled
            if not isinstance(error, Exception):
                raise
