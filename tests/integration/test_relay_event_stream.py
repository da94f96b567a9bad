"""The relay's event streams, on a real process and a real Redis (PROTOCOL §7)."""

import asyncio

import pytest

from deltawire.redis_server import RedisServer
from deltawire_relay import event_stream as event_stream_module
from deltawire_relay import hub as hub_module
from deltawire_relay import hubs as hubs_module
from deltawire_relay import looks as looks_module
from tests.support.producer import Producer
from tests.support.readers import (
    WAIT_S,
    event_stream,
    http_client,
    read_stream,
    streamed_numbers,
)
from tests.support.relay_process import Keyring, RelayProcess, relay_in_process

KEYS = Keyring(acme=("acme", ["read"]))


async def test_a_stream_begins_with_subscribed_and_carries_every_event(
    relay: RelayProcess, jobs: Producer
) -> None:
    """Each event's number is its id, control messages have none, and the stream ends with the job (§7)."""
    job = await jobs.running("a", "b")
    async with event_stream(relay.url, job.job_id) as reader:
        messages = await reader.until(4)
        await job.deltas("c")
        await job.end()
        messages += await reader.rest()
    assert (messages[0].id, messages[0].data["type"]) == (None, "subscribed")
    assert [message.data for message in messages[1:]] == job.events
    assert streamed_numbers(messages) == [1, 2, 3, 4, 5, 6]


async def test_headers_keep_proxies_from_holding_it_back(relay: RelayProcess, jobs: Producer) -> None:
    """text/event-stream that nobody stores, transforms or buffers, and `retry` with jitter (§7)."""
    job = await jobs.ended("a")
    retries = set()
    for _ in range(5):
        async with event_stream(relay.url, job.job_id) as reader:
            await reader.rest()
            headers = reader.response.headers
            retries.update(reader.retries)
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert headers["Cache-Control"] == "no-store, no-transform"
        assert headers["X-Accel-Buffering"] == "no"
        assert "Content-Length" not in headers
    assert len(retries) > 1
    assert all(500 <= retry <= 10_000 for retry in retries)


async def test_starting_after_and_last_event_id(relay: RelayProcess, jobs: Producer) -> None:
    """Both say where the client stands; Last-Event-ID, which a browser sends, beats the URL (§7)."""
    job = await jobs.ended("a", "b")
    assert streamed_numbers(await read_stream(relay.url, job.job_id, starting_after=3)) == [4, 5]
    assert streamed_numbers(
        await read_stream(relay.url, job.job_id, headers={"Last-Event-ID": "2"}, starting_after=4)
    ) == [3, 4, 5]
    assert streamed_numbers(
        await read_stream(relay.url, job.job_id, headers={"Last-Event-ID": ""}, starting_after=4)
    ) == [5]


@pytest.mark.parametrize("mode", ["replay", "snapshot"])
async def test_past_the_end_there_is_204(mode: str, relay: RelayProcess, jobs: Producer) -> None:
    """A reconnect from the terminal event on gets 204, which stops an EventSource (§7)."""
    job = await jobs.ended("a")
    async with http_client(base_url=relay.url) as client:
        for where in (
            {"params": {"starting_after": job.top, "mode": mode}},
            {"headers": {"Last-Event-ID": str(job.top)}, "params": {"mode": mode}},
        ):
            answer = await client.get(f"/v1/jobs/{job.job_id}/events", **where)
            assert (answer.status_code, answer.content) == (204, b"")


async def test_a_position_above_the_end_is_not_the_end(relay: RelayProcess, jobs: Producer) -> None:
    """Who stands above an ended log is told so, with a snapshot and the terminal event (§4.1)."""
    job = await jobs.ended("a")
    messages = await read_stream(relay.url, job.job_id, starting_after=job.top + 5)
    assert [message.data["type"] for message in messages] == ["subscribed", "snapshot", "completed"]
    assert messages[0].data["recovered"] is False


