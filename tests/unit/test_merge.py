"""Merged deltas say what the deltas said: the same fold, in order, within bounds (PROTOCOL §6.6)."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.codec import DeltaEncoder, decode, read_chunk, sequence_number_of
from deltawire.events import Delta, Event
from deltawire.log_fold import LogFold
from deltawire.merge import TEXT_FIELDS, merge
from deltawire.sse_decoder import SseDecoder
from deltawire_relay.tail import BATCH_BYTES, Tail, batches, merged_batches
from tests.support.recorded_streams import RECORDED
from tests.support.sample_events import completed, delta, in_progress, line, queued, restarted, text_chunk

MAX_BYTES = 2_000


def of_chunks(*chunks: dict[str, Any] | bytes, first: int = 3, attempt: int = 1) -> list[bytes]:
    """Deltas of these chunks, as a worker writes them."""
    encoder = DeltaEncoder("job", attempt)
    return [
        encoder.encode(
            number, 1e9 + number, chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
        )
        for number, chunk in enumerate(chunks, first)
    ]


def chunk(added: dict[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
    """A chunk whose one choice has the `delta` given; `fields` of the choice, or (`top_…`) of the chunk."""
    top = {name.removeprefix("top_"): value for name, value in fields.items() if name.startswith("top_")}
    choice = {name: value for name, value in fields.items() if not name.startswith("top_")}
    return {**text_chunk(""), "choices": [{"index": 0, "delta": added or {"content": "x"}, **choice}], **top}


def folded(lines: list[bytes]) -> Any:
    fold = LogFold()
    for text in lines:
        fold.add(text)
    return shown(fold)


def shown(fold: LogFold) -> Any:
    return fold.sequence_number, json.dumps(fold.completion()), fold.fold.finish_reasons()


def spans(lines: list[bytes]) -> list[tuple[int, int]]:
    """What each line stands for."""
    found = []
    for text in lines:
        event: Event = decode(text)
        first = event.sequence_number
        if isinstance(event, Delta) and isinstance(event.first_sequence_number, int):
            first = event.first_sequence_number
        found.append((first, event.sequence_number))
    return found


def check(lines: list[bytes], merged: list[bytes], max_bytes: int = MAX_BYTES) -> None:
    """What holds whatever the lines are."""
    assert folded(merged) == folded(lines)
    position = sequence_number_of(lines[0]) - 1
    for text, (first, last) in zip(merged, spans(merged), strict=True):
        assert first == position + 1
        position = last
        if first == last:
            assert text in lines
        else:
            assert len(text) <= max_bytes
            assert text.startswith(b'{"type":"delta","job_id":"job","sequence_number":%d,"attempt":' % last)
    assert position == sequence_number_of(lines[-1])


def test_deltas_that_differ_in_their_text_are_one() -> None:
    """Fields, their order, and whose they are: `created_at` and the number are the last's."""
    lines = of_chunks(*map(text_chunk, ("Hel", "lo", ' "you" \\ é')))
    (merged,) = merge(lines)
    assert merged == (
        b'{"type":"delta","job_id":"job","sequence_number":5,"attempt":1,"created_at":1000000005.000000,'
        b'"first_sequence_number":3,"chunk":%s}' % json.dumps(text_chunk('Hello "you" \\ é')).encode()
    )


@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_every_text_field_is_merged(field: str) -> None:
    """Also several at a time, and beside fields that say the same."""
    lines = of_chunks(*[chunk({"role": "assistant", field: text, "tool_calls": None}) for text in "abc"])
    (merged,) = merge(lines)
    assert json.loads(merged)["chunk"]["choices"][0]["delta"][field] == "abc"
    check(lines, [merged])


def test_padding_may_differ() -> None:
    """OpenAI's `obfuscation` hides lengths; the last's is kept."""
    lines = of_chunks(chunk(top_obfuscation="abc"), chunk(top_obfuscation="d"))
    (merged,) = merge(lines)
    assert json.loads(merged)["chunk"]["obfuscation"] == "d"
    check(lines, [merged])


@pytest.mark.parametrize("top", [{}, {"top_obfuscation": "ab"}], ids=["one text", "two"])
def test_a_long_run_is_one_whatever_its_texts_are(top: dict[str, Any]) -> None:
    """Quotes and backslashes among them, and where the numbers grow longer."""
    texts = ['"', "\\", '\\"', "a", '"},"', '"b"\\', "é", "", '\\\\"', "\n"] * 12
    lines = of_chunks(*[chunk({"content": text}, **top) for text in texts], first=90)
    (merged,) = merge(lines)
    assert json.loads(merged)["chunk"]["choices"][0]["delta"]["content"] == "".join(texts)
    check(lines, [merged], 10_000)


