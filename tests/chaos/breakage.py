"""The faults. Each is one function that does its harm and takes it away again, but for workers that are dead: those are
started again once everything has recovered without them."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import Final

from chaos.clients import Client
from chaos.harness import CALL_TIMEOUT_S, LEASE_S, PAUSED_S, Chaos
from chaos.history import Measured
from chaos.nodes import Node, RedisServer
from chaos.sentinel import SentinelTrio
from faults import Mode

Fault = Callable[[Chaos], Awaitable[None]]

REDIS_GONE_S: Final = 5.0
BIG: Final = 100 * 1024 * 1024
BIG_PATIENCE_S: Final = 60.0
BIG_MEMORY: Final = 64 * 1024 * 1024
"""What a worker may hold more while it relays answers of 100 MB."""
COLD_CALLERS: Final = 1000
COLD_PATIENCE_S: Final = 60.0


def standalone(chaos: Chaos) -> RedisServer:
    assert isinstance(chaos.redis, RedisServer)
    return chaos.redis


async def _until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    until = monotonic() + limit_s
    while not condition():
        assert monotonic() < until, "what the fault waits for does not happen"
        await asyncio.sleep(0.005)


async def kill_idle(chaos: Chaos) -> None:
    """kill -9 of a worker that owns sessions and runs nothing."""
    victim, noticed = chaos.pick(), chaos.rng.random() < 0.5
    async with chaos.quiet():
        await victim.kill(noticed=noticed)


async def kill_queued(chaos: Chaos) -> None:
    """kill -9 of a worker with requests in its mailbox that it has not read."""
    victim, noticed, wait_s = chaos.pick(), chaos.rng.random() < 0.5, chaos.rng.uniform(0.1, 0.6)
    with chaos.history.pause(victim.name):
        victim.signal(signal.SIGSTOP)
        await asyncio.sleep(wait_s * LEASE_S)
        await victim.kill(noticed=noticed)


async def kill_mid_call(chaos: Chaos) -> None:
    """kill -9 of a worker while calls of its run at the upstream."""
    order, noticed = chaos.rng.sample(chaos.nodes, len(chaos.nodes)), chaos.rng.random() < 0.5
    victims: list[Node] = []
    await _until(lambda: victims.extend(filter(chaos.serving, order)) or victims)
    await victims[0].kill(noticed=noticed)


async def kill_by_tool(chaos: Chaos) -> None:
    """A call that has the worker killed that makes it."""
    client, noticed = chaos.rng.choice(chaos.clients), chaos.rng.random() < 0.5
    struck: list[asyncio.Task[None]] = []

    def strike(port: int) -> None:
        victim = chaos.serves_port(port)
        if victim is not None:
            struck.append(asyncio.create_task(victim.kill(noticed=noticed)))

    chaos.upstream.striking = strike
    try:
        while not struck:
            await client.step("kill", seconds=0.3)
        await asyncio.gather(*struck)
    finally:
        chaos.upstream.striking = lambda _port: None


async def freeze(chaos: Chaos) -> None:
    """SIGSTOP for one and a half leases, then SIGCONT."""
    victim = chaos.pick()
    with chaos.history.pause(victim.name):
        victim.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(PAUSED_S)
        finally:
            victim.signal(signal.SIGCONT)


async def block(chaos: Chaos) -> None:
    """A worker's event loop does nothing for one and a half leases."""
    victim = chaos.pick()
    with chaos.history.pause(victim.name):
        victim.signal(signal.SIGUSR2)
        await asyncio.sleep(PAUSED_S)


async def redis_empty(chaos: Chaos) -> None:
    """Redis dies and is back at once, empty."""
    redis = standalone(chaos)
    redis.kill()
    redis.restart()


async def redis_gone(chaos: Chaos) -> None:
    """Redis dies and is back after five seconds, empty."""
    redis = standalone(chaos)
    redis.kill()
    await asyncio.sleep(REDIS_GONE_S)
    redis.restart()


async def failover(chaos: Chaos) -> None:
    """The master dies, and the replica that Sentinel promotes has missed the last second of it."""
    assert isinstance(chaos.redis, SentinelTrio)
    await chaos.redis.fail_over(chaos.rng.uniform(0.5, 1.0) * LEASE_S)


async def _partition(chaos: Chaos, mode: Mode) -> None:
    victims = chaos.rng.sample(chaos.nodes, chaos.rng.choice([1, 1, len(chaos.nodes) - 1]))
    leases = chaos.rng.uniform(0.4, 2.5)
    for victim in victims:
        victim.proxy.mode = mode
    try:
        await asyncio.sleep(leases * LEASE_S)
    finally:
        for victim in victims:
            victim.proxy.mode = Mode.OK
            if mode is not Mode.DELAY:
                # What was swallowed is missing in the middle of the stream; TCP would not go on after it either.
                victim.proxy.break_all()


async def partition_silent(chaos: Chaos) -> None:
    """What workers and Redis send each other is swallowed."""
    await _partition(chaos, Mode.BLACKHOLE)


async def partition_loud(chaos: Chaos) -> None:
    """Every connection to Redis is broken, and every new one."""
    await _partition(chaos, Mode.RESET)


