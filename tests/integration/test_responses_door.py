"""Responses on a real relay and a real Redis; logs written without a worker (PROTOCOL §5.11)."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import redis.asyncio

from deltawire.codec import encode_snapshot
from deltawire.fold import Fold
from deltawire.redis_server import RedisServer
from deltawire_relay import server as server_module
from tests.support.producer import ProducedJob, Producer
from tests.support.readers import WAIT_S, http_client
from tests.support.relay_process import Keyring, RelayProcess, relay_in_process
from tests.support.sample_events import text_chunk

PATH = "/v1/responses"
SECRET = "a word that stands in the prompt only"
BODY: dict[str, Any] = {"model": "m", "input": SECRET, "instructions": SECRET, "background": True}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def another(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """A second relay."""
    with RelayProcess(redis_server.url) as process:
        yield process


class Stream:
    """The events of a Response, one by one."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> Json | None:
        """None: it is over."""
        async with asyncio.timeout(WAIT_S):
            async for line in self._lines:
                if line.startswith("event: "):
                    name, data = line.removeprefix("event: "), await anext(self._lines)
                    event: Json = json.loads(data.removeprefix("data: "))
                    assert event["type"] == name
                    return event
        return None

    async def rest(self) -> list[Json]:
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events

    async def until(self, kind: str) -> list[Json]:
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
            if event["type"] == kind:
                break
        return events


@asynccontextmanager
async def opened(url: str, method: str, path: str, **request: Any) -> AsyncIterator[Stream]:
    async with http_client(base_url=url) as client, client.stream(method, path, **request) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        yield Stream(response)


def streamed(url: str, response_id: str, after: int | None = None) -> Any:
    params: Json = {"stream": "true", **({} if after is None else {"starting_after": after})}
    return opened(url, "GET", f"{PATH}/{response_id}", params=params)


async def ask(url: str, method: str = "POST", path: str = PATH, **request: Any) -> httpx.Response:
    async with http_client(base_url=url) as client:
        return await client.request(method, path, **request)


async def create(url: str, jobs: Producer, **fields: Any) -> tuple[Json, ProducedJob]:
    """A Response, and its job, whose log the test writes."""
    answer = await ask(url, json=BODY | fields)
    assert answer.status_code == 200, answer.text
    response: Json = answer.json()
    job = jobs.job(response["id"].removeprefix("resp_"))
    await job.adopt()
    return response, job


async def test_a_stream_is_resumed_anywhere(
    relay: RelayProcess, another: RelayProcess, jobs: Producer
) -> None:
    """A reader goes on from its number, on whichever relay, while the job runs or after it."""
    response, job = await create(relay.url, jobs)
    async with streamed(relay.url, response["id"]) as first:
        await job.deltas("He", "l")
        begun = await first.until("response.output_text.delta")
    async with streamed(another.url, response["id"], begun[-1]["sequence_number"]) as second:
        await job.deltas("lo")
        await job.end()
        rest = await second.rest()
    events = [*begun, *rest]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event["delta"] for event in events if "delta" in event) == "Hello"
    for relay_url in (relay.url, another.url):
        for after in (None, 0, 4, len(events) - 1):
            async with streamed(relay_url, response["id"], after) as again:
                assert await again.rest() == events[0 if after is None else after + 1 :]
        shown = await ask(relay_url, "GET", f"{PATH}/{response['id']}")
        assert shown.json() == events[-1]["response"]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


async def test_a_number_that_the_response_never_had(relay: RelayProcess, jobs: Producer) -> None:
    """Who has more than there is, since Redis has lost it, is told, and does not ask for ever."""
    response, job = await create(relay.url, jobs)
    await job.end()
    async with streamed(relay.url, response["id"], 4) as stream:
        (error,) = await stream.rest()
    assert (error["type"], error["code"], error["sequence_number"]) == ("error", "state_lost", 4)


async def test_a_stream_from_the_beginning(relay: RelayProcess, jobs: Producer) -> None:
    """`stream: true`: the events begin before any worker has heard of it."""
    async with opened(relay.url, "POST", PATH, json=BODY | {"stream": True}) as stream:
        created, queued = await stream.next(), await stream.next()
        assert created is not None
        assert queued is not None
        assert (created["type"], queued["type"]) == ("response.created", "response.queued")
        job = jobs.job(stream.response.headers["X-Job-Id"])
        assert created["response"]["id"] == f"resp_{job.job_id}"
        await job.adopt()
        await job.deltas("Hi")
        await job.end()
        assert [event["type"] for event in await stream.rest()][-1] == "response.completed"


