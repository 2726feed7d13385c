"""The SDK's typed client over a link: an `mcp.shared.dispatcher.Dispatcher` whose calls are POSTs of their own.

A call's failure is that call's failure: no stream is shared by the calls of a session, and none waits for another. What
the server sends belongs to the call on whose answer it came (progress, sampling, elicitation), and is handled in that
call's context; what belongs to none comes on the GET stream, which is open while somebody listens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

import anyio
import anyio.abc
import orjson
from mcp.shared.dispatcher import CallOptions, OnNotify, OnNotifyIntercept, OnRequest, ProgressFnT, run_notify_intercept
from mcp.shared.exceptions import MCPError
from mcp.shared.transport_context import TransportContext
from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR, REQUEST_TIMEOUT, ErrorData

from .calls import JSON_HEADERS, Place, answer, notification, request, session_stream
from .errors import CallTimeout, Outcome, PoolError, SessionClosed, SessionReleased, UpstreamRefused
from .jsonrpc import SERVER_ERROR, Message, RequestId
from .link import Headers, Reply

logger = logging.getLogger("leasehold.pool.dispatcher")

COURTESY_S: Final = 5.0
"""How long telling the server of a call that was given up may take. Nobody waits for it."""
SETTLE_S: Final = 1.0
LISTEN_RETRY_S: Final = (0.1, 5.0)
VERSION_HEADER: Final = "mcp-protocol-version"

_OUTCOMES: Final[list[dict[str, Outcome]]] = [{"outcome": "not_run"}, {"outcome": "unknown"}]
_TRANSPORT: Final = TransportContext(kind="leasehold", can_send_request=True)


class CallFailed(PoolError, MCPError):
    """Raised where a call got no answer. `outcome`: `not_run`, or `unknown` where it may have run; `cause` says why.

    It is an `MCPError` of the code that the SDK itself raises then: connection closed, or request timeout.
    """

    def __init__(self, cause: PoolError | None, *, message: str = "", outcome: Outcome = "unknown") -> None:
        """Without a `cause`: another gateway on the way has told so."""
        code, text = CONNECTION_CLOSED, message
        if cause is not None:
            outcome = cause.outcome
            timed_out = isinstance(cause, CallTimeout)
            code, text = (REQUEST_TIMEOUT, str(cause)) if timed_out else (code, f"Connection closed: {cause}")
        MCPError.__init__(self, code, text, {"outcome": outcome})
        self.cause = cause
        self.outcome: Outcome = outcome  # pyright: ignore[reportIncompatibleVariableOverride]


class Wire(Protocol):
    """As much of a link as a dispatcher needs."""

    @property
    def is_closed(self) -> bool: ...

    def next_id(self) -> RequestId: ...

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply: ...

    async def get(self, headers: Headers) -> Reply: ...


class LinkDispatcher:
    """Sends the calls of one `ClientSession` over a wire, and hands it what the server sends."""

    def __init__(
        self, wire: Wire, *, on_tools: Callable[[Any], None] = lambda _tools: None, tells_outcomes: bool = False
    ) -> None:
        """`on_tools` sees the tools of each `tools/list` result. `tells_outcomes`: what is at the other end of the
        wire is ours, and says of a call without an answer whether it may have run."""
        self._wire = wire
        self._tells_outcomes = tells_outcomes
        self._on_tools = on_tools
        self._progress: dict[RequestId, ProgressFnT] = {}
        self._serving: dict[RequestId, anyio.CancelScope] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._courtesies: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Task[None] | None = None
        self._listeners = 0
        self._version: Headers = []
        self._on_request: OnRequest | None = None
        self._on_notify: OnNotify | None = None
        self._intercept: OnNotifyIntercept | None = None

    def __repr__(self) -> str:
        return f"<LinkDispatcher tasks={len(self._tasks)} listeners={self._listeners}>"

    # -- the SDK's face --------------------------------------------------------------------------------------------

    async def run(
        self,
        on_request: OnRequest,
        on_notify: OnNotify,
        on_notify_intercept: OnNotifyIntercept | None = None,
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Take what the server sends, until cancelled."""
        self._on_request, self._on_notify, self._intercept = on_request, on_notify, on_notify_intercept
        try:
            task_status.started()
            await anyio.sleep_forever()
        finally:
            self._on_request = self._on_notify = self._intercept = None
            tasks = self._tasks | self._courtesies
            if self._listening is not None:
                tasks.add(self._listening)
            for task in tasks:
                task.cancel()
            if tasks:
                with anyio.CancelScope(shield=True):
                    await asyncio.wait(tasks, timeout=1.0)

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        """Ask, and return the result. Raises `MCPError` with the server's error, `CallFailed` without an answer."""
        opts = opts or {}
        id = opts.get("request_id") or self._wire.next_id()  # noqa: A001
        payload: dict[str, Any] | None = None if params is None else dict(params)
        on_progress = opts.get("on_progress")
        if on_progress is not None:
            payload = payload or {}
            payload["_meta"] = {**(payload.get("_meta") or {}), "progressToken": id}
            self._progress[id] = on_progress
        timeout_s = opts.get("timeout")
        try:
            if timeout_s is None:
                response = await self._ask(id, method, payload, opts)
            else:
                async with asyncio.timeout(timeout_s):
                    response = await self._ask(id, method, payload, opts)
        except TimeoutError:
            self._give_up(id, opts, "timeout")
            raise CallFailed(CallTimeout(f"Timed out after {timeout_s} s waiting for {method!r}")) from None
        except asyncio.CancelledError:
            self._give_up(id, opts, "cancelled")
            raise
        except SessionReleased:
            raise
        except PoolError as error:
            raise CallFailed(error) from error
        finally:
            self._progress.pop(id, None)
        return self._result(method, response)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        """Tell; what cannot be told is dropped, as the SDK's dispatchers do."""
        message, body = notification(method, None if params is None else dict(params))
        try:
            reply = await self._wire.post(message, body, self._headers(opts or {}))
            await reply.chunks.aclose()
        except PoolError as error:
            logger.debug("notification_dropped method=%s error=%s", method, error)

    async def settle(self) -> None:
        """Let what the server is being told of calls that were given up reach it: a moment."""
        if self._courtesies:
            await asyncio.wait(self._courtesies, timeout=SETTLE_S)

    # -- calls -----------------------------------------------------------------------------------------------------

    async def _ask(self, id: RequestId, method: str, params: dict[str, Any] | None, opts: CallOptions) -> Message:  # noqa: A002
        message, body = request(id, method, params)
        reply = await self._wire.post(message, body, self._headers(opts))
        try:
            return await answer(reply, id, self._incoming)
        except UpstreamRefused as error:
            if error.status == 404 and self._wire.is_closed:
                raise SessionClosed("the upstream has ended the session") from error
            raise

    def _result(self, method: str, response: Message) -> dict[str, Any]:
        error: Any = response.payload.get("error")
        if error is not None:
            told = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
            code, data = told.get("code"), told.get("data")
            if self._tells_outcomes and code == SERVER_ERROR and data in _OUTCOMES:
                raise CallFailed(None, message=str(told.get("message", "")), outcome=data["outcome"])
            raise MCPError(
                code if isinstance(code, int) else INTERNAL_ERROR, str(told.get("message", "")), told.get("data")
            )
        result: Any = response.payload.get("result")
        if not isinstance(result, dict):
            raise MCPError(INTERNAL_ERROR, "the server's result is no object")
        found = cast("dict[str, Any]", result)
        if method == "tools/list":
            self._on_tools(found.get("tools"))
        return found

    def _give_up(self, id: RequestId, opts: CallOptions, reason: str) -> None:  # noqa: A002
        """Tell the server that nobody waits for the answer any more. Nobody waits for this either."""
        if opts.get("cancel_on_abandon", True) and not self._wire.is_closed:
            task = asyncio.get_running_loop().create_task(self._courtesy(id, opts, reason), name="leasehold-courtesy")
            self._courtesies.add(task)
            task.add_done_callback(self._courtesies.discard)

    async def _courtesy(self, id: RequestId, opts: CallOptions, reason: str) -> None:  # noqa: A002
        with suppress(TimeoutError):
            async with asyncio.timeout(COURTESY_S):
                await self.notify("notifications/cancelled", {"requestId": id, "reason": reason}, opts)

    def _headers(self, opts: CallOptions) -> Headers:
        headers = list(JSON_HEADERS)
        for name, value in opts.get("headers", {}).items():
            headers.append((name.lower().encode(), value.encode()))
            if name.lower() == VERSION_HEADER:
                self._version = [headers[-1]]
        return headers

    # -- what the server sends -------------------------------------------------------------------------------------

    async def _incoming(self, message: Message) -> None:
        """In the context of the call on whose answer it came. Progress is told in order and before the result."""
        if message.kind == "request" and message.id is not None:
            self._spawn(self._serve(message, message.id))
            return
        method, params = message.method or "", message.params
        if method == "notifications/cancelled":
            asked = params.get("requestId")
            scope = self._serving.get(asked) if isinstance(asked, str | int) else None
            if scope is not None:
                scope.cancel()
            return
        if method == "notifications/progress":
            await self._tell_progress(params)
        if self._on_notify is not None and not run_notify_intercept(self._intercept, method, params):
            self._spawn(self._on_notify(_ServerMessage(), method, params))  # pyright: ignore[reportArgumentType]

    async def _tell_progress(self, params: dict[str, Any]) -> None:
        token, progress, total = params.get("progressToken"), params.get("progress"), params.get("total")
        on_progress = self._progress.get(token) if isinstance(token, str | int) else None
        if on_progress is None or not isinstance(progress, int | float):
            return
        text = params.get("message")
        try:
            await on_progress(
                float(progress),
                float(total) if isinstance(total, int | float) else None,
                text if isinstance(text, str) else None,
            )
        except Exception:
            logger.exception("progress_callback_failed")

    async def _serve(self, message: Message, id: RequestId) -> None:  # noqa: A002
        if self._on_request is None or message.method is None:
            return
        payload: dict[str, Any] = {"jsonrpc": "2.0", "id": id}
        with anyio.CancelScope() as scope:
            self._serving[id] = scope
            try:
                payload["result"] = await self._on_request(
                    _ServerMessage(id),  # pyright: ignore[reportArgumentType]
                    message.method,
                    message.payload.get("params"),
                )
            except MCPError as error:
                payload["error"] = error.error.model_dump(by_alias=True, exclude_none=True)
            except Exception:
                logger.exception("callback_failed method=%s", message.method)
                payload["error"] = ErrorData(code=INTERNAL_ERROR, message="Internal error").model_dump(
                    exclude_none=True
                )
            finally:
                del self._serving[id]
        if scope.cancelled_caught:
            return
        try:
            headers = [*JSON_HEADERS, *self._version]
            reply = await self._wire.post(Message("response", None, id, payload), orjson.dumps(payload), headers)
            await reply.chunks.aclose()
        except PoolError as error:
            logger.info("answer_dropped method=%s error=%s", message.method, error)

    # -- the GET stream --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Have the GET stream open until as many `unlisten`."""
        self._listeners += 1
        if self._listening is None:
            self._listening = asyncio.get_running_loop().create_task(self._listen(), name="leasehold-listen")

    def unlisten(self) -> None:
        """Undo one `listen`."""
        self._listeners -= 1
        if self._listeners == 0 and self._listening is not None:
            self._listening.cancel()
            self._tasks.add(self._listening)
            self._listening.add_done_callback(self._tasks.discard)
            self._listening = None

    async def _listen(self) -> None:
        delay, longest = LISTEN_RETRY_S
        place = Place()
        while not self._wire.is_closed:
            try:
                async with session_stream(self._wire, self._version, place) as (status, messages):
                    if status == 405:  # it has no such stream
                        return
                    if status == 200:
                        delay = LISTEN_RETRY_S[0]
                        async for message in messages:
                            await self._incoming(message)
            except SessionClosed:
                return
            except PoolError as error:
                logger.debug("stream_ended error=%s", error)
            await asyncio.sleep(delay)
            delay = min(longest, delay * 2)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """In the context of the call that it belongs to."""
        task = asyncio.get_running_loop().create_task(work, name="leasehold-callback")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass(slots=True)
class _ServerMessage:
    """The SDK's `DispatchContext`, as far as a client's callbacks use it."""

    request_id: RequestId | None = None
    transport: TransportContext = _TRANSPORT
    can_send_request: bool = True
    message_metadata: None = None
    cancel_requested: anyio.Event = field(default_factory=anyio.Event)
