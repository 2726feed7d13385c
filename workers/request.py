"""One request of a client, as the edge passes it from hand to hand."""

from __future__ import annotations

from dataclasses import dataclass

from ..pool import Message, Upstream
from ..pool.link import Headers
from .asgi import Receive, Scope
from .identity import Caller


@dataclass(frozen=True, slots=True)
class Request:
    """Read whole, and its caller known."""

    upstream: Upstream
    caller: Caller
    version: str | None
    """The protocol version that its header names."""
    message: Message | None
    """None for GET and DELETE."""
    body: bytes
    scope: Scope
    receive: Receive

    @property
    def headers(self) -> Headers:
        return self.scope["headers"]

    @property
    def method(self) -> str:
        """Of HTTP."""
        return self.scope["method"]

    @property
    def initializes(self) -> bool:
        message = self.message
        return message is not None and message.kind == "request" and message.method == "initialize"
