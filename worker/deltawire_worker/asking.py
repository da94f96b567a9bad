"""Asking an upstream: until it streams, or has refused for good."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from deltawire.errors import WireError
from deltawire.events import InProgress, Retrying
from deltawire.fold import Fold
from deltawire.tracing import Value

from .attempt_span import tell_question
from .metrics import JobMetrics
from .refusal import UpstreamError
from .retry import Budget, GiveUp, Park, decide
from .run import Refused, Run
from .upstream import Chunk, Stream, UpstreamClient, request_body
from .upstreams import Upstream, Upstreams

_log = logging.getLogger(__name__)


class Question(msgspec.Struct, frozen=True):
    """A job's request, and where it goes; `model` is what the upstream calls the request's."""

    upstream: Upstream
    request: dict[str, Any]
    model: str

    @property
    def choices(self) -> int:
        """How many it asks for."""
        wanted = self.request.get("n")
        return wanted if isinstance(wanted, int) and wanted > 1 else 1


class Asker:
    """Asks upstreams for all jobs of a worker process."""

    def __init__(self, upstreams: Upstreams, client: UpstreamClient, metrics: JobMetrics) -> None:
        self._client = client
        self._metrics = metrics
        self._budgets = {upstream.name: Budget() for upstream in upstreams}
        self._places = {
            upstream.name: asyncio.Semaphore(upstream.max_streams)  # first come, first served
            for upstream in upstreams
            if upstream.max_streams is not None
        }

    async def ask(self, run: Run, question: Question) -> WireError | Park | None:
        """Reads the answer into the run, until its end, its failure (returned) or the run's cause.

        Park: the gateway is to be asked again, but not from here. Whatever interrupts the run interrupts its
        waits, for a place and between two tries, too.
        """
        upstream = question.upstream
        tell_question(run.span, question)
        run.put(InProgress, upstream=upstream.name, model=question.request.get("model"))
        body = request_body(question.request, upstream, question.model or None)
        budget = self._budgets[upstream.name]
        failure: WireError | Park | None = None
        async with run:
            while run.cause is None:  # its time may have passed while it was parked
                try:
                    failure = await self._try(run, question, body)
                except Exception:  # noqa: BLE001 - the outer edge of a stream: whatever it was, the job gets its end
                    _log.exception("a stream failed", extra=run.log_fields)
                    failure = WireError("internal_error", "the worker failed on this stream")
                if failure is None and run.cause is None:
                    budget.succeeded()
                if not isinstance(failure, UpstreamError) or run.first_delta_at is not None:
                    break
                decision = decide(
                    failure,
                    retries=run.retries,
                    max_retries=run.record.options.max_retries,
                    max_wait_s=run.record.options.max_retry_wait_s,
                    waited_s=run.waited_s,
                    left_s=run.left_s,
                    queue_left_s=run.record.queue_deadline - time.time(),
                    budget=budget,
                    jitter=random.random(),  # noqa: S311 - jitter
                )
                if isinstance(decision, GiveUp):
                    break
                run.retries += 1
                run.waited_s += decision.delay_s
                _log.info(
                    "%s: %s; asking again in %.1f s",
                    *(upstream.name, failure.code, decision.delay_s),
                    extra=run.log_fields,
                )
                self._metrics.asks_again(upstream.name, failure.code)
                retrying: dict[str, Value] = {"error.type": failure.code, "delay_s": decision.delay_s}
                run.span.note("retrying", retrying)
                run.put(Retrying, next_try=run.retries + 1, reason=failure.code, delay_s=decision.delay_s)
                if isinstance(decision, Park):
                    failure = decision
                    break
                with run.not_asking():
                    await asyncio.sleep(decision.delay_s)
        return failure

    async def _try(self, run: Run, question: Question, body: bytes) -> UpstreamError | None:
        """Asks once."""
        upstream, metrics = question.upstream, self._metrics
        async with self._place(run, upstream):
            was_asked, run.was_asked = run.was_asked, True
            metrics.requests[upstream.name] += 1
            metrics.streams[upstream.name] += 1
            try:
                opening = self._client.open(
                    upstream, body, job_id=run.job_id, traceparent=run.span.traceparent
                )
                async with opening as stream:
                    await self._read(run, stream, upstream.name, wanted=question.choices)
            except UpstreamError as error:
                if error.is_refusal:
                    run.was_asked = was_asked
                return error
            finally:
                metrics.streams[upstream.name] -= 1
                run.upstream_closed_at = time.time()
            return self._judge(run, upstream, stream) if run.cause is None else None

    @asynccontextmanager
    async def _place(self, run: Run, upstream: Upstream) -> AsyncIterator[None]:
        """One of the upstream's places, where they are limited. The gateway's time begins when it has one."""
        places = self._places.get(upstream.name)
        if places is None:
            yield
            return
        with run.not_asking():
            self._metrics.waiting[upstream.name] += 1
            try:
                await places.acquire()
            finally:
                self._metrics.waiting[upstream.name] -= 1
        try:
            yield
        finally:
            places.release()

    async def _read(self, run: Run, stream: Stream, upstream: str, *, wanted: int) -> None:
        """The token loop; `wanted` choices are to come. Raises UpstreamError."""
        fold, writer, metrics = run.fold, run.writer, self._metrics

        def take(batch: list[Chunk]) -> bool:
            now = time.time()
            is_first = run.first_delta_at is None
            silent_s = run.saw_delta(now)
            if is_first:
                metrics.first_delta(run, upstream, silent_s, now)
            else:
                metrics.gaps.observe(silent_s)
            metrics.deltas += len(batch)
            for chunk, _ in batch:
                fold.add(chunk)
            writer.put_deltas([line for _, line in batch], now, fold)
            if fold.usage is not None and is_finished(fold, wanted):
                run.saw_all()
            return not writer.is_full and run.cause is None

        while await stream.read(take):
            with run.not_listening():
                has_room = await writer.room()
            if not has_room:
                run.abort(Refused("UNREACHABLE"))
                return

    @staticmethod
    def _judge(run: Run, upstream: Upstream, stream: Stream) -> UpstreamError | None:
        """What is wrong with a stream that has come to its end as HTTP sees it."""
        fold, run.is_done = run.fold, stream.is_done
        if fold.is_empty:
            return UpstreamError("upstream_eof", "the gateway ended the stream before its first delta")
        if stream.is_done and upstream.done_completes and not is_finished(fold):
            chunk = _stopped(fold)
            fold.add(chunk)
            run.writer.put_deltas([msgspec.json.encode(chunk)], time.time(), fold)
        return None


def is_finished(fold: Fold, wanted: int = 1) -> bool:
    """Whether every choice has its finish_reason, and there are as many as were wanted."""
    reasons = fold.finish_reasons()
    return len(reasons) >= wanted and None not in reasons


def _stopped(fold: Fold) -> dict[str, Any]:
    """The chunk that a gateway leaves out which says [DONE], but never why."""
    completion = fold.completion() or {"choices": []}
    choices = [
        {"index": choice["index"], "delta": {}, "finish_reason": "stop"}
        for choice in completion["choices"]
        if choice["finish_reason"] is None
    ]
    top = {name: completion.get(name) for name in ("id", "created", "model")}
    return {**top, "object": "chat.completion.chunk", "choices": choices}
