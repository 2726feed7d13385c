"""Slots: whose sessions stand in for whose, and whose never do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from leasehold.pool import SessionClosed, Upstream
from leasehold.pool.borrowing import Want
from leasehold.pool.link import own_headers
from lending_pool import FILES, ONE, TARGET, lending

pytestmark = pytest.mark.anyio


def kinds_of_want() -> list[Want]:
    """Callers no two of whom may ever have the same session."""
    other = Upstream("other", TARGET)
    token, another = own_headers({"authorization": "Bearer a"}), own_headers({"authorization": "Bearer b"})
    tenant = own_headers({"authorization": "Bearer a", "x-tenant": "1"})
    return [
        Want(FILES),
        Want(other),
        Want(FILES, principal="alice"),
        Want(FILES, principal="bob"),
        Want(FILES, principal="anonymous"),
        Want(FILES, headers=token),
        Want(FILES, headers=another),
        Want(FILES, headers=tenant),
        Want(other, headers=token),
        Want(FILES, principal="alice", capabilities={"sampling": {}}),
        Want(FILES, principal="alice", capabilities={"sampling": {}, "roots": {}}),
        Want(FILES, principal="alice", affinity="x"),
        Want(FILES, principal="bob", affinity="x"),
        Want(FILES, principal="alice", affinity="y"),
        Want(FILES, headers=token, affinity="x"),
    ]


async def test_principals_credentials_upstreams_and_capabilities_never_share_a_session() -> None:
    """B17: one after the other, so that what the last one left would be there for the next."""
    async with lending() as pool:
        wants = kinds_of_want()
        for want in wants:
            want.upstream = replace(want.upstream, max_sessions=50)
        had: list[int] = []
        for want in wants:
            borrow = await pool.acquire(want)
            had.append(id(borrow.session))
            borrow.release()
        assert max(Counter(had).values()) == 1
        for want, session in zip(kinds_of_want(), had, strict=True):
            want.upstream = replace(want.upstream, max_sessions=50)
            borrow = await pool.acquire(want)
            assert id(borrow.session) == session, "the same caller gets his own again"
            borrow.release()


async def test_a_session_is_opened_with_the_headers_of_who_wanted_it_last() -> None:
    """B18"""
    async with lending() as pool:
        for token in ("old", "new"):
            headers = own_headers({"authorization": f"Bearer {token}"})
            borrow = await pool.acquire(Want(ONE, principal="alice", headers=headers))
            method, sent = pool.links[-1].asked[0]
            assert (method, dict(sent)[b"authorization"]) == ("initialize", f"Bearer {token}".encode())
            borrow.release(discard=True)
            with pytest.raises(SessionClosed):
                _ = borrow.session.link
