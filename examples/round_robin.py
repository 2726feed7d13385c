"""A small HTTP/1.1 balancer that knows nothing of sessions: every request goes to the next backend in turn."""

import argparse
import asyncio
import itertools
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Self

CHUNK = 64 * 1024
MAX_HEAD = 64 * 1024
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"})
BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

Address = tuple[str, int]
Headers = list[tuple[bytes, bytes]]


class _BrokenError(Exception):
    """Raised when a peer ended its message too early or sent no HTTP."""


def parse_backend(backend: str) -> Address:
    """`HOST:PORT`, `http://HOST:PORT` or `http://HOST:PORT/path`."""
    host, _, port = backend.removeprefix("http://").partition("/")[0].rpartition(":")
    return host or "127.0.0.1", int(port)


async def _read_head(reader: asyncio.StreamReader) -> tuple[bytes, Headers] | None:
    """First line and headers of the next message, or None when the peer closed before it began."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise _BrokenError("the peer closed in the middle of a head") from error
        return None
    except asyncio.LimitOverrunError as error:
        raise _BrokenError("the head is too long") from error
    first, *lines = head[:-4].split(b"\r\n")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise _BrokenError("a header without a colon")
        headers.append((name.strip().lower(), value.strip()))
    return first, headers


def _value(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)


def _is_chunked(headers: Headers) -> bool:
    return b"chunked" in (_value(headers, b"transfer-encoding") or b"").lower()


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        data = await reader.read(min(size, CHUNK))
        if not data:
            raise _BrokenError("the peer closed in the middle of a body")
        size -= len(data)
        yield data


async def _body(reader: asyncio.StreamReader, headers: Headers, *, until_close: bool) -> AsyncIterator[bytes]:
    """The bytes of one body as they stand on the wire, chunk framing included, as soon as they are there."""
    if _is_chunked(headers):
        while True:
            line = await reader.readline()
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError:
                raise _BrokenError("a broken chunk") from None
            yield line
            if size == 0:
                break
            async for data in _exactly(reader, size + 2):
                yield data
        while True:  # trailers, up to the empty line
            line = await reader.readline()
            yield line
            if line in (b"\r\n", b""):
                return
    elif (length := _value(headers, b"content-length")) is not None:
        async for data in _exactly(reader, int(length)):
            yield data
    elif until_close:
        while data := await reader.read(CHUNK):
            yield data


def _encode(first: bytes, headers: Headers, extra: Headers) -> bytes:
    lines = [first, *(b"%b: %b" % pair for pair in headers if pair[0] not in HOP_BY_HOP)]
    lines.extend(b"%b: %b" % pair for pair in extra)
    return b"\r\n".join(lines) + b"\r\n\r\n"


class _Client(asyncio.StreamReaderProtocol):
    """A client's connection that tells when the client has closed it, without anybody reading."""

    def __init__(self, serve: Callable[..., Awaitable[None]]) -> None:
        self.gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_HEAD, loop=loop)
        super().__init__(reader, lambda reader, writer: serve(reader, writer, self.gone), loop=loop)

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        super().connection_lost(exc)


class RoundRobin:
    """`async with RoundRobin(backends) as proxy: proxy.url`; `served` counts the requests per backend.

    A backend that refuses the connection is skipped: nothing was sent to it. Every request has an upstream connection
    of its own, which closes when the client goes away.
    """

    def __init__(self, backends: Sequence[str], *, port: int = 0, at_random: bool = False) -> None:
        self.backends = [parse_backend(backend) for backend in backends]
        self.served = [0] * len(self.backends)
        self._at_random = at_random
        self._turn = itertools.count()
        self._port = port
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<RoundRobin {self.url} served={self.served}>"

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self._on_client), "127.0.0.1", self._port, backlog=1024)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _on_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client_gone: asyncio.Event
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            while await self._serve_one(reader, writer, client_gone):
                pass
        except _BrokenError:
            pass  # the answer had begun: all that is left is to close
        except (ConnectionError, asyncio.CancelledError):
            pass
        except RuntimeError:
            if not client_gone.is_set():  # what uvloop raises for a write to a connection that has closed
                raise
        finally:
            self._clients.discard(task)
            writer.close()

    async def _connect(self) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter] | None:
        count = len(self.backends)
        start = random.randrange(count) if self._at_random else next(self._turn) % count
        for offset in range(count):
            index = (start + offset) % count
            with suppress(OSError):
                return index, *await asyncio.open_connection(*self.backends[index], limit=MAX_HEAD)
        return None

    async def _serve_one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client_gone: asyncio.Event
    ) -> bool:
        """Relay one request and its answer; True when the client's connection can carry another."""
        try:
            message = await _read_head(reader)
        except _BrokenError:
            writer.write(BAD_REQUEST)
            return False
        if message is None:
            return False
        first, headers = message
        connected = await self._connect()
        if connected is None:
            writer.write(BAD_GATEWAY)
            return False
        index, up_reader, up_writer = connected
        self.served[index] += 1
        sending = asyncio.create_task(self._send_request(first, headers, reader, up_writer))
        answering = asyncio.create_task(self._relay_answer(first, headers, index, up_reader, writer))
        gone = asyncio.create_task(client_gone.wait())
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return False
            reusable = answering.result()
            # A backend may answer before it has read the body; what is left of it would look like the next request.
            return reusable and sending.done() and not sending.cancelled() and sending.exception() is None
        finally:
            for task in (sending, answering, gone):
                task.cancel()
            await asyncio.gather(sending, answering, gone, return_exceptions=True)
            up_writer.close()

    @staticmethod
    async def _send_request(
        first: bytes, headers: Headers, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter
    ) -> None:
        up_writer.write(_encode(first, headers, [(b"connection", b"close")]))
        async for data in _body(reader, headers, until_close=False):
            up_writer.write(data)
            await up_writer.drain()

    @staticmethod
    async def _relay_answer(
        first: bytes, headers: Headers, index: int, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        served_by = (b"x-served-by", str(index).encode())
        while True:
            try:
                message = await _read_head(up_reader)
            except ConnectionError:
                message = None
            if message is None:  # the backend may have run it: say so and do not try another
                writer.write(BAD_GATEWAY)
                await writer.drain()
                return False
            status_line, answer = message
            status = int(status_line.split(b" ", 2)[1])
            if status >= 200:
                break
            writer.write(_encode(status_line, answer, []))
        bodiless = first.startswith(b"HEAD ") or status in (204, 304)
        sized = bodiless or _is_chunked(answer) or _value(answer, b"content-length") is not None
        wants_close = b"close" in (_value(headers, b"connection") or b"").lower() or first.endswith(b"HTTP/1.0")
        reusable = sized and not wants_close
        extra = [served_by] if reusable else [served_by, (b"connection", b"close")]
        writer.write(_encode(status_line, answer, extra))
        if not bodiless:
            async for data in _body(up_reader, answer, until_close=True):
                writer.write(data)
                await writer.drain()
        await writer.drain()
        return reusable


async def _run(port: int, backends: Sequence[str], at_random: bool) -> None:
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    async with RoundRobin(backends, port=port, at_random=at_random) as proxy:
        print(f"listening on {proxy.url}", flush=True)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--random", action="store_true", help="a random backend instead of the next one")
    parser.add_argument("backends", nargs="+", metavar="BACKEND", help="HOST:PORT or http://HOST:PORT")
    args = parser.parse_args()
    asyncio.run(_run(args.port, args.backends, args.random))


if __name__ == "__main__":
    main()
