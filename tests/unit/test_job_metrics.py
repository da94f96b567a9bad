"""What a worker counts of jobs, tokens and upstreams, and that no label comes from a peer."""

from typing import Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from deltawire.ending import AsCancelled, AsCompleted, AsFailed, AsIncomplete, Ending
from deltawire.errors import WireError
from deltawire.events import TerminalEvent
from deltawire.metrics import exposition, new_registry
from deltawire.options import Options
from deltawire.record import CancelRequest, Record
from deltawire_worker.metrics import MAX_MODELS, JobMetrics
from deltawire_worker.run import Run
from deltawire_worker.upstreams import Upstream, Upstreams
from tests.support import sample_events as sample

UPSTREAMS = Upstreams(
    [Upstream(name="azure", base_url="http://a"), Upstream(name="local", base_url="http://b")]
)
CREATED_AT = sample.completed(1).created_at - 2.0


class World:
    """Metrics, and a reading of what they say."""

    def __init__(self, *, known: frozenset[str] = frozenset({"gpt-5.4"})) -> None:
        self.runs: dict[str, Run] = {}
        self.metrics = JobMetrics(UPSTREAMS, self.runs, capacity=7, knows_model=known.__contains__)
        self.registry: CollectorRegistry = new_registry()
        self.registry.register(self.metrics)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"deltawire_{name}", labels)

    def end(
        self,
        event: TerminalEvent | None = None,
        ending: Ending | None = None,
        *,
        usage: dict[str, Any] | None = None,
        model: object = "gpt-5.4",
    ) -> None:
        event = msgspec.structs.replace(event or sample.completed(3), usage=usage)
        self.metrics.ended(a_run(), event, ending or AsCompleted(), model)


def a_run(**fields: Any) -> Run:
    """What of a run is counted: its attempt and its record."""

    class Counted:
        attempt = fields.pop("attempt", 1)
        record = Record(
            status="in_progress",
            attempt=attempt,
            created_at=CREATED_AT,
            tenant="acme",
            options=Options(),
            **fields,
        )

    return cast("Run", Counted())


def test_a_job_counts_by_its_status() -> None:
    """From the first scrape on there is a 0, so that the first job is an increase."""
    world = World()
    assert world.value("jobs_ended_total", status="completed") == 0
    world.end()
    assert world.value("jobs_ended_total", status="completed") == 1
    assert world.value("job_seconds_sum", status="completed") == pytest.approx(2.0)
    assert world.value("jobs_capacity") == 7


def test_only_the_first_claim_ends_a_wait() -> None:
    """An attempt that another one's death, or a gateway's pause, has brought about was begun before."""
    world = World()
    for run in (a_run(), a_run(attempt=2), a_run(attempt_began_at=CREATED_AT)):
        world.metrics.began(run, CREATED_AT + 1)
    assert world.value("jobs_started_total") == 3
    assert world.value("queue_seconds_count") == 1
    assert world.value("queue_seconds_sum") == pytest.approx(1.0)


def test_a_clock_behind_another_counts_as_no_wait() -> None:
    """A sum that shrinks would be a counter that was reset."""
    world = World()
    world.metrics.began(a_run(), CREATED_AT - 100)
    world.metrics.first_delta(a_run(), "azure", 0.5, CREATED_AT - 100)
    assert world.value("queue_seconds_sum") == 0
    assert world.value("time_to_first_delta_seconds_sum") == 0
    assert world.value("upstream_first_delta_seconds_sum", upstream="azure") == 0.5


def test_tokens_count_by_models_that_are_known() -> None:
    """Whatever else a request names is `other`, also what is no text at all."""
    world = World()
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    for model in ("gpt-5.4", "made up", None, ["gpt-5.4"]):
        world.end(usage=usage, model=model)
    for kind, count in (("input", 3), ("output", 5)):
        assert world.value("tokens_total", model="gpt-5.4", kind=kind) == count
        assert world.value("tokens_total", model="other", kind=kind) == 3 * count
    assert "made up" not in exposition(world.registry).decode()


def test_models_are_bounded() -> None:
    """An upstream that lists new names for ever does not fill Prometheus."""
    names = [f"m{number}" for number in range(2 * MAX_MODELS)]
    world = World(known=frozenset(names))
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    for name in names:
        world.end(usage=usage, model=name)
    assert world.value("tokens_total", model="m0", kind="input") == 1
    assert world.value("tokens_total", model="other", kind="input") == MAX_MODELS
    assert world.value("tokens_total", model=names[-1], kind="input") is None


@pytest.mark.parametrize("count", [None, "5", -5, 1.5, 10**30, [], {}])
def test_a_usage_that_is_none_counts_nothing(count: Any) -> None:
    """Whatever JSON a gateway sends as its usage."""
    world = World()
    world.end(usage={"prompt_tokens": count, "completion_tokens": 4})
    assert world.value("tokens_total", model="gpt-5.4", kind="input") == 0
    assert world.value("tokens_total", model="gpt-5.4", kind="output") == 4


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (AsFailed(WireError("upstream_rate_limit", "x"), "upstream"), "upstream_rate_limit"),
        (AsFailed(WireError("first_delta_timeout", "x"), "upstream"), "first_delta_timeout"),
        (AsIncomplete("upstream_eof"), "upstream_eof"),
        (AsIncomplete("idle_timeout"), "idle_timeout"),
        (AsIncomplete("length"), None),
        (AsFailed(WireError("internal_error", "x"), "worker"), None),
        (AsCompleted(), None),
    ],
)
def test_an_upstreams_failures_count_by_our_codes(ending: Ending, kind: str | None) -> None:
    """Of the upstream that failed; what was ours, or nobody's, is none of them."""
    world = World()
    world.metrics.streamed("azure", ending)
    world.metrics.asks_again("local", "upstream_busy")
    text = exposition(world.registry).decode()
    errors = [
        line for line in text.splitlines() if "upstream_errors_total{" in line and not line.endswith(" 0.0")
    ]
    assert len(errors) == 1 + (kind is not None)
    assert world.value("upstream_errors_total", **{"upstream": "local", "class": "upstream_busy"}) == 1
    assert world.value("retries_total", reason="upstream_busy") == 1
    if kind is not None:
        assert world.value("upstream_errors_total", **{"upstream": "azure", "class": kind}) == 1


@pytest.mark.parametrize(
    ("requested_at", "heard_at", "closed_at", "delay_s"),
    [
        (10.0, 10.5, 10.75, 0.75),
        (None, 10.5, 10.75, 0.25),  # a bare cancel key does not say when it was set
        (10.0, 10.5, 9.0, None),  # between two tries nothing was open
        (10.0, 10.5, None, None),
    ],
)
def test_a_cancel_counts_until_the_upstream_is_closed(
    requested_at: float | None, heard_at: float, closed_at: float | None, delay_s: float | None
) -> None:
    """Where one was open when it was requested."""
    world = World()
    world.end(sample.cancelled(3), AsCancelled(CancelRequest("client", requested_at), heard_at, closed_at))
    assert world.value("cancel_delay_seconds_count") == (delay_s is not None)
    assert world.value("cancel_delay_seconds_sum") == (delay_s or 0)
