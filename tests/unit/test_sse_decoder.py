"""The SSE decoder does what WHATWG HTML §9.2.6 says, wherever the bytes are split."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltawire.sse_decoder import ErrorData, EventTooLargeError, SseDecoder
from tests.support.recorded_streams import RECORDED

BOM = b"\xef\xbb\xbf"


def reference(stream: bytes) -> list[bytes]:
    """The algorithm of WHATWG HTML §9.2.6 word by word, on a whole stream; the data of each event."""
    stream = stream.removeprefix(BOM)
    lines = re.split(b"\r\n|\r|\n", stream)
    lines.pop()  # what follows the last line end is not a line yet, and its event is never dispatched
    payloads: list[bytes] = []
    buffer = b""
    for line in lines:
        if line == b"":
            if buffer != b"":
                payloads.append(buffer.removesuffix(b"\n"))
            buffer = b""
            continue
        field, colon, value = line.partition(b":")
        if field == b"" and colon:
            continue  # a comment
        if field == b"data":
            buffer += value.removeprefix(b" ") + b"\n"
    return payloads


def test_an_event_of_type_error_is_told_apart() -> None:
    """`event: error`, and llama.cpp's field `error`; whichever line comes first, and for that event alone."""
    stream = (
        b"data: a\n\nevent: error\ndata: b\n\ndata: c\n\ndata: d\nevent:error\n\nevent: errors\ndata: e\n\n"
        b'error: {"code":1}\n\nerror: no object\n\nevent: error\nevent: message\ndata: f\n\n'
        b"event: error\n\ndata: g\n\n"
    )
    payloads = decode(stream)
    assert payloads == [b"a", b"b", b"c", b"d", b"e", b'{"code":1}', b"f", b"g"]
    assert [payload for payload in payloads if isinstance(payload, ErrorData)] == [b"b", b"d", b'{"code":1}']
    assert [type(payload) for payload in decode(*(bytes([byte]) for byte in stream))] == [
        type(payload) for payload in payloads
    ]


def decode(*parts: bytes, max_event_bytes: int = 262_144) -> list[bytes]:
    decoder = SseDecoder(max_event_bytes)
    return [payload for part in parts for payload in decoder.feed(part)]


