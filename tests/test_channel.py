"""Channels: whatever Redis does to a mailbox, nothing is delivered twice or out of order, or called lost and run."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.coordinator import Keyring, SealError, channel
from leasehold.coordinator.channel import Receipt, ReceiveChannel, ReplayWindow, SendChannel, read_envelope_head
from leasehold.coordinator.errors import FrameError
from leasehold.coordinator.frames import ENVELOPE_HEAD, Frame, FrameType, encode
from leasehold.coordinator.inbox import Inbox

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))
RING = Keyring([b"fleet" * 7])
SENT = 12
ARRIVALS = st.lists(st.integers(1, SENT), max_size=3 * SENT)
"""Counters in the order they arrive: any of them late, twice, or never, as after a failover to a lagging replica."""


def sealed(count: int) -> list[bytes]:
    sender = SendChannel(RING, A, B)
    return [sender.seal(b"%d" % n)[1] for n in range(1, count + 1)]


ENVELOPES = sealed(SENT + 1)


@given(ARRIVALS, st.integers(0, SENT), st.sampled_from([1, 2, 256]))
def test_b33_no_history_of_a_mailbox_delivers_twice_or_lies_in_its_receipt(
    arrivals: list[int], asked: int, max_gaps: int
) -> None:
    receiver = ReceiveChannel(RING.primary, A, B)
    delivered: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "MAX_GAPS", max_gaps)
        for counter in arrivals:
            opened = receiver.open(ENVELOPES[counter - 1], counter)
            if opened is not None:
                assert opened == b"%d" % counter
                delivered.append(counter)
        # The question comes under a counter of its own.
        assert receiver.open(ENVELOPES[SENT], SENT + 1) is not None
        receipt = Receipt.unpack(receiver.window.receipt(asked).pack())
    assert delivered == sorted(set(delivered)), "order kept, nothing twice"
    for counter in range(1, SENT + 1):
        lost = receipt.lost(counter)
        if counter > asked:
            assert lost is False, "not asked about"
        elif counter in delivered:
            assert lost is not True, "what was delivered is never called lost"
        else:
            assert lost is not False, "what was not delivered is never called delivered"
            assert receiver.open(ENVELOPES[counter - 1], counter) is None, "what is lost stays lost"
    if max_gaps == 256:
        assert all(receipt.lost(counter) is not None for counter in range(1, SENT + 1)), "all is known"


@given(ARRIVALS, st.integers(0, SENT), st.integers(1, SENT), st.integers(1, SENT), st.sampled_from([1, 256]))
def test_an_exchange_misses_a_frame_if_any_of_its_envelopes_is_or_may_be_lost(
    arrivals: list[int], asked: int, first: int, last: int, max_gaps: int
) -> None:
    window = ReplayWindow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "MAX_GAPS", max_gaps)
        for counter in [*arrivals, SENT + 1]:
            if not window.seen(counter):
                window.accept(counter)
    receipt = window.receipt(asked)
    expected = any(receipt.lost(counter) is not False for counter in range(first, last + 1))
    assert receipt.lost_any(first, last) is expected


@given(st.data())
def test_b39_an_envelope_changed_in_any_bit_delivers_nothing_and_moves_no_window(data: st.DataObject) -> None:
    receiver = ReceiveChannel(RING.primary, A, B)
    receiver.open(ENVELOPES[0], 1)
    changed = bytearray(ENVELOPES[2])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        _, _, counter = read_envelope_head(bytes(changed))
        assert receiver.open(bytes(changed), counter) is None
    except SealError:
        pass
    assert receiver.window == ReplayWindow(highest=1)
    assert receiver.open(ENVELOPES[2], 3) == b"3"


@pytest.mark.parametrize(
    ("secret", "sender", "receiver"),
    [
        (RING.primary, A, C),  # redirected to another worker
        (RING.primary, C, B),  # under another worker's name
        (RING.primary, B, A),  # sent back to where it came from
        (Keyring([b"other" * 7]).primary, A, B),  # of another fleet
    ],
)
def test_b39_an_envelope_opens_in_its_own_channel_only(secret: channel.Secret, sender: bytes, receiver: bytes) -> None:
    end = ReceiveChannel(secret, sender, receiver)
    with pytest.raises(SealError):
        end.open(ENVELOPES[0], 1)
    assert end.window == ReplayWindow()


@given(st.binary(max_size=200))
def test_b39_other_bytes_are_no_receipt(garbage: bytes) -> None:
    try:
        Receipt.unpack(garbage)
    except FrameError:
        assert len(garbage) % 8 or len(garbage) < 24


class TestInbox:
    """The same, for all senders of one receiver at once."""

    def make(self, ring: Keyring = RING, incarnation: bytes = B) -> tuple[Inbox, list[tuple[str, Frame]]]:
        got: list[tuple[str, Frame]] = []
        return Inbox(ring, incarnation.hex(), lambda sender, frame: got.append((sender, frame))), got

    def envelope(self, ring: Keyring = RING, sender: bytes = A, receiver: bytes = B) -> bytes:
        return SendChannel(ring, sender, receiver).seal(encode(FrameType.CANCEL, 7))[1]

    def test_b39_a_repetition_is_dropped_silently_and_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        inbox, got = self.make()
        for _ in range(3):
            inbox.receive(self.envelope())
        assert [(sender, frame.exchange) for sender, frame in got] == [(A.hex(), 7)]
        assert (inbox.statistics.envelopes, inbox.statistics.repeated, inbox.statistics.refused) == (1, 2, 0)
        assert not caplog.records

    def test_b39_what_was_not_sealed_for_us_is_refused_counted_and_remembered_by_nobody(self) -> None:
        inbox, got = self.make()
        forged = [
            b"",
            b"\0" * 100,
            self.envelope(receiver=C),
            self.envelope(Keyring.random()),
            *(ENVELOPE_HEAD.pack(1, RING.primary.key_id, os.urandom(16), 2**64 - 1) + b"x" * 20 for _ in range(100)),
            ENVELOPE_HEAD.pack(1, RING.primary.key_id, A, 2**64 - 1) + b"x" * 20,
            b"\x02" + self.envelope()[1:],
        ]
        for envelope in forged:
            inbox.receive(envelope)
        assert not got
        assert inbox.statistics.refused == len(forged)
        assert inbox.window(A.hex()) == ReplayWindow()
        inbox.receive(self.envelope())
        assert len(got) == 1

    def test_workers_of_neighbouring_rotation_steps_understand_each_other(self) -> None:
        old, new = b"old" * 11, b"new" * 11
        steps = [Keyring([old]), Keyring([old, new]), Keyring([new, old]), Keyring([new])]
        for before, after in pairwise(steps):
            for ours, theirs in ((before, after), (after, before)):
                inbox, got = self.make(ours)
                inbox.receive(self.envelope(theirs))
                assert len(got) == 1

    @pytest.mark.parametrize("error", [FrameError("no request"), RuntimeError("a bug")])
    def test_b45_a_frame_that_cannot_be_handled_takes_no_other_along(self, error: Exception) -> None:
        got: list[int] = []

        def deliver(_: str, frame: Frame) -> None:
            if frame.exchange == 2:
                raise error
            got.append(frame.exchange)

        inbox = Inbox(RING, B.hex(), deliver)
        frames = b"".join(encode(FrameType.CANCEL, exchange) for exchange in (1, 2, 3))
        inbox.receive(SendChannel(RING, A, B).seal(frames)[1])
        assert got == [1, 3]
