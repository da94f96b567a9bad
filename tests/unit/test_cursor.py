"""A cursor lets each event through once, in order, and says where events are missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.cursor import Cursor
from deltawire.errors import GapError


def test_it_accepts_the_next_event_and_moves() -> None:
    """A new cursor waits for event 1."""
    cursor = Cursor()
    assert cursor.accept(1) is True
    assert cursor.accept(2) is True
    assert cursor.position == 2


def test_it_refuses_what_it_has() -> None:
    """A known event is False and moves nothing, however old."""
    cursor = Cursor(4)
    assert [cursor.accept(number) for number in (4, 1, 0, -1)] == [False] * 4
    assert cursor.position == 4


def test_a_hole_is_an_error_that_says_where() -> None:
    """A number past the next one raises, and the cursor stays so that the reader can read on from it."""
    cursor = Cursor(4)
    with pytest.raises(GapError, match="expected event 5, got 7") as caught:
        cursor.accept(7)
    assert (caught.value.expected, caught.value.got) == (5, 7)
    assert cursor.position == 4
    assert cursor.accept(5) is True


def test_an_event_that_stands_for_several_is_taken_whole_or_not_at_all() -> None:
    """Known ones are skipped; one with a hole before it, or with a part that is known, is an error (§6.6)."""
    cursor = Cursor(4)
    assert cursor.accept(4, 2) is False
    for first in (4, 6):
        with pytest.raises(GapError):
            cursor.accept(8, first)
        assert cursor.position == 4
    assert cursor.accept(8, 5) is True
    assert cursor.position == 8
    assert cursor.accept(9) is True


def test_a_jump_goes_on_from_the_snapshot() -> None:
    """After a jump the event after the snapshot is the next one."""
    cursor = Cursor(1)
    cursor.jump(10)
    assert cursor.accept(10) is False
    assert cursor.accept(11) is True


@given(st.integers(0, 5), st.lists(st.integers(0, 30)))
def test_any_order_of_arrival_lets_each_event_through_once(start: int, numbers: list[int]) -> None:
    """Whatever arrives, what is let through is start+1, start+2, … without a hole or a repeat."""
    cursor = Cursor(start)
    accepted = []
    for number in numbers:
        try:
            if cursor.accept(number):
                accepted.append(number)
        except GapError:
            continue
    assert accepted == list(range(start + 1, cursor.position + 1))
