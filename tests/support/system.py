"""A whole deltawire as real processes on free ports: Redis, the scripted gateway, relay, worker(s).

    with System() as system:
        job_id = await submit(system, request("hello"))
        events = await watch(system, job_id)

Starting blocks; the clients below are async. Only processes that were started here are ever ended.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import httpx
from celery import Celery
from kombu.entity import Queue
from websockets.asyncio.client import connect

from deltawire.redis_server import RedisServer, free_port

#: Of what takes a second. A machine that is busy with other tests may take ten times as long.
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 60.0
WAIT_S: Final = 60.0
UPSTREAM_API_KEY: Final = "sk-upstream-key-of-the-tests"
TERMINAL: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})
TASK: Final = "deltawire.generate"
QUEUE: Final = "deltawire"
#: As docs/rabbitmq.md has it.
QUORUM: Final = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}

Event = dict[str, Any]


class ServiceDidNotStartError(AssertionError):
    """A process ended or did not get ready; the message ends with its log's tail."""


class Service:
    """One process, its log file, and the address at which it says that it is ready."""

    def __init__(
        self, name: str, command: Sequence[str], environment: dict[str, str], *, log: Path, ready_url: str
    ) -> None:
        self.name = name
        self.log_path = log
        self._ready_url = ready_url
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("DELTAWIRE_") and key != "REMAP_SIGTERM"
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is pytest's: it ends us, and we end them
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        """Where it answers probes, without a path."""
        return self._ready_url.rpartition("/")[0]

    @property
    def log(self) -> str:
        """All that it has said so far."""
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises ServiceDidNotStartError."""
        deadline = time.monotonic() + timeout_s
        while not self._is_ready():
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                what = "is not ready in time" if code is None else f"ended with {code}"
                raise ServiceDidNotStartError(f"{self.name} {what}; its log:\n{self.log[-3000:]}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(self._ready_url, timeout=1, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        return self.process.wait(timeout_s)

    def stop(self, *, at_once: bool = False) -> None:
        """Ends the process. Idempotent; `at_once` leaves it no time to finish anything."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


class Addressed(Protocol):
    """One Redis server or several, known by a URL."""

    @property
    def url(self) -> str: ...


