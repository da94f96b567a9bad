"""The OpenAI door on a real relay and a real Redis; logs written without a worker (PROTOCOL §9)."""

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import redis.asyncio

from deltawire.codec import encode_terminal
from deltawire.errors import ERRORS, Error, RedisUnavailableError
from deltawire.events import Cancel, Completed, IncompleteDetails, Timings, UpstreamErrorDetails
from deltawire.keys import Keys
from deltawire.models import publish_models
from deltawire.queue import QUEUE
from deltawire.redis_client import RedisClient
from deltawire.redis_server import RedisServer
from deltawire_relay import event_stream as event_stream_module
from deltawire_relay import server as server_module
from deltawire_relay.hub import Hub
from tests.support.producer import REQUEST, ProducedJob, Producer, completion
from tests.support.readers import WAIT_S, event_stream, http_client
from tests.support.relay_process import Keyring, RelayProcess, relay_in_process
from tests.support.system import (
    UPSTREAM_API_KEY,
    System,
    gateway_records,
    request,
    show,
)

PATH = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"
ORIGIN = "https://app.example"

#: What an upstream may send, and nobody has any business to change: white space, escapes, order, numbers.
CHUNKS = [
    b'{"id":"c1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant"}}]}',
    b'{ "choices" : [ { "delta" : { "content" : "H\\u00e9 \\/ \\"x\\"" } , "index" : 0 } ], "x": 1.0e3 }',
    '{"choices":[{"index":0,"delta":{"content":"日本 🙂 \\n"}}],"chunk":{"chunk":[]},"usage":null}'.encode(),
    b'{"choices":[],"usage":null,"prompt_filter_results":[{"prompt_index":0}]}',
    b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"created":1e9}',
]
USAGE_ONLY = b'{"id":"c1","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}'


def lines(*chunks: bytes) -> bytes:
    return b"".join([b"data: %s\n\n" % chunk for chunk in chunks])


class Asked:
    """A request that is under way, and the job behind it, whose log the test writes."""

    def __init__(self, answer: "asyncio.Task[httpx.Response]", job: ProducedJob) -> None:
        self.answer = answer
        self.job = job

    async def answered(self) -> httpx.Response:
        async with asyncio.timeout(WAIT_S):
            return await self.answer


def job_id_of(key: str, tenant: str = "default") -> str:
    """An Idempotency-Key says beforehand which job it will be (§5.2)."""
    return hashlib.sha256(f"{tenant}\0{key}".encode()).hexdigest()


@asynccontextmanager
async def asked(
    url: str, jobs: Producer, *, key: str | None = None, headers: dict[str, str] | None = None, **fields: Any
) -> AsyncIterator[Asked]:
    """Asks for a completion, and takes its job up as a worker does; the answer is read to its end."""
    key = key or uuid.uuid4().hex
    async with http_client(base_url=url) as client:
        post = client.post(
            PATH, json={**REQUEST, **fields}, headers={"Idempotency-Key": key, **(headers or {})}
        )
        answer = asyncio.create_task(post)
        try:
            job = jobs.job(job_id_of(key))
            await job.adopt()
            yield Asked(answer, job)
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)


def check_error(error: dict[str, Any], **expected: Any) -> None:
    assert set(error) == {"message", "type", "param", "code", "retryable", "retry_after_s"}
    assert {name: error[name] for name in expected} == expected
    assert error["message"]


async def test_chunks_go_out_byte_for_byte(relay: RelayProcess, jobs: Producer) -> None:
    """What the upstream sent is what the client gets, and then [DONE]; the job has a name."""
    async with asked(relay.url, jobs, stream=True) as it:
        for chunk in CHUNKS[:2]:
            await it.job.chunks(chunk)
        await it.job.chunks(*CHUNKS[2:])
        await it.job.end()
        response = await it.answered()
    assert response.status_code == 200
    assert response.content == lines(*CHUNKS) + DONE
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["X-Job-Id"] == response.headers["X-Request-Id"] == it.job.job_id


