"""`/metrics` of a whole system under load and churn, and after it (PROTOCOL §5.5, docs/metrics.md)."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from pytest_asyncio import fixture

from deltawire.api_keys import new_api_key
from tests.support.promtool import problems
from tests.support.system import WAIT_S, Service, System, cancel, eventually, request, submit, watch

TENANT: Final = "some-tenant-of-ours"
KEY, ENTRY = new_api_key("backend", TENANT, ["submit", "read", "cancel", "metrics"])
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "metrics.md"
SECRET_PROMPT: Final = "a prompt that nobody else may see"
COMMON: Final = "Both services"
# What stands for nothing that was begun and is to end.
STEADY: Final = {"build_info", "redis_connected", "jobs_capacity", "connections_limit"}
# Whatever is told where it is configured; nobody is there, and no job ends so.
EVERYTHING: Final = {
    "DELTAWIRE_API_KEYS": ENTRY,
    "DELTAWIRE_JWT_SECRET": "0123456789abcdef" * 2,
    "DELTAWIRE_JWT_JWKS_URL": "http://127.0.0.1:9/keys",
    "DELTAWIRE_WEBHOOKS": '[webhooks.nobody]\nurl = "http://127.0.0.1:9/"\nevents = ["incomplete"]\n'
    'secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="',
}


@fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[System]:
    with System(
        relay_environment=EVERYTHING,
        worker_environment={**EVERYTHING, "DELTAWIRE_LOG_FORMAT": "json"},
        gateway_rate=200,
    ) as made:
        yield made


async def scrape(service: Service) -> str:
    async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
        response = await client.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 200, response.text
    return response.text


def read(text: str) -> dict[str, Metric]:
    """Families by their names, without `deltawire_`; a name is there once only."""
    families = [
        family for family in text_string_to_metric_families(text) if family.name.startswith("deltawire_")
    ]
    named = {family.name.removeprefix("deltawire_"): family for family in families}
    assert len(named) == len(families)
    return named


def total(families: dict[str, Metric], name: str, **labels: str) -> float:
    """Of a counter's or a histogram's samples with these labels."""
    return sum(
        sample.value
        for sample in families[name].samples
        if sample.name.endswith(("_total", "_count")) and labels.items() <= sample.labels.items()
    )


def documented(heading: str) -> Iterator[tuple[str, str, set[str]]]:
    """(name without `deltawire_`, type, labels) of each line of a table."""
    section = DOCUMENT.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    row = r"^\| `deltawire_(\w+)` \| (\w+) \|([^|]*)\|"
    for name, kind, labels in re.findall(row, section, re.MULTILINE):
        yield name.removesuffix("_total"), kind, set(re.findall(r"`(\w+)`", labels))


async def churn(system: System) -> list[str]:
    """Jobs that end, jobs that fail, jobs that are cancelled; readers that stay, and readers that go."""
    endless = request(SECRET_PROMPT, deltas=5_000, rate=20)
    jobs = [await submit(system, request(SECRET_PROMPT, deltas=100), token=KEY) for _ in range(12)]
    cancelled = [await submit(system, endless, token=KEY) for _ in range(4)]
    failing = await submit(system, request(SECRET_PROMPT, fault="status", status=400), token=KEY)

    def is_at_ten(event: dict[str, Any]) -> bool:
        return bool(event["sequence_number"] >= 10)

    async def cut(job_id: str) -> None:
        await watch(system, job_id, token=KEY, until=is_at_ten)
        await cancel(system, job_id, token=KEY)

    async def leave(job_id: str) -> None:
        await watch(system, job_id, token=KEY, until=is_at_ten)

    async def chat(client: httpx.AsyncClient) -> None:
        body = {**request(SECRET_PROMPT, deltas=20), "stream": True}
        response = await client.post("/v1/chat/completions", json=body)
        assert "[DONE]" in response.text

    async def listen(client: httpx.AsyncClient, job_id: str) -> None:
        assert "completed" in (await client.get(f"/v1/jobs/{job_id}/events")).text

    async with httpx.AsyncClient(
        base_url=system.relay_url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=WAIT_S
    ) as client:
        await asyncio.gather(
            *(watch(system, job_id, token=KEY) for job_id in (*jobs, failing)),
            *map(leave, jobs),
            *map(cut, cancelled),
            *(listen(client, job_id) for job_id in jobs[:4]),
            *(chat(client) for _ in range(2)),
        )
    return [*jobs, *cancelled, failing]


@pytest.mark.timeout(300)
@pytest.mark.asyncio(loop_scope="module")
async def test_metrics_are_right_under_load_and_settle_after_it(system: System) -> None:
    """They count what happened, pass Prometheus' linter, name nobody; what is a gauge goes back to zero."""
    working = asyncio.create_task(churn(system))
    worker = relay = ""
    while not working.done():
        worker, relay = await asyncio.gather(scrape(system.workers[0]), scrape(system.relay))
        assert problems(worker) == ""
        assert problems(relay) == ""
        await asyncio.sleep(0.2)
    jobs = await working

    async with asyncio.timeout(2 * WAIT_S):
        while unsettled := [
            (family.name, sample.labels, sample.value)
            for text in (worker, relay)
            for name, family in read(text).items()
            for sample in family.samples
            if family.type == "gauge" and name not in STEADY
            if sample.value > (sample.labels == {"transport": "http"})  # the scrape's own connection
        ] + ([] if total(read(worker), "jobs_ended") == len(jobs) + 2 else [("ended", {}, 0)]):
            await asyncio.sleep(0.2)
            worker, relay = await asyncio.gather(scrape(system.workers[0]), scrape(system.relay))
    assert not unsettled

    of_worker, of_relay = read(worker), read(relay)
    assert total(of_worker, "jobs_started") == total(of_worker, "claims", result="claimed") == len(jobs) + 2
    assert total(of_worker, "jobs_ended", status="cancelled") == total(of_worker, "cancel_delay_seconds") == 4
    assert total(of_worker, "jobs_failed", code="upstream_invalid_request") == 1
    errors = {"upstream": "default", "class": "upstream_invalid_request"}
    assert total(of_worker, "upstream_errors", **errors) == 1
    assert total(of_worker, "time_to_first_delta_seconds") == len(jobs) + 1
    assert total(of_worker, "tokens", model="gpt-5.4", kind="output") >= 12 * 100
    assert total(of_worker, "append_events") >= total(of_worker, "deltas") >= 12 * 100
    assert total(of_relay, "jobs_submitted") == len(jobs) + 2
    assert total(of_relay, "cancels") == total(of_relay, "cancel_seconds") == 4
    # A worker has a second to be heard, which may be too short on a busy machine.
    heard, unheard = (total(of_relay, "cancels", result=result) for result in ("delivered", "undelivered"))
    assert heard + unheard == 4
    assert total(of_relay, "deliveries") >= 16 * 100
    assert total(of_relay, "publish_to_write_seconds") > 0
    assert total(of_relay, "http_requests", route="/v1/jobs", status="2xx") == len(jobs)
    for text in (worker, relay):
        for word in (*jobs, TENANT, SECRET_PROMPT, KEY, "127.0.0.1"):
            assert word not in text


