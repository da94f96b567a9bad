"""A queue that is longer than its time-outs: nothing is enqueued twice, nothing is run twice."""

import asyncio

import redis.asyncio

from tests.chaos.conftest import Chaos
from tests.support.system import System, request

#: A fifteenth of the real one, so that a minute here is a quarter of an hour there.
SHORT_VISIBILITY = "import deltawire.queue\ndeltawire.queue.VISIBILITY_TIMEOUT_S = 4"
AT_ONCE = 4


async def test_backlog(chaos: Chaos) -> None:
    """Its jobs wait through many visibility time-outs and sweeps, and each message was pushed once."""
    with System(workers=0, worker_environment={"DELTAWIRE_CONCURRENCY": str(AT_ONCE)}) as system:
        await asyncio.to_thread(system.start_worker, before_main=SHORT_VISIBILITY)
        async with (
            redis.asyncio.Redis.from_url(system.redis_url) as client,
            chaos.scenario("backlog", system) as scenario,
        ):
            count = chaos.pick(300, 16)
            scenario.watch(await scenario.submit(count, request(deltas=18, rate=20)), streams=0)
            await scenario.over(count)
            stats = await client.info("commandstats")
            pushes = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("lpush", "rpush"))
        await scenario.check_gateway(system)
    assert pushes == count
    scenario.check()