async def test_a_chunk_is_there_when_it_is_there(relay: RelayProcess, jobs: Producer) -> None:
    """Nothing waits for more."""
    key = uuid.uuid4().hex
    async with http_client(base_url=relay.url) as client:
        opening = asyncio.create_task(
            client.send(
                client.build_request(
                    "POST", PATH, json={**REQUEST, "stream": True}, headers={"Idempotency-Key": key}
                ),
                stream=True,
            )
        )
        job = jobs.job(job_id_of(key))
        await job.adopt()
        await job.chunks(CHUNKS[0])
        response = await opening
        pieces = response.aiter_raw()
        assert await anext(pieces) == lines(CHUNKS[0])
        await job.chunks(CHUNKS[1])
        assert await anext(pieces) == lines(CHUNKS[1])
        await job.end()
        assert b"".join([piece async for piece in pieces]) == DONE


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}])
async def test_without_stream_it_is_the_fold(
    relay: RelayProcess, jobs: Producer, stream: dict[str, Any]
) -> None:
    """The completion that the non-streaming call would have returned, usage included."""
    async with asked(relay.url, jobs, **stream) as it:
        await it.job.deltas("Hel", "lo")
        await it.job.end(completion=completion("Hello"))
        response = await it.answered()
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Job-Id"] == response.headers["X-Request-Id"] == it.job.job_id
    assert response.json() == completion("Hello")


async def test_a_completion_that_is_too_large_for_an_event(relay: RelayProcess, jobs: Producer) -> None:
    """It is folded from the log (§2.3)."""
    async with asked(relay.url, jobs) as it:
        await it.job.deltas(*["x" * 1_000] * 300)
        await it.job.end(completion=completion("x" * 300_000))
        response = await it.answered()
    assert "completion_url" in it.job.events[-1]
    assert response.json()["choices"][0]["message"]["content"] == "x" * 300_000


@pytest.mark.parametrize("left", [0, 250])
async def test_a_completion_that_is_lost_is_no_completion(
    relay: RelayProcess, jobs: Producer, redis_server: RedisServer, left: int
) -> None:
    """Where Redis loses the log before it is folded, the answer is neither null nor half a text."""
    async with (
        redis.asyncio.Redis.from_url(redis_server.url) as client,
        asked(relay.url, jobs) as it,
    ):
        await it.job.deltas(*["x" * 1_000] * 300)
        async with event_stream(relay.url, it.job.job_id) as reader:
            await reader.until(it.job.top)  # so the relay has them all
        keys = jobs.log.keys.job(it.job.job_id)
        await client.delete(keys.log)
        for number, text in enumerate(it.job.lines[:left], 1):
            await client.xadd(keys.log, {"e": text}, id=f"{number}-0")
        end = Completed(
            job_id=it.job.job_id,
            sequence_number=it.job.top + 1,
            attempt=1,
            created_at=1.0,
            completion=completion("x" * 300_000),
            usage=None,
            usage_source="unavailable",
            timings=Timings(queued_s=0, first_delta_s=0, total_s=0),
        )
        await client.publish(keys.channel, encode_terminal(end))
        response = await it.answered()
    assert response.status_code == 500
    check_error(response.json()["error"], code="state_lost")
    assert response.headers["X-Job-Id"] == it.job.job_id


WHOLE = [
    ("completed", {}),
    ("incomplete", {"incomplete_details": IncompleteDetails("length")}),
    ("incomplete", {"incomplete_details": IncompleteDetails("content_filter")}),
]
CUT = [
    ("incomplete", {"incomplete_details": IncompleteDetails("upstream_eof")}, 502, "upstream_eof"),
    ("incomplete", {"incomplete_details": IncompleteDetails("idle_timeout")}, 504, "idle_timeout"),
    ("incomplete", {"incomplete_details": IncompleteDetails("total_timeout")}, 504, "total_timeout"),
    ("failed", {}, 429, "upstream_rate_limit"),
    ("cancelled", {}, 409, "cancelled"),
]


