"""Events are encoded once, on one line, with type and number where a relay finds them unparsed."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.codec import (
    DeltaEncoder,
    decode,
    encode,
    encode_terminal,
    is_terminal,
    read_chunk,
    sequence_number_of,
    type_of,
)
from deltawire.errors import WireError
from deltawire.events import (
    MAX_EVENT_BYTES,
    TERMINAL_STATUSES,
    Cancel,
    Cancelled,
    Completed,
    Delta,
    Event,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    Queued,
    Restarted,
    TerminalEvent,
    Timings,
)
from tests.support.sample_events import completed

MOMENTS = st.integers(0, 4_000_000_000_000_000).map(lambda microseconds: microseconds / 1_000_000)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON, max_size=4)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "job_id": st.from_regex(r"\A[A-Za-z0-9_-]{1,128}\Z"),
    "sequence_number": st.integers(1, 2**53),
    "attempt": st.integers(0, 10),
    "created_at": MOMENTS,
}
TERMINAL: dict[str, st.SearchStrategy[Any]] = {
    **COMMON,
    "completion": st.none() | OBJECTS,
    "usage": st.none() | OBJECTS,
    "usage_source": st.sampled_from(["provider", "estimated", "unavailable"]),
    "timings": st.builds(
        Timings, queued_s=st.none() | MOMENTS, first_delta_s=st.none() | MOMENTS, total_s=MOMENTS
    ),
}
REASONS = st.sampled_from(["length", "content_filter", "upstream_eof", "idle_timeout", "total_timeout"])
TERMINAL_EVENTS: st.SearchStrategy[TerminalEvent] = st.one_of(
    st.builds(Completed, **TERMINAL),
    st.builds(Incomplete, **TERMINAL, incomplete_details=st.builds(IncompleteDetails, reason=REASONS)),
    st.builds(
        Failed,
        **TERMINAL,
        error=st.text().map(lambda text: WireError("worker_lost", text).error),
        source=st.sampled_from(["request", "upstream", "worker", "queue"]),
        status_code=st.none() | st.integers(400, 599),
    ),
    st.builds(
        Cancelled,
        **TERMINAL,
        cancel=st.builds(
            Cancel,
            reason=st.text(),
            requested_at=st.none() | MOMENTS,
            upstream_closed_at=st.none() | MOMENTS,
        ),
    ),
)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Queued, **COMMON),
    st.builds(InProgress, **COMMON, upstream=st.text(), model=st.none() | st.text()),
    st.builds(Delta, **COMMON, chunk=OBJECTS.map(lambda chunk: msgspec.Raw(msgspec.json.encode(chunk)))),
    st.builds(Restarted, **COMMON, reason=st.text(), discard_through=st.integers(0, 2**53)),
    TERMINAL_EVENTS,
)


@given(EVENTS)
def test_an_event_survives_the_wire(event: Event) -> None:
    """decode(encode(event)) is the event, whatever its texts and numbers."""
    assert decode(encode(event)) == event


@given(EVENTS)
def test_an_event_is_one_line_of_strict_json(event: Event) -> None:
    """No raw line end inside, and any JSON parser reads it."""
    line = encode(event)
    assert b"\n" not in line
    assert b"\r" not in line
    assert isinstance(json.loads(line), dict)


@given(EVENTS)
def test_type_and_number_are_read_by_position(event: Event) -> None:
    """The first three fields stand first, in order, so nothing inside the event can pose as them."""
    line = encode(event)
    parsed = json.loads(line)
    assert list(parsed)[:3] == ["type", "job_id", "sequence_number"]
    assert line.startswith(b'{"type":"%s","job_id":"%s",' % (type_of(line), event.job_id.encode()))
    assert type_of(line).decode() == parsed["type"]
    assert sequence_number_of(line) == event.sequence_number
    assert is_terminal(line) is isinstance(event, TerminalEvent) is (parsed["type"] in TERMINAL_STATUSES)


def test_a_chunk_cannot_pose_as_the_event() -> None:
    """A chunk that looks like a terminal event with another number changes neither."""
    chunk = b'{"type":"completed","sequence_number":99,"job_id":"other"}'
    line = DeltaEncoder("job", 1).encode(7, 1.0, chunk)
    assert (type_of(line), sequence_number_of(line), is_terminal(line)) == (b"delta", 7, False)


def test_a_line_without_a_number_is_an_error() -> None:
    """What is no event raises ValueError, rather than giving some number."""
    with pytest.raises(ValueError):
        sequence_number_of(b'{"type":"heartbeat"}')


@pytest.mark.parametrize("line", [b"", b"1", b"{}", b"[", b'{"type":"unheard-of"}', b'{"type":"delta"}'])
def test_what_is_no_event_is_refused(line: bytes) -> None:
    """decode raises DecodeError and nothing else."""
    with pytest.raises(msgspec.DecodeError):
        decode(line)


def test_an_event_that_is_not_utf8_is_refused_as_any_other() -> None:
    """decode raises DecodeError for bytes that are no text, too."""
    with pytest.raises(msgspec.DecodeError):
        decode(
            encode(Queued(job_id="j", sequence_number=1, attempt=0, created_at=1)).replace(b'"j"', b'"\xff"')
        )


def test_unknown_fields_are_ignored() -> None:
    """A newer writer's fields do not stop an older reader."""
    event = Queued(job_id="j", sequence_number=1, attempt=0, created_at=1.5)
    assert decode(encode(event)[:-1] + b',"new":{"x":1}}') == event


