"""The use case on a real Redis and with a real gateway, without Celery: one job, claim to terminal event."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from collections.abc import Generator as Generator_
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import msgspec
import pytest
import redis.asyncio

from deltawire.codec import DeltaEncoder, is_snapshot, sequence_number_of
from deltawire.ending import AsFailed
from deltawire.errors import JobExpiredError, RedisUnavailableError, WireError
from deltawire.gateway import Gateway
from deltawire.keys import LEASE_S, Keys
from deltawire.log import Claim, JobLog
from deltawire.log_fold import LogFold, fold_pages
from deltawire.options import Options
from deltawire.redis_client import RedisClient
from deltawire.redis_server import RedisServer
from deltawire.tenants import TenantLimits
from deltawire.turns import Turns
from deltawire_worker import generate as generate_module
from deltawire_worker.abandonment import Abandonment
from deltawire_worker.asking import Asker
from deltawire_worker.cancellation import ControlChannel
from deltawire_worker.flusher import Flusher
from deltawire_worker.generate import Generator
from deltawire_worker.lease import Leases, Presence
from deltawire_worker.metrics import JobMetrics
from deltawire_worker.pool import Cancellation
from deltawire_worker.quotas import Quotas
from deltawire_worker.run import Outcome, Run
from deltawire_worker.upstream import UpstreamClient
from deltawire_worker.upstreams import Upstream, Upstreams
from tests.support.sample_events import text_chunk

Event = dict[str, Any]

TERMINAL: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})
OWNER: Final = "this-worker"
DEADLINE_S: Final = 60.0


def request(text: str = "Hello", *, fields: dict[str, Any] | None = None, **script: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "gpt-5.4", "messages": [{"role": "user", "content": text}]}
    return {**body, **({"script": script} if script else {}), **(fields or {})}


async def until(is_true: Callable[[], object], *, within_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(within_s):
        while not is_true():  # noqa: ASYNC110 - what is waited for has no event for tests
            await asyncio.sleep(0.002)


class NoQueue:
    """A broker that takes messages and keeps none."""

    def send(self, job_id: str, **message: Any) -> None: ...


class Bench:
    """One worker's Generator with all that it needs, and what the test looks at."""

    def __init__(
        self,
        url: str,
        client: redis.asyncio.Redis,
        gateway: Gateway,
        upstream_url: str,
        upstreams: Sequence[Upstream] = (),
    ) -> None:
        keys = Keys()
        self.gateway = gateway
        self.redis = client
        self.runs: dict[str, Run] = {}
        self.executor = RedisClient(url, name="deltawire-tests")
        self.log = JobLog(self.executor, keys)
        self.flusher = Flusher(url, keys)
        self.control = ControlChannel(url, keys, OWNER, self.runs)
        self.client = UpstreamClient()
        configured = Upstreams(upstreams or [Upstream(name="default", base_url=upstream_url)])
        self.leases = Leases(self.flusher, OWNER, self.runs)
        self.presence = Presence(self.log.index, OWNER, self.runs)
        self.abandonment = Abandonment(self.log, self.runs)
        metrics = JobMetrics(configured, self.runs, capacity=10, knows_model=lambda _: True)
        self.generator = Generator(
            log=self.log,
            flusher=self.flusher,
            upstreams=configured,
            asker=Asker(configured, self.client, metrics),
            owner=OWNER,
            runs=self.runs,
            leases=self.leases,
            presence=self.presence,
            abandonment=self.abandonment,
            quotas=Quotas(self.log.places, Turns(self.log, NoQueue()), self.runs),
            metrics=metrics,
        )

    async def run(self, job_id: str, body: Any = None, options: Any = None, **kwargs: Any) -> Outcome:
        """Generates a job as a bare `send_task` asks for it; `body` None: as our doors do."""
        if body is not None:
            kwargs["request"] = body
        if options is not None:
            kwargs["options"] = options
        async with asyncio.timeout(DEADLINE_S):
            return await self.generator.generate(job_id, (), kwargs)

    def start(self, job_id: str, body: Any = None, options: Any = None) -> asyncio.Task[Outcome]:
        return asyncio.create_task(self.run(job_id, body, options), name=f"job-{job_id}")

    async def submit(
        self, job_id: str, body: Any, *, created_at: float | None = None, **options: Any
    ) -> None:
        await self.log.submit(
            job_id,
            request=msgspec.json.encode(body),
            options=Options(**options),
            digest="digest",
            created_at=time.time() if created_at is None else created_at,
        )

    async def lines(self, job_id: str) -> list[bytes]:
        return [event async for page in self.log.pages(job_id) for event in page]

    async def events(self, job_id: str) -> list[Event]:
        return [json.loads(event) for event in await self.lines(job_id)]

    async def ended(self, job_id: str) -> list[Event]:
        """The log of a job that has ended, checked: no hole, one terminal event, the record says the same."""
        events = await self.events(job_id)
        assert [event["sequence_number"] for event in events] == list(range(1, len(events) + 1))
        assert [event["type"] in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
        assert {event["job_id"] for event in events} == {job_id}
        record = await self.log.record(job_id)
        assert record is not None
        assert record.status == events[-1]["type"]
        assert record.request is None
        return events

    async def cancelled(self, job_id: str, task: asyncio.Task[Outcome]) -> list[Event]:
        """Ends a stream that would go on and on; its log, checked."""
        await self.log.cancel(job_id, reason="enough")
        assert await task == Outcome("cancelled")
        return await self.ended(job_id)

    async def deltas(self, job_id: str, count: int) -> None:
        """Waits until so many deltas are in the log."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if sum(event["type"] == "delta" for event in await self.events(job_id)) >= count:
                    return
                await asyncio.sleep(0.002)

    def requests(self, job_id: str) -> int:
        return sum(record.client_request_id == job_id for record in self.gateway.records)

    async def upstream_is_closed(self) -> None:
        """Every request has been answered to its end, or closed by us."""
        await until(
            lambda: all(
                record.finished_at is not None or record.closed_by is not None
                for record in self.gateway.records
            )
        )

    async def check_nothing_leaked(self) -> None:
        assert self.runs == {}
        assert self.flusher._writers == set()
        await self.upstream_is_closed()


@asynccontextmanager
async def open_bench(
    url: str, *, upstream_url: str = "", upstreams: Sequence[Upstream] = ()
) -> AsyncIterator[Bench]:
    before = asyncio.all_tasks()
    async with Gateway(rate=0) as gateway, redis.asyncio.Redis.from_url(url) as client:
        bench = Bench(url, client, gateway, upstream_url or gateway.base_url, upstreams)
        await bench.flusher.start()
        await bench.control.start()
        await bench.executor.execute("PING")
        keeping = [asyncio.create_task(kept.keep()) for kept in (bench.leases, bench.abandonment)]
        try:
            yield bench
            assert not any(task.done() for task in keeping), "nobody looks after the runs any more"
            await bench.check_nothing_leaked()
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.wait(keeping)
            await bench.client.aclose()
            await bench.control.close()
            await bench.flusher.close()
            await bench.executor.aclose()
    before.add(cast("asyncio.Task[Any]", asyncio.current_task()))  # pytest's own, another one in a teardown
    await until(lambda: asyncio.all_tasks() <= before)


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    async with open_bench(redis_url) as bench:
        yield bench


def types(events: list[Event]) -> list[str]:
    """The types, with runs of deltas as one."""
    return [
        e["type"]
        for i, e in enumerate(events)
        if i == 0 or (e["type"], events[i - 1]["type"]) != ("delta",) * 2
    ]


def text_of(events: list[Event]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if event["type"] == "delta"
        for choice in event["chunk"]["choices"]
    )


def content(event: Event) -> Any:
    return event["completion"]["choices"][0]["message"]["content"]


# -- a job that goes well


async def test_a_bare_job_runs_from_its_record_to_completed(bench: Bench) -> None:
    """All events, in order, numbered from 1; the fold, usage and timings at the end."""
    began = time.time()
    outcome = await bench.run("job", request(text="Hello, wörld 😀", first_delta_s=0.02), {"retention_s": 77})
    assert outcome == Outcome("completed")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "delta", "completed"]
    assert (events[1]["upstream"], events[1]["model"]) == ("default", "gpt-5.4")
    last = events[-1]
    assert content(last) == text_of(events)
    assert last["completion"]["object"] == "chat.completion"
    assert last["completion"]["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == len(events) - 6  # role, finish_reason and usage chunks
    assert last["usage_source"] == "provider"
    timings = last["timings"]
    assert 0 <= timings["queued_s"] <= timings["first_delta_s"] <= timings["total_s"] <= time.time() - began
    assert timings["first_delta_s"] >= 0.02
    assert all(began - 1 <= event["created_at"] <= time.time() + 1 for event in events)
    assert {event["attempt"] for event in events} == {1}
    assert 70 < await bench.redis.ttl("dw:{job}:log") <= 77


async def test_a_job_with_a_record_needs_no_arguments(bench: Bench) -> None:
    """Our own doors write the record and its first event, then send a message without a body."""
    await bench.submit("job", request(deltas=3))
    assert await bench.run("job") == Outcome("completed")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "delta", "completed"]
    assert [event["attempt"] for event in events[:2]] == [0, 1]


async def test_chunks_are_published_byte_for_byte(bench: Bench) -> None:
    """What a relay reads is what the upstream sent; and it is published as it is appended."""
    async with bench.redis.pubsub() as pubsub:
        await pubsub.subscribe("dw:{job}:events")
        await bench.run("job", request(deltas=20, unicode=True))
        lines = await bench.lines("job")
        published: list[bytes] = []
        async with asyncio.timeout(DEADLINE_S):
            while len(published) < len(lines):
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1)
                if message is not None:
                    published += message["data"].split(b"\n")
    assert published == lines
    chunk = lines[4].partition(b'"chunk":')[2].removesuffix(b"}")
    assert chunk.startswith(b'{"id":"chatcmpl-')
    assert b'"system_fingerprint":"' in chunk


async def test_the_request_goes_upstream_as_it_came(bench: Bench) -> None:
    """With `n`, tools and whatever else the gateway understands; the fold has all choices."""
    fields = {"n": 3, "max_tokens": 4, "metadata": {"kept": "upstream"}}
    await bench.run("job", request(fields=fields))
    last = (await bench.ended("job"))[-1]
    assert last["type"] == "incomplete"
    assert last["incomplete_details"] == {"reason": "length"}
    assert len(last["completion"]["choices"]) == 3


async def test_many_jobs_at_once_do_not_mix(bench: Bench) -> None:
    """Each log holds its own stream."""
    names = [f"job-{n}" for n in range(50)]
    tasks = [bench.start(name, request(text=f"about {name}", deltas=20, rate=400)) for name in names]
    assert {outcome.status for outcome in await asyncio.gather(*tasks)} == {"completed"}
    for name in names:
        events = await bench.ended(name)
        assert content(events[-1]) == text_of(events)
        assert bench.requests(name) == 1


@pytest.mark.parametrize("split", ["byte", "utf8", "crlf", "multiline", "coalesce"])
async def test_however_the_bytes_are_laid_out_the_answer_is_the_same(bench: Bench, split: str) -> None:
    """A chunk over several lines is encoded anew, all others are kept as they are."""
    text = "Grüße, 世界 😀 und mehr"
    await bench.run("job", request(text=text, split=split) | {"script": {"text": text, "split": split}})
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "delta", "completed"]
    assert text_of(events) == content(events[-1]) == text


# -- wrong arguments

WRONG: Final[list[tuple[Any, dict[str, Any], str]]] = [
    ((), {"request": None}, "invalid_request"),
    ((), {"request": []}, "invalid_request"),
    ((), {"request": "x"}, "invalid_request"),
    ((), {"request": {}}, "invalid_request"),
    ((), {"request": {"model": "m"}}, "invalid_request"),
    ((), {"request": {"model": 1, "messages": [{}]}}, "invalid_request"),
    ((), {"request": {"model": "m", "messages": []}}, "invalid_request"),
    ((), {"options": {}}, "invalid_request"),
    ((), {"request": request(), "options": []}, "invalid_request"),
    ((), {"request": request(), "options": {"nonsense": 1}}, "unknown_option"),
    ((), {"request": request(), "options": {"timeout_s": 0}}, "invalid_request"),
    ((), {"request": request(), "options": {"timeout_s": float("nan")}}, "invalid_request"),
    ((), {"request": request(), "options": {"max_attempts": 99}}, "invalid_request"),
    ((), {"request": request(), "options": {"metadata": {"a": 1}}}, "invalid_request"),
    ((), {"request": request(), "options": {"upstream": "nowhere"}}, "unknown_upstream"),
    ((), {"request": request(), "more": 1}, "invalid_request"),
    ((1,), {"request": request()}, "invalid_request"),
    ((request(),), {}, "invalid_request"),
]


@pytest.mark.parametrize(("args", "kwargs", "code"), WRONG)
async def test_wrong_arguments_end_the_job_as_failed(
    bench: Bench, args: Any, kwargs: dict[str, Any], code: str
) -> None:
    """Not in a lost message: whoever watches the job hears what to change."""
    assert await bench.generator.generate("job", args, kwargs) == Outcome("failed", code)
    events = await bench.ended("job")
    assert types(events) == ["queued", "failed"]
    assert events[-1]["error"]["code"] == code
    assert (events[-1]["source"], events[-1]["status_code"]) == ("request", None)
    assert bench.gateway.records == []


# JSON knows lone surrogates, UTF-8 does not.
UNUSABLE: Final[dict[str, dict[str, Any]]] = {
    "stream_options": {"request": request(fields={"stream_options": "x"})},
    "stream_options list": {"request": request(fields={"stream_options": [1]})},
    "surrogate": {"request": request("\ud800")},
    "surrogate metadata": {"request": request(), "options": {"metadata": {"a": "\ud800"}}},
    "surrogate option": {"request": request(), "options": {"\ud800": 1}},
    "surrogate argument": {"request": request(), "\ud800": 1},
}


@pytest.mark.parametrize("kwargs", UNUSABLE.values(), ids=UNUSABLE.keys())
async def test_arguments_that_cannot_be_used_end_the_job_as_failed(
    redis_url: str, kwargs: dict[str, Any]
) -> None:
    """JSON that Celery takes, and that cannot be encoded again or is of the wrong type."""
    async with open_bench(redis_url) as bench:
        assert (await bench.run("job", **kwargs)).status == "failed"
        assert (await bench.ended("job"))[-1]["type"] == "failed"


async def test_a_chunk_that_is_nested_too_deeply_ends_the_job(redis_url: str) -> None:
    """Whatever goes wrong in here: exactly one terminal event, always."""
    deep = b'{"choices":[{"index":0,"delta":' + b'{"a":' * 700 + b"1" + b"}" * 700 + b"}]}"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            b"data: " + deep + b"\n\ndata: [DONE]\n\n"
        )
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, open_bench(redis_url, upstream_url=f"http://127.0.0.1:{port}") as bench:
        await bench.run("job", request())
        await bench.ended("job")


async def test_a_message_without_body_for_a_job_without_record_has_expired(bench: Bench) -> None:
    """There is nothing to run, and nothing to tell anybody by."""
    with pytest.raises(JobExpiredError):
        await bench.run("job")
    assert await bench.redis.keys("dw:{*") == []


@pytest.mark.parametrize("fault", [None, "status"])
async def test_a_message_that_comes_again_when_all_has_expired_starts_nothing(
    bench: Bench, fault: str | None
) -> None:
    """The job is over, though nobody knows any more how it went: one request, and no second log."""
    script: dict[str, Any] = {"fault": fault, "status": 400} if fault else {}
    body = request(deltas=2, **script)
    outcome = await bench.run("job", body, {"retention_s": 1})
    await bench.redis.delete("dw:{job}:meta", "dw:{job}:log")  # as when they expire
    if fault is None:
        assert await bench.run("job", body, {"retention_s": 1}) == outcome
    else:
        with pytest.raises(JobExpiredError):
            await bench.run("job", body, {"retention_s": 1})
    assert bench.requests("job") == 1
    assert await bench.redis.keys("dw:{*") == [b"dw:{job}:cancel"]


async def test_a_worker_that_wakes_when_its_job_has_ended_and_expired_lets_it_rest(bench: Bench) -> None:
    """A sweeper has ended it meanwhile. (Where nobody has, it is written anew, as below.)"""
    running = bench.start("job", request(deltas=100, rate=20), {"retention_s": 1, "max_attempts": 1})
    await bench.deltas("job", 2)
    bench.leases.release(bench.runs["job"])
    claim = await bench.log.claim("job", owner="sweeper", lease_s=LEASE_S, take_over=1)
    assert claim.record is not None
    ending = AsFailed(WireError("worker_lost", "lost"), "worker")
    assert await bench.log.end("job", ending, record=claim.record, owner="sweeper", top=claim.top) == "OK"
    await bench.redis.delete("dw:{job}:meta", "dw:{job}:log")  # as when they expire
    assert await running == Outcome("in_progress")
    await bench.check_nothing_leaked()
    assert await bench.redis.keys("dw:{*") == [b"dw:{job}:cancel"]


# -- what the upstream does

FAULTS: Final[list[tuple[dict[str, Any], str, Any, int | None]]] = [
    # script, type of the event, its reason or code, status_code
    ({"fault": "status", "status": 400}, "failed", "upstream_invalid_request", 400),
    ({"fault": "status", "status": 401}, "failed", "upstream_authentication", 401),
    ({"fault": "status", "status": 403}, "failed", "upstream_authentication", 403),
    ({"fault": "status", "status": 404}, "failed", "upstream_not_found", 404),
    ({"fault": "status", "status": 429, "retry_after": 7}, "failed", "upstream_rate_limit", 429),
    ({"fault": "status", "status": 500}, "failed", "upstream_server_error", 500),
    ({"fault": "status", "status": 503, "retry_after": 7}, "failed", "upstream_server_error", 503),
    ({"fault": "html"}, "failed", "upstream_server_error", 502),
    ({"fault": "json"}, "completed", None, None),
    ({"fault": "cut"}, "failed", "upstream_eof", None),
    ({"fault": "cut", "after": 3}, "incomplete", "upstream_eof", None),
    ({"fault": "reset"}, "failed", "upstream_eof", None),
    ({"fault": "reset", "after": 3}, "incomplete", "upstream_eof", None),
    ({"fault": "error"}, "failed", "upstream_error_event", None),
    ({"fault": "error", "after": 3}, "failed", "upstream_error_event", None),
    ({"fault": "no_done"}, "completed", None, None),
    ({"fault": "no_finish_reason"}, "incomplete", "upstream_eof", None),
    ({"fault": "stall"}, "failed", "first_delta_timeout", None),
    ({"fault": "stall", "after": 3}, "incomplete", "idle_timeout", None),
    ({"fault": "comments"}, "failed", "first_delta_timeout", None),
    ({"fault": "comments", "after": 3, "rate": 100}, "incomplete", "idle_timeout", None),
]


@pytest.mark.parametrize(
    ("script", "kind", "reason", "status_code"), FAULTS, ids=[json.dumps(fault[0]) for fault in FAULTS]
)
async def test_every_fault_has_its_ending(
    bench: Bench, script: dict[str, Any], kind: str, reason: Any, status_code: int | None
) -> None:
    """PROTOCOL §2.3: failed before the first delta, incomplete after it."""
    options: dict[str, Any] = {"max_retries": 0}
    if reason in ("first_delta_timeout", "idle_timeout"):  # nobody else is held up by a busy machine
        options[f"{reason}_s"] = 0.2
    outcome = await bench.run("job", request(deltas=6, **script), options)
    events = await bench.ended("job")
    last = events[-1]
    assert (outcome.status, last["type"]) == (kind, kind)
    if kind == "failed":
        assert (last["error"]["code"], last["source"], last["status_code"]) == (
            reason,
            "upstream",
            status_code,
        )
        assert last["error"]["retry_after_s"] == script.get("retry_after")
        assert outcome.code == reason
    elif kind == "incomplete":
        assert last["incomplete_details"] == {"reason": reason}
    sent = script.get("after", 0) if script["fault"] not in ("json", "no_done", "no_finish_reason") else 6
    assert (content(last) if last["completion"] else "") == text_of(events)
    assert bool(sent) == bool(text_of(events))
    assert "api key" not in json.dumps(last).lower()
    await bench.upstream_is_closed()
    [record] = bench.gateway.records
    if script["fault"] in ("stall", "comments"):
        assert record.closed_by == "client"


async def test_a_gateway_that_is_not_there_is_a_failure(redis_url: str) -> None:
    """Told apart from one that answers."""
    async with open_bench(redis_url, upstream_url="http://127.0.0.1:1/v1") as bench:
        assert await bench.run("job", request()) == Outcome("failed", "upstream_unreachable")
        last = (await bench.ended("job"))[-1]
        assert (last["source"], last["completion"], last["usage_source"]) == ("upstream", None, "unavailable")


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/v1", "http://[::1/v1"])
async def test_an_address_that_is_none_is_a_failure(redis_url: str, url: str) -> None:
    """Settings check the scheme only."""
    async with open_bench(redis_url, upstream_url=url) as bench:
        assert (await bench.run("job", request())).status == "failed"
        await bench.ended("job")


async def test_the_total_deadline_cuts_a_lively_stream(bench: Bench) -> None:
    """The text so far stays."""
    outcome = await bench.run("job", request(deltas=10_000, rate=100), {"timeout_s": 0.3})
    assert outcome.status == "incomplete"
    last = (await bench.ended("job"))[-1]
    assert last["incomplete_details"] == {"reason": "total_timeout"}
    assert content(last)
    await bench.upstream_is_closed()
    assert bench.gateway.records[0].closed_by == "client"


async def test_the_total_deadline_before_the_first_delta_is_a_failure(bench: Bench) -> None:
    """Where it is shorter than the one for the first delta."""
    outcome = await bench.run("job", request(first_delta_s=30), {"timeout_s": 0.2})
    assert outcome == Outcome("failed", "total_timeout")
    await bench.ended("job")


async def test_a_job_that_waited_too_long_in_the_queue_is_not_run(bench: Bench) -> None:
    """Nobody waits for it any more."""
    await bench.submit("job", request(), created_at=time.time() - 10, queue_timeout_s=5)
    assert await bench.run("job") == Outcome("failed", "queue_timeout")
    last = (await bench.ended("job"))[-1]
    assert (last["source"], last["timings"]["first_delta_s"]) == ("queue", None)
    assert 10 <= last["timings"]["queued_s"] < 10 + DEADLINE_S
    assert bench.gateway.records == []


async def test_a_burst_larger_than_the_buffer_is_no_outage(redis_url: str) -> None:
    """Redis is well; the upstream is just faster than a round trip. Such a job must not fail."""
    async with open_bench(redis_url) as bench:
        outcome = await bench.run("job", request(deltas=60, delta_bytes=100_000, rate=0))
        assert outcome == Outcome("completed")


async def test_a_stream_of_5000_deltas_as_fast_as_it_goes(bench: Bench) -> None:
    """In order, without a hole, in a few seconds of work at the most."""
    began = time.process_time()
    assert (await bench.run("job", request(deltas=5_000, rate=0))).status == "completed"
    assert time.process_time() - began < 10
    events = await bench.ended("job")
    assert sum(event["type"] == "delta" for event in events) >= 5_000
    assert content(events[-1]) == text_of(events)


# -- cancelling


async def test_a_cancel_before_the_claim_is_found_by_it(bench: Bench) -> None:
    """The tombstone of a bare job: no upstream is opened."""
    cancellation = await bench.log.cancel("job", reason="bored")
    assert cancellation.cancelled_from == "unknown"
    assert await bench.run("job", request()) == Outcome("cancelled")
    events = await bench.ended("job")
    assert types(events) == ["queued", "cancelled"]
    assert events[-1]["cancel"]["reason"] == "bored"
    assert events[-1]["cancel"]["upstream_closed_at"] is None
    assert bench.gateway.records == []


async def test_a_queued_job_that_was_cancelled_is_not_run(bench: Bench) -> None:
    """The cancel call itself has ended it."""
    await bench.submit("job", request())
    assert (await bench.log.cancel("job", reason="bored")).status == "cancelled"
    assert await bench.run("job") == Outcome("cancelled")
    assert types(await bench.ended("job")) == ["queued", "cancelled"]


def only_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals find a cancel key, too; without them a cancel is heard by its push or not at all."""
    monkeypatch.setattr("deltawire_worker.lease.Leases.renew", lambda *_: None)


async def test_a_cancel_before_the_first_delta_closes_the_upstream(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pushed, while nothing is appended."""
    only_pushes(monkeypatch)
    task = bench.start("job", request(fault="stall"))
    await until(lambda: bench.requests("job"))
    await bench.log.cancel("job", reason="bored")
    assert await task == Outcome("cancelled")
    last = (await bench.ended("job"))[-1]
    assert (last["cancel"]["reason"], last["completion"]) == ("bored", None)
    await bench.upstream_is_closed()
    assert bench.gateway.records[0].closed_by == "client"
    assert last["cancel"]["upstream_closed_at"] == pytest.approx(bench.gateway.records[0].closed_at, abs=5)


async def test_a_cancel_in_mid_stream_keeps_the_text_so_far(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pushed, and nothing follows it."""
    only_pushes(monkeypatch)
    task = bench.start("job", request(deltas=10_000, rate=200))
    await bench.deltas("job", 5)
    cancellation = await bench.log.cancel("job", reason="bored")
    assert cancellation.cancelled_from == "in_progress"
    assert await task == Outcome("cancelled")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "delta", "cancelled"]
    assert content(events[-1]) == text_of(events)
    await bench.upstream_is_closed()
    assert bench.gateway.records[0].closed_by == "client"
    await bench.log.cancel("job", reason="again")
    assert await bench.events("job") == events


@pytest.mark.parametrize("script", [{"deltas": 10_000, "rate": 100}, {"fault": "stall", "after": 3}])
async def test_a_bare_key_is_found_within_a_second(bench: Bench, script: dict[str, Any]) -> None:
    """By the next append, or the next renewal where nothing is appended."""
    task = bench.start("job", request(**script))
    await bench.deltas("job", 3)
    set_at = time.time()
    await bench.redis.set("dw:{job}:cancel", 1, ex=86_400)
    assert await task == Outcome("cancelled")
    last = (await bench.ended("job"))[-1]
    assert last["cancel"]["reason"] == "cancel_key"
    assert set_at - 0.1 <= last["cancel"]["requested_at"] <= time.time() + 0.1


async def test_a_cancel_key_without_a_value_cancels_too(redis_url: str) -> None:
    """Its existence does, whatever it holds."""
    async with open_bench(redis_url) as bench:
        task = bench.start("job", request(deltas=250, rate=100))
        await bench.deltas("job", 3)
        await bench.redis.set("dw:{job}:cancel", "", ex=86_400)
        assert await task == Outcome("cancelled")


async def test_a_cancel_key_that_comes_before_the_terminal_event_wins(bench: Bench) -> None:
    """Also where the worker has not heard of it: the append is refused, and `cancelled` takes its place."""
    writes: list[str] = []

    async def cancel_first(run: Run, ending: Any) -> Outcome:
        await bench.redis.set("dw:{job}:cancel", json.dumps({"reason": "late", "requested_at": 5.0}))
        writes.append(type(ending).__name__)
        return await Generator._end(bench.generator, run, ending)

    bench.generator._end = cancel_first  # type: ignore[method-assign]
    assert await bench.run("job", request(deltas=3)) == Outcome("cancelled")
    events = await bench.ended("job")
    assert writes == ["AsCompleted"]
    assert types(events) == ["queued", "in_progress", "delta", "cancelled"]
    assert events[-1]["cancel"]["reason"] == "late"
    assert content(events[-1]) == text_of(events)


async def test_a_cancel_that_comes_after_the_terminal_event_changes_nothing(bench: Bench) -> None:
    """It is told that the job has completed."""
    await bench.run("job", request(deltas=3))
    cancellation = await bench.log.cancel("job", reason="late")
    assert (cancellation.status, cancellation.cancelled_from) == ("completed", None)
    assert (await bench.ended("job"))[-1]["type"] == "completed"
    assert await bench.redis.exists("dw:{job}:cancel") == 0


async def test_cancels_at_any_moment_of_a_short_job_tell_the_truth(bench: Bench) -> None:
    """Either order at the terminal event: `cancelled` if the key was first, else as it ended."""
    seen = set()
    for n in range(40):
        job_id = f"job-{n}"
        task = bench.start(job_id, request(deltas=5, rate=1_000))
        await asyncio.sleep(n * 0.0005)
        cancellation = await bench.log.cancel(job_id, reason="race")
        outcome = await task
        seen.add(outcome.status)
        events = await bench.ended(job_id)
        assert events[-1]["type"] == outcome.status
        assert (outcome.status == "cancelled") == (cancellation.cancelled_from is not None)
    assert "cancelled" in seen


async def test_a_cancel_between_two_attempts_keeps_the_text_so_far(redis_url: str) -> None:
    """Each terminal event has the fold since the last `discard_through`, whoever writes it."""
    async with open_bench(redis_url) as bench:
        await foreign_attempt(bench, deltas=2)
        await bench.log.cancel("job", reason="bored")
        assert await bench.run("job") == Outcome("cancelled")
        events = await bench.ended("job")
        assert events[-1]["completion"] is not None
        assert content(events[-1]) == text_of(events)


# -- the task is cancelled from outside


class Interrupted:
    """Awaits a coroutine and cancels the task at its nth wait: at once, or some turns of the loop later."""

    def __init__(self, coroutine: Coroutine[Any, Any, Outcome], *, at: int = 0, turns: int = 0) -> None:
        self._coroutine = coroutine
        self._at = at
        self._turns = turns
        self.waits = 0

    def _cancel(self, task: asyncio.Task[Any], turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._cancel, task, turns - 1)
        else:
            task.cancel()

    def __await__(self) -> Generator_[Any, None, Outcome]:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        steps = self._coroutine.__await__()
        error: BaseException | None = None
        while True:
            try:
                future = steps.send(None) if error is None else steps.throw(error)
            except StopIteration as stop:
                return cast("Outcome", stop.value)
            self.waits += 1
            if self.waits == self._at:
                self._cancel(task, self._turns)
            error = None
            try:
                yield future
            except BaseException as raised:  # noqa: BLE001 - whatever the task is told goes on to the coroutine
                error = raised


async def interrupt(bench: Bench, job_id: str, body: Any, *, at: int, turns: int) -> bool:
    """Runs a job that is cancelled at its nth wait; whether it got there."""
    interrupted = Interrupted(bench.generator.generate(job_id, (), {"request": body}), at=at, turns=turns)

    async def run() -> Outcome:
        async with asyncio.timeout(DEADLINE_S):
            return await interrupted

    await asyncio.wait([asyncio.create_task(run())])
    return interrupted.waits >= at


@pytest.mark.parametrize("turns", range(4))
async def test_a_task_that_is_cancelled_at_any_await_leaks_nothing(redis_url: str, turns: int) -> None:
    """No task, no open upstream connection, no run, no writer; and the next delivery ends the job."""
    async with open_bench(redis_url) as bench, open_bench(redis_url) as other:
        other.generator._owner = "other"
        body = request(deltas=5, rate=500)
        at = 1
        while await interrupt(bench, f"job-{at}", body, at=at, turns=turns):
            assert bench.runs == {}
            assert bench.flusher._writers == set()
            at += 1
        assert at > 5
        await bench.check_nothing_leaked()
        # Whatever was left open goes on elsewhere.
        statuses = []
        for n in range(1, at):
            job_id = f"job-{n}"
            record = await bench.log.record(job_id)
            statuses.append(record.status if record else None)
            if record is not None and not record.is_terminal:
                await bench.redis.hset(f"dw:{{{job_id}}}:meta", "lease_until", 0)
                await other.run(job_id, body)
            if record is not None:
                await bench.ended(job_id)
        assert "in_progress" in statuses


async def test_a_job_that_is_given_up_lets_its_lease_run_out_at_once(bench: Bench) -> None:
    """Another worker need not wait for it."""
    task = bench.start("job", request(fault="stall"))
    await until(lambda: bench.requests("job"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    claim = await bench.log.claim("job", owner="other", lease_s=LEASE_S)
    assert claim.code == "EXPIRED"
    await bench.upstream_is_closed()
    assert bench.gateway.records[0].closed_by == "client"


@pytest.mark.parametrize(
    ("why", "script", "kind"),
    [
        (Cancellation.REVOKED, {"fault": "stall"}, "cancelled"),
        (Cancellation.REVOKED, {"fault": "stall", "after": 3}, "cancelled"),
        (Cancellation.TIME_LIMIT, {"fault": "stall"}, "failed"),
        (Cancellation.TIME_LIMIT, {"fault": "stall", "after": 3}, "incomplete"),
    ],
)
async def test_revocation_and_time_limits_end_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, why: Cancellation, script: dict[str, Any], kind: str
) -> None:
    """Celery's own ways of stopping a task end in a terminal event too."""
    monkeypatch.setattr(generate_module, "cancellation", lambda: why)
    task = bench.start("job", request(**script))
    await until(lambda: bench.requests("job"))
    if "after" in script:
        await bench.deltas("job", 4)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    events = await bench.ended("job")
    last = events[-1]
    assert last["type"] == kind
    if kind == "cancelled":
        assert last["cancel"]["reason"] == "task_revoked"
        assert last["cancel"]["upstream_closed_at"] is not None
    await bench.upstream_is_closed()


async def test_a_revocation_at_any_await_ends_a_job_that_has_a_record(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revoked message is acknowledged: nobody else will ever end the job."""
    monkeypatch.setattr(generate_module, "cancellation", lambda: Cancellation.REVOKED)
    async with open_bench(redis_url) as bench:
        for turns in range(3):
            at = 1
            while await interrupt(
                bench, f"job-{turns}-{at}", request(deltas=5, rate=500), at=at, turns=turns
            ):
                at += 1
            for n in range(1, at):
                async with asyncio.timeout(DEADLINE_S):  # a terminal event that is still on its way is one
                    while (record := await bench.log.record(f"job-{turns}-{n}")) and not record.is_terminal:  # noqa: ASYNC110 - a record has no event for tests
                        await asyncio.sleep(0.01)


# -- several deliveries, several workers


async def foreign_attempt(
    bench: Bench, *, deltas: int, lease_s: float = 0, job_id: str = "job", **options: Any
) -> None:
    """A record whose first attempt is another worker's, with so many deltas, and this much lease left."""
    await bench.submit(job_id, request(text="again", deltas=3), **options)
    claim = await bench.log.claim(job_id, owner="other", lease_s=lease_s)
    assert (claim.code, claim.attempt, claim.top) == ("CLAIMED", 1, 1)
    encoder = DeltaEncoder(job_id, 1)
    for n in range(deltas):
        event = encoder.encode(n + 2, time.time(), json.dumps(text_chunk(f"old{n} ")).encode())
        code, _ = await bench.log.append(
            job_id,
            attempt=1,
            owner="other",
            first=n + 2,
            events=[event],
            fields=("first_delta_at", time.time()),
        )
        assert code == "OK"


async def test_a_second_delivery_to_the_same_owner_goes_along(bench: Bench) -> None:
    """One stream, two messages: kombu delivers again when its connection drops."""
    body = request(deltas=30, rate=200)
    first = bench.start("job", body)
    await bench.deltas("job", 3)
    second = bench.start("job", body)
    assert list(await asyncio.gather(first, second)) == [Outcome("completed")] * 2
    assert bench.requests("job") == 1
    assert {event["attempt"] for event in await bench.ended("job")} == {1}


async def test_a_second_delivery_can_be_cancelled_without_harm_to_the_run(bench: Bench) -> None:
    """It only goes along."""
    body = request(deltas=100_000, rate=200)
    first = bench.start("job", body)
    await bench.deltas("job", 3)
    second = bench.start("job", body)
    await asyncio.sleep(0.02)
    second.cancel()
    await asyncio.wait([second])
    assert second.cancelled()
    await bench.deltas("job", await bench.log.top("job") + 3)
    await bench.cancelled("job", first)
    assert bench.requests("job") == 1


async def test_two_deliveries_at_the_same_moment_make_one_log(bench: Bench) -> None:
    """Both claim before either has its answer."""
    for n in range(20):
        body = request(deltas=5, rate=1_000)
        await asyncio.gather(bench.start(f"job-{n}", body), bench.start(f"job-{n}", body))
        events = await bench.ended(f"job-{n}")
        assert events[-1]["type"] == "completed"
        assert content(events[-1]) == text_of(events)


@pytest.mark.parametrize("when", ["beside", "after"])
async def test_a_second_delivery_of_a_job_that_fails_fails_too(redis_url: str, when: str) -> None:
    """The task raises for `failed`, by whichever message."""
    async with open_bench(redis_url) as bench:
        body = request(fault="error", after=3, rate=50)
        first = bench.start("job", body)
        if when == "beside":
            await bench.deltas("job", 1)
        else:
            await first
        assert await bench.run("job", body) == Outcome("failed", "upstream_error_event")
        assert await first == Outcome("failed", "upstream_error_event")


async def test_a_delivery_after_the_end_changes_nothing(bench: Bench) -> None:
    """Its outcome is that of the job."""
    await bench.run("job", request(deltas=3))
    before = await bench.lines("job")
    assert await bench.run("job", request(deltas=3)) == Outcome("completed")
    assert await bench.lines("job") == before
    assert bench.requests("job") == 1


async def test_a_living_foreign_owner_keeps_its_job(bench: Bench) -> None:
    """After two looks, a lease apart, the second delivery is dropped."""
    await foreign_attempt(bench, deltas=1, lease_s=600)
    claim, looks = bench.log.claim, list[Claim]()

    async def soon_over(*args: Any, **kwargs: Any) -> Claim:
        """The lease is renewed meanwhile, as a living owner does."""
        looks.append(await claim(*args, **kwargs))
        return msgspec.structs.replace(looks[-1], held_for_s=0.1)

    bench.log.claim = soon_over  # type: ignore[method-assign]
    before = await bench.lines("job")
    assert await bench.run("job") == Outcome("in_progress")
    assert len(looks) >= 2
    assert {look.code for look in looks} == {"HELD"}
    assert await bench.lines("job") == before
    assert bench.gateway.records == []


async def test_a_delivery_that_waits_for_a_foreign_lease_can_be_cancelled(redis_url: str) -> None:
    """At once: a worker that shuts down has five seconds for all of its tasks."""
    async with open_bench(redis_url) as bench:
        await foreign_attempt(bench, deltas=1, lease_s=600)
        task = bench.start("job")
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task], timeout=DEADLINE_S / 2)
        assert task.cancelled()


async def test_a_dead_owners_job_goes_on_when_its_lease_has_run_out(bench: Bench) -> None:
    """Before the first delta nobody sees more of it than the number of the attempt."""
    await foreign_attempt(bench, deltas=0, lease_s=0.3)
    assert await bench.run("job") == Outcome("completed")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "delta", "completed"]
    assert events[1]["attempt"] == 2
    assert content(events[-1]) == text_of(events)