CALL = {"index": 0, "function": {"arguments": "x"}}
APART: dict[str, list[Any]] = {
    "another choice": [text_chunk("a"), text_chunk("b", index=1)],
    "two choices": [{"choices": [*text_chunk("a")["choices"], *text_chunk("b", index=1)["choices"]]}] * 2,
    "no choice": [{**text_chunk(""), "choices": []}] * 2,
    "the end of a choice": [text_chunk("a"), text_chunk("b", finish_reason="stop")],
    "ends of a choice": [text_chunk("a", finish_reason="stop")] * 2,
    "log probabilities": [chunk(logprobs={"content": [{"token": "a"}]})] * 2,
    "usage": [chunk(top_usage={"total_tokens": 1})] * 2,
    "tool calls": [chunk({"tool_calls": [CALL]})] * 2,
    "text and tool calls": [chunk({"content": "a", "tool_calls": [CALL]})] * 2,
    "a text field of others": [chunk({"content": "a", "thinking": "b"})] * 2,
    "an object in the delta": [chunk({"content": "a", "audio": {"data": "b"}})] * 2,
    "no text": [chunk({"content": None})] * 2,
    "content and reasoning": [chunk({"content": "a"}), chunk({"reasoning": "b"})],
    "a fingerprint that changes": [chunk(top_system_fingerprint="a"), chunk(top_system_fingerprint="b")],
    "another role": [chunk({"role": "a", "content": "a"}), chunk({"role": "b", "content": "a"})],
    "a number in two ways": [b'{"x":1%b,"choices":[{"delta":{"content":"a"}}]}' % x for x in (b"", b"e0")],
    "a field given twice": [b'{"choices":[{"delta":{"content":"a","content":"b"}}]}'] * 2,
    "a text of the same name elsewhere": [{"content": "a", "choices": [{"delta": {"content": "b"}}]}] * 2,
    "a name with an escape": [b'{"content":"a","choices":[{"delta":{"cont\\u0065nt":"b"}}]}'] * 2,
    "choices that are none": [{"choices": "content", "content": "a"}] * 2,
    "a delta that is none": [{"choices": [{"delta": "x", "content": "a"}]}] * 2,
    "text of two fields, then of one": [chunk({"content": "a", "thinking": "b"}), chunk({"content": "a"})],
    "an error beside it": [{"error": {"message": "no"}, "choices": [{"delta": {"content": "a"}}]}] * 2,
}  # fmt: skip


@pytest.mark.parametrize("chunks", APART.values(), ids=APART)
def test_what_says_more_than_text_stays_apart(chunks: list[Any]) -> None:
    """Such deltas come out verbatim."""
    lines = of_chunks(*chunks)
    assert list(merge(lines)) == lines
    check(lines, lines)


def test_nothing_is_merged_across_another_event() -> None:
    """A restart discards what came before it; an attempt's deltas are its own."""
    lines = [
        *(line(queued(1)), line(in_progress(2)), line(delta(3, "a")), line(delta(4, "b"))),
        *(line(restarted(5)), line(delta(6, "c", attempt=2)), line(delta(7, "d", attempt=2))),
        *(line(delta(8, "e", attempt=3)), line(completed(9, attempt=3))),
    ]
    merged = list(merge(lines))
    assert spans(merged) == [(1, 1), (2, 2), (3, 4), (5, 5), (6, 7), (8, 8), (9, 9)]
    check(lines, merged)


AFTER_A_RUN: dict[str, Any] = {
    "a field between the text and the rest": json.dumps(text_chunk("c"))
    .replace('"c"', '"c", "thinking": "d"')
    .encode(),
    "another attempt": None,
    "another ending": text_chunk("c", finish_reason="stop"),
    "no JSON at all": json.dumps(text_chunk("")).replace('""', '"').encode(),
}


@pytest.mark.parametrize("odd", AFTER_A_RUN.values(), ids=AFTER_A_RUN)
def test_a_run_ends_where_more_than_text_differs(odd: Any) -> None:
    """However many deltas it has already; and another one may follow."""
    begin = of_chunks(*map(text_chunk, ("a", "b", "\\", 'with "quotes"', "c\n", "d")))
    middle = of_chunks(odd or text_chunk("x"), first=9, attempt=1 if odd else 2)
    end = of_chunks(*map(text_chunk, ("e", "f", "g")), first=10)
    merged = list(merge([*begin, *middle, *end]))
    assert [sequence_number_of(text) for text in merged] == [8, 9, 12]
    assert merged[1:2] == middle
    check(begin, merged[:1])
    check(end, merged[2:])


