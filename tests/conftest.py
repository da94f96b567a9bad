"""Fixtures that every suite may use: a real Redis server, and job logs on it and on fakeredis."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest
import redis
from hypothesis import HealthCheck, settings

from deltawire.redis_server import RedisServer
from tests.chaos.table import print_table
from tests.support.job_logs import KINDS, OpenedLog, open_job_log
from tests.support.rabbitmq import RabbitMQ

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("deltawire", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("deltawire")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real server for the whole run; DELTAWIRE_TEST_REDIS_PROGRAM says which program."""
    with RedisServer(program=os.environ.get("DELTAWIRE_TEST_REDIS_PROGRAM")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """A real broker for the whole run; its queue is there, or not, as other tests left it."""
    with RabbitMQ() as broker:
        yield broker


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the server, emptied."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(params=KINDS)
async def job_log(request: pytest.FixtureRequest) -> AsyncIterator[OpenedLog]:
    """A job log on fakeredis, then on the real server. Tests of both state what a log promises."""
    url = "" if request.param == "fakeredis" else request.getfixturevalue("redis_url")
    async with open_job_log(request.param, url) as log:
        yield log


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Here, because with pytest-xdist this is the only conftest that the process which prints knows.
    print_table(terminalreporter)
