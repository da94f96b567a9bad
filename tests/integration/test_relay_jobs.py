"""Jobs listed, deleted and refused over HTTP, on a real relay and Redis (PROTOCOL §1.4, §5.8, §5.9)."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import redis.asyncio

from deltawire.queue import QUEUE, SEPARATOR
from deltawire.redis_server import RedisServer
from deltawire_relay.job_list import LOOKED_AT, MAX_LIMIT, JobList, Wanted
from tests.support.producer import REQUEST, WAIT_S, Producer
from tests.support.readers import http_client, websocket
from tests.support.relay_process import Keyring, RelayProcess

KEYS = Keyring(
    acme=("acme", ["read", "cancel", "submit", "list"]),
    umbrella=("umbrella", ["read", "cancel", "submit", "list"]),
    reader=("acme", ["read"]),
)
TENANTS = "[tenants.acme]\nmax_running = 1\nmax_queued = 1"


@pytest.fixture(scope="module")
def relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    environment = {"DELTAWIRE_API_KEYS": KEYS.text, "DELTAWIRE_TENANTS": TENANTS}
    with RelayProcess(redis_server.url, environment) as process:
        yield process


@pytest.fixture(autouse=True)
def empty(redis_url: str) -> None:
    """Each test has a Redis without any jobs."""


@pytest.fixture
async def acme(relay: RelayProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=relay.url, headers=KEYS.headers("acme")) as client:
        yield client


@pytest.fixture
async def umbrella(relay: RelayProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=relay.url, headers=KEYS.headers("umbrella")) as client:
        yield client


async def test_a_tenants_jobs_are_listed(
    acme: httpx.AsyncClient, umbrella: httpx.AsyncClient, jobs: Producer
) -> None:
    """The newest first, as GET shows them but for what they said; nobody else's."""
    ended = await jobs.ended("a", tenant="acme")
    failed = await jobs.ended(tenant="acme", kind="failed")
    running = await jobs.running("a", tenant="acme")
    theirs = await jobs.queued(tenant="umbrella")
    page = (await acme.get("/v1/jobs")).json()
    assert [job["id"] for job in page["data"]] == [running.job_id, failed.job_id, ended.job_id]
    assert {name: page[name] for name in page if name != "data"} == {
        "object": "list",
        "first_id": running.job_id,
        "last_id": ended.job_id,
        "has_more": False,
    }
    for job in page["data"]:
        shown = (await acme.get(f"/v1/jobs/{job['id']}")).json()
        assert {name: shown[name] for name in shown if name not in {"completion", "outputs"}} == job
    assert [job["id"] for job in (await umbrella.get("/v1/jobs")).json()["data"]] == [theirs.job_id]


