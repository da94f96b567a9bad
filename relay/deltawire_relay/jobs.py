"""What both doors (HTTP and WebSocket) do with jobs: create, look at, cancel."""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, Protocol

import msgspec
from prometheus_client.core import Metric

from deltawire.codec import decode, sequence_number_of
from deltawire.errors import RedisUnavailableError, WireError
from deltawire.events import TERMINAL_STATUSES, TerminalEvent
from deltawire.job_object import job_object, job_summary
from deltawire.keys import RANDOM_KEY, is_job_id
from deltawire.log import JobLog, Submitted
from deltawire.log_fold import LogFold, fold_pages
from deltawire.messages import CancelResult
from deltawire.metrics import Histogram, counter_family, histogram_family
from deltawire.options import FIRST, Options, check_request, parse_options
from deltawire.outputs import parsed_again
from deltawire.queue import QUEUE, TaskSender
from deltawire.record import Record
from deltawire.scripts import Scripts
from deltawire.tracing import OFF, Tracing

from .auth import Principal
from .hubs import Hubs
from .job_list import JobList, Wanted

CANCEL_WAIT_S: Final = 1.0


class Queue(Protocol):
    """Where messages for the workers go."""

    async def enqueue(self, job_id: str, **message: Any) -> None:
        """`message` as TaskSender.send takes it. Raises WireError `queue_unavailable`."""


def check_job_id(job_id: str) -> str:
    """Raises WireError `invalid_job_id`."""
    if not is_job_id(job_id):
        raise WireError(
            "invalid_job_id", "a job id is 1 to 128 of the characters A-Z a-z 0-9 _ -", param="job_id"
        )
    return job_id


