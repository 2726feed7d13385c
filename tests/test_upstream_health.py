"""B16: the shared half of the circuit breakers, in Redis, and workers that share their breakers by it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import fakeredis
import psutil
import pytest
from faults import Mode, eventually, proxied
from leasehold.coordinator import Keys, RedisClients, Unavailable, health
from leasehold.coordinator.embedded import EmbeddedRedis, EmbeddedRedisError
from leasehold.coordinator.health import Circuit, UpstreamHealth
from leasehold.pool.breaker import BreakerSettings, BreakerState, Permit
from leasehold.pool.breakers import Breakers, Report
from leasehold.pool.errors import CircuitOpen
from redis.asyncio import Redis

pytestmark = pytest.mark.anyio

KEYS = Keys("test")
CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN
NAMES = ["", " ", "a b\n", "*", "{u:x}", "\0\x01", "\udc80", "'; --", "\N{PILE OF POO}", "x" * 10_000]

OPENED = Report("opened", "github", open_s=30.0, openings=2)
DUE = Report("opened", "github", open_s=0.0, openings=1)
CLOSING = Report("closed", "github")
SUCCESS = Report("succeeded", "github")
PROBE = Report("probe", "github", openings=4, age_s=60.0)


def failures(count: int) -> Report:
    return Report("failed", "github", failures=count)


@pytest.fixture(params=["fakeredis", "redis"])
async def client(request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncGenerator[Redis]:
    if request.param == "fakeredis":
        client: Redis = fakeredis.FakeAsyncRedis()
    else:
        client = RedisClients(request.getfixturevalue("redis_url")).lookups()
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
def shared(client: Redis) -> UpstreamHealth:
    return UpstreamHealth(client, KEYS)


async def everything_ends(client: Redis) -> bool:
    return all([await client.pttl(key) > 0 for key in await client.keys("*")])


async def one(shared: UpstreamHealth, worker: str, *reports: Report) -> Circuit:
    (circuit,) = await shared.exchange(worker, reports)
    return circuit


async def until(shared: UpstreamHealth, worker: str, report: Report, mine: bool) -> Circuit:
    """Repeat a report until its answer says so."""
    async with asyncio.timeout(10):
        while True:
            circuit = await one(shared, worker, report)
            if circuit.mine == mine:
                return circuit


class TestB16InRedis:
    """B16: what the fleet knows, and who may probe."""

    async def test_where_all_is_well_nothing_is_kept(self, shared: UpstreamHealth, client: Redis) -> None:
        assert await shared.exchange("w1", [SUCCESS]) == []
        assert await client.keys("*") == []

    async def test_an_opening_is_seen_by_all_others(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [OPENED])
        circuit = await one(shared, "w2")
        assert (circuit.upstream, circuit.state, circuit.openings) == ("github", "open", 2)
        assert 25 < circuit.remaining_s <= 30
        assert 0 <= circuit.age_s < 5
        assert (circuit.probe_s, circuit.mine) == (0.0, False)
        assert await shared.circuits() == [circuit] or (await shared.circuits())[0].upstream == "github"

    async def test_who_finds_the_same_a_moment_later_does_not_make_it_longer(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [OPENED])
        circuit = await one(shared, "w2", Report("opened", "github", open_s=60.0, openings=7))
        assert (circuit.openings, circuit.remaining_s <= 30) == (2, True)

    async def test_of_many_that_ask_at_once_one_gets_leave_to_probe(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w0", [DUE])
        answers = await asyncio.gather(*[one(shared, f"w{n}", PROBE) for n in range(50)])
        assert sum(answer.mine for answer in answers) == 1
        assert all(0 < answer.probe_s <= health.LEAVE_MS / 1000 for answer in answers)

    async def test_nobody_gets_leave_before_the_time(self, shared: UpstreamHealth) -> None:
        circuit = await one(shared, "w1", OPENED, PROBE)
        assert (circuit.mine, circuit.probe_s) == (False, 0.0)
        assert circuit.remaining_s > 25

    async def test_leave_is_renewed_for_who_has_it_and_ends_by_itself(
        self, shared: UpstreamHealth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "LEAVE_MS", 500)
        await shared.exchange("w1", [DUE])
        assert (await one(shared, "w1", PROBE)).mine
        assert not (await one(shared, "w2", PROBE)).mine
        renewed = await one(shared, "w1", PROBE)
        assert renewed.mine
        assert renewed.probe_s == 0.5
        taken = await until(shared, "w2", PROBE, mine=True)
        assert taken.probe_s == 0.5
        assert not (await one(shared, "w1", PROBE)).mine

    async def test_a_probe_that_failed_opens_it_again_for_longer(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [DUE, PROBE])
        circuit = await one(shared, "w1", OPENED)
        assert (circuit.openings, circuit.probe_s, circuit.mine) == (2, 0.0, False)
        assert circuit.remaining_s > 25
        assert not (await one(shared, "w2", PROBE)).mine

    async def test_a_probe_that_succeeded_is_told_to_everybody_for_a_while(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [DUE, PROBE])
        await shared.exchange("w1", [CLOSING])
        for worker in ("w1", "w2", "w3"):
            circuit = await one(shared, worker)
            assert (circuit.state, circuit.probe_s, circuit.age_s < 5) == ("closed", 0.0, True)

    async def test_who_asks_to_probe_what_has_been_closed_meanwhile_gets_no_leave(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [CLOSING])
        circuit = await one(shared, "w2", PROBE)
        assert (circuit.state, circuit.mine) == ("closed", False)

    async def test_who_opened_after_the_closing_gets_it(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [CLOSING])
        circuit = await one(shared, "w2", Report("probe", "github", openings=4, age_s=0.0))
        assert (circuit.state, circuit.mine, circuit.openings) == ("open", True, 4)

    async def test_leave_needs_no_opening_that_redis_remembers(self, shared: UpstreamHealth, client: Redis) -> None:
        """Redis has come back empty: the first to ask probes, the others hear of it."""
        await shared.exchange("w1", [OPENED])
        await client.flushall()
        answers = await asyncio.gather(*[one(shared, f"w{n}", PROBE) for n in range(10)])
        assert sum(answer.mine for answer in answers) == 1
        assert {(answer.state, answer.openings) for answer in answers} == {("open", 4)}

    async def test_failures_that_many_workers_share_open_it(self, shared: UpstreamHealth) -> None:
        """Each worker has too few of them to open its own."""
        for n in range(health.FLEET_THRESHOLD - 1):
            assert (await one(shared, f"w{n}", failures(1))).state == "failing"
        circuit = await one(shared, "w99", failures(1))
        assert (circuit.state, circuit.openings) == ("open", 1)
        assert 0 < circuit.remaining_s <= health.OPEN_MS / 1000

    async def test_a_success_of_any_worker_starts_the_count_again(self, shared: UpstreamHealth) -> None:
        for n in range(10):
            await shared.exchange(f"w{n}", [failures(health.FLEET_THRESHOLD - 1)])
            assert await shared.exchange("w99", [SUCCESS]) == []

    async def test_failures_count_for_a_window_only(
        self, shared: UpstreamHealth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "WINDOW_MS", 50)
        await shared.exchange("w1", [failures(health.FLEET_THRESHOLD - 1)])
        async with asyncio.timeout(10):
            while await shared.circuits():
                await asyncio.sleep(0.01)
        assert (await one(shared, "w2", failures(1))).failures == 1

    async def test_failures_after_a_closing_are_counted_and_it_is_told_all_the_same(
        self, shared: UpstreamHealth
    ) -> None:
        await shared.exchange("w1", [CLOSING])
        circuit = await one(shared, "w2", failures(1))
        assert (circuit.state, circuit.failures) == ("closed", 1)
        assert (await one(shared, "w2", failures(health.FLEET_THRESHOLD))).state == "open"

    async def test_successes_close_no_open_circuit(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [OPENED])
        assert (await one(shared, "w2", SUCCESS)).state == "open"

    async def test_upstreams_are_independent(self, shared: UpstreamHealth) -> None:
        await shared.exchange("w1", [OPENED, Report("closed", "gitlab"), Report("failed", "files", failures=2)])
        found = {circuit.upstream: circuit.state for circuit in await shared.circuits()}
        assert found == {"github": "open", "gitlab": "closed", "files": "failing"}

    async def test_what_nobody_probes_is_forgotten(
        self, shared: UpstreamHealth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "MEMORY_MS", 50)
        await shared.exchange("w1", [DUE])
        async with asyncio.timeout(10):
            while await shared.circuits():
                await asyncio.sleep(0.01)

    async def test_there_is_a_bound_and_what_is_beyond_it_is_left_to_the_workers(
        self, shared: UpstreamHealth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "MOST_CIRCUITS", 3)
        reports = [Report("opened", f"u{n}", open_s=30.0, openings=1) for n in range(10)]
        found = await shared.exchange("w1", reports)
        assert sorted(circuit.upstream for circuit in found) == ["u0", "u1", "u2"]
        found = await shared.exchange("w1", [Report("closed", "u1"), Report("probe", "u9")])
        assert {circuit.upstream: circuit.state for circuit in found} == {"u0": "open", "u1": "closed", "u2": "open"}

    @pytest.mark.parametrize("report", [OPENED, DUE, CLOSING, failures(1), failures(99), PROBE])
    async def test_b29_every_key_has_an_end(self, shared: UpstreamHealth, client: Redis, report: Report) -> None:
        await shared.exchange("w1", [report])
        assert await client.keys("*") == [KEYS.circuits.encode()]
        assert await everything_ends(client)
        for further in (SUCCESS, PROBE, OPENED, CLOSING):
            await shared.exchange("w2", [further])
            assert await everything_ends(client)

    async def test_b29_a_short_entry_does_not_shorten_the_life_of_a_long_one(
        self, shared: UpstreamHealth, client: Redis
    ) -> None:
        await shared.exchange("w1", [OPENED])
        before = await client.pttl(KEYS.circuits)
        await shared.exchange("w1", [Report("failed", "files", failures=1)])
        assert await client.pttl(KEYS.circuits) > before - 10_000

    @pytest.mark.parametrize(
        "damage", [("SET", "x"), ("LPUSH", "x"), ("SADD", "x"), ("ZADD", "1", "x"), ("HSET", "github", "x")]
    )
    async def test_something_else_in_the_key_does_no_harm(
        self, shared: UpstreamHealth, client: Redis, damage: tuple[str, ...]
    ) -> None:
        await client.execute_command(damage[0], KEYS.circuits, *damage[1:])
        assert await shared.exchange("w1", []) == []
        assert (await one(shared, "w1", OPENED)).state == "open"
        assert await everything_ends(client)

    @pytest.mark.parametrize(
        "entry",
        [
            b"",
            b"open",
            b"\0\xff",
            b"open 1 2 3 4  5",
            b"ajar 1 2 3 4 w1 6 7",
            b"open -1 2 3 4 w1 6 7",
            b"open nan inf 3 4 w1 6 7",
            b"open 1 2 3 4 w1 6 7",
            b"closed 1 2 3 4 w1 6 7",
            b"failing 1 2 3 4 w1 6 7",
        ],
    )
    async def test_nonsense_and_old_entries_are_removed(
        self, shared: UpstreamHealth, client: Redis, entry: bytes
    ) -> None:
        await client.hset(KEYS.circuits, "github", entry)
        assert await shared.circuits() == []
        assert await client.keys("*") == []

    @pytest.mark.parametrize("state", ["open", "closed", "failing"])
    async def test_b38_times_of_another_node_are_bounded_by_this_ones(
        self, shared: UpstreamHealth, client: Redis, state: str
    ) -> None:
        """The node before the failover was a century ahead, or somebody wrote what he liked."""
        ahead = "9" * 300
        entry = f"{state} {ahead} {ahead} {ahead} {ahead} w9 {ahead} {ahead}"
        await client.hset(KEYS.circuits, "github", entry)
        (circuit,) = await shared.exchange("w1", [])
        assert (circuit.state, circuit.age_s) == (state, 0.0)
        assert circuit.remaining_s <= health.MEMORY_MS / 1000
        assert circuit.probe_s <= health.LEAVE_MS / 1000
        assert circuit.openings <= 1000
        again = await one(shared, "w1", failures(0))
        assert again.upstream == "github"
        await shared.exchange("w1", [CLOSING])
        assert await everything_ends(client)

    @pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
    async def test_b30_any_name_is_one_upstream_like_any_other(
        self, shared: UpstreamHealth, client: Redis, name: str
    ) -> None:
        await shared.exchange("w1", [OPENED, Report("opened", name, open_s=30.0, openings=5)])
        found = {circuit.openings: circuit.upstream for circuit in await shared.circuits()}
        assert set(found) == {2, 5}
        if name.isprintable() or name.isascii():
            assert found[5] == name
        assert await client.keys("*") == [KEYS.circuits.encode()]

    async def test_scripts_are_loaded_again_when_redis_has_forgotten_them(
        self, shared: UpstreamHealth, client: Redis
    ) -> None:
        await shared.exchange("w1", [OPENED])
        await client.script_flush()
        assert (await one(shared, "w2")).state == "open"


async def test_b35_redis_down_is_a_typed_error() -> None:
    client = RedisClients("unix:///nowhere/redis.sock").lookups()
    shared = UpstreamHealth(client, KEYS)
    for call in (shared.exchange("w1", [OPENED]), shared.circuits(), shared.exchange("", [])):
        with pytest.raises(Unavailable):
            await call
    await client.aclose()


async def test_b3_an_exchange_that_is_cancelled_is_cancelled_whenever_that_comes(redis_url: str) -> None:
    """B3: at every turn of the loop that an exchange takes. A housekeeper that outlived its cancellation would have a
    stopping worker wait for ever."""
    client = RedisClients(redis_url).lookups()
    shared = UpstreamHealth(client, KEYS)
    turns, done = 0, False
    while not done:
        await shared.circuits()  # connected, and in step
        task = asyncio.create_task(shared.exchange("w1", [SUCCESS]))
        for _ in range(turns):
            await asyncio.sleep(0)
        done = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() != done, f"after {turns} turns"
        turns += 1 + turns // 50
    await client.aclose()


# -- whole workers: breakers, housekeeper, Redis -----------------------------------------------------------------------

SETTINGS = BreakerSettings(threshold=3, open_s=0.2, max_open_s=2.0)


class Worker:
    """A worker as far as breakers go, with the housekeeper that `pool/breakers.py` describes."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.breakers = Breakers(SETTINGS)
        self.exchanges = 0
        self._client = RedisClients(url).lookups()
        self._health = UpstreamHealth(self._client, KEYS)
        self._due = asyncio.Event()
        self.breakers.on_due = self._due.set

    @property
    def state(self) -> BreakerState:
        return self.breakers.upstream("github").state

    async def keep_house(self) -> None:
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._due.wait()
                self._due.clear()
                try:
                    circuits = await self._health.exchange(self.name, self.breakers.reports())
                except Unavailable:
                    self.breakers.alone()
                else:
                    self.breakers.heard(circuits)
                    self.exchanges += 1
        finally:
            await self._client.aclose()

    def fail(self, times: int = SETTINGS.threshold) -> None:
        for _ in range(times):
            self.breakers.upstream("github").admit().failed()

    async def admitted(self) -> Permit | None:
        try:
            return await self.breakers.admit("github")
        except CircuitOpen:
            return None


