"""Cutting a stream into events: nothing is changed, however it comes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasehold.pool.sse import EventCutter, EventSplitter, Piece, event_data, event_id, has_data

LINE_ENDS = [b"\n", b"\r\n", b"\r"]
EVENTS = [b"id: 1\ndata: one", b"data: two\ndata: lines", b": a comment", b"retry: 5", b"id: 2\ndata:", b"data: three"]


def cut(stream: bytes, edges: list[int], limit: int = 1000) -> tuple[list[Piece], bytes]:
    cutter = EventCutter(limit)
    edges = [0, *sorted(min(edge, len(stream)) for edge in edges), len(stream)]
    return [piece for a, b in pairwise(edges) for piece in cutter.feed(stream[a:b])], cutter.rest()


@given(st.sampled_from(LINE_ENDS), st.lists(st.sampled_from(EVENTS), max_size=8), st.lists(st.integers(0, 200)))
def test_whole_events_come_out_as_they_went_in(line_end: bytes, events: list[bytes], edges: list[int]) -> None:
    stream = b"".join(event + b"\n\n" for event in events).replace(b"\n", line_end) + b"data: torn"
    pieces, rest = cut(stream, edges)
    assert b"".join(piece.data for piece in pieces) + rest == stream
    assert all(piece.is_event and piece.ends for piece in pieces)
    said = [event_data(piece.data) for piece in pieces if event_data(piece.data)]
    assert said == list(EventSplitter(1000).feed(stream))
    assert [event_id(piece.data) for piece in pieces if event_id(piece.data)] == [
        event_id(event) for event in events if event_id(event)
    ]


@given(st.sampled_from(LINE_ENDS), st.integers(20, 200), st.lists(st.integers(0, 300)))
def test_a_large_event_passes_in_pieces_and_nobody_takes_it_for_a_whole_one(
    line_end: bytes, size: int, edges: list[int]
) -> None:
    large, small = b"data: " + b"x" * size + b"\n\n", b"data: y\n\n"
    stream = (small + large + small).replace(b"\n", line_end)
    pieces, rest = cut(stream, edges, limit=16)
    assert b"".join(piece.data for piece in pieces) + rest == stream
    assert sum(piece.ends for piece in pieces) == 3
    assert [event_data(piece.data) for piece in pieces if piece.is_event and len(piece.data) <= 20] == [b"y", b"y"]
    for before, after in pairwise(pieces):
        assert after.is_event or not after.ends or not before.ends, "its last piece follows another one"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"id: 5\ndata: x", b"5"),
        (b"data: x\nid:5", b"5"),
        (b"data: x\r\nid: a b", b"a b"),
        (b"id: 1\rid: 2", b"2"),
        (b"id:", b""),
        (b"id: 1\nid: \0", b"1"),
        (b"data: id: 5", None),
        (b"data: x\ndata:id: 5", None),
        (b"", None),
    ],
)
def test_the_id_of_an_event(block: bytes, expected: bytes | None) -> None:
    assert event_id(block) == expected


def test_an_event_says_something_if_it_has_data() -> None:
    assert has_data(b"id: 1\ndata: x")
    assert has_data(b"data:")
    assert not has_data(b"id: 1\nretry: 5")
    assert not has_data(b": data: x")
