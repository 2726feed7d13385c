"""Keys that an issuer publishes: which are used, when they are fetched, and what goes on while they cannot be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from faults import eventually
from hypothesis import given
from hypothesis import strategies as st
from issuer import AUDIENCE, ISSUER, ec_key, ed_key, issuer, jwk, rsa_key, token
from leasehold.coordinator import Keyring
from leasehold.workers import jwks
from leasehold.workers.answers import Refused
from leasehold.workers.identity import Caller, Identity
from leasehold.workers.jwks import BadKeySet, Jwks, UnknownKey, read_key_set
from leasehold.workers.principals import make_identity
from leasehold.workers.public_keys import RSA
from leasehold.workers.settings import load_settings

pytestmark = pytest.mark.anyio

FIRST, SECOND = rsa_key(), rsa_key(1)
ALL = RSA | {"ES256", "ES384", "EdDSA"}
COOLDOWN_S = 0.2
MEMBERS = st.sampled_from(["kty", "kid", "alg", "use", "key_ops", "crv", "n", "e", "x", "y", "d", "p", "q", "oth"])
TEXTS = st.sampled_from(["RSA", "EC", "OKP", "P-256", "P-384", "Ed25519", "Ed448", "RS256", "AQAB", "AA", "-", "\xfc"])
SCALARS = st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False) | TEXTS
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(TEXTS, SCALARS, max_size=2)


@pytest.fixture(autouse=True)
def short_cooldown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "COOLDOWN_S", COOLDOWN_S)


@asynccontextmanager
async def identity(url: str) -> AsyncGenerator[Identity]:
    """As a worker has it, with its task."""
    rules = {"JWKS_URL": url, "ALGORITHMS": "RS256", "AUDIENCE": AUDIENCE, "ISSUER": ISSUER}
    settings = load_settings({f"LEASEHOLD_JWT_{name}": value for name, value in rules.items()})
    made = make_identity(settings, Keyring([b"a secret of the fleet"]))
    running = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait({running})


async def caller(who: Identity, made: str) -> Caller:
    return await who.caller({"headers": [(b"authorization", f"Bearer {made}".encode())]})


async def status(who: Identity, made: str) -> int:
    """200, or that of the refusal."""
    try:
        await caller(who, made)
    except Refused as refused:
        return refused.status
    return 200


def by(key: Any, kid: str | None = "first", **changes: Any) -> str:
    return token(key, head=None if kid is None else {"kid": kid}, **changes)


async def becomes(who: Identity, made: str, wanted: int) -> None:
    """Wait until a token gets this status."""
    async with asyncio.timeout(20):
        while await status(who, made) != wanted:
            await asyncio.sleep(0.01)


class TestReading:
    @pytest.mark.parametrize(
        ("entry", "algorithms"),
        [
            (jwk(FIRST), RSA),
            (jwk(FIRST, alg="RS256"), {"RS256"}),
            (jwk(FIRST, use=None), RSA),
            (jwk(FIRST, key_ops=["verify"]), RSA),
            (jwk(ec_key()), {"ES256"}),
            (jwk(ec_key(ec.SECP384R1)), {"ES384"}),
            (jwk(ed_key()), {"EdDSA"}),
        ],
        ids=["RSA", "one algorithm", "no use", "key_ops", "P-256", "P-384", "Ed25519"],
    )
    def test_a_key_is_used_for_what_it_is_made_for(self, entry: dict[str, Any], algorithms: set[str]) -> None:
        (read,) = read_key_set(orjson.dumps({"keys": [entry]}), ALL)
        assert (read.kid, read.algorithms) == ("first", algorithms)

    @pytest.mark.parametrize(
        "entry",
        [
            {"kty": "oct", "k": "c2VzYW1lc2VzYW1lc2VzYW1lc2VzYW1lc2VzYW1lc2VzYW1l", "kid": "first", "alg": "HS256"},
            jwk(FIRST, alg="HS256"),
            jwk(FIRST, alg="none"),
            jwk(FIRST, alg=["RS256"]),
            jwk(FIRST, alg="ES256"),
            jwk(ec_key(), alg="ES384"),
            jwk(FIRST, use="enc"),
            jwk(FIRST, key_ops=["encrypt"]),
            jwk(FIRST, kid=1),
            jwk(FIRST, n="AQAB"),
            jwk(FIRST, n="!"),
            jwk(FIRST, n=1),
            jwk(FIRST, e=None),
            jwk(ec_key(), crv="P-999"),
            jwk(ec_key(), x="AAAA"),
            jwk(ed_key(), x="AAAA"),
            jwk(rsa_key(2, 1024)),
            jwk(FIRST, kty=None),
            jwk(FIRST, kty=["RSA"]),
            jwk(FIRST, d="AQAB"),
            {},
            [],
            None,
            "first",
        ],
        ids=lambda _: "key",
    )
    def test_any_other_key_is_passed_over_and_the_next_one_read(self, entry: Any) -> None:
        """B17: no shared secret, none for another purpose, none that is weak or broken."""
        document = orjson.dumps({"keys": [entry, jwk(ec_key(), kid="good")]})
        assert [key.kid for key in read_key_set(document, ALL | {"HS256"})] == ["good"]

    @pytest.mark.parametrize(
        ("document", "why"),
        [
            (b"", "no_json"),
            (b"<html>", "no_json"),
            (b"[" * 100_000, "no_json"),
            (b"[]", "no_key_set"),
            (b"{}", "no_key_set"),
            (b'{"keys":{}}', "no_key_set"),
            (orjson.dumps({"keys": [{}] * 101}), "too_many_keys"),
        ],
        ids=["empty", "html", "deep", "list", "none", "object", "many"],
    )
    def test_what_is_no_key_set(self, document: bytes, why: str) -> None:
        with pytest.raises(BadKeySet, match=f"^{why}$"):
            read_key_set(document, ALL)

    @given(st.sampled_from([jwk(FIRST), jwk(ec_key()), jwk(ed_key())]), st.dictionaries(MEMBERS, VALUES, max_size=4))
    def test_no_entry_is_more_than_passed_over(self, entry: dict[str, Any], changes: dict[str, Any]) -> None:
        """An error here would end the task that fetches, and with it the worker."""
        read_key_set(orjson.dumps({"keys": [{**entry, **changes}]}), ALL)

    def test_a_private_key_is_not_even_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its factors may have to be found first, which would hold up the loop."""
        monkeypatch.setattr(jwks, "READERS", {"RSA": Unreadable})
        assert read_key_set(orjson.dumps({"keys": [jwk(FIRST, d="AQAB")]}), ALL) == []
        with pytest.raises(AssertionError):
            read_key_set(orjson.dumps({"keys": [jwk(FIRST)]}), ALL)

    def test_an_algorithm_that_is_not_allowed_leaves_a_key_unused(self) -> None:
        assert read_key_set(orjson.dumps({"keys": [jwk(FIRST)]}), frozenset({"ES256"})) == []


