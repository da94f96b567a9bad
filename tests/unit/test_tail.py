"""The tail holds a job's recent events within a bound, and cuts them into batches encoded once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.codec import sequence_number_of
from deltawire.errors import GapError
from deltawire_relay.frames import event_stream_message, text_frame
from deltawire_relay.tail import BATCH_BYTES, Batch, Tail, batches
from tests.support.sample_events import delta, line


def lines(first: int, last: int, *, text: str = "x") -> list[bytes]:
    return [line(delta(number, text)) for number in range(first, last + 1)]


def test_it_takes_what_follows_and_skips_what_it_has() -> None:
    """Only new events are returned, in order; a repeat changes nothing."""
    tail = Tail()
    assert tail.extend(lines(1, 3)) == lines(1, 3)
    assert tail.extend(lines(1, 3)) == []
    assert tail.extend(lines(2, 5)) == lines(4, 5)
    assert (tail.base, tail.top) == (0, 5)


def test_it_refuses_a_gap_and_keeps_what_came_before_it() -> None:
    """An event that does not follow raises GapError, which says what was expected."""
    tail = Tail(7)
    with pytest.raises(GapError) as caught:
        tail.extend([*lines(8, 9), *lines(11, 12)])
    assert (caught.value.expected, caught.value.got) == (10, 11)
    assert tail.top == 9
    assert tail.extend(lines(10, 12)) == lines(10, 12)


def test_it_begins_at_the_top_of_the_log() -> None:
    """A tail made at a log's top holds nothing: what is older is in the log."""
    tail = Tail(7)
    assert tail.top == 7
    assert tail.extend(lines(6, 8)) == lines(8, 8)
    assert tail.after(6) is None


def test_it_forgets_the_oldest_events_beyond_its_bound() -> None:
    """The bytes held stay within the bound; the newest event is held however large it is."""
    one = len(lines(1, 1)[0])
    tail = Tail(max_bytes=3 * one)
    tail.extend(lines(1, 9))
    assert (tail.base, tail.top) == (6, 9)
    tail.extend(lines(10, 10, text="y" * 10 * one))
    assert (tail.base, tail.top) == (9, 10)
    assert tail.after(8) is None
    batch = tail.after(9)
    assert batch is not None
    assert batch.through == 10


def test_readers_at_one_position_share_one_batch() -> None:
    """The bytes for a position are made once, until there is more to say there."""
    tail = Tail()
    tail.extend(lines(1, 3))
    first = tail.after(1)
    assert first is not None
    assert tail.after(1) is first
    tail.extend(lines(4, 4))
    second = tail.after(1)
    assert second is not None
    assert second.through == 4
    assert first.through == 3


def test_a_full_batch_stays_the_same_when_more_comes() -> None:
    """A batch that reached its size is not made again for every new event."""
    tail = Tail()
    tail.extend(lines(1, 3, text="x" * BATCH_BYTES))
    full = tail.after(0)
    assert full is not None
    assert full.through == 1
    tail.extend(lines(4, 4))
    assert tail.after(0) is full


def test_a_batch_is_frames_for_sockets_and_messages_for_event_streams() -> None:
    """One text frame, or one server-sent event with its number as id, for each event (PROTOCOL §6, §7)."""
    batch = Batch(3, lines(4, 5))
    four, five = lines(4, 5)
    assert batch.websocket == text_frame(four) + text_frame(five)
    assert batch.event_stream == event_stream_message(four, 4) + event_stream_message(five, 5)


@given(
    sizes=st.lists(st.integers(0, 3 * BATCH_BYTES // 2), min_size=1, max_size=12),
    after=st.integers(0, 1000),
)
def test_batches_are_the_lines_cut_once(sizes: list[int], after: int) -> None:
    """Batches put together are the lines, none is empty, and only the last event may exceed the size."""
    whole = [line(delta(number, "x" * size)) for number, size in enumerate(sizes, after + 1)]
    cut = list(batches(after, whole))
    assert [text for batch in cut for text in batch.lines] == whole
    position = after
    for batch in cut:
        assert batch.after == position
        assert batch.through == position + len(batch.lines) > position
        assert sum(map(len, batch.lines[:-1])) < BATCH_BYTES
        position = batch.through


@given(
    max_events=st.integers(1, 40),
    feeds=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 9)), max_size=10),
)
def test_a_tail_says_what_its_log_says(max_events: int, feeds: list[tuple[int, int, int]]) -> None:
    """However it was fed and bounded, `after` gives the log's events, or None where it has forgotten them.

    Each feed is (how many events again, how many new ones, how far back to look then).
    """
    whole = lines(1, 60)
    tail = Tail(max_bytes=max_events * len(whole[0]))
    for again, new, back in feeds:
        tail.extend(whole[max(0, tail.top - again) : tail.top + new])
        position = max(0, tail.top - 1 - back)
        batch = tail.after(position)
        if batch is None:
            assert position < tail.base
        else:
            assert list(batch.lines) == whole[position : batch.through]
            assert sequence_number_of(batch.lines[0]) == position + 1
            assert batch.through == tail.top
