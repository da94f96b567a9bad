"""The relay's HTTP door, on a real process and a real Redis (PROTOCOL §5)."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import pytest
import redis.asyncio
from msgspec.structs import replace

from deltawire import redis_client
from deltawire.codec import encode_terminal
from deltawire.events import Output, ParseError
from deltawire.keys import Keys
from deltawire.redis_server import RedisServer, free_port
from deltawire_relay import hub as hub_module
from deltawire_relay import jobs as jobs_module
from deltawire_relay import server as server_module
from tests.support.producer import REQUEST, USAGE, Producer, completion, producer
from tests.support.readers import WAIT_S, http_client, read_job, websocket
from tests.support.relay_process import Keyring, RelayDidNotStartError, RelayProcess, relay_in_process

KEYS = Keyring(
    acme=("acme", ["read", "cancel", "submit"]),
    umbrella=("umbrella", ["read", "cancel", "submit"]),
)
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    with RelayProcess(redis_server.url, {"DELTAWIRE_ALLOWED_ORIGINS": ORIGIN}) as process:
        yield process


@pytest.fixture(scope="module")
def keyed(redis_server: RedisServer) -> Iterator[RelayProcess]:
    environment = {"DELTAWIRE_API_KEYS": KEYS.text, "DELTAWIRE_PUBLIC_URL": "https://relay.example/"}
    with RelayProcess(redis_server.url, environment) as process:
        yield process


@pytest.fixture
async def http(relay: RelayProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=relay.url) as client:
        yield client


# Probes.


async def test_probes_answer(http: httpx.AsyncClient) -> None:
    """/healthz and /readyz say 200 while all is well, to everybody, whatever Host and Origin (§5.5)."""
    for path in ("/healthz", "/readyz"):
        answer = await http.get(path, headers={"Host": "10.0.0.9:8080", "Origin": "https://evil.example"})
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


# POST /v1/jobs.


async def test_a_job_is_created(http: httpx.AsyncClient, jobs: Producer, redis_server: RedisServer) -> None:
    """202 with id, object, status and urls; record, first event and message are there (§5.2)."""
    body = {"request": REQUEST, "options": {"metadata": {"user": "7"}, "timeout_s": 30}}
    answer = await http.post("/v1/jobs", json=body)
    assert answer.status_code == 202
    job = answer.json()
    base = f"/v1/jobs/{job['id']}"
    assert job == {
        "id": job["id"],
        "object": "job",
        "status": "queued",
        "token": None,
        "urls": {
            "self": base,
            "events": f"{base}/events",
            "websocket": f"{base}/ws",
            "cancel": f"{base}/cancel",
        },
    }
    record = await jobs.log.record(job["id"])
    assert record is not None
    assert json.loads(record.request or b"") == REQUEST
    assert (record.options.timeout_s, record.tenant) == (30, "default")
    assert await jobs.log.top(job["id"]) == 1
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        messages = await client.lrange("deltawire", 0, -1)
    ours = [json.loads(message) for message in messages if job["id"].encode() in message]
    assert [message["headers"]["id"] for message in ours] == [job["id"]]
    assert "content" not in str(ours[0]["headers"])


async def test_urls_begin_with_the_public_url(keyed: RelayProcess) -> None:
    """With DELTAWIRE_PUBLIC_URL they are absolute, the WebSocket's with its own scheme (§5.2)."""
    async with http_client(base_url=keyed.url, headers=KEYS.headers("acme")) as client:
        job = (await client.post("/v1/jobs", json={"request": REQUEST})).json()
    assert job["urls"]["self"] == f"https://relay.example/v1/jobs/{job['id']}"
    assert job["urls"]["websocket"] == f"wss://relay.example/v1/jobs/{job['id']}/ws"


async def test_an_idempotency_key_names_one_job(http: httpx.AsyncClient, jobs: Producer) -> None:
    """The same key and body is the same job, whatever the order of fields; another body is 422 (§5.2)."""
    key = {"Idempotency-Key": f"order-{jobs.job().job_id}"}
    first = await http.post("/v1/jobs", json={"request": REQUEST, "options": None}, headers=key)
    again = await http.post("/v1/jobs", json={"request": dict(reversed(REQUEST.items()))}, headers=key)
    assert first.status_code == again.status_code == 202
    assert first.json() == again.json()
    other = await http.post("/v1/jobs", json={"request": {**REQUEST, "model": "n"}}, headers=key)
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_conflict"
    assert await jobs.log.top(first.json()["id"]) == 1