STREAMS = {
    "LF": b"data: one\n\ndata: two\n\n",
    "CR": b"data: one\r\rdata: two\r\r",
    "CRLF": b"data: one\r\n\r\ndata: two\r\n\r\n",
    "mixed line ends": b"data: one\r\n\ndata: two\n\r\ndata: three\r\r\n",
    "BOM": BOM + b"data: one\n\n" + BOM + b"data: not data\n\n",
    "comments": b": hello\n\n:\n\ndata: one\n: in between\ndata: two\n\n",
    "several lines": b"data: {\ndata: }\r\n\r\ndata:\rdata\r\r",
    "data without colon": b"data\n\ndata\ndata\n\ndata:\n\n",
    "one space only": b"data:  two\n\ndata:none\n\ndata:\tone\n\n",
    "other fields": b"event: x\nid: 7\nretry: 1\ndatum: no\ndata : no\nDATA: no\ndata: yes\n\nevent: y\n\n",
    "colons in data": b"data: a: b:c\n\ndata::\n\n",
    "no final blank line": b"data: one\n\ndata: cut off\n",
    "no final line end": b"data: one\n\ndata: cut off",
    "bytes that are not UTF-8": b"data: \xff\xfe\x00\n\n",
    "blank lines": b"\n\r\n\r\rdata: one\n\n\n\n",
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_every_split_in_two_and_byte_by_byte_gives_the_same(stream: bytes) -> None:
    """Wherever a stream is cut, and cut into single bytes, the events are those of the standard."""
    expected = reference(stream)
    assert decode(stream) == expected
    assert decode(*(stream[at : at + 1] for at in range(len(stream)))) == expected
    for at in range(len(stream) + 1):
        assert decode(stream[:at], stream[at:]) == expected
        assert decode(stream[:at], b"", stream[at:], b"") == expected


@pytest.mark.parametrize(
    ("stream", "payloads"),
    [
        (STREAMS["LF"], [b"one", b"two"]),
        (STREAMS["CR"], [b"one", b"two"]),
        (STREAMS["CRLF"], [b"one", b"two"]),
        (STREAMS["BOM"], [b"one"]),
        (STREAMS["comments"], [b"one\ntwo"]),
        (STREAMS["several lines"], [b"{\n}", b"\n"]),
        (STREAMS["data without colon"], [b"", b"\n", b""]),
        (STREAMS["one space only"], [b" two", b"none", b"\tone"]),
        (STREAMS["other fields"], [b"yes"]),
        (STREAMS["colons in data"], [b"a: b:c", b":"]),
        (STREAMS["no final blank line"], [b"one"]),
        (STREAMS["no final line end"], [b"one"]),
        (b"", []),
    ],
)
def test_payloads_are_what_the_standard_says(stream: bytes, payloads: list[bytes]) -> None:
    """The expected payloads in plain sight, so that decoder and reference cannot be wrong alike."""
    assert decode(stream) == payloads
    assert reference(stream) == payloads


def test_an_event_comes_out_with_the_byte_that_ends_it() -> None:
    """An event is handed out at the first byte of its blank line, not one byte later."""
    decoder = SseDecoder()
    assert decoder.feed(b"data: one\n") == []
    assert decoder.feed(b"\n") == [b"one"]
    assert decoder.feed(b"data: two\r") == []
    assert decoder.feed(b"\r") == [b"two"]
    assert decoder.feed(b"\ndata: three\r\n\r") == [b"three"]
    assert decoder.feed(b"\n") == []


def test_a_crlf_split_over_feeds_is_one_line_end() -> None:
    """The LF of a split CRLF neither ends an event early nor a second time."""
    assert decode(b"data: one\r", b"\ndata: two\r", b"", b"\n\r", b"\n") == [b"one\ntwo"]


def test_half_a_bom_that_is_none_is_kept() -> None:
    """Bytes that only begin like a BOM belong to the first line, and a second BOM is not ignored."""
    assert decode(b"\xef", b"\xbb", b"data: one\n\n") == []
    assert decode(b"\xef", b"\xbb", b"\xbf", b"data: one\n\n") == [b"one"]
    assert decode(BOM + BOM + b"data: one\n\n") == []


_PIECES = (b"\r", b"\n", b"\r\n", b"data", b":", b" ", b"x", b"data: y", b"id", BOM, b"\xff", b"\0")
_bytes = st.lists(st.sampled_from(_PIECES), max_size=30).map(b"".join)


@st.composite
def split_streams(draw: st.DrawFn) -> list[bytes]:
    stream = draw(st.one_of(_bytes, st.binary(max_size=40), st.sampled_from(sorted(STREAMS.values()))))
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@given(split_streams())
@example([b"\r", b"\n", b"data\r", b"\n", b"\r"])
def test_any_split_of_any_stream_gives_the_events_of_the_standard(parts: list[bytes]) -> None:
    """However a stream of whatever bytes is split, the events are those of one feed and of WHATWG."""
    stream = b"".join(parts)
    assert decode(*parts) == decode(stream) == reference(stream)


def test_an_event_of_just_the_bound_passes() -> None:
    """The bound is inclusive, counts data and not field names, and starts anew with each event."""
    stream = b"data:12345678\n\n" * 3 + b"data:1234\ndata:567\n\n"
    assert decode(stream, max_event_bytes=8) == [b"12345678"] * 3 + [b"1234\n567"]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([b"data:123456789\n\n"], id="one line"),
        pytest.param([b"data:1234\ndata:56789\n\n"], id="several lines"),
        pytest.param([b"data:1234\n", b"data:56789\n"], id="over several feeds"),
        pytest.param([b"data:" + b"1" * 100], id="a line without end"),
        pytest.param([b"data:"] + [b"1"] * 100, id="a line without end, by bytes"),
        pytest.param([b":" * 100], id="a comment without end"),
    ],
)
def test_an_event_past_the_bound_is_refused(parts: list[bytes]) -> None:
    """More than max_event_bytes for one event raises, finished or not: memory stays bounded."""
    with pytest.raises(EventTooLargeError):
        decode(*parts, max_event_bytes=8)


