"""One end of the exchange layer alone: a member and a forwarder, no HTTP edge, a trivial ASGI application at the owner.

Says its incarnation once it has joined. As the caller:

    run   owner, in_flight, seconds  -> calls, failed, seconds, latencies_us
"""

from __future__ import annotations

import asyncio
import logging
import sys
from time import perf_counter
from typing import Any

import uvloop
from child import obey, say
from leasehold.coordinator import Keyring, Keys, Member, RedisClients, Registration
from leasehold.workers.forwarder import Forwarder

SECRET = b"a secret for measurements only, long enough"
SESSION = "5e" * 32
EPOCH = 1
ANSWER = b'{"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"%b"}],"isError":false}}' % (b"x" * 120)
CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"text":"%b"}}}'
BODY = CALL % (b"y" * 60)
SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "scheme": "http",
    "path": "/servers/stub/mcp",
    "query_string": b"",
    "headers": [
        (b"accept", b"application/json, text/event-stream"),
        (b"content-type", b"application/json"),
        (b"mcp-protocol-version", b"2025-11-25"),
        (b"user-agent", b"bench"),
        (b"host", b"127.0.0.1:8000"),
        (b"mcp-session-id", b"s" * 48),
        (b"content-length", b"%d" % len(BODY)),
    ],
    "client": ("127.0.0.1", 50000),
}


class End:
    """A worker without a gateway."""

    def __init__(self, redis_url: str) -> None:
        self.joined_as: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        clients, keys = RedisClients(redis_url), Keys("bench")
        self.member = Member(clients, keys, Keyring([SECRET]), self, lease_ttl_ms=3000, info={})
        self.forwarder = Forwarder(self.member, self, answer)
        self.frame = self.forwarder.frame
        self.receipt = self.forwarder.receipt
        self.peer_down = self.forwarder.peer_down
        self.rotated = self.forwarder.rotated

    async def joined(self, incarnation: str, *, again: bool) -> None:
        if not again:
            self.joined_as.set_result(incarnation)

    def lost(self, _incarnation: str) -> None:
        self.forwarder.lost()

    def redis_changed(self) -> None:
        """Nothing is registered."""

    def refuse(self, _head: object) -> None:
        """Admit everything."""

    async def run(self, owner: str, in_flight: int, seconds: float) -> dict[str, Any]:
        forward, to = self.forwarder.forward, Registration(owner, EPOCH)
        latencies: list[int] = []
        failed = 0
        began = perf_counter()
        until = began + seconds

        async def call_on_and_on() -> None:
            nonlocal failed
            started = began
            while started < until:
                started = perf_counter()
                try:
                    await forward(to, SESSION, SCOPE, BODY, never, nowhere)
                except Exception as error:
                    logging.warning("call failed: %r", error)
                    failed += 1
                latencies.append(int((perf_counter() - started) * 1e6))

        await asyncio.gather(*(call_on_and_on() for _ in range(in_flight)))
        return {
            "calls": len(latencies),
            "failed": failed,
            "seconds": perf_counter() - began,
            "latencies_us": latencies,
        }


async def answer(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


async def never() -> Any:
    await asyncio.get_running_loop().create_future()


async def nowhere(_message: Any) -> None:
    return None


async def main(redis_url: str) -> None:
    end = End(redis_url)
    living = asyncio.create_task(end.member.run())
    say(await end.joined_as)
    await obey(lambda command: end.run(**command))
    await end.member.stop()
    await living
    await end.member.aclose()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