async def test_a_dead_owners_deltas_end_the_job_by_default(bench: Bench) -> None:
    """A visible restart is for those who asked for it; the text so far is in the failure."""
    await foreign_attempt(bench, deltas=3)
    assert await bench.run("job") == Outcome("failed", "worker_lost")
    events = await bench.ended("job")
    assert types(events) == ["queued", "delta", "failed"]
    assert (events[-1]["source"], events[-1]["error"]["retryable"]) == ("worker", True)
    assert content(events[-1]) == text_of(events) == "old0 old1 old2 "
    assert events[-1]["timings"]["first_delta_s"] is not None
    assert bench.gateway.records == []


async def test_a_restart_says_what_to_discard(bench: Bench) -> None:
    """Under `restart: always`; the fold begins anew."""
    await foreign_attempt(bench, deltas=3, restart="always")
    assert await bench.run("job") == Outcome("completed")
    events = await bench.ended("job")
    assert types(events) == ["queued", "delta", "restarted", "in_progress", "delta", "completed"]
    restarted = events[4]
    assert (restarted["reason"], restarted["discard_through"], restarted["attempt"]) == ("worker_lost", 4, 2)
    assert "old" not in content(events[-1])
    assert content(events[-1]) == text_of(events[5:])


@pytest.mark.parametrize("options", [{"max_attempts": 1}, {"restart": "never"}])
async def test_no_more_attempts_than_allowed(bench: Bench, options: dict[str, Any]) -> None:
    """Whether or not anybody has seen a delta."""
    await foreign_attempt(bench, deltas=0, **options)
    assert await bench.run("job") == Outcome("failed", "worker_lost")
    assert types(await bench.ended("job")) == ["queued", "failed"]


