"""RabbitMQ as the broker: all that holds on Redis holds, and what differs is as docs/rabbitmq.md has it."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import amqp  # type: ignore[import-untyped] # ships no types
import httpx
import pytest
from celery import Celery

from tests.support.code_blocks import blocks
from tests.support.rabbitmq import RabbitMQ
from tests.support.system import (
    QUEUE,
    TASK,
    TERMINAL,
    WAIT_S,
    Event,
    Service,
    System,
    backend_app,
    cancel,
    check_whole,
    eventually,
    gateway_records,
    request,
    send_task,
    show,
    submit,
    watch,
)

DOC: Final = (Path(__file__).parents[2] / "docs" / "rabbitmq.md").read_text()
CONSUMER_TIMEOUT_S: Final = 4
LONG_S: Final = 90
# A broker that starts takes its time on a machine that is busy.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def broker() -> Iterator[RabbitMQ]:
    """A broker that is killed, and that has little patience with consumers: not the whole run's."""
    with RabbitMQ(consumer_timeout_s=CONSUMER_TIMEOUT_S) as broker:
        yield broker


@pytest.fixture(scope="module")
def rabbit_system(broker: RabbitMQ) -> Iterator[System]:
    """Without a worker. All share the one queue that there is, so each test brings its own."""
    with System(broker_url=broker.url, workers=0) as system:
        yield system


@pytest.fixture
async def system(rabbit_system: System, broker: RabbitMQ) -> AsyncIterator[System]:
    """As above. Afterwards the workers stop: no message is left, but a second one of a job that has ended.

    Such a one comes where a worker was killed, and the broker and a sweeper both saw to its jobs.
    """
    yield rabbit_system
    running = [worker for worker in rabbit_system.workers if worker.process.poll() is None]
    for worker in running:
        worker.signal(signal.SIGTERM)
    for worker in running:
        assert await call(worker.wait, LONG_S) == 0
    for job_id in await call(left, broker):
        assert (await show(rabbit_system, job_id))["status"] in TERMINAL


@pytest.fixture
def backend(broker: RabbitMQ) -> Iterator[Celery]:
    """Somebody's own Celery app, on the broker."""
    with backend_app(broker.url) as app:
        yield app


def left(broker: RabbitMQ) -> list[str]:
    """The jobs of the messages that wait; takes them away."""
    jobs = []
    with broker.connect() as connection:
        while message := connection.channel().basic_get(QUEUE, no_ack=True):
            jobs.append(str(message.headers["id"]))
    return jobs


def consumers(broker: RabbitMQ) -> int:
    """Workers that consume, as far as the broker knows: it hears a moment later of one that has gone."""
    with broker.connect() as connection:
        try:
            return int(connection.channel().queue_declare(QUEUE, passive=True).consumer_count)
        except amqp.NotFound:
            return 0


async def start(system: System, broker: RabbitMQ, count: int = 1, **environment: str) -> list[Service]:
    """So many workers, when they take messages. No other one runs."""
    await eventually(lambda: consumers(broker) == 0, what="the workers before to be forgotten")
    workers = [system.launch_worker(environment) for _ in range(count)]
    await eventually(lambda: consumers(broker) == count, timeout_s=LONG_S, what="the workers to consume")
    return workers


async def stream(system: System, job_id: str) -> "asyncio.Task[list[Event]]":
    """Watches the job, when its first delta has come, to its end."""
    await watch(system, job_id, until=lambda event: event["type"] == "delta")
    return asyncio.create_task(watch(system, job_id, timeout_s=LONG_S))


async def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Something of Celery's that blocks."""
    return await asyncio.to_thread(function, *args, **kwargs)


# -- senders


async def test_the_code_of_the_documentation_enqueues(system: System, broker: RabbitMQ) -> None:
    """On a broker that has no queue yet, so that the declarations of both are the same."""
    [code] = [block.code for block in blocks(DOC) if block.language == "python"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code.replace("amqp://guest:guest@127.0.0.1:5672//", broker.url)),
        stdout=asyncio.subprocess.PIPE,
    )
    job_id = (await process.communicate())[0].decode().strip()
    await start(system, broker)
    assert check_whole(await watch(system, job_id))["type"] == "completed"


