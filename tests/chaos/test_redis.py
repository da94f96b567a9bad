"""Redis that dies, stops, forgets and refuses under running streams (PROTOCOL §4)."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import pytest
import redis.asyncio

from deltawire.redis_server import RedisServer
from tests.chaos.conftest import Chaos
from tests.chaos.scenario import Scenario
from tests.support.redis_servers import ClusterServers, SentinelServers
from tests.support.system import System, request

PROGRAM = os.environ.get("DELTAWIRE_TEST_REDIS_PROGRAM")
AOF = {"appendonly": "yes", "appendfsync": "everysec"}
EVENTS = "dw:{%s}:events"

Fault = Callable[[System, Scenario], Awaitable[object]]


async def under_streams(
    chaos: Chaos, system: System, name: str, fault: Fault, *, at_least: int = 50
) -> Scenario:
    """Running streams, the fault, all the rest of their lives, and a few jobs more; the figures of it all."""
    async with chaos.scenario(name, system) as scenario:
        deltas = chaos.pick(300, at_least)
        jobs = await scenario.submit(chaos.pick(200, 30), request(deltas=deltas, rate=20))
        scenario.watch(jobs)
        await scenario.streaming()
        await fault(system, scenario)
        await scenario.over()
        scenario.watch(await scenario.submit(5, request(deltas=5, rate=50)), sockets=1, one_job=1)
        await scenario.over(30)
    await scenario.check_gateway(system)
    return scenario


# -- what a connection or a command meets


def client_of(system: System) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(system.redis_url)


async def forget_scripts(system: System, scenario: Scenario) -> None:
    async with client_of(system) as client:
        for _ in range(3):
            await scenario.strike(client.script_flush)
            await asyncio.sleep(0.3)


async def run_out_of_memory(system: System, scenario: Scenario) -> None:
    async with client_of(system) as client:
        await scenario.strike(lambda: client.config_set("maxmemory", 1))
        await asyncio.sleep(2)
        await client.config_set("maxmemory", 0)


async def overflow_the_feed(system: System, scenario: Scenario) -> None:
    """What waits for the relay outgrows its bound, and Redis drops the connection."""
    async with client_of(system) as client:
        await client.config_set("client-output-buffer-limit", "pubsub 65536 0 0")
        scenario.strike(lambda: system.relay.signal(signal.SIGSTOP))
        try:
            channel, *_ = await client.pubsub_channels(EVENTS % "*")  # of a job that still streams
            for _ in range(64):  # the sockets' buffers take some megabytes before Redis keeps any
                await client.publish(channel, b"x" * 1_000_000)
            left = await client.client_list(_type="pubsub")
        finally:
            system.relay.signal(signal.SIGCONT)
    assert not [one for one in left if one["name"] == "deltawire-relay-feed"]


async def stop(system: System, scenario: Scenario, *, for_s: float) -> None:
    scenario.strike(lambda: os.kill(system.redis.pid, signal.SIGSTOP))
    try:
        await asyncio.sleep(for_s)
    finally:
        os.kill(system.redis.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """For faults that leave nothing behind."""
    with System() as system:
        yield system


@pytest.mark.parametrize(
    ("name", "fault", "max_wait_s"),
    [
        ("SCRIPT FLUSH", forget_scripts, 3),
        ("Redis out of memory for 2 s", run_out_of_memory, 5),
        ("relay's feed overflows", overflow_the_feed, 8),
        ("Redis stopped for 5 s", partial(stop, for_s=5), 10),
        ("Redis stopped for 30 s", partial(stop, for_s=30), 40),
    ],
)
async def test_trouble(chaos: Chaos, system: System, name: str, fault: Fault, max_wait_s: float) -> None:
    """Every stream goes on to its own end, and nobody misses an event."""
    if max_wait_s > 30 and not chaos.is_full:
        pytest.skip("part of the full form")
    # What overflows is what a relay is told of jobs that stream by then.
    at_least = 200 if fault is overflow_the_feed else 50
    scenario = await under_streams(chaos, system, name, fault, at_least=at_least)
    assert scenario.figures.endings == {"completed": scenario.figures.subscribers}
    scenario.check(max_wait_s=chaos.bound(max_wait_s))


# -- what Redis forgets


async def crash(system: System, scenario: Scenario) -> None:
    scenario.strike(system.redis.kill)
    await asyncio.sleep(1)
    await asyncio.to_thread(system.redis.start)


async def empty(system: System, scenario: Scenario) -> None:
    async with client_of(system) as client:
        await scenario.strike(client.flushall)


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("Redis killed, with AOF", AOF, crash),
        ("Redis killed, keeps nothing", {}, crash),
        ("FLUSHALL", {}, empty),
    ],
)
async def test_loss(chaos: Chaos, name: str, options: dict[str, str], fault: Fault) -> None:
    """What the log loses its worker still has; where nobody has it, viewers are told, and the job ends."""
    with RedisServer(program=PROGRAM, options=options) as server, System(redis=server) as system:
        scenario = await under_streams(chaos, system, name, fault)
    scenario.check(max_wait_s=chaos.bound(20), snapshots=True)


async def kill_worker_and_empty(system: System, scenario: Scenario) -> None:
    system.workers[0].process.kill()
    await empty(system, scenario)
    await asyncio.to_thread(system.start_worker)


async def test_loss_of_everything(chaos: Chaos) -> None:
    """Where nobody has the job any more, its viewers hear just that, and need not wait for ever."""
    if not chaos.is_full:
        pytest.skip("part of the full form")
    with System() as system:
        name = "FLUSHALL, and the worker killed"
        scenario = await under_streams(chaos, system, name, kill_worker_and_empty)
    assert set(scenario.figures.endings) == {"failed:state_lost", "completed"}  # the latter are later jobs
    scenario.check(max_wait_s=chaos.bound(20), snapshots=True)


# -- several servers


async def kill_primary(system: System, scenario: Scenario) -> None:
    scenario.strike(lambda: system.redis.kill(system.redis.primary))


async def test_failover(chaos: Chaos) -> None:
    """Sentinel promotes a replica: every job goes on or ends."""
    with SentinelServers() as sentinel, System(redis=sentinel) as system:
        scenario = await under_streams(chaos, system, "Sentinel failover", kill_primary)
    scenario.check(max_wait_s=chaos.bound(30), snapshots=True)


async def kill_node(system: System, scenario: Scenario) -> None:
    lost = system.redis.node_of(f"dw:{{{scenario.jobs[0]}}}:meta")
    scenario.strike(lambda: system.redis.kill(lost))


async def test_loss_of_a_cluster_node(chaos: Chaos) -> None:
    """Its replica takes over; the other nodes' jobs do not notice."""
    with (
        RedisServer(program=PROGRAM) as broker,
        ClusterServers(replicas=True) as cluster,
        System(redis=cluster, broker_url=broker.url) as system,
    ):
        scenario = await under_streams(chaos, system, "cluster node killed", kill_node)
    scenario.check(max_wait_s=chaos.bound(30), snapshots=True)