class TestFetching:
    async def test_a_published_key_verifies_what_it_has_signed(self) -> None:
        async with issuer(jwk(FIRST), jwk(SECOND, "second")) as published, identity(published.url) as who:
            assert await status(who, by(FIRST)) == 200
            assert await status(who, by(SECOND, "second")) == 200
            assert await status(who, by(SECOND, "first")) == 401
            assert await status(who, by(FIRST, exp=1)) == 401
            assert published.asked == 1

    async def test_a_token_that_names_no_key_needs_one_that_is_alone(self) -> None:
        async with issuer(jwk(FIRST), jwk(ec_key(), "other kind")) as published, identity(published.url) as who:
            assert await status(who, by(FIRST, None)) == 200
        async with issuer(jwk(FIRST), jwk(SECOND, "second")) as published, identity(published.url) as who:
            assert await status(who, by(FIRST, None)) == 401

    async def test_a_new_key_is_fetched_when_a_token_names_it(self) -> None:
        """B18: the issuer rotates its keys, and nobody is turned away."""
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            before = await caller(who, by(FIRST))
            await eventually(lambda: not keys_of(who)._cooling)
            published.keys.append(jwk(SECOND, "second"))
            assert await caller(who, by(SECOND, "second")) == before
            assert published.asked == 2

    async def test_made_up_keys_make_one_fetch_in_a_while(self) -> None:
        """B44"""
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            await caller(who, by(FIRST))
            begun = time.monotonic()
            for wave in range(5):
                made_up = [by(SECOND, f"made up {wave}.{number}") for number in range(20)]
                assert set(await asyncio.gather(*(status(who, each) for each in made_up))) == {401}
                await asyncio.sleep(COOLDOWN_S / 2)
            assert published.asked <= 2 + (time.monotonic() - begun) / COOLDOWN_S

    async def test_a_made_up_key_is_not_waited_for_right_after_a_fetch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No request waits for what is known."""
        monkeypatch.setattr(jwks, "COOLDOWN_S", 60)
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            await caller(who, by(FIRST))
            assert await status(who, by(SECOND, "made up")) == 401
            assert published.asked == 1

    async def test_a_key_that_was_asked_for_once_is_not_asked_for_ever_after(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """B44"""
        monkeypatch.setattr(jwks, "COOLDOWN_S", 0.02)
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            await caller(who, by(FIRST))
            await eventually(lambda: not keys_of(who)._cooling)
            assert await status(who, by(SECOND, "made up")) == 401
            await asyncio.sleep(0.5)  # in which 25 more would be made
            assert published.asked == 2

    async def test_one_fetch_serves_all_that_wait_for_it_and_holds_up_nobody_else(self) -> None:
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            await caller(who, by(FIRST))
            await eventually(lambda: not keys_of(who)._cooling)
            published.keys.append(jwk(SECOND, "second"))
            published.speaks.clear()
            waiting = [asyncio.create_task(status(who, by(SECOND, "second", jti=str(n)))) for n in range(30)]
            await eventually(lambda: published.asked == 2)
            assert await status(who, by(FIRST, jti="while the issuer is silent")) == 200
            assert not any(task.done() for task in waiting)
            published.speaks.set()
            assert set(await asyncio.gather(*waiting)) == {200}
            assert published.asked == 2

    async def test_so_many_may_wait_for_a_fetch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """B44: made-up tokens do not fill the worker while the issuer is slow."""
        monkeypatch.setattr(jwks, "MAX_WAITING", 3)
        async with issuer(jwk(FIRST)) as published:
            published.speaks.clear()
            async with identity(published.url) as who:
                waiting = [asyncio.create_task(status(who, by(FIRST, jti=str(number)))) for number in range(5)]
                await eventually(lambda: sum(task.done() for task in waiting) == 2)
                published.speaks.set()
                assert sorted(await asyncio.gather(*waiting)) == [200, 200, 200, 503, 503]

    async def test_one_that_leaves_while_it_waits_is_not_counted_any_more(self) -> None:
        """B3"""
        async with issuer(jwk(FIRST)) as published:
            published.speaks.clear()
            async with identity(published.url) as who:
                waiting = asyncio.create_task(status(who, by(FIRST)))
                await eventually(lambda: keys_of(who)._waiting == 1)
                waiting.cancel()
                await asyncio.wait({waiting})
                assert keys_of(who)._waiting == 0
                published.speaks.set()
                assert await status(who, by(FIRST)) == 200

    async def test_nobody_waits_for_ever_when_nobody_fetches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", -0.9)
        with pytest.raises(Refused) as caught:
            await Jwks("http://127.0.0.1:1/keys", {"RS256"}).find("first", "RS256")
        assert caught.value.status == 503

    async def test_a_key_that_was_withdrawn_verifies_nothing_any_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not even a token that it has verified before, for longer than it takes to fetch the keys again."""
        monkeypatch.setattr(jwks, "REFRESH_S", 0.1)
        async with issuer(jwk(FIRST), jwk(SECOND, "second")) as published, identity(published.url) as who:
            made = by(FIRST)
            assert await status(who, made) == 200
            published.keys.pop(0)
            await becomes(who, made, 401)
            assert await status(who, by(SECOND, "second")) == 200

    async def test_an_empty_key_set_is_an_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jwks, "REFRESH_S", 0.1)
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            assert await status(who, by(FIRST)) == 200
            published.keys.clear()
            await becomes(who, by(FIRST), 401)


