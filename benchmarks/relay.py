"""Relays under the same load, side by side.

    .venv/bin/python -m benchmarks.relay [--systems deltawire,floor] [--scenarios A,B,C,D,E] [--rounds 3]
        [--seconds 6] [--peers] [--connections 2000] [--json FILE]

    A  200 jobs with one viewer each, 50 deltas per second each
    B  one job with 1,000 viewers, 50 deltas per second
    C  deliveries per second at saturation: 200 jobs of one viewer, at most 2,000 deltas under way
    D  memory per idle connection: all of one quiet job, and each of a job of its own
    E  joining a running job of 2,000 deltas late (and of 4,000 by snapshot)

Each measurement has a Redis and servers of its own. Systems take turns within a round; figures are medians.
"""

import argparse
import gc
import importlib
import json
import pkgutil
import statistics
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks import load, relays
from benchmarks.processes import DidNotStartError, Servers, end_in_order, start_redis
from benchmarks.relays.base import Relay
from benchmarks.report import Table, show

Figures = dict[str, float]
Measurement = Callable[[Relay, Servers, int], Coroutine[Any, Any, dict[str, float]]]

BEHIND: Final = 0.97  # of what was published
LOAD_BOUND: Final = 0.85  # of a core
CONNECTIONS: Final = 2_000
JOINS: Final = 9


def systems(*, with_peers: bool = True) -> list[type[Relay]]:
    """All that modules in `relays` define, ours first, then floors, then peers."""
    for module in pkgutil.iter_modules(relays.__path__):
        if not module.name.endswith(("_server", "_app")):
            importlib.import_module(f"{relays.__name__}.{module.name}")
    found = [kind for kind in _below(Relay) if "name" in vars(kind) and (with_peers or not kind.is_peer)]
    return sorted(found, key=lambda kind: (kind.name != "deltawire", kind.is_peer))


def chosen(words: str) -> list[type[Relay]]:
    """Those that each of the words, separated by commas, names; or, if none has that name, is a part of."""
    known = systems()
    found: list[type[Relay]] = []
    for word in words.split(","):
        exactly = [kind for kind in known if kind.name == word]
        found += exactly or [kind for kind in known if word.lower() in kind.name.lower()]
    if not found:
        raise SystemExit(f"there are: {'; '.join(kind.name for kind in known)}")
    return found


def _below(kind: type[Any]) -> Iterable[type[Relay]]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def measurements(
    scenario: str, kind: type[Relay], seconds: float, connections: int
) -> dict[str, Measurement]:
    """What a scenario measures of a system, by name."""
    match scenario:
        case "A":
            return {"A": partial(load.steady, jobs=200, viewers_each=1, rate=50, seconds=seconds)}
        case "B":
            return {"B": partial(load.steady, jobs=1, viewers_each=1_000, rate=50, seconds=seconds)}
        case "C":
            return {"C": partial(load.saturated, jobs=200, seconds=seconds)}
        case "D":
            return {
                "D": partial(load.idle, connections=connections, jobs=1),
                "D each": partial(load.idle, connections=connections, jobs=connections),
            }
        case "E":
            found: dict[str, Measurement] = {}
            if kind.has_log:
                found["E"] = partial(load.joins, deltas=2_000, times=JOINS)
            if kind.has_snapshots:
                found["E snapshot"] = partial(load.joins, deltas=4_000, times=JOINS, snapshot=True)
            return found
    raise ValueError(f"no scenario {scenario}")


def measure(kind: type[Relay], measurement: Measurement) -> Figures:
    """Starts all that is needed, measures, ends it. Raises DidNotStartError and LoadError."""
    load.allow_many_files()
    with Servers() as servers:
        redis_port = start_redis(servers)
        relay = kind()
        relay.start(servers, redis_port)
        gc.collect()
        gc.disable()
        try:
            return uvloop.run(measurement(relay, servers, redis_port))
        except Exception as error:  # one system that fails must not end an hour's run
            logs = "\n".join(servers.log(name)[-2000:] for name in servers.cpu_s() if name != "redis")
            raise load.LoadError(f"{error}; the servers' logs:\n{logs}") from error
        finally:
            gc.enable()


Results = dict[str, dict[str, list[Figures] | str]]  # by measurement, then by system; text says why not


def run(
    kinds: Sequence[type[Relay]], scenarios: Sequence[str], *, rounds: int, seconds: float, connections: int
) -> Results:
    """Measures each of all, `rounds` times; memory and joins (many of them) once."""
    results: Results = {}
    for number in range(rounds):
        for scenario in scenarios:
            if scenario in "DE" and number:
                continue
            for kind in kinds:
                for name, measurement in measurements(scenario, kind, seconds, connections).items():
                    measure_in_turn(results, kind, name, measurement)
    return results


