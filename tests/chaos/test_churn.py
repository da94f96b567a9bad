"""Jobs and viewers come and go, for seconds or for hours: what they cost is given back.

make churn MINUTES=60     writes churn.csv, one line a round
"""

import asyncio
import csv
import os
import time
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import redis.asyncio

from tests.chaos.conftest import Chaos
from tests.chaos.scenario import Scenario
from tests.support.system import WAIT_S, Service, System, request
from tests.support.viewers import Crowd

MINUTES: Final = float(os.environ.get("DELTAWIRE_CHURN_MINUTES") or 0)
SAMPLES: Final = os.environ.get("DELTAWIRE_CHURN_SAMPLES")
WARM_UP_ROUNDS: Final = 2
ROUND_S: Final = 2.0
JOBS: Final = 8
#: What may be there at the end that was not there before: threads and connections that are made when
#: first needed and then kept, and memory of an interpreter that has warmed up.
SLACK: Final = {
    "relay_descriptors": 8,
    "relay_threads": 5,
    "relay_rss_mb": 24,
    "worker_descriptors": 8,
    "worker_threads": 5,
    "worker_rss_mb": 24,
    "clients": 2,
}

Sample = dict[str, float]


def seen_from_outside(name: str, service: Service) -> Sample:
    """A process' descriptors, threads and memory, as Linux says them."""
    process = Path("/proc", str(service.pid))
    pages = int((process / "statm").read_text().split()[1])
    return {
        f"{name}_descriptors": len(list((process / "fd").iterdir())),
        f"{name}_threads": len(list((process / "task").iterdir())),
        f"{name}_rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
    }


async def sample(system: System, client: Any) -> Sample:  # redis-py's client is loosely typed
    """What there is now; hubs show as channels, links as clients, jobs as keys."""
    return {
        **seen_from_outside("relay", system.relay),
        **seen_from_outside("worker", system.workers[0]),
        "channels": len(await client.pubsub_channels("dw:{*")),
        "clients": len([one for one in await client.client_list() if one["name"].startswith("deltawire")]),
        # For an hour a job's cancel key says that it is over; that is no leak.
        "keys": len([key for key in await client.keys("dw:{*") if not key.endswith(b":cancel")]),
    }


async def idle(system: System, client: Any) -> Sample:
    """A sample once the last job is gone and the last hub has closed."""
    for _ in range(600):
        now = await sample(system, client)
        if not now["channels"] and not now["keys"]:
            return now
        await asyncio.sleep(0.1)
    raise AssertionError(f"this stays: {now}")


async def churn(scenario: Scenario) -> None:
    """One round: jobs that run, jobs that are cancelled; viewers that stay, and some that leave early."""
    jobs = await scenario.submit(JOBS, request(deltas=30, rate=25))
    scenario.watch(jobs)
    async with Crowd(scenario.crowd.relays, scenario.clock) as leavers:
        leavers.open_socket(jobs)
        leavers.watch(jobs[:2])
        await leavers.until(lambda ledger: ledger.deltas > 0 or ledger.is_over, 30)
        for job_id in jobs[::3]:
            await leavers.http.post(f"http://{leavers.relays[0]}/v1/jobs/{job_id}/cancel")
    await scenario.over()


async def erase(system: System, jobs: list[str]) -> None:
    """When all have seen them: what expires by itself may do so before the last viewer has come."""
    async with httpx.AsyncClient(trust_env=False, base_url=system.relay_url, timeout=WAIT_S) as client:
        for job_id in jobs:
            answer = await client.delete(f"/v1/jobs/{job_id}")
            assert answer.status_code == 200, answer.text


@pytest.mark.timeout(MINUTES * 60 + 300)
async def test_churn(chaos: Chaos) -> None:
    """Descriptors, channels, connections, threads and memory are at the end what they were before."""
    samples: list[Sample] = []
    row = chaos.row("churn")
    with System() as system:
        relays = [f"127.0.0.1:{system.relay_port}"]
        async with redis.asyncio.Redis.from_url(system.redis_url) as client:
            baseline: Sample = {}
            ends_at, number = time.monotonic() + (MINUTES * 60 or chaos.pick(60, 8)), 0
            while time.monotonic() < ends_at or number <= WARM_UP_ROUNDS:
                began, number = time.monotonic(), number + 1
                async with Scenario(row, system.redis_url, relays) as scenario:
                    await churn(scenario)
                await erase(system, scenario.jobs)
                if number == WARM_UP_ROUNDS:  # before the next links are cut: it takes a while to make others
                    baseline = await idle(system, client)
                if number % 5 == 2:  # links that are made again must not pile up
                    for one in await client.client_list():
                        if one["name"].startswith("deltawire"):
                            await client.client_kill_filter(_id=one["id"])
                samples.append({"at": time.time(), **await sample(system, client)})
                write(samples)
                await asyncio.sleep(max(0.0, began + ROUND_S - time.monotonic()))
            await idle(system, client)
            for _ in range(100):  # a socket may take a moment to be seen as closed
                now = await sample(system, client)
                grown = [name for name, slack in SLACK.items() if now[name] > baseline[name] + slack]
                if not grown:
                    break
                await asyncio.sleep(0.1)
    row.broken += [f"{name}: {baseline[name]:.0f} -> {now[name]:.0f}" for name in grown]
    scenario.check()


def write(samples: list[Sample]) -> None:
    """One line more, in the file that was asked for."""
    if not SAMPLES:
        return
    with Path(SAMPLES).open("w" if len(samples) == 1 else "a", newline="") as file:
        writer = csv.DictWriter(file, samples[0])
        if len(samples) == 1:
            writer.writeheader()
        writer.writerow(samples[-1])
