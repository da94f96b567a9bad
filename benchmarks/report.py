"""Tables of figures: on the terminal, as Markdown, and in docs/performance.md.

    .venv/bin/python -m benchmarks.report [benchmarks/results/NAME.json]

writes the tables of a run into the document, between the markers that name them, and draws its plots.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NotRequired, TypedDict

from rich.console import Console
from rich.table import Table as RichTable

from deltawire.redis_server import find_server

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks/results"
DOCUMENT: Final = ROOT / "docs/performance.md"
PLOTS: Final = ROOT / "docs/performance"
BENCH_PYTHON: Final = ROOT / ".venv-bench/bin/python"


class Table(TypedDict):
    key: str
    title: str
    columns: list[str]
    rows: list[list[Any]]  # numbers, text, None for what does not apply
    notes: list[str]
    figures: NotRequired[Any]  # what they were made of, for plots and whoever wants to know


def facts() -> dict[str, str]:
    """What the figures depend on; nothing that names this machine."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    version = subprocess.run([find_server(), "--version"], capture_output=True, text=True, check=True).stdout
    redis = re.search(r"v=(\S+)", version)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": str(len(os.sched_getaffinity(0))),
        "CPU": model[1] if model else platform.machine(),
        "kernel": platform.release().partition("-")[0],
        "Python": platform.python_version(),
        "Redis": redis[1] if redis else "unknown",
    }


def show(table: Table) -> None:
    """On the terminal."""
    drawn = RichTable(title=table["title"], title_justify="left")
    for number, column in enumerate(table["columns"]):
        drawn.add_column(column, justify="right" if number else "left")
    for row in table["rows"]:
        drawn.add_row(*map(text, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print()
    console.print(drawn)
    for note in table["notes"]:
        console.print(note)


def text(cell: str | float | None) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:,}"


def markdown(table: Table) -> str:
    lines = [
        f"**{table['title']}**",
        "",
        _line(table["columns"]),
        _line(["---", *["---:"] * (len(table["columns"]) - 1)]),
        *(_line([text(cell) for cell in row]) for row in table["rows"]),
    ]
    for note in table["notes"]:
        lines += ["", note]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def put(document: str, part: str, content: str) -> str:
    """The document with `content` between the markers of `part`. Raises ValueError where it has none."""
    begin, end = f"<!-- begin: {part} -->\n", f"<!-- end: {part} -->"
    before, is_there, rest = document.partition(begin)
    if not is_there or end not in rest:
        raise ValueError(f"no markers for {part}")
    return f"{before}{begin}\n{content}\n\n{end}{rest.partition(end)[2]}"


def described(run: dict[str, Any], part: str, plots: Path) -> str:
    """A part's tables, each with its plot in `plots`, and what they were measured on, as Markdown."""
    measured = run["parts"][part]
    blocks = []
    for table in measured["tables"]:
        blocks.append(markdown(table))
        plot = plots / f"{table['key'].lower()}.svg"
        if plot.exists():
            blocks.append(f"![{table['title']}]({plots.name}/{plot.name})")
    where = ", ".join(f"{name} {value}" for name, value in measured["facts"].items())
    rounds, seconds = measured["rounds"], measured["seconds"]
    blocks.append(f"Measured: {where}; rounds: {rounds}, of {seconds:g} s for each measurement.")
    return "\n\n".join(blocks)


def write(run: dict[str, Any]) -> None:
    """The run's tables into the documentation, with the plots that are there."""
    document = DOCUMENT.read_text()
    for part in run["parts"]:
        document = put(document, part, described(run, part, PLOTS))
    DOCUMENT.write_text(document)


def draw(results: Path, folder: Path) -> None:
    """The plots, by the environment that has matplotlib."""
    if not BENCH_PYTHON.exists():
        print("no plots: .venv-bench is not installed (make bench installs it)", file=sys.stderr)
        return
    folder.mkdir(exist_ok=True)
    subprocess.run([BENCH_PYTHON, ROOT / "benchmarks/plots.py", results, folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a run's tables and plots into the documentation.")
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "all.json")
    args = parser.parse_args()
    draw(args.results, PLOTS)
    write(json.loads(args.results.read_text()))


if __name__ == "__main__":
    main()