@pytest.mark.parametrize(("kind", "fields"), WHOLE, ids=str)
async def test_a_whole_completion_ends_in_done(
    relay: RelayProcess, jobs: Producer, kind: str, fields: dict[str, Any]
) -> None:
    """`length` and `content_filter` are ends like `stop` to OpenAI's clients."""
    async with asked(relay.url, jobs, stream=True) as it:
        await it.job.chunks(CHUNKS[0])
        await it.job.end(kind, **fields)
        assert (await it.answered()).content == lines(CHUNKS[0]) + DONE
    async with asked(relay.url, jobs) as it:
        await it.job.chunks(CHUNKS[0])
        await it.job.end(kind, **fields)
        response = await it.answered()
    assert (response.status_code, response.json()) == (200, completion("the whole text"))


@pytest.mark.parametrize(("kind", "fields", "status", "code"), CUT, ids=str)
async def test_any_other_end_is_an_error(
    relay: RelayProcess, jobs: Producer, kind: str, fields: dict[str, Any], status: int, code: str
) -> None:
    """After a chunk an error object and no [DONE], which clients take for success; else a status."""
    async with asked(relay.url, jobs, stream=True) as it:
        await it.job.chunks(CHUNKS[0])
        await it.job.end(kind, **fields)
        response = await it.answered()
    first, last, rest = response.content.split(b"\n\n")
    assert (response.status_code, first, rest) == (200, lines(CHUNKS[0]).strip(), b"")
    streamed = json.loads(last.removeprefix(b"data: "))["error"]
    check_error(streamed, code=code)
    async with asked(relay.url, jobs) as it:
        await it.job.chunks(CHUNKS[0])
        await it.job.end(kind, **fields)
        response = await it.answered()
    assert (response.status_code, response.json()) == (status, {"error": streamed})
    assert response.headers["X-Job-Id"] == it.job.job_id


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("code", "status_code", "said", "status", "expected"),
    [
        ("upstream_rate_limit", 429, None, 429, {"type": "rate_limit_error", "retry_after_s": 2.5}),
        (
            "upstream_invalid_request",
            404,
            UpstreamErrorDetails("not_found_error", "model_not_found", "model"),
            404,
            {"type": "not_found_error", "code": "model_not_found", "param": "model"},
        ),
        ("upstream_invalid_request", 451, None, 400, {"type": "invalid_request_error"}),
        (
            "upstream_authentication",
            401,
            UpstreamErrorDetails("authentication_error", "invalid_api_key"),
            502,
            {"type": "upstream_error", "code": "upstream_authentication"},
        ),
        ("upstream_server_error", 500, UpstreamErrorDetails("server_error"), 502, {"type": "server_error"}),
        ("first_delta_timeout", None, None, 504, {"type": "upstream_error"}),
    ],
)
async def test_what_fails_before_the_first_delta_has_a_status(
    relay: RelayProcess,
    jobs: Producer,
    stream: bool,
    code: str,
    status_code: int | None,
    said: UpstreamErrorDetails | None,
    status: int,
    expected: dict[str, Any],
) -> None:
    """The upstream's own where the client can mend it, with what it said of it; and when to try again."""
    kind = ERRORS[code]
    error = Error(message="no", type=kind.type, code=code, retryable=kind.retryable, retry_after_s=2.5)
    fields = {"upstream_error": said} if said else {}
    async with asked(relay.url, jobs, stream=stream) as it:
        await it.job.end("failed", error=error, status_code=status_code, **fields)
        response = await it.answered()
    assert response.status_code == status
    check_error(response.json()["error"], **expected)
    assert response.headers["Retry-After"] == "3"
    assert response.headers["Retry-After-Ms"] == "2500"
    assert response.headers["X-Should-Retry"] == ("true" if kind.retryable else "false")
    assert response.headers["X-Job-Id"] == it.job.job_id


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_job_is_not_asked_for_again(
    relay: RelayProcess, jobs: Producer, stream: bool
) -> None:
    """409 says what it met; SDKs, which try again at 409, are told not to."""
    async with asked(relay.url, jobs, stream=stream) as it:
        cancel = Cancel(reason="somebody", requested_at=1.0, upstream_closed_at=None)
        await it.job.end("cancelled", cancel=cancel, completion=None)
        response = await it.answered()
    assert (response.status_code, response.headers["X-Should-Retry"]) == (409, "false")
    check_error(response.json()["error"], code="cancelled", message="the job was cancelled (somebody)")


