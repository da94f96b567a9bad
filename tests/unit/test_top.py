"""What `deltawire top` makes of what processes say."""

from io import StringIO

from rich.console import Console

from deltawire.cli.top import Pulse, picture, table
from deltawire.vitals import Vitals


def worker(at: float, *, name: str = "w", **counts: float) -> Vitals:
    return Vitals(
        kind="worker", name=name, host="h", pid=1, version="1", started_at=0.0, at=at, counts=counts
    )


def test_rates_are_of_the_last_two_words() -> None:
    """Of counts that grow; one that begins again is no negative rate."""
    pulse = Pulse(now=lambda: 0.0)
    pulse.hear(worker(10.0, events_total=100, running=1))
    assert pulse.processes()[0].rates == {}
    pulse.hear(worker(12.0, events_total=300, running=2))
    (process,) = pulse.processes()
    assert (process.rates, process.counts["running"]) == ({"events": 100.0}, 2)
    pulse.hear(worker(13.0, events_total=5))
    assert pulse.processes()[0].rates == {"events": 0.0}


def test_who_is_silent_is_forgotten() -> None:
    """A process that died leaves the table by itself."""
    now = 0.0
    pulse = Pulse(now=lambda: now)
    pulse.hear(worker(0.0, name="a"))
    now = 4.0
    pulse.hear(worker(4.0, name="b"))
    assert len(pulse.processes()) == 2
    now = 6.0
    assert [process.name for process in pulse.processes()] == ["b"]


def test_what_cannot_be_had_is_said() -> None:
    """The rest is shown all the same."""
    pulse = Pulse(now=lambda: 0.0)
    pulse.hear(worker(0.0, running=3, places=10))
    shown = picture(pulse.processes(), {"queued": None, "parked": 1}, None, 0.0)
    console = Console(width=120, record=True, file=StringIO())
    console.print(table(shown))
    text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    assert "running 3   queued ?   parked 1   messages ?" in text
    assert "h:1" in text
