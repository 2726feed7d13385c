"""`SessionPool` in one process, without Redis: sessions that are lent, reused, limited and waited for.

It starts a server of its own (a counter per session) and shows what twelve tasks make of four sessions.
"""

import asyncio
from collections import Counter
from dataclasses import asdict

from counter_process import STDIO, counter_server, text_of
from leasehold import CallFailed, HttpTarget, PoolTimeout, SessionPool, StdioTarget, Upstream
from leasehold.pool.statistics import PoolStatistics

TASKS = 12
CALLS = 5


async def share_a_few(pool: SessionPool, upstream: Upstream) -> None:
    """Many tasks, few sessions: who finds none free waits for the next that comes back, in order of arrival."""
    used: Counter[str] = Counter()

    async def task() -> None:
        for _ in range(CALLS):
            async with pool.session(upstream) as session:
                used[text_of(await session.call_tool("whoami", {}))] += 1

    await asyncio.gather(*(task() for _ in range(TASKS)))
    print(f"{TASKS} tasks made {used.total()} calls on {len(used)} sessions, of which there may be 4")


async def keep_apart(pool: SessionPool, upstream: Upstream) -> None:
    """Principals never share a session; who names the same affinity shares one."""

    async def increment(principal: str, affinity: str | None = None) -> str:
        headers = {"authorization": f"Bearer token of {principal}"}
        async with pool.session(upstream, principal=principal, headers=headers, affinity=affinity) as session:
            return text_of(await session.call_tool("increment", {}))

    alice = [await increment("alice"), await increment("alice")]
    bob = [await increment("bob")]
    print(f"alice's session counted {', '.join(alice)}; bob's {', '.join(bob)}")
    together = await asyncio.gather(*(increment("alice", "conversation-42") for _ in range(5)))
    print(f"five tasks in one conversation counted {', '.join(sorted(together))}")


async def meet_a_limit(pool: SessionPool, upstream: Upstream) -> None:
    """A caller waits for as long as it says, and is told that nothing was sent."""
    async with pool.session(upstream, principal="carol"):
        try:
            async with pool.session(upstream, principal="carol", timeout_s=0.2):
                raise AssertionError("carol may have one session")
        except PoolTimeout as full:
            print(f"carol waited in vain: {full} (outcome {full.outcome})")


async def lose_one(pool: SessionPool) -> None:
    """A session that broke is closed, and never lent again."""
    workshop = Upstream("workshop", StdioTarget(STDIO[0], tuple(STDIO[1:])))
    try:
        async with pool.session(workshop) as session:
            await session.call_tool("crash", {})
    except CallFailed as failure:
        print(f"a process ended under a call: {failure} (outcome {failure.outcome})")
    async with pool.session(workshop) as session:
        print(f"the next loan is a fresh session: it counted {text_of(await session.call_tool('increment', {}))}")


def show(statistics: PoolStatistics) -> None:
    """What the pool has counted, a line each; of circuits, their state."""
    counted = asdict(statistics)
    circuits = counted.pop("breakers")["upstreams"]
    for name, value in counted.items():
        print(f"  {name:16} {value:.3f}" if isinstance(value, float) else f"  {name:16} {value}")
    for name, circuit in circuits.items():
        print(f"  circuit of {name}: {circuit['state'].value}")


async def main() -> None:
    with counter_server() as url:
        async with SessionPool(max_sessions=100, acquire_timeout_s=10) as pool:
            counter = Upstream("counter", HttpTarget(url), max_sessions=4)
            await share_a_few(pool, counter)
            await keep_apart(pool, Upstream("counter-of-each", HttpTarget(url)))
            await meet_a_limit(pool, Upstream("counter-of-one", HttpTarget(url), max_sessions_per_principal=1))
            await lose_one(pool)
            print(f"\n{pool!r}")
            show(pool.statistics())


if __name__ == "__main__":
    asyncio.run(main())
