"""Draws a run's plots: .venv-bench/bin/python benchmarks/plots.py RESULTS.json FOLDER

Bars for what a delivery costs (A, B) and for saturation (C), lines for growth. The same figures make the same
bytes.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

OURS, OTHERS, REDIS, INK = "#1f6feb", "#8c959f", "#d0d7de", "#24292f"
BEHIND = 0.97

mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "deltawire",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": REDIS,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def medians(by_system: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the systems that were measured; text says why one was not."""
    return {
        system: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        for system, rounds in by_system.items()
        if not isinstance(rounds, str)
    }


def colour(system: str) -> str:
    return OURS if system.startswith("deltawire") else OTHERS


def costs(table: dict[str, Any], file: Path) -> None:
    found = sorted(medians(table["figures"]).items(), key=lambda item: item[1]["us"])
    _, axes = plt.subplots(figsize=(7.5, 0.6 + 0.34 * len(found)))
    widest = found[-1][1]["us"]
    for place, (system, figures) in enumerate(found):
        axes.barh(place, figures["relay_us"], color=colour(system), height=0.66)
        axes.barh(place, figures["redis_us"], left=figures["relay_us"], color=REDIS, height=0.66)
        said = f"{figures['us']:.0f} µs, p99 {figures['p99_ms']:,.0f} ms"
        beside(axes, figures["us"], place, said + ", falls behind" * (figures["share"] < BEHIND))
    label(axes, [system for system, _ in found])
    axes.set_xlim(0, widest * 1.45)
    axes.set_title(f"{table['title']}\nCPU per delivery: relay, and Redis in light grey")
    save(file)


def saturation(table: dict[str, Any], file: Path) -> None:
    found = sorted(medians(table["figures"]).items(), key=lambda item: -item[1]["per_s"])
    _, axes = plt.subplots(figsize=(7.5, 0.6 + 0.34 * len(found)))
    for place, (system, figures) in enumerate(found):
        axes.barh(place, figures["per_s"], color=colour(system), height=0.66)
        beside(axes, figures["per_s"], place, f"{figures['per_s']:,.0f}")
    label(axes, [system for system, _ in found])
    axes.set_xlim(0, found[0][1]["per_s"] * 1.2)
    axes.set_title(f"{table['title']}\ndeliveries per second")
    save(file)


def growth(table: dict[str, Any], file: Path) -> None:
    _, axes = plt.subplots(figsize=(7.5, 3))
    highest = 0.0
    for system, points in table["figures"].items():
        counts = [point["count"] for point in points]
        for key, style in (("us", "-"), ("relay_us", ":")):
            values = [point[key] for point in points]
            axes.plot(counts, values, style, color=colour(system), marker="o", markersize=4)
            highest = max(highest, *values)
        beside(axes, counts[-1], points[-1]["us"], system)
    axes.set_xscale("log")
    ticks = sorted({point["count"] for points in table["figures"].values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, highest * 1.15)
    axes.set_xlabel(table["columns"][1])
    axes.set_title(f"{table['title']}\nCPU per delivery in µs (dotted: without Redis)")
    save(file)


def beside(axes: Any, x: float, y: float, said: str) -> None:
    axes.annotate(said, (x, y), xytext=(5, 0), textcoords="offset points", va="center")


def label(axes: Any, systems: list[str]) -> None:
    axes.set_yticks(range(len(systems)), systems)
    for tick, system in zip(axes.get_yticklabels(), systems, strict=True):
        tick.set_fontweight("bold" if system.startswith("deltawire") else "normal")
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(left=False)


def save(file: Path) -> None:
    plt.savefig(file, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close()


def main(results: Path, folder: Path) -> None:
    drawn = {"A": costs, "B": costs, "C": saturation, "growth-streams": growth, "growth-subscribers": growth}
    for part in json.loads(results.read_text())["parts"].values():
        for table in part["tables"]:
            if (draw := drawn.get(table.get("key", ""))) and table["figures"]:
                draw(table, folder / f"{table['key'].lower()}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
