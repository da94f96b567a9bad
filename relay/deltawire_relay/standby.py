"""What a relay does while its feed brings nothing, or before it goes: it reads on, and says who watches."""

import asyncio
import logging
import math
from typing import Final
from weakref import WeakKeyDictionary

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
        self._marked_at: WeakKeyDictionary[Hub, float] = WeakKeyDictionary()

    async def keep(self) -> None:
        """Until cancelled."""
        is_reading = False
        while True:
            await asyncio.sleep(READ_INTERVAL_S)
            if self._feed.is_delivering:
                is_reading = False
                continue
            try:
                await self.mark_watched(again_after_s=MARK_INTERVAL_S)
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
                    self._hubs.metrics.repairs["standby"] += 1
                    hub.read_on(lines)

    async def mark_watched(self, *, again_after_s: float = 0) -> None:
        """Leaves the marks, but for those younger than `again_after_s`. Raises RedisUnavailableError."""
        now = asyncio.get_running_loop().time()
        due = [
            hub
            for hub in self._hubs
            if _ends_unwatched(hub) and now - self._marked_at.get(hub, -math.inf) >= again_after_s
        ]
        for start in range(0, len(due), HUBS_AT_ONCE):
            hubs = due[start : start + HUBS_AT_ONCE]
            await asyncio.gather(*(self._log.mark_watched(hub.job_id) for hub in hubs))
            self._marked_at.update(dict.fromkeys(hubs, now))


def _ends_unwatched(hub: Hub) -> bool:
    """Whether somebody watches a job that a worker would cancel if nobody did."""
    record = hub.record
    is_cancellable = record is not None and record.options.on_abandon == "cancel"
    return is_cancellable and not hub.is_ended and bool(hub.subscribers)
