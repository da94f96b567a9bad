"""What is counted comes out as Prometheus reads it."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deltawire.metrics import Histogram, exposition, gauge_family, histogram_family, new_registry


class Waits:
    def __init__(self) -> None:
        self.waits = Histogram((0.1, 1.0))

    def collect(self):  # type: ignore[no-untyped-def] # prometheus_client's protocol
        yield histogram_family("deltawire_wait_seconds", "A wait.", {("a",): self.waits}, ["kind"])


def test_a_histogram_counts_by_upper_bound() -> None:
    """A value on a bound belongs to it; buckets are cumulative; sum and count are those of all."""
    registry, waits = new_registry(), Waits()
    registry.register(waits)
    for value in (0.1, 0.5, 1.0, 7.0):
        waits.waits.observe(value)
    families = {
        family.name: family for family in text_string_to_metric_families(exposition(registry).decode())
    }
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in families["deltawire_wait_seconds"].samples
    }
    assert samples == {
        ("deltawire_wait_seconds_bucket", "0.1"): 1,
        ("deltawire_wait_seconds_bucket", "1.0"): 3,
        ("deltawire_wait_seconds_bucket", "+Inf"): 4,
        ("deltawire_wait_seconds_count", None): 4,
        ("deltawire_wait_seconds_sum", None): 8.6,
    }


def test_who_cannot_tell_keeps_nobody_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """What it told before it failed is there; the log says whose it was."""

    class Fails(Waits):
        def collect(self):  # type: ignore[no-untyped-def] # as above
            yield gauge_family("deltawire_first", "It.", 1)
            raise KeyError("secret")

    registry = new_registry()
    registry.register(Fails(), Waits())
    text = exposition(registry).decode()
    assert "deltawire_first 1.0" in text
    assert "deltawire_wait_seconds_count" in text
    assert "Fails" in caplog.text


def test_a_process_tells_of_itself() -> None:
    """Its memory and its open files are there without anybody's doing."""
    text = exposition(new_registry()).decode()
    assert "process_resident_memory_bytes" in text
    assert "process_open_fds" in text
