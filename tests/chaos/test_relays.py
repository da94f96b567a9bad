"""Relays that die and relays that are restarted: their viewers go on elsewhere (PROTOCOL §4.3, §6.4)."""

import asyncio
import signal
from functools import partial

from tests.chaos.conftest import Chaos
from tests.support.system import System, request

#: However long it takes until all have seen it: a stream that was over by then would have lost nothing.
ENDLESS = request(deltas=100_000, rate=10)


async def test_killed_relay(chaos: Chaos) -> None:
    """All of its subscribers resume at the other relay, with nothing lost."""
    with System(relays=2) as system:
        async with chaos.scenario("relay killed", system) as scenario:
            jobs = await scenario.submit(chaos.pick(200, 40), ENDLESS)
            scenario.watch(jobs, sockets=4, one_job=0.8, streams=0.2)
            await scenario.streaming()
            scenario.strike(lambda: system.relays[0].signal(signal.SIGKILL))
            await scenario.recovered()
            await scenario.cancel(scenario.crowd.relays[1])
            await scenario.over()
    assert scenario.crowd.reconnects > 0
    scenario.check(max_wait_s=chaos.bound(10))


async def test_rolling_restarts_of_relays(chaos: Chaos) -> None:
    """By SIGTERM: each says goodbye to its viewers, who come back spread over time, and miss nothing."""
    with System(relays=2) as system:
        async with chaos.scenario("relays restarted in turn", system) as scenario:
            jobs = await scenario.submit(chaos.pick(200, 40), ENDLESS)
            scenario.watch(jobs, sockets=4, one_job=0.8, streams=0.2)
            await scenario.streaming()
            for index in range(chaos.pick(2, 1)):
                relay = system.relays[index]
                scenario.strike(partial(relay.signal, signal.SIGTERM))
                await asyncio.to_thread(relay.wait)
                fresh = system.launch_relay(in_place_of=index)
                await asyncio.to_thread(fresh.wait_until_ready)
            await scenario.recovered()
            await scenario.cancel(scenario.crowd.relays[1])
            await scenario.over()
    goodbyes = scenario.crowd.goodbyes
    assert goodbyes, "nobody was told"
    assert max(goodbyes) - min(goodbyes) > 2, "the viewers would come back all at once"
    scenario.check(max_wait_s=chaos.bound(10))