def test_a_new_event_does_not_count_for_the_one_before() -> None:
    """A feed that ends one event and begins the next counts each for itself."""
    assert decode(b"data:12345678\n", b"\ndata:1", b"\n\n", max_event_bytes=8) == [b"12345678", b"1"]


def test_the_bound_does_not_depend_on_the_split() -> None:
    """An event within the bound passes wherever it is split, in the middle of its line too."""
    stream = b"data: 12345678\n\n"
    for at in range(len(stream)):
        assert decode(stream[:at], stream[at:], max_event_bytes=8) == [b"12345678"]


@pytest.mark.parametrize("line", [b": a long comment", b"id: 123456789012", b"data: 123456789"])
def test_a_line_past_the_bound_is_refused_whole_or_not(line: bytes) -> None:
    """Where it is cut decides nothing: lines that carry no data are bounded like those that do."""
    stream = b"data: one\n\n" + line + b"\n\ndata: two\n\n"
    for at in range(len(stream)):
        decoder = SseDecoder(8)
        payloads = decoder.feed(stream[:at])
        with suppress(EventTooLargeError):
            payloads += decoder.feed(stream[at:])
        with pytest.raises(EventTooLargeError):
            decoder.feed(b"")
        assert payloads == [b"one"]


def test_empty_data_lines_are_bounded() -> None:
    """The line ends that join data lines count: a stream of empty ones cannot grow without end."""
    with pytest.raises(EventTooLargeError):
        decode(*([b"data\n"] * 1_000), max_event_bytes=8)


def test_events_before_a_too_large_one_are_not_lost() -> None:
    """What came whole before the event that is too large is handed out, however it was fed."""
    decoder = SseDecoder(8)
    payloads = decoder.feed(b"data:one\n\ndata:123456789\n\n")
    assert payloads == [b"one"]
    with pytest.raises(EventTooLargeError):
        decoder.feed(b"")


@pytest.mark.skipif(not RECORDED, reason="no recorded streams beside the repository")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_streams(path: Path) -> None:
    """A provider's streams come out the same by bytes, with CRLF, and end in [DONE]."""
    stream = path.read_bytes()
    payloads = decode(stream)
    assert payloads == reference(stream)
    assert payloads[-1] == b"[DONE]"
    assert all(payload.startswith(b"{") for payload in payloads[:-1])
    assert decode(*(stream[at : at + 7] for at in range(0, len(stream), 7))) == payloads
    assert decode(stream.replace(b"\n", b"\r\n")) == payloads


@pytest.mark.skipif(not RECORDED, reason="no recorded streams beside the repository")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_every_split_of_a_recorded_stream(path: Path) -> None:
    """Cut in two at every byte the events are the same, with any line end.

    After an event a decoder is as it was before it, so of a long stream each event and the next are enough.
    """
    recorded = path.read_bytes()
    windows = [recorded]
    if len(recorded) > 2_000:
        events = [event + b"\n\n" for event in recorded.split(b"\n\n") if event]
        assert b"".join(events) == recorded.rstrip(b"\n") + b"\n\n"
        windows = [b"".join(events[at : at + 2]) for at in range(len(events))]
    for window in windows:
        expected = decode(window)
        for stream in (window, BOM + window.replace(b"\n", b"\r\n"), window.replace(b"\n", b"\r")):
            for at in range(len(stream) + 1):
                decoder = SseDecoder()
                assert decoder.feed(stream[:at]) + decoder.feed(stream[at:]) == expected


def test_after_an_event_a_decoder_is_as_new() -> None:
    """Nothing of an event is left behind."""
    decoder, other = SseDecoder(), SseDecoder()
    decoder.feed(b"data: one\ndata: two\n\n")
    other.feed(b"data: three\n\n")
    assert vars(decoder) == vars(other) == {**vars(SseDecoder()), "_at_start": False}
