"""Which upstreams are of the handshake era only, learnt from how they answer `server/discover` of protocol 2026-07-28.

Asking once is enough: old servers open a session for every probe and keep it. What is learnt counts for everybody, so
nothing else teaches it: any other request may be refused for what its one client wrote. It is forgotten after a while,
for an upstream may be upgraded, and at once when the upstream answers a request of the newer era.
"""

from __future__ import annotations

from time import monotonic
from typing import Final

from ..pool import Message
from ..pool.jsonrpc import UNSUPPORTED_PROTOCOL_VERSION, InvalidMessage, parse
from .answers import STATELESS_VERSIONS
from .asgi import Message as AsgiMessage
from .asgi import Send

REMEMBER_S: Final = 300.0
PROBE: Final = "server/discover"
"""The request by which clients ask for the newer era, before anything else and with nothing in it of their own."""

MAX_ERROR_BYTES: Final = 65536

# Of the client, of its credential, or of the moment: they say nothing of the era.
_OTHER_REASONS: Final = frozenset({401, 402, 403, 407, 408, 413, 421, 423, 425, 429, 431, 451})

# A server of the newer era refuses with these; any other refusal of a probe is an older server that did not understand.
_STATELESS_ERA_CODES: Final = frozenset({UNSUPPORTED_PROTOCOL_VERSION, -32021, -32020, -32601, -32602})


class Eras:
    """What is known of each upstream, by name."""

    def __init__(self) -> None:
        self._handshake_only: dict[str, float] = {}

    def is_handshake_only(self, upstream: str) -> bool:
        learnt = self._handshake_only.get(upstream)
        return learnt is not None and monotonic() - learnt < REMEMBER_S

    def watch(self, upstream: str, version: str, request: Message, send: Send) -> Send:
        """Wrap the `send` of an answer to a request that names a `version` of the newer era; passes everything on."""
        is_probe = request.method == PROBE and version in STATELESS_VERSIONS
        is_refused = False
        body = bytearray()

        async def watching(message: AsgiMessage) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start":
                status: int = message["status"]
                if 200 <= status < 300:
                    self._handshake_only.pop(upstream, None)
                is_refused = is_probe and 400 <= status < 500 and status not in _OTHER_REASONS
            elif is_refused and len(body) < MAX_ERROR_BYTES:
                body.extend(message.get("body", b""))
                if not message.get("more_body", False) and _is_misunderstood(body):
                    self._handshake_only[upstream] = monotonic()
            await send(message)

        return watching


def _is_misunderstood(body: bytes | bytearray) -> bool:
    try:
        error = parse(body).payload.get("error")
    except InvalidMessage:
        return True
    return not isinstance(error, dict) or error.get("code") not in _STATELESS_ERA_CODES  # pyright: ignore
