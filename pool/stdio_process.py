"""One child process in a process group of its own: its pipes as lines, and an end that is bounded in time.

There is no task in here. Pipes, the notice of exit and the steps towards the end are callbacks of the loop, so that no
cancellation can leave a process half ended. The steps:

    RUNNING -> CLOSING (stdin closed) -> TERMINATING (SIGTERM to the group) -> KILLING (SIGKILL) -> GONE

`GONE` is reached as soon as the child has been reaped and nothing is left of its group. A child that exits by itself
enters at TERMINATING, because its own children may live on.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

from .errors import OpenFailed, SessionClosed
from .reaper import POLL_S, group_lives, reaper, signal_group
from .stdio_lines import STRAY_LINE_BYTES, LineSplitter, StrayLog

STEP_S = 2.0
"""How long stdin's end, and then SIGTERM, may take to end the child."""
KILL_S = 1.0
"""How long SIGKILL may take before the child is given up (a process that hangs in the kernel)."""
EXIT_NOTICE_S = 0.02
"""How long the notice of exit may come after the end of stdout."""
LAST_WORDS_S = 0.2
"""How long an exited child's stdout is still read when something else holds it open."""
MAX_LINE_BYTES = 256 << 20

_INHERITED = frozenset({"HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "USER"})

_log = logging.getLogger("leasehold.pool.stdio")


class Stage(enum.IntEnum):
    """How far a process is on its way to its end."""

    RUNNING = 0
    CLOSING = 1
    TERMINATING = 2
    KILLING = 3
    GONE = 4


_NEXT = {
    Stage.CLOSING: (STEP_S, Stage.TERMINATING),
    Stage.TERMINATING: (STEP_S, Stage.KILLING),
    Stage.KILLING: (KILL_S, Stage.GONE),
}


def child_environment(configured: Mapping[str, str]) -> dict[str, str]:
    """The variables that are safe to inherit (no credentials among them), and the configured ones over them."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        # "()" starts an exported shell function: code, not data.
        if (key in _INHERITED or key.startswith("LC_")) and not value.startswith("()")
    }
    return inherited | dict(configured)


class StdioProcess:
    """A child that reads and writes lines. `on_lost` is called once, when no more lines will come."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        *,
        name: str,
        stray: StrayLog,
        on_line: Callable[[bytes], None],
        on_writable: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.name = name
        self.pid = child.pid
        self.stage = Stage.RUNNING
        self.is_paused = False
        self._loop = asyncio.get_running_loop()
        self._stray = stray
        self._child = child
        self._on_line = on_line
        self._on_writable = on_writable
        self._on_lost = on_lost
        self._is_lost = False
        self._output_ended = False
        self._group_ended = False
        self._stdin: asyncio.WriteTransport | None = None
        self._readers: list[asyncio.ReadTransport] = []
        self._timer: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()

    @classmethod
    async def start(
        cls,
        command: str,
        args: Sequence[str],
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        *,
        name: str,
        stray: StrayLog,
        on_line: Callable[[bytes], None],
        on_writable: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> StdioProcess:
        """Start a child. Raises OpenFailed when the system refuses; nothing is left running then, nor if cancelled."""
        child, pipes = _spawn(name, [command, *args], child_environment(env), cwd)
        try:
            reaper.add(child.pid)
        except OSError as error:
            _log.warning("reaper_failed upstream=%s error=%s", name, error)
        self = cls(child, name=name, stray=stray, on_line=on_line, on_writable=on_writable, on_lost=on_lost)
        try:
            self._watch_exit()
            await self._connect(pipes)
        except BaseException as error:
            self._is_lost = True
            self._step(Stage.KILLING)
            if isinstance(error, OSError):
                raise OpenFailed(f"upstream {name!r}: cannot connect its pipes: {error}") from error
            raise
        _log.debug("process_started upstream=%s pid=%d", name, self.pid)
        return self

    def __repr__(self) -> str:
        return f"<StdioProcess {self.name!r} pid={self.pid} {self.stage.name} returncode={self.returncode}>"

    @property
    def returncode(self) -> int | None:
        """The child's exit status (negative: the signal); None while it runs."""
        return self._child.returncode

    def write(self, line: bytes) -> None:
        """Queue one line, newline included, whole. Raises SessionClosed when stdin is closed: nothing was written."""
        if self._stdin is None or self._stdin.is_closing():
            raise SessionClosed(f"upstream {self.name!r}: its process takes no more input")
        self._stdin.write(line)

    def terminate(self) -> None:
        """Begin the end, if it has not begun: `wait_gone` returns within 2 * STEP_S + KILL_S seconds.

        No line is read any more, and `on_lost` is not called: the caller knows.
        """
        self._is_lost = True
        self._step(Stage.CLOSING)
        self._finish_if_over()

    async def wait_gone(self) -> None:
        """Return once the child and its group have ended."""
        await self._gone.wait()

    async def _connect(self, pipes: list[_Pipe]) -> None:
        try:
            # Whoever connects a pipe closes it, also when that fails.
            self._stdin, _ = await self._loop.connect_write_pipe(lambda: _Stdin(self), pipes.pop(0))
            for protocol in (_Stdout(self), _Stderr(self._stray)):
                transport, _ = await self._loop.connect_read_pipe(lambda protocol=protocol: protocol, pipes.pop(0))
                self._readers.append(transport)
        except BaseException:
            for pipe in pipes:
                os.close(pipe.fileno())
            raise

    # The way to the end

    def _step(self, stage: Stage) -> None:
        if stage <= self.stage:
            return
        self.stage = stage
        if self._timer is not None:
            self._timer.cancel()
        if self._stdin is not None:
            self._stdin.close()
        if stage is Stage.TERMINATING:
            signal_group(self.pid, signal.SIGTERM)
        elif stage is Stage.KILLING:
            signal_group(self.pid, signal.SIGKILL)
        elif stage is Stage.GONE:
            self._finish()
            return
        delay, following = _NEXT[stage]
        self._timer = self._loop.call_later(delay, self._step, following)

    def _finish_if_over(self) -> None:
        if self._group_ended and self._is_lost:
            self._step(Stage.GONE)

    def _finish(self) -> None:
        if self._group_ended:
            _log.debug("process_gone upstream=%s pid=%d returncode=%s", self.name, self.pid, self.returncode)
        else:
            _log.error("process_stuck upstream=%s pid=%d returncode=%s", self.name, self.pid, self.returncode)
            if self.returncode is not None:
                # The number is free again, or soon will be.
                reaper.remove(self.pid)
        self._is_lost = True
        self._gone.set()
        for transport in self._readers:
            transport.close()
        # Closed long ago, but bytes nobody reads may keep it open. (asyncio's fails when aborted without need.)
        if self._stdin is not None and self._stdin.get_write_buffer_size():
            self._stdin.abort()

    def _watch_exit(self) -> None:
        try:
            fd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # no Linux, or one without it
            threading.Thread(target=self._wait_in_thread, name=f"wait-{self.pid}", daemon=True).start()
            return

        def on_readable() -> None:
            self._loop.remove_reader(fd)
            os.close(fd)
            self._on_exit()

        self._loop.add_reader(fd, on_readable)

    def _wait_in_thread(self) -> None:
        self._child.wait()
        try:
            self._loop.call_soon_threadsafe(self._on_exit)
        except RuntimeError:  # the loop is closed, and the session with it
            pass

    def _on_exit(self) -> None:
        self._child.poll()
        self._await_group()
        # Output that is already in the pipe, perhaps a response, comes before its end. Whoever else holds the pipe
        # open does not delay the news for long.
        if self._output_ended:
            self._lose(self._describe_exit())
        else:
            self._loop.call_later(LAST_WORDS_S, lambda: self._lose(self._describe_exit()))

    def _await_group(self) -> None:
        if self.stage is Stage.GONE:
            return
        if group_lives(self.pid):
            self._step(Stage.TERMINATING)
            self._loop.call_later(POLL_S, self._await_group)
        else:
            self._group_ended = True
            reaper.remove(self.pid)
            self._finish_if_over()

    def _describe_exit(self) -> str:
        code = self.returncode
        if code is None:
            return "its process closed its output"
        return f"its process was ended by signal {-code}" if code < 0 else f"its process exited with status {code}"

    def _lose(self, reason: str) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._on_lost(reason)
            self.terminate()

    # Called by the protocols

    def received(self, lines: list[bytes]) -> None:
        """Lines of stdout, in order."""
        for line in lines:
            if self._is_lost:
                return
            self._on_line(line)

    def output_ended(self) -> None:
        """No more lines will come."""
        self._output_ended = True
        if self.returncode is not None:
            self._lose(self._describe_exit())
        else:
            # The notice of exit is on its way, with the status that people want to see.
            self._loop.call_later(EXIT_NOTICE_S, lambda: self._lose(self._describe_exit()))

    def output_overran(self) -> None:
        """A line is longer than we can hold: the request it answers is unknown, and would wait in vain."""
        self._lose(f"it wrote a line of more than {MAX_LINE_BYTES} bytes")

    def input_ended(self) -> None:
        """Stdin is closed: by us, or by a child that listens no more, which is as good as gone."""
        self._stdin = None
        if self.stage is Stage.RUNNING:
            self._loop.call_later(LAST_WORDS_S, self._lose, "its process closed its input")

    def paused(self, is_paused: bool) -> None:
        """The child reads more slowly than we write, or does so no more."""
        self.is_paused = is_paused
        if not is_paused:
            self._on_writable()


class _Pipe:
    """Our end of a pipe, as loops take it: closed by them, exactly once.

    uvloop closes the descriptor and then the object too: a file object would close the number a second time, which by
    then may be another thread's. asyncio's own loops close the object only.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_ours = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._is_ours:
            self._is_ours = False
            os.close(self._fd)


def _spawn(
    name: str, command: Sequence[str], env: Mapping[str, str], cwd: str | os.PathLike[str] | None
) -> tuple[subprocess.Popen[bytes], list[_Pipe]]:
    """Start a child; returns it with our ends of its stdin, stdout and stderr. Raises OpenFailed."""
    fds: list[int] = []
    try:
        for _ in range(3):
            fds += os.pipe()
        # In this turn of the loop: the interpreter holds its lock until the child's exec anyway (0.6 ms).
        child = subprocess.Popen(  # noqa: S603 - the command is the configuration's
            command, stdin=fds[0], stdout=fds[3], stderr=fds[5], env=env, cwd=cwd, start_new_session=True
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
        for fd in fds:
            os.close(fd)
        raise OpenFailed(f"upstream {name!r}: cannot start its process: {error}") from error
    for fd in (fds[0], fds[3], fds[5]):
        os.close(fd)
    return child, [_Pipe(fds[1]), _Pipe(fds[2]), _Pipe(fds[4])]


class _Stdin(asyncio.BaseProtocol):
    def __init__(self, process: StdioProcess) -> None:
        self._process = process

    def pause_writing(self) -> None:
        self._process.paused(True)

    def resume_writing(self) -> None:
        self._process.paused(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._process.input_ended()


class _Stdout(asyncio.Protocol):
    def __init__(self, process: StdioProcess) -> None:
        self._process = process
        self._splitter = LineSplitter(MAX_LINE_BYTES)

    def data_received(self, data: bytes) -> None:
        lines = self._splitter.feed(data)
        if self._splitter.overran:
            self._process.output_overran()
            return
        self._process.received(lines)

    def connection_lost(self, exc: Exception | None) -> None:
        # A last line without a newline is one all the same.
        if rest := self._splitter.rest():
            self._process.received([rest])
        self._process.output_ended()


class _Stderr(asyncio.Protocol):
    def __init__(self, log: StrayLog) -> None:
        self._log = log
        self._splitter = LineSplitter(STRAY_LINE_BYTES)

    def data_received(self, data: bytes) -> None:
        for line in self._splitter.feed(data):
            self._log.write(line)

    def connection_lost(self, exc: Exception | None) -> None:
        self._log.write(self._splitter.rest())
        self._log.report()
