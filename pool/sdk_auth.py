"""The SDK's OAuth providers, made fit to be shared by calls of any length. Imports no SDK."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Final

import httpx2

SDK: Final = "mcp.client.auth"
MAX_STALE: Final = 2
"""How often a call is sent with credentials that others have got, before its own refusal is told to the provider."""


def is_from_sdk(auth: httpx2.Auth) -> bool:
    return any(cls.__module__.startswith(SDK) for cls in type(auth).__mro__)


class Unlocked(httpx2.Auth):
    """A provider of the SDK without its lock around the call.

    The SDK's providers hold a lock from before a call is sent until it is answered: one tool that thinks for a minute,
    or an open stream, delays every other call with the same credentials (modelcontextprotocol/python-sdk 3209). Here
    a provider's flow is run to the point where it sends the call, and ended; so the lock covers what it is for, getting
    tokens. Only a refusal is brought back, to a new run.
    """

    def __init__(self, provider: httpx2.Auth) -> None:
        self._provider = provider
        logging.getLogger(f"{SDK}.oauth2").addFilter(_without_traceback)

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        sent = 0
        refused: httpx2.Response | None = None
        refused_with = request.headers.copy()
        while True:
            told = False
            flow = self._provider.async_auth_flow(request)
            try:
                wanted = await anext(flow)
                while True:
                    if wanted is not request:
                        answer = yield wanted
                    elif refused is None or told:
                        break
                    elif request.headers != refused_with and sent < MAX_STALE:
                        break  # another call has renewed the credentials
                    else:
                        answer, told = refused, True
                    wanted = await flow.asend(answer)
            except StopAsyncIteration:
                return
            finally:
                await flow.aclose()
            refused_with = request.headers.copy()
            sent += 1
            refused = yield request
            if told or not _asks_for_credentials(refused):
                return


def _asks_for_credentials(response: httpx2.Response) -> bool:
    """Whether a provider would send the call again after this answer."""
    if response.status_code == 403:
        return "insufficient_scope" in response.headers.get("www-authenticate", "")
    return response.status_code == 401


def _without_traceback(record: logging.LogRecord) -> bool:
    """Log that a flow failed and why, without the text of the error: it quotes answers of token endpoints."""
    if record.exc_info and record.exc_info[0] is not None:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[0].__name__}", ()
        record.exc_info = record.exc_text = None
    return True
