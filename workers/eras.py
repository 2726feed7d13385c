"""Which upstreams are of the handshake era only, learnt from how they answer requests of protocol 2026-07-28.

Asking once is enough: old servers open a session for every probe and keep it. What is learnt is forgotten after a
while, for an upstream may be upgraded.
"""

from __future__ import annotations

from time import monotonic
from typing import Final

from ..pool.jsonrpc import UNSUPPORTED_PROTOCOL_VERSION, InvalidMessage, parse
from .asgi import Message, Send

REMEMBER_S: Final = 300.0

# A server of the newer era refuses with these; any other refusal of a probe is an older server that did not understand.
_STATELESS_ERA_CODES: Final = frozenset({UNSUPPORTED_PROTOCOL_VERSION, -32021, -32020, -32601, -32602})


class Eras:
    """What is known of each upstream, by name."""

    def __init__(self) -> None:
        self._handshake_only: dict[str, float] = {}

    def is_handshake_only(self, upstream: str) -> bool:
        learnt = self._handshake_only.get(upstream)
        return learnt is not None and monotonic() - learnt < REMEMBER_S

    def watch(self, upstream: str, send: Send) -> Send:
        """Wrap the `send` of an answer to a request of the newer era; passes everything on."""
        refused = False
        body = b""

        async def watching(message: Message) -> None:
            nonlocal refused, body
            if message["type"] == "http.response.start":
                refused = message["status"] in (400, 404, 405, 406)
            elif refused and len(body) < 65536:
                body += message.get("body", b"")
                if not message.get("more_body", False) and _is_misunderstood(body):
                    self._handshake_only[upstream] = monotonic()
            await send(message)

        return watching


def _is_misunderstood(body: bytes) -> bool:
    try:
        error = parse(body).payload.get("error")
    except InvalidMessage:
        return True
    return not isinstance(error, dict) or error.get("code") not in _STATELESS_ERA_CODES  # pyright: ignore