@pytest.mark.asyncio(loop_scope="module")
async def test_each_job_ends_in_a_line_of_the_log(system: System) -> None:
    """With its id, attempt, tenant and status, and the code of its failure; and nobody's prompt."""
    bodies = (request(SECRET_PROMPT, deltas=2), request(SECRET_PROMPT, fault="status", status=400))
    jobs = [await submit(system, body, token=KEY) for body in bodies]
    for job_id in jobs:
        await watch(system, job_id, token=KEY)
    log = system.workers[0]

    def lines() -> list[dict[str, Any]]:
        whole, _, _being_written = log.log.rpartition("\n")
        read = [json.loads(line) for line in whole.splitlines()]
        return [line for line in read if line.get("job_id") in jobs]

    def ends() -> list[dict[str, Any]]:
        return [line for line in lines() if "status" in line]

    await eventually(lambda: len(ends()) == 2, what="two lines")
    assert {(line["job_id"], line["status"], line.get("code")) for line in ends()} == {
        (jobs[0], "completed", None),
        (jobs[1], "failed", "upstream_invalid_request"),
    }
    assert {(line["attempt"], line["tenant"]) for line in lines()} == {(1, TENANT)}
    assert SECRET_PROMPT not in system.logs()


@pytest.mark.asyncio(loop_scope="module")
async def test_each_metric_is_documented(system: System) -> None:
    """With its type and its labels, in docs/metrics.md; and nothing stands there that is not served."""
    for heading, service in (("Worker", system.workers[0]), ("Relay", system.relay)):
        families = read(await scrape(service))
        told = {name: (kind, labels) for name, kind, labels in (*documented(COMMON), *documented(heading))}
        assert set(families) == set(told)
        for name, family in families.items():
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            kind, expected = told[name]
            assert family.type == kind, name
            assert labels in ({*()}, expected) if not family.samples else labels == expected, name
