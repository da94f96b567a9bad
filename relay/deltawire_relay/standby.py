"""What a relay does while its feed brings nothing, or before it goes: it reads on, and says who watches."""

import asyncio
import logging
import math
from typing import Final

from deltawire.errors import RedisUnavailableError
from deltawire.log import JobLog

from .feed import Feed
from .hub import DEGRADED_AFTER_S, Hub
from .hubs import Hubs

READ_INTERVAL_S: Final = 0.25
MARK_INTERVAL_S: Final = 20.0
HUBS_AT_ONCE: Final = 256

_log = logging.getLogger(__name__)


class Standby:
    """Stands in for pub/sub: viewers notice latency only.

    A worker counts its job's viewers by what PUBLISH answers. A relay that cannot listen, or that is about to
    stop, is not among them, so it leaves a mark for its jobs that end when nobody watches.
    """

    def __init__(self, hubs: Hubs, log: JobLog, feed: Feed) -> None:
        self._hubs = hubs
        self._log = log
        self._feed = feed

    async def keep(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        marked_at = -math.inf
        is_reading = False
        while True:
            await asyncio.sleep(READ_INTERVAL_S)
            if self._feed.is_delivering:
                is_reading = False
                continue
            try:
                if loop.time() - marked_at >= MARK_INTERVAL_S:
                    await self.mark_watched()
                    marked_at = loop.time()
                if self._feed.undelivered_s >= DEGRADED_AFTER_S:
                    if not is_reading:
                        _log.warning("pub/sub brings nothing; reading the logs instead")
                    is_reading = True
                    await self.read_on()
            except RedisUnavailableError:
                pass  # then nothing can be done but wait

    async def read_on(self) -> None:
        """Reads what the hubs' logs have beyond their tails. Raises RedisUnavailableError."""
        live = [hub for hub in self._hubs if hub.is_live]
        for start in range(0, len(live), HUBS_AT_ONCE):
            tops = {hub.job_id: hub.tail.top for hub in live[start : start + HUBS_AT_ONCE]}
            for job_id, lines in (await self._log.news(tops)).items():
                if hub := self._hubs.find(job_id):  # it may have been released meanwhile
                    hub.read_on(lines)

    async def mark_watched(self) -> None:
        """Leaves the marks. Raises RedisUnavailableError."""
        watched = [hub.job_id for hub in self._hubs if _ends_unwatched(hub)]
        for start in range(0, len(watched), HUBS_AT_ONCE):
            await asyncio.gather(*map(self._log.mark_watched, watched[start : start + HUBS_AT_ONCE]))


def _ends_unwatched(hub: Hub) -> bool:
    """Whether somebody watches a job that a worker would cancel if nobody did."""
    record = hub.record
    is_cancellable = record is not None and record.options.on_abandon == "cancel"
    return is_cancellable and not hub.is_ended and bool(hub.subscribers)