async def test_an_own_attempt_that_was_left_open_is_recovered_like_any_other(redis_url: str) -> None:
    """A job whose end could not be written (Redis away for a minute) comes back to this very worker.

    Without `recover` its readers get the whole answer a second time, behind the first, unannounced; and
    it is tried without end.
    """
    async with open_bench(redis_url) as bench:
        await foreign_attempt(bench, deltas=3)
        await bench.redis.hset("dw:{job}:meta", "owner", OWNER)
        assert await bench.run("job") == Outcome("failed", "worker_lost")
        assert types(await bench.ended("job")) == ["queued", "delta", "failed"]


async def test_a_claim_whose_answer_was_lost_is_made_again(bench: Bench) -> None:
    """The worker owns an attempt that it knows nothing of, and nothing of which is in the log."""
    await bench.submit("job", request(deltas=3))
    await bench.log.claim("job", owner=OWNER, lease_s=LEASE_S)
    assert await bench.run("job") == Outcome("completed")
    await bench.ended("job")


async def test_an_attempt_that_was_taken_over_closes_its_upstream_and_writes_nothing_more(
    bench: Bench,
) -> None:
    """STALE, by append or renewal: another worker has the job."""
    for script in ({"deltas": 10_000, "rate": 100}, {"fault": "stall", "after": 3}):
        job_id = f"job-{script.get('fault', 'none')}"
        task = bench.start(job_id, request(**script))
        await bench.deltas(job_id, 3)
        await bench.redis.hset(f"dw:{{{job_id}}}:meta", mapping={"lease_until": 0, "owner": "x"})
        claim = await bench.log.claim(job_id, owner="other", lease_s=LEASE_S, take_over=1)
        assert claim.code == "CLAIMED"
        assert await task == Outcome("in_progress")
        assert await bench.log.top(job_id) == claim.top
        await bench.upstream_is_closed()


