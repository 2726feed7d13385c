"""Signals as bytes on a pipe, so that one `select` waits for them and for everything else."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class SignalPipe:
    """A supervisor's signals while it lives; `reading` becomes readable when one came."""

    def __init__(self) -> None:
        self.reading, self._writing = os.pipe()
        for end in (self.reading, self._writing):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing)
        self._before = {number: signal.signal(number, _ignored) for number in SIGNALS}

    def __enter__(self) -> SignalPipe:
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.reading)
        os.close(self._writing)

    def take(self) -> list[signal.Signals]:
        """Those that came since the last time."""
        try:
            return [signal.Signals(number) for number in os.read(self.reading, 65536)]
        except BlockingIOError:
            return []

    def leave(self) -> None:
        """In a fork, before its signals are unblocked: it must not write to the pipe it shares with its parent."""
        signal.set_wakeup_fd(-1)
        os.close(self.reading)
        os.close(self._writing)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Ctrl-C reaches the whole group; the supervisor passes on what it means. Not SIG_IGN, which programs that the
        # worker starts would inherit.
        signal.signal(signal.SIGINT, _ignored)


def _ignored(_number: int, _frame: FrameType | None) -> None:
    """A handler, because one is needed for the byte on the pipe."""
