"""Tenants on real workers: a flood waits for its turn, and nobody else for the flood (PROTOCOL §1.4)."""

import asyncio
from collections.abc import Iterator

import pytest
from redis import Redis

from tests.support.system import (
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

PLACES = 2
SLOTS = 4
LIMITS = {"DELTAWIRE_TENANT_MAX_RUNNING": str(PLACES), "DELTAWIRE_CONCURRENCY": str(SLOTS)}
LONG = request(deltas=3_000, rate=10)
SHORT = request(deltas=2, rate=50)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A worker with fewer slots than a flood has jobs."""
    with System(worker_environment=LIMITS, relay_environment=LIMITS) as system:
        yield system


def held(system: System) -> int:
    with Redis.from_url(system.redis_url) as redis:
        return int(redis.zcard("dw:held"))


async def started(system: System, job_ids: list[str]) -> list[str]:
    return [job_id for job_id in job_ids if (await show(system, job_id))["status"] == "in_progress"]


async def test_a_flood_of_bare_jobs_waits_and_others_do_not(system: System) -> None:
    """It has its places and no more; another tenant's jobs start and end meanwhile; then all of it runs."""
    acme = {"tenant": "acme"}
    with backend_app(system.broker_url) as backend:
        link = backend.signature("some.callback", queue="tenants-done")
        flood = [await asyncio.to_thread(send_task, backend, LONG, acme) for _ in range(PLACES)]
        flood += [await asyncio.to_thread(send_task, backend, SHORT, acme, link=link) for _ in range(8)]
        await eventually(lambda: held(system) == len(flood) - PLACES)
        others = [await submit(system, SHORT) for _ in range(6)]
        for job_id in others:
            assert check_whole(await watch(system, job_id))["type"] == "completed"
        assert await started(system, flood) == flood[:PLACES]
        for job_id in flood[:PLACES]:
            await cancel(system, job_id)
        for job_id in flood[PLACES:]:
            events = await watch(system, job_id)
            assert check_whole(events)["type"] == "completed"
            assert [event["type"] for event in events[:2]] == ["queued", "in_progress"]
        with backend.connection_for_read() as connection, connection.SimpleQueue("tenants-done") as done:
            for _ in flood[PLACES:]:
                message = await asyncio.to_thread(done.get, timeout=20)
                message.ack()
    assert len(await gateway_records(system)) == len(flood) + len(others)
    await settled(system)


async def test_a_flood_over_http_waits_without_messages(system: System) -> None:
    """The first of those with the highest priority comes next; a cancelled one never does."""
    running = [await submit(system, LONG) for _ in range(PLACES)]
    for job_id in running:
        await watch(system, job_id, until=lambda event: event["type"] == "in_progress")
    low, gone, high = [await submit(system, SHORT, {"priority": priority}) for priority in (0, 9, 5)]
    with backend_app(system.broker_url) as backend:
        other = await asyncio.to_thread(send_task, backend, SHORT, {"tenant": "acme"})
        assert check_whole(await watch(system, other))["type"] == "completed"
    assert held(system) == 3
    assert (await cancel(system, gone))["cancelled_from"] == "queued"
    await cancel(system, running[0])
    began = [(await watch(system, job_id))[1]["created_at"] for job_id in (high, low)]
    assert began == sorted(began)
    await cancel(system, running[1])
    await settled(system)


async def settled(system: System) -> None:
    """All places are given back, and nobody waits."""
    with Redis.from_url(system.redis_url) as redis:
        await eventually(
            lambda: not redis.exists("dw:tenant:{acme}:running", "dw:tenant:{default}:running", "dw:held")
        )