async def test_leases_are_renewed_while_a_job_is_silent(bench: Bench) -> None:
    """For as long as it runs."""
    task = bench.start("job", request(fault="stall"))
    await until(lambda: bench.requests("job"))
    await renewed_twice(bench)
    await bench.cancelled("job", task)


async def renewed_twice(bench: Bench) -> None:
    """Waits until the job's lease has been moved on, and once more."""
    for _ in range(2):
        before = await bench.redis.hget("dw:{job}:meta", "lease_until")
        async with asyncio.timeout(DEADLINE_S):
            while await bench.redis.hget("dw:{job}:meta", "lease_until") == before:  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.02)


# -- Redis has troubles


async def kill(client: redis.asyncio.Redis, *names: str) -> int:
    """Ends the connections of these names, as a failing network does."""
    killed = 0
    for connection in await client.client_list():
        if connection["name"] in names:
            killed += int(await client.client_kill_filter(_id=connection["id"]))
    return killed


NAMES: Final = ("deltawire-worker-flusher", "deltawire-worker-control", "deltawire-tests")


async def test_connections_that_are_killed_lose_and_double_nothing(bench: Bench) -> None:
    """Whatever was under way is sent again, and the log skips what it has."""
    task = bench.start("job", request(deltas=200, rate=200))
    for n in range(8):
        await bench.deltas("job", 10 + 15 * n)
        await until(lambda: bench.flusher.is_connected)
        assert await kill(bench.redis, *NAMES) >= 1
    assert await task == Outcome("completed")
    events = await bench.ended("job")
    assert text_of(events) == content(events[-1])
    assert len(text_of(events).split()) >= 150


