"""Fixtures of the end-to-end tests: a whole deltawire."""

from collections.abc import Iterator

import pytest

from tests.support.page_run import Site
from tests.support.system import System


@pytest.fixture(scope="session")
def shared_system() -> Iterator[System]:
    with System() as system:
        yield system


@pytest.fixture(scope="session")
def system(shared_system: System) -> System:
    """Redis, gateway, relay and one worker for the whole session. Leave them as they are."""
    return shared_system


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """What the code of pages runs against."""
    with Site() as site:
        yield site
