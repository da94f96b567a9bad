"""What a delivery costs the relay and Redis as streams, or subscribers of one job, become more.

    .venv/bin/python -m benchmarks.growth [--systems deltawire] [--rounds 2] [--seconds 3] [--json FILE]

All points have the same deliveries per second, so that only the number of what there is differs.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import load
from benchmarks.processes import end_in_order
from benchmarks.relay import Measurement, Results, chosen, measure_in_turn, medians, shown
from benchmarks.relays.base import Relay
from benchmarks.report import Table, show

STREAMS: Final = (10, 50, 200, 700, 2_000)
STREAM_DELIVERIES_PER_S: Final = 10_000
SUBSCRIBERS: Final = (10, 100, 1_000, 3_000, 10_000)
SHARED_DELIVERIES_PER_S: Final = 20_000
COLUMNS: Final = {
    "us": "µs per delivery",
    "relay_us": "relay",
    "redis_us": "Redis",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "load": "load's CPU",
}


def run(kinds: Sequence[type[Relay]], *, rounds: int, seconds: float, step: int = 1) -> Results:
    """Names of measurements are `streams N` and `subscribers N`; each `step`th of them is made."""
    points: dict[str, Measurement] = {}
    for count in STREAMS[::step]:
        rate = STREAM_DELIVERIES_PER_S / count
        points[f"streams {count}"] = partial(
            load.steady, jobs=count, viewers_each=1, rate=rate, seconds=seconds
        )
    for count in SUBSCRIBERS[::step]:
        rate = SHARED_DELIVERIES_PER_S / count
        points[f"subscribers {count}"] = partial(
            load.steady, jobs=1, viewers_each=count, rate=rate, seconds=seconds
        )
    results: Results = {}
    for _ in range(rounds):
        for name, point in points.items():
            for kind in kinds:
                measure_in_turn(results, kind, name, point)
    return results


def tables(results: Results) -> list[Table]:
    titles = {
        "streams": f"streams of one viewer each; {STREAM_DELIVERIES_PER_S:,} deliveries per second in all",
        "subscribers": f"subscribers of one job; {SHARED_DELIVERIES_PER_S:,} deliveries per second in all",
    }
    return [_table(what, title, results) for what, title in titles.items()]


def _table(what: str, title: str, results: Results) -> Table:
    rows: list[list[Any]] = []
    figures: dict[str, list[dict[str, float]]] = {}
    for name, by_system in results.items():
        if not name.startswith(what):
            continue
        count = int(name.removeprefix(what))
        for system, found in by_system.items():
            if isinstance(found, str):
                rows.append([system, count, found, *[""] * (len(COLUMNS) - 1)])
            else:
                point = medians(found)
                rows.append([system, count, *(shown(key, point[key]) for key in COLUMNS)])
                figures.setdefault(system, []).append({"count": count, **point})
    return Table(
        key=f"growth-{what}",
        title=f"Growth: {title}",
        columns=["system", what, *COLUMNS.values()],
        rows=sorted(rows, key=lambda row: str(row[0])),
        notes=[],
        figures=figures,
    )


def rows(*, with_peers: bool, rounds: int, seconds: float) -> list[Table]:
    """Ours; beside the floor, and at more points, if peers are wanted."""
    if with_peers:
        return tables(run(chosen("deltawire,floor"), rounds=rounds, seconds=seconds))
    return tables(run(chosen("deltawire"), rounds=1, seconds=seconds, step=2))


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description="What a delivery costs as there is more of everything.")
    parser.add_argument("--systems", default="deltawire")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = tables(run(chosen(args.systems), rounds=args.rounds, seconds=args.seconds))
    for table in found:
        show(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
