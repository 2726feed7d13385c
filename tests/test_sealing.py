"""The fleet secret: what it seals opens here and nowhere else, and it is never printed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.coordinator import Keyring, SealError
from leasehold.coordinator.sealing import Secret

OLD, NEW = b"old" * 11, b"new" * 11


@given(st.binary(), st.binary())
def test_a_record_opens_in_its_context(plain: bytes, context: bytes) -> None:
    ring = Keyring([OLD])
    assert ring.open_record(ring.seal_record(plain, context), context) == plain


@given(st.binary(min_size=1, max_size=50), st.data())
def test_b39_a_record_that_was_changed_in_any_bit_does_not_open(plain: bytes, data: st.DataObject) -> None:
    ring = Keyring([OLD])
    sealed = bytearray(ring.seal_record(plain, b"session"))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        ring.open_record(bytes(sealed), b"session")


@given(st.binary(max_size=60))
def test_b39_other_bytes_are_no_record(garbage: bytes) -> None:
    ring = Keyring([OLD])
    for sealed in (garbage, ring.primary.key_id + garbage):
        with pytest.raises(SealError):
            ring.open_record(sealed, b"session")


def test_b39_a_record_moved_to_another_session_does_not_open() -> None:
    ring = Keyring([OLD])
    with pytest.raises(SealError):
        ring.open_record(ring.seal_record(b"resume", b"mine"), b"yours")


def test_b39_another_fleet_opens_no_record() -> None:
    with pytest.raises(SealError):
        Keyring([NEW]).open_record(Keyring([OLD]).seal_record(b"resume", b"session"), b"session")


def test_b19_a_sealed_record_shows_nothing_of_what_it_holds() -> None:
    sealed = Keyring([OLD]).seal_record(b"Bearer token-of-somebody", b"session")
    assert b"token" not in sealed
    assert sealed != Keyring([OLD]).seal_record(b"Bearer token-of-somebody", b"session")


def test_secrets_rotate_in_three_steps_and_each_step_opens_what_the_one_before_sealed() -> None:
    steps = [Keyring([OLD]), Keyring([OLD, NEW]), Keyring([NEW, OLD]), Keyring([NEW])]
    for before, after in pairwise(steps):
        for sealing, opening in ((before, after), (after, before)):
            assert opening.open_record(sealing.seal_record(b"resume", b"s"), b"s") == b"resume"
            assert opening.mac_matches(b"id", b"session", sealing.mac(b"id", b"session"))


def test_a_mac_matches_its_message_label_and_fleet_only() -> None:
    ring = Keyring([OLD])
    tag = ring.mac(b"id", b"session")
    assert ring.mac_matches(b"id", b"session", tag[:16])
    assert not ring.mac_matches(b"id", b"session", tag[:15])
    assert not ring.mac_matches(b"id", b"session", b"")
    assert not ring.mac_matches(b"id", b"session", tag + b"x")
    assert not ring.mac_matches(b"id", b"other", tag)
    assert not ring.mac_matches(b"principal", b"session", tag)
    assert not Keyring([NEW]).mac_matches(b"id", b"session", tag)


def test_b19_a_secret_is_not_printed() -> None:
    secret = Secret(OLD)
    assert "old" not in repr(secret) + str(secret)
    assert OLD not in secret.key_id + secret.derive(b"x")


def test_each_purpose_has_a_key_of_its_own() -> None:
    secret = Secret(OLD)
    assert len({secret.derive(label) for label in (b"record", b"mac id", b"channel ", b"key id")}) == 4


def test_a_fleet_without_a_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="secret"):
        Keyring([])


def test_a_random_fleet_is_a_stranger_to_every_other() -> None:
    with pytest.raises(SealError):
        Keyring.random().open_record(Keyring.random().seal_record(b"x", b""), b"")
