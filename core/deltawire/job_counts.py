"""How many jobs there are by what they wait for, counted in Redis now and then: no scrape can wait."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from prometheus_client import Metric

from .errors import RedisUnavailableError
from .index import Index
from .metrics import counter_family, gauge_family
from .places import Places

INTERVAL_S: Final = 2.0
STATES: Final = ("queued", "waiting", "parked", "running")

_log = logging.getLogger(__name__)


class PlaceCounts:
    """What this process has done about quotas."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def collect(self) -> Iterable[Metric]:
        """For Prometheus."""
        yield counter_family(
            "deltawire_tenant_refusals_total", "Jobs refused, as too many wait.", self._places.refused
        )
        yield counter_family(
            "deltawire_jobs_held_total",
            "Times that a job had to wait for its tenant's turn.",
            self._places.held,
        )


class JobCounts:
    """Of the whole installation, whoever tells them; nothing is counted that nobody scrapes."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._counts: tuple[int, ...] = ()
        self._is_wanted = True

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            if self._is_wanted:
                try:
                    self._counts = await self._index.counts()
                    self._is_wanted = False
                except RedisUnavailableError as error:
                    self._counts = ()  # rather none than old ones
                    _log.debug("cannot count jobs: %s", error)
            await asyncio.sleep(INTERVAL_S)

    def collect(self) -> Iterable[Metric]:
        """For Prometheus; as of INTERVAL_S after the scrape before."""
        self._is_wanted = True
        yield gauge_family(
            "deltawire_jobs",
            "Jobs that wait for a worker, for their turn or for their time, and that run; in all.",
            dict(zip(STATES, self._counts, strict=False)),
            ("state",),
        )
