"""The health check of a session: a chain of harmless requests, of which the first one that is answered decides (B10).

    "method not found"       the server does not have this one: the next step is asked
    any other answer         healthy, a JSON-RPC error included: see below
    a timeout, `PoolError`   unhealthy, and nothing more is asked: no later step can mask it
    `skip`                   taken as healthy, without asking
    the chain ran out        unhealthy: nobody answered

An error is an answer: the conversation stands, and an application error keeps a session (B6). Servers that know no
`ping` refuse it in many ways (-32600, -32602, -32603), and ending a session for that would end each of theirs at its
first check, with the state in it. Excepted are two codes by which the SDKs, and bridges made of them, say that what
stands *behind* the answer has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from .errors import PoolError
from .jsonrpc import METHOD_NOT_FOUND

METHODS: Final[Mapping[str, str | None]] = {
    "ping": "ping",
    "list_tools": "tools/list",
    "list_prompts": "prompts/list",
    "list_resources": "resources/list",
    "skip": None,
}
"""The steps there are, and the method that each asks for."""

GONE: Final = {-32000: "connection closed", -32001: "request timed out, or session not found"}

Ask = Callable[[str], Awaitable[Mapping[str, Any]]]
"""Asks for a method on the session in question; returns the response (`result` or `error`), or raises `PoolError`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a session may be used. `step` is the one that decided, "" where none did; `reason` quotes nothing of
    the server's."""

    healthy: bool
    step: str
    reason: str


async def check(ask: Ask, chain: Sequence[str], timeout_s: float) -> Verdict:
    """Ask step by step; `timeout_s` is for the chain as a whole. Raises ValueError for a step that does not exist."""
    unknown = [step for step in chain if step not in METHODS]
    if unknown:
        raise ValueError(f"expected steps out of {', '.join(METHODS)}, got {unknown[0]!r}")
    step = ""
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            for step in chain:
                method = METHODS[step]
                if method is None:
                    return Verdict(True, step, "not asked")
                verdict = _judge(step, await ask(method))
                if deadline.expired():  # and what was asked did not mind its cancellation
                    raise TimeoutError
                if verdict is not None:
                    return verdict
    except TimeoutError:
        return Verdict(False, step, "timeout")
    except PoolError as error:
        return Verdict(False, step, type(error).__name__)
    return Verdict(False, "", "no step was answered")


def _judge(step: str, response: Mapping[str, Any]) -> Verdict | None:
    """What an answer says; None: nothing, ask on."""
    error = response.get("error")
    if error is None:
        return Verdict(True, step, "answered") if "result" in response else Verdict(False, step, "no response")
    code = cast("dict[str, Any]", error).get("code") if isinstance(error, dict) else None
    if not isinstance(code, int):
        return Verdict(False, step, "no response")
    if code == METHOD_NOT_FOUND:
        return None
    if code in GONE:
        return Verdict(False, step, f"error {code}: {GONE[code]}")
    return Verdict(True, step, f"answered with error {code}")
