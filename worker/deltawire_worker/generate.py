"""The use case: one job, from its claim to its terminal event."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, assert_never

import msgspec

from deltawire.codec import decode, encode_terminal
from deltawire.ending import (
    AsCancelled,
    AsFailed,
    Ending,
    as_lost,
    as_queue_timeout,
    at_deadline,
    at_end_of_stream,
    terminal_event,
)
from deltawire.errors import JobExpiredError, RedisUnavailableError, WireError
from deltawire.events import Failed, Queued, Restarted
from deltawire.keys import LEASE_S, is_job_id
from deltawire.log import AppendCode, Claim, JobLog
from deltawire.log_fold import LogFold, fold_pages
from deltawire.options import Options, check_request
from deltawire.outputs import read_request
from deltawire.record import CancelRequest, Record
from deltawire.recover import End, NextAttempt, recover
from deltawire.tracing import OFF, Tracing

from .abandonment import Abandonment, abandoned
from .arguments import read_arguments
from .asking import Asker, Question, is_finished
from .attempt_span import begin_attempt, end_attempt
from .cancellation import want_cancel
from .flusher import Flusher
from .lease import Leases, Presence
from .metrics import JobMetrics
from .parking import park
from .pool import Cancellation, cancellation
from .quotas import Quotas
from .refusal import UpstreamError
from .retry import Park
from .run import CancelWanted, DeadlinePassed, Outcome, Refused, Run
from .structured_output import StructuredOutput
from .upstreams import Upstreams

END_TIMEOUT_S: Final = 300.0
HELD_LOOKS: Final = 2

_log = logging.getLogger(__name__)


class Generator:
    """Runs jobs. One for a worker process."""

    def __init__(
        self,
        *,
        log: JobLog,
        flusher: Flusher,
        upstreams: Upstreams,
        asker: Asker,
        owner: str,
        runs: dict[str, Run],
        leases: Leases,
        presence: Presence,
        abandonment: Abandonment,
        quotas: Quotas,
        metrics: JobMetrics,
        tracing: Tracing = OFF,
    ) -> None:
        self._log = log
        self._flusher = flusher
        self._upstreams = upstreams
        self._asker = asker
        self._owner = owner
        self._runs = runs
        self._leases = leases
        self._presence = presence
        self._abandonment = abandonment
        self._quotas = quotas
        self._metrics = metrics
        self._tracing = tracing
        self._structured_output = StructuredOutput()
        self.ended = 0
        """How many attempts are over."""
        self._events_of_ended = 0

    @property
    def events(self) -> int:
        """How many events the attempts of this process have put into logs."""
        return self._events_of_ended + sum(run.written for run in self._runs.values())

    async def generate(
        self,
        job_id: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        message: Callable[[], bytes] = bytes,
        traceparent: object = None,
    ) -> Outcome:
        """Runs the job of one queue message.

        `kwargs` hold `request` and `options` where the sender wrote no record; wrong ones end the job as
        failed. `message` says what it said besides, should the job have to wait for its turn; `traceparent`
        is its header of that name, if it has one. Raises JobExpiredError (no record, and no body to make one
        of, or the job has failed before) and RedisUnavailableError (the message should come again: Redis is
        away, or has lost events).

        Cancelled from outside it lets go of the upstream, and ends the job or leaves it to another attempt.
        """
        problem = options = request = None
        if args or kwargs:
            problem, options, request = read_arguments(args, kwargs)
        try:
            takes = await self._claim(job_id, request, options)
            if isinstance(takes, Outcome):
                return takes
            claim, decision = takes
            run = self._open_run(job_id, claim)
            run.said = message
            begin_attempt(self._tracing, run, traceparent)
            outcome = Outcome("in_progress")
            try:
                outcome = await self._run(run, claim, decision, problem)
            except asyncio.CancelledError:
                await self._give_up(run)
                raise
            finally:
                self._close_run(run, outcome)
        finally:
            self._presence.ended(job_id)
        _log.info(
            "job %s in %.1f s",
            outcome.status,
            time.time() - run.record.created_at,
            extra=run.log_fields
            | {"status": outcome.status}
            | ({"code": outcome.code} if outcome.code else {}),
        )
        return outcome

    def _open_run(self, job_id: str, claim: Claim) -> Run:
        assert claim.record is not None  # noqa: S101 - a claim that was taken has one
        run = Run(job_id, claim.attempt, claim.record)
        run.writer = self._flusher.open(
            job_id,
            record=claim.record,
            owner=self._owner,
            top=claim.top,
            on_cancel=lambda: self._look_for_cancel(run),
            on_refused=lambda code: run.abort(Refused(code)),
        )
        run.top = claim.top
        self._runs[job_id] = run
        self._metrics.began(run, time.time())
        self._presence.claimed(job_id)
        if claim.top == 0:
            run.put(Queued)
        return run

    def _close_run(self, run: Run, outcome: Outcome) -> None:
        self._flusher.close_writer(run.writer)
        if not outcome.is_held:
            self._quotas.left(run)
        if self._runs.get(run.job_id) is run:
            del self._runs[run.job_id]
        end_attempt(run, outcome)
        self.ended += 1
        self._events_of_ended += run.written
        run.over.set_result(outcome)

    async def _give_up(self, run: Run) -> None:
        """Cancelled from outside: ends the job where that was meant, else leaves it to the next attempt."""
        why = cancellation()
        if run.is_parked:
            if why is Cancellation.REVOKED:  # there is no message to come back any more
                await self._log.cancel(run.job_id, reason="task_revoked")
        elif run.writer.is_ending:
            pass
        elif why is Cancellation.REVOKED:
            request = CancelRequest("task_revoked")
            await self._end(run, AsCancelled(request, time.time(), run.upstream_closed_at))
        elif run.ending is not None:  # it was over; how its outputs are was still being looked at
            await self._end(run, run.ending)
        elif why is Cancellation.TIME_LIMIT:
            await self._end(run, at_deadline("total_timeout", run.fold))
        else:
            await self._shut_down(run)

    async def _shut_down(self, run: Run) -> None:
        """The time to finish is over: `recover` decides whether the message's next delivery goes on."""
        record = msgspec.structs.replace(
            run.record,
            attempt=run.attempt,
            first_delta_at=run.first_delta_at or run.record.first_delta_at,
        )
        decision = recover(record, "worker_shutdown")
        if isinstance(decision, End) and not run.fold.is_empty:
            error = WireError(decision.code, "the worker was stopped before the stream had ended")
            await self._end(run, AsFailed(error, "worker"))
        else:
            self._leases.release(run)

    async def _claim(
        self, job_id: str, request: bytes | None, options: Options | None
    ) -> Outcome | tuple[Claim, NextAttempt | End | None]:
        """The claim, with what `recover` decided about an attempt before it; or why there is none."""
        take_over: int | None = None
        decision: NextAttempt | End | None = None
        looks = 0
        while True:
            if run := self._runs.get(job_id):
                # The broker delivered the message a second time: go along with the run that is on. A claim
                # would make another of the same owner and number, if Redis has lost the record.
                return await asyncio.shield(run.over)
            claim = await self._claim_once(job_id, request, options, take_over)
            self._metrics.claimed(claim.code)
            match claim.code:
                case "CLAIMED":
                    return claim, decision
                case "MISSING":
                    raise JobExpiredError(f"job {job_id} has no record")
                case "ENDED":
                    return await self._ended(job_id, claim.status)
                case "OWN" if job_id in self._runs:
                    pass  # another delivery has claimed it at the same time
                case "PARKED":
                    return Outcome("queued", again_in_s=claim.held_for_s)
                case "HELD":
                    # A living owner renews; one that died lets its lease run out.
                    looks += 1
                    if looks > HELD_LOOKS:
                        return Outcome("in_progress")
                    await asyncio.sleep(claim.held_for_s + 0.1)
                case "OWN" | "EXPIRED":
                    # Own: the answer to our claim was lost, or the run has failed on the way to its end.
                    assert claim.record is not None  # noqa: S101 - both carry it
                    decision = recover(claim.record)
                    take_over = claim.attempt
                case _:
                    assert_never(claim.code)

    async def _claim_once(
        self, job_id: str, request: bytes | None, options: Options | None, take_over: int | None
    ) -> Claim:
        """One call of the script. Cancelled meanwhile, it gives up what the script may have taken."""
        claiming = self._log.claim(
            job_id,
            owner=self._owner,
            lease_s=LEASE_S,
            request=request,
            options=options,
            take_over=take_over,
        )
        enter = partial(self._presence.begins, job_id)
        call = asyncio.ensure_future(self._log.index.entered(enter, claiming))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            claim = await call
            if claim.code == "CLAIMED":
                run = self._open_run(job_id, claim)
                try:
                    await self._give_up(run)
                finally:
                    self._close_run(run, Outcome("in_progress"))
            raise

    async def cancel_unstarted(self, job_id: str) -> None:
        """Ends a job whose message the worker has dropped: revoked, or past its `expires`. Does not raise."""
        if is_job_id(job_id):
            try:
                await self._log.cancel(job_id, reason="task_revoked")
            except RedisUnavailableError as error:
                _log.warning("cannot cancel a job that was revoked: %s", error, extra={"job_id": job_id})

    async def _run(
        self, run: Run, claim: Claim, decision: NextAttempt | End | None, problem: WireError | None
    ) -> Outcome:
        if claim.cancel is not None:
            want_cancel(run, claim.cancel)
        restarts = isinstance(decision, NextAttempt) and run.cause is None
        if run.record.first_delta_at is not None and not restarts:
            await self._fold_log(run)  # an attempt before this one has streamed, and this one ends the job
        question = problem or self._question(run.record)
        ending: Ending | Park | None
        if isinstance(run.cause, CancelWanted):
            ending = AsCancelled(run.cause.request, run.cause.heard_at, None)
        elif isinstance(question, WireError):
            ending = AsFailed(question, "request")
        elif isinstance(decision, End):
            ending = as_lost(decision.code)
            run.was_asked = True  # as far as anybody knows
        elif run.attempt == 1 and time.time() > run.record.queue_deadline:
            ending = as_queue_timeout()
        elif await self._abandonment.waited_unwatched(run):
            ending = AsCancelled(abandoned(), time.time(), None)
        else:
            if isinstance(decision, NextAttempt) and decision.discards:
                run.span.note("restarted")
                run.put(Restarted, reason="worker_lost", discard_through=claim.top)
            ending = await self._stream(run, question)
            if not isinstance(ending, Park | None):
                self._metrics.streamed(question.upstream.name, ending)
        if isinstance(ending, Park):
            return await self._park(run, ending)
        return await self._end(run, ending)

    async def _park(self, run: Run, ending: Park) -> Outcome:
        self._presence.queues(run.job_id)
        parked = await park(run, ending.delay_s, log=self._log, owner=self._owner)
        return parked if isinstance(parked, Outcome) else await self._end(run, parked)

    def _question(self, record: Record) -> Question | WireError:
        """What to ask whom; or `unknown_upstream`, `model_not_found`.

        `invalid_request` where a worker died before it could say so.
        """
        try:
            request = check_request(msgspec.json.decode(record.request or b"null"))
            upstream, model = self._upstreams.route(record.options.upstream, request["model"])
        except WireError as error:
            return error
        return Question(upstream, request, model)

    async def _ended(self, job_id: str, status: str) -> Outcome:
        """The outcome of a job that has ended before."""
        last = await self._log.last(job_id) if status == "failed" else None
        event = decode(last) if last else None
        if status == "failed" and event is None:
            raise JobExpiredError(f"job {job_id} has failed, and its log is gone")
        return Outcome(status, event.error.code if isinstance(event, Failed) else None)

    async def _fold_log(self, run: Run) -> None:
        run.fold = (await fold_pages(LogFold(), self._log.pages(run.job_id))).fold
        run.first_delta_at = run.record.first_delta_at

    async def _stream(self, run: Run, question: Question) -> Ending | Park | None:
        """Reads the upstream into the log. None: the log takes nothing more from this attempt."""
        failure: WireError | Park | None = None
        if run.cause is None and not await self._quotas.admit(run):
            return Park(0)
        if run.cause is None:  # else it was ended while its readers had time to come back
            failure = await self._asker.ask(run, question)
        match run.cause:
            case None:
                if failure is None:
                    # [DONE] says that there is nothing more to come; some gateways know one choice only.
                    return at_end_of_stream(run.fold, 1 if run.is_done else question.choices)
                if isinstance(failure, Park):
                    return failure
                if isinstance(failure, UpstreamError):
                    # By its code only: what an upstream says may repeat the prompt.
                    _log.warning(
                        "upstream %s failed: %s (status %s)",
                        *(question.upstream.name, failure.code, failure.status_code),
                        extra=run.log_fields,
                    )
                    return AsFailed(failure, "upstream", failure.status_code, failure.details)
                return AsFailed(failure, "worker")
            case CancelWanted(request=wanted, heard_at=heard_at):
                return AsCancelled(wanted, heard_at, run.upstream_closed_at)
            case DeadlinePassed(deadline=deadline):
                if is_finished(run.fold, question.choices):
                    return at_end_of_stream(run.fold)  # all was said; only the end of the stream is missing
                return at_deadline(deadline, run.fold)
            case Refused(code="UNREACHABLE"):
                return AsFailed(WireError("redis_unavailable", "Redis took no events for too long"), "worker")
            case Refused():
                return None

    async def _end(self, run: Run, ending: Ending | None) -> Outcome:
        """Writes the terminal event, unless the log has another owner by now."""
        code: AppendCode = "STALE"
        request = read_request(run.record.request)
        was_asked = run.was_asked or not run.fold.is_empty
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                while ending is not None:
                    run.ending = ending
                    outputs = await self._structured_output.outputs(ending, run.fold, request)
                    now = time.time()
                    event = terminal_event(
                        ending,
                        job_id=run.job_id,
                        sequence_number=run.writer.next_number,
                        attempt=run.attempt,
                        now=now,
                        fold=run.fold,
                        timings=run.timings(now),
                        request=request if was_asked else None,
                        outputs=outputs,
                    )
                    line = encode_terminal(event)
                    code = await run.writer.end(
                        line,
                        status=event.status,
                        retention_s=run.record.options.retention_s,
                    )
                    if code in {"OK", "CANCELLING"}:
                        self._metrics.ended(run, event, ending, (request or {}).get("model"))
                        await self._log.tell_end(run.job_id, run.record, line)
                        failed = ending.error.code if isinstance(ending, AsFailed) else None
                        return Outcome(event.status, failed)
                    if code != "CANCELLED":
                        break
                    # The cancel key came before the terminal event did.
                    wanted = await self._log.cancel_request(run.job_id) or CancelRequest()
                    ending = AsCancelled(wanted, time.time(), run.upstream_closed_at)
        except TimeoutError as error:
            raise RedisUnavailableError(f"the end of job {run.job_id} could not be written") from error
        run.warn_of_refusal(code)
        return Outcome("in_progress")

    def _look_for_cancel(self, run: Run) -> None:
        """An append met the cancel key, but does not say what is in it; the renewal does."""
        if run.cause is None:
            self._leases.renew(run)
