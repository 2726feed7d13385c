"""Opening a session: its id leaves with its record written and to a client that is there, or nothing is left of it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest
from fake_link import FakeLink
from leasehold.coordinator import Keyring, Unavailable, session_key
from leasehold.pool import Message, PooledSession, Reply, StdioTarget, Upstream, parse
from leasehold.pool.link import Headers
from leasehold.workers.answers import Refused
from leasehold.workers.asgi import Scope
from leasehold.workers.errors import Disconnected
from leasehold.workers.identity import Caller, Identity
from leasehold.workers.opening import Opening
from leasehold.workers.owned import Owned
from leasehold.workers.request import Request

pytestmark = pytest.mark.anyio

UPSTREAM = Upstream("a", StdioTarget("true"))
CALLER = Caller("anonymous", b"")
INITIALIZE = b'{"jsonrpc":"2.0","id":0,"method":"initialize","params":{}}'
AGREED = b'{"jsonrpc":"2.0","id":0,"result":{"protocolVersion":"2025-11-25"}}'
REFUSED = b'{"jsonrpc":"2.0","id":0,"error":{"code":-32602,"message":"not you"}}'


class AnsweringLink(FakeLink):
    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.answer = answer

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        async def chunks() -> AsyncGenerator[bytes, None]:
            yield self.answer

        return Reply(200, [(b"content-type", b"application/json")], chunks())


class FakeSessions:
    """Notes in order what is asked of it; a registration takes until `may_register` is set."""

    def __init__(self) -> None:
        self.link = AnsweringLink(AGREED)
        self.said: list[str] = []
        self.registering = asyncio.Event()
        self.may_register = asyncio.Event()
        self.failure: Exception | None = None
        self.owners: list[asyncio.Task[None]] = []
        self.session: PooledSession | None = None
        self.draining = False

    async def open(self, key: str, upstream: Upstream, principal: str) -> Owned:
        self.session = session = PooledSession(key, upstream, principal)

        async def link() -> FakeLink:
            return self.link

        self.owners.append(
            asyncio.create_task(session.own(link, lambda ended: self.said.append(f"closed {ended.close_reason}")))
        )
        await session.wait_open()
        return Owned(session)

    async def register(self, owned: Owned) -> None:
        self.registering.set()
        try:
            await self.may_register.wait()
        except asyncio.CancelledError:
            self.said.append("cancelled half-way")
            raise
        if self.failure is not None:
            raise self.failure
        self.said.append("registered")

    def end(self, owned: Owned, reason: str) -> None:
        self.said.append(f"ended {reason}")
        owned.session.close(reason)


class Client:
    def __init__(self, said: list[str]) -> None:
        self.said = said
        self.leaves = asyncio.Event()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.said.append("answered")
            self.status, self.headers = message["status"], dict(message["headers"])
        self.body += message.get("body", b"")


@pytest.fixture
async def sessions() -> FakeSessions:
    return FakeSessions()


def begin(sessions: FakeSessions, client: Client) -> asyncio.Task[None]:
    opening = Opening(sessions, Identity(Keyring.random()), max_body_bytes=10_000)  # type: ignore[arg-type]
    message = parse(INITIALIZE)
    scope: Scope = {"type": "http", "method": "POST", "headers": []}
    request = Request(UPSTREAM, CALLER, None, message, INITIALIZE, scope, client.receive)
    return asyncio.create_task(opening.open(request, message, client.send), name="request")


async def ended(sessions: FakeSessions) -> None:
    assert sessions.session is not None
    await asyncio.wait_for(sessions.session.wait_ended(), 5)


async def test_the_id_leaves_when_the_record_is_written(sessions: FakeSessions) -> None:
    client = Client(sessions.said)
    request = begin(sessions, client)
    await sessions.registering.wait()
    assert client.status == 0
    sessions.may_register.set()
    await request
    assert sessions.said == ["registered", "answered"]
    assert sessions.session is not None
    assert session_key(client.headers[b"mcp-session-id"].decode()) == sessions.session.key
    assert (client.status, client.body) == (200, AGREED)
    assert not sessions.session.is_closed
    sessions.session.close("test")
    await ended(sessions)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_registration_is_not_cancelled_half_way_and_its_session_ends_with_its_record(
    sessions: FakeSessions, *, fails: bool
) -> None:
    """B3, B29: a record that nobody knows of would name a session that no client ever had."""
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    sessions.failure = Unavailable("Redis is gone") if fails else None
    client = Client(sessions.said)
    request = begin(sessions, client)
    await sessions.registering.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert sessions.said == []
    sessions.may_register.set()
    await ended(sessions)
    assert sessions.said == [*([] if fails else ["registered"]), "ended unregistered", "closed unregistered"]
    del request
    gc.collect()
    assert not problems, "the outcome was looked at"


async def test_a_session_whose_client_has_left_by_then_ends_with_its_record(sessions: FakeSessions) -> None:
    """B3"""
    client = Client(sessions.said)
    request = begin(sessions, client)
    await sessions.registering.wait()
    client.leaves.set()
    sessions.may_register.set()
    with pytest.raises(Disconnected):
        await request
    await ended(sessions)
    assert sessions.said == ["registered", "ended unregistered", "closed unregistered"]


async def test_an_answer_that_cannot_be_sent_leaves_no_session(sessions: FakeSessions) -> None:
    client = Client(sessions.said)

    async def broken(_message: Any) -> None:
        raise OSError

    client.send = broken  # type: ignore[method-assign]
    sessions.may_register.set()
    with pytest.raises(OSError):  # noqa: PT011
        await begin(sessions, client)
    await ended(sessions)
    assert sessions.said == ["registered", "ended unregistered", "closed unregistered"]


async def test_without_a_record_there_is_no_session(sessions: FakeSessions) -> None:
    """B35"""
    client = Client(sessions.said)
    sessions.failure = Unavailable("Redis is gone")
    sessions.may_register.set()
    with pytest.raises(Refused) as refused:
        await begin(sessions, client)
    assert (refused.value.status, refused.value.id) == (503, 0)
    await ended(sessions)
    assert sessions.said == ["ended unregistered", "closed unregistered"]


async def test_a_refused_initialize_is_relayed_and_leaves_nothing(sessions: FakeSessions) -> None:
    client = Client(sessions.said)
    sessions.link.answer = REFUSED
    await begin(sessions, client)
    assert (client.status, orjson.loads(client.body)["error"]["message"]) == (200, "not you")
    assert b"mcp-session-id" not in client.headers
    await ended(sessions)
    assert sessions.said == ["answered", "closed not_initialized"]