async def test_a_cancel_is_heard_after_the_control_connection_was_lost(bench: Bench) -> None:
    """The channel is subscribed again; at the worst the next renewal tells."""
    task = bench.start("job", request(fault="stall"))
    await until(lambda: bench.requests("job"))
    assert await kill(bench.redis, "deltawire-worker-control") == 1
    await bench.log.cancel("job", reason="bored")
    assert await task == Outcome("cancelled")


async def test_a_redis_that_stands_still_for_two_seconds_loses_nothing(
    bench: Bench, redis_server: RedisServer
) -> None:
    """What comes meanwhile waits, and leaves as one batch."""
    task = bench.start("job", request(deltas=500, rate=200))
    await bench.deltas("job", 20)
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(2)
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)
    assert await task == Outcome("completed")
    events = await bench.ended("job")
    assert text_of(events) == content(events[-1])


async def test_a_server_that_forgets_our_scripts_gets_them_again(bench: Bench) -> None:
    """SCRIPT FLUSH in mid-stream."""
    task = bench.start("job", request(deltas=100, rate=200))
    await bench.deltas("job", 10)
    await bench.redis.script_flush()
    assert await task == Outcome("completed")
    await bench.ended("job")


async def test_a_redis_that_is_read_only_for_a_while_loses_nothing(bench: Bench) -> None:
    """A failover: an error reply is not the end, it is tried again."""
    task = bench.start("job", request(deltas=200, rate=200))
    await bench.deltas("job", 10)
    await bench.redis.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call] # redis-py
    try:
        await asyncio.sleep(0.1)  # what was under way
        top = await bench.log.top("job")
        await asyncio.sleep(0.4)
        assert await bench.log.top("job") == top
    finally:
        await bench.redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call] # redis-py
    assert await task == Outcome("completed")
    events = await bench.ended("job")
    assert text_of(events) == content(events[-1])


