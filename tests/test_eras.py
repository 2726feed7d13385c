"""What teaches the gateway that an upstream is of the handshake era only, for everybody: a refused probe, and nothing
else."""

from __future__ import annotations

from typing import Any

import pytest
from leasehold.pool import error_body, parse
from leasehold.workers import eras
from leasehold.workers.eras import REMEMBER_S, Eras

pytestmark = pytest.mark.anyio

VERSION = "2026-07-28"
PROBE = "server/discover"
OLD = error_body(-32600, "Bad Request: Missing session ID")


async def answer(
    known: Eras, status: int, body: bytes = OLD, *, method: str = PROBE, version: str = VERSION, pieces: int = 1
) -> list[Any]:
    """Let an upstream answer a request; what reached its client."""
    seen: list[Any] = []

    async def send(message: Any) -> None:
        seen.append(message)

    request = parse(b'{"jsonrpc":"2.0","id":1,"method":"%b"}' % method.encode())
    watching = known.watch("a", version, request, send)
    sent: list[Any] = [{"type": "http.response.start", "status": status, "headers": []}]
    size = max(1, -(-len(body) // pieces))
    parts = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    sent += [{"type": "http.response.body", "body": part, "more_body": True} for part in parts[:-1]]
    sent.append({"type": "http.response.body", "body": parts[-1]})
    for message in sent:
        await watching(message)
    assert seen == sent, "everything is passed on as it is"
    return seen


@pytest.mark.parametrize("status", [400, 404, 405, 406, 415, 422])
@pytest.mark.parametrize("body", [OLD, b"", b"<html>", b'{"detail":"no"}', error_body(-32000, "no session")])
@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_refused_probe_that_was_not_understood_is_remembered(status: int, body: bytes, pieces: int) -> None:
    """B48"""
    known = Eras()
    await answer(known, status, body, pieces=pieces)
    assert known.is_handshake_only("a")
    assert not known.is_handshake_only("b")


@pytest.mark.parametrize("code", [-32022, -32021, -32020, -32601, -32602])
async def test_a_refusal_in_the_words_of_the_newer_era_teaches_nothing(code: int) -> None:
    known = Eras()
    await answer(known, 400, error_body(code, "no", id=1))
    assert not known.is_handshake_only("a")


@pytest.mark.parametrize("method", ["tools/call", "tools/list", "ping", "initialize"])
@pytest.mark.parametrize("status", [400, 404, 405])
async def test_one_client_s_bad_request_marks_the_upstream_for_nobody(method: str, status: int) -> None:
    known = Eras()
    await answer(known, status, method=method)
    await answer(known, status, version="2099-01-01")
    assert not known.is_handshake_only("a")


@pytest.mark.parametrize("status", [401, 403, 408, 429, 500, 502, 503])
async def test_a_refusal_for_another_reason_teaches_nothing(status: int) -> None:
    known = Eras()
    await answer(known, status, b"")
    assert not known.is_handshake_only("a")


@pytest.mark.parametrize("method", [PROBE, "tools/call"])
async def test_an_upstream_that_answers_the_newer_era_is_of_it(method: str) -> None:
    known = Eras()
    await answer(known, 400)
    await answer(known, 200, b'{"jsonrpc":"2.0","id":1,"result":{}}', method=method)
    assert not known.is_handshake_only("a")


async def test_what_was_learnt_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(eras, "monotonic", lambda: now)
    known = Eras()
    await answer(known, 400)
    now += REMEMBER_S - 1
    assert known.is_handshake_only("a")
    now += 2
    assert not known.is_handshake_only("a")