async def test_a_classic_queue_is_refused(system: System, broker: RabbitMQ, backend: Celery) -> None:
    """To a sender that names the queue only, when ours is there; to us, when its is, until it is deleted."""
    with backend_app(broker.url) as app, pytest.raises(amqp.PreconditionFailed):
        app.send_task(TASK, kwargs={"request": request()}, queue=QUEUE)
    broker.delete_queue(QUEUE)
    with broker.connect() as connection:
        connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False)
    worker = system.start_worker()
    await eventually(lambda: "inequivalent arg 'x-queue-type'" in worker.log)
    with pytest.raises(AssertionError, match="queue_unavailable"):
        await submit(system, request())
    broker.delete_queue(QUEUE)
    job_id = await submit(system, request(deltas=3))
    assert check_whole(await watch(system, job_id, timeout_s=LONG_S))["type"] == "completed"
    # The refused one has a record, so that a sweeper sends it sooner or later: not amid another test.
    async with httpx.AsyncClient(base_url=system.relay_url, trust_env=False, timeout=WAIT_S) as http:
        for job in (await http.get("/v1/jobs", params={"status": "queued"})).json()["data"]:
            await cancel(system, job["id"])


# -- what Celery is told


async def test_a_job_is_what_it_is_on_redis(system: System, broker: RabbitMQ, backend: Celery) -> None:
    """By POST and by a bare send_task, now or in a second, and cancelled or revoked while it runs."""
    await start(system, broker)
    endless = request(deltas=100_000, rate=50)
    jobs = {
        "posted": await submit(system, request(deltas=5)),
        "sent": send_task(backend, request(deltas=5)),
        "later": send_task(backend, request(deltas=5), countdown=1),
        "wrong": str(send_task(backend, "nonsense")),
        "cancelled": await submit(system, endless),
        "revoked": send_task(backend, endless),
        "limited": send_task(backend, endless, soft_time_limit=3),  # after its first delta
    }
    ends = {name: asyncio.create_task(watch(system, job_id)) for name, job_id in jobs.items()}
    for name in ("cancelled", "revoked"):
        await watch(system, jobs[name], until=lambda event: event["type"] == "delta")
    assert (await cancel(system, jobs["cancelled"]))["cancelled_from"] == "in_progress"
    await call(backend.control.revoke, jobs["revoked"], terminate=True)
    last = {name: check_whole(await end) for name, end in ends.items()}
    assert {name: event["type"] for name, event in last.items()} == {
        **dict.fromkeys(("posted", "sent", "later"), "completed"),
        "wrong": "failed",
        "cancelled": "cancelled",
        "revoked": "cancelled",
        "limited": "incomplete",
    }
    assert last["revoked"]["cancel"]["reason"] == "task_revoked"
    with broker.connect() as connection, pytest.raises(amqp.NotFound):  # Celery's, for delayed messages
        connection.channel().queue_declare("celery_delayed_0", passive=True)


async def test_a_queued_job_can_be_ended(system: System, broker: RabbitMQ, backend: Celery) -> None:
    """By cancelling, with no worker there; by `revoke`, when a busy worker has taken its message."""
    cancelled = await submit(system, request(deltas=2))
    assert (await cancel(system, cancelled))["status"] == "cancelled"
    await start(system, broker, DELTAWIRE_CONCURRENCY="1")
    occupying = await submit(system, request(deltas=100_000, rate=40))
    busy = await stream(system, occupying)
    revoked = await submit(system, request(deltas=2))
    assert await call(backend.control.revoke, revoked, reply=True, timeout=WAIT_S, limit=1)
    assert (await cancel(system, occupying))["cancelled_from"] == "in_progress"
    last = check_whole(await watch(system, revoked))
    assert (last["type"], last["cancel"]["reason"]) == ("cancelled", "task_revoked")
    assert check_whole(await busy)["cancel"]["reason"] != "task_revoked"
    assert await gateway_records(system, cancelled) == await gateway_records(system, revoked) == []


async def test_link_is_called(system: System, broker: RabbitMQ, backend: Celery) -> None:
    """With the job's id and status, and no result backend."""
    await start(system, broker)
    job_id = send_task(backend, request(deltas=2), link=backend.signature("some.callback", queue="done"))
    await watch(system, job_id)

    def answer() -> Any:
        with broker.connect() as connection:
            try:
                return connection.channel().basic_get("done", no_ack=True)
            except amqp.NotFound:
                return None

    message = await eventually(answer)
    assert json.loads(message.body)[0] == [{"job_id": job_id, "status": "completed"}]


