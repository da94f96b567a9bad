"""What operators type, on a whole system: doctor, top, jobs."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from deltawire.cli import commands
from deltawire.redis_server import RedisServer, free_port
from tests.support.system import UPSTREAM_API_KEY, WAIT_S, System, request, submit, watch

PASSWORD = "pass-of-the-tests"


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as running:
        yield running


def run(environment: dict[str, str], *args: str) -> tuple[int, str]:
    """The exit code of `deltawire ARGS`, and all that it printed."""
    done = CliRunner().invoke(commands.app, list(args), env=environment)
    return done.exit_code, done.output


def of(system: System) -> dict[str, str]:
    return {**system.environment, "DELTAWIRE_PORT": str(system.relay_port)}


def by_subject(output: str) -> dict[str, dict[str, Any]]:
    return {finding["subject"]: finding for finding in map(json.loads, output.splitlines())}


def test_the_doctor_on_a_sound_system(system: System) -> None:
    """All looks are made; what a throwaway Redis lacks is a warning; no secret is printed."""
    code, output = run(of(system), "doctor", "--ask", "--json")
    findings = by_subject(output)
    assert code == 0, output
    assert {finding["level"] for finding in findings.values()} <= {"ok", "warning"}
    for subject in (
        *("relay configuration", "worker configuration", "upstream default", "upstream default call"),
        *("redis version", "redis eviction", "redis permissions", "redis clock", "redis expiry", "broker"),
        f"relay at {system.relay_url}",
    ):
        assert findings[subject]["level"] == "ok", findings[subject]
    for subject in ("workers", "relays"):  # where a machine is busy one is late, which is a warning
        assert findings[subject]["message"].startswith("1 alive"), findings[subject]
    assert findings["redis persistence"]["level"] == "warning"
    assert UPSTREAM_API_KEY not in output


def test_the_doctor_where_everything_is_wrong() -> None:
    """Each part is found, none hangs, and the exit code says so."""
    with RedisServer(options={"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("dw:forgotten", 1)
            commands = ("+@all", "-xadd", "-config", "-@dangerous", "+info")
            client.execute_command("ACL", "SETUSER", "some", "on", f">{PASSWORD}", "~*", "&*", *commands)
        url = server.url.replace("redis://", f"redis://some:{PASSWORD}@")
        code, output = run(
            {
                "DELTAWIRE_REDIS_URL": url,
                "DELTAWIRE_BROKER_URL": f"amqp://127.0.0.1:{free_port()}",
                "DELTAWIRE_UPSTREAM_BASE_URL": f"http://127.0.0.1:{free_port()}/v1",
                "DELTAWIRE_PORT": str(free_port()),
                "DELTAWIRE_HOST": "0.0.0.0",
            },
            "doctor",
            "--json",
        )
    levels = {subject: finding["level"] for subject, finding in by_subject(output).items()}
    assert code == 1
    assert levels["relay configuration"] == "error"
    assert levels["upstream default"] == "error"
    assert levels["redis eviction"] == "error"
    assert levels["redis configuration"] == "warning"  # CONFIG is not allowed
    assert by_subject(output)["redis permissions"]["message"].endswith("XADD")
    assert levels["redis expiry"] == "warning"
    assert levels["broker"] == "error"
    assert levels["workers"] == levels["relays"] == "warning"
    assert PASSWORD not in output


def test_the_doctor_without_anything() -> None:
    """Nothing is configured and nothing runs: that is said, not raised."""
    port = free_port()
    environment = {"DELTAWIRE_REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:{port}/0", "DELTAWIRE_PORT": "x"}
    code, output = run(environment, "doctor")
    assert code == 1
    assert "error    relay configuration: DELTAWIRE_PORT must be an integer" in output
    assert "warning  worker configuration: no upstream is set here" in output
    assert "error    redis: cannot connect" in output
    assert "Traceback" not in output
    assert PASSWORD not in output


def test_the_doctor_where_a_relay_runs(system: System) -> None:
    """A relay's settings name no upstream, and need not: workers have theirs."""
    environment = of(system)
    del environment["DELTAWIRE_UPSTREAM_BASE_URL"]
    code, output = run(environment, "doctor", "--json")
    assert code == 0, output
    assert by_subject(output)["worker configuration"]["level"] == "warning"


def top(system: System) -> dict[str, Any]:
    """What it shows as soon as it has heard of each process, and often enough of the worker for its rates."""
    deadline = time.monotonic() + WAIT_S
    while True:
        code, output = run(of(system), "top", "--once", "--json")
        assert code == 0, output
        shown: dict[str, Any] = json.loads(output)
        if len(shown["processes"]) == 2 and shown["rates"]["events"]:
            return shown
        assert time.monotonic() < deadline, output


def test_top_and_jobs(system: System) -> None:
    """What runs shows in both; erased, it is gone."""
    job_id = asyncio.run(submit(system, request("hello", deltas=100_000)))
    asyncio.run(watch(system, job_id, until=lambda event: event["type"] == "delta"))
    shown = top(system)
    assert shown["jobs"]["running"] == 1
    assert shown["jobs"]["queued"] == shown["jobs"]["messages"] == 0
    assert shown["rates"]["events"] > 0
    assert {process["kind"] for process in shown["processes"]} == {"worker", "relay"}
    code, output = run(of(system), "jobs", "--status", "in_progress", "--json")
    assert (code, json.loads(output)["id"]) == (0, job_id)
    code, output = run(of(system), "jobs", job_id, "--delete")
    assert (code, output) == (0, f"{job_id} is erased\n")
    code, output = run(of(system), "jobs", job_id)
    assert code == 6
    assert "unknown_job" in output
