"""The shipped dashboard's and alerts' queries on a real Prometheus, which scrapes a system under load.

There is no Grafana to be had here: what it would ask is asked, and that it loads the file is not tested.
"""

import asyncio
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.support.observability import alerts, panels, recorded
from tests.support.prometheus import Prometheus
from tests.support.relay_process import Keyring
from tests.support.system import WAIT_S, System, cancel, eventually, request, submit, watch

KEYS = Keyring(
    backend=("default", ["read", "cancel", "submit"]),
    prometheus=("default", ["metrics"]),
)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    keys = {"DELTAWIRE_API_KEYS": KEYS.text}
    tokens = {"DELTAWIRE_JWT_SECRET": "a-secret-of-the-tests-that-is-long-enough"}
    with System(workers=2, relays=2, worker_environment=keys, relay_environment=keys | tokens) as system:
        yield system


@pytest.fixture(scope="module")
def prometheus(system: System) -> Iterator[Prometheus]:
    targets = {
        "deltawire-relay": [f"127.0.0.1:{port}" for port in system.relay_ports],
        "deltawire-worker": [f"127.0.0.1:{port}" for port in system.worker_ports],
    }
    with Prometheus(targets, KEYS["prometheus"]) as prometheus:
        yield prometheus


async def one_of_each(system: System) -> None:
    """What makes numbers: jobs that succeed, are retried, fail, are cancelled; a wrong key; a 502."""
    token = KEYS["backend"]

    async def streams() -> None:
        await watch(system, await submit(system, request("hello", deltas=30), token=token), token=token)

    async def fails() -> None:
        flawed = request("hello", fault="status", status=503)
        job_id = await submit(system, flawed, {"max_retries": 1, "max_retry_wait_s": 5}, token=token)
        await watch(system, job_id, token=token)

    async def is_cancelled() -> None:
        job_id = await submit(system, request("hello", deltas=2_000), token=token)
        await watch(system, job_id, until=lambda event: event["type"] == "delta", token=token)
        await cancel(system, job_id, token=token)

    async def over_http() -> None:
        async with httpx.AsyncClient(base_url=system.relay_url, trust_env=False, timeout=WAIT_S) as client:
            await client.get("/v1/jobs/none", headers={"Authorization": "Bearer dw_wrong"})
            for body in (request("hello", rate=0), request("hello", fault="cut")):
                await client.post("/v1/chat/completions", json=body, headers=KEYS.headers("backend"))

    await asyncio.gather(streams(), fails(), is_cancelled(), over_http())


async def keep_busy(system: System) -> None:
    while True:
        await one_of_each(system)


def operands(expression: str) -> list[str]:
    """What an alert compares with its thresholds, so that there is something also where it does not fire."""
    parts = [re.sub(r"\s*(>|==)\s*[\d.e]+$", "", part.strip()) for part in expression.split(" and ")]
    return [re.sub(r"^absent\((.*)\)$", r"\1", part) for part in parts]


def queries() -> dict[str, str]:
    """All, by where they stand, as Grafana sends them: its variables filled in."""
    found = {
        f"panel {panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    found |= {rule["record"]: rule["record"] for rule in recorded()}
    for alert in alerts():
        found |= {f"{alert['alert']} {part}": part for part in operands(alert["expr"])}
    return {
        where: expression.replace("$__rate_interval", "30s").replace("$instance", ".+")
        for where, expression in found.items()
    }


@pytest.mark.timeout(300)
async def test_every_query_returns_data(system: System, prometheus: Prometheus) -> None:
    """Each panel's and each alert's, under load: at least one number, and no rule with an error."""
    missing = queries()
    assert len(missing) > 120
    busy = asyncio.create_task(keep_busy(system))

    def all_found() -> bool:
        for where, expression in tuple(missing.items()):
            if prometheus.values(expression):
                del missing[where]
        return not missing

    async def until_found() -> None:
        while True:
            if await asyncio.to_thread(all_found):
                return
            await asyncio.sleep(0.5)

    try:
        async with asyncio.timeout(150):
            await until_found()
    except TimeoutError:
        pytest.fail("no data for\n" + "\n".join(f"{where}\n    {query}" for where, query in missing.items()))
    finally:
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
    assert prometheus.values("deltawire_no_such_metric") == []
    rules = await asyncio.to_thread(prometheus.rules)
    assert len(rules) == len(alerts()) + len(recorded())
    assert {rule["health"] for rule in rules} == {"ok"}


async def test_an_alert_fires_where_there_is_no_worker(system: System, prometheus: Prometheus) -> None:
    """And nothing else: a process that is gone is what this Prometheus can see go."""
    for worker in system.workers:
        worker.stop(at_once=True)

    def states() -> tuple[str, str]:
        of = {rule["name"]: rule["state"] for rule in prometheus.rules() if rule["type"] == "alerting"}
        return of["DeltawireNoWorker"], of["DeltawireNoRelay"]

    # Where the machine is busy a scrape of the relay may be late, too, and the next one is not.
    await eventually(lambda: states() == ("pending", "inactive"), what="the alert")