class System:
    """Redis, gateway, relay(s) and worker(s), from `start` to `stop`. Blocking; also a context manager.

    `worker_environment` is for every worker, `relay_environment` for every relay; `workers` and `relays` say
    how many to begin with. A `redis` and a `broker_url` that are given are running, and the caller's.
    """

    redis: Any  # what was given, so that a test can do to it what its kind can

    def __init__(
        self,
        *,
        workers: int = 1,
        relays: int = 1,
        worker_environment: dict[str, str] | None = None,
        relay_environment: dict[str, str] | None = None,
        gateway_rate: float = 50,
        redis: Addressed | None = None,
        broker_url: str | None = None,
    ) -> None:
        self._own_redis = (
            None if redis else RedisServer(program=os.environ.get("DELTAWIRE_TEST_REDIS_PROGRAM"))
        )
        self.redis = redis or self._own_redis
        self._broker_url = broker_url
        self._worker_count = workers
        self._relay_count = relays
        self._worker_environment = worker_environment or {}
        self._relay_environment = relay_environment or {}
        self._gateway_rate = gateway_rate
        self._directory = tempfile.TemporaryDirectory(prefix="deltawire-system-")
        self._services: list[Service] = []
        self.gateway_port = free_port()
        self.gateway: Service
        self.relays: list[Service] = []
        self.relay_ports: list[int] = []
        self.workers: list[Service] = []
        self.worker_ports: list[int] = []

    @property
    def redis_url(self) -> str:
        return str(self.redis.url)

    @property
    def relay(self) -> Service:
        return self.relays[0]

    @property
    def relay_port(self) -> int:
        return self.relay_ports[0]

    @property
    def broker_url(self) -> str:
        return self._broker_url or self.redis_url

    @property
    def relay_url(self) -> str:
        return f"http://127.0.0.1:{self.relay_port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.relay_port}"

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What relay and workers have in common."""
        return {
            "DELTAWIRE_REDIS_URL": self.redis_url,
            **({"DELTAWIRE_BROKER_URL": self._broker_url} if self._broker_url else {}),
            "DELTAWIRE_UPSTREAM_BASE_URL": f"{self.gateway_url}/v1",
            "DELTAWIRE_UPSTREAM_API_KEY": UPSTREAM_API_KEY,
        }

    def start(self) -> None:
        """Returns when everything is ready. Raises ServiceDidNotStartError; nothing stays then."""
        try:
            if self._own_redis is not None:
                self._own_redis.start()
            self.gateway = self._launch(
                "gateway",
                ["deltawire.gateway", "--port", str(self.gateway_port), "--rate", str(self._gateway_rate)],
                {"DELTAWIRE_GATEWAY_API_KEY": UPSTREAM_API_KEY},
                ready_url=f"{self.gateway_url}/healthz",
            )
            # All at once: each of them imports for a second.
            for _ in range(self._relay_count):
                self.launch_relay()
            for _ in range(self._worker_count):
                self.launch_worker()
            for service in self._services:
                service.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def launch_relay(
        self,
        environment: dict[str, str] | None = None,
        *,
        in_place_of: int | None = None,
        before_main: str = "",
    ) -> Service:
        """Starts one more relay, or that one anew on its port, and does not wait. `before_main` as below."""
        if in_place_of is None:
            self.relay_ports.append(free_port())
        index = len(self.relay_ports) - 1 if in_place_of is None else in_place_of
        port = self.relay_ports[index]
        relay = self._launch(
            f"relay-{len(self._services)}",
            _program("deltawire_relay", before_main),
            {
                **self.environment,
                "DELTAWIRE_PORT": str(port),
                **self._relay_environment,
                **(environment or {}),
            },
            ready_url=f"http://127.0.0.1:{port}/readyz",
        )
        self.relays[index : index + 1] = [relay]
        return relay

    def launch_worker(self, environment: dict[str, str] | None = None, *, before_main: str = "") -> Service:
        """Starts one more worker, and does not wait. `before_main`: statements to run in it first."""
        port = free_port()
        worker = self._launch(
            f"worker-{len(self.workers)}",
            _program("deltawire_worker", before_main),
            {
                **self.environment,
                "DELTAWIRE_WORKER_PORT": str(port),
                **self._worker_environment,
                **(environment or {}),
            },
            ready_url=f"http://127.0.0.1:{port}/readyz",
        )
        self.workers.append(worker)
        self.worker_ports.append(port)
        return worker

    def start_worker(self, environment: dict[str, str] | None = None, *, before_main: str = "") -> Service:
        """Starts one more worker and waits for it. Raises ServiceDidNotStartError."""
        worker = self.launch_worker(environment, before_main=before_main)
        worker.wait_until_ready()
        return worker

    def _launch(
        self, name: str, program: list[str], environment: dict[str, str], *, ready_url: str
    ) -> Service:
        arguments = program if program[0].startswith("-") else ["-m", *program]
        service = Service(
            name,
            [sys.executable, *arguments],
            environment,
            log=Path(self._directory.name, f"{name}.log"),
            ready_url=ready_url,
        )
        self._services.append(service)
        return service

    def logs(self) -> str:
        """What relay, gateway and workers have said, with their names."""
        return "\n".join(f"--- {service.name}\n{service.log}" for service in self._services)

    def stop(self) -> None:
        """Ends all that was started. Idempotent."""
        # The workers go first and at once: what they are at in a test's end is of no interest.
        for service in reversed(self._services):
            service.stop(at_once=True)
        if self._own_redis is not None:
            self._own_redis.stop()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()


def _program(module: str, before_main: str) -> list[str]:
    if not before_main:
        return [module]
    return ["-c", f"{before_main}\nfrom {module}.__main__ import main\nraise SystemExit(main())"]


def request(text: str = "Hello", /, **script: Any) -> dict[str, Any]:
    """A chat.completions body; `script` is what the gateway is asked to do (see `Script`)."""
    body: dict[str, Any] = {"model": "gpt-5.4", "messages": [{"role": "user", "content": text}]}
    return {**body, "script": script} if script else body


async def eventually(condition: Callable[[], Any], *, timeout_s: float = WAIT_S, what: str = "") -> Any:
    """The first true value of `condition`. Raises AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what or condition}"
        await asyncio.sleep(0.01)
    return value


