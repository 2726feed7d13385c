"""Principals through whole workers: rotated tokens, other people's ids, forged headers, and nothing told of anybody."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
import redis.asyncio
import whole_workers
from faults import eventually
from fleet import run_example, run_gateway, write_config
from issuer import AUDIENCE, DAY_S, ISSUER, SECRET, claims, forged, issuer, jwk, pem, rsa_key, token
from leasehold.coordinator import Keyring
from leasehold.workers.answers import Refused
from leasehold.workers.identity import Identity
from leasehold.workers.principals import MARK, TrustedHeader
from leasehold.workers.settings import load_settings
from leasehold.workers.worker import Worker
from mcp_http import RawSession
from whole_workers import Client, Upstream

pytestmark = pytest.mark.anyio

HEADER = "x-forwarded-user"
BY_HEADER = {"LEASEHOLD_PRINCIPAL_HEADER": HEADER}
BY_TOKEN = {
    "LEASEHOLD_JWT_KEY": pem(rsa_key()),
    "LEASEHOLD_JWT_ALGORITHMS": "RS256",
    "LEASEHOLD_JWT_AUDIENCE": AUDIENCE,
    "LEASEHOLD_JWT_ISSUER": ISSUER,
}
ELSEWHERE = ("203.0.113.9", 40_000)
UNKNOWN_ID = "A" * 48


@asynccontextmanager
async def fleet(
    redis_url: str, environ: dict[str, str], workers: int = 2, **options: Any
) -> AsyncGenerator[tuple[Upstream, list[Worker]]]:
    """An upstream that gets the `Authorization` of its callers, and workers."""
    async with whole_workers.upstream() as upstream:
        servers = {"counter": {"url": upstream.url, "leasehold": {"forward_headers": ["authorization"], **options}}}
        async with AsyncExitStack() as stack:
            started = [whole_workers.worker(redis_url, servers, **environ) for _ in range(workers)]
            yield upstream, [await stack.enter_async_context(each) for each in started]


def said(kind: str, who: str, secret: str) -> list[tuple[bytes, bytes]]:
    """The headers by which somebody is known, with a credential that is never the same."""
    if kind == "header":
        return [(HEADER.encode(), who.encode()), (b"authorization", f"Bearer {secret}".encode())]
    return [(b"authorization", f"Bearer {token(sub=who, jti=secret)}".encode())]


def authorization(headers: list[tuple[bytes, bytes]]) -> str:
    return dict(headers)[b"authorization"].decode()


each_kind = pytest.mark.parametrize(
    ("kind", "environ"), [("header", BY_HEADER), ("token", BY_TOKEN)], ids=["header", "token"]
)


class TestRotation:
    @each_kind
    async def test_b18_a_rotated_token_goes_on_with_its_session_and_reaches_the_upstream(
        self, redis_url: str, kind: str, environ: dict[str, str]
    ) -> None:
        """B18: at the owner, and through the hop from another worker."""
        async with fleet(redis_url, environ) as (upstream, (owner, other)):
            client = Client(owner, headers=said(kind, "alice", "first"))
            await client.initialize()
            assert await client.count() == 1
            used = [client.headers]
            for worker, secret in ((owner, "second"), (other, "third"), (other, "fourth"), (owner, "fifth")):
                client.worker, client.headers = worker, said(kind, "alice", secret)
                used.append(client.headers)
                assert await client.count() == len(used)
            assert upstream.authorizations == [authorization(headers) for headers in used]
            assert len(set(upstream.authorizations)) == 5
            assert (owner.affinity.forwarded, other.affinity.forwarded) == (0, 2)
            assert len(upstream.counts) == 1

    @each_kind
    async def test_b18_a_session_is_ended_by_its_principal_with_any_of_his_tokens(
        self, redis_url: str, kind: str, environ: dict[str, str]
    ) -> None:
        """B18"""
        async with fleet(redis_url, environ) as (upstream, (owner, other)):
            client = Client(owner, headers=said(kind, "alice", "first"))
            await client.initialize()
            client.worker, client.headers = other, said(kind, "alice", "second")
            assert (await client.send("DELETE"))[0] == 200
            assert len(upstream.deleted) == 1

    @each_kind
    async def test_b18_the_upstream_is_told_of_the_end_of_an_idle_session_with_its_client_s_last_token(
        self, redis_url: str, kind: str, environ: dict[str, str]
    ) -> None:
        """B18, B11: without one it would refuse, and keep the session."""
        async with fleet(redis_url, environ, idle_ttl=0.1) as (upstream, (owner, other)):
            client = Client(owner, headers=said(kind, "alice", "first"))
            await client.initialize()
            client.worker, client.headers = other, said(kind, "alice", "second")
            await client.count()
            await eventually(lambda: bool(upstream.farewells))
            assert upstream.farewells == [authorization(client.headers)]

    @each_kind
    async def test_b18_a_session_goes_on_with_a_new_token_after_its_owner_has_stopped(
        self, redis_url: str, kind: str, environ: dict[str, str]
    ) -> None:
        """B18"""
        async with fleet(redis_url, environ) as (upstream, (owner, other)):
            client = Client(owner, headers=said(kind, "alice", "first"))
            await client.initialize()
            await client.count()
            owner.drain()
            client.worker, client.headers = other, said(kind, "alice", "second")
            assert await client.count() == 2
            assert upstream.authorizations[-1] == authorization(client.headers)

    @each_kind
    async def test_b5_a_limit_of_a_principal_holds_whatever_his_token(
        self, redis_url: str, kind: str, environ: dict[str, str]
    ) -> None:
        """B5"""
        async with fleet(redis_url, environ, 1, max_sessions_per_principal=1) as (_, (worker,)):
            statuses = []
            for who, secret in (("alice", "first"), ("alice", "second"), ("bob", "first")):
                client = Client(worker, headers=said(kind, who, secret))
                statuses.append((await client.send("POST", "initialize", {"protocolVersion": "2025-11-25"}))[0])
            assert statuses == [200, 503, 200]

    async def test_by_default_a_new_token_is_a_new_principal(self, redis_url: str) -> None:
        """B17"""
        async with fleet(redis_url, {}, 1) as (_, (worker,)):
            client = Client(worker, headers=said("token", "alice", "first"))
            await client.initialize()
            first = client.headers
            client.headers = said("token", "alice", "second")
            assert (await client.send("POST", "tools/call", {"name": "count"}))[0] == 404
            client.headers = first
            assert await client.count() == 1


class TestIsolation:
    @each_kind
    @pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
    async def test_b31_anothers_id_answers_exactly_like_an_unknown_one(
        self, redis_url: str, kind: str, environ: dict[str, str], method: str
    ) -> None:
        """B31: status, body and headers, at the owner and elsewhere."""
        async with fleet(redis_url, environ) as (upstream, (owner, other)):
            alice = Client(owner, headers=said(kind, "alice", "x"))
            await alice.initialize()
            for worker in (owner, other):
                answers = []
                for session_id in (alice.session_id, UNKNOWN_ID):
                    bob = Client(worker, headers=said(kind, "bob", "x"), session_id=session_id)
                    answers.append((await bob.send(method, "tools/call", {"name": "count"}), bob.answered))
                assert answers[0] == answers[1]
                assert answers[0][0][0] == 404
            assert upstream.authorizations == []
            assert await alice.count() == 1

    async def test_b31_an_id_of_one_way_to_know_a_principal_is_unknown_to_another(self, redis_url: str) -> None:
        """B31: also where the credential is written as the header's or the token's mark would be."""
        async with whole_workers.upstream() as upstream:
            servers = {"counter": {"url": upstream.url}}
            async with (
                whole_workers.worker(redis_url, servers) as open_worker,
                whole_workers.worker(redis_url, servers, **BY_HEADER) as guarded,
            ):
                alice = Client(guarded, headers=[(HEADER.encode(), b"alice")])
                await alice.initialize()
                for pretence in (b"alice", MARK[1:] + HEADER.encode() + b"\0alice", HEADER.encode() + b"\0alice"):
                    other = Client(open_worker, headers=[(b"authorization", pretence)], session_id=alice.session_id)
                    assert (await other.send("POST", "tools/call", {"name": "count"}))[0] == 404
            assert upstream.authorizations == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("sent", "peer", "status"),
        [
            ([b"alice"], ("127.0.0.1", 1), 200),
            ([b" alice "], ("127.8.9.10", 1), 200),
            (["Älice".encode()], ("::1", 1), 200),
            ([b"alice"], ("::ffff:127.0.0.1", 1), 200),
            ([], ("127.0.0.1", 1), 401),
            ([b""], ("127.0.0.1", 1), 401),
            ([b" "], ("127.0.0.1", 1), 401),
            ([b"alice", b"alice"], ("127.0.0.1", 1), 400),
            ([b"", b"alice"], ("127.0.0.1", 1), 400),
            ([b"alice"], ELSEWHERE, 403),
            ([b"alice", b"bob"], ELSEWHERE, 403),
            ([b""], ELSEWHERE, 403),
            ([], ELSEWHERE, 401),
            ([b"alice"], ("::ffff:203.0.113.9", 1), 403),
            ([b"alice"], ("localhost", 1), 403),
            ([b"alice"], ("", 0), 403),
            ([b"alice"], None, 403),
        ],
    )
    async def test_b17_a_principal_is_named_once_and_by_a_trusted_peer(
        self, redis_url: str, sent: list[bytes], peer: Any, status: int
    ) -> None:
        """B17"""
        async with fleet(redis_url, BY_HEADER, 1) as (upstream, (worker,)):
            headers = [(HEADER.encode(), value) for value in sent]
            client = Client(worker, headers=headers, peer=peer)
            got, body = await client.send("POST", "initialize", {"protocolVersion": "2025-11-25"})
            assert got == status
            assert len(upstream.counts) == (1 if status == 200 else 0)
            if status != 200:
                assert body["jsonrpc"] == "2.0"
                assert set(body["error"]) == {"code", "message"}
                assert (b"www-authenticate" in dict(client.answered)) is (status == 401)

    async def test_b17_a_session_is_not_taken_by_a_forged_header(self, redis_url: str) -> None:
        """B17"""
        async with fleet(redis_url, BY_HEADER, 1) as (upstream, (worker,)):
            alice = Client(worker, headers=said("header", "alice", "x"))
            await alice.initialize()
            thief = replace(alice, peer=ELSEWHERE)
            assert (await thief.send("POST", "tools/call", {"name": "count"}))[0] == 403
            assert upstream.authorizations == []

    async def test_a_proxy_may_have_to_show_a_token_too(self, redis_url: str) -> None:
        async with fleet(redis_url, {**BY_HEADER, "LEASEHOLD_TOKENS": "sesame"}, 1) as (_, (worker,)):
            for secret, status in (("sesame", 200), ("guess", 401)):
                client = Client(worker, headers=said("header", "alice", secret))
                assert (await client.send("POST", "initialize", {"protocolVersion": "2025-11-25"}))[0] == status

    @pytest.mark.parametrize(
        ("made", "challenge"),
        [
            (None, b'Bearer realm="leasehold"'),
            (lambda: token(exp=1), b'Bearer error="invalid_token", error_description="the token has expired"'),
            (lambda: token(rsa_key(1)), b'Bearer error="invalid_token"'),
            (lambda: forged({"alg": "none"}), b'Bearer error="invalid_token"'),
            (lambda: forged({"alg": "HS256"}, pem(rsa_key()).encode()), b'Bearer error="invalid_token"'),
            (lambda: token(pad="x" * 20_000), b'Bearer error="invalid_token"'),
        ],
        ids=["missing", "expired", "key", "none", "confused", "huge"],
    )
    async def test_b17_without_a_valid_token_nothing_is_served(
        self, redis_url: str, made: Any, challenge: bytes
    ) -> None:
        """B17: neither a session, nor requests of a session, nor those without one; but the probes are."""
        async with fleet(redis_url, BY_TOKEN, 1) as (upstream, (worker,)):
            alice = Client(worker, headers=said("token", "alice", "x"))
            await alice.initialize()
            sent = [] if made is None else [(b"authorization", f"Bearer {made()}".encode())]
            for session_id in ("", alice.session_id):
                for method in ("POST", "GET", "DELETE"):
                    client = Client(worker, headers=sent, session_id=session_id)
                    status, body = await client.send(method, "initialize" if not session_id else "ping")
                    assert status == 401
                    assert body["error"]["message"].startswith("Unauthorized: ")
                    assert dict(client.answered)[b"www-authenticate"].startswith(challenge)
            assert (len(upstream.counts), upstream.authorizations) == (1, [])
            probe = replace(alice, headers=[])
            assert await status_of(probe, "/healthz") == 200


class TestIssuer:
    async def test_b18_tokens_go_on_through_a_change_of_the_issuers_keys(
        self, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """B18: each worker fetches the new key for itself; and while the issuer is down, sessions go on."""
        monkeypatch.setattr("leasehold.workers.jwks.COOLDOWN_S", 0.1)
        rules = {name: value for name, value in BY_TOKEN.items() if name != "LEASEHOLD_JWT_KEY"}
        async with issuer(jwk(rsa_key(), "old")) as published:
            async with fleet(redis_url, {**rules, "LEASEHOLD_JWT_JWKS_URL": published.url}) as (upstream, workers):

                def use(number: int, kid: str) -> None:
                    made = token(rsa_key(number), head={"kid": kid}, jti=str(len(upstream.authorizations)))
                    client.headers = [(b"authorization", f"Bearer {made}".encode())]

                client = Client(workers[0])
                use(0, "old")
                await client.initialize()
                published.keys[:] = [jwk(rsa_key(1), "new")]
                use(1, "new")
                for client.worker in workers:
                    async with asyncio.timeout(10):
                        while (await client.send("POST", "ping"))[0] != 200:
                            await asyncio.sleep(0.01)
                published.status = 503
                before = len(upstream.authorizations)
                for client.worker in workers:
                    use(1, "new")
                    await client.count()
                assert len(upstream.authorizations) == before + 2
                use(0, "old")
                assert (await client.send("POST", "ping"))[0] in (401, 503)


class TestB19:
    @each_kind
    async def test_nothing_of_a_caller_is_in_redis_logs_or_metrics(
        self, redis_url: str, kind: str, environ: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """B19: neither names nor claims nor tokens, with sessions that are served, forwarded, refused."""
        caplog.set_level(logging.DEBUG)
        async with fleet(redis_url, environ) as (_, (owner, other)):
            headers = said(kind, "alice-in-person", "sesame")
            client = Client(owner, headers=headers)
            await client.initialize()
            client.worker = other
            await client.count()
            stranger = Client(other, headers=said(kind, "mallory-in-person", "open"), session_id=client.session_id)
            await stranger.send("POST", "ping")
            await replace(client, peer=ELSEWHERE, headers=[*headers, *headers]).send("POST", "ping")
            told = [await everything_in(redis_url), caplog.text.encode(), owner.telemetry.exposition()[0]]
            told.append(repr((owner, other, owner.identity, owner.settings)).encode())
        secrets = [b"alice-in-person", b"mallory-in-person", b"sesame", authorization(headers).split(".")[-1].encode()]
        for text in told:
            assert text
            assert [secret for secret in secrets if secret in text] == []


async def everything_in(url: str) -> bytes:
    """All keys of a Redis and what they hold, one after the other."""
    found: list[Any] = []
    async with redis.asyncio.Redis.from_url(url) as client:
        async for key in client.scan_iter():
            match await client.type(key):
                case b"hash":
                    found.append((key, await client.hgetall(key)))
                case b"list":
                    found.append((key, await client.lrange(key, 0, -1)))
                case b"string":
                    found.append((key, await client.get(key)))
                case b"zset":
                    found.append((key, await client.zrange(key, 0, -1)))
                case b"set":
                    found.append((key, await client.smembers(key)))
                case kind:
                    raise AssertionError(f"what is a {kind!r}?")
    return repr(found).encode()


async def status_of(client: Client, path: str) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": client.headers, "query_string": b""}
    await client.worker(scope, None, send)  # type: ignore[arg-type]
    return sent[0]["status"]


class TestTrustedHeader:
    """Who may name a principal."""

    @pytest.mark.parametrize(
        ("proxies", "peer", "trusted"),
        [
            ("", "127.0.0.1", True),
            ("", "10.0.0.1", False),
            ("10.0.0.0/8", "10.255.0.1", True),
            ("10.0.0.0/8", "11.0.0.1", False),
            ("10.0.0.0/8", "127.0.0.1", False),
            ("10.0.0.0/8,127.0.0.1", "127.0.0.1", True),
            ("10.0.0.0/8", "::ffff:10.0.0.1", True),
            ("10.0.0.7", "10.0.0.7", True),
            ("10.0.0.7", "10.0.0.70", False),
            ("fd00::/8", "fd12::1", True),
            ("fd00::/8", "fe80::1%eth0", False),
            ("fe80::/10", "fe80::1%eth0", True),
            ("0.0.0.0/0", "198.51.100.1", True),
            ("0.0.0.0/0", "::1", False),
            ("0.0.0.0/0", "testclient", False),
        ],
    )
    async def test_addresses_and_networks(self, proxies: str, peer: str, trusted: bool) -> None:
        """B17"""
        settings = load_settings({**BY_HEADER, "LEASEHOLD_TRUSTED_PROXIES": proxies})
        source = TrustedHeader(HEADER, settings.trusted_proxies)
        assert await named(source, client=(peer, 1)) == (b"alice" if trusted else 403)

    @pytest.mark.parametrize(
        ("proxies", "server", "trusted"),
        [
            ([], ("/run/leasehold.sock", None), True),
            (["10.0.0.0/8"], ("/run/leasehold.sock", None), False),
            ([], ("127.0.0.1", 8333), False),
            ([], None, False),
        ],
        ids=["unix socket", "others are trusted", "TCP", "unknown"],
    )
    async def test_a_peer_without_an_address_is_local_on_a_unix_socket_only(
        self, proxies: list[str], server: Any, trusted: bool
    ) -> None:
        """B17: one that sends its request by TCP and is gone at once has no address either."""
        source = TrustedHeader(HEADER, proxies)
        assert await named(source, client=None, server=server) == (b"alice" if trusted else 403)

    async def test_headers_of_other_names_are_nobodys_business(self) -> None:
        """B17: neither another header, nor the same one under a name that some servers take for it."""
        for name in (b"x_forwarded_user", b"x-forwarded-users", b"x-forwarded"):
            scope = {"client": ("127.0.0.1", 1), "headers": [(name, b"alice")]}
            with pytest.raises(Refused) as caught:
                await TrustedHeader(HEADER, []).bound(scope)
            assert caught.value.status == 401

    async def test_the_same_name_in_another_header_is_another_principal(self) -> None:
        """B17"""
        bound = [
            await TrustedHeader(name, []).bound({"client": ("::1", 1), "headers": [(name.encode(), value)]})
            for name, value in (("x-user", b"a"), ("x-email", b"a"), ("x-user", b"A"), ("x", b"-user\0a"))
        ]
        assert len(set(bound)) == 4

    async def test_an_untrusted_peer_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        source = TrustedHeader(HEADER, [])
        for _ in range(3):
            assert await named(source, client=ELSEWHERE) == 403
        assert caplog.text.count("untrusted_peer peer=203.0.113.9") == 1


async def named(source: TrustedHeader, **scope: Any) -> bytes | int:
    """The name that counts, or the status of the refusal."""
    identity = Identity(Keyring([b"a secret of the fleet"]), source)
    try:
        made = await identity.caller({"headers": [(HEADER.encode(), b"alice")], **scope})
    except Refused as refused:
        return refused.status
    assert "alice" not in repr(made)
    return made.bound.rpartition(b"\0")[2]


class TestProcesses:
    pytestmark = pytest.mark.process

    async def test_a_gateway_opens_to_tokens_of_a_key_file(self, tmp_path: Path) -> None:
        """B17: the door of real processes, with a key from a file, as `serve` reads it."""
        key = tmp_path / "key.pem"
        key.write_text(pem(rsa_key()))
        environ = {"LEASEHOLD_JWT_KEY_FILE": str(key), "LEASEHOLD_JWT_ALGORITHMS": "RS256"}
        with run_example("counter_http.py", tmp_path) as upstream:
            config = write_config(tmp_path, {"http": {"url": upstream.url}})
            with run_gateway(config, tmp_path, "--workers", "2", redis_url=None, env=environ) as gateway:
                url = f"{gateway.url}/servers/http/mcp"
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
                    answers = []
                    for made in (token(aud=None), jwt.encode(claims(aud=None), SECRET), None):
                        headers = {} if made is None else {"authorization": f"Bearer {made}"}
                        answers.append((await RawSession(http, url, headers).initialize()).status)
                    assert answers == [200, 401, 401]
                    async with RawSession(http, url, {"authorization": f"Bearer {token(aud=None)}"}) as session:
                        for number in range(6):  # by new connections, so that both workers get some
                            rotated = token(aud=None, jti=str(number), exp=claims()["exp"] + DAY_S)
                            session.headers["authorization"] = f"Bearer {rotated}"
                            assert (await session.request("ping")).message["result"] == {}
            assert "eyJ" not in gateway.output()

    def test_who_does_not_need_tokens_does_not_load_them(self) -> None:
        """A worker starts in half a second, and every fork pays for what its parent has imported."""
        code = (
            "import sys, leasehold.workers.process, leasehold.workers.settings as s;"
            "s.load_settings({'LEASEHOLD_PRINCIPAL_HEADER': 'x-user'});"
            "print({'jwt', 'mcp'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
        assert done.stdout == "set()\n"
