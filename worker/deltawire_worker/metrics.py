"""What a worker counts of its jobs and of the upstreams that it asks."""

from collections.abc import Callable, Iterator, Sized
from typing import Any, Final

from prometheus_client.core import Metric

from deltawire.ending import AsCancelled, AsFailed, AsIncomplete, Ending
from deltawire.errors import ERRORS
from deltawire.events import Failed, TerminalEvent
from deltawire.metrics import Histogram, counter_family, gauge_family, histogram_family

from .run import Run
from .upstreams import Upstreams

MAX_MODELS: Final = 500
"""Further ones are `other`, too: an upstream may list new names for ever."""
OTHER: Final = "other"
STATUSES: Final = ("completed", "incomplete", "failed", "cancelled")
_DEADLINES: Final = ("connect_timeout", "first_delta_timeout", "idle_timeout")
UPSTREAM_CLASSES: Final = (*_DEADLINES, *(code for code in ERRORS if code.startswith("upstream_")))
Histograms = dict[tuple[str, ...], Histogram]
_CLAIMS: Final = ("claimed", "missing", "ended", "own", "parked", "held", "expired")


class JobMetrics:
    """Plain numbers, for whoever runs jobs to add to. `knows_model` says which names may be told."""

    def __init__(
        self, upstreams: Upstreams, runs: Sized, *, capacity: int, knows_model: Callable[[str], bool]
    ) -> None:
        names = [upstream.name for upstream in upstreams]
        self._runs = runs
        self._capacity = capacity
        self._knows_model = knows_model
        self._claims = dict.fromkeys(_CLAIMS, 0)
        self._started = 0
        self._failed: dict[str, int] = {}
        self._jobs: Histograms = {(status,): Histogram() for status in STATUSES}
        self._queued = Histogram()
        self._first_deltas = Histogram()
        self._upstream_first_deltas: Histograms = {(name,): Histogram() for name in names}
        self._upstream_errors = {(name, kind): 0 for name in names for kind in UPSTREAM_CLASSES}
        self._retries: dict[str, int] = {}
        self._tokens: dict[tuple[str, ...], int] = {}
        self._cancel_delays = Histogram()
        self.gaps = Histogram()
        self.deltas = 0
        self.requests = dict.fromkeys(names, 0)
        self.streams = dict.fromkeys(names, 0)
        self.waiting = dict.fromkeys(names, 0)

    def claimed(self, result: str) -> None:
        """A claim was answered, by one of the script's codes."""
        self._claims[result.lower()] += 1

    def began(self, run: Run, now: float) -> None:
        self._started += 1
        if run.attempt == 1 and run.record.attempt_began_at is None:
            self._queued.observe(max(0.0, now - run.record.created_at))

    def first_delta(self, run: Run, upstream: str, silent_s: float, now: float) -> None:
        """The first delta came, `silent_s` after the upstream was asked."""
        self._upstream_first_deltas[upstream,].observe(silent_s)
        if run.record.first_delta_at is None:  # else an attempt before this one has had it
            self._first_deltas.observe(max(0.0, now - run.record.created_at))

    def asks_again(self, upstream: str, code: str) -> None:
        """A request failed, and is to be repeated."""
        self._retries[code] = self._retries.get(code, 0) + 1
        self._count_error(upstream, code)

    def streamed(self, upstream: str, ending: Ending) -> None:
        """The last request of a job ended so."""
        if isinstance(ending, AsIncomplete):
            self._count_error(upstream, ending.reason)
        elif isinstance(ending, AsFailed):
            self._count_error(upstream, ending.error.code)

    def _count_error(self, upstream: str, code: str) -> None:
        if code in UPSTREAM_CLASSES:  # else it is none of the upstream's
            self._upstream_errors[upstream, code] += 1

    def ended(self, run: Run, event: TerminalEvent, ending: Ending, model: object) -> None:
        """The log has the job's terminal event."""
        self._jobs[event.status,].observe(max(0.0, event.created_at - run.record.created_at))
        if isinstance(event, Failed):
            code = event.error.code
            self._failed[code] = self._failed.get(code, 0) + 1
        if event.usage is not None:
            self._count_tokens(model, event.usage)
        if isinstance(ending, AsCancelled) and ending.upstream_closed_at is not None:
            requested_at = ending.request.requested_at or ending.heard_at
            if ending.upstream_closed_at >= requested_at:  # else it had been closed before
                self._cancel_delays.observe(ending.upstream_closed_at - requested_at)

    def _count_tokens(self, model: object, usage: dict[str, Any]) -> None:
        name = model if isinstance(model, str) and self._knows_model(model) else OTHER
        if (name, "input") not in self._tokens and len(self._tokens) >= 2 * MAX_MODELS:
            name = OTHER
        for kind, field in (("input", "prompt_tokens"), ("output", "completion_tokens")):
            count = usage.get(field)  # whatever JSON the gateway sent
            if not isinstance(count, int) or not 0 <= count < 2**53:
                count = 0
            self._tokens[name, kind] = self._tokens.get((name, kind), 0) + count

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_jobs()
        yield from self._collect_upstreams()

    def _collect_jobs(self) -> Iterator[Metric]:
        yield counter_family(
            "deltawire_claims_total", "Claims of jobs whose message came.", self._claims, ["result"]
        )
        yield counter_family("deltawire_jobs_started_total", "Attempts that were begun.", self._started)
        ended = {status: sum(histogram.counts) for (status,), histogram in self._jobs.items()}
        yield counter_family("deltawire_jobs_ended_total", "Jobs that ended here.", ended, ["status"])
        yield counter_family(
            "deltawire_jobs_failed_total", "Jobs that failed here, by their error.", self._failed, ["code"]
        )
        yield gauge_family("deltawire_jobs_running", "Attempts under way.", len(self._runs))
        yield gauge_family("deltawire_jobs_capacity", "Jobs taken at a time.", self._capacity)
        yield histogram_family(
            "deltawire_queue_seconds", "From a job's creation to its first claim.", {(): self._queued}
        )
        yield histogram_family(
            "deltawire_job_seconds", "From a job's creation to its end.", self._jobs, ["status"]
        )
        yield histogram_family(
            "deltawire_time_to_first_delta_seconds",
            "From a job's creation to its first delta.",
            {(): self._first_deltas},
        )
        yield histogram_family(
            "deltawire_delta_gap_seconds", "Between two reads that brought deltas.", {(): self.gaps}
        )
        yield counter_family("deltawire_deltas_total", "Deltas read from upstreams.", self.deltas)
        yield counter_family(
            "deltawire_tokens_total", "Tokens, by what was asked for.", self._tokens, ["model", "kind"]
        )
        yield histogram_family(
            "deltawire_cancel_delay_seconds",
            "From a cancellation's request to the end of the upstream's stream.",
            {(): self._cancel_delays},
        )

    def _collect_upstreams(self) -> Iterator[Metric]:
        yield histogram_family(
            "deltawire_upstream_first_delta_seconds",
            "From asking the upstream to the first delta.",
            self._upstream_first_deltas,
            ["upstream"],
        )
        yield counter_family(
            "deltawire_upstream_requests_total", "Completions asked for.", self.requests, ["upstream"]
        )
        yield counter_family(
            "deltawire_upstream_errors_total",
            "Requests to an upstream that failed.",
            self._upstream_errors,
            ["upstream", "class"],
        )
        yield gauge_family("deltawire_upstream_streams", "Requests under way.", self.streams, ["upstream"])
        yield gauge_family(
            "deltawire_upstream_waiting",
            "Jobs that wait for one of an upstream's max_streams.",
            self.waiting,
            ["upstream"],
        )
        yield counter_family(
            "deltawire_retries_total", "Upstreams asked again, by why.", self._retries, ["reason"]
        )