def measure_in_turn(results: Results, kind: type[Relay], name: str, measurement: Measurement) -> None:
    """Adds a round's figures, or the reason why there are none; then it is not tried again."""
    by_system = results.setdefault(name, {})
    so_far = by_system.setdefault(kind.name, [])
    if isinstance(so_far, str):
        return
    if missing := kind().missing():
        by_system[kind.name] = f"not installed: {missing}"
        return
    try:
        figures = measure(kind, measurement)
    except (load.LoadError, DidNotStartError) as error:
        print(f"{name:10} {kind.name:20} failed: {error}", file=sys.stderr, flush=True)
        by_system[kind.name] = f"failed: {str(error).partition(';')[0].splitlines()[0]}"
        return
    so_far.append(figures)
    shown = "  ".join(f"{key} {value:.5g}" for key, value in figures.items())
    print(f"{name:10} {kind.name:20} {shown}", file=sys.stderr, flush=True)


def medians(rounds: Sequence[Figures]) -> Figures:
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def tables(results: Results) -> list[Table]:
    return [_table(name, title, results[name]) for name, title in TITLES.items() if name in results]


TITLES: Final = {
    "A": "A: 200 jobs with one viewer each, 50 deltas per second each",
    "B": "B: one job with 1,000 viewers, 50 deltas per second",
    "C": "C: saturation, 200 jobs with one viewer each, at most 2,000 deltas under way",
    "D": "D: an idle connection, all of one quiet job",
    "D each": "D: an idle connection, each of a quiet job of its own",
    "E": "E: joining a running job of 2,000 deltas",
    "E snapshot": "E: joining a running job of 4,000 deltas by its snapshot",
}
_EACH: Final = {"us": "µs per delivery", "relay_us": "relay", "redis_us": "Redis"}
_STEADY: Final = {
    **_EACH,
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "max_ms": "max ms",
    "share": "delivered",
    "load": "load's CPU",
}
COLUMNS: Final = {
    "A": _STEADY,
    "B": _STEADY,
    "C": {"per_s": "per second", **_EACH, "lost": "lost", "load": "load's CPU"},
    "D": {"kb": "KB each"},
    "E": {"ms": "ms", "reads": "reads"},
}


def _table(name: str, title: str, by_system: dict[str, list[Figures] | str]) -> Table:
    columns = COLUMNS[name[0]]
    rows: list[list[Any]] = []
    for system, found in by_system.items():
        if isinstance(found, str):
            rows.append([system, found, *[""] * (len(columns) - 1)])
        else:
            figures = medians(found)
            rows.append([system + _remarks(name, figures), *(shown(key, figures[key]) for key in columns)])
    return Table(
        key=name,
        title=title,
        columns=["system", *columns.values()],
        rows=rows,
        notes=[],
        figures=by_system,
    )


def _remarks(name: str, figures: Figures) -> str:
    remarks = []
    if figures.get("share", 1) < BEHIND:
        remarks.append("falls behind")
    if name in "AB" and figures["load"] > LOAD_BOUND:
        remarks.append("bounded by the load")
    return f" ({', '.join(remarks)})" if remarks else ""


def shown(key: str, value: float) -> float | str:
    """As a table shows it."""
    if key in {"share", "load"}:
        return f"{value:.0%}"
    return round(value) if value >= 100 or key in {"lost", "reads"} else round(value, 1)


def rows(*, with_peers: bool, rounds: int, seconds: float) -> list[Table]:
    """All scenarios, as tables."""
    kinds = systems(with_peers=with_peers)
    connections = CONNECTIONS if with_peers else CONNECTIONS // 2
    return tables(run(kinds, "ABCDE", rounds=rounds, seconds=seconds, connections=connections))


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description="Relays under the same load.")
    parser.add_argument("--systems", help="names or parts of them, with commas between; default: no peers")
    parser.add_argument("--scenarios", default="A,B,C,D,E")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kinds = chosen(args.systems) if args.systems else systems(with_peers=args.peers)
    found = run(
        kinds,
        args.scenarios.split(","),
        rounds=args.rounds,
        seconds=args.seconds,
        connections=args.connections,
    )
    for table in tables(found):
        show(table)
    if args.json:
        args.json.write_text(json.dumps(tables(found), indent=1))


if __name__ == "__main__":
    main()
