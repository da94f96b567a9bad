"""The sweeper: ends or restarts what nobody looks after any more (PROTOCOL.md §2.4).

Every worker and every relay runs one. It finds jobs of workers that died, jobs that have waited too long, and
queued jobs whose message the broker has lost. The sets of `Index` tell it where to look, the record decides,
and a claim fences whatever it does, so any number of sweepers may look at the same job.

A lost lease is believed at the second look, a lease after the first one, and only if Redis was quick and
sound all the while: a Redis that stalls for some seconds makes every lease run out, and every owner renews
its own as soon as it can.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Final, Literal, Protocol, TypeVar

from prometheus_client.core import Metric

from .ending import AsCancelled, Ending, as_lost, as_queue_timeout
from .errors import RedisRefusedError, RedisUnavailableError, WireError
from .keys import LEASE_S
from .log import Head, JobLog
from .log_fold import LogFold, fold_pages
from .metrics import counter_family, gauge_family
from .record import Record
from .recover import End, recover
from .turns import Turns

INTERVAL_S: Final = 1.0
SLOW_S: Final = 1.0
BATCH: Final = 100
MAX_LOOKED_AT: Final = 1_000
AT_ONCE: Final = 100
LOST_MESSAGE_INTERVAL_S: Final = 10.0
PARKED_SLACK_S: Final = 2.0  # who has parked a job sends its message when it is due, if it lives
RESEND_PAUSE_S: Final = 60

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Queue(Protocol):
    """The broker. Both block and raise WireError `queue_unavailable`."""

    def send(self, job_id: str, **message: Any) -> None: ...
    def depth(self) -> int:
        """How many messages wait."""


class Sweeper:
    """Looks once a second. One for a process."""

    def __init__(self, log: JobLog, queue: Queue, *, owner: str) -> None:
        self._log = log
        self._index = log.index
        self._queue = queue
        self._turns = Turns(log, queue)
        self._owner = owner
        self._looks: dict[tuple[str, int, int | None], float] = {}
        """When an expired lease was seen first, by job, attempt and lease. Loop time."""
        self._seen: set[tuple[str, int, int | None]] = set()
        """Those that were seen in this sweep."""
        self._unsent: set[str] = set()
        """Jobs that are queued while the broker's queue is empty."""
        self._unsent_before: set[str] = set()
        self._reported: set[str] = set()
        self._looked_at_queue = asyncio.get_running_loop().time()
        self._queued = self._resent = 0
        self._sweeps = {"done": 0, "failed": 0}
        self._endings = {"worker_lost": 0, "queue_timeout": 0}

    def report(self, job_id: str) -> None:
        """Somebody saw that this job has waited for too long, or that its lease has run out."""
        self._reported.add(job_id)

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            result = "failed"
            try:
                await self.sweep()
                result = "done"
            except RedisUnavailableError as error:
                self._forget_looks()
                _log.warning("cannot sweep: %s", error)
            except WireError as error:
                _log.warning("cannot sweep: %s", error)
            except Exception:  # noqa: BLE001 - the outer edge: who never sweeps again is missed by nobody
                _log.exception("cannot sweep")
            self._sweeps[result] += 1

    def collect(self) -> Iterator[Metric]:
        yield gauge_family(
            "deltawire_jobs_queued",
            "Jobs of the whole installation that wait for a worker, as this process saw it last.",
            self._queued,
        )
        yield counter_family(
            "deltawire_sweeps_total", "Looks at what nobody looks after.", self._sweeps, ["result"]
        )
        yield counter_family(
            "deltawire_sweeper_endings_total",
            "Jobs that the sweeper of this process has ended.",
            self._endings,
            ["reason"],
        )
        yield counter_family(
            "deltawire_jobs_resent_total",
            "Messages of jobs that were sent again, since the broker or a worker had lost them.",
            self._resent,
        )

    async def sweep(self) -> None:
        """One look at everything. Raises RedisUnavailableError and WireError `queue_unavailable`."""
        self._seen.clear()
        self._reported.difference_update(await self._where(self._reported, self._is_not_lost))
        for owner in await self._quickly(self._index.lost_owners()):
            jobs = await self._quickly(self._index.jobs_of(owner))
            if not jobs:
                await self._index.forget(owner)
            await self._index.has_run(owner, await self._where(jobs, self._is_over))
        self._looks = {look: at for look, at in self._looks.items() if look in self._seen}
        overdue = await self._quickly(self._index.overdue(time.time(), BATCH))
        await self._index.left_queue(await self._where(overdue, self._waits_no_more))
        too_long = await self._quickly(self._index.held_too_long(time.time(), BATCH))
        await self._index.left_hold(await self._where(too_long, self._waits_no_more))
        await self._turns.call_all()
        await self._bring_back()
        now = asyncio.get_running_loop().time()
        if now - self._looked_at_queue >= LOST_MESSAGE_INTERVAL_S:
            self._looked_at_queue = now
            await self._index.left_hold(
                await self._where(await self._index.some_held(BATCH), self._is_not_held)
            )
            await self._send_lost()
        self._queued = await self._index.waiting()

    # Lost workers.

    async def _look(self, job_id: str) -> Literal["over", "held", "lost"]:
        """Deals with a job whose worker seems lost, and says whether it still is."""
        head = await self._quickly(self._log.head(job_id), job_id)
        record, left_s = head.record, head.lease_left_s
        if record is not None and record.status == "queued":
            return "over" if await self._end_overdue(job_id, head) else "held"
        if record is None or record.status != "in_progress" or left_s is None:
            return "over"
        if left_s > 0:
            return "held"
        look = (job_id, record.attempt, record.lease_until)
        self._seen.add(look)
        now = asyncio.get_running_loop().time()
        if now - self._looks.setdefault(look, now) < LEASE_S:
            return "lost"
        return "over" if await self._recover(job_id, record, lost_for_s=-left_s) else "lost"

    async def _is_over(self, job_id: str) -> bool:
        # A job that is held stays with the lost owner: whoever holds it may be a sweeper that dies.
        return await self._look(job_id) == "over"

    async def _is_not_lost(self, job_id: str) -> bool:
        return await self._look(job_id) != "lost"

    async def _recover(self, job_id: str, record: Record, *, lost_for_s: float) -> bool:
        """Ends the job, or sends its message once more. Whether it has ended."""
        decision = recover(record)
        may_wait = not isinstance(decision, End) and lost_for_s < record.options.queue_timeout_s
        if may_wait and await self._log.cancel_request(job_id) is None:
            await self._send(job_id, record)
            return False
        claim = await self._log.claim(job_id, owner=self._owner, lease_s=LEASE_S, take_over=record.attempt)
        if claim.code != "CLAIMED" or claim.record is None:
            return claim.code in {"ENDED", "MISSING"}
        _log.warning("ending a job whose worker is lost", extra=record.log_fields(job_id))
        code = decision.code if isinstance(decision, End) else "worker_lost"
        ending: Ending = as_lost(code)
        if claim.cancel is not None:
            ending = AsCancelled(claim.cancel, time.time(), None)
        log_fold = await fold_pages(LogFold(), self._log.pages(job_id))
        ended = await self._log.end(
            job_id,
            ending,
            record=claim.record,
            owner=self._owner,
            top=claim.top,
            fold=log_fold.fold,
            was_asked=log_fold.was_asked,
        )
        self._endings["worker_lost"] += ended in {"OK", "CANCELLING"}
        return ended in {"OK", "CANCELLING", "ENDED"}

    # Queued jobs.

    async def _waits_no_more(self, job_id: str) -> bool:
        return await self._end_overdue(job_id, await self._quickly(self._log.head(job_id), job_id))

    async def _end_overdue(self, job_id: str, head: Head) -> bool:
        """Ends a queued job that no worker took in time. Whether it is queued no more."""
        record = head.record
        if record is None or record.status != "queued":
            return True
        if time.time() <= record.queue_deadline:
            await self._index.waits_until(job_id, record.queue_deadline)
            return False
        ended = await self._log.end(job_id, as_queue_timeout(), record=record, top=head.top)
        self._endings["queue_timeout"] += ended in {"OK", "CANCELLING"}
        if ended == "CANCELLED":
            await self._log.cancel(job_id, reason="cancel_key")
        return True

    async def _send_lost(self) -> None:
        """Sends messages again that the broker lost: those of jobs that wait while its queue is empty.

        Twice seen so: a message is in nobody's queue while it is on its way to a worker.
        """
        self._unsent_before, self._unsent = self._unsent, set()
        looked_at, gone = 0, list[str]()
        # Parked jobs are among them, and may be all that come first.
        while looked_at < MAX_LOOKED_AT and len(self._unsent) < BATCH:
            waiting = await self._index.queued(BATCH, looked_at)
            if not waiting or (looked_at == 0 and await asyncio.to_thread(self._queue.depth) > 0):
                break
            gone += await self._where(waiting, self._has_left_queue)
            looked_at += len(waiting)
        await self._index.left_queue(gone)

    async def _has_left_queue(self, job_id: str) -> bool:
        """Sends the message of a job that was queued at the last look, too. Whether it is queued no more."""
        record = (await self._quickly(self._log.head(job_id), job_id)).record
        if record is None:
            return False  # its record may come just now; at its deadline it is looked at again
        if record.status != "queued":
            return True
        if record.is_parked(time.time()):
            return False  # it waits for its time, not for its message
        self._unsent.add(job_id)
        if job_id in self._unsent_before:
            await self._send(job_id, record)
        return False

    async def _is_not_held(self, job_id: str) -> bool:
        """Has a job that waits for its turn, and was forgotten, wait again. Whether it waits no more."""
        record = await self._quickly(self._log.summary(job_id), job_id)
        if record is None:
            return False  # as above
        if record.status == "queued" and await self._log.places.admit(job_id, record) == "ADMITTED":
            await self._turns.call(record.tenant, [job_id])
        return record.status not in {"queued", "in_progress"}

    async def _bring_back(self) -> None:
        """Sends messages of parked jobs that are due, and that nobody has sent: the queue is empty."""
        due = await self._quickly(self._index.due(time.time() - PARKED_SLACK_S, BATCH))
        if due and await asyncio.to_thread(self._queue.depth) == 0:
            await self._index.left_parking(await self._where(due, self._has_left_parking))

    async def _has_left_parking(self, job_id: str) -> bool:
        """Sends the message of a job that is due. Whether it is parked no more."""
        record = (await self._quickly(self._log.head(job_id), job_id)).record
        if record is not None and record.status == "queued":
            if record.is_parked(time.time()):
                return False
            await self._send(job_id, record)
        return True

    async def _send(self, job_id: str, record: Record) -> None:
        """Sends a job's message, unless some sweeper did so in the last minute. Claims make it harmless."""
        if await self._index.may_send(job_id, RESEND_PAUSE_S):
            _log.info("sending the message of a job again", extra=record.log_fields(job_id))
            try:
                await asyncio.to_thread(self._queue.send, job_id, **record.message_options())
                self._resent += 1
            except WireError:
                await self._index.was_not_sent(job_id)
                raise

    # Looking.

    async def _where(self, job_ids: Iterable[str], is_so: Callable[[str], Awaitable[bool]]) -> list[str]:
        """Those jobs of which it is so; some at a time, in an order that other sweepers do not have.

        A job that cannot be looked at keeps nobody from the others. Raises RedisUnavailableError where all
        are on the server that does not answer.
        """
        left = list(job_ids)
        random.shuffle(left)
        found: list[str] = []
        while left:
            some, left = left[:AT_ONCE], left[AT_ONCE:]
            answers = await asyncio.gather(*map(is_so, some), return_exceptions=True)
            for job_id, answer in zip(some, answers, strict=True):
                if isinstance(answer, WireError | RedisRefusedError):
                    _log.warning("cannot look after a job: %s", answer, extra={"job_id": job_id})
                elif isinstance(answer, RedisUnavailableError) and self._log.keys.is_sharded:
                    self._forget_looks(job_id)
                elif isinstance(answer, RedisUnavailableError) or not isinstance(answer, bool | Exception):
                    raise answer
                elif isinstance(answer, Exception):
                    _log.error("cannot look after a job", exc_info=answer, extra={"job_id": job_id})
                elif answer:
                    found.append(job_id)
        return found

    async def _quickly(self, answer: Awaitable[_T], job_id: str = "") -> _T:
        """The answer; one that took long makes what was seen before it worthless."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        try:
            return await answer
        finally:
            if loop.time() - asked_at > SLOW_S:
                self._forget_looks(job_id)

    def _forget_looks(self, job_id: str = "") -> None:
        """Redis was slow or away. On a cluster that is one server, and says nothing about jobs on others."""
        if not self._log.keys.is_sharded:
            self._looks.clear()
        elif job_id:
            self._looks = {look: at for look, at in self._looks.items() if look[0] != job_id}