class Jobs:
    """The use cases. Each checks what `principal` may do; another tenant's job does not exist."""

    def __init__(self, log: JobLog, hubs: Hubs, queue: Queue, tracing: Tracing = OFF) -> None:
        self._log = log
        self._hubs = hubs
        self._queue = queue
        self._list = JobList(log)
        self._tracing = tracing
        self._submitted = 0
        self._cancels = dict.fromkeys(("queued", "delivered", "undelivered", "ended", "unknown"), 0)
        self._cancel_seconds = Histogram()

    def collect(self) -> Iterator[Metric]:
        yield counter_family(
            "deltawire_jobs_submitted_total", "Jobs that were sent to the workers.", self._submitted
        )
        yield counter_family("deltawire_cancels_total", "Cancellations.", self._cancels, ["result"])
        yield histogram_family(
            "deltawire_cancel_seconds", "How long cancellations took to answer.", {(): self._cancel_seconds}
        )

    async def create(
        self,
        body: dict[str, Any],
        principal: Principal,
        idempotency_key: str | None,
        traceparent: str = "",
    ) -> tuple[str, str]:
        """A job of the body `{request, options}`. Returns (job id, status). Raises WireError, as `submit`.

        `traceparent`: of the caller's trace, read.
        """
        principal.require("submit")
        if unknown := set(body) - {"request", "options"}:
            raise WireError(
                "invalid_request", "the body has the fields request and options", param=min(unknown)
            )
        request = check_request(body.get("request"))
        options = parse_options(body.get("options"), from_http=True)
        job_id = self.new_id(principal, idempotency_key)
        return job_id, await self.submit(job_id, request, options, principal, traceparent)

    @staticmethod
    def new_id(principal: Principal, idempotency_key: str | None) -> str:
        """With an idempotency key a hash of tenant and key, so that a repeat finds the first job.

        Those who come by tokens have keys of their own: one user's guess must not find another's job.
        """
        if idempotency_key is None:
            return uuid.uuid4().hex
        subject = "" if principal.is_key else f"{principal.subject}\0"  # which no header and no name can hold
        made = hashlib.sha256(f"{_tenant(principal)}\0{subject}{idempotency_key}".encode()).hexdigest()
        return made[:32] if idempotency_key.startswith(RANDOM_KEY) else made  # each event repeats the id

    async def submit(
        self,
        job_id: str,
        request: dict[str, Any],
        options: Options,
        principal: Principal,
        traceparent: str = "",
    ) -> str:
        """Writes the record, then sends the message. Returns the job's status. Raises as `enter`, `send`."""
        submitted = await self.enter(job_id, request, options, principal, traceparent)
        await self.send(job_id, submitted)
        return submitted.status

    async def enter(
        self,
        job_id: str,
        request: dict[str, Any],
        options: Options,
        principal: Principal,
        traceparent: str = "",
        *,
        response: dict[str, Any] | None = None,
    ) -> Submitted:
        """Writes the record: the first half of `submit`.

        `response` is what a Response repeats (`Record.response`). Raises `idempotency_conflict` where the
        job exists and was asked for with another body, and `tenant_queue_full`.
        """
        principal.require("submit")
        options = msgspec.structs.replace(options, tenant=_tenant(principal))
        encoded = msgspec.json.encode(request)
        asked = [request, _said(options)] if response is None else [request, _said(options), response]
        digest = hashlib.sha256(msgspec.json.encode(asked, order="sorted")).hexdigest()
        with self._tracing.start(
            f"send {QUEUE}", kind="producer", parent=traceparent, attributes={"deltawire.job.id": job_id}
        ) as span:
            submitted = await self._log.submit(
                job_id,
                request=encoded,
                options=options,
                digest=digest,
                created_at=time.time(),
                traceparent=span.traceparent,
                response=None if response is None else msgspec.json.encode(response),
            )
            if not submitted.same_body:
                raise WireError(
                    "idempotency_conflict",
                    "this Idempotency-Key was used with another body; use a new key",
                    param="Idempotency-Key",
                )
        return submitted

    async def send(self, job_id: str, submitted: Submitted) -> None:
        """Sends the message of a job that has its record, if it needs one. Raises `queue_unavailable`."""
        if submitted.message is not None:
            # Also on a repeat: the first call may have died between record and message. Claims make a
            # second message harmless.
            await self._queue.enqueue(job_id, **submitted.message)
            self._submitted += 1

    async def mark_watched(self, job_id: str) -> None:
        """Says that somebody waits for a job to which nobody listens here. Raises RedisUnavailableError."""
        await self._log.mark_watched(job_id)

    async def describe(self, job_id: str, principal: Principal) -> dict[str, Any]:
        """The job as `GET /v1/jobs/{id}` shows it; never the request.

        Raises WireError `unknown_job`, also for another tenant's job.
        """
        principal.may(check_job_id(job_id), "read")
        head = await self._log.head(job_id)
        record = head.record
        if record is None or principal.tenant not in (None, record.tenant):
            raise WireError("unknown_job", f"there is no job {job_id}", param="job_id")
        last = await self._log.last(job_id) if record.is_terminal else None
        event = decode(last) if last else None
        if not isinstance(event, TerminalEvent):
            return job_object(job_id, record, head.top)
        job = job_object(job_id, record, head.top, event)
        job["completion"] = await self.completion(event)
        job["outputs"] = parsed_again(job["outputs"], job["completion"])
        return job

    async def response(self, job_id: str, principal: Principal) -> Record:
        """The record of a job that is a Response, without the request. Raises WireError `unknown_job`."""
        record = await self._log.summary(job_id, "response")
        if record is None or record.response is None or principal.tenant not in (None, record.tenant):
            raise WireError("unknown_job", f"there is no response resp_{job_id}", param="response_id")
        return record

    def pages(self, job_id: str) -> AsyncIterator[list[bytes]]:
        """The job's log, from its beginning, by pages. Raises RedisUnavailableError."""
        return self._log.pages(job_id)

    async def list(self, wanted: Wanted, principal: Principal) -> dict[str, Any]:
        """A page of the tenant's jobs, as `GET /v1/jobs` shows it. Raises WireError."""
        principal.require("list")
        page = await self._list.page(principal.tenant, wanted)
        jobs = []
        for job_id, record in page.jobs:
            # One at a time: the last event of each may carry a completion of 256 KiB.
            last = await self._log.last(job_id)
            top = sequence_number_of(last) if last else 0
            event = decode(last) if last and record.is_terminal else None
            ended = event if isinstance(event, TerminalEvent) else None
            jobs.append(job_summary(job_id, record, top, ended))
        first_id = jobs[0]["id"] if jobs else None
        answer = {"object": "list", "data": jobs, "first_id": first_id, "last_id": page.last_id}
        return answer | {"has_more": page.has_more}

    async def delete(self, job_id: str, principal: Principal) -> None:
        """Cancels the job if it has not ended, and erases it. Raises WireError `unknown_job`."""
        principal.may(check_job_id(job_id), "cancel")
        record = await self._log.summary(job_id)
        if record is not None and principal.tenant in (None, record.tenant):
            if not record.is_terminal:
                await self.cancel(job_id, principal, reason="deleted")
            if await self._log.erase(job_id, "deleted"):
                return
        raise WireError("unknown_job", f"there is no job {job_id}", param="job_id")

    async def completion(self, event: TerminalEvent) -> dict[str, Any] | None:
        """The completion of a job that has ended, from its log where it is too large for the event.

        None where the log is gone, or goes while it is read: half a text is none.
        """
        if event.completion_url is msgspec.UNSET:
            return event.completion
        fold = await fold_pages(LogFold(), self._log.pages(event.job_id))
        return fold.completion() if fold.sequence_number == event.sequence_number else None

    async def cancel(
        self, job_id: str, principal: Principal, *, reason: str, request_id: str | None = None
    ) -> CancelResult:
        """Cancels, and waits at most CANCEL_WAIT_S for the worker's acknowledgement: the terminal event.

        A job without a record gets a tombstone, for a job of the principal's tenant; its status stays
        `unknown`, as another tenant's job is. Idempotent.
        """
        principal.require("cancel")
        asked_at = time.monotonic()
        record = await self._log.summary(check_job_id(job_id))
        is_foreign = record is not None and principal.tenant not in (None, record.tenant)
        if is_foreign or not principal.covers(job_id):
            # To be told apart from a job that does not exist by nothing.
            self._note_cancel("unknown", asked_at)
            return CancelResult(
                request_id=request_id, job_id=job_id, status="unknown", cancelled_from=None, delivered=False
            )
        async with self._hubs.hold(job_id) as hub:
            cancellation = await self._log.cancel(job_id, reason=reason, tenant=principal.tenant)
            status, delivered = cancellation.status, cancellation.status in TERMINAL_STATUSES
            if cancellation.cancelled_from == "in_progress":
                delivered = await hub.ends(CANCEL_WAIT_S)
                status = hub.status
        result: str = cancellation.cancelled_from or "ended"
        if result == "in_progress":
            result = "delivered" if delivered else "undelivered"
        self._note_cancel(result, asked_at)
        return CancelResult(
            request_id=request_id,
            job_id=job_id,
            status=status,
            cancelled_from=None if cancellation.cancelled_from == "unknown" else cancellation.cancelled_from,
            delivered=delivered,
        )

    def _note_cancel(self, result: str, asked_at: float) -> None:
        self._cancels[result] += 1
        self._cancel_seconds.observe(time.monotonic() - asked_at)


