"""Reading an upstream's answer: chunks out of bytes, and errors that give nothing away."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.codec import DeltaEncoder
from deltawire.events import MAX_EVENT_BYTES
from deltawire_worker.refusal import UpstreamError
from deltawire_worker.upstream import (
    DONE,
    MAX_CHUNK_BYTES,
    Chunk,
    Stream,
    media_type_of,
    request_body,
    source_of,
)
from deltawire_worker.upstreams import Upstream
from tests.support.sample_events import text_chunk

KEY = "sk-live-0123456789abcdef"
PLAIN = Upstream(name="default", base_url="http://gateway/v1")


def data(chunk: Any) -> bytes:
    return b"data: %s\n\n" % (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode())


def stream(content: Any = b"", **headers: str) -> Stream:
    response = httpx.Response(200, content=content, headers=headers)
    return Stream(source_of(response), media_type_of(response))


async def pieces(*parts: bytes | Exception) -> AsyncIterator[bytes]:
    for part in parts:
        if isinstance(part, Exception):
            raise part
        yield part


async def read(stream: Stream, *, pauses: bool = False) -> tuple[list[bytes], UpstreamError | None]:
    """All that came, and the error that it ended with."""
    lines: list[bytes] = []

    def take(batch: list[Chunk]) -> bool:
        lines.extend(line for _, line in batch)
        return not pauses

    try:
        while await stream.read(take):
            assert pauses
    except UpstreamError as error:
        return lines, error
    return lines, None


ONE, TWO = b'{"a": 1, "unknown":[null]}', b'{"a":2}'


def test_chunks_keep_the_bytes_that_upstream_sent() -> None:
    """White space and unknown fields included."""
    assert stream()._read(data(ONE) + data(TWO)) == (
        [({"a": 1, "unknown": [None]}, ONE), ({"a": 2}, TWO)],
        None,
    )


def test_nothing_after_done_is_read() -> None:
    """Not even in the same bytes."""
    batch, ending = stream()._read(data(ONE) + data(DONE) + data(TWO))
    assert ([line for _, line in batch], ending) == ([ONE], DONE)


def test_empty_data_is_no_chunk() -> None:
    """Some gateways send `data:` to keep a connection alive."""
    assert stream()._read(b"data:\n\ndata: \n\n: comment\n\n") == ([], None)


@given(st.lists(st.integers(1, 40), max_size=12))
def test_where_the_bytes_are_cut_makes_no_difference(cuts: list[int]) -> None:
    """TCP and HTTP cut where they like."""
    body = data(ONE) + b": c\r\n\r\n" + data(text_chunk("é€😀")) + data(TWO) + data(DONE)
    whole, _ = stream()._read(body)
    reader, read_so_far, endings = stream(), [], []
    for cut in cuts:
        batch, ending = reader._read(body[:cut])
        read_so_far += batch
        endings.append(ending)
        body = body[cut:]
    batch, ending = reader._read(body)
    assert read_so_far + batch == whole
    assert DONE in [*endings, ending]


@pytest.mark.parametrize("payload", [b"{", b"[1]", b'"x"', b"1", b"null", b"<html>", b"{]" * 3])
def test_what_is_not_a_json_object_is_malformed(payload: bytes) -> None:
    """What came before it is handed out; of itself nothing is told."""
    batch, ending = stream()._read(data(ONE) + data(payload) + data(TWO))
    assert [line for _, line in batch] == [ONE]
    assert isinstance(ending, UpstreamError)
    assert ending.code == "upstream_malformed"
    assert "html" not in ending.error.message


@pytest.mark.parametrize(
    "error", [{"message": f"key {KEY}"}, {"message": KEY, "code": None}, [KEY], KEY, 1, {"x": KEY}]
)
def test_an_error_event_tells_nothing_of_its_text(error: Any) -> None:
    """It may be meant for the gateway's operator."""
    batch, ending = stream()._read(data(ONE) + data({"error": error}))
    assert [line for _, line in batch] == [ONE]
    assert isinstance(ending, UpstreamError)
    assert ending.code == "upstream_error_event"
    assert KEY not in repr(ending.error)


@pytest.mark.parametrize("field", ["code", "type"])
def test_an_error_event_is_told_by_its_code(field: str) -> None:
    """Which is OpenAI's, or the gateway's own; one that is no code at all is not told."""
    _, ending = stream()._read(data({"error": {field: "overloaded", "message": KEY}}))
    assert isinstance(ending, UpstreamError)
    assert "(overloaded)" in ending.error.message
    _, ending = stream()._read(data({"error": {field: "overloaded" + "x" * 1_000, "message": KEY}}))
    assert isinstance(ending, UpstreamError)
    assert "overloaded" not in repr(ending.error)


@pytest.mark.parametrize("nothing", [None, False, ""])
def test_an_error_that_is_none_is_no_error(nothing: Any) -> None:
    """Some gateways send the field in every chunk."""
    batch, ending = stream()._read(data({"error": nothing, **text_chunk("x")}))
    assert len(batch) == 1
    assert ending is None


def test_a_chunk_that_is_too_large_ends_the_stream() -> None:
    """An event must stay within its bound."""
    reader = stream()
    assert reader._read(data(ONE))[1] is None
    _, ending = reader._read(data({"a": "x" * MAX_CHUNK_BYTES}))
    assert isinstance(ending, UpstreamError)
    assert ending.code == "upstream_event_too_large"