@asynccontextmanager
async def working(url: str, count: int) -> AsyncIterator[list[Worker]]:
    workers = [Worker(f"w{n}", url) for n in range(count)]
    tasks = [asyncio.create_task(worker.keep_house()) for worker in workers]
    try:
        await eventually(lambda: all(worker.exchanges for worker in workers))
        yield workers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)


async def probes(workers: list[Worker]) -> list[Permit]:
    """Have every worker try, until one of them is let through; what the others were told is checked by the caller."""
    async with asyncio.timeout(20):
        while True:
            found = [permit for permit in await asyncio.gather(*[worker.admitted() for worker in workers]) if permit]
            if found:
                return found
            await asyncio.sleep(0.01)


class TestB16Fleet:
    """B16: workers that share their breakers."""

    async def test_one_workers_opening_is_everybodys_within_about_a_second(self, redis_url: str) -> None:
        async with working(redis_url, 10) as workers:
            workers[0].breakers.upstream("github").open_for(0.0, openings=6)  # the next failure opens for two seconds
            (await workers[0].breakers.admit("github")).failed()
            took = await eventually(lambda: all(worker.state is OPEN for worker in workers))
            assert took < 3
            assert all(worker.breakers.upstream("github").openings == 7 for worker in workers)

    async def test_of_all_workers_one_probes_at_a_time_and_its_failure_is_everybodys(self, redis_url: str) -> None:
        async with working(redis_url, 20) as workers:
            workers[0].fail()
            await eventually(lambda: all(worker.state is not CLOSED for worker in workers))
            for opening in (2, 3, 4):
                (permit,) = await probes(workers)
                permit.failed()
                await eventually(
                    lambda opening=opening: all(
                        worker.breakers.upstream("github").openings == opening for worker in workers
                    )
                )

    async def test_a_probe_that_succeeds_closes_it_everywhere(self, redis_url: str) -> None:
        async with working(redis_url, 20) as workers:
            workers[0].fail()
            await eventually(lambda: all(worker.state is not CLOSED for worker in workers))
            (permit,) = await probes(workers)
            assert len([worker for worker in workers if await worker.admitted()]) == 0
            permit.succeeded()
            took = await eventually(lambda: all(worker.state is CLOSED for worker in workers))
            assert took < 3

    async def test_a_call_that_comes_alone_is_the_probe_itself(self, redis_url: str) -> None:
        """Where calls are rare none is refused once the time is over: it waits for its leave, some milliseconds."""
        async with working(redis_url, 3) as workers:
            workers[0].fail()
            await eventually(lambda: all(worker.state is OPEN for worker in workers))
            await eventually(lambda: workers[2].breakers.upstream("github").retry_after_s == 0)
            (await workers[2].breakers.admit("github")).succeeded()
            await eventually(lambda: all(worker.state is CLOSED for worker in workers))

    async def test_failures_spread_over_workers_open_it_for_all(self, redis_url: str) -> None:
        async with working(redis_url, 10) as workers:
            for worker in workers:
                worker.fail(1)
            await eventually(lambda: all(worker.state is OPEN for worker in workers))

    async def test_a_worker_without_network_does_not_close_the_others_out(self, redis_url: str) -> None:
        """Where calls succeed, another worker's failures are its own."""
        async with working(redis_url, 2) as (broken, well):
            for _ in range(200):
                if broken.state is CLOSED:
                    broken.fail()
                well.breakers.upstream("github").admit().succeeded()
                await asyncio.sleep(0.01)
            assert well.breakers.upstream("github").statistics().refused == 0

    async def test_b36_calls_cost_no_command_and_a_second_costs_one(self, redis_url: str) -> None:
        async with working(redis_url, 1) as (worker,):
            client = RedisClients(redis_url).lookups()
            before, exchanges = await commands(client), worker.exchanges
            for n in range(20_000):
                (await worker.breakers.admit(f"u{n % 50}")).succeeded()
            await eventually(lambda: worker.exchanges >= exchanges + 2)
            ran = (await commands(client)) - before
            assert ran["evalsha"] == worker.exchanges - exchanges
            assert sum(ran.values()) - ran["evalsha"] - ran["info"] - ran["hgetall"] - ran["time"] == 0
            await client.aclose()

    async def test_b32_a_redis_that_comes_back_empty_is_told_again(self) -> None:
        with EmbeddedRedis() as server:
            async with working(server.url, 3) as workers:
                breaker = workers[0].breakers.upstream("github")
                breaker.open_for(0.0, openings=9)
                (await workers[0].breakers.admit("github")).failed()
                await eventually(lambda: all(worker.state is OPEN for worker in workers))
                assert server.pid is not None
                psutil.Process(server.pid).kill()
                await eventually(lambda: has_restarted(server))
                done = [worker.exchanges for worker in workers]
                await eventually(
                    lambda: all(worker.exchanges > before + 1 for worker, before in zip(workers, done, strict=True))
                )
                assert all(worker.state is not CLOSED for worker in workers)
                (permit,) = await probes(workers)
                permit.succeeded()
                await eventually(lambda: all(worker.state is CLOSED for worker in workers))

    @pytest.mark.parametrize("mode", [Mode.RESET, Mode.BLACKHOLE])
    async def test_b32_without_redis_each_worker_goes_by_what_it_sees_and_nothing_waits(
        self, redis_url: str, mode: Mode
    ) -> None:
        async with proxied(redis_url) as proxy, working(proxy.url, 2) as (one, other):
            proxy.mode = mode
            one.fail()
            assert one.state is OPEN
            assert await one.admitted() is None
            begun = asyncio.get_running_loop().time()
            (permit,) = await probes([one])
            assert asyncio.get_running_loop().time() - begun < 15
            permit.succeeded()
            assert (one.state, other.state) == (CLOSED, CLOSED)
            proxy.mode = Mode.OK
            before = other.exchanges
            await eventually(lambda: other.exchanges > before + 1)
            other.fail()
            await eventually(lambda: one.state is OPEN)


def has_restarted(server: EmbeddedRedis) -> bool:
    """Start it again, empty, if its process has ended by now."""
    try:
        server.restart()
    except EmbeddedRedisError:
        return False
    return True


async def commands(client: Redis) -> Counter[str]:
    """How often Redis ran each command."""
    rows: dict[str, Any] = await client.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): row["calls"] for name, row in rows.items()})