async def test_a_job_that_runs_goes_on_at_maxmemory(bench: Bench) -> None:
    """Appends pass: a full Redis must not end the streams that fill it."""
    task = bench.start("job", request(deltas=60, rate=200))
    await bench.deltas("job", 10)
    await bench.redis.config_set("maxmemory", 1)
    try:
        assert await task == Outcome("completed")
    finally:
        await bench.redis.config_set("maxmemory", 0)
    await bench.ended("job")


async def test_leases_are_renewed_at_maxmemory(redis_url: str) -> None:
    """Else every job of every worker is taken for lost, five seconds later."""
    async with open_bench(redis_url) as bench:
        task = bench.start("job", request(fault="stall"))
        await until(lambda: bench.requests("job"))
        await bench.redis.config_set("maxmemory", 1)
        try:
            await renewed_twice(bench)
        finally:
            await bench.redis.config_set("maxmemory", 0)
        await bench.cancelled("job", task)


async def test_a_claim_that_redis_refuses_is_tried_again(redis_url: str) -> None:
    """RedisUnavailableError brings the message back; anything else is acknowledged, and the job is lost."""
    async with open_bench(redis_url) as bench:
        await bench.redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(RedisUnavailableError):
                await bench.run("job", request(deltas=3))
        finally:
            await bench.redis.config_set("maxmemory", 0)


