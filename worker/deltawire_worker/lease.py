"""Leases: a worker's claims on its running jobs, renewed every second.

A renewal also finds a cancel key that somebody set without telling us, and that the attempt was taken
over by another worker.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Final

from deltawire.keys import ACTIVE_TTL_S
from deltawire.log import decode_cancel
from deltawire.redis_connection import Reply

from .cancellation import want_cancel
from .flusher import Flusher
from .run import Refused, Run

LEASE_S: Final = 5.0
RENEWAL_INTERVAL_S: Final = 1.0


class Leases:
    """Renews the lease of every run of this process."""

    def __init__(self, flusher: Flusher, owner: str, runs: Mapping[str, Run]) -> None:
        self._flusher = flusher
        self._owner = owner
        self._runs = runs

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(RENEWAL_INTERVAL_S)
            for run in tuple(self._runs.values()):
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

    @staticmethod
    def _answered(run: Run, reply: Reply) -> None:
        if reply[0] == b"STALE":
            run.abort(Refused("STALE"))
        elif request := decode_cancel(reply[1]):
            want_cancel(run, request)
