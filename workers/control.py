"""What operators and other workers can ask of a worker, beside the calls of its sessions.

A request for no session (`CONTROL`) crosses like any other: sealed under the fleet secret, run once at most, admitted
under the worker's lease. Who can only write to Redis can ask for nothing. Its path is the operation and the session's
key, its body JSON, and so is its answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson

from ..coordinator import Registration, Unavailable
from ..pool import PoolError, Upstream
from .affinity import Affinity
from .answers import JSON
from .asgi import Receive, Scope, Send, read_body, respond
from .control_client import ControlError
from .owned import Opens, Owned
from .placement import Placement
from .sessions import Sessions

MAX_BODY_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Status:
    """A worker now."""

    draining: bool
    sessions: int
    """Owned."""
    pinned: int
    """Of them, those that cannot move: a process of this worker's, or a stream to it."""
    in_flight: int
    """Calls and streams: of its own clients, wherever their sessions are, and of other workers'."""


Operation = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
"""Takes a session's key and the body; raises `ControlError`, `Unavailable`, `PoolError`."""


class Control:
    """Does what one worker is asked to."""

    def __init__(
        self,
        sessions: Sessions,
        affinity: Affinity,
        placement: Placement,
        upstreams: Mapping[str, Upstream],
        drain: Callable[[], Awaitable[None]],
        in_flight: Callable[[], int],
    ) -> None:
        """`drain` returns when what can move was handed off; `in_flight` counts, without what asks for it here."""
        self._in_flight = in_flight
        self._sessions = sessions
        self._affinity = affinity
        self._placement = placement
        self._upstreams = upstreams
        self._drain = drain
        self._operations: dict[str, Operation] = {
            "status": self._status,
            "drain": self._drained,
            "show": self._show,
            "move": self._moved,
            "adopt": self._adopt,
            "open": self._open,
            "evict": self._evict,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request that came by a hop: 200 and a JSON object, or 4xx or 503 and `{"error": "..."}`."""
        name, _, key = scope["path"].strip("/").partition("/")
        operation = self._operations.get(name)
        status = 200
        try:
            body = await read_body(scope["headers"], receive, MAX_BODY_BYTES)
            if operation is None:  # a worker of another version asks
                raise ControlError(f"this worker knows no operation {name[:64]!r}")
            answer = await operation(key, orjson.loads(body or b"{}"))
        except (ControlError, Unavailable, PoolError) as error:
            status, answer = 409 if isinstance(error, ControlError) else 503, {"error": str(error)}
        await respond(send, status, orjson.dumps(answer), JSON)

    def status(self) -> Status:
        owned = self._sessions.all()
        return Status(
            draining=self._sessions.draining,
            sessions=len(owned),
            pinned=sum(each.session.resume is None for each in owned),
            in_flight=self._in_flight(),
        )

    async def _status(self, _key: str, _body: Mapping[str, Any]) -> Any:
        return asdict(self.status())

    async def _drained(self, _key: str, _body: Mapping[str, Any]) -> Any:
        await self._drain()
        return asdict(self.status())

    async def _show(self, key: str, _body: Mapping[str, Any]) -> Any:
        owned = self._owned(key)
        session = owned.session
        return {
            "state": session.state.value,
            "in_flight": session.in_flight,
            "idle_s": round(session.idle_s, 3),
            "age_s": round(session.age_s, 3),
            "pinned": session.resume is None,
        }

    async def _moved(self, key: str, body: Mapping[str, Any]) -> Any:
        owned = self._owned(key)
        if owned.session.resume is None:
            raise ControlError("the session is pinned: it is a process of its worker's, or a stream to it")
        return asdict(await self._placement.move(owned, str(body.get("to", ""))))

    async def _adopt(self, key: str, _body: Mapping[str, Any]) -> Any:
        self._takes_sessions()
        return _registration(await self._affinity.locate(key))

    async def _open(self, key: str, body: Mapping[str, Any]) -> Any:
        self._takes_sessions()
        upstream = self._upstreams.get(str(body["upstream"]))
        if upstream is None:
            raise ControlError("this worker has no such server")
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in body["headers"]]
        opens = Opens(upstream, str(body["principal"]), body["params"], headers)
        return _registration(await self._affinity.locate(key, opens))

    async def _evict(self, key: str, _body: Mapping[str, Any]) -> Any:
        self._sessions.end(self._owned(key), "evicted")
        await self._sessions.settle()
        return {}

    def _takes_sessions(self) -> None:
        if self._sessions.draining:  # and would ask the next one
            raise ControlError("this worker takes no more sessions")

    def _owned(self, key: str) -> Owned:
        owned = self._sessions.get(key)
        if owned is None:
            raise ControlError("this worker does not own the session")
        return owned


def _registration(found: Owned | Registration | None) -> dict[str, Any]:
    registration = found.registration if isinstance(found, Owned) else found
    if registration is None:
        raise ControlError("there is no such session")
    return asdict(registration)
