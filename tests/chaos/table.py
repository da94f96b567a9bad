"""What a run of the chaos suite is asked for, and the table that it prints at its end.

    DELTAWIRE_CHAOS=full       the numbers of `make chaos`; without it the short form that `make test` runs
    DELTAWIRE_CHAOS_SEED=7     repeats a run's dice
    DELTAWIRE_CHAOS_JSON=path  writes the table as JSON, too

Rows travel as properties of test reports, so that they arrive from the processes of pytest-xdist as well; and
because those inherit the environment, they have one seed.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

PROPERTY: Final = "chaos"
IS_FULL: Final = os.environ.get("DELTAWIRE_CHAOS") == "full"
SEED: Final = int(os.environ.get("DELTAWIRE_CHAOS_SEED") or random.randrange(10_000))
os.environ["DELTAWIRE_CHAOS_SEED"] = str(SEED)

Row = dict[str, Any]
_COLUMNS: Final = (
    ("scenario", 32),
    ("jobs", 6),
    ("subscribers", 12),
    ("events", 9),
    ("lost", 5),
    ("doubled", 8),
    ("out_of_order", 13),
    ("unended", 8),
    ("snapshots", 10),
    ("unannounced", 12),
    ("restarts", 9),
    ("faults", 7),
    ("longest_wait_s", 15),
    ("longest_silence_s", 18),
    ("seconds", 8),
    ("seed", 6),
)


def print_table(reporter: pytest.TerminalReporter) -> None:
    """A row for each scenario that was run, with what was broken below it."""
    rows: list[Row] = [
        value
        for reports in reporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "teardown"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not rows:
        return
    reporter.section(f"chaos ({'full' if IS_FULL else 'short'} form)")
    for text in _lines(rows):
        reporter.line(text)
    if path := os.environ.get("DELTAWIRE_CHAOS_JSON"):
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    yield _aligned([name.replace("_", " ") for name, _ in _COLUMNS])
    for row in rows:
        values = [row[name] for name, _ in _COLUMNS]
        yield _aligned([f"{value:.1f}" if isinstance(value, float) else str(value) for value in values])
        yield "    " + ", ".join(f"{count} {ending}" for ending, count in row["endings"].items())
        for what in row["broken"][:5]:
            yield f"    broken: {what}"


def _aligned(cells: Sequence[str]) -> str:
    """The first column to the left, figures to the right."""
    (_, width), *rest = _COLUMNS
    return cells[0].ljust(width) + "".join(
        cell.rjust(width) for cell, (_, width) in zip(cells[1:], rest, strict=True)
    )