def _tenant(principal: Principal) -> str:
    return principal.tenant or "default"


def _said(options: Options) -> dict[str, Any]:
    """The options, but for what the release before this one did not have: repeats outlive an upgrade."""
    said: dict[str, Any] = msgspec.to_builtins(options)
    if options.priority == FIRST:
        del said["priority"]
    return said


class CeleryQueue:
    """Sends messages from a thread: Celery's `apply_async` takes a millisecond and blocks."""

    def __init__(self, sender: TaskSender) -> None:
        self._sender = sender

    async def enqueue(self, job_id: str, **message: Any) -> None:
        await asyncio.to_thread(self._sender.send, job_id, **message)


class RedisQueue:
    """Sends messages as Celery does, where the broker is the Redis of the logs: over the same connection.

    Celery's own way takes another thread, and a millisecond of the first token.
    """

    def __init__(self, sender: TaskSender, redis: Scripts) -> None:
        self._templates = [sender.template(priority) for priority in range(FIRST + 1)]
        self._redis = redis

    async def enqueue(self, job_id: str, *, priority: int = FIRST, **_: Any) -> None:
        """Nothing else is said by a job that came in over HTTP."""
        template = self._templates[priority]
        try:
            await self._redis.execute("LPUSH", template.queue, template.message(job_id))
        except RedisUnavailableError as error:
            raise WireError("queue_unavailable", "Redis did not take the job's message; try again") from error
