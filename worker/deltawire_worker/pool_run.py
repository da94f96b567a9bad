"""One run of one task in the pool: its greenlet, its coroutine, the report of its end. See `pool.py`."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded, Terminated
from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]  # ships no types

T = TypeVar("T")
Callback: TypeAlias = Callable[..., object]
#: A callback of the run's `Request` and its arguments; `None` tells the request nothing.
Report: TypeAlias = tuple[Callback, tuple[Any, ...]] | None

logger = logging.getLogger(__name__)

#: How long cancelled coroutines have for their `finally` blocks, and after that the lifespan for its exit.
CLEANUP_GRACE_S = 5.0


class Cancellation(enum.Enum):
    """Why a running task was told to stop."""

    REVOKED = enum.auto()  #: `revoke(terminate=True)` by task id; its message is acknowledged
    TIME_LIMIT = enum.auto()  #: a soft or hard time limit
    SHUTDOWN = enum.auto()  #: given up by this worker; unless the task succeeds, its message goes back


_current_run: ContextVar[Run] = ContextVar("_current_run")


def await_(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the pool's loop from within a task body; return its result or raise its exception.

    The coroutine is an `asyncio.Task` of its own, so time-outs, task groups and cancellation work as usual.
    When the task is cancelled, the coroutine sees `CancelledError` at its await, and this call raises what
    the coroutine raises then; at the soft time limit it raises `SoftTimeLimitExceeded` in place of the
    `CancelledError`. A body may catch either and call `await_` again to clean up.

    Raises `RuntimeError`, and closes the coroutine, outside the body of a task that this pool runs.
    """
    run = _current_run.get(None)
    if run is None or getcurrent() is not run.greenlet:
        coroutine.close()
        raise RuntimeError(
            "await_() works only in the body of a task that a deltawire_worker.pool:TaskPool runs. "
            "In a coroutine, use `await`; in a test or with task_always_eager, use asyncio.run()."
        )
    result: T = run.run_coroutine(coroutine)
    return result


def cancellation() -> Cancellation | None:
    """Say why the current task was told to stop; `None` if it was not, or outside a task.

    For its body and any coroutine under it. A revocation by stamped headers reads as `SHUTDOWN`:
    Celery tells a pool no more than "terminate".
    """
    run = _current_run.get(None)
    return None if run is None else run.cancelled_by


