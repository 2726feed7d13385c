"""Connections between simulated processes and Redis nodes: each direction keeps its order, and takes its time.

The client's end is an asyncio transport, so that the real client library runs above it. What can happen to it:

* bytes wait while the network is cut one way or both ways, and arrive when it is whole again, as TCP sends them once
  more; a command may thus run long after its sender has given it up;
* it is reset: by the node (it died, or it was told to), or by the client (it closes), which the other end learns a
  little later; what a node popped for a connection that has gone is lost.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import hiredis

from .server import RedisNode, Refusal, packed

LATENCY_S = (0.0001, 0.002)
SLOW_S = (0.01, 0.15)
SLOW_SHARE = 0.02
"""So many messages take longer, as a rule."""


class Cut(Enum):
    """What a cut between a process and Redis keeps from arriving."""

    NONE = "none"
    BOTH = "both"
    COMMANDS = "commands"
    ANSWERS = "answers"
    LOUD = "loud"
    """Connections are refused at once; none is left open."""


class Timeline(Protocol):
    """Where things happen."""

    now: float

    def after(self, delay_s: float, action: Callable[[], None]) -> None: ...


@dataclass
class Trap:
    """A fault that waits for its command: the connection breaks before or after that ran."""

    script: str
    """Name of a script, or of a command in upper case. POP: whenever a blocking pop takes an element, which is lost."""
    ran: bool
    """Whether the command takes effect; its answer is lost either way."""
    lasts_s: float = 0.0
    """For how long there is no new connection afterwards."""


@dataclass(eq=False)
class Host:
    """A process, as the network sees it."""

    name: str
    loop: Any = None
    cut: Cut = Cut.NONE
    alive: bool = True
    traps: list[Trap] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)


class Connection(asyncio.Transport):
    """The client's end, and the server's: `node` runs what arrives, command by command."""

    def __init__(self, network: Network, host: Host, node: RedisNode, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._network = network
        self._host = host
        self._node = node
        self._protocol = protocol
        self._closing = False
        self._held: dict[bool, deque[Callable[[], None]]] = {True: deque(), False: deque()}
        """What waits for the network to be whole: by whether it goes to the node."""
        self._last = {True: 0.0, False: 0.0}
        self._reader = hiredis.Reader()
        self._commands: deque[list[bytes]] = deque()
        self._blocked: bytes | None = None
        """The list on which the node blocks for this connection."""
        self._blocks = 0
        self.ran = ""
        """The last command."""
        self.served = True
        """Whether the node still serves it."""

    # -- the client's end --------------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            sent = bytes(data)
            self._send(lambda: self._arrived(sent), to_node=True)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self._close(None)

    abort = close

    def pause_reading(self) -> None:
        """Nothing here is so large."""

    def resume_reading(self) -> None:
        """Nothing here is so large."""

    def is_reading(self) -> bool:
        return not self._closing

    def get_write_buffer_size(self) -> int:
        return 0

    def _close(self, error: Exception | None) -> None:
        if self._closing:
            return
        self._closing = True
        if self in self._host.connections:
            self._host.connections.remove(self)
        self._host.loop.call_soon(self._protocol.connection_lost, error)
        # What was sent may still arrive and run; then the node learns.
        self._send(self._unserve, to_node=True)

    def reset(self) -> None:
        """The connection breaks: nobody hears anything more over it."""
        self._unserve()
        self._held[False].clear()
        self._held[True].clear()
        if self._host.alive:
            self._network.time.after(self._network.latency(), self._lost)

    def forgotten(self) -> None:
        """The node does not know this connection any more, unless it blocks for it."""
        if self._blocked is None:
            self._unserve()

    def _lost(self) -> None:
        self._close(ConnectionResetError("simulated"))

    # -- between the ends --------------------------------------------------------------------------------------------

    def _send(self, action: Callable[[], None], *, to_node: bool) -> None:
        self._held[to_node].append(action)
        time = self._network.time
        at = self._last[to_node] = max(self._last[to_node], time.now + self._network.latency())
        time.after(at - time.now, lambda: self._pass(to_node=to_node))

    def _pass(self, *, to_node: bool) -> None:
        """The first thing that waits arrives, unless the network is cut."""
        stops = (Cut.BOTH, Cut.COMMANDS) if to_node else (Cut.BOTH, Cut.ANSWERS)
        if self._held[to_node] and self._host.cut not in stops:
            self._held[to_node].popleft()()

    def healed(self) -> None:
        """The network is whole: what was held arrives in its order."""
        for to_node in (True, False):
            for _ in range(len(self._held[to_node])):
                self._network.time.after(self._network.latency(), lambda to_node=to_node: self._pass(to_node=to_node))

    # -- the node's end ----------------------------------------------------------------------------------------------

    def _arrived(self, data: bytes) -> None:
        if not self.served:
            return
        self._reader.feed(data)
        while (command := self._reader.gets()) is not False:
            self._commands.append(command)
        self._serve()

    def _serve(self) -> None:
        answers: list[bytes] = []
        while self.served and self._commands and self._blocked is None:
            command = self._commands.popleft()
            self.ran = self._network.name(command)
            trap = self._trap(command)
            if trap is not None and not trap.ran:
                self.reset()
                return
            if command[0].upper() == b"BLPOP":
                self._block(command[1], float(command[2]), answers)
            else:
                answers.append(packed(self._network.run(self._node, command)))
            if trap is not None:
                self.reset()
                return
        if answers:
            self._answer(b"".join(answers))

    def _trap(self, command: Sequence[bytes]) -> Trap | None:
        for trap in self._host.traps:
            if self._network.name(command) == trap.script:
                return self._network.sprung(self._host, trap)
        return None

    def _answer(self, data: bytes) -> None:
        def deliver() -> None:
            if not self._closing:
                self._host.loop.call_soon(self._received, data)

        self._send(deliver, to_node=False)

    def _received(self, data: bytes) -> None:
        if not self._closing:
            self._protocol.data_received(data)

    def _block(self, key: bytes, timeout_s: float, answers: list[bytes]) -> None:
        popped = self._network.run(self._node, [b"LPOP", key, b"1"])
        if popped:
            if not self._vanishes():
                answers.append(packed([key, popped[0]]))
            return
        self._blocked = key
        self._blocks += 1
        number = self._blocks
        self._network.blocked.append(self)
        self._network.time.after(timeout_s, lambda: self._unblock(number))

    def _unblock(self, number: int) -> None:
        if self._blocked is not None and self._blocks == number and self.served:
            self._blocked = None
            self._network.blocked.remove(self)
            self._answer(packed(None))
            self._serve()

    def wake(self, node: RedisNode, key: bytes) -> bool:
        """Give what has come to the connection that waits for it; whether it waited."""
        if self._node is not node or self._blocked != key:
            return False
        popped = self._network.run(node, [b"LPOP", key, b"1"])
        if not popped:
            return False
        if self._vanishes():
            return True
        self._blocked = None
        self._network.blocked.remove(self)
        self._answer(packed([key, popped[0]]))
        self._serve()
        return True

    def _vanishes(self) -> bool:
        """Whether the connection breaks just as an element was popped for it: it is lost."""
        trap = next((trap for trap in self._host.traps if trap.script == "POP"), None)
        if trap is None:
            return False
        self._network.sprung(self._host, trap)
        self.reset()
        return True

    def _unserve(self) -> None:
        self.served = False
        self._commands.clear()
        if self._blocked is not None:
            self._blocked = None
            self._network.blocked.remove(self)


class Network:
    """Everything between processes and the one node that is master now; None while there is none."""

    def __init__(self, time: Timeline, rng: random.Random, name: Callable[[Sequence[bytes]], str]) -> None:
        """`name` says what a command is called in a `Trap`."""
        self.time = time
        self.name = name
        self.master: RedisNode | None = None
        self.blocked: list[Connection] = []
        self.slow_share = SLOW_SHARE
        self._rng = rng
        self._hosts: list[Host] = []

    def latency(self) -> float:
        low, high = SLOW_S if self._rng.random() < self.slow_share else LATENCY_S
        return self._rng.uniform(low, high)

    def join(self, host: Host) -> None:
        self._hosts.append(host)

    async def connect(
        self, host: Host, factory: Callable[[], asyncio.Protocol]
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connect to the master; waits for as long as the network is cut, raises `ConnectionRefusedError`."""
        await asyncio.sleep(self.latency())
        while host.cut in (Cut.BOTH, Cut.COMMANDS, Cut.ANSWERS):
            await asyncio.sleep(0.05)
        if self.master is None or host.cut is Cut.LOUD:
            raise ConnectionRefusedError("simulated")
        protocol = factory()
        connection = Connection(self, host, self.master, protocol)
        host.connections.append(connection)
        protocol.connection_made(connection)
        return connection, protocol

    def run(self, node: RedisNode, command: Sequence[bytes]) -> Any:
        """Run one command, and let those that block on what it added have it."""
        try:
            answer = node.execute(command)
        except Refusal as refusal:
            answer = refusal
        if node.grown:
            # When the command is over, as in the real server; in the turn after, for its own connection goes on first.
            grown = list(node.grown)
            node.grown.clear()
            self.time.after(0.0, lambda: self._serve_blocked(node, grown))
        return answer

    def _serve_blocked(self, node: RedisNode, keys: list[bytes]) -> None:
        for key in keys:
            for connection in list(self.blocked):
                connection.wake(node, key)

    def reset_all(self) -> None:
        """The node has died: all connections to it break."""
        for host in self._hosts:
            for connection in list(host.connections):
                connection.reset()

    def forget(self, host: Host, script: str = "") -> None:
        """Connections of a process are dead, and it does not know: what it sends is lost. `script`: only those over
        which that was run last; never one on which it waits for its mailbox."""
        for connection in list(host.connections):
            if not script or connection.ran == script:
                connection.forgotten()

    def cut(self, host: Host, how: Cut) -> None:
        host.cut = how
        if how is Cut.LOUD:
            for connection in list(host.connections):
                connection.reset()

    def sprung(self, host: Host, trap: Trap) -> Trap:
        """A trap has found its command."""
        host.traps.remove(trap)
        if trap.lasts_s and host.cut is Cut.NONE:
            host.cut = Cut.LOUD
            self.time.after(trap.lasts_s, lambda: self.heal(host))
        return trap

    def heal(self, host: Host) -> None:
        """The network is whole again, and tells of connections that are none."""
        host.cut = Cut.NONE
        for connection in list(host.connections):
            if connection.served:
                connection.healed()
            else:
                connection.reset()

    def kill(self, host: Host, *, silently: bool) -> None:
        """The process is gone. Its kernel tells the node, unless the machine went with it."""
        host.alive = False
        for connection in list(host.connections):
            if not silently:
                self.time.after(self.latency(), connection._unserve)
