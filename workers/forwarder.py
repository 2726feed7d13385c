"""The forwarder: both ends of all exchanges of a worker.

At most once: after a REQUEST was pushed, what became of it is never guessed. It ends in a response, in a NACK or a
refusal (it did not run: `NotRun`), or, when its owner died after reading it or frames were lost, as `OutcomeUnknown`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from ..coordinator import Member, Registration, Unavailable
from ..coordinator.channel import Receipt
from ..coordinator.errors import FrameError
from ..coordinator.frames import (
    ABORT,
    FROM_OWNER,
    LAST,
    Frame,
    FrameType,
    RequestHead,
    encode,
    unpack_head,
    unpack_request,
)
from .asgi import ASGIApp, Receive, Scope, Send, until_disconnect
from .errors import BrokenOff, Disconnected, NotRun, OutcomeUnknown
from .exchange import CONTROL, REPEAT, CallerExchange, OwnerExchange, nack, read_nack

logger = logging.getLogger("leasehold.workers.forwarder")

REQUEST_EXPIRY_MS: Final = 30_000
"""A request that waited this long in a mailbox is not started any more."""
LAST_WORD_S: Final = 0.25
"""How long an answer of a dead owner may still be under way to us before its calls are declared unknown."""

GONE: Final = "gone"


class Ownership(Protocol):
    """Whether this worker may run a request for a session now."""

    def refuse(self, head: RequestHead) -> tuple[str, Registration | None] | None:
        """None to admit it, else the reason and the registration that stands, where known."""
        ...


@dataclass(slots=True)
class ForwarderStatistics:
    """Requests since start. Caller: sent = answered + not_run + unknown + abandoned + open. Owner: executed, refused
    by reason."""

    sent: int = 0
    answered: int = 0
    not_run: int = 0
    unknown: int = 0
    abandoned: int = 0
    executed: int = 0
    nacked: dict[str, int] = field(default_factory=dict[str, int])


class Forwarder:
    """All exchanges of one worker. `app` runs what arrives for sessions owned here."""

    def __init__(self, member: Member, ownership: Ownership, app: ASGIApp) -> None:
        self._member = member
        self._ownership = ownership
        self._app = app
        self._next_id = 0
        self._callers: dict[int, CallerExchange] = {}
        self._owners: dict[tuple[str, int], OwnerExchange] = {}
        self._running: set[asyncio.Task[None]] = set()
        self.statistics = ForwarderStatistics()

    def __repr__(self) -> str:
        return f"<Forwarder calling={len(self._callers)} serving={len(self._owners)}>"

    @property
    def calling(self) -> int:
        """Exchanges this worker waits on."""
        return len(self._callers)

    @property
    def serving(self) -> int:
        """Exchanges this worker runs for others."""
        return len(self._owners)

    # -- the caller's end ------------------------------------------------------------------------------------------

    async def forward(
        self, to: Registration, key: str, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Run a request at the owner of session `key` and stream its response to `send`.

        Raises `NotRun`, `OutcomeUnknown`, `BrokenOff` (the response had begun), `Disconnected` (the client left; the
        owner is told), and `Unavailable` when Redis cannot be written to: nothing was sent.
        """
        self._next_id += 1
        exchange = CallerExchange(self._next_id, to.owner, body, lambda data: None)
        exchange.post = self._poster(to.owner, exchange)
        head = self._request_head(to, key, scope)
        self._callers[exchange.id] = exchange
        self._member.watch(to.owner)
        finished = False
        self.statistics.sent += 1
        try:
            self._member.outbox.post(to.owner, exchange.request_frame(head), exchange, request=True)
            exchange.send_body()
            with until_disconnect(receive):
                await self._relay(exchange, send)
            finished = True
            self.statistics.answered += 1
        except (NotRun, Unavailable):
            finished = True  # nothing runs there
            self.statistics.not_run += 1
            raise
        except (OutcomeUnknown, BrokenOff):
            self.statistics.unknown += 1
            raise
        except BaseException:
            self.statistics.abandoned += 1
            raise
        finally:
            del self._callers[exchange.id]
            self._member.unwatch(to.owner)
            if not finished:
                self._post_quietly(exchange, encode(FrameType.CANCEL, exchange.id))

    async def _relay(self, exchange: CallerExchange, send: Send) -> None:
        started = False
        while True:
            try:
                frame = await exchange.next()
            except (NotRun, OutcomeUnknown) as failure:
                if started:
                    raise BrokenOff(str(failure)) from failure
                raise
            match frame.type:
                case FrameType.CHUNK:
                    done = (
                        exchange.take_end()
                    )  # it mostly comes along; then the client needs no write of its own for it
                    await send({"type": "http.response.body", "body": frame.payload, "more_body": not done})
                    if done:
                        return
                    exchange.grant(len(frame.payload))
                case FrameType.HEAD:
                    status, headers = unpack_head(frame.payload)
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                    started = True
                case FrameType.END:
                    if frame.flags & ABORT or not started:
                        failure = "the owner's response broke off"
                        raise BrokenOff(failure) if started else OutcomeUnknown(failure)
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    return
                case FrameType.NACK:
                    reason, owner, epoch = read_nack(frame)
                    if reason == GONE:
                        failure = "the owner's answer was lost"
                        raise BrokenOff(failure) if started else OutcomeUnknown(failure)
                    raise NotRun(reason, Registration(owner, epoch) if owner else None)
                case FrameType.CREDIT:
                    exchange.credited(frame)
                case _:
                    raise FrameError(f"unexpected frame {frame.type.name}")

    def _request_head(self, to: Registration, key: str, scope: Scope) -> RequestHead:
        client = scope.get("client")
        clock = self._member.clock_of(to.owner)
        return RequestHead(
            session=key,
            epoch=to.epoch,
            expires_ms=clock.time_ms() + REQUEST_EXPIRY_MS,
            clock=clock.node,
            method=scope["method"],
            scheme=scope.get("scheme", "http"),
            path=scope["path"],
            query=scope.get("query_string", b"").decode("latin-1"),
            root_path=scope.get("root_path", ""),
            repeat=REPEAT in scope,
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
            client=None if client is None else (client[0], client[1]),
        )

    def _poster(self, peer: str, ticket: CallerExchange | OwnerExchange) -> Callable[[bytes], None]:
        outbox = self._member.outbox
        return lambda data: outbox.post(peer, data, ticket)

    def _post_quietly(self, exchange: CallerExchange, data: bytes) -> None:
        try:
            exchange.post(data)
        except Unavailable:
            logger.debug("cancel_not_sent peer=%s", exchange.peer[:8])

    # -- the owner's end -------------------------------------------------------------------------------------------

    def _start(self, sender: str, frame: Frame) -> None:
        try:
            head, body = unpack_request(frame.payload)
        except FrameError as error:  # a peer of another version; its caller must not wait
            logger.warning("request_malformed sender=%s error=%s", sender[:8], error)
            self._count_nack("malformed")
            self._member.outbox.post(sender, nack(frame.exchange, "malformed"))
            return
        refusal = self._refuse(head)
        if refusal is not None:
            reason, stands = refusal
            self._count_nack(reason)
            owner, epoch = (stands.owner, stands.epoch) if stands else ("", 0)
            self._member.outbox.post(sender, nack(frame.exchange, reason, owner, epoch))
            return
        exchange = OwnerExchange(
            frame.exchange, sender, head, body, last=bool(frame.flags & LAST), post=lambda data: None
        )
        exchange.post = self._poster(sender, exchange)
        self._owners[sender, frame.exchange] = exchange
        self._member.watch(sender)
        task = asyncio.ensure_future(self._run(exchange))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _refuse(self, head: RequestHead) -> tuple[str, Registration | None] | None:
        """Admission: deadline, then ownership under this incarnation and epoch, then the fence."""
        clock = self._member.clock
        if head.clock != clock.node or head.expires_ms < clock.time_ms():
            return "expired", None
        refusal = None if head.session == CONTROL else self._ownership.refuse(head)
        if refusal is None and not self._member.may_write():
            return "fenced", None
        return refusal

    async def _run(self, exchange: OwnerExchange) -> None:
        self.statistics.executed += 1
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Disconnected:
            pass
        except NotRun as refusal:  # the session closed, or the lease ended, since it was admitted
            self.statistics.executed -= 1
            self._count_nack(refusal.reason)
            exchange.refuse(refusal.reason)
        except BrokenOff:
            exchange.end(abort=True)
        except Exception:
            logger.exception("exchange_failed session=%s", exchange.head.session[:8])
            exchange.end(abort=True)
        finally:
            exchange.end(abort=True)  # a no-op after a complete response
            self._owners.pop((exchange.peer, exchange.id), None)
            self._member.unwatch(exchange.peer)

    def _count_nack(self, reason: str) -> None:
        self.statistics.nacked[reason] = self.statistics.nacked.get(reason, 0) + 1

    # -- what the reader tells -------------------------------------------------------------------------------------

    def frame(self, sender: str, frame: Frame) -> None:
        """Dispatch one frame; never waits."""
        if frame.flags & FROM_OWNER:
            caller = self._callers.get(frame.exchange)
            # An exchange belongs to one pair: a peer cannot answer for another.
            if caller is not None and caller.peer == sender:
                caller.feed(frame)
            return
        if frame.type is FrameType.REQUEST:
            self._start(sender, frame)
            return
        owner = self._owners.get((sender, frame.exchange))
        match frame.type:
            case FrameType.CHECK:
                if owner is None:
                    self._member.outbox.post(sender, nack(frame.exchange, GONE))
            case _ if owner is None:
                return  # it has ended here; the frame was on its way
            case FrameType.CANCEL:
                owner.disconnect()
            case FrameType.CREDIT:
                owner.credited(frame)
            case _:
                owner.feed(frame)

    def peer_down(self, peer: str, unread: frozenset[int]) -> None:
        """A peer's lease has ended."""
        loop = asyncio.get_running_loop()
        for caller in self._callers.values():
            if caller.peer != peer:
                continue
            if caller.peer_read(unread):
                loop.call_later(LAST_WORD_S, caller.fail, OutcomeUnknown("the owner died while the call was running"))
            else:
                caller.fail(NotRun("owner_down"))
        for owner in list(self._owners.values()):
            if owner.peer == peer:
                owner.disconnect()

    def receipt(self, sender: str, receipt: Receipt) -> None:
        """Learn which of our frames a peer did not get."""
        for caller in self._callers.values():
            if caller.peer != sender or not caller.request_counter:
                continue
            lost = receipt.lost(caller.request_counter)
            if lost:
                caller.fail(NotRun("lost"))
            elif lost is None or receipt.lost_any(caller.first_counter, caller.last_counter):
                caller.fail(OutcomeUnknown("frames of the call were lost"))
        for owner in list(self._owners.values()):
            if (
                owner.peer == sender
                and owner.first_counter
                and receipt.lost_any(owner.first_counter, owner.last_counter)
            ):
                owner.end(abort=True)
                owner.disconnect()

    def rotated(self) -> None:
        """Frames to us may have been lost: ask each owner whether what we wait for is still open there."""
        for caller in self._callers.values():
            caller.post(encode(FrameType.CHECK, caller.id))

    def lost(self) -> None:
        """Our own lease ended: nothing can reach us under the old incarnation any more."""
        for caller in self._callers.values():
            if caller.request_counter:
                caller.fail(OutcomeUnknown("this worker's lease ended while the call was running"))
            else:
                caller.fail(NotRun("lease_lost"))
        for owner in list(self._owners.values()):
            owner.disconnect()

    async def drain(self, timeout_s: float) -> None:
        """Wait until nothing runs here for others, at most `timeout_s`; then disconnect what does. GET streams never
        end: at once."""
        for owner in list(self._owners.values()):
            if owner.head.method == "GET":
                owner.disconnect()
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        # Calls of pinned sessions go on coming in meanwhile, and are waited for, too.
        while self._running and loop.time() < until:
            await asyncio.wait(self._running, timeout=until - loop.time())
        for owner in list(self._owners.values()):
            owner.disconnect()
        if self._running:
            await asyncio.wait(self._running, timeout=1.0)
        for task in self._running:
            task.cancel()