async def test_a_snapshot_has_an_id(relay: RelayProcess, jobs: Producer) -> None:
    """A snapshot moves the client's position to the number that it stands for (§7)."""
    job = await jobs.running("Hel", "lo")
    async with event_stream(relay.url, job.job_id, mode="snapshot") as reader:
        _, snapshot = await reader.until(4)
        assert (snapshot.id, snapshot.data["type"], snapshot.data["sequence_number"]) == ("4", "snapshot", 4)
        assert snapshot.data["completion"]["choices"][0]["message"]["content"] == "Hello"
        await job.end()
        assert streamed_numbers(await reader.rest()) == [5]


async def test_an_unknown_job_is_waited_for_then_refused(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`subscribed` unknown, comments while nothing comes, then `error` without an id, and the end (§7)."""
    monkeypatch.setattr(hub_module, "UNKNOWN_JOB_TIMEOUT_S", 1.0)
    monkeypatch.setattr(looks_module, "CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(event_stream_module, "COMMENT_INTERVAL_S", 0.05)
    async with (
        relay_in_process(redis_server.url, monkeypatch) as address,
        event_stream(f"http://{address}", "nobody") as reader,
    ):
        messages = await reader.rest()
        assert [message.data["type"] for message in messages] == ["subscribed", "error"]
        assert messages[0].data["status"] == "unknown"
        assert messages[1].data["error"]["code"] == "unknown_job"
        assert [message.id for message in messages] == [None, None]
        assert len(reader.comments) >= 2


async def test_another_tenants_job_looks_like_none(redis_server: RedisServer, jobs: Producer) -> None:
    """Its stream says what that of a job which does not exist says; nor is there a 204 (§4.8)."""
    job = await jobs.ended("a", tenant="umbrella")
    said = []
    with RelayProcess(redis_server.url, {"DELTAWIRE_API_KEYS": KEYS.text}) as relay:
        for job_id in (job.job_id, jobs.job().job_id):
            async with event_stream(
                relay.url, job_id, headers=KEYS.headers("acme"), starting_after=job.top, mode="snapshot"
            ) as reader:
                message = await reader.receive()
                assert message is not None
                assert message.data.pop("job_id") == job_id
                said.append((message.id, message.data))
    assert said[0] == said[1]


async def test_a_stream_ends_when_the_relay_drains(redis_server: RedisServer, jobs: Producer) -> None:
    """`goodbye` and a `retry` for EventSource, then an end in good order; exit code 0 (§7)."""
    job = await jobs.running("a")
    with RelayProcess(redis_server.url) as relay:
        async with event_stream(relay.url, job.job_id) as reader:
            await reader.until(3)
            relay.terminate()
            messages = await reader.rest()
            assert len(reader.retries) == 2
        assert [message.data["type"] for message in messages] == ["goodbye"]
        assert (messages[0].id, messages[0].data["code"]) == (None, 4001)
        assert await asyncio.to_thread(relay.wait) == 0
        assert "Traceback" not in relay.log


async def test_a_reader_that_goes_leaves_nothing(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the client is gone, its subscriber and its hub are, too (§4.7)."""
    made: list[hubs_module.Hubs] = []
    original = hubs_module.Hubs.__init__

    def noted(self: hubs_module.Hubs, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type] # handed on
        made.append(self)

    monkeypatch.setattr(hubs_module.Hubs, "__init__", noted)
    job = await jobs.running("a")
    async with relay_in_process(redis_server.url, monkeypatch) as address:
        for _ in range(3):
            async with event_stream(f"http://{address}", job.job_id) as reader:
                await reader.until(3)
                assert len(made[0]) == 1
            async with asyncio.timeout(WAIT_S):
                while len(made[0]):  # noqa: ASYNC110 - the server's own, which tells nobody
                    await asyncio.sleep(0.005)


async def test_head_tells_the_headers_and_ends(relay: RelayProcess, jobs: Producer) -> None:
    """HEAD of a stream answers at once, and the connection is free for the next request (RFC 9110 §9.3.2)."""
    job = await jobs.running("a")
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    try:
        writer.write(
            f"HEAD /v1/jobs/{job.job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
            "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        async with asyncio.timeout(10):  # before any sign of life of a stream
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 ")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
