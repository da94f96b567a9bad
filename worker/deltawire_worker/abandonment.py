"""Abandonment: a job with `on_abandon: cancel` ends when nobody has watched it for its grace period.

Every publication says how many relays listen, so a watched stream costs nothing. Only when none has for the
whole grace is Redis asked whether somebody watches after all: a relay that is subscribed (the job was
silent), or one that cannot listen just now and has said that it watches.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from deltawire.errors import RedisUnavailableError
from deltawire.log import JobLog
from deltawire.record import CancelRequest

from .cancellation import want_cancel
from .flusher import SETTLE_S
from .run import Run

INTERVAL_S: Final = 1.0


class Abandonment:
    """Looks after the runs of this process."""

    def __init__(self, log: JobLog, runs: Mapping[str, Run]) -> None:
        self._log = log
        self._runs = runs

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await asyncio.gather(*(self._look(run) for run in tuple(self._runs.values()) if _is_due(run)))

    async def _look(self, run: Run) -> None:
        if await self._is_watched(run.job_id):
            run.writer.watched_at = asyncio.get_running_loop().time()
        elif _is_due(run):  # still: Redis may have been away meanwhile
            want_cancel(run, abandoned())

    async def waited_unwatched(self, run: Run) -> bool:
        """Whether nobody waits for a job that has itself waited for longer than its grace, before it streams.

        Relays that were cut off from Redis get as long to come back as in mid-stream.
        """
        options = run.record.options
        if options.on_abandon != "cancel" or time.time() - run.record.created_at <= options.abandon_grace_s:
            return False
        settled_at = asyncio.get_running_loop().time() + SETTLE_S
        while run.cause is None and not await self._is_watched(run.job_id):
            if asyncio.get_running_loop().time() >= settled_at:
                return True
            await asyncio.sleep(INTERVAL_S)
        return False

    async def _is_watched(self, job_id: str) -> bool:
        try:
            return await self._log.is_watched(job_id)
        except RedisUnavailableError:
            return True  # nobody can tell


def abandoned() -> CancelRequest:
    return CancelRequest("abandoned", time.time())


def _is_due(run: Run) -> bool:
    options = run.record.options
    if options.on_abandon != "cancel" or run.cause is not None:
        return False
    return asyncio.get_running_loop().time() - run.writer.watched_at > options.abandon_grace_s
