"""Prompts, completions and credentials show nowhere but where they have to: a scan of all that a system says.

Everything that a real system is told or tells carries a word of its own, and every place where people, or
their tools, look is searched for them.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import httpx
import jwt
import pytest
import redis
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin

from deltawire.redis_server import RedisServer, free_port
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.relay_process import Keyring
from tests.support.system import (
    UPSTREAM_API_KEY,
    WAIT_S,
    System,
    backend_app,
    cancel,
    eventually,
    request,
    send_task,
    submit,
    watch,
)

# Flower, and a worker that traces, take their time on a machine that is busy.
pytestmark = pytest.mark.timeout(300)
LONG_S: Final = 90
KEYS: Final = Keyring(backend=("default", ["read", "cancel", "submit", "list", "tokens", "metrics"]))


def _word(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex}"


PROMPT, COMPLETION, UPSTREAM_SAID = _word("prompt"), _word("completion"), _word("upstream-said")
JWT_SECRET, REDIS_PASSWORD = _word("jwt-secret"), _word("redis-password")
OTLP_KEY, UNKNOWN_KEY = _word("otlp-key"), _word("dw_unknown")
CLAIMS: Final = {
    **{"aud": "deltawire", "sub": "somebody", "tenant": "default", "job": ["*"], "cap": ["read"]},
    **{"iat": int(time.time()), "exp": int(time.time()) + 43_200, "jti": "one"},
}
TOKEN = jwt.encode(CLAIMS, JWT_SECRET, "HS256")
FORGED = jwt.encode(CLAIMS, _word("another-secret"), "HS256")
TICKETED_JOB = _word("job")


@cache
def ticket() -> str:
    """Made when the test begins: it may live for minutes, which the tests before this one may take."""
    times = {"iat": int(time.time()), "exp": int(time.time()) + 900}
    return jwt.encode({**CLAIMS, **times, "job": [TICKETED_JOB], "jti": "two"}, JWT_SECRET, "HS256")


CREDENTIALS: Final = {
    "API key": KEYS["backend"],
    "unknown API key": UNKNOWN_KEY,
    "upstream's key": UPSTREAM_API_KEY,
    "JWT secret": JWT_SECRET,
    "token": TOKEN,
    "forged token": FORGED,
    "Redis password": REDIS_PASSWORD,
    "collector's key": OTLP_KEY,
}
SAID: Final = {"prompt": PROMPT, "completion": COMPLETION, "upstream's words": UPSTREAM_SAID}


class Scan:
    """What was found where it should not be, and how many places there were."""

    def __init__(self) -> None:
        self.places: set[str] = set()
        self.found: list[tuple[str, str]] = []

    def look(self, place: str, text: object, *, allows: tuple[str, ...] = ()) -> None:
        text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        self.places.add(place)
        words = CREDENTIALS | {"ticket": ticket()} | SAID
        self.found += [(place, name) for name, word in words.items() if word in text and name not in allows]


def body(**script: Any) -> dict[str, Any]:
    """A request whose every text is the prompt; its script has the gateway say the completion."""
    tool = {"name": "look_up", "description": PROMPT, "parameters": {"type": "object", "title": PROMPT}}
    return {
        **request(PROMPT, **{"rate": 0, "text": f"It is {COMPLETION}.", **script}),
        **{"stop": [PROMPT], "user": PROMPT, "prediction": {"type": "content", "content": PROMPT}},
        "tools": [{"type": "function", "function": tool}],
    }


def tool_call() -> dict[str, Any]:
    """As above, answered by a call with the completion in its arguments."""
    call = {
        "index": 0,
        "id": "call",
        "function": {"name": "look_up", "arguments": json.dumps({"q": COMPLETION})},
    }
    choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
    return body(text=None, chunks=[{"id": "c", "model": "gpt-5.4", "choices": [choice]}])


def broken() -> dict[str, Any]:
    """As above, refused by a gateway that repeats what it was told."""
    return body(
        fault="status", status=500, body=json.dumps({"error": {"message": f"{UPSTREAM_SAID} {PROMPT}"}})
    )


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """With a password at Redis, keys and tokens at the relay, traces, and logs of both kinds at `debug`."""
    with (
        RedisServer(program=os.environ.get("DELTAWIRE_TEST_REDIS_PROGRAM")) as server,
        OtlpReceiver() as receiver,
    ):
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", REDIS_PASSWORD)
        url = f"redis://:{REDIS_PASSWORD}@127.0.0.1:{server.port}/0"
        both = receiver.environment | {
            "DELTAWIRE_API_KEYS": KEYS.text,
            "DELTAWIRE_JWT_SECRET": JWT_SECRET,
            "DELTAWIRE_LOG_LEVEL": "debug",
            "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={OTLP_KEY}",
        }
        with System(
            redis=SimpleNamespace(url=url),
            worker_environment={**both, "DELTAWIRE_LOG_FORMAT": "json"},
            relay_environment={**both, "DELTAWIRE_LOG_FORMAT": "text"},
        ) as system:
            system.receiver = receiver  # type: ignore[attr-defined] # so that one fixture is enough
            yield system


class Flower:
    """A real Flower on the system's broker."""

    def __init__(self, system: System, log: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "flower", "--address=127.0.0.1"),
                    f"--port={self.url.rpartition(':')[2]}",
                ],
                env={
                    **os.environ,
                    "CELERY_BROKER_URL": system.broker_url,
                    "FLOWER_UNAUTHENTICATED_API": "true",
                    "PYTHONWARNINGS": "ignore",
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", trust_env=False, timeout=WAIT_S)

    def tasks(self) -> dict[str, Any]:
        """As its API has them, once it answers."""
        try:
            answer = self.get("/api/tasks")
        except httpx.TransportError:
            return {}
        return dict(answer.json()) if answer.status_code == 200 else {}

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def flower(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    flower = Flower(system, tmp_path_factory.mktemp("flower") / "log")
    try:
        yield flower
    finally:
        flower.stop()


async def over_http(system: System, scan: Scan) -> None:
    """Every refusal that there is for what is secret: its answer, and what else it leaves behind."""
    key = KEYS.headers("backend")
    job = "/v1/jobs"
    async with httpx.AsyncClient(base_url=system.relay_url, trust_env=False, timeout=WAIT_S) as client:
        answers = [
            await client.post(job, headers=key, json=wrong)
            for wrong in (
                {"request": {"model": 5, "messages": PROMPT}},
                {
                    "request": {"model": "gpt-5.4", "messages": [PROMPT], "n": PROMPT},
                    "options": {"restart": PROMPT},
                },
                {"request": body(), "options": {"timeout_s": PROMPT}},
                {"request": body(), "options": PROMPT},
                {"request": PROMPT},
                [PROMPT],
            )
        ]
        answers.append(
            await client.post(
                job, headers=key | {"Content-Type": "application/json"}, content=f'{{"request": "{PROMPT}'
            )
        )
        answers.append(await client.post(job, headers=key, content=PROMPT))
        answers.append(await client.post("/v1/chat/completions", headers=key, json={"messages": PROMPT}))
        answers.append(await client.post("/v1/chat/completions", headers=key, json=broken()))
        answers += [
            await client.get(path, headers={"Authorization": credential})
            for path in (f"{job}/none", "/metrics", job)
            for credential in (
                f"Bearer {UNKNOWN_KEY}",
                f"Bearer {FORGED}",
                f"Basic {UNKNOWN_KEY}",
                UNKNOWN_KEY,
            )
        ]
        answers += [
            await client.get(f"{job}/none/events?ticket={wrong}&api_key={UNKNOWN_KEY}")
            for wrong in (FORGED, TOKEN + "x")
        ]
        answers.append(await client.get(f"/{TOKEN}"[:200]))
    assert {answer.status_code // 100 for answer in answers} <= {4, 5}
    for number, answer in enumerate(answers):
        scan.look(
            f"answer {number} {answer.status_code} {answer.url.path[:30]}", answer.text + str(answer.headers)
        )


async def with_tokens(system: System, scan: Scan) -> None:
    """A token in its header and a ticket in its URL: taken, and told to nobody."""
    path = f"/v1/jobs/{TICKETED_JOB}"
    async with httpx.AsyncClient(base_url=system.relay_url, trust_env=False, timeout=WAIT_S) as client:
        answers = [
            await client.get(path, headers={"Authorization": f"Bearer {TOKEN}"}),
            await client.get(f"{path}/events?ticket={ticket()}"),
            await client.get(f"{path}/events?ticket={ticket()}&mode=snapshot"),
        ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        scan.look("answer to a token", f"{answer.text} {answer.headers}", allows=("completion",))


async def over_websocket(system: System, scan: Scan) -> None:
    """Frames and close reasons of those that are refused."""
    for said in (
        {"type": "authenticate", "token": UNKNOWN_KEY},
        {"type": "authenticate", "token": FORGED},
        {"type": "authenticate", "token": [UNKNOWN_KEY]},
        {"type": "subscribe", "job_id": "x", "token": UNKNOWN_KEY},
    ):
        frames: list[str | bytes] = []
        with suppress(ConnectionClosed):
            async with connect(
                f"{system.websocket_url}/v1/ws", origin=Origin(system.relay_url), proxy=None
            ) as socket:
                await socket.send(json.dumps(said))
                while True:
                    frames.append(await socket.recv())
        assert frames
        scan.look(f"frames {said['type']}", f"{frames} {socket.close_reason}")


async def run_jobs(system: System, scan: Scan) -> dict[str, str]:
    """Jobs by both doors, in every way that they can end; their states as Flower will have them."""
    token = KEYS["backend"]
    app = backend_app(system.broker_url)

    async def bare(*arguments: Any, **how: Any) -> str:
        return await asyncio.to_thread(send_task, app, *arguments, **how)

    states = {await bare(body(), task_id=TICKETED_JOB): "SUCCESS", await bare(tool_call()): "SUCCESS"}
    states[await bare(broken(), {"max_retries": 1})] = "FAILURE"
    states[await bare({"messages": PROMPT})] = "FAILURE"
    states[await bare(body(), {"metadata": {"a": PROMPT}, "restart": PROMPT})] = "FAILURE"
    args = await asyncio.to_thread(
        lambda: str(app.send_task("deltawire.generate", args=[body(), PROMPT], queue="deltawire").id)
    )
    states[args] = "FAILURE"
    states[await submit(system, body(), token=token)] = "SUCCESS"
    states[await submit(system, broken(), {"max_retries": 1}, token=token)] = "FAILURE"
    # Nobody takes this one: Celery would log all of it.
    await asyncio.to_thread(lambda: app.send_task("no.such.task", kwargs={"text": PROMPT}, queue="deltawire"))
    for job_id in states:
        await watch(system, job_id, token=token)
    cancelled = await submit(system, body(deltas=5_000, rate=10), token=token)
    await watch(system, cancelled, until=lambda event: event["type"] == "delta", token=token)
    assert (await cancel(system, cancelled, token=token))["cancelled_from"] == "in_progress"
    states[cancelled] = "SUCCESS"  # the task has done what it was told
    app.close()
    return states


async def look_at_flower(flower: Flower, scan: Scan, states: dict[str, str], running: str) -> None:
    """Its pages and its API; it shows tasks by their ids, with states, and without arguments (§1.1)."""

    async def get(path: str) -> httpx.Response:
        answer = await asyncio.to_thread(flower.get, path)
        scan.look(f"Flower {path[:40]}", answer.text)
        return answer

    expected = {**states, running: "STARTED"}

    def has_all() -> bool:
        tasks = flower.tasks()
        return all(tasks.get(job_id, {}).get("state") == state for job_id, state in expected.items())

    deadline = time.monotonic() + LONG_S
    while not await asyncio.to_thread(has_all):
        assert time.monotonic() < deadline, (expected, flower.tasks())
        await asyncio.sleep(0.2)
    tasks = (await get("/api/tasks")).json()
    assert {(tasks[job_id]["args"], tasks[job_id]["kwargs"]) for job_id in states} <= {("", ""), (None, None)}
    for job_id in states:
        assert (await get(f"/task/{job_id}")).status_code == 200
        assert (await get(f"/api/task/info/{job_id}")).json()["name"] == "deltawire.generate"
    workers: list[str] = []
    while not workers:  # it gives one a second to answer
        assert time.monotonic() < deadline
        workers = list((await get("/api/workers?refresh=1")).json())
    (worker,) = workers
    while (await get(f"/worker/{worker}")).status_code != 200:
        assert time.monotonic() < deadline
    for path in ("/", "/tasks", "/broker", "/api/task/types", "/metrics"):
        assert (await get(path)).status_code == 200, path
    order = "order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
    table = f"/tasks/datatable?draw=1&start=0&length=100&search[value]=&{order}"
    assert job_id in (await get(table)).text


async def look_at_inspection(system: System, scan: Scan) -> None:
    """What anybody at the broker can ask a worker."""
    with backend_app(system.broker_url) as app:
        inspect = app.control.inspect(timeout=0.5, limit=1)
        deadline = time.monotonic() + WAIT_S
        for name in ("active", "reserved", "scheduled", "revoked", "stats", "conf", "report", "registered"):
            while not (answer := await asyncio.to_thread(getattr(inspect, name))):
                assert time.monotonic() < deadline, name
            scan.look(f"inspect {name}", answer)


def look_at_redis(system: System, scan: Scan, job_ids: set[str]) -> None:
    """What outlives the jobs: their logs hold what the model said, and nothing holds what it was asked."""
    with redis.Redis.from_url(system.redis_url) as client:
        readers: dict[bytes, Any] = {
            b"hash": client.hgetall,
            b"stream": client.xrange,
            b"string": client.get,
            b"list": lambda key: client.lrange(key, 0, -1),
            b"zset": lambda key: client.zrange(key, 0, -1),
            b"set": client.smembers,
        }
        left = list(client.scan_iter(count=1_000))
        assert {f"dw:{{{job_id}}}:log".encode() for job_id in job_ids} <= set(left)
        for key in left:
            read = readers.get(client.type(key), lambda _: None)  # it may have expired
            allows = ("completion",) if key.endswith(b":log") else ()
            scan.look(f"Redis {key.decode()}", f"{key!r} {read(key)}", allows=allows)


def look_at_processes(system: System, flower: Flower, scan: Scan) -> None:
    services = [*system.relays, *system.workers, system.gateway]
    for service in services:
        scan.look(f"log {service.name}", service.log)
        assert service.log or service is system.gateway, service.name
    scan.look("log flower", flower.log)
    for name, pid in [*((service.name, service.pid) for service in services), ("flower", flower.process.pid)]:
        scan.look(f"command line {name}", Path(f"/proc/{pid}/cmdline").read_bytes())


async def test_nothing_secret_shows(system: System, flower: Flower) -> None:
    """Not in logs, task events, Flower, inspection, metrics, traces, errors or command lines.

    In Redis not for longer than it is needed; and Flower shows what it should.
    """
    scan = Scan()
    receiver: OtlpReceiver = system.receiver  # type: ignore[attr-defined]
    await over_http(system, scan)
    await over_websocket(system, scan)
    deadline = time.monotonic() + LONG_S
    while not await asyncio.to_thread(flower.tasks):
        # It asks workers for their events some seconds after its start; those before that are lost.
        assert time.monotonic() < deadline, flower.log
        await watch(system, await submit(system, body(), token=KEYS["backend"]), token=KEYS["backend"])
        await asyncio.sleep(0.2)
    states = await run_jobs(system, scan)
    await with_tokens(system, scan)
    running = await submit(system, body(fault="stall", after=1), token=KEYS["backend"])
    await watch(system, running, until=lambda event: event["type"] == "delta", token=KEYS["backend"])
    await look_at_flower(flower, scan, states, running)
    await look_at_inspection(system, scan)
    async with httpx.AsyncClient(trust_env=False, headers=KEYS.headers("backend")) as client:
        for port in (*system.relay_ports, *system.worker_ports):
            answer = await client.get(f"http://127.0.0.1:{port}/metrics")
            assert "deltawire_" in answer.text
            scan.look("metrics", answer.text)
    await cancel(system, running, token=KEYS["backend"])
    await receiver.of_job(running, 1, lambda span: span.attributes.get("deltawire.status") == "cancelled")
    scan.look("traces", receiver.bytes)
    with redis.Redis.from_url(system.redis_url) as client:
        await eventually(lambda: not client.hlen("dw:unacked"), what="the last acknowledgement")
    look_at_redis(system, scan, {*states, running})
    look_at_processes(system, flower, scan)
    assert len(scan.places) > 70
    assert scan.found == []


async def test_the_scan_sees_what_it_looks_for(system: System) -> None:
    """The same words where they belong: in the log of a job, and at its reader."""
    scan = Scan()
    job_id = await submit(system, body(), token=KEYS["backend"])
    scan.look("reader", await watch(system, job_id, token=KEYS["backend"]))
    with redis.Redis.from_url(system.redis_url) as client:
        scan.look("log", client.xrange(f"dw:{{{job_id}}}:log"))
    assert scan.found == [("reader", "completion"), ("log", "completion")]
