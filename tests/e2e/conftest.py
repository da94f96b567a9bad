"""Fixtures of the end-to-end tests: a whole deltawire, and the long task that runs beside them all."""

from collections.abc import Iterator

import pytest

from tests.support.system import System

LAST = "test_other_celery_app.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for the long task comes last, when most of its time has passed."""
    items.sort(key=lambda item: item.path.name == LAST)


@pytest.fixture(scope="session")
def shared_system() -> Iterator[System]:
    with System() as system:
        yield system


@pytest.fixture(scope="session")
def system(shared_system: System) -> System:
    """Redis, gateway, relay and one worker for the whole session. Leave them as they are."""
    return shared_system


@pytest.fixture(scope="session", autouse=True)
def long_task(request: pytest.FixtureRequest) -> Iterator[object]:
    """Starts the long task of the other Celery app with the first e2e test, if its test is among them."""
    if not any(item.path.name == LAST for item in request.session.items):
        yield None
        return
    from tests.e2e.test_other_celery_app import LongTask

    system: System = request.getfixturevalue("shared_system")  # a module may have its own `system`
    with LongTask(system.redis_url) as long_task:
        yield long_task