async def submit(
    system: System, body: dict[str, Any], options: dict[str, Any] | None = None, *, token: str | None = None
) -> str:
    """`POST /v1/jobs`; the job's id."""
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.post(
            f"{system.relay_url}/v1/jobs",
            json={"request": body, "options": options or {}},
            headers=_bearer(token),
            timeout=WAIT_S,
        )
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


async def cancel(system: System, job_id: str, *, token: str | None = None) -> dict[str, Any]:
    """`POST /v1/jobs/{id}/cancel`; its answer."""
    async with httpx.AsyncClient(trust_env=False, headers=_bearer(token)) as client:
        response = await client.post(f"{system.relay_url}/v1/jobs/{job_id}/cancel", timeout=WAIT_S)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def show(system: System, job_id: str, *, token: str | None = None) -> dict[str, Any]:
    """`GET /v1/jobs/{id}`."""
    async with httpx.AsyncClient(trust_env=False, headers=_bearer(token)) as client:
        response = await client.get(f"{system.relay_url}/v1/jobs/{job_id}", timeout=WAIT_S)
    answer: dict[str, Any] = response.json()
    return answer


def backend_app(broker_url: str) -> Celery:
    """A Celery app as a backend has one: it does not know deltawire, just the names. Close it."""
    return Celery("some_backend", broker=broker_url, set_as_current=False)


def send_task(app: Celery, body: Any, options: Any = None, **how: Any) -> str:
    """A plain `send_task` from `app`; the job's id. Blocks for a millisecond or two."""
    kwargs = {"request": body} if options is None else {"request": body, "options": options}
    queue: Any = QUEUE
    if app.conf.broker_url.startswith("amqp"):
        # kombu has few types
        queue = Queue(QUEUE, queue_arguments=QUORUM)  # type: ignore[no-untyped-call]
    return str(app.send_task(TASK, kwargs=kwargs, queue=queue, **how).id)


async def watch(
    system: System,
    job_id: str,
    *,
    starting_after: int = 0,
    until: Callable[[Event], bool] = lambda event: event["type"] in TERMINAL,
    timeout_s: float = WAIT_S,
    on_event: Callable[[Event], None] = lambda _: None,
    token: str | None = None,
) -> list[Event]:
    """The job's events by its one-job WebSocket, up to the one that `until` wants.

    Control messages are left out; an `error` is a failure. Raises AssertionError after `timeout_s`.
    """
    events: list[Event] = []
    url = f"{system.websocket_url}/v1/jobs/{job_id}/ws?starting_after={starting_after}"
    try:
        # With a bounded queue, closing under a backlog takes ten seconds: the socket is not read any more.
        async with (
            asyncio.timeout(timeout_s),
            connect(
                url, proxy=None, max_size=None, max_queue=None, additional_headers=_bearer(token)
            ) as socket,
        ):
            async for text in socket:
                message: Event = json.loads(text)
                assert message["type"] != "error", message
                if "created_at" in message:
                    events.append(message)
                    on_event(message)
                    if until(message):
                        break
    except TimeoutError as error:
        types = [event["type"] for event in events]
        raise AssertionError(f"job {job_id} did not get there in {timeout_s} s: {types[-5:]}") from error
    return events


def check_whole(events: Sequence[Event]) -> Event:
    """Checks a whole log: numbers 1, 2, 3 … and one terminal event, the last, which is returned."""
    assert [event["sequence_number"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
    return events[-1]


def text_of(events: Sequence[Event]) -> str:
    """The content of all deltas, first choice."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if event["type"] == "delta"
        for choice in event["chunk"]["choices"]
    )


async def gateway_records(system: System, client_request_id: str | None = None) -> list[dict[str, Any]]:
    """What the gateway remembers of requests, all or those of one job."""
    params = {} if client_request_id is None else {"client_request_id": client_request_id}
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.get(f"{system.gateway_url}/requests", params=params, timeout=WAIT_S)
    records: list[dict[str, Any]] = response.json()["data"]
    return records
