"""A Celery task pool on one asyncio loop: `worker_pool = "deltawire_worker.pool:TaskPool"`.

Two threads. The main thread is Celery's, untouched: hub, consumer, acknowledgements. The other one runs
an asyncio loop (uvloop where installed). Every task gets a greenlet on the loop's thread that runs Celery's
stock tracer, so signals, retries, `link=` and errors are Celery's own. The task body is plain `def`; where
it has to wait it calls `await_(coroutine)`, which parks the greenlet while the coroutine runs as an
`asyncio.Task`. Nothing is monkey-patched: Celery's thread-locals already key on greenlets.

What the hub thread must hear (accepted, timed out, done) travels through one `Mailbox`, in order.
`hub.call_soon` would not do: it keeps a set.

    hub thread                                        loop thread
    apply_async ------ call_soon_threadsafe ------>   Run.start: accepted, greenlet, tracer, body
    terminate_job ---- call_soon_threadsafe ------>   Run.cancel: CancelledError in the coroutine
    Request.on_* <---- mailbox: deque and eventfd --  accepted, soft limit, end

Resources: if the Celery app has an attribute `pool_lifespan`, it is called without arguments and must
return an async context manager. That is entered on the loop before the worker consumes anything (an
exception there is the worker's failure to start) and left on the loop after the last task.

Draining: an attribute `pool_drain_timeout_s` of the app bounds a warm shutdown (SIGTERM); what runs longer
is cancelled and its message goes back to the broker. It does what Celery's soft shutdown does, without the
hub asleep: tasks are acknowledged as they end, and the worker leaves as soon as the last one has.

Known limits: code of a task body outside `await_`, and the tracer's own broker calls (`retry`,
`link=`), block the loop while they run. A body that does not come back to `await_` cannot be stopped.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import select
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from celery.concurrency.base import BasePool
from celery.exceptions import (
    ImproperlyConfigured,
)
from celery.utils.functional import noop
from celery.utils.threads import USE_FAST_LOCALS
from celery.worker import state as worker_state
from kombu.message import Message

from .pool_run import CLEANUP_GRACE_S, Cancellation, Mailbox, Report, Run, await_, cancellation

new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with suppress(ImportError):  # not on every platform
    from uvloop import new_event_loop

__all__ = ("Cancellation", "TaskPool", "await_", "cancellation")

logger = logging.getLogger(__name__)

#: CPython's default of 5 ms is what the hub thread would wait for the GIL after each of its blocking Redis
#: round trips whenever the loop is busy. Acknowledging one task takes several round trips.
SWITCH_INTERVAL_S = 0.0005


class TaskPool(BasePool):  # type: ignore[misc]  # Celery ships no types
    """See the module. Methods are the hub thread's unless said otherwise."""

    #: Admission is Celery's own semaphore, so that what waits for a slot is still checked for revocation
    #: and expiry when its turn comes, and is forgotten when the broker connection is lost.
    uses_semaphore = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mailbox = Mailbox()
        self._runs: dict[int, Run] = {}
        self._pids = itertools.count(1)
        self._hub: Any = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._is_stopped = False

    # -- start

    def on_start(self) -> None:
        """Start the loop and enter the lifespan. Raises what the lifespan raises."""
        if self.options.get("threads", True):
            raise ImproperlyConfigured(
                f"{type(self).__name__} needs Celery's event loop: a broker transport that is asynchronous "
                "(Redis, Sentinel, AMQP, SQS), not Windows, not under gevent or eventlet."
            )
        if USE_FAST_LOCALS:
            raise ImproperlyConfigured("USE_FAST_LOCALS makes concurrent tasks share one task.request")
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        started: futures.Future[None] = futures.Future()
        # A daemon, so that a coroutine that refuses to end cannot keep the process.
        self._thread = threading.Thread(
            target=self._run_loop, args=(started,), name="task-pool-loop", daemon=True
        )
        self._thread.start()
        while not futures.wait([started], timeout=1.0).done:
            worker_state.maybe_shutdown()  # a signal ends the wait for a lifespan that hangs
        started.result()

    def did_start_ok(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def register_with_event_loop(self, hub: Any) -> None:
        """Called again after each loss of the broker connection, which clears the hub's readers."""
        self._hub = hub
        hub.add_reader(self.mailbox.fileno(), self._deliver)

    def _run_loop(self, started: futures.Future[None]) -> None:
        """Loop thread: the whole of it."""
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            loop = runner.get_loop()
            serving = loop.create_task(self._serve(started))
            while not serving.done():
                try:
                    loop.run_until_complete(serving)
                except (SystemExit, KeyboardInterrupt) as exc:
                    # asyncio lets these out of the loop; one task must not end the others.
                    logger.error("A task raised %r on the pool's loop; going on", exc)  # noqa: TRY400
                except Exception:
                    logger.exception("pool_lifespan failed on exit")

    async def _serve(self, started: futures.Future[None]) -> None:
        """Loop thread: keep the lifespan open until the pool closes."""
        lifespan = getattr(self.app, "pool_lifespan", None)
        async with AsyncExitStack() as stack:
            try:
                if lifespan is not None:
                    await stack.enter_async_context(lifespan())
            except BaseException as exc:  # noqa: BLE001 - raised in `on_start`
                started.set_exception(exc)
                return
            self._loop = asyncio.get_running_loop()
            self._closing = asyncio.Event()
            started.set_result(None)
            await self._closing.wait()

    # -- run

    def on_apply(self, target: Callable[..., Any], args: Any, kwargs: Any, **options: Any) -> Run | None:
        """Start a run. While the pool closes nothing starts; the message stays unacknowledged."""
        if self._state != self.RUN or self._loop is None:
            return None
        pid = next(self._pids)
        run = self._runs[pid] = Run(
            pool=self,
            pid=pid,
            task_id=options.get("correlation_id") or str(pid),
            target=partial(target, *args, **kwargs),
            callback=options.get("callback") or noop,
            error_callback=options.get("error_callback") or noop,
            accept_callback=options.get("accept_callback") or noop,
            timeout_callback=options.get("timeout_callback") or noop,
            soft_limit_s=options.get("soft_timeout") or self.options.get("soft_timeout"),
            hard_limit_s=options.get("timeout") or self.options.get("timeout"),
        )
        self._loop.call_soon_threadsafe(run.start)
        return run

    def on_run_ended(self, run: Run, report: Report) -> None:
        try:
            if report is not None:
                callback, args = report
                callback(*args)
        finally:
            self._runs.pop(run.pid, None)
            semaphore = self.options.get("semaphore")
            # Not while above the limit: after `shrink`, or after a lost connection, when Celery resets the
            # semaphore although tasks go on.
            if semaphore is not None and len(self._runs) < self.limit:
                semaphore.release()

    def _deliver(self) -> None:
        self.mailbox.deliver()
        if self._hub is not None:
            _run_acknowledgements(self._hub)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Cancel the run. Any signal means the same; the request learns of the end as `Terminated`."""
        run = self._runs.get(pid)
        if run is not None and self._loop is not None and not self._is_stopped:
            is_revoked = run.task_id in worker_state.revoked
            reason = Cancellation.REVOKED if is_revoked else Cancellation.SHUTDOWN
            self._loop.call_soon_threadsafe(run.cancel, reason, signal or 0)

    def grow(self, n: int = 1) -> None:
        self.limit += n
        self.options["semaphore"].grow(n)

    def shrink(self, n: int = 1) -> None:
        """Lower the limit, at least to one. What runs above it runs to its end."""
        n = min(n, self.limit - 1)
        self.limit -= n
        self.options["semaphore"].shrink(n)

    @property
    def num_processes(self) -> int:
        return int(self.limit)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        loop = type(self._loop)
        info |= {
            "running": len(self._runs),
            "loop": f"{loop.__module__}.{loop.__qualname__}",
            "timeouts": (self.options.get("soft_timeout") or 0, self.options.get("timeout") or 0),
        }
        return info

    # -- stop

    def on_stop(self) -> None:
        """Warm: wait for every task, and acknowledge each as it ends. Cold, or late: cancel them.

        Celery stops the pool in a signal handler too, maybe inside a warm stop that is under way; the
        inner call then ends both.
        """
        self._state = self.CLOSE
        if _is_cold_shutdown() or not self._drain(getattr(self.app, "pool_drain_timeout_s", None)):
            self.on_terminate()
        self._stop_loop()

    def on_terminate(self) -> None:
        """Cancel every task that Celery did not cancel itself; unless it succeeds nobody acknowledges it."""
        self._state = self.CLOSE
        if self._loop is None or self._is_stopped:
            return
        for run in self._runs.values():
            self._loop.call_soon_threadsafe(run.cancel, Cancellation.SHUTDOWN)
        if not self.wait_until_idle(CLEANUP_GRACE_S):
            names = ", ".join(run.name for run in itertools.islice(self._runs.values(), 10))
            logger.error("%d tasks did not end in time: %s", len(self._runs), names)
        self._stop_loop()

    def _drain(self, timeout_s: float | None) -> bool:
        """Run Celery's hub until no task is left; `False` if time is up before that.

        The hub, and not just the mailbox: a BRPOP that was on its way when the consumer was cancelled may
        bring one more message, which kombu puts back only if it reads it, and AMQP wants its heartbeats.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        if self._runs:  # a hub that was reset forgot us; one that has a timer wakes up in time
            self.register_with_event_loop(self._hub)
            self._hub.call_later(timeout_s or 0, noop)
        while self._runs and not self._is_stopped and time.monotonic() < deadline:
            try:
                self._hub.run_once()
            except Exception as exc:  # noqa: BLE001 - any transport's
                logger.warning("Lost the broker while waiting for tasks to end: %r", exc)
                return self.wait_until_idle(None if timeout_s is None else deadline - time.monotonic())
        return not self._runs

    def wait_until_idle(self, timeout_s: float | None = None) -> bool:
        """Deliver what runs report, without the hub, until none is left; `False` if time is up before that.

        For the hub's thread, also in a signal handler that has interrupted the hub.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self.mailbox.fileno(), select.POLLIN)
        while self._runs and not self._is_stopped:
            remaining_s = min(0.5, deadline - time.monotonic())
            if remaining_s <= 0:
                break
            poller.poll(remaining_s * 1000)
            self._deliver()
        return not self._runs

    def _stop_loop(self) -> None:
        if self._is_stopped or self._loop is None or self._closing is None or self._thread is None:
            return
        self._is_stopped = True
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(CLEANUP_GRACE_S)
        if self._thread.is_alive():
            logger.error("The pool's loop did not end in time; leaving it behind")


def _is_cold_shutdown() -> bool:
    return worker_state.should_terminate is not None and worker_state.should_terminate is not False


def _run_acknowledgements(hub: Any) -> None:
    """Send the acknowledgements that requests have queued on the hub.

    At once, because a hub that has stopped would send them only after the last task. And here, because one
    for a channel that is gone (Redis restarted while the task ran) raises `AttributeError` in kombu, which
    would end the worker; its message is delivered again. Whatever else is queued stays queued: it can be a
    transport's reader, which would hand new deliveries to a closed pool.
    """
    for call in hub._pop_ready():
        message = getattr(getattr(call, "fun", None), "__self__", None)
        if isinstance(message, Message):
            if not getattr(message.channel, "is_open", True):
                # AMQP, after a lost connection: kombu would log an error with a traceback for each.
                logger.info("The connection is gone, so a task will be delivered again")
                continue
            try:
                call()
            except Exception as exc:  # noqa: BLE001 - any transport's
                logger.warning("Cannot acknowledge a task, so it will be delivered again: %r", exc)
        else:
            hub.call_soon(call)
