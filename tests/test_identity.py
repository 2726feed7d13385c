"""Session ids: whose they are, and that every other one is refused in the same way."""

from __future__ import annotations

import string
from base64 import urlsafe_b64decode, urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.coordinator import Keyring
from leasehold.workers.identity import ID_CHARACTERS, Identity

OLD, NEW = b"the old secret of the fleet", b"the new secret of the fleet"
ALICE, BOB = b"Bearer alice", b"Bearer bob"
IDENTITY = Identity(Keyring([NEW]))
ID = IDENTITY.mint("files", ALICE).encode()
ALPHABET = (string.ascii_letters + string.digits + "-_").encode()


def issued(session_id: bytes, server: str = "files", credential: bytes = ALICE) -> bool:
    return IDENTITY.issued(session_id, server, credential)


def test_an_id_is_visible_ascii_and_accepted_from_its_holder_only() -> None:
    """B31"""
    assert len(ID) == ID_CHARACTERS
    assert all(byte in ALPHABET for byte in ID)
    assert issued(ID)
    assert not issued(ID, credential=BOB)
    assert not issued(ID, credential=b"")
    assert not issued(ID, credential=ALICE + b" ")
    assert not issued(ID, server="mail")
    assert not issued(ID, server="")


def test_ids_are_never_the_same() -> None:
    assert len({IDENTITY.mint("files", ALICE) for _ in range(1000)}) == 1000


def test_server_and_credential_cannot_be_shifted_into_each_other() -> None:
    """B17"""
    session_id = IDENTITY.mint("ab", b"c").encode()
    assert not issued(session_id, "a", b"bc")
    assert not issued(session_id, "abc", b"")


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"x",
        ID[:-1],
        ID[:-4],
        ID + b"A",
        ID + b"AAAA",
        b" " + ID,
        ID + b" ",
        ID + b"\n",
        b"\n" + ID[1:],
        ID[:-1] + b"\n",
        ID[:-1] + b"=",
        ID[:-4] + b"====",
        ID[:20] + b"\0" + ID[21:],
        ID[:20] + b"*" + ID[21:],
        ID[:20] + b"}" + ID[21:],
        ID[:20] + b"\xff" + ID[21:],
        ID.lower(),
        ID * 1000,
        b"*" * ID_CHARACTERS,
        b"{" * ID_CHARACTERS,
        b"\0" * ID_CHARACTERS,
        "ü".encode() * (ID_CHARACTERS // 2),
        "\N{FULLWIDTH LATIN CAPITAL LETTER A}".encode() * (ID_CHARACTERS // 3),
        b"A" * ID_CHARACTERS,
    ],
    ids=lambda _: "id",  # test processes must agree on names, and ids are random
)
def test_garbage_is_refused(hostile: bytes) -> None:
    """B30"""
    assert not issued(hostile)


def test_another_spelling_of_the_same_bytes_is_refused() -> None:
    """B30: decoders skip what they do not know, and take the other alphabet."""
    session_id = next(
        candidate for candidate in iter(lambda: IDENTITY.mint("files", ALICE).encode(), None) if b"-" in candidate
    )
    assert not issued(session_id.replace(b"-", b"+"))
    for at in range(0, ID_CHARACTERS, 5):
        assert not issued(ID[:at] + b"!" + ID[at:-1])


@given(st.integers(0, ID_CHARACTERS - 1), st.sampled_from(ALPHABET))
def test_no_character_can_be_changed(at: int, character: int) -> None:
    """B39"""
    changed = ID[:at] + bytes([character]) + ID[at + 1 :]
    assert issued(changed) is (changed == ID)


def test_a_tag_cannot_be_shortened_by_padding() -> None:
    """B39: the last character of some ids can be replaced by padding without another change."""
    for _ in range(64):
        session_id = IDENTITY.mint("files", ALICE).encode()
        assert not issued(session_id[:-1] + b"=")
        assert not issued(session_id[:-2] + b"==")
        assert not issued(urlsafe_b64encode(urlsafe_b64decode(session_id)[:-1]))


@given(st.binary(min_size=36, max_size=36))
def test_no_id_can_be_made_up(raw: bytes) -> None:
    assert not issued(urlsafe_b64encode(raw))


@given(st.binary(max_size=80))
def test_any_header_value_is_refused_without_an_error(value: bytes) -> None:
    """B30"""
    assert not issued(value)


def test_a_tag_cannot_be_moved_to_another_nonce() -> None:
    other = urlsafe_b64decode(IDENTITY.mint("files", ALICE))
    assert not issued(urlsafe_b64encode(urlsafe_b64decode(ID)[:18] + other[18:]))


def test_a_new_secret_accepts_ids_of_the_old_one_until_that_is_dropped() -> None:
    """Rotation: the new secret second everywhere, then first, then alone."""
    before, second = Identity(Keyring([OLD])), Identity(Keyring([OLD, NEW]))
    first, after = Identity(Keyring([NEW, OLD])), Identity(Keyring([NEW]))
    from_before = before.mint("files", ALICE).encode()
    from_first = first.mint("files", ALICE).encode()
    assert second.issued(from_before, "files", ALICE)
    assert first.issued(from_before, "files", ALICE)
    assert second.issued(from_first, "files", ALICE)
    assert after.issued(from_first, "files", ALICE)
    assert not after.issued(from_before, "files", ALICE)
    assert not before.issued(from_first, "files", ALICE)


def test_a_principal_names_a_credential_without_telling_it() -> None:
    """B17, B19"""
    alice = IDENTITY.principal(ALICE)
    assert alice == IDENTITY.principal(ALICE) != IDENTITY.principal(BOB)
    assert alice != Identity(Keyring([OLD])).principal(ALICE), "nobody without the secret can look for it"
    assert len(alice) == 16
    assert "alice" not in alice
    assert IDENTITY.principal(b"") == "anonymous"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "bound"),
    [
        ([(b"authorization", ALICE)], ALICE),
        ([(b"x-forwarded-user", b"alice"), (b"authorization", BOB)], BOB),
        ([(b"x-forwarded-user", b"alice")], b""),
        ([(b"authorization", b"")], b""),
        ([], b""),
    ],
    ids=["credential", "both", "another header", "empty", "nothing"],
)
async def test_by_default_callers_are_known_by_their_credential_alone(
    headers: list[tuple[bytes, bytes]], bound: bytes
) -> None:
    """B17"""
    caller = await IDENTITY.caller({"headers": headers, "client": None})
    assert (caller.bound, caller.principal) == (bound, IDENTITY.principal(bound))


@pytest.mark.anyio
async def test_a_caller_does_not_show_what_he_is_known_by() -> None:
    """B19"""
    assert "alice" not in repr(await IDENTITY.caller({"headers": [(b"authorization", ALICE)]}))
