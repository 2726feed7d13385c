"""Who owns what, and how workers reach each other: leases, directory, channels, mailboxes. Knows no MCP and no HTTP."""

from .client import RedisClients
from .cluster import Cluster
from .directory import Claimed, Directory, Registration, SessionRecord
from .errors import CoordinatorError, SealError, Unavailable
from .health import Circuit, UpstreamHealth
from .keys import Keys, session_key
from .member import Member
from .outbox import Outbox, Refusal, Ticket
from .peers import Fate, Listener, PeerInfo, end_lease, list_peers
from .sealing import Keyring
from .urls import RedisUrlError

__all__ = [
    "Circuit",
    "Claimed",
    "Cluster",
    "CoordinatorError",
    "Directory",
    "Fate",
    "Keyring",
    "Keys",
    "Listener",
    "Member",
    "Outbox",
    "PeerInfo",
    "RedisClients",
    "RedisUrlError",
    "Refusal",
    "Registration",
    "SealError",
    "SessionRecord",
    "Ticket",
    "Unavailable",
    "UpstreamHealth",
    "end_lease",
    "list_peers",
    "session_key",
]
