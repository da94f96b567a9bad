"""The places that this process' runs have among those of their tenants (see deltawire.places)."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Final

from deltawire.errors import RedisUnavailableError
from deltawire.places import Places
from deltawire.turns import Turns

from .run import Run

KEEP_INTERVAL_S: Final = 5.0
TENANTS_AT_ONCE: Final = 8

_log = logging.getLogger(__name__)


class Quotas:
    """Keeps the places of all runs, and hands on those of runs that are over: some at a time, in one call."""

    def __init__(self, places: Places, turns: Turns, runs: Mapping[str, Run]) -> None:
        self._places = places
        self._turns = turns
        self._runs = runs
        self._left: dict[str, set[str]] = defaultdict(set)
        self._news = asyncio.Event()

    async def admit(self, run: Run) -> bool:
        """Whether a run may go on; else its job waits for its turn."""
        # Of attempts that follow another one, that had it.
        run.has_place = run.attempt > 1 or run.record.is_admitted
        if not run.has_place:
            try:
                run.has_place = await self._places.admit(run.job_id, run.record, runs=True) == "ADMITTED"
            except RedisUnavailableError as error:
                # A quota is no reason to fail a job: it goes on, and has a place when Redis can be reached.
                _log.warning("cannot ask for a place: %s", error, extra=run.log_fields)
                run.has_place = True
        return run.has_place

    def left(self, run: Run) -> None:
        """The job has ended, or is not ours any more."""
        self._left[run.record.tenant].add(run.job_id)
        self._news.set()

    async def keep(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        kept_at = loop.time()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(KEEP_INTERVAL_S):
                    await self._news.wait()
            self._news.clear()
            left, self._left = self._left, defaultdict(set)
            kept: dict[str, list[str]] = {}
            if loop.time() - kept_at >= KEEP_INTERVAL_S:
                kept_at = loop.time()
                for run in filter(attrgetter("has_place"), self._runs.values()):
                    kept.setdefault(run.record.tenant, []).append(run.job_id)
            tenants = list(left.keys() | kept.keys())
            for start in range(0, len(tenants), TENANTS_AT_ONCE):
                some = tenants[start : start + TENANTS_AT_ONCE]
                calls = (self._go_on(tenant, left.get(tenant, ()), kept.get(tenant, ())) for tenant in some)
                await asyncio.gather(*calls)

    async def _go_on(self, tenant: str, left: Iterable[str], kept: Collection[str]) -> None:
        over = [job_id for job_id in left if job_id not in self._runs]
        try:
            await self._turns.go_on(tenant, left=over, kept=kept)
        except RedisUnavailableError as error:
            # The places lapse by themselves.
            _log.warning("cannot hand on the places of tenant %s: %s", tenant, error)
