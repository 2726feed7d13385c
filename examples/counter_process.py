"""The counter server in a process of its own, for examples that need one."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STDIO = [sys.executable, str(HERE / "counter_stdio.py")]
"""The command of the same server on standard input and output."""


@contextmanager
def counter_server() -> Iterator[str]:
    """Run it on a free port until the end of the block; yields its URL."""
    command = [sys.executable, str(HERE / "counter_http.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            found = re.search(r"http://\S+", server.stdout.readline())
            if found is None:
                raise SystemExit("the counter server did not start")
            yield found[0]
        finally:
            server.terminate()


def text_of(result: Any) -> str:
    """The text of a tool's result."""
    return " ".join(block.text for block in result.content)
