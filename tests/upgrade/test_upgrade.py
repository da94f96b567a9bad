"""This tree beside the release before it: services and clients of both on one Redis, either way round.

`make upgrade REV=v0.1.0` says which other one, any revision will do; else it is the newest before this.
"""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.chaos.scenario import Scenario
from tests.support.ledger import Figures
from tests.support.system import (
    WAIT_S,
    System,
    backend_app,
    cancel,
    check_whole,
    gateway_records,
    request,
    send_task,
    show,
    submit,
    text_of,
    watch,
)

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("core", "worker", "relay")
NEW: Final[dict[str, str]] = {}
#: Longer than a worker holds a job that has to wait (PROTOCOL §2.1).
PARKED_S: Final = 11

Environment = dict[str, str]
Json = dict[str, Any]


def git(*args: str) -> bytes:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True).stdout


def other_revision() -> str:
    """What was asked for, or the newest release before this commit. Skips the test where there is none."""
    if revision := os.environ.get("DELTAWIRE_UPGRADE_REV"):
        return revision
    try:
        return git("describe", "--tags", "--abbrev=0", "--match=v*", "HEAD~1").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no release before this tree (a tag v…); make upgrade REV=… takes any revision")


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What makes a Python process run the other release's packages."""
    tree = tmp_path_factory.mktemp("release")
    with tarfile.open(fileobj=io.BytesIO(git("archive", other_revision(), *PACKAGES))) as archive:
        archive.extractall(tree, filter="data")
    environment = {"PYTHONPATH": os.pathsep.join(str(tree / package) for package in PACKAGES)}
    found = run_python("import deltawire; print(deltawire.__file__)", environment)
    assert found.startswith(str(tree)), "the other release's code is not what runs"
    return environment


def run_python(program: str, environment: Environment, *args: str) -> str:
    """What a program says that runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["upgrade", "way back"])
def first_and_then(request: pytest.FixtureRequest, old: Environment) -> tuple[Environment, Environment]:
    """Who was there before, and who comes after."""
    return (old, NEW) if request.param == "upgrade" else (NEW, old)


def start(system: System, *, relay: Environment, worker: Environment) -> None:
    services = system.launch_relay(relay), system.launch_worker(worker)
    for service in services:
        service.wait_until_ready()


CLIENT: Final = """
import asyncio, json, sys
from deltawire.client import AsyncClient, text_of

async def main():
    async with AsyncClient(sys.argv[1]) as client:
        job = await client.submit(json.loads(sys.argv[2]))
        async for event in client.events(job.id):
            for text in text_of(event):
                print(text, end="")

asyncio.run(main())
"""


async def test_worker_relay_and_client_of_two_releases_understand_each_other(
    first_and_then: tuple[Environment, Environment],
) -> None:
    """Every door of the relay, every end of a job; the worker and the SDK are the other release's."""
    one, other = first_and_then
    with System(workers=0, relays=0) as system:
        start(system, relay=one, worker=other)
        posted = await submit(system, request(deltas=8, rate=0), {"metadata": {"a": "b"}})
        events = await watch(system, posted)
        assert check_whole(events)["type"] == "completed"
        shown = await show(system, posted)
        assert (shown["status"], shown["metadata"]) == ("completed", {"a": "b"})
        assert shown["completion"]["choices"][0]["message"]["content"] == text_of(events)

        with backend_app(system.broker_url) as backend:
            bare = await asyncio.to_thread(send_task, backend, request(deltas=8, rate=0))
        assert check_whole(await watch(system, bare))["type"] == "completed"

        failing = await submit(system, request(fault="status", status=400))
        assert check_whole(await watch(system, failing))["error"]["code"] == "upstream_invalid_request"

        running = await submit(system, request(deltas=1_000, rate=20))
        await watch(system, running, until=lambda event: event["type"] == "delta")
        assert (await cancel(system, running))["cancelled_from"] == "in_progress"
        assert check_whole(await watch(system, running))["type"] == "cancelled"

        async with httpx.AsyncClient(base_url=system.relay_url, trust_env=False, timeout=WAIT_S) as http:
            chat = await http.post("/v1/chat/completions", json=request(deltas=4, rate=0))
            assert chat.json()["choices"][0]["finish_reason"] == "stop"
            streamed = await http.post(
                "/v1/chat/completions", json={**request(deltas=4, rate=0), "stream": True}
            )
            assert streamed.text.endswith("data: [DONE]\n\n")
            models = await http.get("/v1/models")
            assert models.json()["data"]

        body = json.dumps(request(deltas=8, rate=0))
        assert await asyncio.to_thread(run_python, CLIENT, other, system.relay_url, body)


