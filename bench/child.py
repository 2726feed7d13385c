"""Processes of a bench that are told what to do: one JSON line in, one JSON line out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
PATIENCE_S = 60


class Child:
    """A process of ours, started from `bench/`; ended at the end of the block."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self) -> Any:
        """The next line that it says."""
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args[1]} has ended")
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.read()


def say(answer: Any) -> None:
    """In the child: one answer."""
    print(json.dumps(answer), flush=True)


async def obey(do: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
    """In the child: answer commands until the parent closes the pipe."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(await do(json.loads(line)))
