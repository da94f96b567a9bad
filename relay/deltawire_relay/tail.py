"""The recent events of one job, and batches of them ready to write. Pure: no I/O, no clock."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from deltawire.codec import sequence_number_of
from deltawire.errors import GapError
from deltawire.merge import merge

from .frames import event_stream_message, text_frame

TAIL_BYTES = 262_144
# With what a connection may hold besides (`flow.py`) this is what a slow subscriber costs.
BATCH_BYTES = 8_192


class Batch:
    """Consecutive events, encoded once for all subscribers at the same position."""

    def __init__(self, after: int, lines: Sequence[bytes], *, is_full: bool = False) -> None:
        self.after = after
        self.is_full = is_full
        self.through = after + len(lines)
        self.lines = lines

    @cached_property
    def websocket(self) -> bytes:
        """One text frame for each event."""
        return b"".join([text_frame(line) for line in self.lines])

    @cached_property
    def event_stream(self) -> bytes:
        """One server-sent event for each event, with its number as `id`."""
        return b"".join(
            [event_stream_message(line, number) for number, line in enumerate(self.lines, self.after + 1)]
        )


class MergedBatch(Batch):
    """As Batch, with lines that stand for one event or more each."""

    def __init__(self, after: int, lines: Sequence[bytes], *, is_full: bool = False) -> None:
        super().__init__(after, lines, is_full=is_full)
        self.through = sequence_number_of(lines[-1])

    @cached_property
    def event_stream(self) -> bytes:
        """One server-sent event for each line, with its last number as `id`."""
        return b"".join([event_stream_message(line, sequence_number_of(line)) for line in self.lines])


def merged_batches(after: int, lines: Iterable[bytes]) -> Iterator[Batch]:
    """`lines`, which follow `after`, merged and cut into batches of about BATCH_BYTES; lazy."""
    merged: list[bytes] = []
    size = 0
    for line in merge(lines, max_bytes=BATCH_BYTES):
        merged.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            batch = MergedBatch(after, merged, is_full=True)
            yield batch
            merged, size, after = [], 0, batch.through
    if merged:
        yield MergedBatch(after, merged)


def batches(after: int, lines: Sequence[bytes]) -> Iterator[Batch]:
    """`lines`, which follow `after`, cut into batches of about BATCH_BYTES."""
    start = size = 0
    for index, line in enumerate(lines):
        size += len(line)
        if size >= BATCH_BYTES:
            yield Batch(after + start, lines[start : index + 1])
            start, size = index + 1, 0
    if start < len(lines):
        yield Batch(after + start, lines[start:])


class Tail:
    """Holds the events (base, top]; older ones are in the log. Bounded in bytes."""

    def __init__(self, top: int = 0, *, max_bytes: int = TAIL_BYTES) -> None:
        self.base = self.top = top
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._max_bytes = max_bytes
        self._last: Batch | None = None
        self._last_merged: Batch | None = None

    @property
    def newest(self) -> bytes | None:
        """The event at the top, if the tail has it."""
        return self._lines[-1] if self._lines else None

    def extend(self, lines: Iterable[bytes]) -> list[bytes]:
        """Takes the events that are new and returns them; those it has are skipped.

        Raises GapError at an event that does not follow; what came before it has been taken.
        """
        new: list[bytes] = []
        top = self.top
        for line in lines:
            number = sequence_number_of(line)
            if number <= top:
                continue
            if number != top + 1:
                raise GapError(top + 1, number)
            self.append(line)
            new.append(line)
            top = number
        return new

    def append(self, line: bytes) -> None:
        """Takes the event that follows."""
        self._lines.append(line)
        self._bytes += len(line)
        self.top += 1
        while self._bytes > self._max_bytes and len(self._lines) > 1:
            self._bytes -= len(self._lines.popleft())
            self.base += 1

    def after(self, position: int) -> Batch | None:
        """The events after `position`, or as many as make a batch; None where some are older than the tail.

        `position` must be below the top.
        """
        last = self._last
        if last is not None and last.after == position and (last.is_full or last.through == self.top):
            return last
        if position < self.base:
            return None
        if position + 1 == self.top:
            line = self._lines[-1]
            last = Batch(position, (line,), is_full=len(line) >= BATCH_BYTES)
        else:
            lines: list[bytes] = []
            size = 0
            for line in self._lines_after(position):
                lines.append(line)
                size += len(line)
                if size >= BATCH_BYTES:
                    break
            last = Batch(position, lines, is_full=size >= BATCH_BYTES)
        self._last = last
        return last

    def merged_after(self, position: int) -> Batch | None:
        """As `after`, for subscribers that asked for merged deltas."""
        if position < self.base:
            return None
        last = self._last_merged
        if last is None or not self._is_current(last, position):
            last = self._last_merged = next(merged_batches(position, self._lines_after(position)))
        return last

    def _is_current(self, batch: Batch, position: int) -> bool:
        return batch.after == position and (batch.is_full or batch.through == self.top)

    def _lines_after(self, position: int) -> Iterator[bytes]:
        for index in range(position - self.base, len(self._lines)):
            yield self._lines[index]