async def test_a_repeat_finds_a_job_that_has_ended(http: httpx.AsyncClient, jobs: Producer) -> None:
    """A late repeat answers with the status of its moment, and starts nothing (§5.2)."""
    key = {"Idempotency-Key": f"order-{jobs.job().job_id}"}
    first = (await http.post("/v1/jobs", json={"request": REQUEST}, headers=key)).json()
    await http.post(f"/v1/jobs/{first['id']}/cancel")
    again = await http.post("/v1/jobs", json={"request": REQUEST}, headers=key)
    assert (again.json()["id"], again.json()["status"]) == (first["id"], "cancelled")


async def test_many_repeats_at_once_make_one_job(http: httpx.AsyncClient, jobs: Producer) -> None:
    """Creating is create-if-absent, also when all come at the same time (§5.2)."""
    key = {"Idempotency-Key": f"order-{jobs.job().job_id}"}
    answers = await asyncio.gather(
        *(http.post("/v1/jobs", json={"request": REQUEST}, headers=key) for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await jobs.log.top(answers[0].json()["id"]) == 1


async def test_a_tenants_keys_are_its_own(keyed: RelayProcess) -> None:
    """The same Idempotency-Key of another tenant is another job (§5.2, §4.8)."""
    ids = set()
    async with http_client(base_url=keyed.url) as client:
        for tenant in ("acme", "umbrella"):
            headers = {**KEYS.headers(tenant), "Idempotency-Key": "order-1"}
            ids.add((await client.post("/v1/jobs", json={"request": REQUEST}, headers=headers)).json()["id"])
    assert len(ids) == 2


async def test_a_broker_that_is_away_is_said_and_may_be_tried_again(redis_server: RedisServer) -> None:
    """503 queue_unavailable, retryable; the same Idempotency-Key makes it good later (§8)."""
    headers = {"Idempotency-Key": "broker-away"}
    broker = {"DELTAWIRE_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0"}
    with RelayProcess(redis_server.url, broker) as away:
        async with http_client(base_url=away.url) as client:
            answer = await client.post("/v1/jobs", json={"request": REQUEST}, headers=headers)
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert (error["code"], error["retryable"]) == ("queue_unavailable", True)


# GET /v1/jobs/{id}.


async def test_a_job_is_shown_while_it_runs(http: httpx.AsyncClient, jobs: Producer) -> None:
    """What only the terminal event tells is null before it; the request is never shown (§5.3)."""
    job = jobs.job()
    await job.submit(metadata={"user": "7"})
    await job.claim()
    await job.deltas("a", "b")
    shown = (await http.get(f"/v1/jobs/{job.job_id}")).json()
    assert shown.pop("created_at") > 1_700_000_000
    assert shown == {
        "id": job.job_id,
        "object": "job",
        "status": "in_progress",
        "attempt": 1,
        "metadata": {"user": "7"},
        "latest_sequence_number": 4,
        **dict.fromkeys(
            [
                "completion",
                "outputs",
                "usage",
                "usage_source",
                "error",
                "incomplete_details",
                "cancel",
                "timings",
            ]
        ),
    }


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed", "cancelled"])
async def test_a_job_is_shown_after_its_end(kind: str, http: httpx.AsyncClient, jobs: Producer) -> None:
    """Completion, usage and timings are the terminal event's, and what is special about its kind (§5.3)."""
    job = await jobs.ended("a", kind=kind)
    shown = (await http.get(f"/v1/jobs/{job.job_id}")).json()
    assert (shown["status"], shown["latest_sequence_number"]) == (kind, 4)
    assert shown["completion"] == completion("the whole text")
    assert (shown["usage"], shown["usage_source"]) == (USAGE, "provider")
    assert shown["timings"] == {"queued_s": 0.1, "first_delta_s": 0.2, "total_s": 0.3}
    last = job.events[-1]
    assert shown["outputs"] == []
    for field, of in (("error", "failed"), ("incomplete_details", "incomplete"), ("cancel", "cancelled")):
        assert shown[field] == (last[field] if kind == of else None)


async def test_a_large_completion_is_read_from_the_log(http: httpx.AsyncClient, jobs: Producer) -> None:
    """Where the terminal event has only the address of its completion, this is it (§2, §5.3)."""
    job = await jobs.running()
    text = "y" * 40_000
    for _ in range(8):
        await job.deltas(text)
    large = job.terminal_event("completed")
    await job.append([encode_terminal(replace(large, completion=completion(text * 8)))], terminal="completed")
    assert job.events[-1]["completion"] is None
    shown = (await http.get(job.events[-1]["completion_url"])).json()
    assert shown["completion"]["choices"][0]["message"]["content"] == text * 8


async def test_json_that_was_left_out_is_parsed_again(http: httpx.AsyncClient, jobs: Producer) -> None:
    """Where the terminal event had no room for it; what is wrong stays as the event says it (§2.3, §5.3)."""
    job = await jobs.running()
    text = json.dumps({"a": "y" * 100_000, "b": "y" * 100_000})
    for at in range(0, len(text), 40_000):
        await job.deltas(text[at : at + 40_000])
    outputs = [
        Output(index=0, parsed=json.loads(text)),
        Output(index=1, tool_calls="incomplete", parse_error=ParseError("refused", "no")),
    ]
    event = replace(job.terminal_event("completed"), completion=completion(text), outputs=outputs)
    await job.append([encode_terminal(event)], terminal="completed")
    assert job.events[-1]["outputs"][0]["parse_error"]["reason"] == "too_large"
    shown = (await http.get(f"/v1/jobs/{job.job_id}")).json()
    assert shown["outputs"] == [msgspec.to_builtins(output) for output in outputs]


# POST /v1/jobs/{id}/cancel.


async def test_a_queued_job_is_cancelled_at_once(http: httpx.AsyncClient, jobs: Producer) -> None:
    """When the answer comes, the job has ended and the log says so; a repeat changes nothing (§5.4, §4.5)."""
    job = await jobs.queued()
    answer = await http.post(f"/v1/jobs/{job.job_id}/cancel", json={"reason": "changed my mind"})
    assert answer.json() == {"status": "cancelled", "cancelled_from": "queued", "delivered": True}
    last = json.loads(await jobs.log.last(job.job_id) or b"")
    assert (last["type"], last["sequence_number"]) == ("cancelled", 2)
    assert last["cancel"]["reason"] == "changed my mind"
    again = await http.post(f"/v1/jobs/{job.job_id}/cancel")
    assert again.json() == {"status": "cancelled", "cancelled_from": None, "delivered": True}
    assert await jobs.log.top(job.job_id) == 2


async def test_a_running_job_that_ends_in_time_is_delivered(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer waits for the worker's terminal event (§5.4); here for longer than a second."""
    monkeypatch.setattr(jobs_module, "CANCEL_WAIT_S", WAIT_S)
    job = await jobs.running("a")

    async def obey() -> None:
        while await jobs.log.cancel_request(job.job_id) is None:  # noqa: ASYNC110 - it is in Redis
            await asyncio.sleep(0.005)
        await job.end("cancelled")

    async with (
        relay_in_process(redis_server.url, monkeypatch) as address,
        http_client(base_url=f"http://{address}") as client,
    ):
        answer, _ = await asyncio.gather(client.post(f"/v1/jobs/{job.job_id}/cancel"), obey())
    assert answer.json() == {"status": "cancelled", "cancelled_from": "in_progress", "delivered": True}


async def test_a_running_job_whose_worker_is_silent_is_not_delivered(
    http: httpx.AsyncClient, jobs: Producer
) -> None:
    """The answer does not wait longer than a second, and does not say what is not so (§5.4, §4.5)."""
    job = await jobs.running("a")
    answer = await http.post(f"/v1/jobs/{job.job_id}/cancel")
    assert answer.json() == {"status": "in_progress", "cancelled_from": "in_progress", "delivered": False}
    request = await jobs.log.cancel_request(job.job_id)
    assert request is not None
    assert request.reason == "client"


async def test_cancelling_a_job_that_has_ended_changes_nothing(
    http: httpx.AsyncClient, jobs: Producer
) -> None:
    """The status is the one it ended with (§5.4)."""
    job = await jobs.ended("a")
    answer = await http.post(f"/v1/jobs/{job.job_id}/cancel")
    assert answer.json() == {"status": "completed", "cancelled_from": None, "delivered": True}
    assert await jobs.log.top(job.job_id) == job.top


async def test_cancelling_a_job_without_a_record_leaves_a_tombstone(
    http: httpx.AsyncClient, jobs: Producer
) -> None:
    """Its status stays unknown, and its claim will find the cancel (§5.4)."""
    job = jobs.job()
    answer = await http.post(f"/v1/jobs/{job.job_id}/cancel")
    assert answer.json() == {"status": "unknown", "cancelled_from": None, "delivered": False}
    claim = await jobs.log.claim(job.job_id, owner="w", lease_s=5, request=b"{}")
    assert claim.cancel is not None


async def test_a_bare_cancel_key_ends_a_queued_job_that_is_watched(
    relay: RelayProcess, jobs: Producer, redis_server: RedisServer
) -> None:
    """`SET dw:{id}:cancel 1` from any client is found by whoever watches, within a second (§3, §4.5)."""
    job = await jobs.queued()
    async with (
        websocket(f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws") as reader,
        redis.asyncio.Redis.from_url(redis_server.url) as client,
    ):
        await reader.until(1)
        await client.set(Keys().job(job.job_id).cancel, "1", ex=60)
        messages, code = await reader.until_closed()
    assert (messages[-1]["type"], messages[-1]["cancel"]["reason"]) == ("cancelled", "cancel_key")
    assert code == 1000


# Tenants (§4.8).


async def test_another_tenants_job_does_not_exist(keyed: RelayProcess, jobs: Producer) -> None:
    """To every question about it the answer is, word for word, that about a job which does not exist."""
    job = await jobs.running("a", tenant="umbrella")
    missing = jobs.job().job_id
    async with http_client(base_url=keyed.url, headers=KEYS.headers("acme")) as client:
        answers = [await client.get(f"/v1/jobs/{job_id}") for job_id in (job.job_id, missing)]
        assert [answer.status_code for answer in answers] == [404, 404]
        texts = {answer.text.replace(job.job_id, missing) for answer in answers}
        assert len(texts) == 1
    async with http_client(base_url=keyed.url, headers=KEYS.headers("umbrella")) as client:
        assert (await client.get(f"/v1/jobs/{job.job_id}")).json()["status"] == "in_progress"


async def test_cancelling_does_not_tell_another_tenants_job_from_none(
    keyed: RelayProcess, jobs: Producer
) -> None:
    """A cancel answers the same about another tenant's job and about one that does not exist (§4.8)."""
    job = await jobs.running("a", tenant="umbrella")
    async with http_client(base_url=keyed.url, headers=KEYS.headers("acme")) as client:
        foreign = await client.post(f"/v1/jobs/{job.job_id}/cancel")
        missing = await client.post(f"/v1/jobs/{jobs.job().job_id}/cancel")
    assert foreign.status_code == missing.status_code


async def test_another_tenants_job_is_not_cancelled(keyed: RelayProcess, jobs: Producer) -> None:
    """Whatever the answer, the job goes on (§4.8)."""
    job = await jobs.running("a", tenant="umbrella")
    async with http_client(base_url=keyed.url, headers=KEYS.headers("acme")) as client:
        await client.post(f"/v1/jobs/{job.job_id}/cancel")
    assert await jobs.log.cancel_request(job.job_id) is None


async def test_a_tenant_cannot_cancel_another_tenants_job_before_it_exists(
    keyed: RelayProcess, jobs: Producer
) -> None:
    """A tombstone holds for the tenant that left it: ids made from Idempotency-Keys can be guessed (§4.8)."""
    job = jobs.job()
    async with http_client(base_url=keyed.url, headers=KEYS.headers("acme")) as client:
        await client.post(f"/v1/jobs/{job.job_id}/cancel")
    await job.submit(tenant="umbrella")
    claim = await jobs.log.claim(job.job_id, owner="w", lease_s=5)
    assert claim.code == "CLAIMED"
    assert claim.cancel is None


# Browsers.


async def test_an_allowed_origin_gets_cors_headers(http: httpx.AsyncClient) -> None:
    """A listed page may ask, with the headers that our interface knows, and read errors too (§5.1)."""
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,last-event-id",
    }
    preflight = await http.options("/v1/jobs", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == ORIGIN
    answer = await http.get("/v1/jobs/nobody", headers={"Origin": ORIGIN})
    assert answer.status_code == 404
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN


async def test_another_origin_gets_none(http: httpx.AsyncClient) -> None:
    """Neither a preflight nor a request of another page is answered (§5.1)."""
    for method in ("OPTIONS", "GET"):
        headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        answer = await http.request(method, "/v1/jobs/nobody", headers=headers)
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers


# Odd requests.


async def raw_request(relay: RelayProcess, data: bytes) -> bytes:
    """What the relay sends back to these bytes within a second of silence."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    try:
        writer.write(data)
        async with asyncio.timeout(WAIT_S):
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


async def test_a_body_that_says_it_is_too_large_is_refused_unread(relay: RelayProcess) -> None:
    """413 comes from the Content-Length alone (§5)."""
    head = await raw_request(
        relay,
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999\r\n\r\n{",
    )
    assert head.startswith(b"HTTP/1.1 413 ")


async def test_405_says_which_methods_there_are(http: httpx.AsyncClient) -> None:
    """A 405 has an Allow header (RFC 9110 §15.5.6)."""
    answer = await http.put("/v1/jobs")
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "POST"}


async def test_a_client_that_goes_in_mid_upload_is_no_failure_of_ours(
    redis_server: RedisServer,
) -> None:
    """It leaves no traceback in the log."""
    with RelayProcess(redis_server.url) as relay:
        _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        await writer.drain()
        async with http_client(base_url=relay.url) as client:
            await client.get("/healthz")  # by now the other request has been read, too
            writer.transport.abort()
            for _ in range(20):
                await client.get("/healthz")
        relay.terminate()
        assert relay.wait() == 0
        assert "Traceback" not in relay.log


# Start and stop.


def test_without_redis_the_relay_does_not_start() -> None:
    """It says so in one line, and names the variable."""
    relay = RelayProcess(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(RelayDidNotStartError, match="DELTAWIRE_REDIS_URL") as caught:
        relay.start()
    assert "Traceback" not in str(caught.value)


def test_without_a_key_the_relay_does_not_serve_the_world(redis_server: RedisServer) -> None:
    """DELTAWIRE_HOST=0.0.0.0 and no key: it ends with what to set, and no traceback (§5.1)."""
    relay = RelayProcess(redis_server.url, {"DELTAWIRE_HOST": "0.0.0.0"})
    with pytest.raises(RelayDidNotStartError, match="deltawire keys new") as caught:
        relay.start()
    assert "Traceback" not in str(caught.value)


def test_a_port_in_use_is_said(redis_server: RedisServer, relay: RelayProcess) -> None:
    """It ends at once, and says which address is taken."""
    second = RelayProcess(redis_server.url, {"DELTAWIRE_PORT": str(relay.port)})
    try:
        second.launch()
        assert second.wait() != 0
        assert "address already in use" in second.log
    finally:
        second.close()


async def test_redis_away_is_503_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is answered with redis_unavailable, retryable, while Redis is away; then all is well."""
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", 0.3)
    monkeypatch.setattr(hub_module, "OPEN_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server_module, "UNREADY_AFTER_S", 1.0)
    port = free_port()
    with RedisServer(port=port) as server:
        url = server.url
        async with (
            relay_in_process(url, monkeypatch) as address,
            http_client(base_url=f"http://{address}") as client,
        ):
            assert (await client.get("/readyz")).status_code == 200
            await asyncio.to_thread(server.stop)
            questions: list[dict[str, Any]] = [
                {"method": "GET", "url": "/v1/jobs/a"},
                {"method": "GET", "url": "/v1/jobs/a/events"},
                {"method": "POST", "url": "/v1/jobs/a/cancel"},
                {"method": "POST", "url": "/v1/jobs", "json": {"request": REQUEST}},
            ]
            for question in questions:
                answer = await client.request(**question)
                assert answer.status_code == 503, question
                error = answer.json()["error"]
                assert (error["code"], error["retryable"]) == ("redis_unavailable", True)
                assert int(answer.headers["Retry-After"]) >= 1
            async with asyncio.timeout(WAIT_S):
                while (await client.get("/readyz")).status_code != 503:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.02)
            assert (await client.get("/healthz")).status_code == 200
            monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", WAIT_S)
            monkeypatch.setattr(hub_module, "OPEN_TIMEOUT_S", WAIT_S)
            with RedisServer(port=port):
                async with producer(url) as jobs:
                    job = await jobs.ended("a")
                    async with asyncio.timeout(WAIT_S):
                        for path in ("/readyz", f"/v1/jobs/{job.job_id}"):
                            while (await client.get(path)).status_code != 200:  # noqa: ASYNC110 - another process
                                await asyncio.sleep(0.02)
                    messages = await read_job(f"ws://{address}", job.job_id)
                assert messages[-1]["type"] == "completed"
