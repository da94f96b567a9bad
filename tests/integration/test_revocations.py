"""Revocations in Redis, as every relay reads them (PROTOCOL §5.10): on a cluster, too, and many of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from deltawire.background import in_background
from deltawire.errors import WireError
from deltawire.keys import Keys
from deltawire.redis_client import RedisClient
from deltawire.scripts import Scripts
from deltawire_relay import revocations as revocations_module
from deltawire_relay.feed import Feed
from deltawire_relay.revocations import Revocations
from deltawire_relay.revoked import Revocation, Revoked
from tests.support.redis_servers import ClusterServers


def revocation(number: int = 0) -> Revocation:
    now = time.time()
    return Revocation("acme", "id", f"t{number}", now, now + 600)


class Reader:
    """One relay's revocations."""

    def __init__(self, url: str, name: str) -> None:
        self.client = RedisClient(url, name=name)
        self.feed = Feed(url, self.client, f"dw:probe:{name}")
        self.revoked = Revoked()
        self.told = 0
        self.revocations = Revocations(
            Scripts(self.client), self.feed, Keys.at(url), self.revoked, self._on_news
        )

    def _on_news(self) -> None:
        self.told += 1


@asynccontextmanager
async def reading(url: str, name: str) -> AsyncIterator[Reader]:
    reader = Reader(url, name)
    await reader.feed.start()
    await reader.revocations.read()
    try:
        async with in_background(reader.revocations.keep()):
            yield reader
    finally:
        await reader.feed.close()
        await reader.client.aclose()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - another task
            await asyncio.sleep(0.01)


async def check(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with reading(url, "one") as one, reading(url, "two") as two:
        monkeypatch.setattr(revocations_module, "LOOK_INTERVAL_S", 3_600.0)  # the channel alone
        async with asyncio.timeout(20):
            while not (one.told and two.told):  # it may not have subscribed yet
                await one.revocations.revoke(revocation(1))
                await asyncio.sleep(0.1)
        await asyncio.gather(*(two.revocations.revoke(revocation(number)) for number in range(50)))
        await eventually(lambda: len(one.revoked) == 50)
    async with reading(url, "three") as three:
        assert len(three.revoked) == 50


async def test_relays_hear_of_it_by_the_channel(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and whoever starts later reads it."""
    await check(redis_url, monkeypatch)


async def test_relays_of_a_cluster_hear_of_it(
    cluster_servers: ClusterServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream and the channel lie where their names say."""
    await check(cluster_servers.url, monkeypatch)


async def test_a_redis_that_numbers_anew(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after a loss may have smaller numbers; a whole read now and then finds it."""
    monkeypatch.setattr(revocations_module, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(revocations_module, "LOOKS_PER_READ", 3)
    async with reading(redis_url, "one") as one:
        stream, encoded = Keys.at(redis_url).revoked, '["acme","id","t%d",1.0,9e9]'
        await one.client.execute("XADD", stream, "9999999999999-1", "r", encoded % 1)
        await eventually(lambda: len(one.revoked) == 1)
        await one.client.execute("DEL", stream)
        await one.client.execute("XADD", stream, "5-1", "r", encoded % 2)
        await eventually(lambda: len(one.revoked) == 2)


async def test_there_is_a_bound(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above it nothing is taken: to forget one for another would let somebody in. All pages are read."""
    monkeypatch.setattr(revocations_module, "MAX_REVOKED", 5)
    monkeypatch.setattr(revocations_module, "PAGE", 2)
    async with reading(redis_url, "one") as one:
        for number in range(5):
            await one.revocations.revoke(revocation(number))
        with pytest.raises(WireError) as caught:
            await one.revocations.revoke(revocation(5))
        assert (caught.value.code, caught.value.status) == ("overloaded", 503)
        async with reading(redis_url, "two") as two:
            assert len(two.revoked) == 5
