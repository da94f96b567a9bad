"""Pub/sub that is cut, silent, slow or loses messages: no viewer notices (PROTOCOL §3.3, §4.1, §4.3)."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from urllib.parse import urlsplit

import pytest
import redis.asyncio

from tests.chaos.conftest import Chaos
from tests.chaos.scenario import Scenario
from tests.chaos.table import IS_FULL
from tests.support.lossy_pubsub import Losses
from tests.support.naive_reader import read_naively
from tests.support.producer import ProducedJob, producer
from tests.support.system import System
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

Fault = Callable[[Scenario, TcpProxy, Chaos], Awaitable[None]]


def proxy_before(redis_url: str, losses: Losses | None = None) -> AbstractAsyncContextManager[TcpProxy]:
    """A proxy before a Redis server that, with `losses`, loses what is published through it."""
    port = urlsplit(redis_url).port
    assert port
    return tcp_proxy(port, new_filter=losses.new_filter if losses else None)


async def nothing(scenario: Scenario, proxy: TcpProxy, chaos: Chaos) -> None:
    """The faults are in the proxy already."""
    await asyncio.sleep(chaos.pick(20, 2))


async def kill_connections(scenario: Scenario, proxy: TcpProxy, chaos: Chaos) -> None:
    """A thousand times, as an operator or Redis itself does it."""
    async with redis.asyncio.Redis.from_url(f"redis://127.0.0.1:{proxy.target_port}/0") as client:
        killed = 0
        while killed < chaos.pick(1_000, 30):
            killed += await scenario.strike(lambda: client.client_kill_filter(_type="pubsub"))
            await asyncio.sleep(scenario.randomness.uniform(0, 0.05))


async def cut_connections(scenario: Scenario, proxy: TcpProxy, chaos: Chaos) -> None:
    """The relay's connection for commands goes with it."""
    cut = 0
    while cut < chaos.pick(1_000, 30):
        cut += scenario.strike(proxy.cut)
        await asyncio.sleep(scenario.randomness.uniform(0, 0.1))


async def go_silent(scenario: Scenario, proxy: TcpProxy, chaos: Chaos) -> None:
    """Connections that look alive and carry nothing, as after a firewall has forgotten them."""
    for _ in range(chaos.pick(4, 1)):
        scenario.strike(lambda: proxy.freeze(requests=False))
        await scenario.recovered()


async def write(job: ProducedJob, randomness: random.Random, pause_s: float, enough: asyncio.Event) -> None:
    """Deltas, one to three at a time, until it is enough; then the end."""
    await job.submit()
    await job.claim()
    while not enough.is_set():
        await job.deltas(*["x"] * randomness.randint(1, 3))
        await asyncio.sleep(randomness.uniform(0, 2 * pause_s))
    await job.end()


@pytest.mark.parametrize("kind", ["killed", "cut", "dropped", "silent"] + ["slow"] * IS_FULL)
async def test_pubsub(chaos: Chaos, kind: str) -> None:
    """5,000 subscriptions to 50 jobs that are being written: nothing is lost, nothing doubled."""
    fault: Fault = {"killed": kill_connections, "cut": cut_connections, "silent": go_silent}.get(
        kind, nothing
    )
    losses = Losses(
        random.Random(chaos.seed), share=0.05, share_of_last=0.5
    )  # none of twenty: 1 in a million
    with System(workers=0, relays=0) as system:
        async with (
            proxy_before(system.redis_url, losses if kind == "dropped" else None) as proxy,
            producer(system.redis_url) as jobs,
        ):
            proxy.delay_s = 0.02 if kind == "slow" else 0.0
            relay = system.launch_relay({"DELTAWIRE_REDIS_URL": proxy.redis_url})
            await asyncio.to_thread(relay.wait_until_ready)
            enough = asyncio.Event()
            async with chaos.scenario(f"pub/sub {kind}", system) as scenario:
                scenario.has_completions = False
                losses.on_loss = lambda: scenario.strike(lambda: None)
                written = [jobs.job() for _ in range(chaos.pick(50, 20))]
                scenario.jobs = [job.job_id for job in written]
                for _ in range(chaos.pick(100, 20)):
                    scenario.crowd.open_socket(scenario.jobs)
                async with asyncio.TaskGroup() as group:
                    for job in written:
                        dice = random.Random(scenario.randomness.random())
                        group.create_task(write(job, dice, chaos.pick(0.75, 0.3), enough))
                    await scenario.streaming()
                    await fault(scenario, proxy, chaos)
                    enough.set()
                await scenario.over()
    assert kind != "dropped" or losses.lost_last > 0
    scenario.check(max_wait_s=chaos.bound(15 if kind == "silent" else 5))


@pytest.mark.parametrize("kind", ["killed", "dropped"])
async def test_a_naive_reader_loses_events(chaos: Chaos, redis_url: str, kind: str) -> None:
    """The negative twin: history first, and no repair of gaps. Under the same faults that shows."""
    randomness = random.Random(chaos.seed)
    losses = Losses(randomness, share=0.05, share_of_last=0.3)
    enough = asyncio.Event()
    async with (
        proxy_before(redis_url, losses if kind == "dropped" else None) as proxy,
        producer(redis_url) as jobs,
        redis.asyncio.Redis.from_url(proxy.redis_url, protocol=3) as pubsub,
        redis.asyncio.Redis.from_url(redis_url) as killer,
        asyncio.TaskGroup() as group,
    ):
        written = [jobs.job() for _ in range(20)]
        writing = [group.create_task(write(job, randomness, 0.05, enough)) for job in written]
        await asyncio.sleep(0.2)
        reading = [group.create_task(read_naively(jobs.log, pubsub, job.job_id)) for job in written]
        for _ in range(10):
            await asyncio.sleep(0.1)
            if kind == "killed":
                await killer.client_kill_filter(_type="pubsub")
        while kind == "dropped" and losses.lost < 5:  # noqa: ASYNC110 - dice have no event
            await asyncio.sleep(0.1)
        enough.set()
        await asyncio.gather(*writing)
        seen = await asyncio.gather(*reading)
    lost = [
        number
        for job, numbers in zip(written, seen, strict=True)
        for number in {*range(1, job.top + 1)} - {*numbers}
    ]
    assert lost
