"""Pages of a log for readers whose position lies before the tail, and how many are held at a time."""

import asyncio
from collections.abc import Sequence
from functools import cached_property
from typing import Final

from .tail import Batch, batches, merged_batches

MAX_PAGES: Final = 2
NEAR_EVENTS: Final = 64


class Page:
    """Consecutive events of a log, and batches of them, made once for all who share it.

    Empty where the events are gone.
    """

    def __init__(self, after: int = 0, lines: Sequence[bytes] = ()) -> None:
        self.lines = lines
        self._after = after

    @cached_property
    def batches(self) -> Sequence[Batch]:
        return tuple(batches(self._after, self.lines))

    @cached_property
    def merged_batches(self) -> Sequence[Batch]:
        return tuple(merged_batches(self._after, self.lines))


class PageReads:
    """Room for the page reads of all hubs: hundreds of readers that come back at once would each hold one.

    Who lacks few events does not queue behind those who replay thousands: a viewer of a job that streams
    would seem frozen when it joins.
    """

    def __init__(self) -> None:
        self._near = asyncio.Semaphore(MAX_PAGES)
        self._far = asyncio.Semaphore(MAX_PAGES)

    def room(self, lacking: int) -> asyncio.Semaphore:
        """To be held while a page is read for a reader that lacks so many events."""
        return self._near if lacking <= NEAR_EVENTS else self._far
