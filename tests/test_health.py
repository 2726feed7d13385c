"""B10: the health-check chain, and which answers let a session live."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from leasehold.pool import CallTimeout, OpenFailed, PoolError, SessionClosed, UpstreamLost
from leasehold.pool.health import METHODS, Verdict, check

pytestmark = pytest.mark.anyio

ALL = ("ping", "list_tools", "list_prompts", "list_resources", "skip")
LONG_S = 60.0

OK = {"jsonrpc": "2.0", "id": "1", "result": {}}


def error(code: object) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": "1", "error": {"code": code, "message": "Bearer s3cret"}}


UNKNOWN_METHOD = error(-32601)
SILENCE = object()


class Server:
    """Answers one method after the other by the script: a response, an exception, or nothing at all."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.asked: list[str] = []

    async def __call__(self, method: str) -> dict[str, Any]:
        self.asked.append(method)
        answer = self.script.pop(0)
        if answer is SILENCE:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_b10_the_default_chain_asks_one_ping_and_no_more() -> None:
    server = Server(OK)
    assert await check(server, ("ping", "skip"), LONG_S) == Verdict(True, "ping", "answered")
    assert server.asked == ["ping"]


async def test_b10_method_not_found_moves_on_to_the_next_step() -> None:
    server = Server(UNKNOWN_METHOD, UNKNOWN_METHOD, UNKNOWN_METHOD, OK)
    assert await check(server, ALL, LONG_S) == Verdict(True, "list_resources", "answered")
    assert server.asked == ["ping", "tools/list", "prompts/list", "resources/list"]


async def test_b10_skip_is_healthy_without_asking() -> None:
    server = Server(UNKNOWN_METHOD)
    assert await check(server, ("skip",), LONG_S) == Verdict(True, "skip", "not asked")
    assert server.asked == []
    assert await check(server, ("ping", "skip"), LONG_S) == Verdict(True, "skip", "not asked")


async def test_b10_a_chain_that_ran_out_is_unhealthy() -> None:
    for chain in ((), ("ping",), ("ping", "list_tools")):
        verdict = await check(Server(*[UNKNOWN_METHOD] * 2), chain, LONG_S)
        assert verdict == Verdict(False, "", "no step was answered")


async def test_b10_skip_never_masks_a_timeout() -> None:
    server = Server(SILENCE)
    assert await check(server, ALL, 0.01) == Verdict(False, "ping", "timeout")
    assert server.asked == ["ping"]


async def test_b10_the_deadline_covers_the_whole_chain() -> None:
    """Steps of which none takes as long as the deadline, but all together do."""
    clock = asyncio.get_running_loop().time
    begun = clock()

    async def slow(method: str) -> dict[str, Any]:
        await asyncio.sleep(0.2)
        return UNKNOWN_METHOD

    verdict = await check(slow, ("ping", *["list_tools"] * 1000), 0.3)
    assert (verdict.healthy, verdict.reason) == (False, "timeout")
    assert clock() - begun < 20


async def test_b10_an_answer_after_the_deadline_is_a_timeout_however_it_came() -> None:
    async def stubborn(method: str) -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return UNKNOWN_METHOD
        raise AssertionError

    assert await check(stubborn, ("ping", "skip"), 0.01) == Verdict(False, "ping", "timeout")


@pytest.mark.parametrize(
    "failure", [UpstreamLost("gone"), SessionClosed("closed"), CallTimeout("silent"), OpenFailed("refused")]
)
async def test_b10_a_failure_of_the_pool_ends_the_chain_at_once(failure: PoolError) -> None:
    server = Server(UNKNOWN_METHOD, failure)
    verdict = await check(server, ALL, LONG_S)
    assert verdict == Verdict(False, "list_tools", type(failure).__name__)
    assert server.asked == ["ping", "tools/list"]


async def test_b10_a_timeout_of_the_asker_is_one() -> None:
    assert await check(Server(TimeoutError()), ("ping", "skip"), LONG_S) == Verdict(False, "ping", "timeout")


@pytest.mark.parametrize("code", [-32600, -32602, -32603, -32700, -32002, 0, 401, 10**30])
async def test_b6_an_error_is_an_answer_and_keeps_the_session(code: int) -> None:
    """B6, B10: servers refuse a `ping` that they do not know in many ways; the conversation stands."""
    server = Server(error(code))
    verdict = await check(server, ALL, LONG_S)
    assert verdict == Verdict(True, "ping", f"answered with error {code}")
    assert server.asked == ["ping"]


@pytest.mark.parametrize("code", [-32000, -32001])
async def test_b10_an_error_that_says_the_connection_behind_has_gone_is_unhealthy(code: int) -> None:
    server = Server(error(code))
    verdict = await check(server, ALL, LONG_S)
    assert (verdict.healthy, verdict.step) == (False, "ping")
    assert server.asked == ["ping"]


@pytest.mark.parametrize(
    "nonsense", [{}, {"error": None}, {"error": "no"}, {"error": {}}, error("-32601"), error(None)]
)
async def test_b10_what_is_no_response_is_unhealthy(nonsense: dict[str, Any]) -> None:
    assert await check(Server(nonsense), ALL, LONG_S) == Verdict(False, "ping", "no response")


@pytest.mark.parametrize("answer", [error(-32603), error(-32000), UpstreamLost("Bearer s3cret")])
async def test_b19_a_verdict_quotes_nothing_of_the_servers(answer: Any) -> None:
    assert "s3cret" not in repr(await check(Server(answer), ALL, LONG_S))


async def test_an_unknown_step_is_an_error_before_anything_is_asked() -> None:
    server = Server(OK)
    with pytest.raises(ValueError, match=r"expected steps out of ping, .* got 'pong'"):
        await check(server, ("ping", "pong"), LONG_S)
    assert server.asked == []


async def test_b3_a_check_that_is_cancelled_is_cancelled() -> None:
    """B3: the cancellation of the caller is no timeout of the chain."""
    server = Server(SILENCE)
    task = asyncio.create_task(check(server, ALL, LONG_S))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_every_step_but_skip_asks_for_a_method_of_its_own() -> None:
    for step, method in METHODS.items():
        server = Server(OK)
        assert (await check(server, (step,), LONG_S)).step == step
        assert server.asked == ([] if step == "skip" else [method])
