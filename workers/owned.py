"""A session that a worker owns, how one is opened that many share, and what another owner needs to continue one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ..coordinator import Keyring, Registration, SealError
from ..pool import PooledSession, ResumeRecord, Upstream
from ..pool.link import Headers

GET_CONFLICT_S: Final = 10.0
"""How long after an adoption the previous owner may still hold the session's GET stream."""


@dataclass(frozen=True, slots=True)
class Opens:
    """How a shared session is opened and initialized, by the worker that claims it."""

    upstream: Upstream
    principal: str
    params: dict[str, Any]
    """Of `initialize`."""
    headers: Headers
    """Of the caller who opens it: credentials, where they are forwarded."""


@dataclass(slots=True)
class Owned:
    """A session and the registration under which this worker owns it; None until the first claim."""

    session: PooledSession
    registration: Registration | None = None
    created_ms: int = 0
    refreshed_at: float = 0.0
    node: int = 0
    """The Redis node that has the record; another one may have forgotten it."""
    sealed: ResumeRecord | None = None
    """The resume record as Redis has it."""
    has_left: bool = False
    """It was given up, for another owner."""
    adopted_at: float = float("-inf")
    relay: Any = None
    """What serves the clients of a session that is shared (`serving.py`)."""

    @property
    def adopted(self) -> bool:
        """Whether it was taken over a moment ago."""
        return asyncio.get_running_loop().time() - self.adopted_at < GET_CONFLICT_S


def seal_resume(keyring: Keyring, key: str, resume: ResumeRecord) -> bytes:
    """A resume record as Redis has it: only the fleet can read it, and only as that of this session."""
    plain = orjson.dumps([resume.session_id, resume.protocol_version, resume.cookies, resume.initialize_result])
    return keyring.seal_record(plain, key.encode())


def open_resume(keyring: Keyring, key: str, sealed: bytes) -> ResumeRecord:
    """Inverse of `seal_resume`; raises `SealError`."""
    try:
        session_id, version, cookies, result = orjson.loads(keyring.open_record(sealed, key.encode()))
    except (ValueError, TypeError) as error:
        raise SealError("resume record") from error
    return ResumeRecord(session_id, version, cookies, result)
