"""Upstreams of one name that differ are two; what is kept for each goes with it; and what its end is told with."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace

import httpx2
import orjson
import pytest
from aiohttp import web
from faults import eventually
from leasehold.pool import (
    CircuitOpen,
    HttpTarget,
    OAuth,
    OpenFailed,
    PoolTimeout,
    SessionPool,
    StdioTarget,
    Upstream,
    UpstreamRefused,
)
from leasehold.pool.borrowing import Want
from lending_pool import at_rest, lending
from scripted import scripted

pytestmark = pytest.mark.anyio


class Closed:
    """A server that wants one of some tokens, and forgets a session when it is told to."""

    def __init__(self, *tokens: str, delete: int = 200) -> None:
        self.tokens = {f"Bearer {token}" for token in tokens}
        self.delete = delete
        self.live: dict[str, str] = {}
        self.opened = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        who = request.headers.get("authorization", "")
        if who not in self.tokens:
            return web.Response(status=401)
        if request.method == "DELETE":
            if self.delete == 200:
                self.live.pop(request.headers["mcp-session-id"], None)
            return web.Response(status=self.delete)
        if request.method == "GET":
            return web.Response(status=405)
        message = orjson.loads(await request.read())
        if "id" not in message:
            return web.Response(status=202)
        headers, result = {}, {}
        if message["method"] == "initialize":
            self.opened += 1
            headers["mcp-session-id"] = session = f"s{self.opened}"
            self.live[session] = who
            result = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}}
        return web.json_response({"jsonrpc": "2.0", "id": message["id"], "result": result}, headers=headers)


class Bearer(httpx2.Auth):
    """Presents one token."""

    def __init__(self, token: str) -> None:
        self.token = token

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        request.headers["authorization"] = f"Bearer {self.token}"
        yield request


TARGET = HttpTarget("http://127.0.0.1:1/mcp", (("authorization", "Bearer alice"),))
BASE = Upstream("x", TARGET)
OTHERS = [
    replace(BASE, name="y"),
    replace(BASE, target=HttpTarget("http://127.0.0.1:2/mcp", TARGET.headers)),
    replace(BASE, target=HttpTarget(TARGET.url, (("authorization", "Bearer bob"),))),
    replace(BASE, call_timeout_s=1.0),
    replace(BASE, max_sessions=1),
    replace(BASE, idempotent_tools=frozenset({"a"})),
    replace(BASE, oauth=OAuth("id", "secret")),
    replace(BASE, oauth=OAuth("id", "another secret")),
    replace(BASE, target=StdioTarget("a", env={"A": "1", "B": "2"})),
    replace(BASE, target=StdioTarget("a", env={"A": "1", "B": "3"})),
]


def test_upstreams_have_one_identity_if_and_only_if_they_are_equal() -> None:
    """B17"""
    assert len({one.identity for one in [BASE, *OTHERS]}) == len(OTHERS) + 1
    for one in [BASE, *OTHERS]:
        assert replace(one).identity == one.identity
    reordered = replace(OTHERS[-1], target=StdioTarget("a", env={"B": "3", "A": "1"}))
    assert reordered == OTHERS[-1]
    assert reordered.identity == OTHERS[-1].identity
    assert replace(BASE, idle_ttl_s=1800) == BASE
    assert replace(BASE, idle_ttl_s=1800).identity == BASE.identity
    assert BASE.identity not in repr(BASE)


async def test_an_upstream_of_the_same_name_with_other_settings_never_lends_the_others_session() -> None:
    """B17: however it is asked for, and though its session is idle."""
    async with lending() as pool:
        had: list[int] = []
        for upstream in [BASE, *OTHERS]:
            for affinity in (None, "x"):
                borrow = await pool.acquire(Want(upstream, principal="p", affinity=affinity))
                assert borrow.session.upstream is upstream
                had.append(id(borrow.session.link))
                borrow.release()
        assert len(set(had)) == len(had)
        again = await pool.acquire(Want(replace(BASE), principal="p"))
        assert again.session.upstream == BASE
        again.release()
        await at_rest(pool)


async def test_a_configured_header_that_is_rotated_takes_effect_at_the_next_loan() -> None:
    """B17, B18: also for who shares, and for calls that belong to no session."""
    server = Closed("old", "new")
    async with scripted(server.answer) as served, SessionPool() as pool:
        for token in ("old", "new"):
            upstream = Upstream("x", HttpTarget(served.url, (("authorization", f"Bearer {token}"),)), max_sessions=1)
            async with pool.session(upstream, principal="alice") as session:
                await session.send_ping()
            assert served.requests[-1] == f"POST /mcp Bearer {token}"
            link = pool.stateless(upstream)
            assert link is not None
            assert link is pool.stateless(replace(upstream))
        assert server.opened == 2
        # The limit counts what has the name: the old one had to make room.
        await eventually(lambda: list(server.live.values()) == ["Bearer new"])


async def test_limits_count_what_has_the_same_name() -> None:
    """B5: the name is the server, whatever the settings."""
    one = Upstream("x", TARGET, max_sessions=1)
    async with lending() as pool:
        held = await pool.acquire(Want(one))
        with pytest.raises(PoolTimeout):
            await pool.acquire(Want(replace(one, call_timeout_s=1.0)), timeout_s=0.05)
        (await pool.acquire(Want(replace(one, max_sessions=2)))).release()
        held.release()


async def test_what_is_kept_of_an_upstream_goes_with_its_last_session() -> None:
    """B44: a thousand upstreams that came and went."""
    async with lending() as pool:
        for number in range(1_100):
            upstream = replace(BASE, name=f"u{number}")
            (await pool.acquire(Want(upstream))).release(discard=True)
            session = pool.begin(f"key{number}", upstream, "p")
            session.close("idle")
            assert pool.stateless(upstream) is not None
        await at_rest(pool)
        del session
        gc.collect()
        assert not pool._ledger.limits
        assert not pool._lending._wants
        assert not pool._telling
        assert len(pool._opener._stateless) == 1_000


async def test_the_end_is_told_with_the_credentials_of_the_last_holder(caplog: pytest.LogCaptureFixture) -> None:
    """B11, B18: else the server refuses, and the session lives on there."""
    server = Closed("first", "second", "third")
    async with scripted(server.answer) as served:
        upstream = Upstream("x", HttpTarget(served.url))
        with caplog.at_level(logging.INFO, logger="leasehold.pool"):
            async with SessionPool() as pool:
                for token in ("first", "second"):
                    async with pool.session(upstream, principal="alice", headers={"authorization": f"Bearer {token}"}):
                        pass
                async with pool.link(upstream, principal="bob", auth=Bearer("third")):
                    pass
        told = [request for request in served.requests if request.startswith("DELETE")]
        assert sorted(told) == ["DELETE /mcp Bearer second", "DELETE /mcp Bearer third"]
        assert server.live == {}
        assert "upstream_not_told" not in caplog.text


@pytest.mark.parametrize(("status", "is_logged"), [(404, False), (405, False), (401, True), (500, True)])
async def test_an_upstream_that_will_not_end_a_session_is_logged(
    status: int, caplog: pytest.LogCaptureFixture, *, is_logged: bool
) -> None:
    """B11"""
    server = Closed("a", delete=status)
    async with scripted(server.answer) as served:
        async with SessionPool() as pool:
            async with pool.link(Upstream("x", HttpTarget(served.url)), headers={"authorization": "Bearer a"}):
                pass
        assert any(request.startswith("DELETE") for request in served.requests)
    assert (f"upstream_not_told upstream=x status={status}" in caplog.text) == is_logged
    assert "Bearer" not in caplog.text


async def test_an_auth_that_is_refused_opens_no_circuit_for_another() -> None:
    """B16: neither for the nameless, nor for one of the same name who has a better one."""
    server = Closed("good")
    async with scripted(server.answer) as served, SessionPool() as pool:
        upstream = Upstream("x", HttpTarget(served.url))
        for principal in (None, "carol"):
            bad = Bearer("bad")
            for _ in range(5):
                with pytest.raises(OpenFailed) as refused:
                    await pool.acquire(Want(upstream, principal=principal, auth=bad))
                assert isinstance(refused.value.__cause__, UpstreamRefused)
            with pytest.raises(CircuitOpen):
                await pool.acquire(Want(upstream, principal=principal, auth=bad))
            (await pool.acquire(Want(upstream, principal=principal, auth=Bearer("good")))).release()


async def test_nameless_auths_have_each_a_limit_of_their_own() -> None:
    """B5, B17"""
    async with lending() as pool:
        upstream = Upstream("x", TARGET, max_sessions_per_principal=1)
        one, another = Bearer("a"), Bearer("b")
        held = await pool.acquire(Want(upstream, auth=one), timeout_s=5)
        (await pool.acquire(Want(upstream, auth=another), timeout_s=5)).release()
        with pytest.raises(PoolTimeout):
            await pool.acquire(Want(upstream, auth=one), timeout_s=0.05)
        held.release()
