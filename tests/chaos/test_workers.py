"""Workers killed, frozen, cut off and restarted: every job gets its one end (PROTOCOL §4.2, §4.6)."""

import asyncio
import contextlib
import signal
from functools import partial
from typing import Any

import pytest

from tests.chaos.conftest import Chaos
from tests.chaos.scenario import Scenario
from tests.chaos.table import IS_FULL
from tests.support.system import System
from tests.support.system import request as generation
from tests.support.tcp_proxy import tcp_proxy

#: What `restart` says decides whether a lost worker's job ends or visibly begins again.
BOTH_POLICIES: tuple[dict[str, Any], ...] = ({}, {"restart": "always"})
STOPS = (signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT)


def unfinished(chaos: Chaos) -> dict[str, Any]:
    """A stream that cannot end before the fault: its first request stalls, the second is answered well."""
    after = chaos.pick(200, 30)
    return generation(rate=20, deltas=after + 10, fault="stall", after=after, fail_first=1)


KILLED, FROZEN = signal.SIGKILL, signal.SIGSTOP
#: Full runs lose one worker with all the streams; the short one loses two with some each.
LOST = (
    {
        "worker killed": ([KILLED], "redis"),
        "worker frozen beyond its lease": ([FROZEN], "redis"),
        "worker killed, with RabbitMQ": ([KILLED], "rabbitmq"),
    }
    if IS_FULL
    else {"one worker killed, one frozen": ([KILLED, FROZEN], "redis")}
)


@pytest.mark.parametrize("name", LOST)
async def test_lost_worker(chaos: Chaos, request: pytest.FixtureRequest, name: str) -> None:
    """Its viewers see an end or a restart within 15 s: by another worker, which nobody has told.

    One that wakes up beyond its lease finds that its attempts may write no more.
    """
    losses, broker = LOST[name]
    broker_url = request.getfixturevalue("rabbitmq").url if broker == "rabbitmq" else None
    with System(workers=len(losses), broker_url=broker_url) as system:
        async with chaos.scenario(name, system) as scenario:
            jobs = await scenario.submit(chaos.pick(200, 30), unfinished(chaos), BOTH_POLICIES)
            scenario.watch(jobs)
            await scenario.streaming()
            await asyncio.to_thread(system.start_worker)
            for worker, loss in zip(system.workers, losses, strict=False):
                scenario.strike(partial(worker.signal, loss))
            await scenario.over()
            if FROZEN in losses:
                await wake(scenario, system)
        await scenario.check_gateway(system)
    assert scenario.figures.restarts > 0
    scenario.check(max_wait_s=chaos.bound(15))


async def wake(scenario: Scenario, system: System) -> None:
    """What was over stays as it is, and whoever wakes up works on with what the queue has."""
    before = await scenario.read_logs()
    for worker in system.workers:
        if worker.process.poll() is None:
            worker.signal(signal.SIGCONT)
    scenario.watch(await scenario.submit(20, generation(deltas=20, rate=20)), sockets=1)
    await scenario.over()
    after = await scenario.read_logs()
    assert {job_id: after.get(job_id) for job_id in before} == before


async def test_worker_whose_answers_are_lost(chaos: Chaos) -> None:
    """Redis does as it is told, and the worker never hears of it: saying it again changes nothing."""
    with System(workers=0) as system:
        async with (
            tcp_proxy(system.redis.port) as proxy,
            chaos.scenario("worker's answers from Redis lost", system) as scenario,
        ):
            data = {"DELTAWIRE_REDIS_URL": proxy.redis_url}
            await asyncio.to_thread(system.start_worker, {**data, "DELTAWIRE_BROKER_URL": system.redis_url})
            jobs = await scenario.submit(chaos.pick(200, 30), generation(deltas=chaos.pick(400, 80), rate=20))
            scenario.watch(jobs)
            await scenario.streaming()
            for _ in range(chaos.pick(20, 4)):
                await scenario.strike(lambda: proxy.lose_replies(0.2))
                await asyncio.sleep(0.5)
            await scenario.over()
        await scenario.check_gateway(system)
    assert scenario.figures.endings == {"completed": scenario.figures.subscribers}
    scenario.check(max_wait_s=chaos.bound(5))


async def feed(scenario: Scenario, per_second: int) -> None:
    """Jobs of about a second, watched over a few sockets, until cancelled."""
    sockets = [scenario.crowd.open_socket(first=number) for number in range(5)]
    async with asyncio.TaskGroup() as group:

        async def one(number: int) -> None:
            jobs = await scenario.submit(1, generation(deltas=20, rate=20), [BOTH_POLICIES[number % 2]])
            scenario.crowd.subscribe(sockets[number % len(sockets)], jobs)

        number = 0
        while True:
            group.create_task(one(number))
            number += 1
            await asyncio.sleep(1 / per_second)


async def test_rolling_restarts_of_workers(chaos: Chaos) -> None:
    """By SIGTERM, SIGQUIT and SIGKILL under load: every job ends, with at most one request an attempt."""
    with System(workers=3, worker_environment={"DELTAWIRE_SHUTDOWN_GRACE_S": "1"}) as system:
        async with chaos.scenario("workers restarted in turn", system) as scenario:
            feeding = asyncio.create_task(feed(scenario, chaos.pick(100, 20)))
            await asyncio.sleep(1)
            for index, number in enumerate(STOPS * chaos.pick(3, 1)):
                worker = system.workers[index]
                scenario.strike(partial(worker.signal, number))
                await asyncio.to_thread(system.start_worker)
                await asyncio.to_thread(worker.wait, 30)
                await asyncio.sleep(chaos.pick(2, 0))
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await feeding
            await scenario.over()
        await scenario.check_gateway(system)
    scenario.check()
