"""Fixtures that every suite may use: a real Redis server, and job logs on it and on fakeredis."""

import gc
import os
from collections.abc import AsyncIterator, Iterator
from typing import Final

import pytest
import redis
from hypothesis import HealthCheck, settings

from deltawire.redis_server import RedisServer
from tests.chaos.table import print_table
from tests.support.job_logs import KINDS, OpenedLog, open_job_log
from tests.support.rabbitmq import RabbitMQ
from tests.support.redis_servers import ClusterServers, SentinelServers

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("deltawire", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("deltawire")

#: They take a minute or two each, so they begin first: else the rest would be done, and wait for them.
FIRST: Final = ("test_other_celery_app.py", "test_pool.py", "test_openapi.py", "test_redis_nodes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish() -> None:
    # Thousands of tests stay to the end: whoever collects garbage need not look at them each time.
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def sentinel_servers() -> Iterator[SentinelServers]:
    """A primary with a replica and a sentinel; whoever makes it fail over uses servers of its own."""
    with SentinelServers() as servers:
        yield servers


@pytest.fixture(scope="session")
def cluster_servers() -> Iterator[ClusterServers]:
    """Three primaries; whoever ends one of them uses servers of its own."""
    with ClusterServers() as servers:
        yield servers


@pytest.fixture(params=KINDS)
async def job_log(request: pytest.FixtureRequest) -> AsyncIterator[OpenedLog]:
    """A job log on fakeredis, on a server, behind sentinels, on a cluster. Tests state what a log promises.

    On a cluster the client beside it is that of the node which has the log of the job called `job`.
    """
    url, nodes = "", []
    if request.param == "server":
        url = request.getfixturevalue("redis_url")
    elif request.param != "fakeredis":
        servers = request.getfixturevalue(f"{request.param}_servers")
        servers.flush()
        url, nodes = servers.url, servers.primary_urls("dw:{job}:log")
    async with open_job_log(request.param, url, nodes) as log:
        yield log


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Here, because with pytest-xdist this is the only conftest that the process which prints knows.
    print_table(terminalreporter)