async def partition_one_way(chaos: Chaos) -> None:
    """Commands arrive at Redis, answers do not come back."""
    await _partition(chaos, Mode.DROP_REPLIES)


async def redis_slow(chaos: Chaos) -> None:
    """Every answer of Redis takes a fifth of a second longer."""
    await _partition(chaos, Mode.DELAY)


async def upstream_slow(chaos: Chaos) -> None:
    """The upstream takes half of the time that a call has."""
    chaos.upstream.delay_s = CALL_TIMEOUT_S / 2
    try:
        await asyncio.sleep(CALL_TIMEOUT_S)
    finally:
        chaos.upstream.delay_s = 0.0


async def upstream_hung(chaos: Chaos) -> None:
    """The upstream runs what it is asked and answers nobody, for longer than a call waits."""
    chaos.upstream.hang()
    try:
        await asyncio.sleep(CALL_TIMEOUT_S * 1.5)
    finally:
        chaos.upstream.go_on()


async def big_answers(chaos: Chaos) -> None:
    """Answers of 100 MB, by way of a worker that does not own the session, too."""
    callers = [client for client in chaos.clients if client.server == "own"][: len(chaos.nodes)]
    before = {node.name: node.rss() for node in chaos.nodes}
    most = dict(before)
    calls = [asyncio.create_task(client.step("big", size=BIG, patience_s=BIG_PATIENCE_S)) for client in callers]
    while not all(call.done() for call in calls):
        await asyncio.sleep(0.05)
        for node in chaos.nodes:
            most[node.name] = max(most[node.name], node.rss())
    grown = max(most[name] - before[name] for name in before)
    chaos.history.measured.append(Measured("bytes more in a worker for 100 MB answers", monotonic(), grown, BIG_MEMORY))
    failed = sum(call.result() is None or call.result().outcome != "ok" for call in calls)
    chaos.history.measured.append(Measured("100 MB answers that failed", monotonic(), failed, 0))


async def cold_key(chaos: Chaos) -> None:
    """1,000 callers of one principal come at once, and there is no session yet."""
    name = f"cold-{len(chaos.history.faults)}"
    callers = [
        Client(f"{name}-{n}", "shared", f"Bearer {name}", chaos.balancer, chaos.rng) for n in range(COLD_CALLERS)
    ]

    async def come(client: Client) -> bool:
        for _ in range(10):
            call = await client.step("count", patience_s=COLD_PATIENCE_S)
            if call is not None and call.outcome == "ok":
                return True
        return False

    # On few cores it is an overload: those who call meanwhile have as much time.
    usual_s, chaos.balancer.patience_s = chaos.balancer.patience_s, COLD_PATIENCE_S
    try:
        answered = await asyncio.gather(*(come(client) for client in callers))
    finally:
        chaos.balancer.patience_s = usual_s
    used = {execution.session for execution in chaos.history.executions if execution.principal == f"Bearer {name}"}
    chaos.history.measured.append(Measured(f"sessions used by {COLD_CALLERS} callers", monotonic(), len(used), 1))
    chaos.history.measured.append(Measured("callers of it without an answer", monotonic(), answered.count(False), 0))


async def rolling_restart(chaos: Chaos) -> None:
    """SIGTERM to each worker in turn; the next one when its successor is ready."""
    begun = len(chaos.history.calls)
    for node in list(chaos.nodes):
        await _replace(chaos, node)
    unknown = sum(call.outcome == "unknown" for call in chaos.history.calls[begun:])
    chaos.history.measured.append(Measured("calls of unknown outcome in a rolling restart", monotonic(), unknown, 0))


async def _replace(chaos: Chaos, node: Node) -> None:
    code = await node.stop()
    chaos.history.measured.append(Measured("exit code after SIGTERM", monotonic(), abs(code), 0))
    await node.start()


FAULTS: Final[dict[str, Fault]] = {
    fault.__name__: fault
    for fault in (
        kill_idle,
        kill_queued,
        kill_mid_call,
        kill_by_tool,
        freeze,
        block,
        redis_empty,
        redis_gone,
        partition_silent,
        partition_loud,
        partition_one_way,
        redis_slow,
        upstream_slow,
        upstream_hung,
        big_answers,
        cold_key,
        rolling_restart,
    )
}
ONLY_UNDER_SENTINEL: Final[dict[str, Fault]] = {failover.__name__: failover}


def schedule(seed: int, names: Sequence[str]) -> Iterator[str]:
    """All of them in one order, then in another, for ever."""
    rng = random.Random(seed)
    while True:
        bag = list(names)
        rng.shuffle(bag)
        yield from bag


async def break_and_recover(chaos: Chaos, name: str) -> None:
    """One fault, from its first harm until everything serves again and all workers are there."""
    chaos.rng = random.Random(f"{chaos.seed}/{len(chaos.history.faults)}/{name}")
    with ExitStack() as stack:
        stack.enter_context(chaos.history.fault(name))
        await (FAULTS | ONLY_UNDER_SENTINEL)[name](chaos)
        await chaos.recovered(name)
    await chaos.repair()
