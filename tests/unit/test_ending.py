"""How an attempt ended, and the one event that says so."""

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.codec import decode, encode_terminal, is_terminal, type_of
from deltawire.ending import (
    AsCancelled,
    AsCompleted,
    AsFailed,
    AsIncomplete,
    Deadline,
    Ending,
    IncompleteReason,
    Source,
    at_deadline,
    at_end_of_stream,
    terminal_event,
)
from deltawire.errors import ERRORS, WireError
from deltawire.events import (
    MAX_EVENT_BYTES,
    Cancelled,
    Completed,
    Failed,
    Incomplete,
    TerminalEvent,
    Timings,
)
from deltawire.fold import Fold
from deltawire.record import CancelRequest
from deltawire_worker.refusal import UpstreamError
from tests.support.sample_events import text_chunk

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def folded(*chunks: dict[str, Any]) -> Fold:
    fold = Fold()
    for chunk in chunks:
        fold.add(chunk)
    return fold


def finished(*reasons: str | None) -> Fold:
    """A fold with text and these finish reasons, one for each choice."""
    return folded(*(text_chunk("x", index=i, finish_reason=reason) for i, reason in enumerate(reasons)))


def event_of(ending: Ending, fold: Fold) -> TerminalEvent:
    return terminal_event(
        ending,
        job_id="job",
        sequence_number=7,
        attempt=2,
        now=1_000.5,
        fold=fold,
        timings=Timings(queued_s=0.5, first_delta_s=None, total_s=2.0),
    )


@pytest.mark.parametrize(
    ("reasons", "ending"),
    [
        (("stop",), AsCompleted()),
        (("tool_calls",), AsCompleted()),
        (("something_new",), AsCompleted()),
        (("stop", "stop"), AsCompleted()),
        (("length",), AsIncomplete("length")),
        (("content_filter",), AsIncomplete("content_filter")),
        (("stop", "length"), AsIncomplete("length")),
        (("content_filter", "length"), AsIncomplete("length")),
        ((None,), AsIncomplete("upstream_eof")),
        (("stop", None), AsIncomplete("upstream_eof")),
        ((None, "length"), AsIncomplete("upstream_eof")),
    ],
)
def test_the_finish_reasons_of_all_choices_say_how_a_stream_ended(
    reasons: tuple[str | None, ...], ending: Ending
) -> None:
    """With [DONE] or without; a choice without a finish_reason was cut off."""
    assert at_end_of_stream(finished(*reasons)) == ending


def test_a_stream_that_ends_before_its_first_delta_has_failed() -> None:
    """There is nothing that could be incomplete."""
    ending = at_end_of_stream(Fold())
    assert isinstance(ending, AsFailed)
    assert (ending.error.code, ending.source) == ("upstream_eof", "upstream")
    assert ending.error.error.retryable


@pytest.mark.parametrize("deadline", get_args(Deadline))
def test_a_deadline_before_the_first_delta_is_a_failure(deadline: Deadline) -> None:
    """Its code is the deadline's name."""
    ending = at_deadline(deadline, Fold())
    assert isinstance(ending, AsFailed)
    assert (ending.error.code, ending.source) == (deadline, "upstream")


@pytest.mark.parametrize("deadline", ["idle_timeout", "total_timeout"])
def test_a_deadline_after_the_first_delta_leaves_an_incomplete_answer(deadline: Deadline) -> None:
    """The text so far is worth something."""
    assert at_deadline(deadline, folded(text_chunk("x"))) == AsIncomplete(deadline)  # type: ignore[arg-type] # two of three


def test_each_ending_has_its_event() -> None:
    """With the envelope, the fold, and what is said about this ending only."""
    fold = folded(text_chunk("Hel"), text_chunk("lo", finish_reason="stop"), {"choices": [], "usage": USAGE})

    completed = event_of(AsCompleted(), fold)
    assert isinstance(completed, Completed)
    assert completed.completion is not None
    assert completed.completion["choices"][0]["message"]["content"] == "Hello"
    assert (completed.usage, completed.usage_source) == (USAGE, "provider")
    assert (completed.job_id, completed.sequence_number, completed.attempt) == ("job", 7, 2)

    incomplete = event_of(AsIncomplete("idle_timeout"), fold)
    assert isinstance(incomplete, Incomplete)
    assert incomplete.incomplete_details.reason == "idle_timeout"

    error = UpstreamError("upstream_rate_limit", "slow down", status_code=429, retry_after_s=3.0)
    failed = event_of(AsFailed(error, "upstream", error.status_code), fold)
    assert isinstance(failed, Failed)
    assert (failed.source, failed.status_code, failed.error.retry_after_s) == ("upstream", 429, 3.0)
    assert failed.completion == completed.completion

    cancelled = event_of(AsCancelled(CancelRequest("bored", 1_000.25), 1_000.25, 1_000.4), Fold())
    assert isinstance(cancelled, Cancelled)
    assert (cancelled.cancel.reason, cancelled.cancel.upstream_closed_at) == ("bored", 1_000.4)
    assert (cancelled.completion, cancelled.usage, cancelled.usage_source) == (None, None, "unavailable")