def test_a_chunk_without_end_is_not_collected_for_ever() -> None:
    """The bound holds for a line that never ends, too."""
    reader = stream()
    for _ in range(10):
        _, ending = reader._read(b"data: " + b"x" * (MAX_CHUNK_BYTES // 8))
        if ending is not None:
            break
    assert isinstance(ending, UpstreamError)


@pytest.mark.parametrize(
    "rest",
    [
        (),
        (data(TWO),),
    ],
    ids=["end", "more"],
)
async def test_what_came_with_a_chunk_that_is_too_large_is_handed_out(rest: tuple[bytes, ...]) -> None:
    """`read` promises so, however TCP joins the bytes; and the error comes, whatever comes after it."""
    lines, error = await read(stream(pieces(data(ONE) + data({"a": "x" * MAX_CHUNK_BYTES}), *rest)))
    assert lines == [ONE]
    assert error is not None
    assert error.code == "upstream_event_too_large"


@pytest.mark.parametrize(
    "payload",
    [b'{"a":"%s"}' % (b"\xff" * 200_000), b'{"a":\n[%s]}' % b",".join([b"1e15"] * 40_000)],
    ids=["bad UTF-8", "several lines"],
)
def test_an_event_stays_within_its_bound_also_where_a_chunk_is_encoded_anew(payload: bytes) -> None:
    """Events are at most 256 KiB."""
    batch, ending = stream()._read(b"".join(b"data: %s\n" % line for line in payload.split(b"\n")) + b"\n")
    if ending is None:
        [(_, line)] = batch
        assert len(DeltaEncoder("j" * 128, 10).encode(10**9, 2e9, line)) <= MAX_EVENT_BYTES


async def test_a_stream_is_read_to_done() -> None:
    """In as many batches as there were reads."""
    assert await read(stream(pieces(data(ONE), data(TWO) + data(DONE), data(ONE)))) == ([ONE, TWO], None)


@pytest.mark.parametrize("end", [(data(DONE),), (), (httpx.ReadError(KEY),)])
async def test_a_reader_that_has_enough_for_now_gets_the_rest_later(end: tuple[Any, ...]) -> None:
    """Each time from where it stopped."""
    parts = (data(ONE)[:9], data(ONE)[9:] + data(TWO), data(ONE), data(TWO), *end)
    assert await read(stream(pieces(*parts)), pauses=True) == ([ONE, TWO, ONE, TWO], None)


async def test_an_error_comes_also_to_a_reader_that_has_enough() -> None:
    """It has no room for more, and no more comes."""
    parts = pieces(data(ONE) + data({"error": {"code": "x"}}))
    lines, error = await read(stream(parts), pauses=True)
    assert lines == [ONE]
    assert error is not None


async def test_a_stream_without_done_is_read_to_its_end() -> None:
    """What ended it is for the caller to judge."""
    assert await read(stream(pieces(data(ONE), data(TWO), b"data: {"))) == ([ONE, TWO], None)


@pytest.mark.parametrize(
    "error", [httpx.ReadError(KEY), httpx.RemoteProtocolError(KEY), httpx.ReadTimeout(KEY)]
)
async def test_a_connection_that_breaks_is_an_end_like_any_other(error: Exception) -> None:
    """The finish_reason, or its absence, says what it was."""
    assert await read(stream(pieces(data(ONE), error))) == ([ONE], None)


async def test_what_came_before_an_error_is_handed_out_first() -> None:
    """The deltas are in the log before the failure is."""
    lines, error = await read(stream(pieces(data(ONE) + data({"error": {"code": "x"}}) + data(TWO))))
    assert lines == [ONE]
    assert error is not None


async def test_an_encoded_body_is_decoded() -> None:
    """We ask for identity, and some gateways do not care."""
    import gzip

    body = gzip.compress(data(ONE) + data(DONE))
    assert await read(stream(pieces(body[:20], body[20:]), **{"Content-Encoding": "gzip"})) == ([ONE], None)


def test_the_request_is_streamed_with_usage() -> None:
    """Everything else goes through as it came."""
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": "é"}],
        "vendor": {"deep": [1, 2.5, None]},
    }
    assert json.loads(request_body(request, PLAIN)) == {
        **request,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_callers_stream_options_win() -> None:
    """But not `stream`: a job is a stream."""
    body = json.loads(
        request_body(
            {"stream": False, "stream_options": {"include_usage": False, "include_obfuscation": True}}, PLAIN
        )
    )
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": False, "include_obfuscation": True}
    assert json.loads(request_body({"stream_options": None}, PLAIN))["stream_options"] == {
        "include_usage": True
    }


def _cut(body: bytes, sizes: Iterable[int]) -> list[bytes]:
    parts = []
    for size in sizes:
        parts.append(body[:size])
        body = body[size:]
    return [*parts, body]


@given(st.binary(max_size=300), st.lists(st.integers(0, 50), max_size=8))
def test_no_bytes_make_the_reader_fail(body: bytes, sizes: list[int]) -> None:
    """Whatever a gateway sends ends in chunks, DONE or an UpstreamError."""
    reader = stream()
    for part in _cut(body, sizes):
        _, ending = reader._read(b"data: " + part + b"\n\n")
        if ending is not None:
            break
