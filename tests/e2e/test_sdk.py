"""The SDK as its users have it: against a whole deltawire."""

import asyncio
import json
import subprocess
import sys
from typing import Any, Literal

import pytest
from pydantic import BaseModel

import deltawire
from tests.support.system import System, backend_app, request

TRANSPORTS = ("websocket", "sse")
HAIKU = {"model": "gpt-5.4", "messages": [{"role": "user", "content": "Write a haiku about streaming."}]}
TEXT = "Whisper of tokens,\nword by word the river fills;\nno one waits for all."


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_a_job_by_the_sync_client(system: System, transport: Any) -> None:
    """Submit, read its text, its events and its result; each as often as one likes."""
    with deltawire.Client(system.relay_url, transport=transport) as client:
        job = client.submit(HAIKU, {"metadata": {"message": "7"}})
        assert job.status == "queued"
        assert "".join(job.text()) == TEXT
        result = job.result(timeout_s=30)
        assert (result.text, result.status, result.metadata) == (TEXT, "completed", {"message": "7"})
        assert result.usage is not None
        assert client.job(job.id).wait() == result
        with job.stream() as stream:
            numbers = [event.sequence_number for event in stream]
        assert numbers == list(range(1, stream.position + 1))
        assert stream.completion == result.completion
        assert stream.result == result


async def test_a_job_by_the_async_client(system: System, transport: Any) -> None:
    """The same, awaited."""
    async with deltawire.AsyncClient(system.relay_url, transport=transport) as client:
        job = await client.submit(HAIKU, {"metadata": {"message": "7"}})
        assert "".join([text async for text in job.text()]) == TEXT
        result = await job.result(timeout_s=30)
        assert (result.text, result.status, result.metadata) == (TEXT, "completed", {"message": "7"})
        assert await client.job(job.id).wait() == result
        async with job.stream() as stream:
            numbers = [event.sequence_number async for event in stream]
        assert numbers == list(range(1, stream.position + 1))
        assert stream.completion == result.completion
        assert stream.result == result


def test_a_job_that_was_cancelled_says_so(system: System) -> None:
    """By another client; the reader gets what there is of the answer."""
    with deltawire.Client(system.relay_url) as client, deltawire.Client(system.relay_url) as other:
        job = client.submit(request(deltas=100_000, rate=50))
        for _ in job.text():
            assert other.cancel(job.id, reason="enough").cancelled_from == "in_progress"
            break
        with pytest.raises(deltawire.JobCancelledError, match="enough") as caught:
            job.result(timeout_s=30)
        assert caught.value.result.text


async def test_commands_are_there_in_both_kinds(system: System) -> None:
    """What a job is, which there are, and its end for good."""
    with deltawire.Client(system.relay_url) as client:
        job = client.submit(HAIKU)
        job.wait(timeout_s=30)
        assert client.retrieve(job.id) == job.retrieve()
        assert job.id in [one["id"] for one in client.list(limit=100, status="completed")["data"]]
        assert job.cancel().status == client.cancel(job.id).status == "completed"
        client.delete(job.id)
        with pytest.raises(deltawire.NotFoundError):
            client.delete(job.id)
    async with deltawire.AsyncClient(system.relay_url) as aclient:
        ajob = await aclient.submit(HAIKU)
        await ajob.wait(timeout_s=30)
        assert await aclient.retrieve(ajob.id) == await ajob.retrieve()
        assert ajob.id in [one["id"] for one in (await aclient.list(limit=100))["data"]]
        assert (await ajob.cancel()).status == (await aclient.cancel(ajob.id)).status == "completed"
        await aclient.delete(ajob.id)
        with pytest.raises(deltawire.NotFoundError):
            await aclient.retrieve(ajob.id)


class City(BaseModel):
    """As a caller declares what the answer is to be."""

    name: str
    kind: Literal["capital", "other"] = "other"
    twin: "City | None" = None


class Colour(BaseModel):
    red: int


