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
from redis.exceptions import NoScriptError, RedisError

from ..client import Argument, Line, execute, execute_all
from ..cluster import Cluster

Call = tuple[Sequence[str], Sequence[Argument]]
"""Keys and arguments of one run of a script."""


@dataclass(frozen=True)
class Script:
    """One Lua script and the digest Redis knows it by."""

    name: str
    source: str
    digest: str

    def command(self, keys: Sequence[str], args: Sequence[Argument]) -> tuple[Argument, ...]:
        """The EVALSHA command, for a pipeline."""
        return ("EVALSHA", self.digest, len(keys), *keys, *args)

    async def run(self, client: Redis | Line | Cluster, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run it; raises what redis-py raises, but for NOSCRIPT."""
        (answer,) = await self.run_all(client, [(keys, args)])
        return answer

    async def run_all(self, client: Redis | Line | Cluster, calls: Sequence[Call]) -> list[Any]:
        """Run it many times, in one round trip: its keys and arguments each. Raises as `run`; others may have run."""
        answers = await execute_all(client, [self.command(*call) for call in calls], raise_on_error=False)
        unknown = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            commands = [("EVAL", self.source, len(keys), *keys, *args) for keys, args in (calls[i] for i in unknown)]
            for index, answer in zip(unknown, await execute_all(client, commands, raise_on_error=False), strict=True):
                answers[index] = answer
        for answer in answers:
            if isinstance(answer, RedisError):
                raise answer
        return answers

    async def load(self, client: Redis | Line) -> None:
        """Make the node know it, for `command`."""
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
