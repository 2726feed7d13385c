"""Everything a session can do beyond plain calls, with its requests, and the client's answers, on other workers."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import pytest
from acceptance import environments as env
from acceptance.driving import Traffic, report, shift
from fleet import EXAMPLES, Fleet, run_example, run_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.acceptance, pytest.mark.timeout(300)]

ROUNDS = 3
FEATURES = 11


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("features")
    with run_example("counter_http.py", folder) as upstream:
        stdio = {"command": sys.executable, "args": [str(EXAMPLES / "counter_stdio.py")]}
        async with run_fleet(folder, {"http": {"url": upstream.url}, "stdio": stdio}) as fleet:
            yield fleet


@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("server", ["http", "stdio"])
async def test_every_feature_works_on_every_worker(fleet: Fleet, server: str, turn: int) -> None:
    for _ in range(turn):
        await shift(fleet)
    before = await Traffic.of(fleet)
    done = await report([env.PYTHON_DEV, env.client("features.py"), "--url", fleet.url(server)], timeout_s=200)
    assert done["errors"] == {}
    assert len(done["passed"]) == FEATURES
    (await Traffic.of(fleet)).since(before).check_spread()
