"""Redis URLs: where Redis is, in which form, and how to connect to it.

    redis://[user:password@]host[:port][/db]                       one server
    unix://[user:password@]/path/to/redis.sock[?db=0]              one server, on this machine
    redis+sentinel://[user:password@]host[:port],.../service[/db]  the master of a service, as these Sentinels know it
    redis+cluster://[user:password@]host[:port],...                a Redis Cluster, by any of its nodes

With `rediss` instead of `redis` over TLS, to Sentinels too. Schemes are those of the library `limits`, options those of
redis-py's URLs. User and password are those of the Redis nodes; Sentinels have their own as options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

Address = tuple[str, int]
"""Host and port."""

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379


class Form(Enum):
    """In which form Redis is run."""

    SERVER = "server"
    SOCKET = "socket"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


SCHEMES: Final = {
    "redis": (Form.SERVER, False),
    "rediss": (Form.SERVER, True),
    "unix": (Form.SOCKET, False),
    "redis+unix": (Form.SOCKET, False),
    "redis+sentinel": (Form.SENTINEL, False),
    "rediss+sentinel": (Form.SENTINEL, True),
    "redis+cluster": (Form.CLUSTER, False),
    "rediss+cluster": (Form.CLUSTER, True),
}
EXPECTED: Final = (
    "a redis://, rediss:// or unix:// URL, redis+sentinel://host:port,.../service or redis+cluster://host:port,... "
    "(rediss+... for TLS)"
)


class RedisUrlError(ValueError):
    """Raised when a Redis URL is wrong. The message holds nothing of the URL but names of options."""


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A Redis URL, taken apart. Its `str` and `repr` hold no credentials."""

    scheme: str
    form: Form
    tls: bool
    addresses: tuple[Address, ...]
    """Of the server, the Sentinels or some nodes of the cluster; none for a socket."""
    path: str
    """Of the socket."""
    service: str
    """Which the Sentinels watch."""
    options: Mapping[str, Any] = field(repr=False)
    """For connections to Redis: credentials, database, TLS."""
    sentinel_options: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Raises `RedisUrlError`."""
        scheme, separator, rest = url.partition("://")
        if not separator or scheme.lower() not in SCHEMES:
            raise RedisUrlError("unknown scheme")
        scheme = scheme.lower()
        form, tls = SCHEMES[scheme]
        rest, _, query = rest.partition("?")
        netloc, _, path = rest.partition("/")
        credentials, _, hosts = netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        found: dict[str, Any] = {"username": unquote(user), "password": unquote(password)}
        sentinel: dict[str, Any] = {}
        for name, value in _options(query):
            if name.startswith("ssl_") and not tls:
                raise RedisUrlError(f"{name} is an option of rediss URLs")
            if name.startswith("sentinel_"):
                if form is not Form.SENTINEL:
                    raise RedisUrlError(f"{name} is an option of Sentinel URLs")
                sentinel[name.removeprefix("sentinel_")] = value
            else:
                found[name] = value
        service = ""
        if form is Form.SENTINEL:
            service, _, path = path.partition("/")
            if not service:
                raise RedisUrlError("the name of the service is missing")
        if form is not Form.SOCKET and path:
            found.setdefault("db", _number("db", path.rstrip("/"), 0, 1_000_000) if path.rstrip("/") else 0)
        if form is Form.CLUSTER and found.get("db"):
            raise RedisUrlError("a cluster has no databases")
        if form is Form.SOCKET and not path.strip("/"):
            raise RedisUrlError("the path of the socket is missing")
        port = SENTINEL_PORT if form is Form.SENTINEL else REDIS_PORT
        addresses = () if form is Form.SOCKET else tuple(_address(host, port) for host in hosts.split(","))
        if form is Form.SERVER and len(addresses) > 1:
            raise RedisUrlError("several hosts go with Sentinel and cluster URLs")
        options = {name: value for name, value in found.items() if value not in ("", None)}
        shared = {name: value for name, value in options.items() if name.startswith("ssl_")}
        socket_path = "/" + unquote(path).lstrip("/") if form is Form.SOCKET else ""
        return cls(scheme, form, tls, addresses, socket_path, unquote(service), options, {**shared, **sentinel})

    def __str__(self) -> str:
        """Where it is, without credentials: for logs and errors."""
        if self.form is Form.SOCKET:
            return f"{self.scheme}://{self.path}"
        hosts = ",".join(name_of(address) for address in self.addresses)
        return f"{self.scheme}://{hosts}" + (f"/{self.service}" if self.service else "")


def name_of(address: Address) -> str:
    """`host:port`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(text: str, default_port: int) -> Address:
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise RedisUrlError("an IPv6 address is not closed")
        port = rest[1:]
    else:
        host, _, port = text.partition(":")
    if not host:
        raise RedisUrlError("a host is missing")
    return unquote(host), _number("port", port, 1, 65_535) if port else default_port


def _number(name: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit()) or not low <= int(text) <= high:
        raise RedisUrlError(f"{name} is no number from {low} to {high}")
    return int(text)


def _file(name: str, value: str) -> str:
    if not Path(value).is_file():
        raise RedisUrlError(f"{name} names no file")
    return value


def _bool(name: str, value: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if value.lower() not in known:
        raise RedisUrlError(f"{name} is neither true nor false")
    return known[value.lower()]


def _reqs(name: str, value: str) -> str:
    if value not in ("none", "optional", "required"):
        raise RedisUrlError(f"{name} is none of none, optional, required")
    return value


def _text(_name: str, value: str) -> str:
    return value


_READERS: Final[Mapping[str, Callable[[str, str], Any]]] = {
    "db": lambda name, value: _number(name, value, 0, 1_000_000),
    "username": _text,
    "password": _text,
    "sentinel_username": _text,
    "sentinel_password": _text,
    "ssl_ca_certs": _file,
    "ssl_certfile": _file,
    "ssl_keyfile": _file,
    "ssl_ca_path": _text,
    "ssl_ca_data": _text,
    "ssl_cert_reqs": _reqs,
    "ssl_check_hostname": _bool,
    "ssl_ciphers": _text,
    "ssl_min_version": lambda name, value: _number(name, value, 0, 0xFFFF),
    "ssl_password": _text,
}


def _options(query: str) -> Iterator[tuple[str, Any]]:
    for name, value in parse_qsl(query):
        reader = _READERS.get(name)
        if reader is None:
            # Others of redis-py's would undo what we rely on: a socket timeout cuts a pop in two, a retry pushes twice.
            raise RedisUrlError(f"the only options are {', '.join(_READERS)}")
        yield name, reader(name, value)
