"""A run: one attempt while it streams. What may end it from outside comes in here."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import msgspec

from deltawire.codec import encode
from deltawire.ending import Deadline, Ending
from deltawire.events import InProgress, Queued, Restarted, Retrying, Timings
from deltawire.fold import Fold
from deltawire.log import AppendCode
from deltawire.record import CancelRequest, Record
from deltawire.tracing import NO_SPAN, Span

from .writer import JobWriter

LINGER_S: Final = 5.0
"""How long a gateway that has said all has to end the stream."""

_log = logging.getLogger(__name__)


class Outcome(msgspec.Struct, frozen=True):
    """What became of a job; `code` is set where it has failed, `again_in_s` where it is parked so long.

    `is_held`: it waits for its turn among its tenant's.
    """

    status: str
    code: str | None = None
    again_in_s: float | None = None
    is_held: bool = False


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
        self.top = 0
        """The last number before this attempt's."""
        self.span: Span = NO_SPAN
        self.cause: Cause | None = None
        self.over: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        """What became of the job; a second delivery of the job's message waits for it."""
        self.upstream_closed_at: float | None = None
        self.first_delta_at: float | None = None
        self.retries = record.retries
        self.waited_s = record.waited_s
        self.is_done = False
        """Whether the upstream has said that it was all."""
        self.is_parked = False
        self.said: Callable[[], bytes] = bytes
        """What the job's message said besides; JSON, or nothing."""
        self.has_place = False
        """Whether it is among those of its tenant that may run."""
        self.ending: Ending | None = None
        """How it has ended, once that is known."""
        self.was_asked = False
        """Whether the upstream was, and has not refused: what it was asked is paid."""
        self.unanswered_renewals = 0
        self.looked_at = -math.inf
        """When Redis was last asked whether somebody watches. Loop time, as below."""
        self.unwatched_since: float | None = None
        """Since when nobody was seen to watch; None: somebody was."""
        self._is_listening = True
        self._streaming: asyncio.Task[object] | None = None
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._asked_at: float | None = self._started
        self._idle_timeout_s = record.options.idle_timeout_s
        self._last_delta = self._started
        if record.attempt_began_at is not None:  # before it was parked; waits count
            self._started -= max(0.0, time.time() - record.attempt_began_at)
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

    @property
    def log_fields(self) -> dict[str, object]:
        """For lines of our own log."""
        return {**self.record.log_fields(self.job_id), "attempt": self.attempt}

    @property
    def written(self) -> int:
        """How many events this attempt has put."""
        return self.writer.next_number - 1 - self.top

    @property
    def began_at(self) -> float:
        """When the attempt began, as Unix time."""
        return time.time() - (self._loop.time() - self._started)

    @property
    def left_s(self) -> float:
        """How long the attempt may still take."""
        return self._started + self.record.options.timeout_s - self._loop.time()

    @contextmanager
    def not_asking(self) -> Iterator[None]:
        """While the upstream is not asked, it need not answer; when it is again, it has its time anew."""
        self._asked_at = None
        self._watch()
        try:
            yield
        finally:
            self._asked_at = self._loop.time()
            self._watch()

    def put(self, kind: type[Queued | InProgress | Retrying | Restarted], **fields: Any) -> None:
        """Appends an event that is no delta."""
        event = kind(
            job_id=self.job_id,
            sequence_number=self.writer.next_number,
            attempt=self.attempt,
            created_at=time.time(),
            **fields,
        )
        self.writer.put(encode(event))

    def warn_of_refusal(self, code: str) -> None:
        """Says in our log that the job's log takes nothing more from this attempt."""
        refusal = self.cause.code if isinstance(self.cause, Refused) else code
        _log.warning("the log takes no more: %s", refusal, extra=self.log_fields)

    def saw_all(self) -> None:
        """Every choice has ended, and usage has come: what is left is [DONE], or the end of the body."""
        if self._idle_timeout_s > LINGER_S:
            self._idle_timeout_s = LINGER_S
            self._watch()

    def saw_delta(self, now: float) -> float:
        """Resets the idle clock. Data events count, bytes do not: comments hide a dead gateway.

        Returns for how long the upstream was silent: since the last delta, or since it was asked.
        """
        before, self._last_delta = self._last_delta, self._loop.time()
        if self.first_delta_at is None:
            before = self._asked_at or self._started
            self.first_delta_at = now
            self.writer.note("first_delta_at", round(now, 6))
            self._watch()
        return self._last_delta - before

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
            asked_at = math.inf if self._asked_at is None else self._asked_at
            at, deadline = asked_at + options.first_delta_timeout_s, "first_delta_timeout"
        else:
            last_delta = self._last_delta if self._is_listening else self._loop.time()
            at, deadline = last_delta + self._idle_timeout_s, "idle_timeout"
        total_at = self._started + options.timeout_s
        if total_at < at:
            at, deadline = total_at, "total_timeout"
        if self._timer is not None:
            self._timer.cancel()
        if self._loop.time() >= at:
            self.abort(DeadlinePassed(deadline))
        else:
            self._timer = self._loop.call_at(at, self._watch)
