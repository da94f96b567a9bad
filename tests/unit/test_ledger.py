"""The chaos suite's judge sees what it is there to see."""

import json
from collections.abc import Iterable

import pytest

from tests.support.ledger import FaultClock, Figures, Ledger, check_log


def line(number: int, kind: str = "delta", **fields: object) -> bytes:
    event = {"type": kind, "job_id": "j", "sequence_number": number, "attempt": 1, **fields}
    if kind == "delta":
        event["chunk"] = {"choices": [{"delta": {"content": str(number)}}]}
    return json.dumps(event).encode()


LOG = {number: hash(line(number)) for number in (1, 2, 3)} | {4: hash(line(4, "completed"))}


def judged(numbers: Iterable[int], *, end: bool = True) -> list[str]:
    """What is broken where a subscriber sees these events, and perhaps the end."""
    ledger = Ledger("j", FaultClock())
    for number in numbers:
        ledger.event("delta", number, line(number))
    if end:
        ledger.event("completed", 4, line(4, "completed"))
    figures = Figures("test", 1)
    figures.add([ledger], {"j": LOG})
    figures.judge()
    return figures.broken


def test_a_subscriber_who_sees_the_log_breaks_nothing() -> None:
    assert judged([1, 2, 3]) == []


@pytest.mark.parametrize(
    ("numbers", "broken"),
    [([1, 3], ["1 lost"]), ([1, 2, 2, 3], ["1 doubled"]), ([1, 3, 2], ["1 out_of_order"])],
)
def test_what_is_lost_doubled_or_out_of_order_is_counted(numbers: list[int], broken: list[str]) -> None:
    assert judged(numbers) == broken


def test_an_end_that_does_not_come_is_counted() -> None:
    assert judged([1, 2, 3], end=False) == ["1 lost", "1 unended"]


def test_an_event_after_the_end_is_counted() -> None:
    ledger = Ledger("j", FaultClock())
    ledger.event("completed", 1, line(1, "completed"))
    ledger.event("delta", 2, line(2))
    assert ledger.doubled == 1


def test_a_snapshot_stands_for_what_is_missing_if_it_was_announced() -> None:
    ledger = Ledger("j", FaultClock())
    ledger.subscribed(recovered=False)
    ledger.snapshot(3)
    ledger.event("completed", 4, line(4, "completed"))
    assert (ledger.lost(LOG), ledger.changed(LOG), ledger.unannounced) == (0, 0, 0)
    ledger.snapshot(3)
    assert ledger.unannounced == 1


def test_an_end_without_a_snapshot_is_no_loss_if_it_was_announced() -> None:
    for is_told in (True, False):
        ledger = Ledger("j", FaultClock())
        ledger.event("delta", 1, line(1))
        ledger.subscribed(recovered=not is_told)
        ledger.event("completed", 4, line(4, "completed"))
        assert ledger.lost(None) == (0 if is_told else 2)


def test_an_event_that_is_not_the_logs_is_counted() -> None:
    ledger = Ledger("j", FaultClock())
    ledger.event("delta", 1, line(1, note="another"))
    assert ledger.changed(LOG) == 1


def test_a_wait_counts_from_the_fault_or_from_what_was_on_its_way() -> None:
    clock = FaultClock()
    clock.struck = [10.0, 20.0]
    assert [clock.waited_s(since, 31.0) for since in (5.0, 15.0, 20.5, 22.0)] == [21.0, 11.0, 10.5, 0.0]


def test_a_log_is_checked_for_holes_ends_attempts_and_its_sum() -> None:
    def completed(number: int, text: str) -> bytes:
        return line(number, "completed", completion={"choices": [{"message": {"content": text}}]})

    assert check_log([line(1), line(2), completed(3, "12")]) == []
    assert check_log([line(1), completed(3, "1")]) == ["j: numbers have holes"]
    assert check_log([line(1)]) == ["j: not one terminal event, the last"]
    assert check_log([line(1), completed(2, "")]) == ["j: the completion is not the sum of the deltas"]
    restarted = line(2, "restarted", discard_through=1)
    assert check_log([line(1), restarted, line(3), completed(4, "3")]) == []
    stale = line(2).replace(b'"attempt": 1', b'"attempt": 0')
    assert check_log([line(1), stale, completed(3, "12")]) == ["j: a stale attempt has written"]
