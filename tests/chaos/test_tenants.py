"""Workers and relays killed while a tenant's jobs wait for their turn, which comes all the same (§1.4)."""

import asyncio
import signal

import httpx
from redis import Redis

from tests.support.system import WAIT_S, System, check_whole, eventually, request, watch

PLACES = 4
LIMITS = {"DELTAWIRE_TENANT_MAX_RUNNING": str(PLACES)}
JOBS = 24


async def submit_until_killed(system: System, job_ids: list[str]) -> None:
    """Jobs of half a second over one connection at a time, for as long as the relay lives."""
    body = {"request": request(deltas=10, rate=20)}
    async with httpx.AsyncClient(trust_env=False, base_url=system.relay_url, timeout=WAIT_S) as client:
        while True:
            try:
                job_ids.append((await client.post("/v1/jobs", json=body)).json()["id"])
            except httpx.TransportError:
                return


async def test_nothing_waits_for_ever() -> None:
    """A relay dies in mid-flood, then the worker, with jobs that run and jobs that wait: each ends once."""
    with System(worker_environment=LIMITS, relay_environment=LIMITS) as system:
        job_ids: list[str] = []
        submitting = [asyncio.create_task(submit_until_killed(system, job_ids)) for _ in range(8)]
        await eventually(lambda: len(job_ids) >= JOBS)
        system.relay.signal(signal.SIGKILL)
        await asyncio.gather(*submitting)
        system.workers[0].signal(signal.SIGKILL)
        system.launch_relay(in_place_of=0)
        system.launch_worker()
        for service in (system.relay, system.workers[-1]):
            await asyncio.to_thread(service.wait_until_ready)
        with Redis.from_url(system.redis_url) as redis:
            # Also those whose ids nobody heard.
            known = {key.decode()[4:-6] for key in redis.scan_iter("dw:{*}:meta")}
            assert known >= set(job_ids)
            ends = [check_whole(await watch(system, job_id, timeout_s=90)) for job_id in known]
            lost = [end for end in ends if end["type"] != "completed"]
            assert len(lost) <= PLACES
            assert {end["error"]["code"] for end in lost} <= {"worker_lost"}
            await eventually(lambda: not redis.exists("dw:tenant:{default}:waiting", "dw:held"), timeout_s=60)
            await eventually(lambda: not redis.exists("dw:tenant:{default}:running"), timeout_s=60)
