"""One upstream session for many clients: ids and progress tokens are rewritten on the way in, and back on the way out.

Each client counts its requests from one, and all of them write to the same session, where ids must be unique. What the
server asks keeps its id: the answer comes back under it. Bodies are parsed and written anew, which bytes of a session
of one's own never are.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, cast

import orjson

from .calls import MAX_ANSWER, Posts
from .errors import PoolError, UpstreamLost
from .jsonrpc import SERVER_ERROR, Message, RequestId, error_body
from .link import Headers, Reply
from .sse import EventSplitter, event_data, is_event_stream, with_data

VERSION: Final = b"mcp-protocol-version"

Translate = Callable[[dict[str, Any]], dict[str, Any]]
"""Changes the `result` of a response on its way to the client."""


class SharedIds:
    """The requests in flight on one shared session: whose they are, and the ids and tokens they have upstream."""

    def __init__(self, new_id: Callable[[], str], version: str = "") -> None:
        """`new_id` makes ids that no other request of the session has; `version` is what the session agreed on, where
        its clients need not know."""
        self.new_id = new_id
        self.version = version.encode()
        self._upstream: dict[tuple[bytes, RequestId], str] = {}
        self._tokens: dict[str, tuple[bytes, RequestId]] = {}

    def __repr__(self) -> str:
        return f"<SharedIds in_flight={len(self._upstream)}>"

    def begin(self, client: bytes, id: RequestId, token: RequestId | None) -> str:  # noqa: A002
        """The id under which a client's request goes upstream; its progress token becomes the same."""
        upstream = self.new_id()
        self._upstream[client, id] = upstream
        if token is not None:
            self._tokens[upstream] = client, token
        return upstream

    def end(self, client: bytes, id: RequestId, upstream: str) -> None:  # noqa: A002
        """The request is answered, or its client has gone."""
        if self._upstream.get((client, id)) == upstream:
            del self._upstream[client, id]
        self._tokens.pop(upstream, None)

    def of(self, client: bytes, id: object) -> str | None:  # noqa: A002
        """The upstream id of a client's request in flight."""
        return self._upstream.get((client, id)) if isinstance(id, str | int) else None

    def token(self, upstream: object) -> tuple[bytes, RequestId] | None:
        """Whose progress token this is, and what it is called there."""
        return self._tokens.get(upstream) if isinstance(upstream, str) else None


class SharedLink:
    """One client's view of a shared session; as much of a `Link` as a relay of POSTs needs."""

    def __init__(self, link: Posts, ids: SharedIds, client: bytes, translate: Translate | None = None) -> None:
        """`client` is a name that no other client of the session has."""
        self._link = link
        self._ids = ids
        self._client = client
        self._translate = translate

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        """See `Link.post`. A `cancelled` for what is not in flight (any more) goes nowhere, as it may."""
        if self._ids.version:
            headers = [*(pair for pair in headers if pair[0] != VERSION), (VERSION, self._ids.version)]
        if message.kind == "request" and message.id is not None:
            return await self._request(message, message.id, headers)
        if message.method == "notifications/cancelled":
            upstream = self._ids.of(self._client, message.params.get("requestId"))
            if upstream is None:
                return Reply(202, [], _nothing())
            payload = {**message.payload, "params": {**message.params, "requestId": upstream}}
            message, body = Message("notification", message.method, None, payload), orjson.dumps(payload)
        return await self._link.post(message, body, headers)

    async def _request(self, message: Message, id: RequestId, headers: Headers) -> Reply:  # noqa: A002
        token = message.progress_token
        upstream = self._ids.begin(self._client, id, token)
        payload: dict[str, Any] = {**message.payload, "id": upstream}
        if token is not None:
            meta: Any = message.params["_meta"]
            payload["params"] = {**message.params, "_meta": {**meta, "progressToken": upstream}}
        sent = Message("request", message.method, upstream, payload)
        try:
            reply = await self._link.post(sent, _written(payload), headers)
        except BaseException:
            self._ids.end(self._client, id, upstream)
            raise
        answers = self._events if is_event_stream(reply.headers) else self._whole
        chunks = answers(reply.chunks, id, upstream)
        await anext(chunks)  # a generator that never began runs no clean-up when it is closed
        return Reply(reply.status, reply.headers, chunks)

    async def _whole(
        self,
        chunks: AsyncGenerator[bytes, None],
        id: RequestId,  # noqa: A002
        upstream: str,
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(chunks):
                yield b""
                body = b""
                async for chunk in chunks:
                    body += chunk
                    if len(body) > MAX_ANSWER:
                        raise UpstreamLost(f"the answer is larger than {MAX_ANSWER} bytes")
            yield self._rewritten(body, id, upstream)
        finally:
            self._ids.end(self._client, id, upstream)

    async def _events(
        self,
        chunks: AsyncGenerator[bytes, None],
        id: RequestId,  # noqa: A002
        upstream: str,
    ) -> AsyncGenerator[bytes, None]:
        splitter = EventSplitter(MAX_ANSWER)
        try:
            async with aclosing(chunks):
                yield b""
                async for chunk in chunks:
                    written = b""
                    for block in splitter.blocks(chunk):
                        data = event_data(block)
                        changed = self._rewritten(data, id, upstream) if data else data
                        written += block + b"\n\n" if changed is data else with_data(block, changed)
                    if written:
                        yield written
        finally:
            self._ids.end(self._client, id, upstream)

    def _rewritten(self, data: bytes, id: RequestId, upstream: str) -> bytes:  # noqa: A002
        """A message as its client knows it; the very same bytes where nothing is to be changed."""
        try:
            decoded: Any = orjson.loads(data)
        except orjson.JSONDecodeError:
            return data
        if not isinstance(decoded, dict):
            return data
        payload = cast("dict[str, Any]", decoded)
        if "method" not in payload:
            if payload.get("id") != upstream:
                return data
            payload["id"] = id
            result: Any = payload.get("result")
            if self._translate is not None and isinstance(result, dict):
                payload["result"] = self._translate(cast("dict[str, Any]", result))
            try:
                return _written(payload)
            except PoolError as error:
                return error_body(
                    SERVER_ERROR, f"The answer cannot be passed on: {error}", id=id, data={"outcome": "unknown"}
                )
        if payload["method"] == "notifications/progress":
            return self.progress(payload, self._ids) or data
        return data

    @staticmethod
    def progress(payload: dict[str, Any], ids: SharedIds) -> bytes | None:
        """A progress notification under its client's own token; None for a token that is nobody's."""
        params: Any = payload.get("params")
        known = ids.token(cast("dict[str, Any]", params).get("progressToken")) if isinstance(params, dict) else None
        if known is None:
            return None
        return orjson.dumps({**payload, "params": {**params, "progressToken": known[1]}})


def _written(payload: dict[str, Any]) -> bytes:
    """Raises `PoolError`: what may be read is nested deeper than what may be written."""
    try:
        return orjson.dumps(payload)
    except TypeError:
        raise PoolError("the message is nested too deep") from None


async def _nothing() -> AsyncGenerator[bytes, None]:
    if False:
        yield b""
