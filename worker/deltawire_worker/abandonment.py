"""Abandonment: a job with `on_abandon: cancel` ends when nobody has watched it for its grace period.

Every publication says how many relays listen, so a stream that talks and is watched costs nothing. Of those
that are silent, or talk to nobody, Redis is asked: of many in one command, and so often that a grace is kept
to a tenth of a second. A relay that cannot listen just now has said that it watches; that is asked last.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

from deltawire.errors import RedisUnavailableError
from deltawire.log import JobLog
from deltawire.record import CancelRequest

from .cancellation import want_cancel
from .run import Run

TICK_S: Final = 0.05
MIN_LOOK_S: Final = 0.1
MAX_LOOK_S: Final = 1.0
LOOKS_IN_A_GRACE: Final = 20
RUNS_AT_ONCE: Final = 256


class Abandonment:
    """Looks after the runs of this process."""

    def __init__(self, log: JobLog, runs: Mapping[str, Run]) -> None:
        self._log = log
        self._runs = runs

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            due = [run for run in self._runs.values() if _is_due(run)]
            # On a cluster no command is for many, and a node that is away keeps nobody else waiting.
            size = 1 if self._log.keys.is_sharded else RUNS_AT_ONCE
            batches = [due[start : start + size] for start in range(0, len(due), size)]
            await asyncio.gather(*map(self._look, batches))

    async def _look(self, runs: Sequence[Run]) -> None:
        now = asyncio.get_running_loop().time()
        for run in runs:
            run.looked_at = now
        try:
            listened_to = await self._log.listened_to([run.job_id for run in runs])
            over = [run for run in runs if _is_over(run, is_watched=run.job_id in listened_to)]
            for run in over:
                if await self._log.is_marked_watched(run.job_id):
                    run.unwatched_since = None
                elif run.unwatched_since is not None:
                    want_cancel(run, abandoned())
        except RedisUnavailableError:
            for run in runs:
                run.unwatched_since = None  # nobody can tell

    async def waited_unwatched(self, run: Run) -> bool:
        """Whether nobody waits for a job that has itself waited for longer than its grace, before it streams.

        Relays that were cut off from Redis get as long to come back as in mid-stream.
        """
        waited_s = time.time() - run.record.created_at
        if run.record.options.on_abandon != "cancel" or waited_s <= _grace_s(run):
            return False
        while run.cause is None:
            try:
                if await self._log.is_watched(run.job_id):
                    return False
            except RedisUnavailableError:
                return False  # nobody can tell
            if asyncio.get_running_loop().time() >= run.writer.settled_at:
                return True
            await asyncio.sleep(MIN_LOOK_S)
        return False


def abandoned() -> CancelRequest:
    return CancelRequest("abandoned", time.time())


def _is_due(run: Run) -> bool:
    """Whether nobody has been seen to watch the run for a while, which may be its silence."""
    if run.record.options.on_abandon != "cancel" or run.cause is not None:
        return False
    pause_s = min(MAX_LOOK_S, max(MIN_LOOK_S, _grace_s(run) / LOOKS_IN_A_GRACE))
    seen_at = max(run.writer.watched_at, run.looked_at)
    return asyncio.get_running_loop().time() - seen_at >= pause_s


def _is_over(run: Run, *, is_watched: bool) -> bool:
    """Whether the grace is over, after a look; it counts from the first one that saw nobody."""
    now, writer = asyncio.get_running_loop().time(), run.writer
    if is_watched:
        writer.watched_at = now
    if writer.watched_at >= run.looked_at:  # seen just now, or by a publication since the look began
        run.unwatched_since = None
        return False
    if run.unwatched_since is None or run.unwatched_since < writer.watched_at:
        run.unwatched_since = now
    return now - run.unwatched_since >= _grace_s(run)


def _grace_s(run: Run) -> float:
    """Never so short that one look decides: a relay may just be connecting again."""
    return max(MIN_LOOK_S, run.record.options.abandon_grace_s)
