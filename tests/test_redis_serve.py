"""The command on each form of Redis: `serve`, listings, a worker that dies, and the look at every node before."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import aiohttp
import pytest
from fleet import Running, run_example, run_gateway, wait_until, write_config
from leasehold.workers.errors import ServeError
from leasehold.workers.redis_check import check_redis
from mcp_http import RawSession
from redis_forms import Server, cluster, one_server, sentinel_trio
from test_cli import run_command

pytestmark = [pytest.mark.anyio, pytest.mark.process, pytest.mark.xdist_group("redis-failover")]

Made = tuple[str, list[Server]]


@contextmanager
def of_cluster(folder: Path) -> Iterator[Made]:
    with cluster(folder) as made:
        yield made.url, made.masters


@contextmanager
def of_sentinels(folder: Path) -> Iterator[Made]:
    with sentinel_trio(folder) as watched:
        yield watched.url, [watched.master]


@pytest.mark.parametrize(
    "form", [of_cluster, pytest.param(of_sentinels, marks=pytest.mark.acceptance)], ids=["cluster", "sentinel"]
)
async def test_a_gateway_of_two_workers_serves_lists_and_outlives_one_of_them(
    tmp_path: Path, form: Callable[[Path], AbstractContextManager[Made]]
) -> None:
    with form(tmp_path) as (url, masters), run_example("counter_http.py", tmp_path) as example:
        masters[-1].ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        config = write_config(tmp_path, {"counter": {"url": example.url}})
        with run_gateway(config, tmp_path, "--workers", "2", redis_url=url) as gateway:
            assert gateway.output().count("maxmemory_policy") == 1, "of the one node where it is wrong"
            await _is_served(gateway, url, tmp_path)


async def _is_served(gateway: Running, url: str, folder: Path) -> None:
    async with aiohttp.ClientSession() as http:
        session = RawSession(http, f"{gateway.url}/servers/counter/mcp")
        assert (await session.initialize()).status == 200
        assert (await session.call("increment")).text
        workers = await asyncio.to_thread(_listed, "workers", url, folder)
        assert len(workers) == 2
        (listed,) = await asyncio.to_thread(_listed, "sessions", url, folder)
        assert listed["server"] == "counter"
        (owner,) = [row for row in workers if row["incarnation"] == listed["owner"]]
        os.kill(int(str(owner["pid"])), signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: "lease_ended" in gateway.output(), "no lease was ended")
        assert (await session.call("increment")).text, (
            "it goes on at the other worker, or the one that was started anew"
        )


def _listed(what: str, url: str, folder: Path) -> list[dict[str, object]]:
    result = run_command(what, "ls", "--redis", url, "--json", folder=folder)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_every_node_of_a_cluster_is_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cluster(tmp_path) as made:
        with caplog.at_level(logging.INFO):
            check_redis(made.url)
        assert not caplog.records
        for server in made.masters[:2]:
            server.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
        check_redis(made.url)
        assert sorted(record.getMessage().split()[1] for record in caplog.records) == sorted(
            f"place={server.address}" for server in made.masters[:2]
        )


def test_b19_a_redis_that_does_not_answer_is_named_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    for url in ("redis+cluster://u:s3cret@127.0.0.1:1", "redis+sentinel://u:s3cret@127.0.0.1:1/main"):
        caplog.clear()
        check_redis(url)
        (record,) = caplog.records
        assert "redis_unreachable" in record.getMessage()
        assert "127.0.0.1:1" in record.getMessage()
        assert "s3cret" not in record.getMessage()


def test_a_server_that_may_not_be_asked_for_its_policy_is_taken_to_be_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with one_server(tmp_path, **{"maxmemory-policy": "allkeys-lru"}) as server:
        server.ask("ACL", "SETUSER", "default", "-config|get")
        check_redis(f"redis://{server.address}")
        assert not caplog.records


def test_b49_a_server_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("leasehold.workers.redis_check.OLDEST", (99, 0))
    with one_server(tmp_path) as server, pytest.raises(ServeError, match=r"expected 99\.0 or newer"):
        check_redis(f"redis://{server.address}")