class Mailbox:
    """Calls on their way from the loop thread to the hub thread, in the order of posting."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callback, tuple[Any, ...]]] = deque()  # append and popleft are atomic
        if hasattr(os, "eventfd"):
            self._reader = self._writer = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._reader, False)
            os.set_blocking(self._writer, False)
        # Not closed on stop: a signal handler may have stopped the pool while the hub polls the descriptor.
        for descriptor in {self._reader, self._writer}:
            weakref.finalize(self, os.close, descriptor)

    def fileno(self) -> int:
        return self._reader

    def post(self, callback: Callback, *args: Any) -> None:
        self._calls.append((callback, args))
        with suppress(BlockingIOError):  # a full pipe wakes the reader as well
            os.write(self._writer, (1).to_bytes(8, sys.byteorder))

    def deliver(self) -> None:
        """Make all posted calls. Never raises: one broken request must not hold up the others."""
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)  # before the calls: a post from here on wakes the reader again
        while self._calls:
            callback, args = self._calls.popleft()
            try:
                callback(*args)
            except Exception:
                logger.exception("Task callback %r raised", callback)


class Pool(Protocol):
    """What a run needs of its pool."""

    mailbox: Mailbox

    def terminate_job(self, pid: int, signal: int | None = None) -> None: ...
    def on_run_ended(self, run: Run, report: Report) -> None: ...


@dataclass(slots=True, weakref_slot=True, eq=False)  # `Request` keeps a weak reference
class Run:
    """One run of one task, alive from `TaskPool.on_apply` until the hub thread has heard of its end.

    Unless said otherwise the methods belong to the loop's thread. Two runs may carry the same task id:
    after a lost connection the broker delivers a message again that is still being worked on.
    """

    pool: Pool
    pid: int
    task_id: str
    target: Callable[[], tuple[int, Any, float]]
    callback: Callback
    error_callback: Callback
    accept_callback: Callback
    timeout_callback: Callback
    soft_limit_s: float | None
    hard_limit_s: float | None
    greenlet: Any = None
    cancelled_by: Cancellation | None = None
    _signal: int | None = None  # set: Celery cancelled it and knows it; None: the pool did
    _is_stopping: bool = False  # cancelled for good, which a soft limit is not
    _task: asyncio.Task[Any] | None = None
    _timers: list[asyncio.TimerHandle] = field(default_factory=list)
    _interruption: type[BaseException] | None = None
    _is_interruption_delivered: bool = False

    @property
    def name(self) -> str:
        return f"task {self.task_id}"

    def terminate(self, signal: int) -> None:
        """Hub thread: what `Request` calls on the result of `apply_async`."""
        self.pool.terminate_job(self.pid, signal)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.pool.mailbox.post(self.accept_callback, self.pid, time.monotonic())
        if self.soft_limit_s:
            self._timers.append(loop.call_later(self.soft_limit_s, self._reach_soft_limit))
        if self.hard_limit_s:
            self._timers.append(loop.call_later(self.hard_limit_s, self._reach_hard_limit))
        self.greenlet = greenlet(self._run)
        self.greenlet.switch()

    def _run(self) -> None:
        """The task's greenlet. No exception may leave it: its parent is the loop."""
        _current_run.set(self)  # a greenlet has a context of its own, which its asyncio tasks copy
        try:
            report = self._report_result(self.target())
        except BaseException as exc:  # noqa: BLE001 - the outer edge of a task
            report = self._report_exception(exc)
        for timer in self._timers:
            timer.cancel()
        self.pool.mailbox.post(self.pool.on_run_ended, self, report)
        self.greenlet = None  # breaks the reference cycle

    def run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._interruption is not None:
            coroutine.close()
            raise self._take_interruption()
        self._task = asyncio.get_running_loop().create_task(coroutine, name=self.name)
        self._task.add_done_callback(lambda _: self.greenlet.switch())
        self.greenlet.parent.switch()
        task, self._task = self._task, None
        if task.cancelled():
            raise self._take_interruption()
        if self._is_interruption_delivered:  # the coroutine dealt with it in its own way
            self._take_interruption()
        return task.result()

    def _interrupt(self, exception: type[BaseException]) -> None:
        self._interruption = exception
        # If the coroutine has just ended, the next `await_` raises it instead.
        self._is_interruption_delivered = self._task is not None and self._task.cancel()

    def _take_interruption(self) -> BaseException:
        exception, self._interruption = self._interruption or asyncio.CancelledError, None
        self._is_interruption_delivered = False
        return exception()

    def cancel(self, reason: Cancellation, signal: int | None = None) -> None:
        """Cancel once: whoever comes second must not break into the clean-up that the first one started."""
        if not self._is_stopping:
            self._is_stopping = True
            self.cancelled_by = reason
            self._signal = signal
            self._interrupt(asyncio.CancelledError)

    def _reach_soft_limit(self) -> None:
        if not self._is_stopping:
            self.cancelled_by = Cancellation.TIME_LIMIT
            self.pool.mailbox.post(self.timeout_callback, True, self.soft_limit_s)
            self._interrupt(SoftTimeLimitExceeded)

    def _reach_hard_limit(self) -> None:
        """Cancel, and go on cancelling: nobody else ends a task that swallows its cancellation."""
        if self._is_stopping:
            extra = {"job_id": self.task_id}
            logger.warning("A task still runs past its hard time limit; cancelling it again", extra=extra)
            self._interrupt(asyncio.CancelledError)
        else:
            self.cancel(Cancellation.TIME_LIMIT)
        self._timers.append(asyncio.get_running_loop().call_later(CLEANUP_GRACE_S, self._reach_hard_limit))

    def _report_result(self, result: tuple[int, Any, float]) -> Report:
        """The tracer came back: it has done all the bookkeeping of a success, failure or retry.

        A failure in answer to a cancellation (a `finally` block that raises) is still a cancellation, else
        a shutdown would acknowledge what it interrupted. A time limit's failure is final either way.
        """
        is_failed, value, _ = result
        is_interrupted = self._is_stopping and self.cancelled_by is not Cancellation.TIME_LIMIT
        if is_interrupted and is_failed and not isinstance(_unwrap(value), (Retry, Ignore, Reject)):
            return self._report_cancellation()
        return self.callback, (result,)

    def _report_exception(self, exc: BaseException) -> Report:
        """The tracer let an exception through: `CancelledError` and the like, `Reject`, `MemoryError`."""
        if self._is_stopping and not isinstance(exc, Reject):
            return self._report_cancellation()
        if not isinstance(exc, Exception) or isinstance(exc, MemoryError):
            # SystemExit, a stray CancelledError: the task failed, but no worker was lost. Celery would take
            # them for one (or, MemoryError, end the consumer) and deliver the message again and again.
            exc = RuntimeError(f"{self.name} ended by {exc!r}")
        return self.error_callback, (_describe(exc),)

    def _report_cancellation(self) -> Report:
        if self.cancelled_by is Cancellation.TIME_LIMIT:
            return self.timeout_callback, (False, self.hard_limit_s)
        if self._signal is None:
            # A request that was not cancelled itself takes `Terminated` for a revocation and acknowledges.
            return None
        return self.error_callback, (_describe(Terminated(-self._signal)),)


def _describe(exception: BaseException) -> ExceptionInfo:
    try:
        raise exception  # noqa: TRY301 - `ExceptionInfo` needs a traceback
    except BaseException:  # noqa: BLE001 - whatever it was given
        return ExceptionInfo()


def _unwrap(info: ExceptionInfo) -> Any:
    exception: Any = info.exception
    return exception.exc if isinstance(exception, ExceptionWithTraceback) else exception
