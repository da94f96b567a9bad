"""The task `deltawire.generate`: a door. What it takes and returns is PROTOCOL.md §1.1."""

import asyncio
import logging
from functools import partial
from typing import Any, Final

from celery import Celery
from celery.app.task import Context, Task
from celery.exceptions import Ignore, Reject
from celery.signals import task_revoked
from celery.worker.request import Request
from kombu.utils.json import dumps

from deltawire.errors import DeltawireError, JobExpiredError, RedisUnavailableError, WireError
from deltawire.keys import is_job_id
from deltawire.queue import TASK
from deltawire.tracing import read_traceparent

from .generate import Generator
from .parking import Parking
from .pool import await_

REQUEUE_PAUSE_S: Final = 1.0

_log = logging.getLogger(__name__)


class JobFailedError(DeltawireError):
    """The job has ended as `failed`; the event in its log says why. Carries the code, never a text."""


class PrivateRequest(Request):  # type: ignore[misc] # Celery ships no types
    """A request whose arguments show nowhere: not in task events, Flower, `inspect` or log records.

    A plain `send_task` puts a representation of the arguments, prompt included, into the message's headers.
    """

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        for name in ("argsrepr", "kwargsrepr"):
            message.headers[name] = ""
        super().__init__(message, *args, **kwargs)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """As Celery's when it is asked to be safe, which `inspect` does not ask."""
        info: dict[str, Any] = super().info(safe=True)
        return info


def _besides(context: Context) -> dict[str, Any]:
    """What a message says besides its job (link, chain, group, expiry …), for one in its place."""
    said: dict[str, Any] = context.as_execution_options()  # what Celery's own `retry` hands on
    ours = {"task_id", "headers", "origin"}
    return {name: value for name, value in said.items() if value is not None and name not in ours}


def _traceparent(context: Context) -> object:
    """Where opentelemetry-instrumentation-celery, say, puts it: a header of the message."""
    return getattr(context, "traceparent", None)


def _stored(context: Context) -> bytes:
    """The same, but for what is as usual, for the record of a job that waits for its turn."""
    usual = {"root_id": context.id, "retries": 0, "replaced_task_nesting": 0}
    said = {name: value for name, value in _besides(context).items() if usual.get(name) != value}
    if traceparent := read_traceparent(_traceparent(context)):
        said["headers"] = {"traceparent": traceparent}
    return dumps(said).encode() if said else b""  # type: ignore[no-untyped-call] # kombu has few types


def register(app: Celery) -> None:
    """Adds the task to `app`, which has `generator` and its `generator_loop` when it runs."""

    class Generate(Task):  # type: ignore[misc] # Celery ships no types
        name = TASK
        Request = PrivateRequest
        typing = False  # any arguments: wrong ones end in a `failed` event, not in a lost message
        throws = (JobFailedError, JobExpiredError)

        def run(self, *args: Any, **kwargs: Any) -> dict[str, str]:
            """Streams one job. Returns {job_id, status}, so that `link=` works; raises for `failed` only."""
            context: Context = self.request
            job_id = str(context.id)
            if not is_job_id(job_id):
                raise WireError("invalid_job_id", "a task id must be 1 to 128 of A-Z a-z 0-9 _ -")
            generator: Generator = app.generator
            try:
                stored, traceparent = partial(_stored, context), _traceparent(context)
                outcome = await_(generator.generate(job_id, args, kwargs, stored, traceparent))
            except RedisUnavailableError as error:
                # The message comes again at once, and often: not faster than once a second.
                await_(asyncio.sleep(REQUEUE_PAUSE_S))
                raise Reject(str(error), requeue=True) from error
            except JobExpiredError as error:
                _log.warning("%s", error, extra={"job_id": job_id})  # nobody else will hear of it
                raise
            if outcome.again_in_s is not None:
                # This message is done with; another one comes in time, and its end is the job's.
                parking: Parking = app.parking
                priority = app.sender.priority_of((context.delivery_info or {}).get("priority"))
                parking.put(job_id, outcome.again_in_s, priority=priority, **_besides(context))
                raise Ignore
            if outcome.is_held:
                raise Ignore  # as above; who calls the job sends the other one
            if outcome.code is not None:
                raise JobFailedError(outcome.code)
            return {"job_id": job_id, "status": outcome.status}

    app.register_task(Generate())

    def on_revoked(sender: Task, request: Context, terminated: bool, **_: Any) -> None:
        # Celery drops the message of a task that is revoked or expires in the queue; one that runs, or
        # has just been terminated, hears of it itself. This is the hub's thread.
        if sender.name == TASK and not terminated:
            unstarted = app.generator.cancel_unstarted(str(request.id))
            asyncio.run_coroutine_threadsafe(unstarted, app.generator_loop)

    task_revoked.connect(on_revoked, weak=False)
