"""Loading and running the Lua scripts in this folder: one file each, with KEYS, ARGV and result in its head.

`EVALSHA` fails after a Redis restart (NOSCRIPT: nothing ran), so every call falls back to sending the source. Scripts
are sent as plain commands: redis-py refuses `pipeline.evalsha` on Cluster, `execute_command("EVALSHA", ...)` works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from ..client import Argument, Line, execute


@dataclass(frozen=True)
class Script:
    """One Lua script and the digest Redis knows it by."""

    name: str
    source: str
    digest: str

    def command(self, keys: Sequence[str], args: Sequence[Argument]) -> tuple[Argument, ...]:
        """The EVALSHA command, for a pipeline."""
        return ("EVALSHA", self.digest, len(keys), *keys, *args)

    async def run(self, client: Redis | Line, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run it; raises what redis-py raises, but for NOSCRIPT."""
        try:
            return await execute(client, *self.command(keys, args))
        except NoScriptError:
            return await execute(client, "EVAL", self.source, len(keys), *keys, *args)

    async def load(self, client: Redis | Line) -> None:
        """Make Redis know it, for `command`."""
        await execute(client, "SCRIPT LOAD", self.source)


def _load(name: str) -> Script:
    source = files(__name__).joinpath(f"{name}.lua").read_text("utf-8")
    # SHA-1 is how Redis names scripts; nothing is secured by it.
    return Script(name, source, sha1(source.encode(), usedforsecurity=False).hexdigest())


LEASE_ACQUIRE: Final = _load("lease_acquire")
LEASE_RENEW: Final = _load("lease_renew")
MAILBOX_ROTATE: Final = _load("mailbox_rotate")
MAILBOX_PUSH: Final = _load("mailbox_push")
SESSION_CLAIM: Final = _load("session_claim")
SESSION_TAKEOVER: Final = _load("session_takeover")
SESSION_RELEASE: Final = _load("session_release")
SESSION_HAND_OFF: Final = _load("session_hand_off")
SESSION_REFRESH: Final = _load("session_refresh")
CIRCUITS_EXCHANGE: Final = _load("circuits_exchange")