def test_a_cancellation_says_when_it_was_asked_for() -> None:
    """Not when the worker heard of it, which can be an hour later in the queue."""
    heard_at = 1_000.0
    event = event_of(AsCancelled(CancelRequest("bored", 400.0), heard_at, None), Fold())
    assert isinstance(event, Cancelled)
    assert event.cancel.requested_at == 400.0


def test_a_bare_cancel_key_counts_from_when_it_was_found() -> None:
    """It does not say when it was set."""
    event = event_of(AsCancelled(CancelRequest(), 1_000.0, None), Fold())
    assert isinstance(event, Cancelled)
    assert (event.cancel.reason, event.cancel.requested_at) == ("cancel_key", 1_000.0)


chunks = st.lists(
    st.one_of(
        st.just({}),
        st.just({"choices": [], "usage": USAGE}),
        st.builds(
            text_chunk,
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            index=st.integers(0, 2),
            finish_reason=st.sampled_from([None, "stop", "length", "content_filter", "tool_calls"]),
        ),
    ),
    max_size=8,
)
errors = st.one_of(
    st.builds(WireError, st.sampled_from(sorted(ERRORS)), st.text(st.characters(codec="utf-8"), max_size=50)),
    st.builds(UpstreamError, st.just("upstream_server_error"), st.just("x"), status_code=st.just(503)),
)
moments = st.none() | st.floats(0, 2e9)
endings: st.SearchStrategy[Ending] = st.one_of(
    st.just(AsCompleted()),
    st.builds(AsIncomplete, st.sampled_from(get_args(IncompleteReason))),
    st.builds(AsFailed, errors, st.sampled_from(get_args(Source))),
    st.builds(AsCancelled, st.builds(CancelRequest, st.just("x"), moments), st.floats(0, 2e9), moments),
)
TYPES = {
    AsCompleted: b"completed",
    AsIncomplete: b"incomplete",
    AsFailed: b"failed",
    AsCancelled: b"cancelled",
}


@given(chunks, endings)
def test_every_ending_of_every_fold_is_exactly_one_terminal_event(
    said: list[dict[str, Any]], ending: Ending
) -> None:
    """It can be written, read back, and is of the one type that the ending means."""
    event = event_of(ending, folded(*said))
    line = encode_terminal(event)
    assert type_of(line) == TYPES[type(ending)]
    assert is_terminal(line)
    assert b"\n" not in line
    assert decode(line) == event


@given(chunks, st.sampled_from(["end", *get_args(Deadline)]))
def test_however_a_stream_stops_there_is_an_ending(said: list[dict[str, Any]], stop: Any) -> None:
    """And never "completed" without a finish_reason."""
    fold = folded(*said)
    ending = at_end_of_stream(fold) if stop == "end" else at_deadline(stop, fold)
    if isinstance(ending, AsCompleted):
        assert stop == "end"
        assert set(fold.finish_reasons()) - {None}
    else:
        assert isinstance(ending, AsIncomplete | AsFailed)
    assert is_terminal(encode_terminal(event_of(ending, fold)))


@pytest.mark.parametrize(
    "ending", [AsCompleted(), AsIncomplete("length"), AsCancelled(CancelRequest(), 1.0, None)]
)
def test_a_completion_that_is_too_large_is_replaced_by_its_address(ending: Ending) -> None:
    """No event is larger than its bound."""
    line = encode_terminal(event_of(ending, folded(*[text_chunk("x" * 1_000)] * 300)))
    assert len(line) < MAX_EVENT_BYTES
    event = decode(line)
    assert isinstance(event, TerminalEvent)
    assert (event.completion, event.completion_url) == (None, "/v1/jobs/job")
