"""A relay's feed behind sentinels and on a cluster: whatever is lost or moves, it hears again."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from deltawire import redis_client, redis_connection
from deltawire.keys import Keys
from deltawire.redis_client import RedisClient
from deltawire.redis_nodes import slot_of
from deltawire_relay.feed import Feed
from tests.support.redis_servers import ClusterServers, SentinelServers

DEADLINE_S = 60.0
JOBS = 60


class Listening:
    """A listener that notes what it hears, and how often it was told to read the log."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.reconnections = 0

    def received(self, payload: bytes) -> None:
        self.heard.append(payload)

    def flush(self) -> None: ...

    def reconnected(self) -> None:
        self.reconnections += 1


class Bench:
    def __init__(self, url: str) -> None:
        self.keys = Keys.at(url)
        self.client = RedisClient(url, name="test")
        self.feed = Feed(url, self.client, "dw:probe:test")
        self.listeners = {self.keys.job(f"job{n}").channel: Listening() for n in range(JOBS)}

    async def publish(self, channel: str, text: bytes) -> None:
        await self.client.execute(self.keys.publish, channel, text)

    async def all_hear(self, text: bytes, channels: list[str] | None = None) -> None:
        """Publishes on each channel until it is heard there: the feed may still be on its way."""

        async def until_heard(channel: str) -> None:
            while text not in self.listeners[channel].heard:
                await self.publish(channel, text)
                await asyncio.sleep(0.02)

        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*map(until_heard, channels or self.listeners))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.01)


@asynccontextmanager
async def bench_of(url: str) -> AsyncIterator[Bench]:
    """A feed whose listeners have been heard of once: what is published after `subscribe` arrives."""
    bench = Bench(url)
    await bench.feed.start()
    try:
        for channel, listener in bench.listeners.items():
            await asyncio.wait_for(bench.feed.subscribe(channel, listener), DEADLINE_S)
        for channel in bench.listeners:
            await bench.publish(channel, b"first")
        await eventually(lambda: all(listener.heard == [b"first"] for listener in bench.listeners.values()))
        await eventually(lambda: bench.feed.is_delivering)
        for listener in bench.listeners.values():
            listener.reconnections = 0
        yield bench
    finally:
        await bench.feed.close()
        await bench.client.aclose()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent server is left soon, and a busy machine has time."""
    monkeypatch.setattr(redis_connection, "REPLY_TIMEOUT_S", 2.0)
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", DEADLINE_S)


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_it_hears_again_after_a_failover_of_the_sentinels(how: str) -> None:
    """And every listener is told to read its log, since something may have passed it by."""
    with SentinelServers() as servers:
        async with bench_of(servers.url) as bench:
            lost = servers.primary
            (servers.kill if how == "killed" else servers.pause)(lost)
            await bench.all_hear(b"after")
            await eventually(lambda: all(one.reconnections for one in bench.listeners.values()))
            await eventually(lambda: bench.feed.is_delivering)


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_it_hears_again_after_a_takeover_in_the_cluster(how: str) -> None:
    """Channels of the lost primary are heard at its replica, the others all the while."""
    with ClusterServers(replicas=True) as servers:
        async with bench_of(servers.url) as bench:
            lost = servers.nodes[0]
            theirs = [channel for channel in bench.listeners if servers.node_of(channel) is lost]
            others = [channel for channel in bench.listeners if channel not in theirs]
            assert theirs
            assert others
            (servers.kill if how == "killed" else servers.pause)(lost)
            await bench.all_hear(b"others", others)
            await bench.all_hear(b"after")
            await eventually(lambda: all(bench.listeners[channel].reconnections for channel in theirs))
            await eventually(lambda: bench.feed.is_delivering)


async def test_it_follows_slots_that_move(cluster_servers: ClusterServers) -> None:
    """A channel whose slot moves is heard at its new node; its listener is told to read its log."""
    async with bench_of(cluster_servers.url) as bench:
        moved = []
        for channel in list(bench.listeners)[:10]:
            source = cluster_servers.node_of(channel)
            target = next(node for node in cluster_servers.nodes if node is not source)
            await asyncio.to_thread(cluster_servers.move, slot_of(channel), source, target)
            moved.append((channel, source, target))
        await eventually(lambda: all(bench.listeners[channel].reconnections for channel, _, _ in moved))
        for channel, listener in bench.listeners.items():
            listener.heard.clear()
            await bench.publish(channel, b"after")
        await eventually(lambda: all(one.heard == [b"after"] for one in bench.listeners.values()))
        for channel, source, target in moved:
            await asyncio.to_thread(cluster_servers.move, slot_of(channel), target, source)
        await bench.all_hear(b"back")


async def test_what_is_unsubscribed_is_not_heard(cluster_servers: ClusterServers) -> None:
    """Nobody listens on a sharded channel after unsubscribe, also where its slot has moved."""
    async with bench_of(cluster_servers.url) as bench:
        gone = list(bench.listeners)[:5]
        for channel in gone:
            bench.feed.unsubscribe(channel)
        async with asyncio.timeout(DEADLINE_S):
            for channel in gone:
                while await bench.client.execute("SPUBLISH", channel, b"late"):  # noqa: ASYNC110 - to whom
                    await asyncio.sleep(0.01)
        await bench.all_hear(b"others", [channel for channel in bench.listeners if channel not in gone])


async def test_a_lost_node_is_not_the_feeds_fault() -> None:
    """The channels of the others are heard, and the feed counts as delivering: nobody can publish there."""
    with ClusterServers() as servers:
        async with bench_of(servers.url) as bench:
            lost = servers.nodes[1]
            others = [channel for channel in bench.listeners if servers.node_of(channel) is not lost]
            servers.kill(lost)
            await bench.all_hear(b"others", others)
            await eventually(lambda: bench.feed.is_delivering)
            lost.start()
            await bench.all_hear(b"after")