async def test_what_one_release_left_the_other_finishes(
    first_and_then: tuple[Environment, Environment],
) -> None:
    """Jobs that are queued, parked or over; and a repeat with the same key finds its job."""
    first, then = first_and_then
    with System(workers=0, relays=0) as system:
        start(system, relay=first, worker=first)
        over = await submit(system, request(deltas=8, rate=0))
        before = await watch(system, over)
        refused = request(deltas=3, fault="status", status=429, retry_after=str(PARKED_S), fail_first=1)
        parked = await submit(system, refused)
        await watch(system, parked, until=lambda event: event["type"] == "retrying")
        system.workers[0].signal(signal.SIGTERM)
        await asyncio.to_thread(system.workers[0].wait, WAIT_S)

        key = {"Idempotency-Key": uuid.uuid4().hex}
        job = {"request": request(deltas=3, rate=0)}
        async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as http:
            posted = await http.post(f"{system.relay_url}/v1/jobs", json=job, headers=key)
            with backend_app(system.broker_url) as backend:
                bare = await asyncio.to_thread(send_task, backend, request(deltas=3, rate=0))
            system.relay.signal(signal.SIGTERM)
            await asyncio.to_thread(system.relay.wait, WAIT_S)
            await asyncio.to_thread(system.launch_relay(then, in_place_of=0).wait_until_ready)
            repeated = await http.post(f"{system.relay_url}/v1/jobs", json=job, headers=key)
        queued = posted.json()["id"]
        assert (repeated.status_code, repeated.json()["id"]) == (202, queued), repeated.text

        await asyncio.to_thread(system.start_worker, then)
        assert await watch(system, over) == before
        assert (await show(system, over))["completion"] == before[-1]["completion"]
        for job_id in (queued, bare, parked):
            last = check_whole(await watch(system, job_id))
            assert (last["type"], last["attempt"]) == ("completed", 1)
        assert len(await gateway_records(system, queued)) == 1


async def test_jobs_run_on_while_services_change(
    first_and_then: tuple[Environment, Environment],
) -> None:
    """One service after the other, under streams: every subscriber gets every event once, and one end."""
    first, then = first_and_then
    grace = {"DELTAWIRE_SHUTDOWN_GRACE_S": "2"}
    with System(workers=0, relays=0, worker_environment=grace) as system:
        start(system, relay=first, worker=first)
        start(system, relay=first, worker=first)
        relays = [f"127.0.0.1:{port}" for port in system.relay_ports]
        figures = Figures("releases change", seed=1)
        async with Scenario(figures, system.redis_url, relays) as scenario:
            policies: list[Json] = [{}, {"restart": "always"}]
            scenario.watch(await scenario.submit(20, request(deltas=100, rate=10), policies))
            await scenario.streaming()
            for index in range(2):
                worker = system.workers[index]
                await asyncio.to_thread(system.start_worker, then)
                worker.signal(signal.SIGTERM)
                await asyncio.to_thread(worker.wait, WAIT_S)
                relay = system.relays[index]
                relay.signal(signal.SIGTERM)
                await asyncio.to_thread(relay.wait, WAIT_S)
                fresh = system.launch_relay(then, in_place_of=index)
                await asyncio.to_thread(fresh.wait_until_ready)
                scenario.watch(await scenario.submit(10, request(deltas=30, rate=20)), sockets=1)
            await scenario.over()
        await scenario.check_gateway(system)
    scenario.check()
    assert {ending.partition(":")[0] for ending in figures.endings} <= {"completed", "failed"}
    assert figures.endings["completed"] > 0