def test_merging_twice_changes_nothing() -> None:
    """A merged event is not merged again: it would lose where it begins."""
    merged = list(merge(of_chunks(*[text_chunk("a" * 100)] * 50), max_bytes=MAX_BYTES))
    assert len(merged) > 1
    assert list(merge(merged)) == merged


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAME = st.sampled_from(["content", "refusal", "reasoning", "role", "tool_calls", "x", "index", "id"])
VALUE = st.one_of(
    TEXT, st.none(), st.booleans(), st.sampled_from([0, 1, 1.0, {"content": "a"}, [{"a": "b"}]])
)
ODD = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["", "a", "b"]),
        "content": TEXT,
        "obfuscation": VALUE,
        "usage": st.sampled_from([None, {"total_tokens": 1}]),
        "system_fingerprint": VALUE,
        "choices": st.lists(
            st.fixed_dictionaries(
                {"delta": st.dictionaries(NAME, VALUE, max_size=3)},
                optional={
                    "index": st.sampled_from([0, 1, True, "0", None]),
                    "finish_reason": st.sampled_from([None, "stop", 1]),
                    "logprobs": st.sampled_from([None, {"content": [1]}]),
                    "content": VALUE,
                },
            ),
            max_size=2,
        ),
    },
)
REAL = st.builds(lambda field, text: chunk({field: text}), st.sampled_from(TEXT_FIELDS[:2]), TEXT)
LOOKS: list[Any] = [
    lambda text, _: chunk({"content": text}),
    lambda text, padding: chunk({"content": text}, top_obfuscation=padding),
    lambda text, more: chunk({"reasoning_content": text, "content": more}),
    lambda text, more: chunk({"reasoning": text, "content": more}, top_obfuscation=text),
]
ALIKE = st.builds(
    lambda look, texts: [look(*pair) for pair in texts],
    st.sampled_from(LOOKS),
    st.lists(st.tuples(TEXT, TEXT), max_size=12),
)
RUNS = st.builds(lambda value, count: [value] * count, st.one_of(ODD, REAL), st.integers(1, 4))


@given(
    st.lists(st.one_of(RUNS, ALIKE, st.lists(REAL, max_size=6)), min_size=1, max_size=6),
    st.booleans(),
    st.data(),
)
def test_the_fold_stays_the_same(runs: list[list[Any]], is_ascii: bool, data: st.DataObject) -> None:
    """Whatever the chunks are, and wherever reading begins and ends."""
    chunks = [json.dumps(value, ensure_ascii=is_ascii).encode() for run in runs for value in run] or [b"{}"]
    lines = of_chunks(*chunks)
    begin = data.draw(st.integers(0, len(lines) - 1))
    max_bytes = data.draw(st.sampled_from([200, 400, MAX_BYTES]))
    part = lines[begin : data.draw(st.integers(begin + 1, len(lines)))]
    check(part, list(merge(part, max_bytes=max_bytes)), max_bytes)
    all_at_once = LogFold()
    all_at_once.add_all(part)
    assert shown(all_at_once) == folded(part)


@pytest.mark.skipif(not RECORDED, reason="no recorded streams beside the repository")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_real_streams_fold_the_same(path: Any) -> None:
    """A provider's own streams: text becomes few events, the rest is left alone."""
    payloads = [text for text in SseDecoder().feed(path.read_bytes()) if text != b"[DONE]"]
    lines = of_chunks(*[read_chunk(payload)[1] for payload in payloads])
    merged = list(merge(lines, max_bytes=MAX_BYTES))
    check(lines, merged)
    if path.stem in {"text", "refusal", "json-schema"}:
        assert len(merged) < max(6, len(lines) // 5)


# In batches.


@given(
    st.lists(st.integers(0, 3_000), min_size=1, max_size=30),
    st.lists(st.booleans(), min_size=1, max_size=7),
)
def test_merged_batches_are_the_lines(sizes: list[int], plain: list[bool]) -> None:
    """They cover all, follow each other, and are as large as others are at the most."""
    chunks = [
        text_chunk("x" * size, index=0 if plain[at % len(plain)] else at) for at, size in enumerate(sizes)
    ]
    lines = of_chunks(*chunks, first=1)
    cut = list(merged_batches(0, lines))
    position = 0
    for batch in cut:
        assert batch.after == position < batch.through
        assert sum(map(len, batch.lines)) < 2 * BATCH_BYTES
        position = batch.through
    check(lines, [text for batch in cut for text in batch.lines], BATCH_BYTES)


def test_five_thousand_deltas_are_a_few_frames() -> None:
    """A reader that was away catches up with a fortieth of the bytes."""
    lines = [line(delta(number, f" word{number % 10}")) for number in range(1, 5_001)]
    cut = list(merged_batches(0, lines))
    assert sum(len(batch.lines) for batch in cut) <= 6
    assert sum(len(batch.websocket) for batch in cut) < sum(map(len, lines)) / 20


def test_a_tail_shares_merged_batches() -> None:
    """Made once for a position until there is more; others are not touched by it."""
    tail = Tail()
    tail.extend([line(delta(number, "x")) for number in range(1, 9)])
    plain, merged = tail.after(2), tail.merged_after(2)
    assert plain is not None
    assert merged is not None
    assert (len(plain.lines), len(merged.lines), merged.through) == (6, 1, 8)
    assert tail.merged_after(2) is merged
    assert tail.after(2) is plain
    tail.extend([line(delta(9, "x"))])
    more = tail.merged_after(2)
    assert more is not None
    assert more.through == 9
    assert Tail(3).merged_after(2) is None
    assert more.event_stream == b"id: 9\ndata: " + more.lines[0] + b"\n\n"
    assert [list(batch.lines) for batch in batches(0, plain.lines)] == [list(plain.lines)]
