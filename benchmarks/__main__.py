"""All benchmarks: python -m benchmarks [--peers] [--parts relay,growth,worker,path] [--name NAME]

Prints tables, and leaves NAME.json, NAME.md and the plots in benchmarks/results. Parts that are not measured
this time stay in NAME.json as they were. docs/performance.md says what is measured and how.
"""

import argparse
import importlib
import json

from benchmarks import report
from benchmarks.processes import end_in_order

PARTS = ("relay", "growth", "worker", "path")


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description="Measure deltawire, floors and the usual way.")
    parser.add_argument("--peers", action="store_true", help="and everybody else")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, help="2, or 3 with peers")
    parser.add_argument("--seconds", type=float, help="of each measurement: 2, or 4 with peers")
    parser.add_argument("--name", help="of the results: bench, or all with peers")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.peers else 2)
    seconds = args.seconds or (4 if args.peers else 2)
    report.RESULTS.mkdir(exist_ok=True)
    file = report.RESULTS / f"{args.name or ('all' if args.peers else 'bench')}.json"
    run = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    for part in args.parts.split(","):
        if part not in PARTS:
            parser.error(f"no part {part}; there are {', '.join(PARTS)}")
        measured = importlib.import_module(f"benchmarks.{part}").rows(
            with_peers=args.peers, rounds=rounds, seconds=seconds
        )
        tables = measured if isinstance(measured, list) else [measured]
        for table in tables:
            report.show(table)
        run["parts"][part] = {
            "facts": report.facts(),
            "rounds": rounds,
            "seconds": seconds,
            "tables": tables,
        }
        # After each part: an hour's work must not be lost with the last one.
        file.write_text(json.dumps(run, indent=1) + "\n")
    plots = file.with_suffix("")
    report.draw(file, plots)
    described = [f"# {part}\n\n{report.described(run, part, plots)}\n" for part in run["parts"]]
    file.with_suffix(".md").write_text("\n".join(described))


if __name__ == "__main__":
    main()