# -- workers come and go


def endless_at_first() -> dict[str, Any]:
    """A stream that is not over before its worker goes, however late; for the next one it is short."""
    return request(deltas=120, rate=40, fault="stall", after=100, fail_first=1)


async def test_a_killed_workers_jobs_go_on_elsewhere(system: System, broker: RabbitMQ) -> None:
    """Their messages come at once; the next attempt waits for the lease."""
    [victim] = await start(system, broker)
    ends = [
        await stream(system, await submit(system, endless_at_first())),
        await stream(system, await submit(system, endless_at_first(), {"restart": "always"})),
    ]
    victim.signal(signal.SIGKILL)
    await start(system, broker)
    lost, restarted = [check_whole(await end) for end in ends]
    assert (lost["type"], lost["error"]["code"]) == ("failed", "worker_lost")
    assert (restarted["type"], restarted["attempt"]) == ("completed", 2)


async def test_a_worker_that_is_told_to_stop_hands_over(system: System, broker: RabbitMQ) -> None:
    """What its grace suffices for it ends; the rest is the next worker's, or nobody's."""
    [worker] = await start(system, broker, DELTAWIRE_SHUTDOWN_GRACE_S="1.5")
    short = await stream(system, await submit(system, request(deltas=20, rate=40)))
    lost = await stream(system, await submit(system, endless_at_first()))
    again = await stream(system, await submit(system, endless_at_first(), {"restart": "always"}))
    worker.signal(signal.SIGTERM)
    assert await call(worker.wait, LONG_S) == 0
    assert check_whole(await short)["type"] == "completed"
    assert check_whole(await lost)["error"]["code"] == "worker_shutdown"
    await start(system, broker)
    last = check_whole(await again)
    assert (last["type"], last["attempt"]) == ("completed", 2)


# -- the broker comes and goes


async def test_a_broker_that_is_restarted_ends_no_stream(system: System, broker: RabbitMQ) -> None:
    """All messages come again, maybe to the other worker: each job runs once, and no worker ends.

    Some jobs end while the broker is away, and some when it is there again.
    """
    workers = await start(system, broker, 2)
    ids = [await submit(system, request(deltas=40 * s, rate=40)) for s in (2, 14) for _ in range(6)]
    ends = [await stream(system, job_id) for job_id in ids]
    await call(broker.restart)
    await eventually(lambda: consumers(broker) == 2, timeout_s=LONG_S, what="the workers to come back")
    after = await submit(system, request(deltas=3))
    assert check_whole(await watch(system, after))["type"] == "completed"
    for job_id, end in zip(ids, ends, strict=True):
        last = check_whole(await end)
        assert (last["type"], last["attempt"]) == ("completed", 1)
        assert len(await gateway_records(system, job_id)) == 1
    # Told to stop, they wait for what runs and acknowledge it. Only what the worker that has no part in a job
    # held for too long, to look at it twice, may come again: after the job's end, where it asks nobody.
    for worker in workers:
        assert worker.process.poll() is None, worker.log
        worker.signal(signal.SIGTERM)
    for worker in workers:
        assert await call(worker.wait, LONG_S) == 0
        assert "Traceback" not in worker.log
        assert "critical" not in worker.log
    for job_id in left(broker):
        assert (await show(system, job_id))["status"] in TERMINAL


async def test_a_job_may_take_longer_than_a_message_may_be_held(system: System, broker: RabbitMQ) -> None:
    """RabbitMQ closes the channel; the worker gets the message again, and goes on with what it streams."""
    [worker] = await start(system, broker)
    job_id = await submit(system, request(deltas=100_000, rate=40))
    end = await stream(system, job_id)
    await eventually(lambda: "delivery acknowledgement on channel 1 timed out" in worker.log)
    await eventually(lambda: consumers(broker) == 1, what="the worker to consume again")
    so_far = (await show(system, job_id))["latest_sequence_number"]
    await watch(system, job_id, until=lambda event: event["sequence_number"] > so_far + 20)
    await cancel(system, job_id)
    last = check_whole(await end)
    assert (last["type"], last["attempt"]) == ("cancelled", 1)
    assert len(await gateway_records(system, job_id)) == 1
    assert worker.process.poll() is None
