"""Sessions that are no client's own: affinity `principal`, one for all of a principal's clients on any worker, and
`none`, any pooled one."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from aiohttp import web
from faults import eventually
from whole_workers import VERSION, Client, Upstream, upstream, worker

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stub(anyio_backend: Any) -> Any:
    async with upstream() as made:
        yield made


def servers(stub: Upstream, affinity: str, **options: Any) -> dict[str, Any]:
    return {"counter": {"url": stub.url, "leasehold": {"affinity": affinity, **options}}}


async def initialized(*workers: Any, headers: Any = ()) -> list[Client]:
    clients = [Client(each, headers=list(headers)) for each in workers]
    for client in clients:
        await client.initialize()
    return clients


async def test_clients_of_one_principal_share_one_session_on_any_worker(redis_url: str, stub: Upstream) -> None:
    """B12"""
    config = servers(stub, "principal")
    async with worker(redis_url, config) as one, worker(redis_url, config) as two:
        clients = await initialized(one, two, one, two)
        assert len({client.session_id for client in clients}) == 4
        assert [await client.count() for client in clients] == [2, 3, 4, 5], "one session; 1 was `initialized`"
        assert len(stub.counts) == 1
        for client in clients:
            client.worker = two if client.worker is one else one
        assert [await client.count() for client in clients] == [6, 7, 8, 9]
        assert len(one.pool) + len(two.pool) == 1


async def test_b12_concurrent_first_calls_on_all_workers_open_one_session(redis_url: str, stub: Upstream) -> None:
    config = servers(stub, "principal")
    async with worker(redis_url, config) as one, worker(redis_url, config) as two:
        clients = [Client(each) for each in (one, two) * 10]
        await asyncio.gather(*(client.initialize() for client in clients))
        counts = await asyncio.gather(*(client.count() for client in clients))
        assert sorted(counts) == list(range(2, 22))
        assert len(stub.counts) == 1


@pytest.mark.parametrize("affinity", ["principal", "none"])
async def test_b17_principals_never_share(redis_url: str, stub: Upstream, affinity: str) -> None:
    async with worker(redis_url, servers(stub, affinity)) as one:
        (alice,) = await initialized(one, headers=[(b"authorization", b"Bearer a")])
        (bob,) = await initialized(one, headers=[(b"authorization", b"Bearer b")])
        assert (await alice.count(), await bob.count()) == (2, 2)
        assert len(stub.counts) == 2
        bob.session_id = alice.session_id
        assert (await bob.send("POST", "ping"))[0] == 404
        bob.session_id = "x" * 48
        assert (await bob.send("POST", "ping"))[0] == 404


async def test_b7_a_session_that_the_upstream_has_forgotten_is_opened_anew_by_the_next_call(
    redis_url: str, stub: Upstream
) -> None:
    async with worker(redis_url, servers(stub, "principal")) as one:
        (client,) = await initialized(one)
        assert await client.count() == 2
        stub.counts.clear()
        status, _ = await client.send("POST", "tools/call", {"name": "count"})
        assert status == 404, "its state is lost, and its client is told"
        assert await client.count() == 2, "a fresh session"


async def test_a_shared_session_goes_on_at_another_worker_after_its_owner_stopped(
    redis_url: str, stub: Upstream
) -> None:
    config = servers(stub, "principal")
    async with worker(redis_url, config) as two:
        async with worker(redis_url, config) as one:
            (client,) = await initialized(one)
            assert await client.count() == 2
            owned = one.sessions.all()[0]
            await eventually(lambda: owned.sealed is not None)
        client.worker = two
        assert await client.count() == 3
        status, answer = await client.send("POST", "initialize", {"protocolVersion": VERSION})
        assert (status, answer["result"]["serverInfo"]["name"]) == (200, "s")
    assert stub.deleted == []


async def test_ids_of_clients_that_count_alike_do_not_meet_upstream(redis_url: str) -> None:
    """Both clients' ids begin with 1; upstream each request has one of its own, and each client gets its own back."""
    seen: list[Any] = []

    async def serve(request: web.Request) -> web.Response:
        message = orjson.loads(await request.read())
        if message["method"] == "initialize":
            result: Any = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
            body = {"jsonrpc": "2.0", "id": message["id"], "result": result}
            return web.json_response(body, headers={"mcp-session-id": "one"})
        if "id" not in message:
            return web.Response(status=202)
        seen.append(message["id"])
        token = message["params"].get("_meta", {}).get("progressToken")
        events = b""
        if token is not None:
            note = {
                "jsonrpc": "2.0",
                "method": "notifications/progress",
                "params": {"progressToken": token, "progress": 1},
            }
            events = b"id: 7\ndata: " + orjson.dumps(note) + b"\n\n"
        answer = orjson.dumps({"jsonrpc": "2.0", "id": message["id"], "result": {"token": token}})
        return web.Response(body=events + b"data: " + answer + b"\n\n", content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/mcp", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    try:
        async with worker(redis_url, {"counter": {"url": url, "leasehold": {"affinity": "principal"}}}) as one:
            clients = await initialized(one, one)
            for client in clients:
                params = {"name": "x", "_meta": {"progressToken": "mine"}}
                status, body = await client.send("POST", "tools/call", params)
                assert status == 200
                progress, answer = (orjson.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: "))
                assert progress["params"]["progressToken"] == "mine"
                assert answer["id"] == 2
                assert answer["result"]["token"] in seen
                assert b"id: 7" in body, "event ids pass"
            assert len(set(seen)) == 2
    finally:
        await runner.cleanup()


async def test_without_affinity_a_call_takes_any_session_of_the_worker_it_landed_on(
    redis_url: str, stub: Upstream
) -> None:
    config = servers(stub, "none")
    async with worker(redis_url, config) as one, worker(redis_url, config) as two:
        (client,) = await initialized(one)
        assert await client.count() == 2
        assert await client.count() == 3, "the same one, for it was free"
        client.worker = two
        assert await client.count() == 2
        assert one.affinity.forwarded == two.affinity.forwarded == 0
        assert (await client.send("DELETE"))[0] == 200
        assert (await client.send("GET"))[0] == 405
        assert len(one.pool) == len(two.pool) == 1


async def test_without_affinity_a_forgotten_session_costs_the_caller_nothing(redis_url: str, stub: Upstream) -> None:
    """B7, B8: it did not run, and no session means anything here."""
    async with worker(redis_url, servers(stub, "none")) as one:
        (client,) = await initialized(one)
        assert await client.count() == 2
        stub.counts.clear()
        assert await client.count() == 2


async def test_b5_without_affinity_the_limit_holds_and_calls_wait_for_each_other(
    redis_url: str, stub: Upstream
) -> None:
    async with worker(redis_url, servers(stub, "none", max_sessions=2)) as one:
        clients = await initialized(*[one] * 10)
        await asyncio.gather(*(client.count() for client in clients))
        assert len(stub.counts) <= 2
        await eventually(lambda: one.pool.statistics().idle == one.pool.statistics().sessions <= 2)


async def test_without_affinity_sessions_are_ready_before_the_first_call(redis_url: str, stub: Upstream) -> None:
    async with worker(redis_url, servers(stub, "none", min_sessions=3)) as one:
        await eventually(lambda: one.pool.statistics().idle == 3)
        (client,) = await initialized(one)
        assert await client.count() == 2
        assert one.pool.statistics().opened == 3
        body, _ = one.telemetry.exposition()
        assert b"leasehold_sessions_idle 3.0" in body
        assert b'leasehold_session_loans_reused_total{reason=""}' in body


@pytest.mark.parametrize("affinity", ["principal", "none"])
async def test_b17_a_credential_in_any_forwarded_header_is_who_calls(
    redis_url: str, stub: Upstream, affinity: str
) -> None:
    config = servers(stub, affinity, forward_headers=["x-api-key", "x-request-id"])
    async with worker(redis_url, config) as one:
        counts: list[int] = []
        for key, request in ((b"alice", b"1"), (b"bob", b"2"), (b"alice", b"3")):
            (client,) = await initialized(one, headers=[(b"x-api-key", key), (b"x-request-id", request)])
            counts.append(await client.count())
        assert counts == [2, 2, 3], "alice's two requests are one principal's, bob's is another's"


async def test_b24_housekeeping_during_a_claim_leaves_the_record_of_the_session_alone(
    redis_url: str, stub: Upstream
) -> None:
    async with worker(redis_url, servers(stub, "principal")) as one:
        directory = one.member.directory
        claim, housekeeping = directory.claim, []

        async def claim_meanwhile(*args: Any) -> Any:
            housekeeping.append(asyncio.create_task(one.sessions.reconcile()))
            return await claim(*args)

        directory.claim = claim_meanwhile  # type: ignore[method-assign]
        for i in range(20):
            name = b"Bearer %d" % i
            (client,) = await initialized(one, headers=[(b"authorization", name)])
            await asyncio.gather(*housekeeping)
            assert await directory.look_up(one.identity.shared_key("counter", name)) is not None
            assert await client.count() == 2
        assert len(stub.counts) == 20


async def test_the_stream_of_a_shared_session_is_opened_with_credentials_and_its_refusal_is_told(
    redis_url: str,
) -> None:
    """B20: once the token is refused, the client learns it, and does not wait for ever."""
    opened, ended = asyncio.Event(), asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.headers.get("authorization") != "Bearer good":
            return web.Response(status=401)
        if request.method == "GET":
            if not opened.is_set():
                opened.set()
                return web.Response(status=403)
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b'data: {"jsonrpc":"2.0","method":"notifications/tools/list_changed"}\n\n')
            await ended.wait()
            return response
        message = orjson.loads(await request.read() or b"{}")
        if message.get("method") != "initialize":
            return web.Response(status=202)
        result: Any = {"protocolVersion": VERSION, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
        body = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        return web.json_response(body, headers={"mcp-session-id": "one"})

    app = web.Application()
    app.router.add_route("*", "/mcp", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    options = {"affinity": "principal", "forward_headers": ["authorization"]}
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    try:
        async with worker(redis_url, {"counter": {"url": url, "leasehold": options}}) as one:
            (client,) = await initialized(one, headers=[(b"authorization", b"Bearer good")])
            assert (await client.send("GET"))[0] == 403
            relay = one.sessions.all()[0].relay
            listening = asyncio.create_task(client.send("GET"))
            await eventually(lambda: relay._is_open)
            one.drain()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await eventually(lambda: not relay._listeners and relay._reader is None)
    finally:
        ended.set()
        await runner.cleanup()
