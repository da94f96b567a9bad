"""Leases: a worker's claims on its running jobs, renewed every second.

A renewal also finds a cancel key that somebody set without telling us, that the attempt was taken over by
another worker, and that Redis has lost the job.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

from prometheus_client.core import Metric

from deltawire.errors import RedisUnavailableError
from deltawire.index import Index
from deltawire.keys import ACTIVE_TTL_S, LEASE_S
from deltawire.metrics import counter_family
from deltawire.record import decode_cancel
from deltawire.redis_connection import Reply

from .cancellation import want_cancel
from .flusher import Flusher
from .run import Refused, Run
from .writer import STALL_TIMEOUT_S

RENEWAL_INTERVAL_S: Final = 1.0
MAX_UNANSWERED: Final = round(STALL_TIMEOUT_S / RENEWAL_INTERVAL_S)
REFILL_EVERY: Final = 30  # renewals

_log = logging.getLogger(__name__)


class Leases:
    """Renews the lease of every run of this process."""

    def __init__(self, flusher: Flusher, owner: str, runs: Mapping[str, Run]) -> None:
        self._flusher = flusher
        self._owner = owner
        self._runs = runs
        self._renewals = self._lost = 0

    def collect(self) -> Iterator[Metric]:
        yield counter_family(
            "deltawire_lease_renewals_total", "Renewals that Redis has answered.", self._renewals
        )
        yield counter_family(
            "deltawire_leases_lost_total", "Leases that another worker has taken over.", self._lost
        )

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(RENEWAL_INTERVAL_S)
            for run in tuple(self._runs.values()):
                # Counted, not timed: a process that was stopped for a while has not been waiting.
                run.unanswered_renewals += 1
                if run.unanswered_renewals > MAX_UNANSWERED:
                    run.abort(Refused("UNREACHABLE"))
                self.renew(run)

    def renew(self, run: Run) -> None:
        """Renews one lease now, out of turn."""
        self._renew(run, LEASE_S)

    def release(self, run: Run) -> None:
        """Lets the lease run out now, so that another worker need not wait for it."""
        self._renew(run, 0)

    def _renew(self, run: Run, lease_s: float) -> None:
        args = (self._owner, run.attempt, round(lease_s * 1000), ACTIVE_TTL_S)
        self._flusher.renew(run.job_id, args, partial(self._answered, run))

    def _answered(self, run: Run, reply: Reply) -> None:
        self._renewals += 1
        run.unanswered_renewals = 0
        if reply[0] == b"STALE":
            self._lost += 1
            run.abort(Refused("STALE"))
        elif reply[0] == b"MISSING":
            run.writer.rewrite()
        elif request := decode_cancel(reply[1]):
            want_cancel(run, request)


class Presence:
    """Tells sweepers that this process lives and which jobs are its own (see Index)."""

    def __init__(self, index: Index, owner: str, runs: Mapping[str, Run]) -> None:
        self._index = index
        self._owner = owner
        self._runs = runs
        self._claimed: set[str] = set()
        self._over: set[str] = set()

    async def begins(self, job_id: str) -> None:
        """Before a claim. Raises RedisUnavailableError."""
        self._over.discard(job_id)
        await self._index.will_run(self._owner, (job_id,))

    def claimed(self, job_id: str) -> None:
        """The job waits no more. Told with the next renewal."""
        self._claimed.add(job_id)

    def queues(self, job_id: str) -> None:
        """Before a job that was claimed is queued again."""
        self._claimed.discard(job_id)

    def ended(self, job_id: str) -> None:
        """The job is not ours (any more). Told with the next renewal."""
        self._over.add(job_id)

    async def keep(self) -> None:
        """Until cancelled."""
        renewals = 0
        while True:
            try:
                is_news = await self._index.lives(self._owner, LEASE_S)
                if is_news or renewals % REFILL_EVERY == 0:  # Redis has lost them, or some node of it has
                    await self._index.will_run(self._owner, tuple(self._runs))
                claimed = tuple(self._claimed)  # now: one that queues again meanwhile must stay in the set
                await self._index.left_queue(claimed)
                self._claimed.difference_update(claimed)
                over = tuple(self._over - self._runs.keys())  # now: one that comes again must stay
                await self._index.has_run(self._owner, over)
                self._over.difference_update(over)
            except RedisUnavailableError as error:
                _log.warning("cannot say that this worker lives: %s", error)
            renewals += 1
            await asyncio.sleep(RENEWAL_INTERVAL_S)