@pytest.mark.parametrize(
    ("stream_options", "is_there"),
    [
        (..., False),
        (None, False),
        ({}, False),
        ({"include_usage": False}, False),
        ({"include_usage": None}, False),
        ({"include_usage": True}, True),
        ({"include_usage": True, "include_obfuscation": False}, True),
    ],
    ids=str,
)
async def test_the_usage_only_chunk_is_for_those_who_asked(
    relay: RelayProcess, jobs: Producer, stream_options: Any, is_there: bool
) -> None:
    """Ours is always asked for, and withheld; it is the only chunk that is."""
    own = {} if stream_options is ... else {"stream_options": stream_options}
    async with asked(relay.url, jobs, stream=True, **own) as it:
        record = await jobs.log.record(it.job.job_id)
        await it.job.chunks(*CHUNKS, USAGE_ONLY)
        await it.job.end()
        response = await it.answered()
    assert response.content == lines(*CHUNKS, *([USAGE_ONLY] if is_there else [])) + DONE
    assert record is not None
    stored = json.loads(record.request or b"")
    asked_for = {} if stream_options is ... else stream_options or {}
    assert stored == {**REQUEST, "stream_options": {**asked_for, "include_usage": True}}


async def test_a_job_of_this_door_ends_when_its_readers_leave(relay: RelayProcess, jobs: Producer) -> None:
    """Unless the request says otherwise; its own fields are not sent upstream (§9.2)."""
    for own, on_abandon, grace_s, timeout_s in (
        ({}, "cancel", 2.0, 600.0),
        ({"deltawire": None}, "cancel", 2.0, 600.0),
        ({"deltawire": {"abandon_grace_s": 0, "timeout_s": 7}}, "cancel", 0.0, 7.0),
        ({"deltawire": {"on_abandon": "continue"}}, "continue", 2.0, 600.0),
    ):
        async with asked(relay.url, jobs, logprobs=True, x={"y": [1]}, **own) as it:
            record = await jobs.log.record(it.job.job_id)
        assert record is not None
        options = record.options
        assert (options.max_retries, options.max_retry_wait_s) == (1, 10)
        assert (options.on_abandon, options.abandon_grace_s, options.timeout_s) == (
            on_abandon,
            grace_s,
            timeout_s,
        )
        stored = json.loads(record.request or b"")
        assert stored == {
            **REQUEST,
            "logprobs": True,
            "x": {"y": [1]},
            "stream_options": {"include_usage": True},
        }


async def test_the_operator_says_how_long_a_job_outlives_its_readers(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never is an answer, too."""
    async with (
        relay_in_process(redis_server.url, monkeypatch, chat_abandon_grace_s=None) as address,
        asked(f"http://{address}", jobs) as it,
    ):
        record = await jobs.log.record(it.job.job_id)
    assert record is not None
    assert record.options.on_abandon == "continue"


async def test_headers_wait_15_s_at_the_most(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then 200 and comments; an error comes as an object then (time runs faster here)."""
    assert event_stream_module.COMMENT_INTERVAL_S == 15
    monkeypatch.setattr(event_stream_module, "COMMENT_INTERVAL_S", 0.02)
    async with relay_in_process(redis_server.url, monkeypatch) as address:
        async with asked(f"http://{address}", jobs, stream=True) as it:
            await asyncio.sleep(0.35)
            await it.job.chunks(CHUNKS[0])
            await it.job.end()
            response = await it.answered()
        comments, _, rest = response.content.partition(b"data: ")
        assert response.status_code == 200
        assert comments.count(b": keep-alive\n\n") >= 2
        assert b"data: " + rest == lines(CHUNKS[0]) + DONE
        async with asked(f"http://{address}", jobs, stream=True) as it:
            await asyncio.sleep(0.25)
            await it.job.end("failed", completion=None)
            response = await it.answered()
        assert response.status_code == 200
        last = response.content.split(b"\n\n")[-2]
        check_error(json.loads(last.removeprefix(b"data: "))["error"], code="upstream_rate_limit")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["before the first delta", "after it"])
