"""What a simulated world puts in place of the machine's: clocks and randomness; and what it watches besides."""

from __future__ import annotations

import itertools
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from leasehold.coordinator import member as coordinator_member
from leasehold.coordinator.inbox import Inbox
from leasehold.pool.breakers import Breakers

if TYPE_CHECKING:
    from .world import World


@contextmanager
def replaced(world: World, monotonic: Callable[..., float]) -> Generator[None, None, None]:
    """Inside, the code under test has this clock, which takes what `time.clock_gettime` takes, and this world's
    randomness; what it logs as an error with an exception is a problem."""
    with ExitStack() as stack:

        def swap(where: Any, name: str, value: Any) -> None:
            stack.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, value)

        times = SimpleNamespace(monotonic=monotonic, clock_gettime=monotonic)
        swap(sys.modules["leasehold.coordinator.clock"], "time", times)
        swap(Breakers.__init__, "__kwdefaults__", {**Breakers.__init__.__kwdefaults__, "now": monotonic})
        swap(os, "urandom", world.rng.randbytes)
        swap(coordinator_member, "Inbox", _counting_inbox(world.received))
        for name, module in list(sys.modules.items()):
            if name.startswith("leasehold."):
                for attribute, value in list(vars(module).items()):
                    if value is time.monotonic:
                        swap(module, attribute, monotonic)
                    elif value is random:
                        swap(module, attribute, world.rng)
        logger, errors = logging.getLogger("leasehold"), _ErrorLog(world)
        swap(logger, "propagate", False)
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        stack.callback(logger.removeHandler, errors)
        logger.addHandler(errors)
        yield


def _counting_inbox(received: dict[str, tuple[int, int]]) -> type[Inbox]:
    inboxes = itertools.count()

    class CountingInbox(Inbox):
        """Counts besides what it is given."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._name = f"inbox {next(inboxes)}"
            self._given = 0

        def receive(self, envelope: bytes) -> None:
            super().receive(envelope)
            self._given += 1
            s = self.statistics
            received[self._name] = self._given, s.envelopes + s.repeated + s.refused

    return CountingInbox


class _ErrorLog(logging.Handler):
    """What is logged as an error with an exception is a bug that somebody caught."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not self._world.is_over:
            self._world.problem(f"logged: {record.getMessage()}", record.exc_info[1])
