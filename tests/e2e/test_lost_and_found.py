"""What is lost is found again: workers, messages, answers to a POST. In real processes."""

import asyncio
import signal
from collections.abc import Iterator

import httpx
import pytest
from redis import Redis

from tests.support.system import (
    QUEUE,
    TASK,
    WAIT_S,
    System,
    backend_app,
    check_whole,
    eventually,
    gateway_records,
    request,
    send_task,
    show,
    submit,
    watch,
)

#: The broker delivers a lost worker's messages again after an hour: whoever is quicker is a sweeper.
LONG_VISIBILITY = "import deltawire.queue; deltawire.queue.VISIBILITY_TIMEOUT_S = 3600"


@pytest.fixture(scope="module")
def found() -> Iterator[System]:
    """A deltawire of this module's own: its workers come and go."""
    with System() as system:
        yield system


async def first_delta(system: System, job_id: str) -> None:
    await watch(system, job_id, until=lambda event: event["type"] == "delta")


async def test_one_idempotency_key_makes_one_job(found: System) -> None:
    """Of fifty posts at once to several relays; also by a second message, and after the end."""
    await asyncio.to_thread(found.launch_relay().wait_until_ready)
    relays = [f"http://127.0.0.1:{port}" for port in found.relay_ports]
    body = {"request": request(deltas=30, rate=40)}

    async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:

        async def post(number: int) -> httpx.Response:
            url = f"{relays[number % len(relays)]}/v1/jobs"
            return await client.post(url, json=body, headers={"Idempotency-Key": "one"})

        answers = await asyncio.gather(*map(post, range(50)))
        assert {answer.status_code for answer in answers} == {202}
        [job_id] = {answer.json()["id"] for answer in answers}
        assert check_whole(await watch(found, job_id))["type"] == "completed"
        again = await asyncio.gather(*map(post, range(4)))
        assert {(a.status_code, a.json()["id"], a.json()["status"]) for a in again} == {
            (202, job_id, "completed")
        }
    with Redis.from_url(found.redis_url) as redis:
        await eventually(lambda: redis.llen(QUEUE) == 0 and redis.hlen("dw:unacked") == 0)
    assert len(await gateway_records(found, job_id)) == 1


async def test_a_message_that_is_delivered_many_times_runs_once(found: System) -> None:
    """To two workers: one attempt, one request upstream."""
    second = await asyncio.to_thread(found.start_worker)
    try:
        with backend_app(found.redis_url) as backend:
            body = request(deltas=30, rate=40)
            job_id = await asyncio.to_thread(send_task, backend, body)
            for _ in range(10):
                await asyncio.to_thread(send_task, backend, body, task_id=job_id)
        last = check_whole(await watch(found, job_id))
        assert (last["type"], last["attempt"]) == ("completed", 1)
        with Redis.from_url(found.redis_url) as redis:
            await eventually(lambda: redis.llen(QUEUE) == 0 and redis.hlen("dw:unacked") == 0)
        assert len(await gateway_records(found, job_id)) == 1
    finally:
        await asyncio.to_thread(second.stop)


async def test_a_message_whose_record_is_gone_is_one_line_in_the_log(found: System) -> None:
    """As when Redis lost the record and the broker kept the message; it is gone, too, then."""
    with backend_app(found.redis_url) as backend:
        backend.send_task(TASK, task_id="gone", queue=QUEUE)
    await eventually(lambda: "job gone has no record" in found.workers[0].log)
    assert "Traceback" not in found.workers[0].log
    with Redis.from_url(found.redis_url) as redis:
        await eventually(lambda: redis.llen(QUEUE) == 0 and redis.hlen("dw:unacked") == 0)


@pytest.mark.timeout(300)
async def test_a_killed_workers_jobs_are_looked_after_by_the_relay_alone(found: System) -> None:
    """Those with deltas end, those without go to the next worker; what waits too long ends meanwhile."""
    with backend_app(found.redis_url) as backend:
        bare = await asyncio.to_thread(send_task, backend, request(deltas=10_000, rate=20))
    streaming = await submit(found, request(deltas=10_000, rate=20))
    silent = await submit(found, request(deltas=3, fault="stall", fail_first=1))
    await asyncio.gather(first_delta(found, bare), first_delta(found, streaming))
    await watch(found, silent, until=lambda event: event["type"] == "in_progress")
    found.workers[0].signal(signal.SIGKILL)
    await asyncio.to_thread(found.workers[0].wait)
    late = await submit(found, request(), {"queue_timeout_s": 3})
    for job_id, code in ((bare, "worker_lost"), (streaming, "worker_lost"), (late, "queue_timeout")):
        last = check_whole(await watch(found, job_id, timeout_s=2 * WAIT_S))
        assert (last["type"], last["error"]["code"]) == ("failed", code)
    assert (await show(found, silent))["status"] == "in_progress"
    await asyncio.to_thread(found.start_worker, before_main=LONG_VISIBILITY)
    last = check_whole(await watch(found, silent, timeout_s=2 * WAIT_S))
    assert (last["type"], last["attempt"]) == ("completed", 2)


async def test_a_message_that_the_broker_lost_is_sent_again() -> None:
    """The record knows of the job."""
    with System(workers=0) as system, Redis.from_url(system.redis_url) as redis:
        job_id = await submit(system, request(deltas=3))
        assert redis.delete(QUEUE) == 1
        worker = system.launch_worker()
        last = check_whole(await watch(system, job_id, timeout_s=2 * WAIT_S))
        assert (last["type"], last["attempt"]) == ("completed", 1)
        assert worker.process.poll() is None
