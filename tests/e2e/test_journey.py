"""What a user sees: one job, watched in several ways at once, and cancelled in every way there is."""

import asyncio
import json
import os
import sys
from typing import Any

import httpx
import pytest
import redis

from tests.support.system import (
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
    watch,
)


async def command_line(system: System, *args: str) -> tuple[int, str]:
    """Runs `deltawire …` against the system; its exit code and standard output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", "from deltawire.cli import main; main()", *args),
        env={**os.environ, "DELTAWIRE_PUBLIC_URL": system.relay_url},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def curl(system: System, job_id: str) -> list[Event]:
    """What `curl -N …/events` prints, as events."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sN", f"{system.relay_url}/v1/jobs/{job_id}/events"), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    lines = [
        line.removeprefix("data: ") for line in output.decode().splitlines() if line.startswith("data: ")
    ]
    return [event for event in map(json.loads, lines) if "created_at" in event]


async def in_mid_stream(system: System, job_id: str) -> None:
    """Waits for the job's third delta."""
    await watch(system, job_id, until=lambda event: event["sequence_number"] >= 5)


async def test_all_readers_of_a_job_see_the_same_events(system: System) -> None:
    """A WebSocket, curl, the command line and a late WebSocket get equal events (PROTOCOL §4.1)."""
    job_id = await submit(system, request("Write a haiku about streaming.", rate=20))

    async def late() -> list[Event]:
        await in_mid_stream(system, job_id)
        return await watch(system, job_id)

    first, printed, (code, lines), joined = await asyncio.gather(
        watch(system, job_id), curl(system, job_id), command_line(system, "tail", job_id, "--json"), late()
    )
    assert check_whole(first)["type"] == "completed"
    assert first == printed == joined
    assert code == 0
    assert [json.loads(line)["sequence_number"] for line in lines.splitlines()] == list(
        range(1, len(first) + 1)
    )


async def test_submit_follow_prints_the_text(system: System) -> None:
    """`deltawire submit --follow` prints what the completion says, token by token."""
    code, output = await command_line(system, "submit", "--follow", "Write a haiku about streaming.")
    assert code == 0
    job_id = await submit(system, request("Write a haiku about streaming.", rate=0))
    terminal = (await watch(system, job_id))[-1]
    assert output.rstrip("\n") == terminal["completion"]["choices"][0]["message"]["content"]


async def by_websocket(system: System, job_id: str) -> dict[str, Any]:
    from tests.support.readers import websocket

    async with websocket(f"{system.websocket_url}/v1/ws") as reader:
        await reader.send("cancel", job_id=job_id, reason="enough", request_id="r1")
        answer = await reader.receive_type("cancel_result")
    assert answer["request_id"] == "r1"
    return answer


async def by_http(system: System, job_id: str) -> dict[str, Any]:
    return await cancel(system, job_id)


async def by_command_line(system: System, job_id: str) -> dict[str, Any]:
    code, output = await command_line(system, "cancel", job_id)
    assert code == 0
    assert "cancelled" in output or "its worker has not answered yet" in output  # for a second
    return {}


async def by_bare_key(system: System, job_id: str) -> dict[str, Any]:
    with redis.Redis.from_url(system.redis_url) as client:
        client.set(f"dw:{{{job_id}}}:cancel", "1", ex=86_400)
    return {}


WAYS = [by_websocket, by_http, by_command_line, by_bare_key]


@pytest.mark.parametrize("way", WAYS)
async def test_a_running_job_is_cancelled(system: System, way: Any) -> None:
    """The gateway sees its connection closed, the log ends in `cancelled` with the text so far (§4.5)."""
    job_id = await submit(system, request("Tell me of rivers", deltas=2_000, rate=50))
    await in_mid_stream(system, job_id)
    answer = await way(system, job_id)
    terminal = check_whole(await watch(system, job_id))
    assert terminal["type"] == "cancelled"
    assert terminal["completion"]["choices"][0]["message"]["content"]
    assert terminal["cancel"]["upstream_closed_at"] is not None
    if answer:
        assert answer["cancelled_from"] == "in_progress"
        # Its worker has a second to be heard, which may be too short on a busy machine.
        assert (answer["status"], answer["delivered"]) in {("cancelled", True), ("in_progress", False)}
    again = await cancel(system, job_id)
    assert again == {"status": "cancelled", "cancelled_from": None, "delivered": True}
    (record,) = await gateway_records(system, job_id)
    assert record["closed_by"] == "client"
    assert record["sent_deltas"] < 2_000


async def queued_job(system: System) -> str:
    """The id of a job that has its record, while no worker takes it."""
    async with httpx.AsyncClient(trust_env=False) as client:
        body = {"request": request("never asked")}
        response = await client.post(f"{system.relay_url}/v1/jobs", json=body)
    return str(response.json()["id"])


@pytest.mark.parametrize("way", WAYS)
async def test_a_queued_job_is_cancelled_and_never_reaches_the_gateway(way: Any) -> None:
    """Its viewer is told without any worker, and a worker that comes later leaves it alone (§5.4, §3.4)."""
    with System(workers=0) as system:
        job_id = await queued_job(system)
        viewer = asyncio.create_task(watch(system, job_id))
        answer = await way(system, job_id)
        terminal = check_whole(await viewer)
        assert terminal["type"] == "cancelled"
        if answer:
            assert (answer["cancelled_from"], answer["delivered"]) == ("queued", True)
        system.start_worker()
        with redis.Redis.from_url(system.redis_url) as client:
            await eventually(lambda: client.llen("deltawire") == 0 and client.hlen("dw:unacked") == 0)
        assert await gateway_records(system, job_id) == []


async def test_a_job_can_be_cancelled_before_anybody_has_seen_it(system: System) -> None:
    """A cancel of an unknown id leaves a tombstone, which the claim finds (§3.4)."""
    job_id = "not-yet-sent"
    assert (await cancel(system, job_id))["status"] == "unknown"
    app = backend_app(system.redis_url)
    await asyncio.to_thread(send_task, app, request("never asked"), task_id=job_id)
    terminal = check_whole(await watch(system, job_id))
    assert terminal["type"] == "cancelled"
    assert await gateway_records(system, job_id) == []
    app.close()
