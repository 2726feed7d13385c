"""Cancellation at every await in turn."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


@types.coroutine
def cancelled_at(step: int, coro: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Run a coroutine in the current task, and cancel the task when it waits for the `step`-th time (from 1)."""
    task = asyncio.current_task()
    assert task is not None
    waits = 0
    failure: BaseException | None = None
    value: Any = None
    while True:
        try:
            future = coro.send(value) if failure is None else coro.throw(failure)
        except StopIteration as end:
            return end.value
        waits += 1
        if waits == step:
            task.cancel()
        failure = None
        try:
            value = yield future
        except BaseException as error:
            failure = error