def test_an_answer_is_parsed_as_the_callers_model(system: System) -> None:
    """The model's schema goes with the request, and the answer comes as the model."""
    said = City(name="Bern", kind="capital", twin=City(name="Thun"))
    with deltawire.Client(system.relay_url) as client:
        job = client.submit(request(text=said.model_dump_json()), response_format=City)
        result = job.result(timeout_s=30)
        assert result.parsed == result.parse(City) == said
        # Whoever knows no more than the id names the model, or takes the JSON.
        other = client.job(job.id).result()
        assert other.parsed == said.model_dump()
        assert other.parse(City) == said
        with pytest.raises(deltawire.OutputError, match="Colour") as caught:
            other.parse(Colour)
        assert caught.value.reason == "not_valid"
        # A gateway need not keep to the schema.
        bad = client.submit(request(text='{"name": 1}'), response_format=City).result(timeout_s=30)
        with pytest.raises(deltawire.OutputError) as caught:
            _ = bad.parsed
        assert caught.value.reason == "not_valid"
        assert client.job(bad.id).result().text == '{"name": 1}'


def test_tool_calls_are_given_when_they_are_whole(system: System) -> None:
    """Arguments as text and as an object; half a call is none."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    body = {**request("What is the weather in Bern?"), "tools": [tool]}
    with deltawire.Client(system.relay_url) as client:
        (call,) = client.submit(body).result(timeout_s=30).tool_calls
        assert call.name == "weather"
        assert call.id
        assert json.loads(call.arguments) == call.parsed
        assert call.parsed is not None
        assert isinstance(call.parsed["city"], str)
        half = {**body, "script": {"fault": "cut", "after": 1}}
        result = client.submit(half).wait(timeout_s=30)
        assert (result.status, result.tool_calls) == ("incomplete", [])


def test_a_job_goes_straight_to_the_broker(system: System) -> None:
    """By an app that knows nothing of us; the handle is the same, and a repeat is the same job."""
    with backend_app(system.broker_url) as app, deltawire.Client(system.relay_url, celery=app) as client:
        job = client.submit(HAIKU, {"metadata": {"message": "7"}}, idempotency_key="once")
        assert client.submit(HAIKU, idempotency_key="once").id == job.id
        assert "".join(job.text()) == TEXT
        assert job.result(timeout_s=30).metadata == {"message": "7"}
        assert client.submit(HAIKU).id != client.submit(HAIKU).id
        with pytest.raises(deltawire.InvalidRequestError, match="no option 'tiemout_s'"):
            client.submit(HAIKU, {"tiemout_s": 1})


async def test_a_loop_goes_on_while_a_job_goes_to_the_broker(system: System) -> None:
    """Sending blocks for milliseconds, or for seconds where the broker is away; so it is done in a thread."""
    with backend_app(system.broker_url) as app:
        async with deltawire.AsyncClient(system.relay_url, celery=app) as client:
            job = await client.submit(HAIKU)
            assert (await job.result(timeout_s=30)).text == TEXT
    with backend_app("redis://127.0.0.1:1/0") as app:
        app.conf.broker_connection_timeout = 1
        async with deltawire.AsyncClient(system.relay_url, celery=app) as client:
            submitting = asyncio.create_task(client.submit(HAIKU))
            turns = 0
            while not submitting.done():
                await asyncio.sleep(0.001)
                turns += 1
            assert turns > 10
            with pytest.raises(deltawire.ServerError) as caught:
                await submitting
    assert caught.value.error is not None
    assert caught.value.error.code == "queue_unavailable"


def test_services_do_not_load_what_only_the_client_needs() -> None:
    """Worker and relay import `deltawire`, too."""
    code = "import deltawire, deltawire.errors, sys, json; print(json.dumps(sorted(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert not {"httpx", "websockets", "celery", "deltawire.client"} & set(json.loads(told))


def test_what_is_exported_is_there() -> None:
    """Names are loaded late, and all of them can be."""
    assert all(getattr(deltawire, name) for name in deltawire.__all__)
    assert set(deltawire.__all__) <= set(dir(deltawire))
    with pytest.raises(AttributeError, match="Clint"):
        deltawire.Clint  # noqa: B018 - it is the look-up that is tested
