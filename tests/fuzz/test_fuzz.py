"""Whatever bytes a gateway sends: decoder, fold and judgement neither raise nor contradict themselves.

`make test` runs some hundred examples, `make fuzz` as many as ten minutes hold (MINUTES=60 for more).
"""

import copy
import json
import os
import sys
import time
from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltawire.codec import MAX_DEPTH, DeltaEncoder, decode, encode_snapshot, encode_terminal, read_chunk
from deltawire.ending import AsCompleted, at_end_of_stream, terminal_event
from deltawire.events import MAX_EVENT_BYTES, Timings
from deltawire.fold import Fold
from deltawire.log_fold import LogFold
from deltawire.outputs import judge, parsed_again
from deltawire.sse_decoder import EventTooLargeError, SseDecoder
from deltawire.usage import estimate
from tests.fuzz.streams import CHUNKS, EVENTS, STREAMS

Json = dict[str, Any]
MINUTES: Final = float(os.environ.get("DELTAWIRE_FUZZ_MINUTES", "0"))
EXAMPLES: Final = 1_000
TIMINGS: Final = Timings(queued_s=None, first_delta_s=None, total_s=1.0)
REQUESTS: Final[list[Json]] = [
    {},
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
        "messages": [{"content": "x"}],
    },
    {"tool_choice": {"type": "function", "function": {"name": "f"}}, "messages": [None, {"content": [{}]}]},
]

# Words of the vocabulary, and bytes that mean something to some layer.
_WORDS: Final = (
    *(
        "id",
        "type",
        "role",
        "index",
        "content",
        "tool_calls",
        "function",
        "function_call",
        "name",
        "arguments",
    ),
    *(
        "choices",
        "delta",
        "message",
        "finish_reason",
        "logprobs",
        "usage",
        "thinking",
        "text",
        "refusal",
        "x",
    ),
    *("reasoning_details", "format", "custom", "input", "x_groq", "token_ids", "obfuscation", "object"),
)
_TOKENS: Final = (
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"data:", b"data", b": x\n", b"event: x\n", b"[DONE]", b"\xef\xbb\xbf"),
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"-0", b"1e400", b"NaN", b"0" * 30),
    *(
        b"\\ud800",
        b"\\u0000",
        b"\xff",
        b"\xc3",
        b"\x00",
        b'"index":0',
        b'"id":"a"',
        b'""',
        b"{}",
        b"[[[[[[" * 30,
    ),
    *(f'"{word}":'.encode() for word in _WORDS),
)
_SCALARS: Final[st.SearchStrategy[Any]] = st.sampled_from(
    [
        [],
        {},
        None,
        True,
        False,
        0,
        1,
        -1,
        2**63,
        10**30,
        1.5,
        "",
        "a",
        "{",
        "}",
        '{"a":1}',
        "stop",
        "tool_calls",
        "text",
    ]
)
_JSON: Final = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _bent_bytes(draw: st.DrawFn) -> bytes:
    """A stream in which bytes were put in, taken out, said twice, or taken from another stream."""
    stream = bytearray(draw(st.sampled_from(STREAMS)))
    edits = st.tuples(
        st.integers(0, 4), st.integers(0, 1 << 16), st.integers(0, 40), st.sampled_from(_TOKENS)
    )
    for kind, place, size, token in draw(st.lists(edits, min_size=1, max_size=8)):
        at = place % (len(stream) + 1)
        match kind:
            case 0:
                stream[at:at] = token
            case 1:
                del stream[at : at + size]
            case 2:
                stream[at : at + len(token)] = token
            case 3:
                stream[at:at] = stream[max(0, at - size * 8) : at]
            case _:
                stream[at:] = draw(st.sampled_from(STREAMS))[at:]
    return bytes(stream)


def _put(value: Any, steps: list[int], new: Any) -> Any:  # JSON
    """The value with another one at the end of a path into it."""
    if steps and isinstance(value, dict) and value:
        key = sorted(value)[steps[0] % len(value)]
        return {**value, key: _put(value[key], steps[1:], new)}
    if steps and isinstance(value, list) and value:
        at = steps[0] % len(value)
        return [*value[:at], _put(value[at], steps[1:], new), *value[at + 1 :]]
    return new


@st.composite
def _bent_chunks(draw: st.DrawFn) -> bytes:
    """Events of all gateways in any order, with other values somewhere in them."""
    events = []
    for event in draw(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=8)):
        steps = draw(st.just([]) | st.lists(st.integers(0, 5), min_size=1, max_size=7))
        bent = _put(event, steps, draw(_JSON)) if steps else event
        events.append(b"data: %s\n\n" % json.dumps(bent).encode())
    line_end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]))
    return b"".join(events).replace(b"\n", line_end)


_streams: Final = st.one_of(_bent_chunks(), _bent_bytes(), st.binary(max_size=60))
_cuts: Final = st.lists(st.integers(0, 1 << 16), max_size=6)


def decoded(stream: bytes, cuts: list[int], max_event_bytes: int) -> tuple[list[bytes], bool]:
    """The payloads of a stream that was cut there, and whether the decoder has refused the rest."""
    places = sorted(cut % (len(stream) + 1) for cut in cuts)
    decoder, payloads = SseDecoder(max_event_bytes), []
    try:
        for begin, end in zip([0, *places], [*places, len(stream)], strict=True):
            payloads += decoder.feed(stream[begin:end])
        payloads += decoder.feed(b"")
    except EventTooLargeError:
        return payloads, True
    return payloads, False


