"""A link to a stdio server: one child process per session.

The process lives and ends in `stdio_process`, which calls back synchronously; nothing here is a task.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .duplex_link import COMMIT_AFTER_S, NO_BREAKS, DuplexLink
from .errors import CallTimeout, OpenFailed, SessionClosed
from .jsonrpc import InvalidMessage, Message
from .line_stream import LineStream
from .link import Fence, Headers
from .routing import RouterStatistics
from .stdio_lines import StrayLog
from .stdio_process import StdioProcess

OPEN_TIMEOUT_S: Final = 10.0
START_TIMEOUT_S: Final = 30.0
"""How long a process that has just begun may take to answer `initialize`, where a call has less time."""

_log = logging.getLogger("leasehold.pool.stdio")


@dataclass(frozen=True, slots=True)
class StdioStatistics:
    """A snapshot of one stdio session."""

    pid: int
    returncode: int | None
    is_closed: bool
    sent: int
    received: int
    invalid_lines: int
    unsent: int
    stderr_lines: int
    stderr_dropped: int
    streams: RouterStatistics


class StdioLink(DuplexLink):
    """One stdio server session: a `Link`. Opened by `StdioLink.open`, ended by `aclose` or with its process."""

    def __init__(self, name: str, *, fence: Fence, call_timeout: float, commit_after: float = COMMIT_AFTER_S) -> None:
        super().__init__(name, call_timeout_s=call_timeout, commit_after_s=commit_after)
        self._fence = fence
        self._stray = StrayLog(name, self._loop.time)
        self._process: StdioProcess | None = None
        # Lines that wait until the child reads again, oldest first: of a request's stream, or of somebody else who
        # waits on a future. Who gives up takes its line out, so none is written for a caller that has left.
        self._unsent: dict[LineStream | asyncio.Future[None], bytes] = {}

    @classmethod
    async def open(
        cls,
        command: str,
        args: Sequence[str],
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        *,
        name: str,
        fence: Fence,
        call_timeout: float,
        open_timeout: float = OPEN_TIMEOUT_S,
        commit_after: float = COMMIT_AFTER_S,
    ) -> StdioLink:
        """Start the server's process; `env` is laid over the safe part of our own environment. Times in seconds.

        Nothing is said to the server: its session begins with the client's `initialize`.

        Raises `OpenFailed` when the process cannot be started.
        """
        self = cls(name, fence=fence, call_timeout=call_timeout, commit_after=commit_after)
        try:
            async with asyncio.timeout(open_timeout):
                self._process = await StdioProcess.start(
                    command,
                    args,
                    env,
                    cwd,
                    name=name,
                    stray=self._stray,
                    on_line=self._on_line,
                    on_writable=self._on_writable,
                    on_lost=self._end,
                )
        except TimeoutError:
            raise OpenFailed(f"upstream {name!r}: its process did not start within {open_timeout:g} s") from None
        return self

    def __repr__(self) -> str:
        process = self._process
        state = f"closed ({self._reason})" if self.is_closed else "open"
        return f"<StdioLink {self.name!r} pid={process and process.pid} {state} {self._router!r}>"

    def statistics(self) -> StdioStatistics:
        """A snapshot of the counts."""
        process = self._running()
        return StdioStatistics(
            pid=process.pid,
            returncode=process.returncode,
            is_closed=self.is_closed,
            sent=self._sent,
            received=self._received,
            invalid_lines=self._invalid,
            unsent=len(self._unsent),
            stderr_lines=self._stray.lines,
            stderr_dropped=self._stray.dropped,
            streams=self._router.statistics(),
        )

    async def aclose(self) -> None:
        """End the session and wait until its process and that one's children are gone: 5 s at most.

        A cancelled wait changes nothing about the end.
        """
        self._end("it was closed")
        await self._running().wait_gone()

    # Towards the child

    def _start(self, stream: LineStream, body: bytes, headers: Headers) -> None:
        line = _framed(body)
        if self._can_write():
            self._write(line)
        else:
            self._unsent[stream] = line

    def _patience_s(self, message: Message) -> float:
        return max(self._call_timeout_s, START_TIMEOUT_S if message.method == "initialize" else 0)

    def _withdraw(self, stream: LineStream) -> bool:
        return self._unsent.pop(stream, None) is not None

    def _can_write(self) -> bool:
        return not self._unsent and not self._running().is_paused

    def _write(self, line: bytes) -> None:
        # One turn of the loop from the fence to the first byte; `write` takes the line whole.
        self._fence()
        self._running().write(line)
        self._sent += 1

    async def _send(self, message: Message, body: bytes, headers: Headers) -> None:
        """As soon as the child takes it."""
        line = _framed(body)
        if self._can_write():
            self._write(line)
            return
        written: asyncio.Future[None] = self._loop.create_future()
        self._unsent[written] = line
        error = CallTimeout(f"upstream {self.name!r}: it took no input for {self._call_timeout_s:g} s")
        timer = self._loop.call_later(self._call_timeout_s, _fail, written, error)
        try:
            await written
        finally:
            timer.cancel()
            self._unsent.pop(written, None)

    def _on_writable(self) -> None:
        process = self._running()
        while self._unsent and not process.is_paused:
            waiter = next(iter(self._unsent))
            line = self._unsent.pop(waiter)
            try:
                self._write(line)
            except Exception as error:  # noqa: BLE001 - the fence's and the pipe's errors are the waiting call's
                if isinstance(waiter, LineStream):
                    waiter.end(error)
                    self._router.forget(waiter)
                else:
                    _fail(waiter, error)
            else:
                if not isinstance(waiter, LineStream) and not waiter.done():
                    waiter.set_result(None)

    def _drop_unsent(self, error: SessionClosed) -> None:
        unsent, self._unsent = self._unsent, {}
        for waiter in unsent:
            if isinstance(waiter, LineStream):
                waiter.end(error)
            else:
                _fail(waiter, error)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    # From the child

    def _on_line(self, line: bytes) -> None:
        self._receive(line.rstrip(b"\r"))

    def _on_invalid(self, data: bytes, error: InvalidMessage) -> None:
        if data.lstrip()[:1] in (b"{", b"["):
            # It may be somebody's data: described, not shown.
            _log.warning("line_skipped upstream=%s bytes=%d reason=%r", self.name, len(data), str(error))
        else:
            self._stray.write(data, "stdout")

    def _running(self) -> StdioProcess:
        assert self._process is not None
        return self._process


def _framed(body: bytes) -> bytes:
    """A body as one line: the same bytes, or where it has raw line breaks (which would split it) the same JSON."""
    if b"\n" in body or b"\r" in body:
        body = body.translate(NO_BREAKS)
    return body + b"\n"


def _fail(waiter: asyncio.Future[None], error: Exception) -> None:
    if not waiter.done():
        waiter.set_exception(error)
