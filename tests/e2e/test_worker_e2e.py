"""The worker as users run it: Celery in front, real processes all around."""

import asyncio
import base64
import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import pytest
from celery import Celery
from redis import Redis

from tests.support.system import (
    QUEUE,
    TASK,
    WAIT_S,
    Event,
    System,
    backend_app,
    cancel,
    check_whole,
    eventually,
    gateway_records,
    request,
    send_task,
    submit,
    text_of,
    watch,
)

SHORT_VISIBILITY: Final = "import deltawire.queue; deltawire.queue.VISIBILITY_TIMEOUT_S = 4"


@pytest.fixture
def backend(system: System) -> Iterator[Celery]:
    """Somebody's own Celery app, on the broker."""
    with backend_app(system.redis_url) as app:
        yield app


@contextmanager
def celery_events(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """What `celery events`, or Flower, sees meanwhile. The workers are told to send events."""
    seen: list[dict[str, Any]] = []
    ready, stop = threading.Event(), threading.Event()

    def capture() -> None:
        with app.connection() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": seen.append})
            with receiver.consumer_context() as (consuming, _, _):
                ready.set()
                while not stop.is_set():
                    with suppress(TimeoutError):
                        consuming.drain_events(timeout=0.1)

    thread = threading.Thread(target=capture, name="celery-events", daemon=True)
    thread.start()
    try:
        assert ready.wait(WAIT_S)
        assert app.control.enable_events(reply=True, timeout=WAIT_S, limit=1)
        yield seen
    finally:
        stop.set()
        thread.join(WAIT_S)
        assert not thread.is_alive()


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Something of Celery's that blocks."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def record_of(system: System, job_id: str) -> dict[str, Any]:
    """The gateway's record of the job's one request, as soon as there is one."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if records := await gateway_records(system, job_id):
                return records[-1]
            await asyncio.sleep(0.02)


async def is_closed(system: System, job_id: str) -> str:
    """Who closed the upstream connection of the job, when it is closed."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if closed_by := (await record_of(system, job_id))["closed_by"]:
                return str(closed_by)
            await asyncio.sleep(0.02)


def endless_at_first() -> dict[str, Any]:
    """A stream that is not over before its worker goes, however late; for the next one it is short."""
    return request(deltas=60, rate=40, fault="stall", after=40, fail_first=1)


# -- a plain send_task


async def test_a_plain_send_task_is_all_that_a_backend_needs(system: System, backend: Celery) -> None:
    """Its task id is the job id."""
    job_id = send_task(backend, request("Hello", deltas=8))
    events = await watch(system, job_id)
    last = check_whole(events)
    assert [event["type"] for event in events[:3]] == ["queued", "in_progress", "delta"]
    assert last["type"] == "completed"
    assert last["completion"]["choices"][0]["message"]["content"] == text_of(events)
    assert (await record_of(system, job_id))["authorized"]


async def test_a_job_can_be_watched_before_it_is_sent(system: System, backend: Celery) -> None:
    """Who chose the task id need not hurry: nothing is missed, and nothing is an error."""
    job_id = uuid.uuid4().hex
    watching = asyncio.create_task(watch(system, job_id))
    await asyncio.sleep(0.2)
    assert not watching.done()
    assert send_task(backend, request(deltas=3), task_id=job_id) == job_id
    assert check_whole(await watching)["type"] == "completed"


@pytest.mark.parametrize(
    ("kwargs", "code"),
    [
        ({"request": "nonsense"}, "invalid_request"),
        ({"request": request(), "options": {"nonsense": 1}}, "unknown_option"),
        ({"prompt": "x"}, "invalid_request"),
    ],
)
async def test_wrong_arguments_are_told_in_the_log(
    system: System, backend: Celery, kwargs: dict[str, Any], code: str
) -> None:
    """Whatever the message says, it ends in a `failed` event."""
    task = backend.send_task(TASK, kwargs=kwargs, queue=QUEUE)
    last = check_whole(await watch(system, task.id))
    assert (last["type"], last["error"]["code"], last["source"]) == ("failed", code, "request")


async def test_a_job_by_http_needs_no_celery(system: System) -> None:
    """The same worker, the same events."""
    events = await watch(system, await submit(system, request(deltas=5)))
    assert check_whole(events)["type"] == "completed"


# -- what Celery is told


async def test_link_gets_the_jobs_id_and_status(system: System, backend: Celery) -> None:
    """Without a result backend."""
    queue = f"done-{uuid.uuid4().hex}"
    job_id = send_task(backend, request(deltas=2), link=backend.signature("some.callback", queue=queue))
    await watch(system, job_id)
    with Redis.from_url(system.redis_url) as redis:
        [message] = await eventually(lambda: redis.lrange(queue, 0, -1))
    args, _, _ = json.loads(base64.b64decode(json.loads(message)["body"]))
    assert args == [{"job_id": job_id, "status": "completed"}]


async def test_a_job_that_fails_raises_its_code_and_no_more(system: System, backend: Celery) -> None:
    """The text of the failure is for the job's readers; Flower shows the code."""
    with celery_events(backend) as seen:
        job_id = await call(send_task, backend, request(fault="status", status=400))
        assert check_whole(await watch(system, job_id))["type"] == "failed"
        [failed] = await eventually(
            lambda: [event for event in seen if event["type"] == "task-failed" and event["uuid"] == job_id]
        )
    assert failed["exception"] == "JobFailedError('upstream_invalid_request')"


async def test_a_revocation_ends_the_job_and_closes_the_upstream(system: System, backend: Celery) -> None:
    """`revoke(terminate=True)`, by hand or from Flower."""
    job_id = send_task(backend, request(deltas=100_000, rate=50))
    await watch(system, job_id, until=lambda event: event["type"] == "delta")
    await call(backend.control.revoke, job_id, terminate=True)
    last = check_whole(await watch(system, job_id))
    assert last["type"] == "cancelled"
    assert last["cancel"]["reason"] == "task_revoked"
    assert last["cancel"]["upstream_closed_at"] is not None
    assert last["completion"] is not None
    assert await is_closed(system, job_id) == "client"


async def test_a_revocation_of_a_queued_job_ends_it() -> None:
    """`revoke` and `expires` end in a terminal event too, once there is a record."""
    environment = {"DELTAWIRE_CONCURRENCY": "1"}
    with System(worker_environment=environment) as system, backend_app(system.redis_url) as backend:
        busy = await submit(system, request(deltas=100_000, rate=20))
        await watch(system, busy, until=lambda event: event["type"] == "delta")
        job_id = await submit(system, request(deltas=2))
        assert await call(backend.control.revoke, job_id, reply=True, timeout=WAIT_S, limit=1)
        await cancel(system, busy)
        last = (await watch(system, job_id))[-1]
        assert (last["type"], last["cancel"]["reason"]) == ("cancelled", "task_revoked")


# -- nothing of a prompt shows


class Marked:
    """Requests that say something which must not be found anywhere."""

    def __init__(self) -> None:
        self.marker = f"secret{uuid.uuid4().hex}"
        # Long enough to be read after its end, which nobody hurries to do.
        self.options = {"metadata": {"customer": self.marker}, "retention_s": 10}

    def request(self, **script: Any) -> dict[str, Any]:
        script.setdefault("text", "An answer that repeats nothing.")
        return {**request(self.marker, **script), "metadata": {"trace": self.marker}, "user": self.marker}

    def is_in(self, value: object) -> bool:
        """Also where it is hidden in a message's body."""
        text = value if isinstance(value, str) else repr(value)
        return self.marker in text or any(
            base64.b64encode(b"x" * shift + self.marker.encode())[4:-4].decode() in text for shift in range(3)
        )


@pytest.fixture
def marked() -> Marked:
    return Marked()


async def run_all_kinds(system: System, backend: Celery, marked: Marked) -> list[str]:
    """A job that completes, one that fails, one with wrong arguments, one revoked, one cancelled."""
    jobs = [
        await call(send_task, backend, marked.request(), marked.options),
        await call(send_task, backend, marked.request(fault="status", status=400), marked.options),
        await call(send_task, backend, marked.request(fault="error", after=2), marked.options),
        await call(send_task, backend, {"messages": [marked.marker]}, marked.options),
    ]
    revoked = await call(send_task, backend, marked.request(fault="stall", after=2), marked.options)
    await watch(system, revoked, until=lambda event: event["type"] == "delta")
    await call(backend.control.revoke, revoked, terminate=True)
    jobs.append(revoked)
    for job_id in jobs:
        await watch(system, job_id)
    return jobs


async def test_a_prompt_shows_in_no_task_event(system: System, backend: Celery, marked: Marked) -> None:
    """Of jobs that end in any way, as `celery events` and Flower see them."""
    with celery_events(backend) as seen:
        jobs = await run_all_kinds(system, backend, marked)
        ended = {"task-succeeded", "task-failed", "task-revoked"}
        await eventually(lambda: {event["uuid"] for event in seen if event["type"] in ended} >= set(jobs))
    assert {"task-received", "task-started", *ended} <= {event["type"] for event in seen}
    assert [event for event in seen if marked.is_in(event)] == []


async def test_a_prompt_shows_in_no_log(marked: Marked) -> None:
    """Not at the level of debug either, whatever became of the job."""
    environment = {"DELTAWIRE_LOG_LEVEL": "debug", "DELTAWIRE_LOG_FORMAT": "json"}
    with System(worker_environment=environment) as system, backend_app(system.redis_url) as backend:
        await run_all_kinds(system, backend, marked)
        await watch(system, await submit(system, marked.request(), {**marked.options}))
        system.workers[0].signal(signal.SIGTERM)
        await call(system.workers[0].wait, 40)
        assert "job completed" in system.logs()
        assert not marked.is_in(system.logs())


async def test_a_prompt_is_in_no_key_when_its_retention_is_over(marked: Marked) -> None:
    """Nor in the broker's."""
    with System() as system, backend_app(system.redis_url) as backend:
        await run_all_kinds(system, backend, marked)

        over = {repr(b"over " + status) for status in (b"completed", b"failed", b"cancelled")}  # §3.4

        def is_gone() -> bool:
            with Redis.from_url(system.redis_url) as redis:
                held = {key: dump(redis, key) for key in redis.scan_iter()}
            return not any(marked.is_in(key) or marked.is_in(value) for key, value in held.items()) and (
                {value for key, value in held.items() if key.startswith(b"dw:{")} <= over
            )

        await eventually(
            is_gone, timeout_s=60, what="the marker to go, and all but the words that jobs are over"
        )


def dump(redis: Any, key: bytes) -> str:  # redis-py's client is generic in what it returns
    """All that a key holds."""
    match redis.type(key):
        case b"string":
            return repr(redis.get(key))
        case b"list":
            return repr(redis.lrange(key, 0, -1))
        case b"hash":
            return repr(redis.hgetall(key))
        case b"set":
            return repr(redis.smembers(key))
        case b"zset":
            return repr(redis.zrange(key, 0, -1))
        case b"stream":
            return repr(redis.xrange(key))
        case kind:
            assert kind == b"none", kind  # expired meanwhile
            return ""


async def test_a_stored_request_is_erased_with_the_end_of_its_job(system: System, marked: Marked) -> None:
    """While the log stays for its retention."""
    job_id = await submit(system, marked.request(), {"retention_s": 60})
    await watch(system, job_id)
    with Redis.from_url(system.redis_url) as redis:
        assert b"request" not in redis.hgetall(f"dw:{{{job_id}}}:meta")
        assert not marked.is_in(dump(redis, f"dw:{{{job_id}}}:log".encode()))


async def test_a_prompt_shows_in_no_inspection(marked: Marked) -> None:
    """`celery inspect active`, `reserved`, `scheduled` and `query_task`; Flower calls them as well."""
    environment = {"DELTAWIRE_CONCURRENCY": "1"}
    with System(worker_environment=environment) as system, backend_app(system.redis_url) as backend:
        body = marked.request(fault="stall", after=2)
        # A worker takes what is to run later beyond its concurrency; when its time comes it is reserved.
        scheduled = await call(send_task, backend, body, marked.options, countdown=600)
        reserved = await call(send_task, backend, body, marked.options, countdown=4)
        active = await call(send_task, backend, body, marked.options)
        await watch(system, active, until=lambda event: event["type"] == "delta")
        inspect = backend.control.inspect(timeout=WAIT_S, limit=1)
        shown = []
        for name, job_id in (("scheduled", scheduled), ("reserved", reserved), ("active", active)):
            deadline = time.monotonic() + WAIT_S
            while job_id not in (said := repr(await call(getattr(inspect, name)))):
                assert time.monotonic() < deadline, (name, said)
            if marked.is_in(said):
                shown.append(name)
        said = repr(await call(inspect.query_task, [scheduled, reserved, active]))
        assert active in said
        if marked.is_in(said):
            shown.append("query_task")
        assert shown == []


# -- workers come and go


async def test_a_worker_that_is_told_to_stop_lets_its_streams_finish() -> None:
    """SIGTERM: the stream goes on to its end, nothing new is taken, and the exit code is 0."""
    with System(worker_environment={"DELTAWIRE_SHUTDOWN_GRACE_S": "60"}) as system:
        [worker] = system.workers
        job_id = await submit(system, request(deltas=40, rate=40))
        await watch(system, job_id, until=lambda event: event["type"] == "delta")
        worker.signal(signal.SIGTERM)
        late = asyncio.create_task(submit(system, request(deltas=2)))
        assert check_whole(await watch(system, job_id))["type"] == "completed"
        assert await call(worker.wait, 60) == 0, worker.log
        # The job that came meanwhile waits for another worker, and the finished one is not run again.
        system.start_worker()
        assert check_whole(await watch(system, await late))["type"] == "completed"
        assert len(await gateway_records(system, job_id)) == 1


async def test_a_worker_that_is_told_to_stop_leaves_with_its_last_stream() -> None:
    """The grace is a bound, not a duration: a deployment should not take 30 s longer for a stream of one."""
    with System(worker_environment={"DELTAWIRE_SHUTDOWN_GRACE_S": "600"}) as system:
        job_id = await submit(system, request(deltas=30, rate=40))
        await watch(system, job_id, until=lambda event: event["type"] == "delta")
        system.workers[0].signal(signal.SIGTERM)
        assert await call(system.workers[0].wait, 60) == 0


@pytest.mark.parametrize(
    ("options", "ending"),
    [({}, ("failed", "worker_shutdown", 1)), ({"restart": "always"}, ("completed", None, 2))],
    ids=["default", "restart always"],
)
async def test_a_stream_that_outlives_the_grace_gets_its_one_end(
    options: dict[str, Any], ending: tuple[str, str | None, int]
) -> None:
    """By the worker that leaves, or, where the job says so, by the next one (PROTOCOL §2.4)."""
    with System(worker_environment={"DELTAWIRE_SHUTDOWN_GRACE_S": "0.5"}) as system:
        job_id = await submit(system, endless_at_first(), options)
        await watch(system, job_id, until=lambda event: event["type"] == "delta")
        watching = asyncio.create_task(watch(system, job_id, timeout_s=90))
        system.workers[0].signal(signal.SIGTERM)
        assert await call(system.workers[0].wait, 60) == 0
        assert await is_closed(system, job_id) == "client"
        if not options:
            await watching  # no other worker is needed
        system.start_worker()
        last = check_whole(await watching)
        assert (last["type"], last.get("error", {}).get("code"), last["attempt"]) == ending
        with Redis.from_url(system.redis_url) as redis:
            await eventually(lambda: redis.llen("deltawire") == 0 and redis.hlen("dw:unacked") == 0)


@pytest.mark.parametrize(
    ("options", "kind", "attempts"),
    [
        ({}, "failed", 1),
        ({"restart": "always"}, "completed", 2),
    ],
)
async def test_a_worker_that_is_killed_in_mid_stream_is_replaced(
    options: dict[str, Any], kind: str, attempts: int
) -> None:
    """Its message is delivered again when nobody renews it, and the job gets its one terminal event.

    With a visibility time-out of 4 s instead of 60, set by hand: there is no variable for it.
    """
    with System(workers=0) as system:
        victim = system.start_worker(before_main=SHORT_VISIBILITY)
        with backend_app(system.redis_url) as backend:
            backend.conf.broker_transport_options = {}
            job_id = await call(send_task, backend, endless_at_first(), options)
        seen: list[Event] = []
        watching = asyncio.create_task(watch(system, job_id, on_event=seen.append, timeout_s=90))
        await eventually(lambda: sum(event["type"] == "delta" for event in seen) >= 5)
        victim.signal(signal.SIGKILL)
        system.start_worker(before_main=SHORT_VISIBILITY)
        events = await watching
        last = check_whole(events)
        assert last["type"] == kind
        if kind == "failed":
            assert last["error"]["code"] == "worker_lost"
            assert last["completion"]["choices"][0]["message"]["content"] == text_of(events)
        else:
            [at] = [i for i, event in enumerate(events) if event["type"] == "restarted"]
            assert events[at]["discard_through"] == at
            assert last["completion"]["choices"][0]["message"]["content"] == text_of(events[at:])
        assert len(await gateway_records(system, job_id)) == attempts


async def test_two_workers_share_the_work(system: System) -> None:
    """And each job has one attempt."""
    with System(workers=2) as two:
        jobs = [await submit(two, request(deltas=10, rate=50)) for _ in range(20)]
        for events in await asyncio.gather(*(watch(two, job_id) for job_id in jobs)):
            assert check_whole(events)["attempt"] == 1
        assert len(await gateway_records(two)) == 20


# -- Redis goes away under running streams


async def test_killed_connections_of_a_busy_worker_lose_no_stream() -> None:
    """All of its connections at once, several times, with many streams: each log is whole."""
    with System() as system:
        jobs = [await submit(system, request(deltas=120, rate=40)) for _ in range(40)]
        watching = [asyncio.create_task(watch(system, job_id)) for job_id in jobs]
        await watch(system, jobs[-1], until=lambda event: event["type"] == "delta")
        with Redis.from_url(system.redis_url) as redis:
            for _ in range(4):
                for connection in redis.client_list():
                    if connection["name"].startswith("deltawire-worker"):
                        redis.client_kill_filter(_id=connection["id"])
                await asyncio.sleep(0.4)
        for events in await asyncio.gather(*watching):
            assert check_whole(events)["type"] == "completed"
            assert len(events) >= 120
