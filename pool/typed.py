"""The typed face of a borrowed session: a real `mcp.ClientSession`. Needs `mcp` 2.3 or newer."""

from __future__ import annotations

import copy
import logging
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import mcp_types as types
import orjson
from mcp import ClientSession
from mcp.client.session import (
    ClientRequestContext,
    ElicitationFnT,
    ListRootsFnT,
    LoggingFnT,
    MessageHandlerFnT,
    SamplingFnT,
)
from mcp.shared.exceptions import MCPError

from .borrowing import Borrow, Lends, Want
from .dispatcher import CallFailed, LinkDispatcher
from .errors import AuthFailed, CallTimeout, CircuitOpen, Fenced, PoolError, SessionClosed, SessionReleased
from .hosted import HostedClient
from .jsonrpc import Message
from .link import Headers, Link, Reply
from .safety import declared_safe, is_safe_call
from .session import PooledSession

logger = logging.getLogger("leasehold.pool.typed")


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a server may ask of, or tell, the holder of a session; as the arguments of `mcp.ClientSession`.

    The first three are capabilities, which are agreed on when a session is opened: sessions opened with different ones
    do not stand in for one another.
    """

    sampling: SamplingFnT | None = None
    elicitation: ElicitationFnT | None = None
    list_roots: ListRootsFnT | None = None
    logging: LoggingFnT | None = None
    message_handler: MessageHandlerFnT | None = None

    @property
    def listens(self) -> bool:
        """Whether there is anybody for what belongs to no call."""
        return any((self.sampling, self.elicitation, self.list_roots, self.logging, self.message_handler))


def capabilities(callbacks: Callbacks) -> dict[str, Any]:
    """The client capabilities that these callbacks make."""
    found: dict[str, Any] = {}
    if callbacks.sampling is not None:
        found["sampling"] = {}
    if callbacks.elicitation is not None:
        found["elicitation"] = {"form": {}, "url": {}}
    if callbacks.list_roots is not None:
        found["roots"] = {"listChanged": True}
    return found


_calling: ContextVar[Loan | None] = ContextVar("calling", default=None)
"""Whose call is being made: what the server sends for it is his."""


class Loan(ClientSession):
    """One holder's view of a session's `ClientSession`: of no use once it was given back."""

    loan_borrow: Borrow | None = None
    loan_callbacks: Callbacks
    loan_pool: Lends
    loan_face: TypedFace

    @classmethod
    def of(cls, face: TypedFace, borrow: Borrow, callbacks: Callbacks, pool: Lends) -> Loan:
        """A view of `face`: the same caches and the same dispatcher, another holder."""
        loan = copy.copy(face.client)
        loan.loan_borrow, loan.loan_callbacks, loan.loan_pool, loan.loan_face = borrow, callbacks, pool, face
        face.enter(loan)
        return loan

    def leave(self) -> None:
        """Its holder has gone."""
        self.loan_face.leave(self)

    def __repr__(self) -> str:
        return f"<ClientSession on loan: {self.loan_borrow!r}>"

    async def __aenter__(self) -> Self:
        """A loan is entered already; entering it once more does nothing."""
        return self if self.loan_borrow is not None else await super().__aenter__()

    async def __aexit__(self, *exc: Any) -> bool | None:
        return None if self.loan_borrow is not None else await super().__aexit__(*exc)

    async def send_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """See `ClientSession.send_request`. A call that provably did not run, or is safe, is tried twice."""
        borrow = self.loan_borrow
        if borrow is None:
            return await super().send_request(request, *args, **kwargs)
        borrow.check()
        if borrow.is_lost:
            await self._replace(borrow, borrow.session)
        token = _calling.set(self)
        called = borrow.session
        try:
            try:
                result = await super().send_request(request, *args, **kwargs)
            except CallFailed as failure:
                if borrow.session is called:
                    borrow.failed(failure.cause)
                if not self._may_repeat(failure, request, called):
                    raise
                await self._find_session(failure, borrow, called)
                borrow.check()
                try:
                    result = await super().send_request(request, *args, **kwargs)
                except CallFailed as again:
                    borrow.failed(again.cause)
                    if failure.outcome == "unknown" and again.outcome == "not_run":
                        raise failure from again  # the first try may have run all the same
                    raise
            borrow.was_answered()
            return result
        finally:
            _calling.reset(token)

    async def validate_tool_result(self, name: str, result: types.CallToolResult) -> None:
        """See `ClientSession.validate_tool_result`, which may have to list the tools first. Where it cannot, the result
        goes unchecked: an error would say of a call that has run that it did not."""
        try:
            await super().validate_tool_result(name, result)
        except (MCPError, PoolError) as error:
            logger.info("result_unchecked tool=%s error=%s", name, type(error).__name__)

    async def send_notification(self, notification: types.ClientNotification) -> None:
        """See `ClientSession.send_notification`."""
        if self.loan_borrow is not None:
            self.loan_borrow.check()
        token = _calling.set(self)
        try:
            await super().send_notification(notification)
        finally:
            _calling.reset(token)

    def _may_repeat(self, failure: CallFailed, request: Any, called: PooledSession) -> bool:
        """Whether to try again: on the same session, or on a fresh one where nothing was done on this one yet."""
        borrow = self.loan_borrow
        assert borrow is not None
        if isinstance(failure.cause, CircuitOpen | Fenced | AuthFailed):
            return False  # it would be so again
        if failure.outcome != "not_run":
            if failure.outcome != "unknown" or isinstance(failure.cause, CallTimeout):
                return False  # after a timeout there is no time left
            params = request.params.model_dump(by_alias=True) if request.params is not None else None
            if not is_safe_call(request.method, params, called.safe_tools | called.upstream.idempotent_tools):
                return False
        return not called.is_closed or borrow.session is not called or not (borrow.is_shared or borrow.answered)

    async def _find_session(self, failure: CallFailed, borrow: Borrow, called: PooledSession) -> None:
        """Have a session to try again on."""
        if not called.is_closed:
            borrow.is_broken = borrow.is_broken and borrow.session is not called
            return
        try:
            await self._replace(borrow, called)
        except CallFailed as error:
            raise (failure if failure.outcome == "unknown" else error) from error.cause

    async def _replace(self, borrow: Borrow, lost: PooledSession) -> None:
        """Go on with another session. Raises `CallFailed`, and `SessionReleased`."""
        try:
            await self.loan_pool.renew(borrow, lost)
            face = await typed_face(borrow.session)
            borrow.check()
        except SessionReleased:
            raise
        except PoolError as error:
            raise CallFailed(error) from error
        if face is not self.loan_face:  # unless another call of this loan came first
            self.leave()
            self.__dict__.update(copy.copy(face.client).__dict__)
            self.loan_face = face
            face.enter(self)


@lru_cache(maxsize=128)
def _adopted(result: bytes) -> types.InitializeResult:
    """What a server said when its session was opened: the same for most of its sessions, and 2 KB each."""
    return types.InitializeResult.model_validate_json(result)


class TypedFace:
    """The `ClientSession` of one pooled session, which all its holders have views of, and the task it lives in."""

    def __init__(self, session: PooledSession) -> None:
        self.session = session
        self.holders: list[Loan] = []
        self.dispatcher = LinkDispatcher(_SessionWire(session, self.holders), on_tools=self._note_tools)
        self.client = Loan(
            dispatcher=self.dispatcher,
            sampling_callback=self._sampling,
            elicitation_callback=self._elicitation,
            list_roots_callback=self._list_roots,
            logging_callback=self._logging,
            message_handler=self._message,
        )
        self.client.adopt(_adopted(orjson.dumps(session.initialize_result, option=orjson.OPT_SORT_KEYS)))
        self.hosted = HostedClient(self.client)

    def __repr__(self) -> str:
        return f"<TypedFace of {self.session!r} holders={len(self.holders)}>"

    def enter(self, loan: Loan) -> None:
        """Somebody holds the session from now on."""
        self.holders.append(loan)
        if loan.loan_callbacks.listens:
            context = copy_context()
            context.run(_calling.set, None)  # what comes on the GET stream belongs to no call
            context.run(self.dispatcher.listen)

    def leave(self, loan: Loan) -> None:
        """Undo one `enter`."""
        self.holders.remove(loan)
        if loan.loan_callbacks.listens:
            self.dispatcher.unlisten()

    async def aclose(self) -> None:
        """End the tasks of this face."""
        await self.hosted.aclose()

    def _note_tools(self, tools: Any) -> None:
        self.session.safe_tools |= declared_safe(tools)

    def _loan(self, callback: str) -> Loan | None:
        """Whose callback to use: his on whose call it came, else the latest holder's who has one."""
        calling = _calling_on(self.session)
        if calling is not None and getattr(calling.loan_callbacks, callback) is not None:
            return calling
        return next((loan for loan in reversed(self.holders) if getattr(loan.loan_callbacks, callback)), None)

    async def _sampling(self, context: ClientRequestContext, params: types.CreateMessageRequestParams) -> Any:
        return await self._answer("sampling", context, params)

    async def _elicitation(self, context: ClientRequestContext, params: types.ElicitRequestParams) -> Any:
        return await self._answer("elicitation", context, params)

    async def _list_roots(self, context: ClientRequestContext) -> Any:
        return await self._answer("list_roots", context)

    async def _answer(self, name: str, context: ClientRequestContext, *params: Any) -> Any:
        loan = self._loan(name)
        if loan is None:
            what = name.replace("_", " ").capitalize()
            return types.ErrorData(code=types.INVALID_REQUEST, message=f"{what} not supported")
        context.session = loan
        return await getattr(loan.loan_callbacks, name)(context, *params)

    async def _logging(self, params: types.LoggingMessageNotificationParams) -> None:
        loan = self._loan("logging")
        if loan is not None and loan.loan_callbacks.logging is not None:
            await loan.loan_callbacks.logging(params)

    async def _message(self, message: Any) -> None:
        loan = self._loan("message_handler")
        if loan is not None and loan.loan_callbacks.message_handler is not None:
            await loan.loan_callbacks.message_handler(message)


