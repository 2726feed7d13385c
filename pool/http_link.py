"""The link to a streamable-HTTP upstream: bytes in, bytes out, one call's failure is one call's error.

The SDK's own client transport is not used: one dropped POST ends its session and every call in flight
(modelcontextprotocol/python-sdk 3522), and with SSE answers it opens a connection per call (3281).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

import aiohttp
from aiohttp import ClientResponse

from .errors import CallTimeout, SessionClosed, UpstreamLost
from .http_request import HttpClients, HttpRequests, reply_headers
from .jsonrpc import Message
from .link import Fence, Headers, Reply, ResumeRecord, unfenced
from .upstream import HttpTarget

DELETE_TIMEOUT_S: Final = 5.0


class HttpLink:
    """One session of a streamable-HTTP upstream; without `resume`, one that has yet to be initialized.

    With `stateless`, no session id is kept: the link of requests that belong to no session (protocol 2026-07-28, and
    upstreams that hand out no session id).
    """

    def __init__(
        self,
        clients: HttpClients,
        target: HttpTarget,
        *,
        call_timeout_s: float,
        fence: Fence = unfenced,
        forward_headers: frozenset[str] = frozenset(),
        resume: ResumeRecord | None = None,
        stateless: bool = False,
    ) -> None:
        self._url = target.url
        self._http = HttpRequests(
            clients,
            target.headers,
            fence=fence,
            forward_headers=forward_headers,
            cookies=None if stateless else resume.cookies if resume else {},
        )
        self._call_timeout_s = call_timeout_s
        self._stateless = stateless
        self._session_id = resume.session_id if resume else None
        self._version = resume.protocol_version if resume else None
        self._closed = asyncio.Event()
        # GET streams, which end with the link: those whose answer has yet to begin, and those that are read.
        self._opening: set[asyncio.Timeout] = set()
        self._streams: set[ClientResponse] = set()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "stateless" if self._stateless else "open"
        return f"<HttpLink {state} streams={len(self._streams)}>"

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    @property
    def resume(self) -> ResumeRecord | None:
        if self._session_id is None:
            return None
        return ResumeRecord(self._session_id, self._version, dict(self._http.cookies))

    def negotiated(self, protocol_version: str) -> None:
        """Note what `initialize` agreed on, for requests of our own and for the resume record."""
        self._version = protocol_version

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        response = await self._request("POST", headers, body, read_timeout_s=self._call_timeout_s)
        if message.method == "initialize" and response.status == 200 and not self._stateless:
            self._session_id = response.headers.get("mcp-session-id")
        return await self._reply(response)

    async def get(self, headers: Headers) -> Reply:
        opening = asyncio.timeout(None)
        try:
            async with opening:
                self._opening.add(opening)
                response = await self._request("GET", headers, None, read_timeout_s=None)
        except TimeoutError:
            raise SessionClosed("the upstream session has ended") from None
        finally:
            self._opening.discard(opening)
        self._streams.add(response)
        return await self._reply(response)

    async def delete(self, headers: Headers) -> Reply:
        return await self._reply(await self._request("DELETE", headers, None, read_timeout_s=DELETE_TIMEOUT_S))

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def aclose(self) -> None:
        self._closed.set()
        for opening in self._opening:
            if not opening.expired():
                opening.reschedule(asyncio.get_running_loop().time())
        for response in list(self._streams):
            response.close()

    async def _request(
        self, method: str, headers: Headers, body: bytes | None, read_timeout_s: float | None
    ) -> ClientResponse:
        if self.is_closed:
            raise SessionClosed("the upstream session has ended")
        own = () if self._session_id is None else (("mcp-session-id", self._session_id),)
        response = await self._http.send(method, self._url, headers, body, read_timeout_s=read_timeout_s, own=own)
        if response.status == 404 and self._session_id is not None:
            # The specification's one sign that a session is gone; a 503 or a dropped connection is none.
            self._closed.set()
        return response

    async def _reply(self, response: ClientResponse) -> Reply:
        chunks = self._chunks(response)
        await anext(chunks)  # a generator that never began runs no clean-up when it is closed
        return Reply(response.status, reply_headers(response), chunks)

    async def _chunks(self, response: ClientResponse) -> AsyncGenerator[bytes, None]:
        """The body as it comes, after one empty piece. Read to its end, the connection is used again; closed early,
        closed."""
        try:
            yield b""
            while chunk := await response.content.readany():
                yield chunk
        except TimeoutError as error:
            raise CallTimeout(f"the upstream stayed silent for {self._call_timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            # A GET stream just ends when its session does.
            if not (self.is_closed and response in self._streams):
                raise UpstreamLost(f"the upstream's answer broke off: {type(error).__name__}") from error
        finally:
            self._streams.discard(response)
            response.close()