async def test_it_is_polled(relay: RelayProcess, jobs: Producer) -> None:
    """Queued, in progress, completed; what came of it is there when it is whole."""
    answer = await ask(relay.url, json=BODY | {"metadata": {"chat": "7"}, "temperature": 0.5})
    response = answer.json()
    path = f"{PATH}/{response['id']}"
    assert response["status"] == "queued"
    assert (response["metadata"], response["temperature"]) == ({"chat": "7"}, 0.5)
    job = jobs.job(response["id"].removeprefix("resp_"))
    assert answer.headers["X-Job-Id"] == job.job_id
    await job.adopt()
    await job.deltas("Hi")
    shown = (await ask(relay.url, "GET", path)).json()
    assert shown == {**response, "status": "in_progress"}
    await job.end()
    assert (await ask(relay.url, "GET", path)).json()["output"][0]["status"] == "completed"
    summary = (await ask(relay.url, "GET", f"/v1/jobs/{job.job_id}")).json()
    assert (summary["status"], summary["metadata"]) == ("completed", {"chat": "7"})


async def test_a_long_one_is_read_by_pages(relay: RelayProcess, jobs: Producer) -> None:
    response, job = await create(relay.url, jobs)
    for _ in range(5):
        await job.deltas(*["x" * 100] * 1_000)
    await job.end()
    async with streamed(relay.url, response["id"], 4_000) as stream:
        events = await stream.rest()
    assert [event["sequence_number"] for event in events] == list(range(4_001, 4_001 + len(events)))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "x" * 500_000


async def test_the_prompt_is_shown_to_nobody(
    relay: RelayProcess, jobs: Producer, redis_server: RedisServer
) -> None:
    """Neither in a Response nor, once it has ended, in Redis."""
    response, job = await create(relay.url, jobs)
    await job.end()
    async with streamed(relay.url, response["id"]) as stream:
        assert SECRET not in json.dumps(await stream.rest())
    shown = await ask(relay.url, "GET", f"{PATH}/{response['id']}")
    assert SECRET not in shown.text + json.dumps(response)
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        kept: Any = await client.hgetall(jobs.log.keys.job(job.job_id).meta)
    assert SECRET.encode() not in b"".join(kept.values())


async def test_cancelling_it_again_changes_nothing(relay: RelayProcess) -> None:
    """A queued one has ended when the answer comes; one that has ended stays what it is."""
    response = (await ask(relay.url, json=BODY)).json()
    for _ in range(2):
        cancelled = await ask(relay.url, path=f"{PATH}/{response['id']}/cancel")
        assert cancelled.status_code == 200
        assert cancelled.json() == {**response, "status": "cancelled"}
    async with streamed(relay.url, response["id"]) as stream:
        events = await stream.rest()
    assert [event["type"] for event in events][-1] == "response.incomplete"
    assert events[-1]["response"] == cancelled.json()


async def test_a_cancel_that_no_worker_has_answered(relay: RelayProcess, jobs: Producer) -> None:
    """It tells the truth: the job still runs. What a completed one has said stays."""
    response, job = await create(relay.url, jobs)
    path = f"{PATH}/{response['id']}/cancel"
    assert (await ask(relay.url, path=path)).json()["status"] == "in_progress"
    await job.end("cancelled")
    assert (await ask(relay.url, path=path)).json()["status"] == "cancelled"


async def test_it_is_deleted(relay: RelayProcess, jobs: Producer) -> None:
    response, job = await create(relay.url, jobs)
    await job.end()
    path = f"{PATH}/{response['id']}"
    deleted = (await ask(relay.url, "DELETE", path)).json()
    assert deleted == {"id": response["id"], "object": "response", "deleted": True}
    assert (await ask(relay.url, "GET", path)).status_code == 404


async def test_other_jobs_are_no_responses(relay: RelayProcess, jobs: Producer) -> None:
    """What somebody asked for by another door is told by that one; a cancel does not touch it."""
    job = await jobs.running("x")
    for method, path in (("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel"), ("DELETE", "")):
        answer = await ask(relay.url, method, f"{PATH}/resp_{job.job_id}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_job")
    assert (await ask(relay.url, "GET", f"/v1/jobs/{job.job_id}")).json()["status"] == "in_progress"


