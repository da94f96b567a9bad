"""A run: one attempt while it streams. What may end it from outside comes in here."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

from deltawire.ending import Deadline
from deltawire.events import Timings
from deltawire.fold import Fold
from deltawire.log import AppendCode
from deltawire.record import CancelRequest, Record

from .writer import JobWriter


class Outcome(msgspec.Struct, frozen=True):
    """What became of a job; `code` is set where it has failed."""

    status: str
    code: str | None = None


class CancelWanted(msgspec.Struct, frozen=True):
    request: CancelRequest
    heard_at: float


class DeadlinePassed(msgspec.Struct, frozen=True):
    deadline: Deadline


class Refused(msgspec.Struct, frozen=True):
    """The log takes nothing more from this attempt, or Redis has taken nothing at all for too long."""

    code: AppendCode | Literal["UNREACHABLE"]


Cause = CancelWanted | DeadlinePassed | Refused


class Run:
    """The state of one attempt. Everything happens on the loop's thread."""

    def __init__(self, job_id: str, attempt: int, record: Record) -> None:
        self.job_id = job_id
        self.attempt = attempt
        self.record = record
        self.fold = Fold()
        self.writer: JobWriter  # set by whoever opens it with this run's callbacks
        self.cause: Cause | None = None
        self.over: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        """What became of the job; a second delivery of the job's message waits for it."""
        self.upstream_closed_at: float | None = None
        self.first_delta_at: float | None = None
        self.was_asked = False
        """Whether the upstream was, and has not refused: what it was asked is paid."""
        self.unanswered_renewals = 0
        self._is_listening = True
        self._streaming: asyncio.Task[object] | None = None
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._last_delta = self._started
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        """Streaming begins: from here `abort` interrupts the current task, and the deadlines run."""
        self._streaming = asyncio.current_task()
        if self.cause is not None:
            self._loop.call_soon(self._interrupt)
        self._watch()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """Streaming is over. Our own interruption ends here; anybody else's goes on."""
        task, self._streaming = self._streaming, None
        if self._timer is not None:
            self._timer.cancel()
        return (
            kind is asyncio.CancelledError
            and self.cause is not None
            and task is not None
            and task.uncancel() == 0
        )

    def abort(self, cause: Cause) -> None:
        """Interrupts the stream at once, if it still goes on. The first cause stays."""
        if self.cause is not None:
            return
        self.cause = cause
        if self._streaming is not None and asyncio.current_task() is self._streaming:
            # A task that cancels itself is interrupted at its next await, which may be after the stream.
            self._loop.call_soon(self._interrupt)
        else:
            self._interrupt()

    def _interrupt(self) -> None:
        if self._streaming is not None:
            self._streaming.cancel()

    def saw_delta(self, now: float) -> None:
        """Resets the idle clock. Data events count, bytes do not: comments hide a dead gateway."""
        self._last_delta = self._loop.time()
        if self.first_delta_at is None:
            self.first_delta_at = now
            self.writer.note("first_delta_at", round(now, 6))
            self._watch()

    @contextmanager
    def not_listening(self) -> Iterator[None]:
        """While the upstream is not read, its silence is ours."""
        self._is_listening = False
        try:
            yield
        finally:
            self._is_listening = True
            self._last_delta = self._loop.time()

    def timings(self, now: float) -> Timings:
        """Durations so far, of this attempt where it has come to deltas."""
        return msgspec.structs.replace(self.record, first_delta_at=self.first_delta_at).timings(now)

    def _watch(self) -> None:
        """One timer for all deadlines, set again only when it has fired."""
        options = self.record.options
        deadline: Deadline
        if self.first_delta_at is None:
            at, deadline = self._started + options.first_delta_timeout_s, "first_delta_timeout"
        else:
            last_delta = self._last_delta if self._is_listening else self._loop.time()
            at, deadline = last_delta + options.idle_timeout_s, "idle_timeout"
        total_at = self._started + options.timeout_s
        if total_at < at:
            at, deadline = total_at, "total_timeout"
        if self._timer is not None:
            self._timer.cancel()
        if self._loop.time() >= at:
            self.abort(DeadlinePassed(deadline))
        else:
            self._timer = self._loop.call_at(at, self._watch)