async def test_a_list_comes_in_pages(acme: httpx.AsyncClient, jobs: Producer) -> None:
    """In either order, each job once, with a filter or without; a record that has expired drops out."""
    made = [await (jobs.ended if n % 2 else jobs.running)(tenant="acme") for n in range(7)]
    ids = [job.job_id for job in made]
    await jobs.log.scripts.execute("DEL", jobs.log.keys.job(ids.pop(2)).meta)
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        for status in ("", "completed"):
            found: list[str] = []
            query = {"order": order, "limit": "2", "status": status}
            page = {"has_more": True}
            while page["has_more"]:
                page = (await acme.get("/v1/jobs", params=query)).json()
                found += [job["id"] for job in page["data"]]
                query["after"] = page["last_id"]
            assert found == [job for job in expected if not status or job in {ids[1], ids[2], ids[4]}]
    assert (await acme.get("/v1/jobs?status=failed")).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=0000000010000", "limit"),
        pytest.param("limit=" + 8 * "0" + 5_000 * "1", "limit", id="limit=0…1…"),
        ("status=done", "status"),
        ("order=up", "order"),
        ("after=nobody", "after"),
        ("after=%7B%7D", "after"),
    ],
)
async def test_a_list_says_what_is_wrong(acme: httpx.AsyncClient, query: str, param: str) -> None:
    answer = await acme.get(f"/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_another_tenants_job_is_no_place_to_go_on(acme: httpx.AsyncClient, jobs: Producer) -> None:
    """Nor does the answer tell that it exists."""
    theirs = await jobs.queued(tenant="umbrella")
    answer = await acme.get(f"/v1/jobs?after={theirs.job_id}")
    unknown = await acme.get("/v1/jobs?after=nobody")
    assert (answer.status_code, answer.json()) == (unknown.status_code, unknown.json())


@pytest.mark.parametrize("status", ["queued", "failed"])
async def test_jobs_that_come_while_a_list_is_read(
    jobs: Producer, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """They move all others on by as many as are read at a time; those are found all the same, each once."""
    for _ in range(2 * LOOKED_AT):
        await jobs.queued(tenant="acme")
    listed = jobs.log.places.listed
    expected = await listed("acme", None, 2 * LOOKED_AT, descending=True)
    reads = itertools.count()

    async def read(*args: Any, **options: Any) -> list[str]:
        ids = await listed(*args, **options)
        for _ in range(LOOKED_AT if next(reads) == 0 else 0):
            await jobs.queued(tenant="acme")
        return ids

    monkeypatch.setattr(jobs.log.places, "listed", read)
    found: list[str] = []
    async with asyncio.timeout(WAIT_S):
        after, has_more = None, True
        while has_more:
            wanted = Wanted(limit=MAX_LIMIT, status=status, after=after)
            page = await JobList(jobs.log).page("acme", wanted)
            found += [job_id for job_id, _ in page.jobs]
            after, has_more = page.last_id, page.has_more
    assert found == (expected if status == "queued" else [])


async def test_lists_and_deletions_need_their_scopes(relay: RelayProcess, jobs: Producer) -> None:
    job = await jobs.queued(tenant="acme")
    async with http_client(base_url=relay.url, headers=KEYS.headers("reader")) as reader:
        for answer in (await reader.get("/v1/jobs"), await reader.delete(f"/v1/jobs/{job.job_id}")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


async def test_a_deleted_job_is_gone(acme: httpx.AsyncClient, jobs: Producer) -> None:
    """Whatever it was doing; a repeat is 404, as for a job that never was."""
    for made in (await jobs.ended("a", tenant="acme"), await jobs.queued(tenant="acme")):
        path = f"/v1/jobs/{made.job_id}"
        answer = await acme.delete(path)
        assert answer.status_code == 200
        assert answer.json() == {"id": made.job_id, "object": "job.deleted", "deleted": True}
        for again in (await acme.delete(path), await acme.get(path)):
            assert (again.status_code, again.json()["error"]["code"]) == (404, "unknown_job")
        assert await jobs.log.record(made.job_id) is None
        assert await jobs.log.top(made.job_id) == 0
    assert (await acme.get("/v1/jobs")).json()["data"] == []


async def test_another_tenants_job_is_not_deleted(umbrella: httpx.AsyncClient, jobs: Producer) -> None:
    job = await jobs.running("a", tenant="acme")
    assert (await umbrella.delete(f"/v1/jobs/{job.job_id}")).status_code == 404
    record = await jobs.log.record(job.job_id)
    assert record is not None
    assert record.status == "in_progress"
    assert await jobs.log.cancel_request(job.job_id) is None


async def test_readers_of_a_deleted_job_get_its_end(
    relay: RelayProcess, acme: httpx.AsyncClient, jobs: Producer
) -> None:
    """Also of one whose worker does not answer."""
    job = await jobs.running("a", "b", tenant="acme")
    path = f"/v1/jobs/{job.job_id}"
    async with websocket(relay.websocket_url + path + "/ws", headers=KEYS.headers("acme")) as reader:
        await reader.until(job.top)
        assert (await acme.delete(path)).status_code == 200
        last = (await reader.until_terminal())[-1]
    assert (last["type"], last["cancel"]["reason"]) == ("cancelled", "deleted")


async def test_too_many_jobs_are_refused(
    relay: RelayProcess, acme: httpx.AsyncClient, umbrella: httpx.AsyncClient, redis_server: RedisServer
) -> None:
    """One has its message sent, one waits, the third is 429 and leaves nothing behind; at either door."""
    body = {"request": REQUEST}
    assert [(await acme.post("/v1/jobs", json=body)).status_code for _ in range(2)] == [202, 202]
    for path, refused in (("/v1/jobs", body), ("/v1/chat/completions", REQUEST)):
        answer = await acme.post(path, json=refused)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "tenant_queue_full")
        assert int(answer.headers["Retry-After"]) > 0
    assert len((await acme.get("/v1/jobs")).json()["data"]) == 2
    assert (await umbrella.post("/v1/jobs", json=body)).status_code == 202
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        assert await client.llen(QUEUE) == 2


async def test_a_low_priority_goes_to_a_later_list(
    umbrella: httpx.AsyncClient, redis_server: RedisServer
) -> None:
    """kombu's lists for 0, 3, 6 and 9 on Redis, where 0 comes first."""
    for priority, name in ((9, ""), (7, ""), (6, "3"), (3, "6"), (0, "9")):
        async with redis.asyncio.Redis.from_url(redis_server.url) as client:
            await client.flushall()
            body = {"request": REQUEST, "options": {"priority": priority}}
            assert (await umbrella.post("/v1/jobs", json=body)).status_code == 202
            assert await client.llen(f"{QUEUE}{SEPARATOR}{name}" if name else QUEUE) == 1
