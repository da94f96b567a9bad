"""The fold of a job's log: its events, or a snapshot and those after it, instead of bare chunks. Pure."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec

from .codec import decode, decode_snapshot, is_snapshot, sequence_number_of
from .events import Delta, Event, InProgress, Restarted
from .fold import Chunk, Fold
from .merge import merge

_SAMPLE: Final = 8


class LogFold:
    """Folds a job's log, line by line, in order; `restarted` discards what came before it."""

    def __init__(self) -> None:
        self.fold = Fold()
        self.sequence_number = 0
        self.was_asked = False
        """Whether the upstream was, as far as the log says."""

    def add(self, line: bytes) -> Event | None:
        """Adds the next event and returns it, decoded; None for a snapshot, from which it goes on."""
        if is_snapshot(line):
            self.fold = Fold.from_state(decode_snapshot(line))
            self.sequence_number = sequence_number_of(line)
            self.was_asked = True
            return None
        event = decode(line)
        if isinstance(event, Delta):
            self.fold.add(_read(event))
        elif isinstance(event, Restarted):
            self.fold = Fold()
        elif isinstance(event, InProgress):
            self.was_asked = True
        self.sequence_number = event.sequence_number
        return event

    def add_all(self, lines: Sequence[bytes]) -> None:
        """Adds the next events. What can be merged is merged first: one chunk in the place of hundreds."""
        sample = lines[len(lines) // 2 :][:_SAMPLE]
        # Where deltas say more than text, to find that out takes as long as to fold them.
        is_text = len(list(merge(sample))) < len(sample)
        for line in merge(lines) if is_text else lines:
            self.add(line)

    def completion(self) -> dict[str, Any] | None:
        return self.fold.completion()


async def fold_pages(fold: LogFold, pages: AsyncIterator[list[bytes]]) -> LogFold:
    """Adds pages of a log that follow `fold`; cancelling leaves it at the end of a page."""
    async for page in pages:
        fold.add_all(page)
    return fold


def _read(event: Delta) -> Chunk:
    chunk: Chunk = msgspec.json.decode(event.chunk)
    return chunk
