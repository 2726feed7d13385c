"""Serving calls on the sessions that this worker owns: those that landed here, and those that came by a hop."""

from __future__ import annotations

from ..coordinator.event_log import EventLog, SessionEvents
from ..coordinator.frames import RequestHead
from ..pool import PooledSession, PoolError, SessionClosed, parse
from ..pool.jsonrpc import InvalidMessage
from ..pool.sharing import SharedIds, SharedLink
from .affinity import Call
from .answers import Refused, too_large, turned_away, unavailable
from .asgi import Headers, Receive, Scope, Send, read_body
from .errors import BodyTooLarge, NotRun
from .exchange import HOP, REPEAT
from .owned import Owned
from .relay import relay_delete, relay_get, relay_post
from .sessions import Sessions
from .shared import SharedRelay, forwarded


class Serving:
    """The owner's end of every call of one worker."""

    def __init__(self, sessions: Sessions, events: EventLog, *, max_body_bytes: int) -> None:
        self._sessions = sessions
        self._events = events
        self._max_body_bytes = max_body_bytes
        self.takes_streams = True
        """Whether GET streams may still begin: a worker that stops would wait for them in vain."""

    async def serve(self, owned: Owned, call: Call, receive: Receive, send: Send) -> None:
        """Run a call on a session owned here. Raises `NotRun`, `Refused`, `Disconnected`, `BrokenOff`."""
        headers = call.scope["headers"]
        if call.scope["method"] == "GET" and not self.takes_streams:
            raise unavailable("This worker is stopping")
        with owned.session as session:
            if session.is_pool_initialized:
                await self._serve_shared(owned, call, receive, send)
                return
            try:
                link = session.link
            except SessionClosed:
                raise NotRun("closed") from None
            if session.upstream.forward_headers:
                self._remember(session, headers)
            if call.message is not None:
                # What may be running under this id upstream is asked for again under another one.
                is_repeat = REPEAT in call.scope
                way = SharedLink(link, SharedIds(session.next_id), b"") if is_repeat else link
                await relay_post(way, call.message, call.body, headers, receive, send, is_repeat=is_repeat)
            elif call.scope["method"] == "GET":
                events = self._log(owned)
                await relay_get(link, headers, receive, send, adopted=owned.adopted, events=events)
            else:
                status = await relay_delete(link, headers, receive, send)
                if 200 <= status < 300 or status == 404:
                    self._sessions.end(owned, "client")
                    if owned.relay is not None:
                        self._log(owned).drop()

    def _log(self, owned: Owned) -> SessionEvents:
        """What has been said on the streams of a session that is one client's own."""
        if owned.relay is None:
            owned.relay = self._log_of(owned)
        return owned.relay

    def _log_of(self, owned: Owned) -> SessionEvents:
        def epoch() -> int:
            return owned.registration.epoch if owned.registration is not None else 0

        session = owned.session
        # A key that is computed may have been another session's before; an adopted session goes on.
        return self._events.of(
            session.key, epoch, int(session.upstream.idle_ttl_s * 1000), anew=owned.adopted_at == float("-inf")
        )

    @staticmethod
    def _remember(session: PooledSession, headers: Headers) -> None:
        """The upstream is told of the session's end with the credentials of its client's last call."""
        told = forwarded(session.upstream, headers)
        session.farewell = lambda link: (link, told)

    async def _serve_shared(self, owned: Owned, call: Call, receive: Receive, send: Send) -> None:
        session = owned.session
        if session.is_opening or session.is_closed:  # opening may have failed before anybody could wait for it
            try:
                await self._sessions.opened(owned)
            except PoolError as error:
                raise turned_away(error, call.id) from error
        if session.is_closed:
            raise NotRun("closed")
        relay: SharedRelay = owned.relay or SharedRelay(session, self._log_of(owned))
        owned.relay = relay
        if relay.asks_upstream(call) and not await relay.is_well(call.scope["headers"]):
            self._sessions.end(owned, "unhealthy")
            raise NotRun("closed")  # whoever owns the next one runs it
        try:
            await relay.serve(call, receive, send)
        finally:
            if session.is_closed and not session.keeps_record:  # its record goes now: the next call opens another
                self._sessions.end(owned, "lost")

    async def serve_hop(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that another worker forwarded; admission was checked in the turn it was read in.

        Raises `NotRun` when the session has closed since: it may be found elsewhere by now.
        """
        head: RequestHead = scope[HOP]
        owned = self._sessions.get(head.session)
        if owned is None:
            raise NotRun("closed")
        try:
            body = await read_body(scope["headers"], receive, self._max_body_bytes)
            message = parse(body) if scope["method"] == "POST" else None
            await self.serve(owned, Call(head.session, scope, message, body, safe=False), receive, send)
        except InvalidMessage as error:
            await Refused(400, str(error), code=error.code).send(send)
        except BodyTooLarge as error:
            await too_large(error.limit).send(send)
        except Refused as refusal:
            await refusal.send(send)
