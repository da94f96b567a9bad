"""docs/gateways.md: no test without its row, no row without a test and a source, and no boast."""

import re
from pathlib import Path
from typing import Final

from tests.support.gateway_streams import QUIRKS

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "gateways.md").read_text()
TESTS: Final = (ROOT / "tests" / "integration" / "test_gateways.py").read_text()
QUIRK_NAMES: Final = frozenset(quirk.name for quirk in QUIRKS)


def rows() -> list[list[str]]:
    """The cells of the first table's rows, without its head."""
    table = PAGE.partition("\n|---|---|---|---|---|\n")[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.split("\n")]


def names(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def test_each_test_has_one_row() -> None:
    named = [name for *_, test, _ in rows() for name in names(test)]
    assert sorted(name for name in named if name in QUIRK_NAMES) == sorted(QUIRK_NAMES)


def test_each_row_has_tests_that_are_there() -> None:
    for gateway, _, _, test, _ in rows():
        assert names(test), gateway
        for name in names(test):
            function, _, case = name.rstrip("]").partition("[")
            is_function = f"def {function}(" in TESTS and f'"{case}"' in TESTS + '""'
            assert name in QUIRK_NAMES or (ROOT / name).is_file() or is_function, name


def test_each_row_has_a_source() -> None:
    """A link; for what has none, it says whose word it is."""
    for gateway, source, *_ in rows():
        assert "](https://" in source or source.startswith("its "), gateway


def test_what_was_seen_is_what_runs_here() -> None:
    seen = {seen for *_, seen in rows()}
    assert seen == {"no", "recorded bytes", "yes, its proxy with mocked responses"}
