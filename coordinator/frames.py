"""The wire format: frames, and the envelopes that carry them.

A frame belongs to one exchange. An envelope is one element of a mailbox: all frames of one loop turn from one worker to
another, sealed together. Big-endian throughout.

    frame     type u8 | flags u8 | exchange u64 | length u32 | payload
    envelope  version u8 | key id 4 bytes | sender incarnation 16 bytes | counter u64 | AES-GCM(frames)

The envelope's clear head is authenticated with it; the receiver's incarnation is part of the key (see `channel.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import orjson

from .errors import FrameError

WIRE_VERSION: Final = 1
MAX_BODY: Final = 64 * 1024
"""Most body bytes in one frame."""

_FRAME = struct.Struct(">BBQI")
ENVELOPE_HEAD: Final = struct.Struct(">B4s16sQ")


class FrameType(IntEnum):
    """What a frame says."""

    REQUEST = 1
    """Caller to owner: the head of an ASGI request and the first piece of its body."""
    BODY = 2
    """Caller to owner: more of the request's body."""
    HEAD = 3
    """Owner to caller: status and headers."""
    CHUNK = 4
    """Owner to caller: body bytes."""
    END = 5
    """Owner to caller: the response is complete; with ABORT it broke off."""
    NACK = 6
    """Owner to caller: the request was not run, and why."""
    CANCEL = 7
    """Caller to owner: `http.disconnect`."""
    CREDIT = 8
    """Either way: this many more body bytes may be sent."""
    QUERY = 9
    """Sender to receiver after a new mailbox generation: which envelopes up to this counter did arrive?"""
    RECEIPT = 10
    """The answer to QUERY."""
    CHECK = 11
    """Caller to owner, when the caller may have lost frames: is this exchange still open? A NACK says it is not."""


LAST: Final = 1
"""Flag on REQUEST and BODY: the request's body is complete."""
ABORT: Final = 2
"""Flag on END: the response broke off; what was sent is not all."""
FROM_OWNER: Final = 4
"""Flag on every frame that the owner's end of an exchange sends: ids are unique per caller only."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame."""

    type: FrameType
    flags: int
    exchange: int
    payload: bytes


def encode(type_: FrameType, exchange: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """One frame as bytes."""
    return _FRAME.pack(type_, flags, exchange, len(payload)) + payload


def decode(data: bytes) -> Iterator[Frame]:
    """The frames of an opened envelope, in order; raises `FrameError`."""
    position, end = 0, len(data)
    while position < end:
        try:
            type_, flags, exchange, length = _FRAME.unpack_from(data, position)
            kind = FrameType(type_)
        except (struct.error, ValueError) as error:
            raise FrameError(f"not a frame: {error}") from None
        start = position + _FRAME.size
        position = start + length
        if position > end:
            raise FrameError("a frame is longer than its envelope")
        yield Frame(kind, flags, exchange, data[start:position])


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What a REQUEST frame carries before the first piece of the body."""

    session: str
    """Session key (hex SHA-256)."""
    epoch: int
    """Epoch under which the caller knows the owner."""
    expires_ms: int
    """Redis time after which the request may not start any more."""
    clock: int
    """Which Redis node's time that is (`RedisClock.node`)."""
    method: str
    scheme: str
    path: str
    query: str
    root_path: str
    repeat: bool
    """Whether an earlier try of this request may have run, so that its id may be in use at the upstream."""
    headers: list[tuple[str, str]]
    client: tuple[str, int] | None


_LENGTH = struct.Struct(">I")


def pack_request(head: RequestHead, body: bytes) -> bytes:
    """The payload of a REQUEST frame: length u32, the head as JSON, the body."""
    packed = orjson.dumps(
        [
            head.session,
            head.epoch,
            head.expires_ms,
            head.clock,
            head.method,
            head.scheme,
            head.path,
            head.query,
            head.root_path,
            head.repeat,
            head.headers,
            head.client,
        ]
    )
    return _LENGTH.pack(len(packed)) + packed + body


def unpack_request(payload: bytes) -> tuple[RequestHead, bytes]:
    """Inverse of `pack_request`; raises `FrameError`."""
    try:
        (length,) = _LENGTH.unpack_from(payload)
        values = orjson.loads(payload[4 : 4 + length])
        *start, headers, client = values
        head = RequestHead(
            *start,
            headers=[(name, value) for name, value in headers],
            client=None if client is None else (client[0], client[1]),
        )
    except (struct.error, ValueError, TypeError, IndexError) as error:
        raise FrameError(f"not a request: {error}") from None
    return head, payload[4 + length :]


def pack_head(status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The payload of a HEAD frame. ASGI header bytes are latin-1."""
    return orjson.dumps([status, [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]])


def unpack_head(payload: bytes) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Inverse of `pack_head`; raises `FrameError`."""
    try:
        status, headers = orjson.loads(payload)
        return int(status), [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    except (ValueError, TypeError, AttributeError) as error:
        raise FrameError(f"not a response head: {error}") from None
