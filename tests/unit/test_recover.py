"""What becomes of a job whose attempt has ended without a terminal event."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.options import Options, Restart
from deltawire.record import Record
from deltawire.recover import End, NextAttempt, recover


def record(*, attempt: int = 1, max_attempts: int = 2, restart: Restart, has_deltas: bool) -> Record:
    return Record(
        status="in_progress",
        attempt=attempt,
        created_at=1_000.0,
        tenant="default",
        options=Options(max_attempts=max_attempts, restart=restart),
        first_delta_at=1_001.0 if has_deltas else None,
    )


@pytest.mark.parametrize(
    ("restart", "has_deltas", "decision"),
    [
        ("before_first_delta", False, NextAttempt(discards=False)),
        ("before_first_delta", True, End("worker_lost")),
        ("always", False, NextAttempt(discards=False)),
        ("always", True, NextAttempt(discards=True)),
        ("never", False, End("worker_lost")),
        ("never", True, End("worker_lost")),
    ],
)
def test_the_policy_decides_while_attempts_are_left(
    restart: Restart, has_deltas: bool, decision: NextAttempt | End
) -> None:
    """A visible restart is for those who asked for it; an invisible one is the default."""
    assert recover(record(restart=restart, has_deltas=has_deltas)) == decision


@given(
    attempt=st.integers(1, 12),
    max_attempts=st.integers(1, 10),
    restart=st.sampled_from(get_args(Restart)),
    has_deltas=st.booleans(),
)
def test_no_job_is_tried_more_often_than_allowed_nor_restarted_behind_its_readers_backs(
    attempt: int, max_attempts: int, restart: Restart, has_deltas: bool
) -> None:
    """Of every record: attempts end, and readers of deltas are told to discard them."""
    decision = recover(
        record(attempt=attempt, max_attempts=max_attempts, restart=restart, has_deltas=has_deltas)
    )
    if isinstance(decision, NextAttempt):
        assert attempt < max_attempts
        assert restart != "never"
        assert decision.discards == has_deltas
        assert restart == "always" or not has_deltas


def test_an_end_says_how_the_attempt_was_lost() -> None:
    """A worker that was stopped is not one that died."""
    lost = record(restart="never", has_deltas=True)
    assert recover(lost, "worker_shutdown") == End("worker_shutdown")