@given(OBJECTS, *COMMON.values())
def test_the_delta_encoder_equals_encode(
    chunk: dict[str, Any], job_id: str, number: int, attempt: int, created_at: float
) -> None:
    """Joining bytes gives the event that `encode` gives; times are kept to the microsecond."""
    raw = msgspec.json.encode(chunk)
    event = Delta(
        job_id=job_id,
        sequence_number=number,
        attempt=attempt,
        created_at=created_at,
        chunk=msgspec.Raw(raw),
    )
    line = DeltaEncoder(job_id, attempt).encode(number, created_at, raw)
    assert decode(line) == decode(encode(event)) == event
    assert list(json.loads(line)) == list(json.loads(encode(event)))


VERBATIM = [
    b"{}",
    b'{"a":1}',
    b' { "a" :\t1.50e+1 , "b" : [ ] } ',
    b'{"a":"\\u00e9 \\ud83d\\ude00 \\n","b":"\xc3\xa9\xf0\x9f\x98\x80\xe2\x80\xa8\x7f"}',
    b'{"a":1,"a":2}',
    b'{"a":123456789012345678901234567890,"b":-0}',
    b'{"sequence_number":3,"type":"completed"}',
]


@pytest.mark.parametrize("payload", VERBATIM)
def test_a_strict_chunk_is_kept_byte_for_byte(payload: bytes) -> None:
    """Strict JSON on one line is published exactly as the upstream wrote it."""
    chunk, line = read_chunk(payload)
    assert line is payload
    assert chunk == json.loads(payload)


@pytest.mark.parametrize(
    ("payload", "chunk"),
    [
        (b'{"a":"\xff"}', {"a": "\ufffd"}),
        (b'{"a\xff":1}', {"a\ufffd": 1}),
        (b'{"a":"\xed\xa0\x80"}', {"a": "\ufffd\ufffd\ufffd"}),
        (b'{"a":NaN}', {"a": None}),
        (b'{"a":[Infinity,-Infinity]}', {"a": [None, None]}),
        (b'{"a":1e999,"b":-1e999}', {"a": None, "b": None}),
        (b'{"a":"\\ud800"}', {"a": "?"}),
        (b'{"a":"x\\udc00y","b":"\\ud83d\\ude00"}', {"a": "x?y", "b": "\U0001f600"}),
        (b'{"\\ud800":1}', {"?": 1}),
        (b'{"a":\n1}', {"a": 1}),
        (b'{"a":\r1}', {"a": 1}),
        (b'{"a":1}\n', {"a": 1}),
        (
            b'{"a":NaN,"b":\r\n123456789012345678901234567890}',
            {"a": None, "b": 123456789012345678901234567890},
        ),
    ],
)
def test_a_chunk_that_is_not_strict_is_mended(payload: bytes, chunk: dict[str, Any]) -> None:
    """Bad UTF-8, NaN, infinities, lone surrogates and raw line ends are encoded anew, strict, on one line."""
    got, line = read_chunk(payload)
    assert got == chunk
    assert json.loads(line.decode(), parse_constant=pytest.fail) == chunk
    assert b"\n" not in line
    assert b"\r" not in line


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"1",
        b"null",
        b'"{}"',
        b"[NaN]",
        b"NaN",
        b"[DONE]",
        b"{",
        b"{}{}",
        b'{"a":1,}',
        b"{'a':1}",
        b'{"a":01}',
        b'{"a":"x\ny"}',
        b'{"a":"x\ty"}',
        b'{"a":"\\x"}',
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"a":' + b"1" * 5_000 + b"}",
    ],
)
def test_what_is_no_object_is_refused(payload: bytes) -> None:
    """ValueError, and nothing else, where no JSON object can be made of a payload."""
    with pytest.raises(ValueError):
        read_chunk(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":NaN,"b":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a":\n' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b"\xff" + b"[" * 100_000,
        b'{"]]]]":"\\"","a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
    ids=["objects", "unclosed", "mended", "line end", "not UTF-8", "behind texts"],
)
def test_deep_nesting_is_refused(payload: bytes) -> None:
    """A payload that would exhaust the stack is a ValueError like any other."""
    with pytest.raises(ValueError):
        read_chunk(payload)


