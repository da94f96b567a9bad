"""Jobs that wait for their upstream outside of any slot: their messages are sent again when they are due.

The record knows how long a job waits (`JobLog.park`), and a claim before that is refused. So nothing is lost
with this process: what it does not send any more, a sweeper does, once the job is due.
"""

import asyncio
import heapq
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any, Final, Protocol

import msgspec
from prometheus_client.core import Metric

from deltawire.ending import AsCancelled
from deltawire.errors import RedisUnavailableError, WireError
from deltawire.log import JobLog
from deltawire.metrics import gauge_family
from deltawire.record import CancelRequest

from .run import Outcome, Refused, Run

MAX_PARKED: Final = 100_000
"""Beyond that they are left to the sweepers."""
PAUSE_S: Final = 1.0
PARK_TIMEOUT_S: Final = 300.0
DRAIN_TIMEOUT_S: Final = 3.0

_log = logging.getLogger(__name__)


async def park(run: Run, delay_s: float, *, log: JobLog, owner: str) -> Outcome | AsCancelled:
    """Gives a run's job back to the queue for a while, or says why that cannot be.

    For 0 s: until it is its turn among its tenant's; then its message says again what it said besides.
    Cancelled meanwhile it leaves in `run.is_parked` what came of it. Raises RedisUnavailableError.
    """
    record = msgspec.structs.replace(
        run.record,
        attempt=run.attempt,
        retries=run.retries,
        waited_s=run.waited_s,
        attempt_began_at=run.began_at if delay_s else run.record.attempt_began_at,
        message=None if delay_s else run.said() or None,
    )
    try:
        async with asyncio.timeout(PARK_TIMEOUT_S):
            while True:
                await run.writer.written()
                if isinstance(run.cause, Refused):
                    break
                top = run.writer.next_number - 1
                call = asyncio.ensure_future(
                    log.park(run.job_id, owner=owner, record=record, top=top, delay_s=delay_s)
                )
                try:
                    code, wanted = await asyncio.shield(call)
                except asyncio.CancelledError:
                    run.is_parked = (await call)[0] == "PARKED"
                    raise
                if code == "PARKED":
                    run.is_parked = True
                    return Outcome("queued", again_in_s=delay_s or None, is_held=not delay_s)
                if code == "CANCELLED":
                    return AsCancelled(wanted or CancelRequest(), time.time(), run.upstream_closed_at)
                if code == "STALE":
                    break
                run.writer.rewrite()  # Redis has lost the job, or a part of its log
    except TimeoutError as error:
        raise RedisUnavailableError(f"job {run.job_id} could not be parked") from error
    run.warn_of_refusal("STALE")
    return Outcome("in_progress")


class Sender(Protocol):
    """The broker. Blocks and raises WireError `queue_unavailable`."""

    def send(self, job_id: str, **message: Any) -> None: ...


class Parking:
    """Those that this process has parked, or whose messages came to it too early."""

    def __init__(self, queue: Sender) -> None:
        self._queue = queue
        self._jobs: list[tuple[float, int, str, dict[str, Any]]] = []  # a heap, by when they are due
        self._order = count()
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def collect(self) -> Iterator[Metric]:
        yield gauge_family("deltawire_jobs_parked", "Jobs that this process has parked.", len(self))

    def put(self, job_id: str, delay_s: float, **message: Any) -> None:
        """Sends the job's message after the delay; `message` is what it said besides (`link`, `chain`)."""
        if len(self._jobs) < MAX_PARKED:
            due = asyncio.get_running_loop().time() + delay_s
            heapq.heappush(self._jobs, (due, next(self._order), job_id, message))
            self._news.set()

    async def keep(self) -> None:
        """Until cancelled; what was being sent then may be sent twice, which claims make harmless."""
        loop = asyncio.get_running_loop()
        while True:
            self._news.clear()
            if not self._jobs:
                await self._news.wait()
            elif (delay_s := self._jobs[0][0] - loop.time()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._news.wait()
            elif not await self._send_first():
                await asyncio.sleep(PAUSE_S)

    async def drain(self) -> None:
        """Sends all messages now: who takes one too early parks it, and a new worker finds it in the queue.

        Gives up after DRAIN_TIMEOUT_S, or when the broker is away.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while self._jobs and await self._send_first():
                    pass
        if self._jobs:
            _log.warning("%d messages of parked jobs are left to sweepers", len(self._jobs))

    async def _send_first(self) -> bool:
        job = heapq.heappop(self._jobs)
        _, _, job_id, message = job
        is_sent = False
        try:
            await asyncio.to_thread(self._queue.send, job_id, **message)
            is_sent = True
        except WireError as error:
            _log.warning("cannot send the message of a parked job: %s", error, extra={"job_id": job_id})
        finally:
            if not is_sent:
                heapq.heappush(self._jobs, job)
        return is_sent
