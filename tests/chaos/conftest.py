"""What the scenarios share: the size of this run, and their rows in the table at its end."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from tests.chaos.scenario import Scenario
from tests.chaos.table import IS_FULL, PROPERTY, SEED
from tests.support.ledger import Figures
from tests.support.system import System

Value = TypeVar("Value")


class Chaos:
    """What a scenario wants to know of this run."""

    is_full = IS_FULL
    seed = SEED

    def __init__(self) -> None:
        self.rows: list[Figures] = []

    @staticmethod
    def pick(full: Value, short: Value) -> Value:
        """The value for this run's size."""
        return full if IS_FULL else short

    @staticmethod
    def bound(seconds: float) -> float:
        """A bound of time: as promised in a full run, generous where a busy CI machine runs the short one."""
        return seconds if IS_FULL else max(2 * seconds, seconds + 15)

    def row(self, name: str) -> Figures:
        """A new row of the table."""
        self.rows.append(Figures(name, SEED))
        return self.rows[-1]

    def scenario(self, name: str, system: System) -> Scenario:
        """On a system, whose relays its viewers all know."""
        relays: Sequence[str] = [f"127.0.0.1:{port}" for port in system.relay_ports]
        return Scenario(self.row(name), system.redis_url, relays)


@pytest.fixture
def chaos(request: pytest.FixtureRequest) -> Iterator[Chaos]:
    chaos = Chaos()
    yield chaos
    request.node.user_properties += [(PROPERTY, dataclasses.asdict(row)) for row in chaos.rows]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900 if IS_FULL else 300))