async def test_a_place_that_redis_cannot_give_costs_no_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenant's server of a cluster may be away while the job's is there: the job runs."""

    async def admit(*_: Any, **__: Any) -> str:
        raise RedisUnavailableError("no answer in time")

    monkeypatch.setattr(bench.log.places, "admit", admit)
    assert await bench.run("job", request(deltas=3), {"max_attempts": 1}) == Outcome("completed")
    await bench.ended("job")


async def test_a_job_that_is_called_at_once_is_known_to_wait(bench: Bench) -> None:
    """Its worker, which has just put it back, does not take it for claimed: nobody would end it in time."""
    bench.log.places._limits = TenantLimits(max_running=1)
    await bench.submit("other", request())
    for _ in range(2):  # the second time its message has come again, and its place is gone
        assert (await bench.run("job", request())).is_held
        assert not await bench.redis.zscore("dw:queued", "job")
        await Turns(bench.log, NoQueue()).go_on("default", left=["other"])
        keeping = asyncio.create_task(bench.presence.keep())
        await until(lambda: not bench.presence._over)
        keeping.cancel()
        assert await bench.redis.zscore("dw:queued", "job")
        await bench.log.places.left("default", ["job"])
        await bench.log.places.turns("default", kept=["other"])


@pytest.mark.parametrize("lost", [["dw:{job}:log"], ["dw:{job}:log", "dw:{job}:meta"], ["*"]])
async def test_a_log_that_redis_lost_is_written_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, lost: list[str]
) -> None:
    """From the worker's memory, with the record: whole, as if nothing had been lost (§4.1)."""
    monkeypatch.setattr("deltawire_worker.writer.SNAPSHOT_BYTES", 10_000_000)  # however much comes meanwhile
    await bench.submit("job", request(deltas=100_000, rate=400), metadata={"a": "b"})
    before = await bench.log.record("job")
    task = bench.start("job")
    await bench.deltas("job", 20)
    seen = await bench.lines("job")
    if lost == ["*"]:
        await bench.redis.flushall()
    else:
        await bench.redis.delete(*lost)
    await bench.deltas("job", len(seen) + 20)
    await bench.cancelled("job", task)
    assert (await bench.lines("job"))[: len(seen)] == seen
    record = await bench.log.record("job")
    assert before is not None
    assert record is not None
    assert record.options == before.options
    assert record.created_at == before.created_at
    assert record.first_delta_at is not None


