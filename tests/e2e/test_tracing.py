"""Traces as a collector gets them, from real processes: one trace from the caller to the last delta."""

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis

from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.system import System, backend_app, request, send_task, submit, watch

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
_, TRACE_ID, CALLERS_SPAN, _ = CALLER.split("-")


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def system(receiver: OtlpReceiver) -> Iterator[System]:
    traced = receiver.environment
    with System(relay_environment=traced, worker_environment=traced) as system:
        yield system


async def post(system: System, path: str, body: dict[str, Any], traceparent: str = CALLER) -> httpx.Response:
    async with httpx.AsyncClient(base_url=system.relay_url, trust_env=False, timeout=30) as client:
        return await client.post(path, json=body, headers={"Traceparent": traceparent})


def by_name(spans: list[ReceivedSpan]) -> dict[str, ReceivedSpan]:
    assert len({span.name for span in spans}) == len(spans), spans
    return {span.name: span for span in spans}


def is_chat(span: ReceivedSpan) -> bool:
    return span.name.startswith("chat")


async def test_one_trace_from_the_caller_to_the_last_delta(system: System, receiver: OtlpReceiver) -> None:
    """Submission, wait, attempt and delivery hang together, and the attempt is told in GenAI's terms."""
    body = request("Write a haiku about streaming.", rate=0)
    body |= {"temperature": 0.5, "max_completion_tokens": 100, "stop": "a word", "seed": 10**30}
    job_id = (await post(system, "/v1/jobs", {"request": body})).json()["id"]
    events = await watch(system, job_id)
    spans = by_name(await receiver.of_job(job_id, 4))
    send, wait, chat, deliver = (
        spans[name] for name in ("send deltawire", "wait deltawire", "chat gpt-5.4", "deliver")
    )
    assert {span.trace_id for span in spans.values()} == {TRACE_ID}
    assert (send.parent_id, send.kind, send.service) == (CALLERS_SPAN, "producer", "deltawire-relay")
    assert {span.parent_id for span in (wait, chat, deliver)} == {send.span_id}
    assert (wait.kind, chat.kind, chat.service) == ("consumer", "client", "deltawire-worker")
    assert (deliver.kind, deliver.service) == ("server", "deltawire-relay")
    usage = events[-1]["usage"]
    told = chat.attributes
    assert told["gen_ai.response.id"] == events[-1]["completion"]["id"]
    assert told["gen_ai.response.time_to_first_chunk"] > 0
    assert (
        told.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "gpt-5.4",
            "gen_ai.request.stream": True,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.max_tokens": 100,
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "server.address": "127.0.0.1",
            "server.port": system.gateway_port,
            "deltawire.attempt": 1,
            "deltawire.status": "completed",
        }.items()
    )
    assert "gen_ai.request.seed" not in told  # more than the format takes
    assert "first_delta" in chat.events
    assert not chat.is_error
    assert deliver.attributes["deltawire.delivered_through"] == events[-1]["sequence_number"]
    assert b"haiku" not in receiver.bytes
    assert b"a word" not in receiver.bytes


async def test_a_message_of_plain_celery_carries_its_trace(system: System, receiver: OtlpReceiver) -> None:
    """As opentelemetry-instrumentation-celery sends it; what no header of its own names is ignored (§1.1)."""
    app = backend_app(system.redis_url)
    traced, broken = await asyncio.to_thread(
        lambda: [
            send_task(app, request("hello", rate=0), headers={"traceparent": header})
            for header in (CALLER, "00-not-a-trace")
        ]
    )
    app.close()
    for job_id in (traced, broken):
        await watch(system, job_id)
    (chat,), (root,) = [await receiver.of_job(job_id, 1, is_chat) for job_id in (traced, broken)]
    assert (chat.name, chat.trace_id, chat.parent_id) == ("chat gpt-5.4", TRACE_ID, CALLERS_SPAN)
    assert root.parent_id == ""
    assert root.trace_id != TRACE_ID


