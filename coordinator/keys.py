"""Every Redis key of Leasehold. Nothing else builds a key.

Keys that meet in one script or one blocking pop share a hash tag, so that Redis Cluster keeps them on one node. Session
ids are bearer secrets and may hold any character: only their SHA-256 is written.

    <namespace>:{w:<incarnation>}:lease        hash   gen, info; PX = lease
    <namespace>:{w:<incarnation>}:ended        string the worker's end is known, not only its lease missing; PX
    <namespace>:{w:<incarnation>}:box:<gen>    list   sealed envelopes for that worker; PX = BOX_TTL_MS
    <namespace>:{s:<sha256 of session id>}     hash   owner, epoch, upstream, principal, created_ms, resume; PX
    <namespace>:{s:<...>}:events               stream epoch-number -> e: sealed event of the session's own streams; PX
    <namespace>:circuits                       hash   upstream -> its circuit, of those in trouble; PX
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256


def session_key(session_id: str) -> str:
    """The name under which a session is known in Redis, in frames and to operators: SHA-256 of its id, in hex."""
    return sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under one namespace; fleets that share a Redis have different ones."""

    namespace: str

    def lease(self, incarnation: str) -> str:
        return f"{self.namespace}:{{w:{incarnation}}}:lease"

    def ended(self, incarnation: str) -> str:
        return f"{self.namespace}:{{w:{incarnation}}}:ended"

    def mailbox(self, incarnation: str, generation: int) -> str:
        return f"{self.namespace}:{{w:{incarnation}}}:box:{generation}"

    def session(self, key: str) -> str:
        return f"{self.namespace}:{{s:{key}}}"

    def events(self, key: str) -> str:
        return f"{self.namespace}:{{s:{key}}}:events"

    @property
    def circuits(self) -> str:
        return f"{self.namespace}:circuits"

    @property
    def leases(self) -> str:
        """A SCAN pattern over all leases."""
        return f"{_literal(self.namespace)}:{{w:*}}:lease"

    @property
    def sessions(self) -> str:
        """A SCAN pattern over all session records."""
        return f"{_literal(self.namespace)}:{{s:*}}"

    def incarnation_of(self, lease_key: str) -> str:
        return lease_key.rpartition("{w:")[2].partition("}")[0]

    def session_of(self, record_key: str) -> str:
        return record_key.rpartition("{s:")[2].partition("}")[0]


def _literal(text: str) -> str:
    """`text` as a part of a SCAN pattern that matches only itself."""
    return re.sub(r"([*?\[\]^\\])", r"\\\1", text)