async def test_a_log_that_is_lost_late_is_healed_by_a_snapshot(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the worker no longer holds comes back as the fold of it, then the events after it."""
    monkeypatch.setattr("deltawire_worker.writer.SNAPSHOT_BYTES", 5_000)
    task = bench.start("job", request(deltas=100_000, rate=400))
    await bench.deltas("job", 100)
    async with bench.redis.pipeline() as transaction:  # what is read is all that is lost
        transaction.xrange("dw:{job}:log")
        transaction.flushall()
        log, _ = await transaction.execute()
    seen = [fields[b"e"] for _, fields in log]
    await bench.deltas("job", 20)
    await bench.log.cancel("job", reason="enough")
    assert await task == Outcome("cancelled")
    first, *rest = await bench.lines("job")
    assert is_snapshot(first)
    base = sequence_number_of(first)
    assert 0 < base <= len(seen)
    assert [sequence_number_of(event) for event in rest] == list(range(base + 1, base + 1 + len(rest)))
    assert rest[: len(seen) - base] == seen[base:]
    assert (await bench.log.head("job")).earliest == base + 1
    fold = await fold_pages(LogFold(), bench.log.pages("job"))
    assert json.loads(rest[-1])["completion"] == fold.completion()


async def test_a_silent_job_heals_its_log_too(bench: Bench) -> None:
    """A renewal finds the loss when there is nothing to append."""
    task = bench.start("job", request(fault="stall"))
    await until(lambda: bench.gateway.records)
    async with asyncio.timeout(DEADLINE_S):
        while len(seen := await bench.lines("job")) < 2:  # noqa: ASYNC110 - a log has no event for tests
            await asyncio.sleep(0.01)
    await bench.redis.flushall()
    async with asyncio.timeout(DEADLINE_S):
        while await bench.lines("job") != seen:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
    await bench.cancelled("job", task)


async def test_another_owner_of_the_same_number_is_not_written_over(bench: Bench) -> None:
    """Redis lost all, another worker got the message and counts from 1 again: the first one stands back."""
    task = bench.start("job", request(deltas=1_000, rate=200))
    await bench.deltas("job", 10)
    await bench.redis.flushall()
    claim = await bench.log.claim("job", owner="other", lease_s=60, request=b"{}")
    if claim.code == "CLAIMED":  # else the log was healed before
        assert claim.attempt == 1
        assert await task == Outcome("in_progress")
        assert await bench.lines("job") == []
    else:
        assert claim.code == "HELD"
        task.cancel()
        await asyncio.wait([task])


async def test_a_second_delivery_after_a_loss_goes_along_with_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis lost all, and the message came to the worker that has the job: it asks the upstream once."""
    monkeypatch.setattr("deltawire_worker.writer.SNAPSHOT_BYTES", 10_000_000)  # however much comes meanwhile
    first = bench.start("job", request(deltas=100_000, rate=100))
    await bench.deltas("job", 10)
    await bench.redis.flushall()
    second = bench.start("job", request(deltas=100_000, rate=100))
    await bench.deltas("job", 20)
    await bench.cancelled("job", first)
    assert await second == Outcome("cancelled")
    assert bench.requests("job") == 1


async def test_a_long_log_is_compacted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit the oldest events become a snapshot; readers of the rest notice nothing (§3.2)."""
    monkeypatch.setattr("deltawire_worker.writer.SNAPSHOT_BYTES", 10_000)
    monkeypatch.setattr("deltawire_worker.writer.MAX_PENDING_BYTES", 20_000)  # an append is no larger
    bench.flusher.max_log_bytes = 40_000
    task = bench.start("job", request(deltas=2_000, rate=2_000))
    largest = 0
    while not task.done():
        largest = max(largest, sum(map(len, await bench.lines("job"))))
        await asyncio.sleep(0.01)
    assert await task == Outcome("completed")
    first, *rest = await bench.lines("job")
    assert is_snapshot(first)
    assert sequence_number_of(rest[-1]) == sequence_number_of(first) + len(rest)
    fold = await fold_pages(LogFold(), bench.log.pages("job"))
    assert json.loads(rest[-1])["completion"] == fold.completion()
    assert 0 < largest < 150_000  # the text of 2,000 deltas and one append over the limit included


async def test_a_redis_that_stays_away_fills_the_buffer_and_fails_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    """The upstream is closed then, long before memory is; the failure is written when Redis is back."""
    monkeypatch.setattr("deltawire_worker.writer.MAX_PENDING_BYTES", 20_000)
    monkeypatch.setattr("deltawire_worker.writer.STALL_TIMEOUT_S", 0.3)
    task = bench.start("job", request(deltas=100_000, rate=1_000))
    await bench.deltas("job", 20)
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        await bench.upstream_is_closed()
        assert bench.gateway.records[0].closed_by == "client"
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)
    assert await task == Outcome("failed", "redis_unavailable")
    events = await bench.ended("job")
    assert events[-1]["source"] == "worker"
    assert content(events[-1]) == text_of(events)


async def test_a_gateway_is_not_silent_while_we_do_not_read_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    """What holds up the stream is Redis; that has a time-out of its own."""
    monkeypatch.setattr("deltawire_worker.writer.MAX_PENDING_BYTES", 20_000)
    async with open_bench(redis_url) as bench:
        task = bench.start("job", request(deltas=2_000, rate=1_000), {"idle_timeout_s": 1.0})
        await bench.deltas("job", 20)
        os.kill(redis_server.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(2.0)
        finally:
            os.kill(redis_server.pid, signal.SIGCONT)
        assert await task == Outcome("completed")


async def test_an_end_that_cannot_be_written_brings_the_message_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    """Nobody else would end the job."""
    monkeypatch.setattr(generate_module, "END_TIMEOUT_S", 0.3)
    task = bench.start("job", request(deltas=30, rate=200))
    await bench.deltas("job", 5)
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RedisUnavailableError):
            await task
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)


# Abandoned jobs (§1.2).

ABANDON: Final = {"on_abandon": "cancel", "abandon_grace_s": 0.5}


@asynccontextmanager
async def watched(bench: Bench) -> AsyncIterator[None]:
    """Somebody listens to the job's channel."""
    async with bench.redis.pubsub() as channel:
        await channel.subscribe("dw:{job}:events")
        await channel.get_message(timeout=DEADLINE_S)
        yield


async def test_an_abandoned_job_is_cancelled(bench: Bench) -> None:
    """Its upstream is closed, and the event says why; the text so far is in it."""
    assert await bench.run("job", request(deltas=10_000, rate=50), ABANDON) == Outcome("cancelled")
    last = (await bench.ended("job"))[-1]
    assert last["cancel"]["reason"] == "abandoned"
    assert last["cancel"]["requested_at"] <= last["cancel"]["upstream_closed_at"]
    assert bench.gateway.records[0].closed_by == "client"


@pytest.mark.parametrize("script", [{"deltas": 100, "rate": 40}, {"deltas": 1, "first_delta_s": 2.5}])
async def test_a_watched_job_is_not_abandoned(bench: Bench, script: dict[str, Any]) -> None:
    """Whether it talks or is silent."""
    async with watched(bench):
        assert await bench.run("job", request(**script), ABANDON) == Outcome("completed")


async def test_a_job_is_not_abandoned_while_a_relay_cannot_listen(bench: Bench) -> None:
    """One that drains or reads degraded says so by a key."""
    await bench.redis.set("dw:{job}:watched", 1, ex=60)
    assert await bench.run("job", request(deltas=100, rate=40), ABANDON) == Outcome("completed")


async def test_nobody_watches_unless_asked(bench: Bench) -> None:
    """By default a job goes on without watchers."""
    assert await bench.run("job", request(deltas=60, rate=40), {"abandon_grace_s": 0.1}) == Outcome(
        "completed"
    )


async def test_the_grace_counts_from_the_last_receiver(bench: Bench) -> None:
    """Whoever comes back in time finds the stream going on."""
    options = {"on_abandon": "cancel", "abandon_grace_s": 3.0}
    task = bench.start("job", request(deltas=100_000, rate=50), options)
    for _ in range(3):
        async with watched(bench):
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
    async with watched(bench):
        assert not task.done()
        await bench.cancelled("job", task)


async def test_a_lost_connection_to_redis_abandons_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relays were cut off as well, and get time to subscribe again."""
    monkeypatch.setattr("deltawire_worker.flusher.SETTLE_S", DEADLINE_S)
    task = bench.start("job", request(deltas=150, rate=50), ABANDON)
    async with watched(bench):
        await bench.deltas("job", 5)
    for client in await bench.redis.client_list():
        if client["name"] == "deltawire-worker-flusher":
            await bench.redis.client_kill_filter(_id=client["id"])
    await asyncio.sleep(1.5)
    async with watched(bench):
        assert await task == Outcome("completed")


async def test_a_job_that_was_abandoned_in_the_queue_never_streams(bench: Bench) -> None:
    """Nobody pays for what nobody waits for; relays need no time where Redis has not been away."""
    bench.flusher.settled_at = 0
    await bench.submit("job", request(), created_at=time.time() - 10, **ABANDON)
    assert await bench.run("job") == Outcome("cancelled")
    assert (await bench.ended("job"))[-1]["cancel"]["upstream_closed_at"] is None
    assert bench.gateway.records == []


@pytest.mark.parametrize("grace_s", [0.5, 5])
async def test_a_job_that_is_cancelled_while_its_readers_may_come_back_never_streams(
    bench: Bench, grace_s: float
) -> None:
    """By somebody, or because its grace is over before their time to come back is."""
    await bench.submit(
        "job", request(), created_at=time.time() - 10, on_abandon="cancel", abandon_grace_s=grace_s
    )
    task = bench.start("job")
    await until(lambda: "job" in bench.runs)
    if grace_s > 1:
        await bench.log.cancel("job", reason="somebody")
    assert await task == Outcome("cancelled")
    assert [event["type"] for event in await bench.ended("job")] == ["queued", "cancelled"]
    assert bench.gateway.records == []


async def test_a_job_that_waited_long_and_is_watched_streams(bench: Bench) -> None:
    """The queue's length is nobody's leaving."""
    await bench.submit("job", request(deltas=3), created_at=time.time() - 10, **ABANDON)
    async with watched(bench):
        assert await bench.run("job") == Outcome("completed")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param({"deltas": 10_000, "rate": 50}, id="talking"),
        pytest.param({"deltas": 10_000, "first_delta_s": 60}, id="silent"),
    ],
)
@pytest.mark.parametrize("grace_s", [0, 1])
async def test_the_grace_is_kept_to_the_tenth_of_a_second(
    bench: Bench, script: dict[str, Any], grace_s: float
) -> None:
    """Counted from when the last reader left, whatever the stream is doing then; 0 is at once."""
    loop = asyncio.get_running_loop()
    options = {"on_abandon": "cancel", "abandon_grace_s": grace_s}
    async with watched(bench):
        task = bench.start("job", request(**script), options)
        await until(lambda: bench.gateway.records)
        await asyncio.sleep(0.7)
        assert not task.done()
        left_at = loop.time()
    assert await task == Outcome("cancelled")
    closed_after_s = (await bench.ended("job"))[-1]["cancel"]["upstream_closed_at"] - time.time()
    print(f"abandoned {loop.time() - left_at + closed_after_s:.3f} s after the last reader left")
    assert loop.time() - left_at >= grace_s


async def test_one_look_is_for_many_runs(bench: Bench) -> None:
    """What nobody watches is asked about in one command, however many there are."""
    looked_at: list[int] = []
    listened_to = bench.log.listened_to

    async def noted(job_ids: Sequence[str]) -> set[str]:
        looked_at.append(len(job_ids))
        return await listened_to(job_ids)

    job_ids = [f"job-{n}" for n in range(20)]
    tasks = [bench.start(job_id, request(fault="stall"), {"on_abandon": "cancel"}) for job_id in job_ids]
    await until(lambda: len(bench.gateway.records) == 20)
    for run in bench.runs.values():  # from here on they are due together
        run.looked_at = asyncio.get_running_loop().time()
    await bench.redis.config_resetstat()
    bench.log.listened_to = noted  # type: ignore[method-assign]
    await until(lambda: 20 in looked_at)
    stats = await bench.redis.info("commandstats")
    assert stats["cmdstat_pubsub|numsub"]["calls"] <= len(looked_at) + 1  # one was under way
    for job_id, task in zip(job_ids, tasks, strict=True):
        await bench.cancelled(job_id, task)
