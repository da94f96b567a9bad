"""The hubs of this process: which jobs it reads, and for how long."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from prometheus_client.core import Metric

from deltawire.log import JobLog
from deltawire.metrics import counter_family, gauge_family
from deltawire.tracing import OFF, Tracing

from .feed import Feed
from .hub import Hub
from .looks import Looks
from .metrics import HubMetrics
from .page import PageReads


class Hubs:
    """The hubs of this process, by job; a hub lives as long as somebody holds it."""

    def __init__(
        self,
        log: JobLog,
        feed: Feed,
        report: Callable[[str], None] = lambda _: None,
        tracing: Tracing = OFF,
    ) -> None:
        """`report` hears of jobs that wait for something that should have come: see `Sweeper.report`."""
        self._log = log
        self._feed = feed
        self._report = report
        self._tracing = tracing
        self._page_reads = PageReads()
        self.metrics = HubMetrics()
        self._entries: dict[str, _Entry] = {}
        self._looks = Looks(self, log)
        self._looking: asyncio.Task[None] | None = None  # while there are hubs

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Hub]:
        """Those of this moment."""
        return iter([entry.hub for entry in self._entries.values()])

    def collect(self) -> Iterator[Metric]:
        """Nobody counts deliveries: how far subscribers have come is how many there were.

        There may be ten thousand of them, so as little as possible is done for each.
        """
        vias = {"websocket": 0, "event_stream": 0, "chat": 0, "responses": 0}
        lagging, delivered = 0, self.metrics.delivered
        for hub in self:
            top = hub.tail.top
            for subscriber in hub.subscribers:
                vias[subscriber.via] += 1
                delivered += subscriber.position - subscriber.origin
                if subscriber.position != top and subscriber.is_lagging:
                    lagging += 1
        yield gauge_family("deltawire_hubs", "Jobs that somebody watches here.", len(self))
        yield gauge_family("deltawire_subscribers", "Readers of a job.", vias, ["transport"])
        yield gauge_family("deltawire_lagging_subscribers", "Those that are behind.", lagging)
        yield counter_family("deltawire_deliveries_total", "Events that were written to readers.", delivered)
        yield from self.metrics.collect()

    def find(self, job_id: str) -> Hub | None:
        """The hub of a job, if there is one."""
        entry = self._entries.get(job_id)
        return entry.hub if entry is not None else None

    @asynccontextmanager
    async def hold(self, job_id: str) -> AsyncIterator[Hub]:
        """The live hub of a job. Raises RedisUnavailableError."""
        hub, release = await self.acquire(job_id)
        try:
            yield hub
        finally:
            release()

    async def acquire(self, job_id: str) -> tuple[Hub, Callable[[], None]]:
        """As `hold`, for callers whose use does not nest; call the second value once when done."""
        hub, opened, release = self.begin(job_id)
        try:
            await opened
        except BaseException:
            release()
            raise
        return hub, release

    def begin(self, job_id: str) -> tuple[Hub, asyncio.Future[None], Callable[[], None]]:
        """As `acquire`, for callers with something to do meanwhile: wait for the second value.

        Call the third value once when done, also where the hub does not open.
        """
        entry = self._entries.get(job_id)
        if entry is None:
            entry = self._entries[job_id] = _Entry(self._new_hub(job_id))
            if self._looking is None:
                self._looking = asyncio.create_task(self._looks.keep(), name="looks")
        entry.holders += 1
        # One opening for all; whoever is cancelled meanwhile does not cancel it for the others.
        return entry.hub, asyncio.shield(entry.opened), lambda: self._release(entry)

    def _new_hub(self, job_id: str) -> Hub:
        return Hub(
            *(job_id, self._log, self._feed, self._report, self._page_reads),
            metrics=self.metrics,
            tracing=self._tracing,
        )

    def _release(self, entry: "_Entry") -> None:
        entry.holders -= 1
        if entry.holders == 0:
            if self._entries.get(entry.hub.job_id) is entry:
                del self._entries[entry.hub.job_id]
            if not self._entries and self._looking is not None:
                self._looking.cancel()
                self._looking = None
            entry.opened.cancel()
            entry.hub.close()


class _Entry:
    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.holders = 0
        self.opened = asyncio.create_task(hub.open(), name=f"hub-open-{hub.job_id}")