async def test_failures_and_retries_are_told_by_their_codes(system: System, receiver: OtlpReceiver) -> None:
    """`error.type` is the protocol's code; what the gateway said is not there."""
    flawed = request("hello", fault="status", status=503, body='{"error": {"message": "overloaded by you"}}')
    job_id = await submit(system, flawed, {"max_retries": 1, "max_retry_wait_s": 5})
    terminal = (await watch(system, job_id))[-1]
    (chat,) = await receiver.of_job(job_id, 1, is_chat)
    assert chat.is_error
    assert chat.attributes["error.type"] == terminal["error"]["code"] == "upstream_server_error"
    assert chat.events == ["retrying"]
    assert b"overloaded" not in receiver.bytes


async def test_a_completion_of_the_openai_door_is_traced(system: System, receiver: OtlpReceiver) -> None:
    """The same spans behind `/v1/chat/completions` (§9)."""
    answer = await post(system, "/v1/chat/completions", request("hello", rate=0))
    spans = by_name(await receiver.of_job(answer.headers["x-job-id"], 4))
    assert set(spans) == {"send deltawire", "wait deltawire", "chat gpt-5.4", "deliver"}
    assert {span.trace_id for span in spans.values()} == {TRACE_ID}


async def test_who_is_not_sampled_sends_nothing(system: System, receiver: OtlpReceiver) -> None:
    """The caller's decision goes along with the job."""
    unsampled = f"{CALLER[:-2]}00"
    job_id = (await post(system, "/v1/jobs", {"request": request("hello", rate=0)}, unsampled)).json()["id"]
    await watch(system, job_id)
    with redis.Redis.from_url(system.redis_url) as client:
        assert client.hget(f"dw:{{{job_id}}}:meta", "traceparent").endswith(b"-00")
    later = await submit(system, request("hello", rate=0))
    await watch(system, later)
    await receiver.of_job(later, 3)
    assert [span for span in receiver.spans if span.attributes.get("deltawire.job.id") == job_id] == []


async def test_the_attempts_of_a_job_are_in_one_trace() -> None:
    """A job whose sender has none gets one, and the next worker's attempt is in it; a stop sends the rest."""
    with OtlpReceiver() as receiver:
        environment = receiver.environment | {"DELTAWIRE_SHUTDOWN_GRACE_S": "0"}
        with System(worker_environment=environment) as system:
            app = backend_app(system.redis_url)
            job_id = await asyncio.to_thread(
                send_task, app, request("hello", fault="stall", fail_first=1, rate=0)
            )
            app.close()
            await watch(system, job_id, until=lambda event: event["type"] == "in_progress")
            system.start_worker()
            system.workers[0].signal(signal.SIGTERM)
            await watch(system, job_id)
            first, second = await receiver.of_job(job_id, 2)
    assert first.attributes["deltawire.status"] == "in_progress"
    assert first.attributes["error.type"] == "worker_shutdown"
    assert second.attributes["deltawire.attempt"] == 2
    assert (first.parent_id, second.trace_id, second.parent_id) == ("", first.trace_id, first.span_id)


async def test_a_collector_that_is_away_costs_a_line() -> None:
    """Jobs go on, the log does not fill, and the end waits no longer than it may."""
    from deltawire.redis_server import free_port

    nobody = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://key:secret@127.0.0.1:{free_port()}/key-in-path",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    with System(worker_environment=nobody, relay_environment=nobody) as system:
        for _ in range(3):
            job_id = await submit(system, request("hello", rate=0))
            assert (await watch(system, job_id))[-1]["type"] == "completed"
        services = (system.workers[0], system.relay)
        for service in services:
            service.signal(signal.SIGTERM)
        for service in services:
            assert service.wait(60) == 0
            assert service.log.count("are late or lost") == 1
            assert "Traceback" not in service.log
            assert "secret" not in service.log
            assert "key-in-path" not in service.log
