"""What the services count, for Prometheus: plain numbers that cost an addition, read when somebody scrapes.

Whatever has something to tell has a method `collect`, as prometheus_client's collectors do, and its numbers
in plain attributes; the composition root registers it. Names are `deltawire_*`, units are base units, and a
label's values come from a set that is configured or fixed, never from a peer.
"""

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, cast

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from . import __version__

_log = logging.getLogger(__name__)

LAG_INTERVAL_S: Final = 0.25

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

F = TypeVar("F", CounterMetricFamily, GaugeMetricFamily)

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets for durations, from what we add ourselves to what a gateway may take."""


class Histogram:
    """Counts values by upper bounds. An observation is a search among a few numbers and two additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self) -> list[tuple[str, float]]:
        """Cumulative, as the format wants it: (upper bound, how many were not above it)."""
        so_far, samples = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            so_far += count
            samples.append(("+Inf" if bound == float("inf") else repr(bound), float(so_far)))
        return samples


Values = float | Mapping[Any, float]
"""A number; or numbers by their labels' values: a tuple of texts, or a text where there is one label."""


def counter_family(name: str, about: str, values: Values, labels: Sequence[str] = ()) -> CounterMetricFamily:
    """What only grows; `name` ends in `_total`."""
    return _filled(CounterMetricFamily(name, about, labels=labels), values)


def gauge_family(name: str, about: str, values: Values, labels: Sequence[str] = ()) -> GaugeMetricFamily:
    """What comes and goes."""
    return _filled(GaugeMetricFamily(name, about, labels=labels), values)


def _filled(family: F, values: Values) -> F:
    for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        family.add_metric((labels,) if isinstance(labels, str) else labels, value)
    return family


def histogram_family(
    name: str, about: str, histograms: Mapping[tuple[str, ...], Histogram], labels: Sequence[str] = ()
) -> HistogramMetricFamily:
    """One family of histograms by their labels' values (`()` where there are no labels)."""
    family = HistogramMetricFamily(name, about, labels=labels)
    for values, histogram in histograms.items():
        family.add_metric(values, buckets=histogram.samples(), sum_value=histogram.total)
    return family


class LoopLag:
    """How late the event loop comes back to a timer: what everything on it waits at the least."""

    def __init__(self) -> None:
        self._lag = Histogram()

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            # Not by the loop's clock: uvloop's stands still while it makes its calls.
            due = time.monotonic() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self._lag.observe(max(0.0, time.monotonic() - due))

    def collect(self) -> Iterator[Metric]:
        yield histogram_family(
            "deltawire_loop_lag_seconds",
            "How much later than asked for the event loop came back to a timer.",
            {(): self._lag},
        )


class BuildInfo:
    """Which service of which version answers."""

    def __init__(self, service: str) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield gauge_family(
            "deltawire_build_info", "1.", {(self._service, __version__): 1}, ["service", "version"]
        )


class Collects(Protocol):
    """Has something to tell."""

    def collect(self) -> Iterable[Metric]: ...


class _Only:
    """A collector and nothing else: prometheus_client would call a method `describe`, whatever it is for.

    One that fails tells nothing, and nobody is kept from the others.
    """

    def __init__(self, collects: Collects) -> None:
        self._collects = collects

    def collect(self) -> Iterator[Metric]:
        try:
            yield from self._collects.collect()
        except Exception:  # noqa: BLE001 - else an operator is blind just when something is wrong
            _log.exception("cannot tell the metrics of %s", type(self._collects).__name__)


class Registry(CollectorRegistry):
    """What a service tells of itself."""

    def register(self, *collects: Collects) -> None:
        """Each name must be told by one of them only."""
        for each in collects:
            super().register(cast("Collector", _Only(each)))


def new_registry() -> Registry:
    """One with what is told of every process: its memory, CPU time and open files."""
    registry = Registry()
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """What a scrape gets, in CONTENT_TYPE."""
    return generate_latest(registry)
