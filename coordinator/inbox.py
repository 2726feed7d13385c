"""The inbox: what came out of this worker's mailbox, opened, checked and taken apart. Synchronous; knows no Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from .channel import ReceiveChannel, ReplayWindow, read_envelope_head
from .errors import FrameError, SealError
from .frames import Frame, decode
from .sealing import Keyring

logger = logging.getLogger("leasehold.coordinator.inbox")


@dataclass(slots=True)
class InboxStatistics:
    """Counts since start: frames delivered; envelopes opened, repeated (dropped silently), refused (forged)."""

    frames: int = 0
    envelopes: int = 0
    repeated: int = 0
    refused: int = 0


class Inbox:
    """The receiving ends of all channels to one incarnation.

    Windows are kept as long as the incarnation lives: whoever can write to Redis could otherwise replay what he kept.
    """

    def __init__(self, keyring: Keyring, incarnation: str, deliver: Callable[[str, Frame], None]) -> None:
        self._keyring = keyring
        self._incarnation = bytes.fromhex(incarnation)
        self._deliver = deliver
        self._channels: dict[bytes, ReceiveChannel] = {}
        self.statistics = InboxStatistics()

    def receive(self, envelope: bytes) -> None:
        """Open one envelope and deliver its frames in order. Never raises: what is wrong is counted and dropped."""
        try:
            key_id, sender, counter = read_envelope_head(envelope)
            channel = self._channel(key_id, sender)
            opened = channel.open(envelope, counter)
        except SealError:
            self.statistics.refused += 1
            logger.warning("envelope_refused bytes=%d", len(envelope))
            return
        if opened is None:
            self.statistics.repeated += 1
            return
        self._channels[sender] = channel
        self.statistics.envelopes += 1
        name = sender.hex()
        try:
            for frame in decode(opened):
                self.statistics.frames += 1
                self._dispatch(name, frame)
        except FrameError as error:
            self._refuse(name, error)

    def _dispatch(self, sender: str, frame: Frame) -> None:
        # One by one: an envelope holds frames of many exchanges, and one that is no good must not take the others
        # along.
        try:
            self._deliver(sender, frame)
        except FrameError as error:
            self._refuse(sender, error)
        except Exception:
            # The reader must outlive a bug in what it dispatches to: a worker whose reader died cannot be reached.
            logger.exception("dispatch_failed sender=%s type=%s", sender[:8], frame.type.name)

    def _refuse(self, sender: str, error: FrameError) -> None:
        self.statistics.refused += 1
        logger.warning("frame_refused sender=%s error=%s", sender[:8], error)

    def window(self, sender: str) -> ReplayWindow:
        """What arrived from one sender."""
        channel = self._channels.get(bytes.fromhex(sender))
        return ReplayWindow() if channel is None else channel.window

    def _channel(self, key_id: bytes, sender: bytes) -> ReceiveChannel:
        # A sender seals with one secret for as long as its incarnation lives, so the sender alone names the channel. It
        # is kept only once it has opened something: a forger must not fill the table.
        channel = self._channels.get(sender)
        if channel is None:
            secret = self._keyring.by_id(key_id)
            if secret is None:
                raise SealError("envelope key")
            channel = ReceiveChannel(secret, sender, self._incarnation)
        return channel
