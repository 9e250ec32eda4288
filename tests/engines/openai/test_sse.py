"""Events out of bytes, however these are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.engines.httpclient import sse
from kani_nb.engines.httpclient.sse import EventReader, ServerEvent, looks_like_events
from kani_nb.errors import GenerationError


def read(*pieces):
    reader = EventReader()
    events = [event for piece in pieces for event in reader.feed(piece)]
    return events + reader.end()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: a\n\ndata: b\n\n", ["a", "b"]),
        ("data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        ("data: a\r\rdata: b\r\r", ["a", "b"]),
        (": ping\n\ndata: a\n\n", ["a"]),
        ("data: one\ndata: two\n\n", ["one\ntwo"]),
        ("data:tight\n\n", ["tight"]),
        ("data:  a space of its own\n\n", [" a space of its own"]),
        ("data\n\n", [""]),
        ("\ufeffdata: after a mark\n\n", ["after a mark"]),
        ("event: x\n\n", []),
        ("id: 1\nretry: 10\nnothing: 3\ndata: a\n\n", ["a"]),
        ("data: 你好\n\n", ["你好"]),
        ("data: no empty line after it", ["no empty line after it"]),
        ("", []),
    ],
)
def test_events_are_read_as_the_standard_says(text, expected):
    assert [event.data for event in read(text.encode())] == expected


def test_an_event_has_the_type_that_was_said_and_the_next_one_has_not():
    assert read(b"event: error\ndata: a\n\ndata: b\n\n") == [ServerEvent("a", "error"), ServerEvent("b")]


_LINES = st.lists(
    st.one_of(
        st.text(alphabet='aé你😀 :{}"', max_size=8).map(lambda text: f"data: {text}"),
        st.sampled_from(["", "", ": ping", "event: other", "data", "data:", "id: 7", "data: [DONE]", "\ufeffdata: x"]),
    ),
    max_size=12,
)
_ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@settings(max_examples=300, deadline=None)
@given(lines=_LINES, ends=st.lists(_ENDS, min_size=12, max_size=12), cuts=st.lists(st.integers(0, 200), max_size=12))
def test_any_cutting_gives_the_same_events(lines, ends, cuts):
    # A lone CR before a line that LF ends would be one line end: the whole is what both readings are of.
    whole = "".join(line + end for line, end in zip(lines, ends, strict=False)).encode()
    places = sorted({0, len(whole), *(min(cut, len(whole)) for cut in cuts)})
    pieces = [whole[start:end] for start, end in itertools.pairwise(places)]
    assert read(*pieces) == read(whole)
    assert read(*(bytes([byte]) for byte in whole)) == read(whole)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=120), size=st.integers(1, 7))
def test_any_bytes_are_read_without_an_error_and_alike(data, size):
    assert read(*(data[start : start + size] for start in range(0, len(data), size))) == read(data)


@pytest.mark.parametrize("piece", [b"x" * 40, b"data: abcdefgh\n" * 4], ids=["a line", "an event"])
def test_what_never_ends_is_refused_before_it_fills_the_memory(monkeypatch, piece):
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    reader = EventReader()
    with pytest.raises(GenerationError, match="makes no sense"):
        for _ in range(100):
            reader.feed(piece)


def test_a_stream_is_known_by_its_first_character():
    assert looks_like_events(b"data: {") is True
    assert looks_like_events(b": ping") is True
    assert looks_like_events(b' {"a": 1}') is False
    assert looks_like_events(b"<html>") is False
    assert looks_like_events(b"\n ") is None
