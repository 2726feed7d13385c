"""One question at a time for each name, for any number that ask it.

An answer is as old as its question: who asks while one is under way shares the next, which is asked after he came. If
the one under way fails, so do they.
(https://pkg.go.dev/golang.org/x/sync/singleflight has those that come meanwhile share the one under way.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Asks `ask(name)`. Who waits may be cancelled: the question goes on."""

    def __init__(self, ask: Callable[[str], Awaitable[T]]) -> None:
        self._ask = ask
        self._next: dict[str, asyncio.Task[T]] = {}
        self._under_way: dict[str, asyncio.Task[T]] = {}

    def __repr__(self) -> str:
        return f"<SingleFlight under_way={len(self._under_way)}>"

    async def __call__(self, name: str) -> T:
        """The answer to a question that is asked from now on; raises what asking it raised."""
        task = self._next.get(name)
        if task is None:
            task = self._next[name] = asyncio.get_running_loop().create_task(self._run(name), name="leasehold-ask")
            task.add_done_callback(_retrieved)
        return await asyncio.shield(task)

    async def _run(self, name: str) -> T:
        before = self._under_way.get(name)
        try:
            if before is not None:
                await asyncio.wait({before})
                if not before.cancelled() and (failure := before.exception()) is not None:
                    raise failure  # or those who come would wait for one time limit after the other
        finally:
            own = self._next.pop(name)
        self._under_way[name] = own
        try:
            return await self._ask(name)
        finally:
            if self._under_way.get(name) is own:
                del self._under_way[name]


def _retrieved(task: asyncio.Task[T]) -> None:
    if not task.cancelled():
        task.exception()  # who asked may have left
