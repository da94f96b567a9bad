"""The SDK as its users have it: against a whole deltawire."""

import json
import subprocess
import sys
from typing import Any

import pytest

import deltawire
from tests.support.system import System, request

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
            assert other.cancel(job.id, reason="enough").status == "cancelled"
            break
        with pytest.raises(deltawire.JobCancelledError, match="enough") as caught:
            job.result(timeout_s=30)
        assert caught.value.result.text


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
