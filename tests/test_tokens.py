"""Principals out of tokens: which token says who calls, and that every other one is refused without a word of it."""

from __future__ import annotations

import logging
import time
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from faults import eventually
from hypothesis import given
from hypothesis import strategies as st
from issuer import (
    AUDIENCE,
    DAY_S,
    ISSUER,
    SECRET,
    claims,
    ec_key,
    ed_key,
    forged,
    pem,
    private_pem,
    rsa_key,
    signed,
    token,
)
from leasehold.coordinator import Keyring
from leasehold.workers import tokens
from leasehold.workers.answers import Refused
from leasehold.workers.identity import Caller, Identity
from leasehold.workers.principals import make_identity
from leasehold.workers.settings import load_settings

pytestmark = pytest.mark.anyio

NOW = int(time.time())
KEYRING = Keyring([b"a secret of the fleet"])
RULES = {"AUDIENCE": AUDIENCE, "ISSUER": ISSUER}


def identity(key: str | None = None, algorithms: str = "RS256", **rules: str) -> Identity:
    """By default as for most issuers: an RSA key, an audience and an issuer."""
    rules = {"KEY": key or pem(rsa_key()), "ALGORITHMS": algorithms, **(rules or RULES)}
    settings = load_settings({f"LEASEHOLD_JWT_{name}": value for name, value in rules.items()})
    return make_identity(settings, KEYRING)


def scope(*authorization: str | bytes) -> dict[str, Any]:
    encoded = [value if isinstance(value, bytes) else value.encode() for value in authorization]
    return {"headers": [(b"host", b"localhost"), *((b"authorization", value) for value in encoded)]}


async def caller(who: Identity, made: str | bytes) -> Caller:
    return await who.caller(scope(b"Bearer " + (made if isinstance(made, bytes) else made.encode())))


