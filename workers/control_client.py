"""Asking a worker for something that is no call of a session; see `control.py` for what there is."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson

from ..coordinator import Registration, Unavailable
from .asgi import Kept, Scope, silent
from .errors import BrokenOff, NotRun, OutcomeUnknown
from .exchange import CONTROL
from .forwarder import Forwarder

ASK_S: Final = 5.0
"""How long a worker may take to do what it is asked to."""


class ControlError(Exception):
    """Raised when a worker did not do what it was asked to; the message is for the operator."""


async def ask(forwarder: Forwarder, worker: str, operation: str, key: str = "", **body: Any) -> Any:
    """Have a worker (its incarnation) do something, and return what it answers. Raises `ControlError`, in `ASK_S`."""
    scope: Scope = {"type": "http", "method": "POST", "path": f"/{operation}/{key}", "headers": []}
    kept = Kept()
    try:
        async with asyncio.timeout(ASK_S):
            await forwarder.forward(Registration(worker, 0), CONTROL, scope, orjson.dumps(body), silent, kept.send)
    except (NotRun, OutcomeUnknown, BrokenOff, Unavailable) as error:
        raise ControlError(f"worker {worker[:8]} did not answer: {error}") from error
    except TimeoutError:
        raise ControlError(f"worker {worker[:8]} did not answer within {ASK_S:g} s") from None
    answer: Any = orjson.loads(kept.body)
    if kept.status != 200:
        raise ControlError(f"worker {worker[:8]}: {answer['error']}")
    return answer
