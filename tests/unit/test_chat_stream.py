"""The sink of the OpenAI door: chunks as they are, and what becomes of the rest (PROTOCOL §9.1)."""

import asyncio
import json
from typing import Any

import pytest

from deltawire.codec import DeltaEncoder, chunk_of, encode, is_delta
from deltawire.errors import WireError
from deltawire.messages import Snapshot
from deltawire_relay.chat_stream import DONE, ChatStream, is_usage_only
from deltawire_relay.event_stream import COMMENT_INTERVAL_S
from deltawire_relay.openai_errors import Failure
from deltawire_relay.tail import Batch
from tests.support.sample_events import completed, delta, in_progress, line, queued
from tests.support.virtual_time import virtual_time

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
GONE = Failure.of(WireError("shutting_down", "bye"))


@pytest.mark.parametrize("chunk", [b"{}", b'{"chunk":1,"a":{"chunk":{"x":"}"}}}', b'{ "a" : "\\u0041" }'])
def test_a_chunk_is_sliced_out_of_its_event(chunk: bytes) -> None:
    """By position, whatever is in it."""
    event = DeltaEncoder("job", 1).encode(7, 1.5, chunk)
    assert is_delta(event)
    assert chunk_of(event) == chunk


def test_other_events_are_no_deltas() -> None:
    for event in (queued(), in_progress(2), completed(3)):
        assert not is_delta(encode(event))
    assert is_delta(line(delta(3)))
    assert not is_delta(b'{"type":"deltas","job_id":"job"}')


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        ({"choices": [], "usage": USAGE}, True),
        ({"usage": USAGE, "choices": []}, True),
        ({"choices": None, "usage": USAGE}, True),
        ({"usage": USAGE}, True),
        ({"choices": [], "usage": USAGE, "x": [{"choices": []}]}, True),
        ({"choices": [], "usage": None}, False),
        ({"choices": []}, False),
        ({"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "usage": None}, False),
        ({"choices": [{"index": 0, "delta": {}}], "usage": USAGE}, False),
        ({"choices": [{"index": 0, "delta": {"content": '"choices":[],"usage":{}'}}], "usage": None}, False),
        ({"choices": [{"index": 0, "delta": {"content": '"choices":[],"usage":{}'}}]}, False),
        ({"usage": "none", "choices": []}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", " : ")], ids=str)
def test_which_chunk_is_usage_only(chunk: dict[str, Any], expected: bool, separators: Any) -> None:
    """No choice, and the usage as an object; Azure's first chunk, without a choice either, is not."""
    assert is_usage_only(json.dumps(chunk, separators=separators).encode()) is expected
    if chunk.get("choices") == []:
        spaced = json.dumps(chunk).encode().replace(b'"choices": []', b'"choices" :[ ]')
        assert is_usage_only(spaced) is expected


def deltas(after: int, *chunks: bytes) -> Batch:
    encoder = DeltaEncoder("job", 1)
    return Batch(after, [encoder.encode(n, 1.0, chunk) for n, chunk in enumerate(chunks, after + 1)])


async def test_a_batch_without_a_chunk_writes_nothing() -> None:
    """The status still waits, and so does the reader."""
    stream = ChatStream(wants_usage=False)
    stream.write_batch(Batch(0, [line(queued()), line(in_progress(2))]))
    stream.write_batch(deltas(2, json.dumps({"choices": [], "usage": USAGE}).encode()))
    assert stream.is_writable
    assert not stream.is_begun
    stream.write_batch(Batch(3, [line(completed(4))]))
    stream.end()
    assert await stream.take() == DONE
    assert await stream.take() == b""


async def test_the_end_may_come_with_the_last_chunks() -> None:
    """In one batch they stand in order."""
    stream = ChatStream(wants_usage=False)
    stream.write_batch(Batch(2, [line(delta(3)), line(completed(4))]))
    assert await stream.take() == b"data: %s\n\n" % chunk_of(line(delta(3))) + DONE


async def test_a_failure_is_told_once() -> None:
    """The first counts; before a chunk it is kept for the status, and after the end there is none."""
    early, late, over = (ChatStream(wants_usage=True) for _ in range(3))
    early.fail(GONE)
    assert (early.failure, await early.take()) == (GONE, b"")
    late.write_batch(deltas(2, b"{}"))
    late.fail(GONE)
    late.fail(Failure.of(WireError("internal_error", "later")))
    sent = await late.take()
    assert late.failure is None
    assert sent.startswith(b"data: {}\n\ndata: ")
    assert sent.count(b"data: ") == 2
    assert json.loads(sent.split(b"data: ")[2])["error"]["code"] == "shutting_down"
    over.write(DONE)
    over.end()
    over.fail(GONE)
    assert (over.failure, await over.take()) == (None, DONE)


async def test_text_that_was_folded_up_is_no_stream() -> None:
    """What was folded up cannot be streamed as it was; the client is told where the text is."""
    stream = ChatStream(wants_usage=True)
    stream.write_message(Snapshot(job_id="job", sequence_number=9, completion={}))
    assert stream.failure is not None
    assert stream.failure.error.code == "state_lost"
    assert "/v1/jobs/job" in stream.failure.error.message


@virtual_time
async def test_the_status_waits_for_15_seconds_at_the_most() -> None:
    """Then a comment stands in for the first chunk, and again at each such silence (§9.1)."""
    stream = ChatStream(wants_usage=True)
    loop = asyncio.get_running_loop()
    for n in (1, 2):
        assert await stream.take() == b": keep-alive\n\n"
        assert loop.time() == 15 * n
    loop.call_later(3, stream.write_batch, deltas(2, b"{}"))
    assert await stream.take() == b"data: {}\n\n"
    assert loop.time() == 33


@pytest.mark.parametrize("late_s", [-0.001, 0.0, 0.0001])
def test_what_comes_with_the_comment_is_not_hidden_by_it(late_s: float) -> None:
    """An error in the very moment in which the headers would go: else the stream ended without a word."""

    @virtual_time
    async def check() -> None:
        stream = ChatStream(wants_usage=False)
        taking = asyncio.create_task(stream.take())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(COMMENT_INTERVAL_S + late_s, stream.fail, GONE)
        data = await taking
        assert (data, stream.failure) == (b"", GONE) or (data and not stream.is_over)

    check()