async def refusal(who: Identity, *authorization: str | bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        await who.caller(scope(*authorization))
    return caught.value


class TestWhoCalls:
    async def test_b18_a_rotated_token_is_the_same_principal(self) -> None:
        """B18"""
        first, second = token(jti="1"), token(jti="2", exp=NOW + DAY_S)
        assert first != second
        assert await caller(identity(), first) == await caller(identity(), second)

    async def test_b17_another_claim_is_another_principal(self) -> None:
        """B17"""
        who = identity(ISSUER=f"{ISSUER},https://other.example", AUDIENCE=AUDIENCE)
        alice = await caller(who, token())
        for changes in ({"sub": "bob"}, {"sub": "Alice"}, {"sub": "alice "}, {"iss": "https://other.example"}):
            other = await caller(who, token(**changes))
            assert (other.principal != alice.principal, other.bound != alice.bound) == (True, True), changes

    async def test_b17_claims_cannot_be_shifted_into_each_other(self) -> None:
        """B17: of one another, of their kinds, of other settings, and of a credential."""
        rules = {"AUDIENCE": AUDIENCE, "CLAIMS": "sub,org"}
        said = [{"sub": "ab", "org": "c"}, {"sub": "a", "org": "bc"}, {"sub": "a", "org": "1"}, {"sub": "a", "org": 1}]
        callers = [await caller(identity(**rules), token(**each)) for each in said]
        callers.append(await caller(identity(**(rules | {"CLAIMS": "org,sub"})), token(sub="c", org="ab")))
        callers.append(await Identity(KEYRING).caller(scope(callers[0].bound[len(tokens.MARK) :])))
        assert len({each.bound for each in callers}) == len({each.principal for each in callers}) == len(callers)
        assert callers[0].bound.startswith(b"\0"), "no header can begin like this"

    async def test_a_principal_may_be_a_number_but_nothing_that_can_be_written_in_two_ways(self) -> None:
        who = identity(AUDIENCE=AUDIENCE, CLAIMS="org")
        assert (await caller(who, token(org=17))).bound
        for value in (True, 1.5, [], ["a"], {}, {"a": 1}, "", 1 << 70, "\ud800"):
            assert (await refusal(who, "Bearer " + token(org=value))).status == 401, value

    async def test_b19_a_principal_does_not_tell_its_claims(self) -> None:
        """B19"""
        made = await caller(identity(), token(sub="alice"))
        assert "alice" not in repr(made) + made.principal
        assert len(made.principal) == 16

    @pytest.mark.parametrize(
        ("algorithm", "key", "public"),
        [
            ("RS512", rsa_key(), pem(rsa_key())),
            ("PS256", rsa_key(), pem(rsa_key()).replace("\n", "\\n")),
            ("ES256", ec_key(), pem(ec_key())),
            ("ES384", ec_key(ec.SECP384R1), pem(ec_key(ec.SECP384R1))),
            ("EdDSA", ed_key(), pem(ed_key())),
            ("HS256", SECRET, SECRET),
        ],
        ids=["RS512", "PS256", "ES256", "ES384", "EdDSA", "HS256"],
    )
    async def test_each_kind_of_key_verifies_what_it_is_made_for(self, algorithm: str, key: Any, public: str) -> None:
        who = identity(public, algorithm)
        assert (await caller(who, token(key, algorithm))).bound.startswith(tokens.MARK)
        other = (token(key, algorithm).encode()[:-8] + b"AAAAAAAA").decode()
        assert (await refusal(who, "Bearer " + other)).status == 401

    async def test_a_header_without_extensions_is_what_makes_the_refused_ones_wrong(self) -> None:
        assert (await caller(identity(), signed(GOOD))).bound

    async def test_the_scheme_is_read_as_at_the_door(self) -> None:
        who, made = identity(), token()
        assert await who.caller(scope(f"bearer  {made} ")) == await caller(who, made)


GOOD = {"alg": "RS256", "typ": "JWT"}
REFUSED: dict[str, str | bytes] = {
    "signed with the public key as shared secret": forged({"alg": "HS256"}, pem(rsa_key()).encode()),
    "the same without its last line end": forged({"alg": "HS256"}, pem(rsa_key()).strip().encode()),
    "not signed": forged({"alg": "none"}),
    "not signed, in other letters": forged({"alg": "NoNe"}),
    "not signed, under a good name": forged(GOOD),
    "no algorithm": forged({"typ": "JWT"}),
    "an empty algorithm": forged({"alg": ""}),
    "a list of algorithms": forged({"alg": ["RS256"]}),
    "an algorithm that is not allowed, rightly signed": token(algorithm="RS384"),
    "another key": token(rsa_key(1)),
    "another key, which it brings along": token(
        rsa_key(1), head={"jwk": jwt.algorithms.RSAAlgorithm.to_jwk(rsa_key(1).public_key(), as_dict=True)}
    ),
    "another key's place": token(rsa_key(1), head={"jku": "http://127.0.0.1:1/", "x5u": "http://127.0.0.1:1/"}),
    "a name of a key that is no name": forged({**GOOD, "kid": 1}),
    "a critical extension": token(head={"crit": ["exp"], "exp": 1}),
    "a critical extension that PyJWT knows": signed({**GOOD, "crit": ["b64"], "b64": True}),
    "expired": token(exp=NOW - 60),
    "not valid yet": token(nbf=NOW + DAY_S),
    "issued in future": token(iat=NOW + DAY_S),
    "without an end": token(exp=None),
    "with an end that is no time": token(exp="never"),
    "for another audience": token(aud="another"),
    "for several other audiences": token(aud=["another", "third"]),
    "for no audience": token(aud=None),
    "of another issuer": token(iss="https://issuer.example.evil.example"),
    "of an issuer among others": token(iss=[ISSUER]),
    "of no issuer": token(iss=None),
    "without the claim": token(sub=None),
    "with an empty claim": token(sub=""),
    "with a claim that is no text": token(sub=["alice"]),
    "huge": token(more="x" * tokens.MAX_TOKEN_BYTES),
    "deep": forged({**GOOD, "x": [[[[]]]]}, body=b"[" * 9000),
    "a body that is a list": jwt.PyJWS().encode(b"[1]", rsa_key(), "RS256"),
    "a body that is not text": jwt.PyJWS().encode(b"\xff", rsa_key(), "RS256"),
    "an endless end": jwt.PyJWS().encode(
        orjson.dumps(claims()).replace(f'"exp":{claims()["exp"]}'.encode(), b'"exp":1e999'), rsa_key(), "RS256"
    ),
    "detached": jwt.PyJWS().encode(orjson.dumps(claims()), rsa_key(), "RS256", is_payload_detached=True),
    "encrypted": ".".join(["e30"] * 5),
    "two parts": "e30.e30",
    "no parts": "sesame",
    "dots": "..",
    "not ASCII": b"\xff\xfe.\xff.\xff",
}


class TestRefused:
    @pytest.mark.parametrize(
        "made", REFUSED.values(), ids=[f"{n}-{' '.join(k.split())}" for n, k in enumerate(REFUSED)]
    )
    async def test_any_other_token_is_refused_without_a_word_of_it(
        self, made: str | bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        """B17, B19"""
        caplog.set_level(logging.DEBUG, "leasehold")
        given = made if isinstance(made, bytes) else made.encode()
        refused = await refusal(identity(), b"Bearer " + given)
        assert refused.status == 401
        ((name, challenge),) = refused.headers
        assert name == b"www-authenticate"
        assert challenge.startswith(b'Bearer error="invalid_token"')
        said = f"{refused} {challenge!r} {refused.data} {refused.__cause__} {caplog.text}"
        assert refused.__suppress_context__
        for word in ("alice", "issuer.example", AUDIENCE + '"', "another,", "sesame", "kid", "RS384", "e30"):
            assert word not in said.replace('realm="leasehold"', "")
        for part in given.split(b"."):
            assert len(part) < 4 or part.decode("latin-1") not in said

    @pytest.mark.parametrize(
        ("made", "reason"),
        [
            (token(exp=NOW - 60), "the token has expired"),
            (token(nbf=NOW + DAY_S), "the token is not valid yet"),
            (token(aud="another"), "the token is for another audience"),
            (token(iss="another"), "the token is of another issuer"),
            (token(sub=None), "the token lacks a claim"),
            (token(rsa_key(1)), "the token is not valid"),
        ],
        ids=["expired", "early", "audience", "issuer", "claim", "signature"],
    )
    async def test_it_is_told_why(self, made: str, reason: str) -> None:
        refused = await refusal(identity(), "Bearer " + made)
        assert str(refused) == f"Unauthorized: {reason}"
        challenge = f'Bearer error="invalid_token", error_description="{reason}", realm="leasehold"'
        assert refused.headers == [(b"www-authenticate", challenge.encode())]

    @pytest.mark.parametrize("authorization", [[], [""], ["Bearer"], ["Bearer "], ["Basic YWxpY2U6c2VzYW1l"]], ids=str)
    async def test_no_token_is_asked_for_one(self, authorization: list[str]) -> None:
        """RFC 6750: who has said nothing has made no error."""
        refused = await refusal(identity(), *authorization)
        assert refused.status == 401
        assert refused.headers == [(b"www-authenticate", b'Bearer realm="leasehold"')]

    async def test_b17_two_credentials_are_refused_for_the_upstream_may_take_the_other(self) -> None:
        """B17"""
        good = f"Bearer {token()}"
        for pair in ((good, good), (good, "Bearer x"), ("Basic x", good), (good, "")):
            assert (await refusal(identity(), *pair)).status == 400

    async def test_without_an_audience_of_ours_a_token_for_somebody_is_refused(self) -> None:
        """RFC 7519, 4.1.3"""
        who = identity(CLAIMS="sub")
        assert (await refusal(who, "Bearer " + token())).status == 401
        assert (await caller(who, token(aud=None, iss=None))).bound

    async def test_one_of_several_audiences_and_issuers_is_enough(self) -> None:
        who = identity(AUDIENCE=f"a,{AUDIENCE}", ISSUER=f"b,{ISSUER}")
        assert await caller(who, token(aud=["x", "a"])) == await caller(who, token())

    async def test_a_shared_secret_verifies_no_public_key_algorithm_and_the_other_way_round(self) -> None:
        assert (await refusal(identity(SECRET, "HS256"), "Bearer " + token())).status == 401
        assert (await refusal(identity(), "Bearer " + token(SECRET, "HS256"))).status == 401

    @given(st.binary(max_size=200))
    async def test_any_bytes_are_refused_without_an_error(self, made: bytes) -> None:
        """B30"""
        assert (await refusal(identity(), b"Bearer x" + made)).status == 401

    @given(st.integers(0, 600), st.sampled_from(b"AZaz09-_.=+/ "))
    async def test_no_character_can_be_changed(self, at: int, character: int) -> None:
        """B39"""
        made = token().encode()
        at %= len(made)  # past its end, a space is none of the token's
        changed = made[:at] + bytes([character]) + made[at + 1 :]
        if changed != made:
            assert (await refusal(identity(), b"Bearer " + changed)).status == 401


class TestRemembered:
    """Tokens that were verified are not verified with each request."""

    @pytest.fixture
    def verified(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """One entry for each verification."""
        done: list[str] = []
        decode = jwt.decode

        def counting(made: Any, *arguments: Any, **options: Any) -> Any:
            done.append(made)
            return decode(made, *arguments, **options)

        monkeypatch.setattr(jwt, "decode", counting)
        return done

    async def test_a_token_is_verified_once(self, verified: list[str]) -> None:
        who, made = identity(), token()
        assert await caller(who, made) == await caller(who, made)
        assert len(verified) == 1

    async def test_an_invalid_one_is_not_remembered(self, verified: list[str]) -> None:
        who, made = identity(), token(exp=NOW - 60)
        for _ in range(2):
            await refusal(who, "Bearer " + made)
        assert len(verified) == 2
        assert await caller(who, token())

    async def test_it_counts_no_longer_than_it_is_valid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokens, "LEEWAY_S", 0)
        who, made = identity(), token(exp=int(time.time()) + 2)
        await caller(who, made)
        await eventually(lambda: time.time() > jwt.decode(made, options={"verify_signature": False})["exp"])
        assert str(await refusal(who, "Bearer " + made)) == "Unauthorized: the token has expired"

    async def test_so_many_are_remembered_those_used_last(
        self, verified: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """B44"""
        monkeypatch.setattr(tokens, "MAX_VERIFIED", 3)
        who = identity()
        made = [token(jti=str(number)) for number in range(5)]
        for each in made[:3]:
            await caller(who, each)
        await caller(who, made[0])
        for each in made[3:]:
            await caller(who, each)
        assert len(verified) == 5
        await caller(who, made[0])
        assert len(verified) == 5
        await caller(who, made[1])
        assert len(verified) == 6

    async def test_a_token_that_begins_like_a_good_one_is_another(self) -> None:
        who, made = identity(), token()
        await caller(who, made)
        assert (await refusal(who, f"Bearer {made}A")).status == 401
        assert (await refusal(who, f"Bearer {made[:-1]}")).status == 401


def test_private_keys_are_no_keys_to_verify_with() -> None:
    """A fleet that holds one could sign tokens itself."""
    with pytest.raises(Exception, match="LEASEHOLD_JWT_KEY: expected a PEM public key"):
        identity(private_pem(rsa_key()))
