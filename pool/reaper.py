"""Ends stdio children, and their children, when the worker that owns them is killed.

A worker that dies by SIGKILL runs no clean-up, and a parent-death signal would reach the child but not its children.
So each worker process keeps one helper: this file, run as a script. The helper reads the process groups it answers for
from a pipe. Only the worker holds the other end; when that closes, the worker is gone, and the helper ends every group
that is still registered (SIGTERM, a short grace, SIGKILL) and then itself.

On the pipe: `+<group>\\n` registers a process group, `-<group>\\n` forgets it without touching it. A session forgets
its group as soon as it has ended, so that a reused process id is never hit. What is left: a child that moved to a
process group of its own is out of reach, and so is one whose worker dies in the microseconds between spawn and
registration (its stdin is closed all the same).

The script imports nothing of the project and little of the standard library: it runs as `python -I -S` in 25 ms.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

GRACE_S = 1.0
"""How long a group may take to end between SIGTERM and SIGKILL."""
POLL_S = 0.05


class Reaper:
    """This process's helper: started by the first `add`, started again after a fork or when it died."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._pipe: int | None = None
        self._helper: int | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._after_fork)

    def __repr__(self) -> str:
        return f"<Reaper pid={self._helper} groups={len(self._groups)}>"

    @property
    def pid(self) -> int | None:
        """The helper's process id; None while none was needed."""
        return self._helper

    @property
    def groups(self) -> frozenset[int]:
        """The process groups the helper answers for."""
        return frozenset(self._groups)

    def add(self, group: int) -> None:
        """Have `group` ended when this process is gone. Raises OSError when no helper can be started."""
        with self._lock:
            self._groups.add(group)
            if self._pipe is None or not self._tell(f"+{group}\n"):
                try:
                    self._start()
                except OSError:
                    self._groups.discard(group)
                    raise

    def remove(self, group: int) -> None:
        """Forget `group`: it has ended, and its number may soon be somebody else's."""
        with self._lock:
            if group in self._groups:
                self._groups.discard(group)
                if self._pipe is not None and not self._tell(f"-{group}\n"):
                    self._discard()

    def close(self) -> None:
        """Have every registered group ended now, as at this process's end."""
        with self._lock:
            if self._pipe is not None:
                os.close(self._pipe)
            self._groups, self._pipe, self._helper = set(), None, None

    def _tell(self, line: str) -> bool:
        assert self._pipe is not None
        try:
            # Far below PIPE_BUF, so written whole or not at all.
            os.write(self._pipe, line.encode())
        except OSError:  # it died, or it is stopped and its pipe is full
            return False
        return True

    def _start(self) -> None:
        import subprocess

        self._discard()
        if not sys.executable:
            raise FileNotFoundError("no Python executable to run the reaper with")
        theirs, ours = os.pipe()
        try:
            os.set_blocking(ours, False)
            helper = subprocess.Popen(  # noqa: S603 - our own file
                [sys.executable, "-I", "-S", _SCRIPT],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Closes listening sockets above all: a port must not stay taken because the helper outlives the worker.
                close_fds=True,
                # Signals to the worker's group (Ctrl-C, a supervisor's SIGTERM) are not for the helper.
                start_new_session=True,
                cwd="/",
                env={key: value for key, value in os.environ.items() if key in _LOADER_VARIABLES},
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        # It outlives this process on purpose: nobody is to wait for it, and that is no leak to warn about.
        self._helper, helper.returncode = helper.pid, 0
        self._pipe = ours
        for group in self._groups:
            self._tell(f"+{group}\n")

    def _discard(self) -> None:
        """Be rid of a helper that is dead or stuck, without the end of its pipe setting it off."""
        if self._helper is not None:
            try:
                os.kill(self._helper, signal.SIGKILL)
                os.waitpid(self._helper, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
            self._helper = None
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _after_fork(self) -> None:
        # The groups are the parent's. A copy of the pipe here would hide the parent's death from its helper.
        if self._pipe is not None:
            os.close(self._pipe)
        self._groups, self._pipe, self._helper = set(), None, None
        self._lock = threading.Lock()


_SCRIPT = os.path.abspath(__file__)
_LOADER_VARIABLES = frozenset({"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT"})

reaper = Reaper()
"""The one reaper of this process."""


def signal_group(group: int, number: int) -> bool:
    """Signal a process group (0 only asks); false when nothing of it is left, or nothing we may signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        return False
    return True


def group_lives(group: int) -> bool:
    """True while a process of the group runs. Zombies, which stay where no init reaps them, do not count."""
    if not signal_group(group, 0):
        return False
    try:
        pids = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:  # not Linux
        return True
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The name before may hold anything, a parenthesis too.
                state, _, pgrp, *_ = file.read().rpartition(b")")[2].split()
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        if int(pgrp) == group and state not in (b"Z", b"X"):
            return True
    return False


def serve(pipe: int) -> None:
    """Read registrations until the other end closes, then end what is registered. The helper's whole life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    rest = b""
    while data := os.read(pipe, 65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            group = int(line[1:])
            if line.startswith(b"+"):
                groups.add(group)
            else:
                groups.discard(group)
    remaining = {group for group in groups if signal_group(group, signal.SIGTERM)}
    deadline = time.monotonic() + GRACE_S
    while remaining and time.monotonic() < deadline:
        time.sleep(POLL_S)
        remaining = {group for group in remaining if group_lives(group)}
    for group in remaining:
        signal_group(group, signal.SIGKILL)


if __name__ == "__main__":
    serve(0)
