"""Channels: what keeps the frames between two workers from being lost, repeated or forged without notice.

A channel is one ordered pair, sender incarnation -> receiver incarnation. Its key is derived from the fleet secret and
both incarnations; its 64-bit counter is AEAD nonce, order and replay window at once. Redis lists repeat elements (a
lagging replica is promoted) and lose them (the reader's connection dies in mid-pop), so:

* A counter at or below the highest one seen is a repetition: dropped before anything else, and counted. This also makes
  it safe to push the *same bytes* again when the answer to a push was lost.
* A counter that jumps leaves a gap, and the receiver remembers it. After the reader's connection broke, the receiver
  opens a new mailbox generation and drains the old one; a sender that notices the new generation asks (QUERY) and the
  receiver answers (RECEIPT) which envelopes did arrive. What did not, will not: a late copy is below the highest
  counter.

A sender burns a counter when an envelope is withdrawn; the gap this leaves does no harm, for nobody waits on it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .errors import FrameError, SealError
from .frames import ENVELOPE_HEAD, WIRE_VERSION
from .sealing import Keyring, Secret

MAX_GAPS = 256
"""Ranges of missing counters a receiver remembers; older ones become "not known"."""


def _channel_aead(secret: Secret, sender: bytes, receiver: bytes) -> AESGCM:
    return AESGCM(secret.derive(b"channel " + sender + receiver))


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")


class SendChannel:
    """The sending end. `generation` is the receiver's mailbox generation as far as known (0: not yet)."""

    def __init__(self, keyring: Keyring, sender: bytes, receiver: bytes) -> None:
        self._aead = _channel_aead(keyring.primary, sender, receiver)
        self._key_id = keyring.primary.key_id
        self._sender = sender
        self.counter = 0
        self.generation = 0
        self.pushed = 0
        """The highest counter that Redis said it has taken."""

    def seal(self, frames: bytes) -> tuple[int, bytes]:
        """Seal the frames of one envelope under the next counter; returns (counter, envelope)."""
        self.counter += 1
        head = ENVELOPE_HEAD.pack(WIRE_VERSION, self._key_id, self._sender, self.counter)
        return self.counter, head + self._aead.encrypt(_nonce(self.counter), frames, head)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Which envelopes of a channel arrived: all up to `highest`, but for `missing`; nothing is known below `floor`."""

    asked: int
    highest: int
    floor: int
    missing: list[tuple[int, int]]

    def pack(self) -> bytes:
        flat = [bound for gap in self.missing for bound in gap]
        return struct.pack(f">{3 + len(flat)}Q", self.asked, self.highest, self.floor, *flat)

    @classmethod
    def unpack(cls, payload: bytes) -> Receipt:
        """Raises `FrameError`."""
        try:
            asked, highest, floor, *flat = struct.unpack(f">{len(payload) // 8}Q", payload)
        except (struct.error, ValueError) as error:
            raise FrameError(f"not a receipt: {error}") from None
        return cls(asked, highest, floor, list(zip(flat[::2], flat[1::2], strict=False)))

    def lost(self, counter: int) -> bool | None:
        """Whether the envelope with this counter is lost for good; None when the receiver cannot say."""
        if counter > self.asked:
            return False
        if counter > self.highest:
            return True
        if any(first <= counter <= last for first, last in self.missing):
            return True
        return None if counter < self.floor else False

    def lost_any(self, first: int, last: int) -> bool:
        """Whether any envelope from `first` to `last` is, or may be, lost."""
        last = min(last, self.asked)
        if first > last:
            return False
        return last > self.highest or first < self.floor or any(a <= last and first <= b for a, b in self.missing)


@dataclass(slots=True)
class ReplayWindow:
    """Which counters arrived. Pure; they arrive in the order they were sent, so one number and the gaps suffice."""

    highest: int = 0
    floor: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def seen(self, counter: int) -> bool:
        """Whether this counter must be dropped: it arrived before, or it was passed over and is lost by decision."""
        return counter <= self.highest

    def accept(self, counter: int) -> None:
        """Note the arrival of a counter that was not seen."""
        if counter > self.highest + 1:
            self.gaps.append((self.highest + 1, counter - 1))
            if len(self.gaps) > MAX_GAPS:
                self.floor = self.gaps.pop(0)[1] + 1
        self.highest = counter

    def receipt(self, asked: int) -> Receipt:
        """What to answer a sender that asks about its counters up to `asked`.

        The question itself came under a later counter, so whatever of them is still missing falls into a gap.
        """
        return Receipt(asked, self.highest, self.floor, list(self.gaps))


class ReceiveChannel:
    """The receiving end: window first, then the seal, then the window moves."""

    def __init__(self, secret: Secret, sender: bytes, receiver: bytes) -> None:
        self._aead = _channel_aead(secret, sender, receiver)
        self.window = ReplayWindow()

    def open(self, envelope: bytes, counter: int) -> bytes | None:
        """The frames inside, or None for a repetition. Raises `SealError`, and moves nothing, if not sealed for us."""
        if self.window.seen(counter):
            return None
        head = envelope[: ENVELOPE_HEAD.size]
        try:
            frames = self._aead.decrypt(_nonce(counter), envelope[ENVELOPE_HEAD.size :], head)
        except InvalidTag:
            raise SealError("envelope") from None
        self.window.accept(counter)
        return frames


def read_envelope_head(envelope: bytes) -> tuple[bytes, bytes, int]:
    """(key id, sender incarnation, counter) of an envelope; raises `SealError` on anything else."""
    try:
        version, key_id, sender, counter = ENVELOPE_HEAD.unpack_from(envelope)
    except struct.error:
        raise SealError("envelope") from None
    if version != WIRE_VERSION:
        raise SealError("envelope version")
    return key_id, sender, counter
