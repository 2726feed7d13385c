"""Serving calls on the sessions that this worker owns: those that landed here, and those that came by a hop."""

from __future__ import annotations

from ..coordinator.frames import RequestHead
from ..pool import PooledSession, PoolError, SessionClosed, parse
from ..pool.jsonrpc import InvalidMessage
from ..pool.sharing import SharedIds, SharedLink
from .affinity import Call
from .answers import Refused, too_large, turned_away
from .asgi import Headers, Receive, Scope, Send, read_body
from .errors import BodyTooLarge, NotRun
from .exchange import HOP, REPEAT
from .relay import relay_delete, relay_get, relay_post
from .sessions import Owned, Sessions
from .shared import SharedRelay, forwarded


class Serving:
    """The owner's end of every call of one worker."""

    def __init__(self, sessions: Sessions, *, max_body_bytes: int) -> None:
        self._sessions = sessions
        self._max_body_bytes = max_body_bytes

    async def serve(self, owned: Owned, call: Call, receive: Receive, send: Send) -> None:
        """Run a call on a session owned here. Raises `NotRun`, `Refused`, `Disconnected`, `BrokenOff`."""
        headers = call.scope["headers"]
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
                way = SharedLink(link, SharedIds(session.next_id), b"") if REPEAT in call.scope else link
                await relay_post(way, call.message, call.body, headers, receive, send)
            elif call.scope["method"] == "GET":
                await relay_get(link, headers, receive, send, adopted=owned.adopted)
            else:
                status = await relay_delete(link, headers, receive, send)
                if 200 <= status < 300 or status == 404:
                    self._sessions.end(owned, "client")

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
        relay: SharedRelay = owned.relay or SharedRelay(session)
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
