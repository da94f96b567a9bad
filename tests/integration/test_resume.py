"""A client that is cut anywhere goes on exactly where it stood (PROTOCOL §4.3, §6.4, §7)."""

import json
from collections.abc import Iterator

import pytest

from deltawire.log_fold import LogFold
from deltawire.redis_server import RedisServer
from tests.support.producer import ProducedJob, Producer
from tests.support.readers import (
    Message,
    event_stream,
    is_event,
    numbers,
    read_job,
    read_stream,
    streamed_numbers,
    websocket,
)
from tests.support.relay_process import RelayProcess
from tests.support.sample_events import in_progress, line, restarted

DELTAS = 30


@pytest.fixture(scope="module")
def second_relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """Relays hold no state: a client may come back to another one."""
    with RelayProcess(redis_server.url) as process:
        yield process


async def long_job(jobs: Producer) -> ProducedJob:
    """A whole job with a restart in the middle."""
    job = await jobs.running(*(f"{number} " for number in range(DELTAS // 2)))
    await job.append([line(restarted(job.top + 1, job_id=job.job_id, attempt=1))])
    await job.append([line(in_progress(job.top + 1, job_id=job.job_id, attempt=1))])
    await job.deltas(*(f"{number} " for number in range(DELTAS // 2)))
    await job.end()
    return job


async def test_a_websocket_cut_at_every_event_of_a_finished_job_gets_exactly_the_rest(
    relay: RelayProcess, second_relay: RelayProcess, jobs: Producer
) -> None:
    """For every number n: what is read up to n and, on another relay, after n is the log (§6.4)."""
    job = await long_job(jobs)
    for cut in range(1, job.top):
        async with websocket(f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws") as reader:
            before = [message for message in await reader.until(cut) if is_event(message)]
            reader.connection.transport.abort()
        after = await read_job(second_relay.websocket_url, job.job_id, starting_after=cut)
        assert before + [message for message in after if is_event(message)] == job.events


async def test_an_event_stream_cut_at_every_event_of_a_finished_job_gets_exactly_the_rest(
    relay: RelayProcess, second_relay: RelayProcess, jobs: Producer
) -> None:
    """As a browser's EventSource does it: Last-Event-ID is the last id seen (§7)."""
    job = await long_job(jobs)
    for cut in range(1, job.top):
        async with event_stream(relay.url, job.job_id) as reader:
            before = await reader.until(cut)
        last_id = [message.id for message in before if message.id][-1]
        after = await read_stream(second_relay.url, job.job_id, headers={"Last-Event-ID": str(last_id)})
        seen = [message.data for message in before + after if is_event(message.data)]
        assert seen == job.events


@pytest.mark.parametrize("door", ["websocket", "event stream"])
async def test_a_client_cut_at_every_event_of_a_running_job_misses_nothing(
    door: str, relay: RelayProcess, second_relay: RelayProcess, jobs: Producer
) -> None:
    """It comes back after each single event, to one relay and the other in turn, while deltas flow (§4.3)."""
    job = await jobs.running()
    seen: list[Message] = []
    while not seen or seen[-1]["type"] != "completed":
        if job.top < DELTAS:
            await job.deltas("x", "y")
        elif job.events[-1]["type"] != "completed":
            await job.end()
        at = (relay, second_relay)[len(seen) % 2]
        if door == "websocket":
            url = f"{at.websocket_url}/v1/jobs/{job.job_id}/ws?starting_after={len(seen)}"
            async with websocket(url) as reader:
                assert (await reader.receive())["type"] == "subscribed"
                seen.append(await reader.receive())
                reader.connection.transport.abort()
        else:
            async with event_stream(at.url, job.job_id, starting_after=len(seen)) as stream:
                for _ in range(2):
                    message = await stream.receive()
                assert message is not None
                seen.append(message.data)
    assert seen == job.events


async def test_a_snapshot_at_every_point_is_the_fold_so_far(
    relay: RelayProcess, second_relay: RelayProcess, jobs: Producer
) -> None:
    """After every event of a job: the snapshot is LogFold up to its number, and the rest follows (§6.3)."""
    whole = await long_job(jobs)
    job, fold = await jobs.queued(), LogFold()
    fold.add(job.lines[0])
    await job.claim()
    fold.add(job.lines[1])
    for number, event in enumerate(whole.events[2:-1], 3):
        async with websocket(f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws?mode=snapshot") as reader:
            await check_snapshot(reader.receive, fold, job)
        async with event_stream(second_relay.url, job.job_id, mode="snapshot") as stream:
            messages = await stream.until(job.top)
            assert messages[1].data["completion"] == fold.completion()
            assert messages[1].id == str(fold.sequence_number) == str(number - 1)
        await job.append([json.dumps({**event, "job_id": job.job_id}, separators=(",", ":")).encode()])
        fold.add(job.lines[-1])
    await job.end()
    messages_at_end = await read_job(relay.websocket_url, job.job_id, mode="snapshot")
    assert messages_at_end[1]["completion"] == fold.completion()
    assert numbers(messages_at_end) == [job.top]


async def check_snapshot(receive: object, fold: LogFold, job: ProducedJob) -> None:
    """`subscribed`, then a snapshot that is the fold."""
    assert callable(receive)
    assert (await receive())["latest_sequence_number"] == job.top
    snapshot = await receive()
    assert (snapshot["type"], snapshot["sequence_number"]) == ("snapshot", fold.sequence_number)
    assert snapshot["completion"] == fold.completion()


@pytest.mark.parametrize("position", [0, 1, 5, DELTAS])
async def test_snapshot_and_rest_give_the_final_text_from_any_position(
    position: int, relay: RelayProcess, jobs: Producer
) -> None:
    """Whatever starting_after says, a snapshot and what follows it end in the terminal event (§6.3)."""
    job = await long_job(jobs)
    messages = await read_job(relay.websocket_url, job.job_id, starting_after=position, mode="snapshot")
    assert [message["type"] for message in messages] == ["subscribed", "snapshot", "completed"]
    streamed = await read_stream(relay.url, job.job_id, starting_after=position, mode="snapshot")
    assert streamed_numbers(streamed) == [job.top]