async def test_another_tenants_does_not_exist(redis_server: RedisServer) -> None:
    keys = Keyring(a=("acme", ("submit", "read", "cancel")), b=("other", ("submit", "read", "cancel")))
    with RelayProcess(redis_server.url, {"DELTAWIRE_API_KEYS": keys.text}) as relay:
        response = (await ask(relay.url, json=BODY, headers=keys.headers("a"))).json()
        path = f"{PATH}/{response['id']}"
        for method, url in (("GET", path), ("POST", f"{path}/cancel"), ("DELETE", path)):
            assert (await ask(relay.url, method, url, headers=keys.headers("b"))).status_code == 404
        shown = await ask(relay.url, "GET", path, headers=keys.headers("a"))
        assert shown.json() == response


async def test_a_repeat_is_the_same_response(relay: RelayProcess, jobs: Producer) -> None:
    """By its Idempotency-Key; another body under it is a conflict, and so is another door."""
    headers = {"Idempotency-Key": "once", "Content-Type": "application/json"}
    first = (await ask(relay.url, json=BODY, headers=headers)).json()
    job = jobs.job(first["id"].removeprefix("resp_"))
    await job.adopt()
    await job.end()
    again = (await ask(relay.url, json=BODY, headers=headers)).json()
    assert (again["id"], again["status"]) == (first["id"], "completed")
    async with opened(relay.url, "POST", PATH, json=BODY | {"stream": True}, headers=headers) as stream:
        assert (await stream.rest())[-1]["response"] == again
    other = await ask(relay.url, json=BODY | {"top_p": 1}, headers=headers)
    assert other.json()["error"]["code"] == "idempotency_conflict"


@pytest.mark.parametrize(
    "query", ["starting_after=x", "starting_after=-1", "stream=yes", "include[]=x", "include=x"]
)
async def test_a_query_that_is_none(relay: RelayProcess, query: str) -> None:
    response = (await ask(relay.url, json=BODY)).json()
    answer = await ask(relay.url, "GET", f"{PATH}/{response['id']}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0].removesuffix("[]")


async def test_a_log_that_was_compacted(
    relay: RelayProcess, jobs: Producer, redis_server: RedisServer
) -> None:
    """Its single deltas are no more, so neither are the numbers: a stream says so, and the text is there."""
    response, job = await create(relay.url, jobs)
    await job.deltas("Hel", "lo")
    await job.end()
    fold = Fold()
    fold.add(text_chunk("Hello"))
    key = jobs.log.keys.job(job.job_id).log
    snapshot = encode_snapshot(job.job_id, 4, attempt=1, created_at=1.0, fold=fold.state())
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        await client.delete(key)
        await client.xadd(key, {"e": snapshot}, id="4-0")
        await client.xadd(key, {"e": job.lines[-1]}, id="5-0")
        async with streamed(relay.url, response["id"]) as stream:
            (error,) = await stream.rest()
        assert (error["type"], error["error"]["code"]) == ("error", "state_lost")
        shown = await ask(relay.url, "GET", f"{PATH}/{response['id']}")
        assert shown.json()["output"][0]["content"][0]["text"] == "Hello"
        await client.delete(key)
    lost = await ask(relay.url, "GET", f"{PATH}/{response['id']}")
    assert (lost.status_code, lost.json()["error"]["code"]) == (500, "state_lost")


async def test_a_drain_says_where_to_go_on(
    redis_server: RedisServer, jobs: Producer, relay: RelayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the number of the last event, which another relay goes on from; new ones are refused."""
    monkeypatch.setattr(server_module, "DRAIN_WINDOW_S", 0.5)
    async with relay_in_process(redis_server.url, monkeypatch) as address:
        response, job = await create(f"http://{address}", jobs)
        await job.deltas("He")
        reader = streamed(f"http://{address}", response["id"])
        stream = await reader.__aenter__()
        begun = await stream.until("response.output_text.delta")
    (error,) = await stream.rest()
    await reader.__aexit__(None, None, None)
    assert (error["type"], error["code"]) == ("error", "shutting_down")
    assert error["sequence_number"] == begun[-1]["sequence_number"]
    await job.end()
    async with streamed(relay.url, response["id"], error["sequence_number"]) as rest:
        assert (await rest.rest())[-1]["type"] == "response.completed"
