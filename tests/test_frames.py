"""The wire format: what is packed comes back, and what is no frame is refused and nothing worse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.coordinator.errors import FrameError
from leasehold.coordinator.frames import (
    Frame,
    FrameType,
    RequestHead,
    decode,
    encode,
    pack_head,
    pack_request,
    unpack_head,
    unpack_request,
)

FRAMES = st.builds(
    Frame,
    type=st.sampled_from(FrameType),
    flags=st.integers(0, 255),
    exchange=st.integers(0, 2**64 - 1),
    payload=st.binary(max_size=200),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
HEADS = st.builds(
    RequestHead,
    session=TEXT,
    epoch=st.integers(0, 2**53),
    expires_ms=st.integers(0, 2**53),
    clock=st.integers(0, 2**32 - 1),
    method=TEXT,
    scheme=TEXT,
    path=TEXT,
    query=TEXT,
    root_path=TEXT,
    headers=st.lists(st.tuples(TEXT, TEXT), max_size=5),
    client=st.none() | st.tuples(TEXT, st.integers(0, 65535)),
)


@given(st.lists(FRAMES, max_size=10))
def test_frames_of_an_envelope_come_back_in_order(frames: list[Frame]) -> None:
    data = b"".join(encode(frame.type, frame.exchange, frame.payload, frame.flags) for frame in frames)
    assert list(decode(data)) == frames


@given(FRAMES, st.data())
def test_a_frame_that_is_cut_short_is_refused(frame: Frame, data: st.DataObject) -> None:
    whole = encode(frame.type, frame.exchange, frame.payload, frame.flags)
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(FrameError):
        list(decode(whole[:cut]))


@given(st.binary(max_size=300))
def test_b39_any_other_bytes_are_refused_as_no_frames(garbage: bytes) -> None:
    for read in (lambda data: list(decode(data)), unpack_request, unpack_head):
        try:
            read(garbage)
        except FrameError:
            continue


@pytest.mark.parametrize("type_", [0, 12, 255])
def test_a_frame_of_an_unknown_type_is_refused(type_: int) -> None:
    with pytest.raises(FrameError):
        list(decode(bytes([type_]) + encode(FrameType.END, 1)[1:]))


@given(HEADS, st.binary(max_size=200))
def test_a_request_comes_back_with_every_header_and_byte(head: RequestHead, body: bytes) -> None:
    assert unpack_request(pack_request(head, body)) == (head, body)


@given(
    st.integers(100, 599),
    st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=50)), max_size=5),
)
def test_b30_a_response_head_comes_back_whatever_bytes_its_headers_hold(
    status: int, headers: list[tuple[bytes, bytes]]
) -> None:
    assert unpack_head(pack_head(status, headers)) == (status, headers)


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"{}", b"[1]", b'["x", []]', b'[200, [["\xc4\x80", ""]]]', b"[200, 1]"]
)
def test_b39_what_is_no_response_head_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        unpack_head(payload)


@pytest.mark.parametrize("packed", [b"", b"[]", b"{}", b"[1,2]", b'["a",1,1,1,"","","","","",3,null]'])
def test_b39_what_is_no_request_is_refused(packed: bytes) -> None:
    with pytest.raises(FrameError):
        unpack_request(len(packed).to_bytes(4, "big") + packed)
