"""The benchmark suite works: its arithmetic, and a run of a second that delivers everything in order."""

import re
from functools import partial
from typing import Any

import pytest
from benchmarks import load
from benchmarks.load import UNIT, Marks, Tally, percentile
from benchmarks.relay import BEHIND, chosen, measure, medians, shown, systems, tables
from benchmarks.relays.base import MARK, chunk
from benchmarks.report import Table, markdown, put

STREAM = b"".join(b"\x81\x7e\x01\x48" + chunk(number, 1.5 * number) for number in range(3))


@pytest.mark.parametrize("size", [1, 2, UNIT - 1, UNIT, UNIT + 1, 250])
def test_each_mark_is_counted_once_wherever_reads_cut_it(size: int) -> None:
    marks = Marks()
    pieces = [marks.complete(STREAM[at : at + size]) for at in range(0, len(STREAM), size)]
    assert sum(piece.count(MARK) for piece in pieces) == 3
    whole = [piece for piece in pieces if MARK in piece]
    for piece in whole:  # the digits are there with it
        at = piece.index(MARK)
        assert piece[at + len(MARK) : at + UNIT].isdigit()


def test_a_cut_anywhere_loses_nothing() -> None:
    for cut in range(len(STREAM)):
        marks = Marks()
        found = marks.complete(STREAM[:cut]) + marks.complete(STREAM[cut:])
        assert found.count(MARK) == 3


def test_percentiles_are_by_rank() -> None:
    ordered = list(range(100))
    assert [percentile(ordered, share) for share in (0, 0.5, 0.99, 1)] == [0, 50, 99, 99]
    assert percentile([], 0.5) == 0


def test_medians_are_by_figure() -> None:
    assert medians([{"us": 1, "ms": 9}, {"us": 3, "ms": 7}, {"us": 2, "ms": 8}]) == {"us": 2, "ms": 8}


def test_figures_are_shown_with_the_digits_that_mean_something() -> None:
    assert [shown("us", 61.26), shown("per_s", 57_000.4), shown("load", 0.427)] == [61.3, 57_000, "43%"]


def test_a_table_says_what_was_not_measured_and_what_fell_behind() -> None:
    figures = dict.fromkeys(("us", "relay_us", "redis_us", "p50_ms", "p99_ms", "max_ms"), 1.0)
    [table] = tables(
        {
            "A": {
                "good": [{**figures, "share": 1.0, "load": 0.5}],
                "slow": [{**figures, "share": BEHIND - 0.1, "load": 0.5}],
                "cheap": [{**figures, "share": 1.0, "load": 0.9}],
                "absent": "not installed: install it",
            }
        }
    )
    assert [row[0] for row in table["rows"]] == [
        "good",
        "slow (falls behind)",
        "cheap (bounded by the load)",
        "absent",
    ]
    assert table["rows"][-1][1] == "not installed: install it"
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_a_table_is_markdown_between_its_markers() -> None:
    table = Table(key="A", title="A", columns=["system", "µs"], rows=[["a | b", 57_000]], notes=["Noted."])
    document = put("before\n<!-- begin: A -->\nold\n<!-- end: A -->\nafter\n", "A", markdown(table))
    assert "| system | µs |\n| --- | ---: |\n| a / b | 57,000 |\n\nNoted." in document
    assert "old" not in document
    assert put(document, "A", markdown(table)) == document
    with pytest.raises(ValueError, match="no markers for B"):
        put(document, "B", "")


def test_ours_comes_first_and_peers_only_when_asked_for() -> None:
    names = [kind.name for kind in systems(with_peers=False)]
    assert names[0] == "deltawire"
    assert {"floor", "floor-log", "tutorial"} <= set(names)
    assert not any(kind.is_peer for kind in systems(with_peers=False))
    assert [kind.name for kind in chosen("floor-log,deltawire")] == ["floor-log", "deltawire"]


@pytest.mark.parametrize("name", ["deltawire", "floor", "floor-log", "bare socket"])
def test_all_that_is_published_is_delivered_in_order(name: str) -> None:
    [kind] = chosen(name)
    tally = Tally()
    tally.kept = []
    amount: dict[str, Any] = {"jobs": 5, "viewers_each": 2, "rate": 50.0, "seconds": 0.5, "warm_up_s": 0.1}
    figures = measure(kind, partial(load.steady, tally=tally, **amount))
    assert figures["lost"] == 0
    assert figures["us"] > 0
    received = [numbers(b"".join(reads)) for reads in tally.kept]
    assert len(received) == 10
    assert all(seen == list(range(len(seen))) for seen in received)
    assert sum(map(len, received)) == tally.delivered > 0


@pytest.mark.parametrize("name", ["deltawire", "floor-log"])
def test_a_late_viewer_gets_everything(name: str) -> None:
    [kind] = chosen(name)
    for snapshot in {False, kind.has_snapshots}:
        figures = measure(kind, partial(load.joins, deltas=60, times=2, snapshot=snapshot))
        assert figures["reads"] >= 1


def numbers(received: bytes) -> list[int]:
    """Those of the deltas in what a viewer received."""
    return [int(found) for found in re.findall(rb"(\d{8}) " + MARK, received)]