async def test_a_client_that_goes_away_is_a_reader_no_more(
    relay: RelayProcess, jobs: Producer, redis_server: RedisServer, stream: bool, when: str
) -> None:
    """The relay unsubscribes at once, which is what the worker counts (§2.5)."""
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        async with asked(relay.url, jobs, stream=stream) as it:
            channel = f"dw:{{{it.job.job_id}}}:events"
            assert await client.pubsub_numsub(channel) == [(channel.encode(), 1)]
            if when == "after it":
                await it.job.chunks(CHUNKS[0])
        async with asyncio.timeout(WAIT_S):
            while await client.pubsub_numsub(channel) != [(channel.encode(), 0)]:  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.01)
    assert "rror" not in relay.log  # it is no fault of anybody's


@pytest.mark.parametrize("stream", [True, False])
async def test_a_job_is_watched_while_pub_sub_is_not_to_be_had(
    jobs: Producer, redis_server: RedisServer, stream: bool
) -> None:
    """A relay that cannot subscribe says so before there is a job that a worker could take for abandoned."""
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        with RelayProcess(redis_server.url) as relay:
            try:
                await client.acl_setuser("default", enabled=True, commands=["-subscribe"])
                await client.client_kill_filter(_type="pubsub")
                async with asked(relay.url, jobs, stream=stream) as it:
                    assert await client.exists(f"dw:{{{it.job.job_id}}}:watched")
                    await it.job.chunks(CHUNKS[0])
                    await it.job.end()
                    assert (await it.answered()).status_code == 200
            finally:
                await client.acl_setuser("default", enabled=True, commands=["+subscribe"])