class TypedContext:
    """`async with`: a borrowed session as a `ClientSession`."""

    __slots__ = ("_callbacks", "_loan", "_pool", "_timeout_s", "_want")

    def __init__(self, pool: Lends, want: Want, callbacks: Callbacks, timeout_s: float | None) -> None:
        self._pool = pool
        self._want = want
        self._callbacks = callbacks
        self._timeout_s = timeout_s

    async def __aenter__(self) -> ClientSession:
        borrow = await self._pool.acquire(self._want, timeout_s=self._timeout_s)
        try:
            face = await typed_face(borrow.session)
        except BaseException:
            borrow.release(discard=not borrow.is_shared)
            raise
        self._loan = Loan.of(face, borrow, self._callbacks, self._pool)
        return self._loan

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        loan, borrow = self._loan, self._loan.loan_borrow
        assert borrow is not None
        loan.leave()
        answered = kind is None or (isinstance(error, MCPError) and not isinstance(error, PoolError))
        borrow.release(discard=not answered and not borrow.is_shared)


async def typed_face(session: PooledSession) -> TypedFace:
    """The typed face of a session, made when it is first asked for."""
    face = session.face
    if not isinstance(face, TypedFace):
        if session.is_closed:
            raise SessionClosed(f"the session is {session.state.value}")
        face = session.face = TypedFace(session)
    if not face.hosted.is_ready:
        await face.hosted.wait_ready()
    return face


class _SessionWire:
    """A pooled session as a dispatcher's wire: each call with its holder's own headers."""

    __slots__ = ("_holders", "_session")

    def __init__(self, session: PooledSession, holders: list[Loan]) -> None:
        self._session = session
        self._holders = holders

    @property
    def is_closed(self) -> bool:
        return self._session.is_closed

    def next_id(self) -> str:
        return self._session.next_id()

    async def post(self, message: Message, body: bytes, headers: Headers) -> Reply:
        link, own = self._way()
        return await link.post(message, body, [*headers, *own])

    async def get(self, headers: Headers) -> Reply:
        link, own = self._way()
        return await link.get([*headers, *own])

    def _way(self) -> tuple[Link, Headers]:
        """Whose call it is decides; what belongs to no call goes as the latest holder's."""
        loan = _calling_on(self._session) or next(reversed(self._holders), None)
        if loan is None or loan.loan_borrow is None:
            return self._session.link, []
        return loan.loan_borrow.link, loan.loan_borrow.want.headers


def _calling_on(session: PooledSession) -> Loan | None:
    """Whose call is being made, if it is one on that session."""
    loan = _calling.get()
    return loan if loan is not None and loan.loan_borrow is not None and loan.loan_borrow.session is session else None