def chunks_of(payloads: list[bytes]) -> list[tuple[Json, bytes]]:
    chunks = []
    for payload in payloads:
        try:
            chunk, line = read_chunk(payload)
        except ValueError:
            continue
        assert b"\n" not in line
        assert msgspec.json.decode(line) == chunk
        chunks.append((chunk, line))
    return chunks


def folded(chunks: list[tuple[Json, bytes]], cut: int) -> Fold:
    """The fold of the chunks; the same through a log, looked at in between, and taken up from a snapshot."""
    fold, looked_at, log, again = Fold(), Fold(), LogFold(), LogFold()
    encoder = DeltaEncoder("job", 1)
    before = copy.deepcopy([chunk for chunk, _ in chunks])
    for number, (chunk, line) in enumerate(chunks, 1):
        fold.add(chunk)
        looked_at.add(chunk)
        looked_at.completion()
        delta = encoder.encode(number, 1.0, line)
        for each in (log, again):
            each.add(delta)
        if number == cut:
            snapshot = encode_snapshot("job", number, attempt=1, created_at=1.0, fold=fold.state())
            again = LogFold()
            again.add(snapshot)
    assert [chunk for chunk, _ in chunks] == before
    completion = fold.completion()
    for other in (looked_at, log.fold, again.fold):
        assert other.completion() == completion
        assert other.finish_reasons() == fold.finish_reasons()
        assert other.usage == fold.usage
    return fold


def judged(fold: Fold, request: Json) -> None:
    """The terminal event can be written and read, is small enough, and promises no more than there is."""
    completion = fold.completion()
    outputs = judge(completion, request)
    for output in outputs:
        assert completion is not None
        (choice,) = (choice for choice in completion["choices"] if choice["index"] == output.index)
        if output.tool_calls == "complete":
            assert choice["finish_reason"] in ("tool_calls", "function_call", "stop")
            for call in choice["message"].get("tool_calls") or ():
                arguments = call["function"]["arguments"] if "function" in call else "{}"
                assert not arguments.strip() or isinstance(json.loads(arguments), dict)
        if output.parsed is not None:
            assert output.parse_error is None
            assert choice["finish_reason"] == "stop"
            assert parsed_again([output], completion) == [output]
    assert not any(o.tool_calls == "complete" or o.parsed for o in judge(completion, request, is_over=False))
    used = estimate(request, completion)
    assert min(used.values()) >= 0
    for ending in (at_end_of_stream(fold), AsCompleted()):
        event = terminal_event(
            ending,
            job_id="job",
            sequence_number=2,
            attempt=1,
            now=1.0,
            fold=fold,
            timings=TIMINGS,
            request=request,
            outputs=outputs,
        )
        line = encode_terminal(event)
        assert len(line) <= MAX_EVENT_BYTES
        assert type(decode(line)) is type(event)


def check(stream: bytes, cuts: list[int], request: Json, max_event_bytes: int) -> None:
    payloads, is_refused = decoded(stream, cuts, max_event_bytes)
    assert (payloads, is_refused) == decoded(stream, [], max_event_bytes)
    assert all(len(payload) <= max_event_bytes for payload in payloads)
    chunks = chunks_of(payloads)
    judged(folded(chunks, cuts[0] % (len(chunks) + 1) if cuts else 0), request)


@pytest.mark.timeout(MINUTES * 60 + 120)
def test_nothing_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    """Any bytes, split anywhere."""
    executions = 0
    until = time.monotonic() + MINUTES * 60

    @settings(
        max_examples=5_000 if MINUTES else EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_streams, _cuts, st.sampled_from(REQUESTS), st.sampled_from([262_144, 262_144, 40]))
    def some(stream: bytes, cuts: list[int], request: Json, max_event_bytes: int) -> None:
        nonlocal executions
        executions += 1
        check(stream, cuts, request, max_event_bytes)

    some()
    while time.monotonic() < until:
        some()
        with capsys.disabled():
            print(f"\r{executions} examples", end="", flush=True)


@pytest.mark.parametrize("name", CHUNKS)
def test_the_cost_grows_with_the_stream(name: str) -> None:
    """Twice the stream takes twice the calls of functions, not four times as many."""

    def calls(times: int) -> int:
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        chunks = [copy.deepcopy(chunk) for _ in range(times) for chunk in CHUNKS[name]]
        fold = Fold()
        sys.setprofile(counted)
        try:
            for chunk in chunks:
                fold.add(chunk)
            completion = fold.completion()
            judge(completion, REQUESTS[1])
            estimate({}, completion)
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) < 2.5 * calls(200)


def test_chunks_as_deep_as_they_may_be() -> None:
    """What can be read can be folded, judged and written."""
    for depth in (MAX_DEPTH - 4, MAX_DEPTH, 10_000):
        payload = b'{"choices":[{"delta":{"content":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}}]}"
        check(b"data: " + payload + b"\n\n", [], REQUESTS[1], 262_144)
