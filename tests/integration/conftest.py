"""Fixtures of the relay's tests: a real process, and logs written without a worker."""

from collections.abc import AsyncIterator, Iterator

import pytest

from deltawire.redis_server import RedisServer
from tests.support.producer import Producer, producer
from tests.support.relay_process import RelayProcess


@pytest.fixture(scope="module")
def relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """A relay as it comes: no keys, so loopback only."""
    with RelayProcess(redis_server.url) as process:
        yield process


@pytest.fixture
async def jobs(redis_server: RedisServer) -> AsyncIterator[Producer]:
    """Makes jobs whose logs the test writes."""
    async with producer(redis_server.url) as made:
        yield made
