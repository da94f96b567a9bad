"""Upstreams as real workers have them, on both brokers: jobs that wait for one, keys that nobody may see."""

import asyncio
import base64
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from celery.utils import uuid
from kombu.entity import Queue
from redis import Redis

from deltawire.queue import QUEUE as OUR_QUEUE
from tests.support.rabbitmq import RabbitMQ
from tests.support.system import (
    QUORUM,
    TASK,
    UPSTREAM_API_KEY,
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

SOON: Final = "import deltawire_worker.retry; deltawire_worker.retry.MAX_SLEEP_S = 1.0"
"""So that short waits are long ones."""
ENV_KEY, FILE_KEY, HEADER = "sk-env-0123456789", "sk-file-0123456789", "Basic aGVhZGVyOmtleTA5"


def refused_once(retry_after_s: float) -> dict[str, Any]:
    """A request that is to come again, and is answered then."""
    return request(deltas=3, fault="status", status=429, retry_after=str(retry_after_s), fail_first=1)


def configuration(system: System, directory: Path) -> dict[str, str]:
    """Three upstreams that are all the gateway's, with keys in all forms."""
    (directory / "key").write_text(FILE_KEY)
    url = f"base_url = '{system.gateway_url}/v1'"
    (directory / "upstreams.toml").write_text(
        f"""
        [upstreams.inline]
        {url}
        api_key = '{UPSTREAM_API_KEY}'
        headers = {{ X-Team = '{HEADER}' }}
        [upstreams.env]
        {url}
        api_key_env = 'SOME_KEY'
        models = ['env-model']
        [upstreams.file]
        {url}
        api_key_file = '{directory}/key'
        models = ['file-model']
        """
    )
    return {
        "DELTAWIRE_UPSTREAMS_FILE": str(directory / "upstreams.toml"),
        "DELTAWIRE_UPSTREAM_BASE_URL": "",
        "DELTAWIRE_UPSTREAM_API_KEY": "",
        "DELTAWIRE_LOG_LEVEL": "debug",
        "SOME_KEY": ENV_KEY,
    }


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One worker of these upstreams, which logs all that it can."""
    directory = tmp_path_factory.mktemp("upstreams")
    broker_url = None
    if request.param == "rabbitmq":
        broker: RabbitMQ = request.getfixturevalue("rabbitmq")
        broker_url = broker.url
    with System(workers=0, broker_url=broker_url) as system:
        system.start_worker(configuration(system, directory), before_main=SOON)
        yield system


async def test_a_parked_job_comes_back_by_itself(system: System) -> None:
    """Its message is acknowledged, sent again when it is due, and its `link` is called once, at the end."""
    with backend_app(system.broker_url) as backend, Redis.from_url(system.redis_url) as redis:
        link = backend.signature("some.callback", queue="parked-done")
        job_id = await asyncio.to_thread(send_task, backend, refused_once(5), link=link)
        watching = asyncio.create_task(watch(system, job_id, timeout_s=60))
        await eventually(lambda: redis.hget(f"dw:{{{job_id}}}:meta", "status") == b"queued")
        assert (await show(system, job_id))["status"] == "queued"
        events = await watching
        last = check_whole(events)
        assert last["type"] == "completed"
        kinds = [event["type"] for event in events if event["type"] != "delta"]
        assert kinds == ["queued", "in_progress", "retrying", "in_progress", "completed"]
        waited_s = events[3]["created_at"] - events[2]["created_at"]
        assert waited_s >= 5
        assert len(await gateway_records(system, job_id)) == 2
        with backend.connection_for_read() as connection, connection.SimpleQueue("parked-done") as done:
            message = await asyncio.to_thread(done.get, timeout=20)
            message.ack()
            assert message.payload[0] == [{"job_id": job_id, "status": "completed"}]
            with pytest.raises(done.Empty):
                await asyncio.to_thread(done.get, timeout=0.5)


async def test_what_comes_after_a_parked_job_comes(system: System) -> None:
    """The rest of its chain: what its message said besides the job is said by the one that comes back."""
    with backend_app(system.broker_url) as backend:
        queue: Any = OUR_QUEUE
        if system.broker_url.startswith("amqp"):
            # kombu has few types
            queue = Queue(OUR_QUEUE, queue_arguments=QUORUM)  # type: ignore[no-untyped-call]
        job = backend.signature(TASK, kwargs={"request": refused_once(2)}, queue=queue)
        job_id = uuid()
        job.set(task_id=job_id)
        then = backend.signature("some.next", queue="parked-next")
        await asyncio.to_thread((job | then).apply_async)
        assert check_whole(await watch(system, job_id, timeout_s=60))["type"] == "completed"
        with backend.connection_for_read() as connection, connection.SimpleQueue("parked-next") as done:
            message = await asyncio.to_thread(done.get, timeout=20)
            message.ack()
            assert message.payload[0] == [{"job_id": job_id, "status": "completed"}]


@pytest.mark.parametrize("system", ["redis"], indirect=True)
async def test_keys_show_nowhere(system: System) -> None:
    """Neither in jobs, events, answers, `inspect`, Redis nor the debug log; the gateway gets them."""
    secrets = (UPSTREAM_API_KEY, ENV_KEY, FILE_KEY, HEADER, HEADER.split()[1])
    bodies = [
        request(deltas=2),
        request(fault="status", status=400),
        {**request(deltas=2), "model": "env-model"},
        {**request(deltas=2), "model": "file-model"},
    ]
    shown: list[str] = []
    for body in bodies:
        job_id = await submit(system, body, {"max_retries": 0})
        shown.append(json.dumps(await watch(system, job_id)))
        shown.append(json.dumps(await show(system, job_id)))
    with backend_app(system.broker_url) as backend:
        inspect = backend.control.inspect(timeout=1)
        shown += [repr(getattr(inspect, name)()) for name in ("active", "reserved", "stats", "conf")]
    with Redis.from_url(system.redis_url) as redis:
        shown += [repr(key) + repr(redis.dump(key)) for key in redis.scan_iter("dw:*")]
    shown += [service.log for service in (*system.workers, *system.relays)]
    for secret in secrets:
        for form in (secret, base64.b64encode(secret.encode()).decode()):
            assert not any(form in text for text in shown), f"{secret} shows"
    authorized = {record["authorized"] for record in await gateway_records(system)}
    assert authorized == {True, False}  # the inline key is the gateway's, the others are wrong


async def test_a_worker_that_is_stopped_hands_over_what_it_has_parked(system: System, tmp_path: Path) -> None:
    """The messages go back at once; who takes one too early parks it, and sends it in time."""
    job_id = await submit(system, refused_once(5))
    watching = asyncio.create_task(watch(system, job_id, timeout_s=90))
    with Redis.from_url(system.redis_url) as redis:
        await eventually(lambda: redis.hexists(f"dw:{{{job_id}}}:meta", "not_before"))
        system.workers[-1].signal(signal.SIGTERM)
        assert await asyncio.to_thread(system.workers[-1].wait, 60) == 0
        if not system.broker_url.startswith("amqp"):
            assert redis.llen(OUR_QUEUE) == 1
        system.start_worker(configuration(system, tmp_path), before_main=SOON)
        last = check_whole(await watching)
        assert (last["type"], last["attempt"]) == ("completed", 1)
        assert len(await gateway_records(system, job_id)) == 2