class TestFaults:
    async def test_an_issuer_that_is_down_at_the_start_is_waited_for(self, caplog: pytest.LogCaptureFixture) -> None:
        async with issuer(jwk(FIRST)) as published:
            published.status = 500
            async with identity(published.url) as who:
                with pytest.raises(Refused) as caught:
                    await caller(who, by(FIRST))
                assert caught.value.status == 503
                assert dict(caught.value.headers) == {b"retry-after": b"1"}
                assert "jwks_not_fetched failures=1 keys=0 error=status_500" in caplog.text
                published.status = 200
                await becomes(who, by(FIRST), 200)

    async def test_nobody_there_is_no_more_than_a_fault(self, caplog: pytest.LogCaptureFixture) -> None:
        """B19: the URL, which may hold a password, is not logged."""
        async with issuer() as published:
            gone = published.url.replace("//", "//user:sesame@")
        async with identity(gone) as who:
            assert await status(who, by(FIRST)) == 503
            assert await status(who, by(FIRST)) == 503
        assert "jwks_not_fetched failures=1 keys=0 error=ClientConnectorError" in caplog.text
        assert "sesame" not in caplog.text

    async def test_an_issuer_that_goes_down_takes_no_known_key_along(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            assert await status(who, by(FIRST)) == 200
            published.status = 503
            await becomes(who, by(SECOND, "second"), 503)
            assert await status(who, by(FIRST, jti="never seen before")) == 200
            assert "jwks_not_fetched failures=1 keys=1 error=status_503" in caplog.text
            published.keys.append(jwk(SECOND, "second"))
            published.status = 200
            await becomes(who, by(SECOND, "second"), 200)
            assert "jwks_fetched keys=2 algorithms=RS256" in caplog.text

    async def test_its_keys_do_not_go_on_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jwks, "REFRESH_S", 0.1)
        monkeypatch.setattr(jwks, "MAX_STALE_S", 0.5)
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            made = by(FIRST)
            assert await status(who, made) == 200
            published.status = 503
            await becomes(who, made, 503)

    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            ({"status": 302, "headers": {"location": "/keys"}}, "status_302"),
            ({"status": 404}, "status_404"),
            ({"answer": b"<html>"}, "no_json"),
            ({"answer": b" " * (jwks.MAX_BYTES + 1)}, "too_large"),
            ({"headers": {"content-encoding": "deflate"}}, "ClientPayloadError"),
        ],
        ids=["redirect", "missing", "html", "large", "encoding"],
    )
    async def test_what_is_no_answer_leaves_the_keys_as_they_were(
        self, fault: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """B44"""
        async with issuer(jwk(FIRST)) as published, identity(published.url) as who:
            assert await status(who, by(FIRST)) == 200
            for name, value in fault.items():
                setattr(published, name, value)
            await becomes(who, by(SECOND, "second"), 503)
            assert f"keys=1 error={why}" in caplog.text
            assert await status(who, by(FIRST, jti="new")) == 200

    async def test_a_silent_issuer_is_waited_for_so_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """B14"""
        monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.3)
        async with issuer(jwk(FIRST)) as published:
            published.speaks.clear()
            async with identity(published.url) as who:
                assert await status(who, by(FIRST)) == 503
                published.speaks.set()
                await becomes(who, by(FIRST), 200)

    @pytest.mark.parametrize(
        ("url", "warned"),
        [("http://issuer.invalid/keys", True), ("https://issuer.invalid/keys", False), ("http://127.0.0.1:1/k", False)],
    )
    async def test_keys_that_come_in_clear_are_warned_of(
        self, url: str, warned: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with identity(url) as who:
            assert await status(who, by(FIRST)) == 503
        assert ("jwks_in_clear" in caplog.text) is warned


async def test_a_key_is_found_by_name_and_algorithm() -> None:
    async with issuer(jwk(FIRST), jwk(ec_key())) as published:
        keys = Jwks(published.url, {"RS256", "ES256"})
        running = asyncio.create_task(keys.run())
        try:
            assert (await keys.find("first", "RS256")).public_numbers() == FIRST.public_key().public_numbers()  # type: ignore[union-attr]
            assert (await keys.find("first", "ES256")).curve.name == "secp256r1"  # type: ignore[union-attr]
            with pytest.raises(UnknownKey):
                await keys.find("first", "RS512")
        finally:
            running.cancel()
            await asyncio.wait({running})


class Unreadable:
    """In the place of what reads keys."""

    @staticmethod
    def from_jwk(entry: dict[str, Any]) -> Any:
        raise AssertionError(f"{entry['kid']} was read")


def keys_of(who: Identity) -> Any:
    """Its key set, to see when the time has come for another fetch."""
    return who._source._keys  # type: ignore[attr-defined]
