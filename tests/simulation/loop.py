"""An event loop in virtual time, without sockets: it runs only when it is told to, one turn at a time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context
from typing import Any, Final, TypeVar

T = TypeVar("T")

RESOLUTION_S: Final = 1e-9
"""A timer that is due so soon is due now: times of different clocks do not add up to the last digit."""

Connect = Callable[[Callable[[], asyncio.Protocol]], Coroutine[Any, Any, tuple[asyncio.Transport, asyncio.Protocol]]]
"""Makes a connection, for the protocol that a factory makes."""


class SimLoop(asyncio.AbstractEventLoop):
    """The loop of one simulated process.

    As in a real one, what arrived comes before timers that are due, and what a turn schedules runs in the next one.
    `clock` is the process's own: it may differ from those of others.
    """

    def __init__(
        self, clock: Callable[[], float], connect: Connect, on_error: Callable[[dict[str, Any]], None]
    ) -> None:
        self._clock = clock
        self._connect = connect
        self._on_error = on_error
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()

    # -- for the simulator -----------------------------------------------------------------------------------------

    @property
    def next_timer(self) -> float | None:
        """When the next timer is due, by this process's clock."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    @property
    def has_work(self) -> bool:
        """Whether a turn would run anything now."""
        due = self.next_timer
        return bool(self._ready) or (due is not None and due <= self.time() + RESOLUTION_S)

    def turn(self) -> None:
        """Run what is ready now."""
        now = self.time() + RESOLUTION_S
        while (due := self.next_timer) is not None and due <= now:
            self._ready.append(heapq.heappop(self._timers)[2])
        with self.entered():
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()

    @contextmanager
    def entered(self) -> Generator[None, None, None]:
        """Inside, this is the running loop."""
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(finalizer=self._finalize)
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _finalize(self, generator: AsyncGenerator[Any, None]) -> None:
        self.call_soon(self.create_task, generator.aclose())

    # -- for the code that runs on it ------------------------------------------------------------------------------

    def time(self) -> float:
        return self._clock()

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is dropped when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    async def create_connection(
        self, protocol_factory: Callable[[], asyncio.Protocol], *_address: Any, **_options: Any
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        return await self._connect(protocol_factory)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._on_error(context)