@pytest.mark.parametrize("stream", [True, False])
async def test_a_job_that_cannot_be_read_is_not_sent(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Its record is written while its log is opened; nothing is held that was not opened."""
    refused = asyncio.Event()
    closed: list[str] = []
    close = Hub.close

    async def no_open(_: Hub) -> None:
        refused.set()
        raise RedisUnavailableError("not now")

    def noted_close(hub: Hub) -> None:
        closed.append(hub.job_id)
        close(hub)

    monkeypatch.setattr(Hub, "open", no_open)
    monkeypatch.setattr(Hub, "close", noted_close)
    key = uuid.uuid4().hex
    job_id = job_id_of(key)
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        async with relay_in_process(redis_server.url, monkeypatch) as address:
            async with http_client(base_url=f"http://{address}") as http:
                answer = await http.post(
                    PATH, json={**REQUEST, "stream": stream}, headers={"Idempotency-Key": key}
                )
            assert answer.status_code == 503
            check_error(answer.json()["error"], code="redis_unavailable")
            assert refused.is_set()
            assert closed == [job_id]
        messages = await client.lrange(QUEUE, 0, -1)
        assert not any(job_id.encode() in message for message in messages)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_message_that_redis_refuses_is_said(
    jobs: Producer, redis_server: RedisServer, stream: bool
) -> None:
    """503; the job is there, nobody reads it any more, and a repeat makes it good."""
    key = uuid.uuid4().hex
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        with RelayProcess(redis_server.url) as relay:
            async with http_client(base_url=relay.url) as http:
                await client.acl_setuser("default", enabled=True, commands=["-lpush"])
                try:
                    answer = await http.post(
                        PATH, json={**REQUEST, "stream": stream}, headers={"Idempotency-Key": key}
                    )
                finally:
                    await client.acl_setuser("default", enabled=True, commands=["+lpush"])
            assert answer.status_code == 503
            check_error(answer.json()["error"], code="queue_unavailable")
            channel = jobs.log.keys.job(job_id_of(key)).channel
            async with asyncio.timeout(WAIT_S):
                while await client.pubsub_numsub(channel) != [(channel.encode(), 0)]:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.01)
            async with asked(relay.url, jobs, key=key, stream=stream) as it:
                await it.job.end()
                assert (await it.answered()).status_code == 200


async def test_the_same_key_is_the_same_job(relay: RelayProcess, jobs: Producer) -> None:
    """A repeat attaches, from the start, while it runs and when it has ended, streamed or whole (§5.2)."""
    key = uuid.uuid4().hex
    async with asked(relay.url, jobs, key=key, stream=True) as it:
        await it.job.chunks(*CHUNKS)
        async with http_client(base_url=relay.url) as client:

            async def again(**fields: Any) -> httpx.Response:
                return await client.post(PATH, json={**REQUEST, **fields}, headers={"Idempotency-Key": key})

            whole = asyncio.create_task(again())
            running = asyncio.create_task(again(stream=True))
            await asyncio.sleep(0.2)
            await it.job.chunks(USAGE_ONLY)
            await it.job.end()
            ended = await again(stream=True, stream_options={"include_usage": True})
            other = await again(temperature=1)
            assert (await it.answered()).content == (await running).content == lines(*CHUNKS) + DONE
            assert ended.content == lines(*CHUNKS, USAGE_ONLY) + DONE
            assert (await whole).json() == completion("the whole text")
    assert ended.headers["X-Job-Id"] == (await whole).headers["X-Job-Id"] == it.job.job_id
    assert other.status_code == 422
    check_error(other.json()["error"], code="idempotency_conflict")


async def test_the_stream_can_be_watched_elsewhere(relay: RelayProcess, jobs: Producer) -> None:
    """`x-job-id` is a job like any other."""
    async with asked(relay.url, jobs, stream=True) as it:
        async with event_stream(relay.url, it.job.job_id) as reader:
            await it.job.chunks(CHUNKS[0])
            await it.job.end()
            events = [message.data for message in await reader.rest()][1:]
        response = await it.answered()
    assert response.headers["X-Job-Id"] == it.job.job_id
    assert events == it.job.events


async def test_a_drain_lets_streams_finish_and_tells_the_others(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not end in the window gets an error to try again with; its job counts as watched (§9.4)."""
    monkeypatch.setattr(server_module, "DRAIN_WINDOW_S", 4.0)
    async with redis.asyncio.Redis.from_url(redis_server.url) as client, AsyncExitStack() as relay:
        url = "http://" + await relay.enter_async_context(relay_in_process(redis_server.url, monkeypatch))
        async with (
            asked(url, jobs, stream=True) as ends,
            asked(url, jobs, stream=True) as goes_on,
            asked(url, jobs, stream=True) as waits,
            asked(url, jobs) as waits_whole,
        ):
            await goes_on.job.chunks(CHUNKS[0])
            stopping = asyncio.create_task(relay.aclose())
            mark = f"dw:{{{goes_on.job.job_id}}}:watched"
            async with asyncio.timeout(WAIT_S):
                while not await client.exists(mark):  # noqa: ASYNC110 - Redis tells nobody
                    await asyncio.sleep(0.01)
            await ends.job.chunks(CHUNKS[0])
            await ends.job.end()
            answers = [await it.answered() for it in (ends, goes_on, waits, waits_whole)]
            await stopping
    assert answers[0].content == lines(CHUNKS[0]) + DONE
    first, last, _ = answers[1].content.split(b"\n\n")
    assert first == lines(CHUNKS[0]).strip()
    check_error(json.loads(last.removeprefix(b"data: "))["error"], code="shutting_down", retryable=True)
    for answer in answers[2:]:
        assert (answer.status_code, answer.headers["X-Should-Retry"]) == (503, "true")
        check_error(answer.json()["error"], code="shutting_down", retry_after_s=1)


async def test_a_client_that_stops_reading_costs_little(redis_server: RedisServer, jobs: Producer) -> None:
    """20 MB of chunks wait in the log, not in the relay, and none is lost (§4.7)."""
    key = uuid.uuid4().hex
    body = json.dumps({**REQUEST, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with RelayProcess(redis_server.url) as relay:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, limit=4_096)
        try:
            writer.write(
                f"{head}Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            job = jobs.job(job_id_of(key))
            await job.adopt()
            await job.chunks(CHUNKS[0])
            async with asyncio.timeout(WAIT_S):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            before = relay.rss_bytes
            for _ in range(400):
                await job.deltas(*["x" * 1_000] * 50)
            await job.end()
            assert relay.rss_bytes - before < 20_000_000
            async with asyncio.timeout(3 * WAIT_S):
                chunks = 0
                while (data := await reader.readline()) != b"data: [DONE]\n":
                    chunks += data.startswith(b"data: {")
        finally:
            writer.transport.abort()
    assert chunks == 1 + 400 * 50


async def test_an_sdk_in_a_browser_may_ask(redis_server: RedisServer, jobs: Producer) -> None:
    """Of a listed origin: its preflight is answered for any header, and it may read ours (§9.5)."""
    with RelayProcess(redis_server.url, {"DELTAWIRE_ALLOWED_ORIGINS": ORIGIN}) as relay:
        wanted = (
            "authorization,content-type,openai-organization,user-agent,x-stainless-retry-count,x-stainless-os"
        )
        preflight = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": wanted,
        }
        async with http_client(base_url=relay.url) as client:
            answer = await client.options(PATH, headers=preflight)
            refused = await client.options(PATH, headers={**preflight, "Origin": "https://evil.example"})
        async with asked(relay.url, jobs, stream=True, headers={"Origin": ORIGIN}) as it:
            await it.job.chunks(CHUNKS[0])
            await it.job.end()
            response = await it.answered()
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    allowed = {name.strip().lower() for name in answer.headers["Access-Control-Allow-Headers"].split(",")}
    assert set(wanted.split(",")) <= allowed
    assert refused.status_code == 403
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    exposed = {name.strip().lower() for name in response.headers["Access-Control-Expose-Headers"].split(",")}
    assert {"x-job-id", "x-request-id", "retry-after"} <= exposed


async def test_scopes(redis_server: RedisServer) -> None:
    """Asking takes the scopes submit and read, models the scope read."""
    keys = Keyring(submitter=("acme", ["submit"]), reader=("acme", ["read"]))
    with RelayProcess(redis_server.url, {"DELTAWIRE_API_KEYS": keys.text}) as relay:
        async with http_client(base_url=relay.url) as client:
            for name, path, method, status in (
                ("submitter", PATH, "POST", 403),
                ("reader", PATH, "POST", 403),
                ("submitter", "/v1/models", "GET", 403),
                ("reader", "/v1/models", "GET", 200),
            ):
                answer = await client.request(method, path, json=REQUEST, headers=keys.headers(name))
                assert answer.status_code == status


async def test_models(redis_url: str) -> None:
    """What the workers say of their upstreams, as OpenAI lists it; a name may hold slashes (§9.3)."""
    models = [
        {"id": "gpt-5.4", "object": "model", "created": 1, "owned_by": "openai"},
        {"id": "meta-llama/Llama-3", "object": "model", "created": 0, "owned_by": "x", "more": [None]},
    ]
    client = RedisClient(redis_url, name="tests")
    try:
        with RelayProcess(redis_url) as relay:
            async with http_client(base_url=relay.url) as http:
                await publish_models(client, Keys(), models)
                assert (await http.get("/v1/models")).json() == {"object": "list", "data": models}
                for name, model in (("gpt-5.4", models[0]), ("meta-llama/Llama-3", models[1])):
                    for path in (name, name.replace("/", "%2F")):
                        answer = await http.get(f"/v1/models/{path}")
                        assert (answer.status_code, answer.json()) == (200, model)
                await publish_models(client, Keys(), [])
                assert (await http.get("/v1/models/gpt-5.4")).status_code == 200  # known for a while
                answer = await http.get("/v1/models/a/b")
                assert answer.status_code == 404
                check_error(answer.json()["error"], code="model_not_found", param="model")
        with RelayProcess(redis_url) as relay:
            async with http_client(base_url=relay.url) as http:
                assert (await http.get("/v1/models")).json() == {"object": "list", "data": []}
        assert 0 < await client.execute("TTL", "dw:models") <= 120
    finally:
        await client.aclose()


# The whole of it.


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as started:
        yield started


async def test_the_stream_is_the_gateways(system: System) -> None:
    """Byte for byte what the gateway says when it is asked directly."""
    texts = [chunk.decode() for chunk in CHUNKS]
    body = {**request("hi", chunks=texts), "stream": True}
    async with http_client() as client:
        direct = await client.post(
            f"{system.gateway_url}{PATH}", json=body, headers={"Authorization": f"Bearer {UPSTREAM_API_KEY}"}
        )
        ours = await client.post(f"{system.relay_url}{PATH}", json=body)
    assert ours.content == direct.content == lines(*CHUNKS) + DONE


async def test_a_choice_that_never_came_is_missing(system: System) -> None:
    """Two were asked for; the gateway ends the stream after the first, and does not say that this is all."""
    texts = [chunk.decode() for chunk in (CHUNKS[0], CHUNKS[-1])]
    body = {**request("hi", chunks=texts, fault="no_done"), "n": 2, "stream": True}
    async with http_client() as client:
        answer = await client.post(f"{system.relay_url}{PATH}", json=body)
    assert DONE not in answer.content


async def test_a_client_that_has_asked_for_more_is_heard_to_go(system: System) -> None:
    """Its second request, which waits behind the first, must not keep the relay from reading."""
    body = json.dumps(
        {**request("hi", deltas=100_000, rate=50), "deltawire": {"abandon_grace_s": 0}}
    ).encode()
    key = uuid.uuid4().hex
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", system.relay_port)
    writer.write(f"{head}Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    async with asyncio.timeout(WAIT_S):
        while (await show(system, job_id_of(key))).get("status") != "in_progress":  # noqa: ASYNC110 - a poll
            await asyncio.sleep(0.02)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.sleep(0.2)
    writer.close()
    assert (await eventually_ended(system, job_id_of(key)))["cancel"]["reason"] == "abandoned"


async def test_a_client_that_offers_http2_is_answered(system: System) -> None:
    """As the JDK's does with its first request."""
    offer = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA",
    }
    body = {**request("hi", chunks=[CHUNKS[0].decode(), CHUNKS[-1].decode()]), "stream": True}
    async with http_client() as client:
        answer = await client.post(f"{system.relay_url}{PATH}", json=body, headers=offer)
    assert (answer.status_code, answer.content) == (200, lines(CHUNKS[0], CHUNKS[-1]) + DONE)


@asynccontextmanager
async def streaming(system: System, **fields: Any) -> AsyncIterator[tuple[str, AsyncIterator[str]]]:
    """An endless stream that has begun: its job's id, and its lines."""
    body = {**request("hi", deltas=100_000, rate=50), "stream": True, **fields}
    async with (
        http_client() as client,
        client.stream("POST", f"{system.relay_url}{PATH}", json=body) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        yield response.headers["X-Job-Id"], lines


async def closed(system: System, job_id: str) -> dict[str, Any]:
    """The gateway's record of a job's request, when its connection has been closed."""
    async with asyncio.timeout(WAIT_S):
        while True:
            record, *_ = await gateway_records(system, job_id)
            if record["closed_by"]:
                return record
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("grace_s", [None, 0])
async def test_a_client_that_goes_away_ends_its_stream(system: System, grace_s: float | None) -> None:
    """2 s later, or at once if it asked for that; the gateway sees the connection close."""
    own = {} if grace_s is None else {"deltawire": {"abandon_grace_s": grace_s}}
    async with streaming(system, **own) as (job_id, _):
        left_at = time.monotonic()
    record = await closed(system, job_id)
    took_s = time.monotonic() - left_at
    print(f"the gateway saw the connection close {took_s:.2f} s after the client had left")
    assert record["closed_by"] == "client"
    job = await eventually_ended(system, job_id)
    assert (job["status"], job["cancel"]["reason"]) == ("cancelled", "abandoned")
    assert took_s >= (2 if grace_s is None else 0)


async def test_a_second_watcher_keeps_the_stream_alive(system: System) -> None:
    """And when that one leaves, too, it ends."""
    async with streaming(system, deltawire={"abandon_grace_s": 0.5}) as (job_id, _):
        watching = event_stream(system.relay_url, job_id)
        reader = await watching.__aenter__()
        await reader.until(3)
    try:
        await asyncio.sleep(1.5)
        assert (await show(system, job_id))["status"] == "in_progress"
        assert not (await gateway_records(system, job_id))[0]["closed_by"]
    finally:
        await watching.__aexit__(None, None, None)
    assert (await closed(system, job_id))["closed_by"] == "client"


async def eventually_ended(system: System, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(WAIT_S):
        while True:
            job = await show(system, job_id)
            if job["status"] != "in_progress":
                return job
            await asyncio.sleep(0.02)
