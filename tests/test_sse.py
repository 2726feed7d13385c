"""Server-sent events that pass by: found whole, however the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from leasehold.pool.sse import KEEPALIVE, EventSplitter, event, event_data, event_type, events

LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
TEXT = st.text(alphabet=st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=12)
FIELDS = st.one_of(
    TEXT.map(lambda value: f"data: {value}"),
    TEXT.map(lambda value: f"data:{value}"),
    TEXT.map(lambda value: f"id: {value}"),
    TEXT.map(lambda value: f": {value}"),
    st.just("event: message"),
    st.just("retry: 5"),
)
# Each line with a line end of its own kind: servers, and proxies that add comments, mix them.
EVENTS = st.lists(st.tuples(FIELDS, LINE_ENDS), min_size=1, max_size=4)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    text = ""
    for lines in draw(st.lists(EVENTS, max_size=6)):
        for field, end in lines:
            # CR followed by LF would be one line end, not two.
            text += field + end
        text += "\n" if not text.endswith("\r") else "\r"
    return (text + draw(st.sampled_from(["", "data: unfinished"]))).encode()


def split(chunks: list[bytes], limit: int) -> list[bytes]:
    splitter = EventSplitter(limit)
    return [data for chunk in chunks for data in splitter.feed(chunk)]


def reference(stream: bytes) -> list[bytes]:
    """The specification's algorithm, line by line."""
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    found: list[bytes] = []
    data: list[bytes] = []
    for line in lines:
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line:
            if b"\n".join(data):
                found.append(b"\n".join(data))
            data = []
    return found


@given(streams(), st.data())
def test_any_chunking_of_a_stream_gives_the_events_of_the_specification(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
    assert split(chunks, 10_000) == reference(stream)


@given(streams(), st.integers(0, 40), st.data())
def test_any_chunking_passes_over_the_same_events_above_the_limit(
    stream: bytes, limit: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
    assert split(chunks, limit) == split([stream], limit)


def test_an_event_above_the_limit_is_passed_over_and_the_next_one_found() -> None:
    big = event(b"x" * 100)
    for size in (1, 7, 64, 1000):
        stream = big + event(b"small")
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert split(chunks, 50) == [b"small"]


def test_a_carriage_return_at_the_end_of_a_chunk_ends_the_event_at_once() -> None:
    splitter = EventSplitter(1000)
    assert list(splitter.feed(b"data: 1\r\n\r")) == [b"1"]
    assert not list(splitter.feed(b"\n"))
    assert list(splitter.feed(b"data: 2\r\n\r\n")) == [b"2"]


def test_several_data_lines_are_one_datum() -> None:
    assert event_data(b'event: message\ndata: {"a":\ndata: 1}') == b'{"a":\n1}'


def test_the_data_of_a_whole_body_are_found_without_a_last_blank_line() -> None:
    assert list(events(b"data: 1\n\ndata: 2")) == [b"1", b"2"]
    assert not list(events(b""))


def test_a_keepalive_is_no_event() -> None:
    assert list(events(KEEPALIVE + event(b"{}") + KEEPALIVE)) == [b"{}"]


def test_whole_events_are_found_and_those_passed_over_are_known() -> None:
    splitter = EventSplitter(30)
    assert list(splitter.blocks(b"event: a\r\ndata: 1\r\n\r\n: comment\n\ndata:")) == [
        b"event: a\r\ndata: 1",
        b": comment",
    ]
    assert not splitter.overran
    assert not list(splitter.blocks(b"x" * 100))
    assert splitter.overran
    assert list(splitter.blocks(b"\n\ndata: 2\n\n")) == [b"data: 2"]
    whole = EventSplitter(30)
    assert list(whole.blocks(event(b"x" * 100) + b"data: 2\n\n")) == [b"data: 2"]
    assert whole.overran


def test_the_type_of_an_event_is_the_last_that_it_names() -> None:
    assert event_type(b"data: 1") == event_type(b"event:\ndata: 1") == event_type(b"events: x") == b"message"
    assert event_type(b"event:endpoint\rdata: event: x") == b"endpoint"
    assert event_type(b"event: a\r\nevent: b") == b"b"
