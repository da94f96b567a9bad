"""The whole of deltawire on Redis servers that fail over: behind sentinels, and as a cluster."""

import asyncio

from deltawire.redis_server import RedisServer
from tests.support.readers import http_client
from tests.support.redis_servers import ClusterServers, SentinelServers
from tests.support.system import WAIT_S, System, cancel, check_whole, request, submit, text_of, watch

FAILOVER_S = 60.0


async def test_streams_outlive_a_failover_of_the_sentinels() -> None:
    """Broker and data are lost together: running jobs end whole, queued and later ones are taken."""
    with SentinelServers(sentinels=3, password="p w/%") as servers, System(redis=servers) as system:
        jobs = [await submit(system, request(f"job {n}", deltas=160, rate=20)) for n in range(10)]
        await asyncio.gather(
            *(watch(system, job, until=lambda event: event["sequence_number"] >= 5) for job in jobs)
        )
        readers = [asyncio.create_task(watch(system, job, timeout_s=FAILOVER_S)) for job in jobs]
        lost = servers.primary
        servers.kill(lost)
        await asyncio.to_thread(servers.wait_for_failover, lost)
        for events in await asyncio.gather(*readers):
            assert check_whole(events)["type"] == "completed", events[-1]
            assert check_whole(events)["completion"]["choices"][0]["message"]["content"] == text_of(events)
        late = await submit(system, request("later"))
        assert check_whole(await watch(system, late, timeout_s=FAILOVER_S))["type"] == "completed"
        [worker] = system.workers
        assert worker.process.poll() is None, worker.log


async def test_streams_outlive_a_takeover_in_the_cluster() -> None:
    """Jobs of all slots, with a broker beside: they end whole, wherever they were, and can be cancelled."""
    with (
        ClusterServers(replicas=True, password="p w/%") as servers,
        RedisServer() as broker,
        System(redis=servers, broker_url=broker.url) as system,
    ):
        jobs = [await submit(system, request(f"job {n}", deltas=160, rate=20)) for n in range(12)]
        await asyncio.gather(
            *(watch(system, job, until=lambda event: event["sequence_number"] >= 5) for job in jobs)
        )
        readers = [asyncio.create_task(watch(system, job, timeout_s=FAILOVER_S)) for job in jobs]
        async with http_client(base_url=system.relay_url) as client, asyncio.timeout(WAIT_S):
            kinds: list[str] = []
            while kinds != ["relay", "worker"]:  # each says something once a second
                processes = (await client.get("/v1/processes")).json()["data"]
                kinds = [each["kind"] for each in processes]
        lost = servers.node_of(f"{{{jobs[0]}}}")
        servers.kill(lost)
        await asyncio.to_thread(servers.wait_for_takeover, lost)
        for events in await asyncio.gather(*readers):
            assert check_whole(events)["type"] == "completed", events[-1]
            assert check_whole(events)["completion"]["choices"][0]["message"]["content"] == text_of(events)
        long = [await submit(system, request("long", deltas=2_000, rate=20)) for _ in range(6)]
        for job in long:
            await watch(system, job, until=lambda event: event["sequence_number"] >= 5)
            assert (await cancel(system, job))["cancelled_from"] == "in_progress"
            assert check_whole(await watch(system, job))["type"] == "cancelled"
