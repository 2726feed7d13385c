"""What all tests share: one real Redis per test process, empty for each test, and no task that outlives its test."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import wraps
from typing import Any

import pytest
import redis
from leasehold.coordinator.embedded import EmbeddedRedis

LEAK_LIMIT_S = 2.0
TEST_LIMIT_S = 110.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """The real Redis of this test process. A test that stops or restarts a server has one of its own."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """A real Redis, empty."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
    return redis_server.url


@pytest.fixture
def at_end() -> AsyncExitStack:
    """What a test's fixtures want closed when it ends, before it is asked which tasks it has left."""
    return AsyncExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _leaving_no_task(item.obj, item.funcargs.get("at_end", AsyncExitStack()))


def _leaving_no_task(test: Callable[..., Awaitable[None]], at_end: AsyncExitStack) -> Callable[..., Awaitable[None]]:
    @wraps(test)
    async def checked(*args: Any, **kwargs: Any) -> None:
        before = asyncio.all_tasks()
        # The plugin's own limit is a signal, which does not end a coroutine that loops under uvloop.
        async with asyncio.timeout(TEST_LIMIT_S):
            async with at_end:
                await test(*args, **kwargs)
        leaked = asyncio.all_tasks() - before
        if leaked:  # those that are on their way out have the time to
            _, leaked = await asyncio.wait(leaked, timeout=LEAK_LIMIT_S)
        assert not leaked, f"tasks outlive the test: {[task.get_name() for task in leaked]}"

    return checked
