"""The use case: one job, from its claim to its terminal event."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Final, assert_never

import msgspec

from deltawire.codec import decode, encode, encode_terminal
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
from deltawire.events import Failed, InProgress, Queued, Restarted
from deltawire.fold import LogFold, fold_pages
from deltawire.keys import LEASE_S, is_job_id
from deltawire.log import AppendCode, Claim, JobLog
from deltawire.options import Options, check_request, parse_options
from deltawire.outputs import read_request
from deltawire.record import CancelRequest
from deltawire.recover import End, NextAttempt, recover

from .abandonment import Abandonment, abandoned
from .cancellation import want_cancel
from .flusher import Flusher
from .lease import Leases, Presence
from .pool import Cancellation, cancellation
from .run import CancelWanted, DeadlinePassed, Outcome, Refused, Run
from .structured_output import StructuredOutput
from .upstream import Stream, Upstream, UpstreamClient, UpstreamError, request_body

END_TIMEOUT_S: Final = 300.0
HELD_LOOKS: Final = 2
NOT_REACHED: Final = frozenset({"connect_timeout", "upstream_unreachable"})

_log = logging.getLogger(__name__)


class Generator:
    """Runs jobs. One for a worker process."""

    def __init__(
        self,
        *,
        log: JobLog,
        flusher: Flusher,
        upstreams: Mapping[str, Upstream],
        client: UpstreamClient,
        owner: str,
        runs: dict[str, Run],
        leases: Leases,
        presence: Presence,
        abandonment: Abandonment,
    ) -> None:
        self._log = log
        self._flusher = flusher
        self._upstreams = upstreams
        self._client = client
        self._owner = owner
        self._runs = runs
        self._leases = leases
        self._presence = presence
        self._abandonment = abandonment
        self._structured_output = StructuredOutput()

    async def generate(self, job_id: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outcome:
        """Runs the job of one queue message.

        `kwargs` hold `request` and `options` where the sender wrote no record; wrong ones end the job as
        failed. Raises JobExpiredError (no record, and no body to make one of, or the job has failed before)
        and RedisUnavailableError (the message should come again: Redis is away, or has lost events).

        Cancelled from outside it lets go of the upstream, and ends the job or leaves it to another attempt.
        """
        problem = options = request = None
        if args or kwargs:
            problem, options, request = _read_arguments(args, kwargs)
        try:
            takes = await self._claim(job_id, request, options)
            if isinstance(takes, Outcome):
                return takes
            claim, decision = takes
            run = self._open_run(job_id, claim)
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
            extra={"job_id": job_id, "attempt": run.attempt}
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
        self._runs[job_id] = run
        self._presence.claimed(job_id)
        if claim.top == 0:
            self._put(run, Queued)
        return run

    def _close_run(self, run: Run, outcome: Outcome) -> None:
        self._flusher.close_writer(run.writer)
        if self._runs.get(run.job_id) is run:
            del self._runs[run.job_id]
        run.over.set_result(outcome)

    async def _give_up(self, run: Run) -> None:
        """Cancelled from outside: ends the job where that was meant, else leaves it to the next attempt."""
        why = cancellation()
        if run.writer.is_ending:
            pass
        elif why is Cancellation.REVOKED:
            request = CancelRequest("task_revoked")
            await self._end(run, AsCancelled(request, time.time(), run.upstream_closed_at))
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
            match claim.code:
                case "CLAIMED":
                    return claim, decision
                case "MISSING":
                    raise JobExpiredError(f"job {job_id} has no record")
                case "ENDED":
                    return await self._ended(job_id, claim.status)
                case "OWN" if job_id in self._runs:
                    pass  # another delivery has claimed it at the same time
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
        await self._presence.begins(job_id)
        call = asyncio.ensure_future(
            self._log.claim(
                job_id,
                owner=self._owner,
                lease_s=LEASE_S,
                request=request,
                options=options,
                take_over=take_over,
            )
        )
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
        """Ends a job whose message the worker has dropped: revoked, or past its `expires`."""
        if is_job_id(job_id):
            await self._log.cancel(job_id, reason="task_revoked")

    async def _run(
        self, run: Run, claim: Claim, decision: NextAttempt | End | None, problem: WireError | None
    ) -> Outcome:
        if claim.cancel is not None:
            want_cancel(run, claim.cancel)
        restarts = isinstance(decision, NextAttempt) and run.cause is None
        if run.record.first_delta_at is not None and not restarts:
            await self._fold_log(run)  # an attempt before this one has streamed, and this one ends the job
        upstream = self._upstreams.get(run.record.options.upstream)
        if upstream is None and problem is None:
            known = ", ".join(sorted(self._upstreams))
            problem = WireError("unknown_upstream", f"there is no upstream of this name; known are {known}")

        ending: Ending | None
        if isinstance(run.cause, CancelWanted):
            ending = AsCancelled(run.cause.request, run.cause.heard_at, None)
        elif problem is not None:
            ending = AsFailed(problem, "request")
        elif isinstance(decision, End):
            ending = as_lost(decision.code)
            run.was_asked = True  # as far as anybody knows
        elif run.attempt == 1 and time.time() > run.record.queue_deadline:
            ending = as_queue_timeout()
        elif await self._abandonment.waited_unwatched(run):
            ending = AsCancelled(abandoned(), time.time(), None)
        else:
            assert upstream is not None  # noqa: S101 - else there is a problem
            if isinstance(decision, NextAttempt) and decision.discards:
                self._put(run, Restarted, reason="worker_lost", discard_through=claim.top)
            ending = await self._stream(run, upstream)
        return await self._end(run, ending)

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

    async def _stream(self, run: Run, upstream: Upstream) -> Ending | None:
        """Reads the upstream into the log. None: the log takes nothing more from this attempt."""
        failure: WireError | None = None
        if run.cause is None:  # else it was ended while its readers had time to come back
            failure = await self._ask(run, upstream)
        match run.cause:
            case None:
                if failure is None:
                    return at_end_of_stream(run.fold)
                if isinstance(failure, UpstreamError):
                    return AsFailed(failure, "upstream", failure.status_code)
                return AsFailed(failure, "worker")
            case CancelWanted(request=wanted, heard_at=heard_at):
                return AsCancelled(wanted, heard_at, run.upstream_closed_at)
            case DeadlinePassed(deadline=deadline):
                return at_deadline(deadline, run.fold)
            case Refused(code="UNREACHABLE"):
                return AsFailed(WireError("redis_unavailable", "Redis took no events for too long"), "worker")
            case Refused():
                return None

    async def _ask(self, run: Run, upstream: Upstream) -> WireError | None:
        """Asks the upstream, and reads it until its end, its failure (returned) or the run's cause."""
        request: dict[str, Any] = msgspec.json.decode(run.record.request or b"{}")
        self._put(run, InProgress, upstream=upstream.name, model=request.get("model"))
        run.was_asked = True
        failure: WireError | None = None
        async with run:
            try:
                async with self._client.open(upstream, request_body(request), job_id=run.job_id) as stream:
                    await self._read(run, stream)
            except UpstreamError as error:
                failure = error
                run.was_asked = error.status_code in {None, 200} and error.code not in NOT_REACHED
            except Exception:  # noqa: BLE001 - the outer edge of a stream: whatever it was, the job gets its end
                _log.exception("a stream failed", extra={"job_id": run.job_id, "attempt": run.attempt})
                failure = WireError("internal_error", "the worker failed on this stream")
            finally:
                run.upstream_closed_at = time.time()
        return failure

    async def _read(self, run: Run, stream: Stream) -> None:
        """The token loop. Raises UpstreamError."""
        fold, writer = run.fold, run.writer
        async for batch in stream.batches():
            now = time.time()
            run.saw_delta(now)
            for chunk, _ in batch:
                fold.add(chunk)
            writer.put_deltas([line for _, line in batch], now, fold)
            if writer.is_full:
                with run.not_listening():
                    has_room = await writer.room()
                if not has_room:
                    run.abort(Refused("UNREACHABLE"))
                    return

    async def _end(self, run: Run, ending: Ending | None) -> Outcome:
        """Writes the terminal event, unless the log has another owner by now."""
        code: AppendCode = "STALE"
        asked = read_request(run.record.request)
        was_asked = run.was_asked or not run.fold.is_empty
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                while ending is not None:
                    outputs = await self._structured_output.outputs(ending, run.fold, asked)
                    now = time.time()
                    event = terminal_event(
                        ending,
                        job_id=run.job_id,
                        sequence_number=run.writer.next_number,
                        attempt=run.attempt,
                        now=now,
                        fold=run.fold,
                        timings=run.timings(now),
                        request=asked if was_asked else None,
                        outputs=outputs,
                    )
                    code = await run.writer.end(
                        encode_terminal(event),
                        status=event.status,
                        retention_s=run.record.options.retention_s,
                    )
                    if code in {"OK", "CANCELLING"}:
                        failed = ending.error.code if isinstance(ending, AsFailed) else None
                        return Outcome(event.status, failed)
                    if code != "CANCELLED":
                        break
                    # The cancel key came before the terminal event did.
                    request = await self._log.cancel_request(run.job_id) or CancelRequest()
                    ending = AsCancelled(request, time.time(), run.upstream_closed_at)
        except TimeoutError as error:
            raise RedisUnavailableError(f"the end of job {run.job_id} could not be written") from error
        refusal = run.cause.code if isinstance(run.cause, Refused) else code
        _log.warning(
            "the log takes no more: %s", refusal, extra={"job_id": run.job_id, "attempt": run.attempt}
        )
        return Outcome("in_progress")

    def _put(self, run: Run, kind: type[Queued | InProgress | Restarted], **fields: Any) -> None:
        event = kind(
            job_id=run.job_id,
            sequence_number=run.writer.next_number,
            attempt=run.attempt,
            created_at=time.time(),
            **fields,
        )
        run.writer.put(encode(event))

    def _look_for_cancel(self, run: Run) -> None:
        """An append met the cancel key, but does not say what is in it; the renewal does."""
        if run.cause is None:
            self._leases.renew(run)


def _read_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[WireError | None, Options, bytes]:
    """What is wrong with a message's arguments, if anything; and what of them goes into the record."""
    options, request = Options(), b"null"
    try:
        options = parse_options(kwargs.get("options"))
        msgspec.json.encode(options)
        request = msgspec.json.encode(kwargs.get("request"))
        check_request(kwargs.get("request"))
    except WireError as error:
        return error, options, request
    except UnicodeEncodeError:
        # JSON can say lone surrogates; UTF-8 cannot.
        return WireError("invalid_request", "a text holds a lone surrogate"), Options(), request
    if unknown := set(kwargs) - {"request", "options"}:
        message = f"the task takes request and options, not {', '.join(sorted(unknown))}"
        return WireError("invalid_request", message, param=min(unknown)), options, request
    if args:
        return WireError("invalid_request", "the task takes keyword arguments only"), options, request
    return None, options, request
