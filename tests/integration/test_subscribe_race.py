"""Subscribing at any moment while deltas flow loses nothing and doubles nothing (PROTOCOL §4.1, §4.3)."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import redis.asyncio

from deltawire.redis_client import RedisClient
from deltawire.redis_connection import RedisConnection
from deltawire.redis_server import RedisServer
from deltawire_relay.feed import Feed
from deltawire_relay.hubs import Hubs
from tests.support.naive_reader import read_naively
from tests.support.producer import ProducedJob, producer
from tests.support.readers import numbers, read_job, read_stream, streamed_numbers
from tests.support.relay_process import RelayProcess

RUNS = 200
AT_ONCE = 20
DELTAS = 40


async def write(job: ProducedJob, randomness: random.Random) -> None:
    """The whole life of a job, with deltas in bursts and short silences."""
    await job.submit()
    await job.claim()
    while job.top < DELTAS:
        await job.deltas(*["x"] * randomness.randint(1, 3))
        await asyncio.sleep(randomness.choice([0, 0, 0.0005, 0.002]))
    await job.end()


async def test_two_hundred_subscribers_see_every_event_once_and_in_order(
    relay: RelayProcess, redis_server: RedisServer
) -> None:
    """At a random moment of a job's life, by WebSocket or SSE: 1, 2, … to the terminal event."""
    randomness = random.Random(7)  # moments that can be had again

    async with producer(redis_server.url) as jobs:

        async def one(run: int) -> None:
            job = jobs.job()
            writing = asyncio.create_task(write(job, randomness))
            await asyncio.sleep(randomness.uniform(0, 0.05))
            if run % 2:
                seen = numbers(await read_job(relay.websocket_url, job.job_id))
            else:
                seen = streamed_numbers(await read_stream(relay.url, job.job_id))
            await writing
            assert seen == list(range(1, job.top + 1)), (run, seen)

        for first in range(0, RUNS, AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for run in range(first, first + AT_ONCE):
                    group.create_task(one(run))


async def test_a_reader_that_reads_first_and_subscribes_after_fails_the_same_check(
    redis_server: RedisServer,
) -> None:
    """The negative twin: the naive order loses events in these runs, so the test above can see that."""
    randomness = random.Random(7)
    failures = 0

    async with (
        producer(redis_server.url) as jobs,
        redis.asyncio.Redis.from_url(redis_server.url) as client,
    ):

        async def one() -> bool:
            job = jobs.job()
            writing = asyncio.create_task(write(job, randomness))
            await asyncio.sleep(randomness.uniform(0, 0.05))
            seen = await read_naively(jobs.log, client, job.job_id)
            await writing
            return seen != list(range(1, job.top + 1))

        for _ in range(0, RUNS, AT_ONCE):
            failures += sum(await asyncio.gather(*(one() for _ in range(AT_ONCE))))
    assert failures > 0


async def test_many_subscribers_of_one_job_see_the_same_events(
    relay: RelayProcess, redis_server: RedisServer
) -> None:
    """Fifty readers who come one after the other share a hub; each sees the whole job (PROTOCOL §4.1)."""
    randomness = random.Random(11)
    async with producer(redis_server.url) as jobs:
        job = jobs.job()

        async def read_later() -> list[int]:
            await asyncio.sleep(randomness.uniform(0, 0.05))
            return numbers(await read_job(relay.websocket_url, job.job_id))

        *seen, _ = await asyncio.gather(*(read_later() for _ in range(50)), write(job, randomness))
        assert seen == [list(range(1, job.top + 1))] * 50


@pytest.fixture
def own_relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """For a test that may leave it unable to stop."""
    with RelayProcess(redis_server.url, stop_timeout_s=2) as process:
        yield process


async def test_readers_lose_nothing_while_pub_sub_connections_are_killed(
    own_relay: RelayProcess, redis_server: RedisServer
) -> None:
    """The feed's connection is cut again and again; every reader still sees every event once (§4.3)."""
    relay, randomness = own_relay, random.Random(13)
    async with (
        asyncio.timeout(90),
        producer(redis_server.url) as jobs,
        redis.asyncio.Redis.from_url(redis_server.url) as client,
    ):
        stop = asyncio.Event()

        async def kill() -> int:
            killed = 0
            while not stop.is_set():
                killed += await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
                await asyncio.sleep(0.02)
            return killed

        killing = asyncio.create_task(kill())
        try:
            written = [jobs.job() for _ in range(40)]

            async def one(job: ProducedJob) -> list[int]:
                await asyncio.sleep(randomness.uniform(0, 0.3))
                writing = asyncio.create_task(write(job, randomness))
                await asyncio.sleep(randomness.uniform(0, 0.05))
                seen = numbers(await read_job(relay.websocket_url, job.job_id))
                await writing
                return seen

            seen = await asyncio.gather(*(one(job) for job in written))
        finally:
            stop.set()
        assert await killing > 0
        assert seen == [list(range(1, job.top + 1)) for job in written]
    assert "Traceback" not in relay.log


# The moment in which the feed's connection is gone and its link has not noticed yet: one step of the loop.


class _Deaf:
    """A listener that nothing reaches."""

    def received(self, payload: bytes) -> None: ...
    def flush(self) -> None: ...
    def reconnected(self) -> None: ...


async def at_the_moment_of_loss(feed: Feed, act: Callable[[], None]) -> None:
    """Calls `act` after the connection has been lost, before any task hears of it."""
    connection = feed._nodes.links()[0].connection
    assert connection is not None
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - the caller's
            done.set_exception(error)
        else:
            done.set_result(None)

    connection.abort()  # its connection_lost runs in the next step of the loop,
    loop.call_soon(run)  # this right after it,
    async with asyncio.timeout(60):
        await done  # and the link's task in the step after that


@pytest.fixture
async def feed(redis_server: RedisServer) -> AsyncIterator[Feed]:
    commands = RedisClient(redis_server.url, name="deltawire-relay")
    made = Feed(redis_server.url, commands, "dw:probe:test")
    await made.start()
    yield made
    await made.close()
    await commands.aclose()


async def test_a_subscription_at_the_moment_of_loss_lets_the_loop_run(feed: Feed) -> None:
    """It waits for the next connection like every other (§4.4)."""
    turns = 0
    wait_for_link = feed._nodes.connected

    async def count(key: str | bytes | None) -> RedisConnection:
        nonlocal turns
        turns += 1
        assert turns < 1_000, "it never yields"
        return await wait_for_link(key)

    feed._nodes.connected = count  # type: ignore[method-assign] # to end what would never end
    connection = feed._nodes.links()[0].connection
    assert connection is not None
    connection.abort()  # its connection_lost runs in the next step of the loop, this task right after it
    subscribing = asyncio.create_task(feed.subscribe("dw:{a}:events", _Deaf()))
    async with asyncio.timeout(60):
        await subscribing


async def test_a_hub_released_at_the_moment_of_loss_is_released(
    feed: Feed, redis_server: RedisServer
) -> None:
    """Nothing is raised and nothing stays: who comes next gets a hub that hears (§4.3)."""
    async with producer(redis_server.url) as jobs:
        job = await jobs.running("a")
        hubs = Hubs(jobs.log, feed)
        hub, release = await hubs.acquire(job.job_id)
        try:
            await at_the_moment_of_loss(feed, release)
            assert len(hubs) == 0
        finally:
            if hub._catching_up is not None:
                hub._catching_up.cancel()