@pytest.mark.parametrize("text", ["\x1b[31mred\x1b[0m", "[0, 1)", '{"', '\\"[', "{\n"])
def test_brackets_in_texts_nest_nothing(text: str) -> None:
    """A gateway that says much at a time is believed, however many brackets its texts leave open."""
    payload = json.dumps({"choices": [{"delta": {"content": text * 200}}]}).encode()
    assert read_chunk(payload) == (json.loads(payload), payload)


@given(
    st.binary(max_size=30)
    | st.text(max_size=30).map(lambda text: f'{{"a":{text}}}'.encode("utf-8", "replace"))
)
def test_whatever_comes_is_an_object_or_a_value_error(payload: bytes) -> None:
    """No payload makes read_chunk raise anything else, and what it returns can be published."""
    try:
        chunk, line = read_chunk(payload)
    except ValueError:
        return
    assert isinstance(chunk, dict)
    assert msgspec.json.decode(line) == chunk
    assert b"\n" not in line


@given(OBJECTS)
def test_any_object_is_read_back(chunk: dict[str, Any]) -> None:
    """What Python's json writes (surrogates escaped, NaN excluded) is read as the same object."""
    payload = json.dumps(chunk).encode()
    assert read_chunk(payload) == (chunk, payload)


def test_infinities_do_not_reach_the_object() -> None:
    """The object equals the bytes published: a fold of it can be encoded and compared."""
    chunk, line = read_chunk(b'{"a":1e999,"b":[NaN]}')
    assert chunk == msgspec.json.decode(line)
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in chunk.values())


def _of_size(size: int) -> Completed:
    event = completed(3, completion={"id": ""})
    return completed(3, completion={"id": "x" * (size - len(encode(event)))})


def test_a_completion_within_the_bound_is_inline() -> None:
    """An event of exactly 256 KiB still carries its completion."""
    event = _of_size(MAX_EVENT_BYTES)
    line = encode_terminal(event)
    assert len(line) == MAX_EVENT_BYTES
    assert line == encode(event)
    assert b"completion_url" not in line


def test_a_completion_past_the_bound_is_replaced_by_its_address() -> None:
    """One byte more, and the completion is null with `completion_url`; everything else stays."""
    event = _of_size(MAX_EVENT_BYTES + 1)
    line = encode_terminal(event)
    assert len(line) < 1_000
    assert decode(line) == msgspec.structs.replace(event, completion=None, completion_url="/v1/jobs/job")


@pytest.mark.parametrize("part", ["usage", "message"])
def test_a_terminal_event_is_never_past_the_bound(part: str) -> None:
    """An upstream's huge usage object or error text cannot make an event of more than 256 KiB."""
    big = "x" * MAX_EVENT_BYTES
    event: TerminalEvent = msgspec.structs.replace(completed(3), usage={"vendor": big})
    if part == "message":
        event = Failed(
            **{name: getattr(completed(3), name) for name in Completed.__struct_fields__},
            error=WireError("upstream_invalid_request", big).error,
            source="upstream",
        )
    size = len(encode_terminal(event))
    assert size <= MAX_EVENT_BYTES
