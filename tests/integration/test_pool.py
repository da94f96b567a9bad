"""The task pool and the visibility renewal in real worker processes on a real Redis.

What runs in the workers is `tests/support/pool_app.py`. The last section needs no worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from redis import Redis
from redis.exceptions import BusyLoadingError, ConnectionError  # noqa: A004 - redis-py's name

from deltawire.redis_server import free_port
from deltawire_worker.pool import TaskPool, await_, cancellation
from tests.support.pool_app import CLIENT_NAME

ROOT = Path(__file__).parents[2]
QUEUE = "pool_app"
UNACKED = "pool_app_unacked"
T = TypeVar("T")


def eventually(condition: Callable[[], T], timeout_s: float = 60.0) -> T:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)
    return value


class RedisServer:
    """A Redis without persistence: a restart loses everything."""

    def __init__(self, directory: Path) -> None:
        self._port = free_port()
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        options = [
            "--port",
            str(self._port),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(self._directory),
        ]
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        eventually(self._answers)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        with Redis.from_url(self.url) as client:
            try:
                return bool(client.ping())
            except (ConnectionError, BusyLoadingError):
                return False


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    directory = tmp_path / "redis"
    directory.mkdir()
    server = RedisServer(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


class Worker:
    """A `celery worker` process and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.process = process
        self._log_path = log_path

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def says(self, text: str, timeout_s: float = 60.0) -> None:
        eventually(lambda: text in self.log or self.process.poll() is not None, timeout_s)
        assert text in self.log, self.log

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)


class Bench:
    """A broker, a client that sends tasks to it, and the workers that take them."""

    def __init__(self, redis_url: str, tmp_path: Path, sender: Celery, redis: Redis) -> None:
        self.url = redis_url
        self.sender = sender
        self.redis = redis
        self._tmp_path = tmp_path
        self._workers: list[Worker] = []

    def start_worker(
        self, *arguments: str, env: dict[str, str] | None = None, ready: bool = True, **settings: Any
    ) -> Worker:
        name = f"w{len(self._workers)}"
        log_path = self._tmp_path / f"{name}.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.support.pool_app", "worker"]
        command += ["-n", f"{name}@test", "-l", "INFO", "--without-gossip", "--without-mingle", *arguments]
        variables = {
            **{key: value for key, value in os.environ.items() if key != "REMAP_SIGTERM"},
            "PYTHONPATH": str(ROOT),
            "POOL_APP_REDIS_URL": self.url,
            "POOL_APP_SETTINGS": json.dumps(settings),
            **(env or {}),
        }
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
        worker = Worker(process, log_path)
        self._workers.append(worker)
        if ready:
            worker.says(" ready.")
        return worker

    def close(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()

    def send(self, name: str, *args: Any, **options: Any) -> str:
        return str(self.sender.send_task(name, args=args, queue=QUEUE, **options).id)

    def let_go(self, *names: str) -> None:
        """Tasks called `hold` that are told may end now."""
        for name in names:
            self.redis.set(f"go:{name}", 1)

    def entries(self, name: str) -> list[str]:
        return [entry.decode() for entry in cast("list[bytes]", self.redis.lrange(name, 0, -1))]

    def has(self, name: str, entry: str, times: int = 1) -> Callable[[], bool]:
        return lambda: self.entries(name).count(entry) >= times

    def unacknowledged(self) -> int:
        return self.redis.hlen(UNACKED)

    def queued(self) -> int:
        return self.redis.llen(QUEUE)

    def is_idle(self) -> bool:
        return self.unacknowledged() == 0 and self.queued() == 0


@pytest.fixture
def bench(redis_url: str, tmp_path: Path) -> Iterator[Bench]:
    with (
        Celery("sender", broker=redis_url, set_as_current=False) as sender,
        Redis.from_url(redis_url) as redis,
    ):
        bench = Bench(redis_url, tmp_path, sender, redis)
        try:
            yield bench
        finally:
            bench.close()


# -- running


def test_three_hundred_tasks_wait_at_the_same_time(bench: Bench) -> None:
    """Concurrency is the loop's: all have started in one process before any of them may end."""
    names = [f"s{number}" for number in range(300)]
    for name in names:
        bench.send("hold", name)
    bench.start_worker()
    eventually(lambda: all(bench.entries(name) == ["started"] for name in names))
    bench.let_go(*names)
    eventually(lambda: all(bench.entries(name)[-1:] == ["finished"] for name in names))
    eventually(bench.is_idle)


def test_parked_tasks_keep_their_own_request(bench: Bench) -> None:
    """`self.request` is the task's own after other tasks ran in between."""
    bench.start_worker()
    for _ in range(50):
        bench.send("two_awaits", "request")
    eventually(lambda: len(bench.entries("request")) == 50)
    assert set(bench.entries("request")) == {"True"}


def test_a_result_goes_to_link(bench: Bench) -> None:
    """What the body returns reaches the callback task, without a result backend."""
    bench.start_worker()
    link = bench.sender.signature("append", args=("linked",), queue=QUEUE)
    bench.send("sleep", "s", 0.0, link=link)
    eventually(bench.has("linked", "got s"))


def test_an_exception_fails_the_task_and_acknowledges_it(bench: Bench) -> None:
    """An exception of the coroutine is the task's, and is reported once."""
    worker = bench.start_worker()
    task_id = bench.send("fail", "f")
    eventually(bench.has(f"failure:{task_id}", "ValueError"))
    eventually(bench.is_idle)
    assert bench.entries("f") == ["started"]
    assert "raised unexpected: ValueError" in worker.log


def test_system_exit_in_a_coroutine_ends_that_task_only(bench: Bench) -> None:
    """The loop, the other tasks and the worker go on; the message is not delivered again."""
    bench.start_worker()
    bench.send("sleep", "other", 1.0)
    eventually(bench.has("other", "started"))
    task_id = bench.send("exit_process", "e")
    eventually(bench.has(f"failure:{task_id}", "RuntimeError"))
    eventually(bench.has("other", "finished"))
    eventually(bench.is_idle)
    assert bench.entries("e") == ["started"]


def test_retry_runs_the_task_again(bench: Bench) -> None:
    """`self.retry` works from a body that awaits."""
    bench.start_worker()
    bench.send("retry_twice", "r")
    eventually(bench.has("r", "try 2"))
    eventually(bench.is_idle)
    assert bench.entries("r") == ["try 0", "try 1", "try 2"]


def test_an_expired_task_never_starts(bench: Bench) -> None:
    """`expires` ends in `task_revoked`."""
    bench.start_worker()
    task_id = bench.send("sleep", "late", 0.0, expires=datetime.now(UTC) - timedelta(seconds=5))
    eventually(bench.has(f"revoked:{task_id}", "terminated=False expired=True"))
    eventually(bench.is_idle)
    assert bench.entries("late") == []


def test_inspect_answers_while_tasks_run(bench: Bench) -> None:
    """`active`, `stats` and the pool commands work; the pool describes itself."""
    bench.start_worker()
    ids = {bench.send("sleep", f"i{number}", 30.0) for number in range(3)}
    eventually(lambda: all(bench.entries(f"i{number}") for number in range(3)))
    inspect = bench.sender.control.inspect(timeout=30.0, limit=1)
    active = inspect.active()["w0@test"]
    assert {request["id"] for request in active} == ids
    assert len({request["worker_pid"] for request in active}) == 3
    pool = inspect.stats()["w0@test"]["pool"]
    assert pool["max-concurrency"] == 1000
    assert pool["running"] == 3
    assert "oop" in pool["loop"]
    control = bench.sender.control
    control.pool_grow(5, reply=True, timeout=30.0, limit=1)
    assert inspect.stats()["w0@test"]["pool"]["max-concurrency"] == 1005
    control.pool_shrink(1000, reply=True, timeout=30.0, limit=1)
    assert inspect.stats()["w0@test"]["pool"]["max-concurrency"] == 5


# -- stopping one task


def test_revoke_with_terminate_cancels_a_running_task(bench: Bench) -> None:
    """The coroutine sees `CancelledError`, runs its `finally`, and the message is acknowledged."""
    bench.start_worker()
    task_id = bench.send("sleep", "r", 60.0)
    eventually(bench.has("r", "started"))
    bench.sender.control.revoke(task_id, terminate=True)
    eventually(bench.has("r", "finally"))
    assert bench.entries("r") == ["started", "cancelled:REVOKED", "finally"]
    eventually(bench.is_idle)
    assert bench.entries(f"revoked:{task_id}") == ["terminated=True expired=False"]
    assert bench.entries(f"failure:{task_id}") == []
    assert bench.sender.control.inspect(timeout=30.0, limit=1).active() == {"w0@test": []}


def test_revoking_a_task_that_waits_for_a_slot_keeps_it_from_starting(bench: Bench) -> None:
    """A full pool holds tasks back, and looks at revocations when their turn comes."""
    bench.start_worker("-c", "1", worker_prefetch_multiplier=3)
    bench.send("hold", "first")
    eventually(bench.has("first", "started"))
    revoked = bench.send("sleep", "revoked", 0.0)
    bench.send("sleep", "last", 0.0)
    eventually(lambda: bench.unacknowledged() == 3)
    assert bench.entries("last") == []
    bench.sender.control.revoke(revoked, reply=True, timeout=30.0, limit=1)
    bench.let_go("first")
    eventually(bench.has("last", "finished"))
    eventually(bench.is_idle)
    assert bench.entries("revoked") == []
    assert bench.entries(f"revoked:{revoked}") == ["terminated=False expired=False"]


def test_the_soft_time_limit_raises_in_the_body(bench: Bench) -> None:
    """The coroutine is cancelled; `await_` raises `SoftTimeLimitExceeded`, and the body can go on."""
    worker = bench.start_worker()
    task_id = bench.send("soft_limited", "soft", 60.0, soft_time_limit=0.5)
    eventually(bench.has("soft", "soft limit"))
    assert bench.entries("soft") == ["started", "cancelled:TIME_LIMIT", "finally", "soft limit"]
    eventually(bench.is_idle)
    assert bench.entries(f"failure:{task_id}") == []
    assert "Soft time limit (0.5s) exceeded" in worker.log
    task_id = bench.send("sleep", "uncaught", 60.0, soft_time_limit=0.5)
    eventually(bench.has(f"failure:{task_id}", "SoftTimeLimitExceeded"))


def test_the_hard_time_limit_ends_a_task(bench: Bench) -> None:
    """It cancels, and the failure is reported and acknowledged when the task has ended."""
    worker = bench.start_worker()
    task_id = bench.send("sleep", "hard", 60.0, time_limit=0.5)
    eventually(bench.has(f"failure:{task_id}", "TimeLimitExceeded"))
    assert bench.entries("hard") == ["started", "cancelled:TIME_LIMIT", "finally"]
    eventually(bench.is_idle)
    assert "Hard time limit (0.5s) exceeded" in worker.log
    assert bench.entries(f"failure:{task_id}") == ["TimeLimitExceeded"]


# -- stopping the worker


def test_warm_shutdown_finishes_and_acknowledges_as_it_goes(bench: Bench) -> None:
    """SIGTERM: nothing new starts, running tasks end, each acknowledged at its own end."""
    worker = bench.start_worker()
    bench.send("hold", "short")
    bench.send("hold", "long")
    eventually(lambda: bench.entries("short") and bench.entries("long"))
    worker.signal(signal.SIGTERM)
    worker.says("Warm shutdown")
    bench.let_go("short")
    eventually(bench.has("short", "finished"))
    eventually(lambda: bench.unacknowledged() == 1)
    bench.send("sleep", "too late", 0.0)
    assert bench.entries("long") == ["started"]
    bench.let_go("long")
    assert worker.wait() == 0
    assert bench.entries("long") == ["started", "finally", "finished"]
    assert bench.entries("too late") == []
    assert (bench.unacknowledged(), bench.queued()) == (0, 1)
    assert bench.entries("lifespan") == ["entered", "exited"]


def test_cold_shutdown_gives_tasks_to_the_next_worker(bench: Bench) -> None:
    """SIGQUIT: coroutines are cancelled, their `finally` runs, and unacknowledged messages go back."""
    worker = bench.start_worker()
    for name in ("a", "b"):
        bench.send("hold", name)
    eventually(lambda: bench.entries("a") and bench.entries("b"))
    worker.signal(signal.SIGQUIT)
    worker.wait()
    assert bench.entries("a") == ["started", "cancelled:SHUTDOWN", "finally"]
    assert (bench.unacknowledged(), bench.queued()) == (0, 2)
    assert bench.entries("lifespan") == ["entered", "exited"]
    bench.let_go("a", "b")
    bench.start_worker()
    eventually(lambda: bench.has("a", "finished")() and bench.has("b", "finished")())
    eventually(bench.is_idle)


def test_cold_shutdown_acknowledges_neither_failed_clean_up_nor_stubborn_tasks(bench: Bench) -> None:
    """It waits a few seconds and no longer, and both messages go back; one that succeeds in time is done."""
    worker = bench.start_worker()
    failing = bench.send("burst", "failing", True)
    bench.send("stubborn", "stubborn", 600.0)
    bench.send("stubborn", "in time", 2.0)
    eventually(lambda: all(bench.entries(name) for name in ("failing", "stubborn", "in time")))
    begin = time.monotonic()
    worker.signal(signal.SIGQUIT)
    worker.wait()
    assert 4.0 < time.monotonic() - begin < 60.0
    assert bench.entries("in time")[-1] == "finished"
    assert "ignored" in bench.entries("in time")
    assert "1 tasks did not end in time" in worker.log
    assert (bench.unacknowledged(), bench.queued()) == (0, 2)
    assert bench.entries(f"failure:{failing}") == ["ValueError"]  # Celery's tracer has said so already


def test_sigquit_turns_a_warm_shutdown_cold(bench: Bench) -> None:
    """The pool may be stopped in a signal handler while it is being stopped."""
    worker = bench.start_worker()
    bench.send("sleep", "s", 60.0)
    eventually(bench.has("s", "started"))
    worker.signal(signal.SIGTERM)
    worker.says("Warm shutdown")
    worker.signal(signal.SIGQUIT)
    worker.wait()
    assert bench.entries("s") == ["started", "cancelled:SHUTDOWN", "finally"]
    assert (bench.unacknowledged(), bench.queued()) == (0, 1)


def test_soft_shutdown_lets_short_tasks_finish(bench: Bench) -> None:
    """REMAP_SIGTERM=SIGQUIT: what ends within the window is acknowledged, the rest goes back."""
    worker = bench.start_worker(env={"REMAP_SIGTERM": "SIGQUIT"}, worker_soft_shutdown_timeout=3.0)
    bench.send("sleep", "short", 1.0)
    bench.send("sleep", "long", 60.0)
    eventually(lambda: bench.entries("short") and bench.entries("long"))
    worker.signal(signal.SIGTERM)
    worker.wait()
    assert bench.entries("short") == ["started", "finally", "finished"]
    assert bench.entries("long") == ["started", "cancelled:SHUTDOWN", "finally"]
    assert (bench.unacknowledged(), bench.queued()) == (0, 1)


def test_a_warm_shutdown_puts_back_what_arrives_late(bench: Bench) -> None:
    """The last BRPOP may bring a message after SIGTERM: the next worker gets it before the drain is over."""
    worker = bench.start_worker()
    bench.send("hold", "long")
    eventually(bench.has("long", "started"))
    worker.signal(signal.SIGTERM)
    worker.says("Warm shutdown")
    bench.send("sleep", "late", 0.0)
    bench.start_worker()
    eventually(bench.has("late", "finished"))
    assert "finished" not in bench.entries("long")
    bench.let_go("long")
    assert worker.wait() == 0
    assert bench.entries("long")[-1] == "finished"


def test_a_drain_time_out_cancels_what_still_runs(bench: Bench) -> None:
    """A bounded warm shutdown acknowledges what ends in time and gives the rest back."""
    worker = bench.start_worker(env={"POOL_APP_DRAIN_S": "3"})
    bench.send("sleep", "short", 0.5)
    bench.send("sleep", "long", 60.0)
    eventually(lambda: bench.entries("short") and bench.entries("long"))
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert bench.entries("short") == ["started", "finally", "finished"]
    assert bench.entries("long") == ["started", "cancelled:SHUTDOWN", "finally"]
    assert (bench.unacknowledged(), bench.queued()) == (0, 1)


def test_a_lifespan_that_fails_fails_the_worker(bench: Bench) -> None:
    """The worker consumes nothing and exits with the lifespan's exception in its log."""
    bench.send("sleep", "s", 0.0)
    worker = bench.start_worker(env={"POOL_APP_LIFESPAN": "fail"}, ready=False)
    assert worker.wait() == 1
    assert "no lifespan today" in worker.log
    assert bench.queued() == 1


# -- the broker's connection


def kill_broker_connections(redis: Redis) -> None:
    own = redis.client_id()
    for client in redis.client_list():
        if int(client["id"]) != own and client["name"] != CLIENT_NAME:
            redis.client_kill_filter(_id=client["id"])


def test_tasks_outlive_the_broker_connection(bench: Bench) -> None:
    """Running tasks go on; the same ids come a second time, run beside them, and all is acknowledged."""
    worker = bench.start_worker()
    names = [f"c{number}" for number in range(20)]
    for name in names:
        bench.send("hold", name)
    eventually(lambda: all(bench.entries(name) for name in names))
    kill_broker_connections(bench.redis)
    worker.says("Connection to broker lost")
    eventually(lambda: all(bench.has(name, "started", 2)() for name in names))
    assert Counter(entry for name in names for entry in bench.entries(name)) == {"started": 40}
    bench.let_go(*names)
    eventually(lambda: all(bench.has(name, "finished", 2)() for name in names))
    eventually(bench.is_idle)
    bench.send("sleep", "after", 0.0)
    eventually(bench.has("after", "finished"))
    inspect = bench.sender.control.inspect(timeout=30.0, limit=1)
    eventually(lambda: inspect.stats()["w0@test"]["pool"]["running"] == 0)  # it says so when it has ended
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_the_worker_outlives_a_restart_of_redis(bench: Bench, redis_server: RedisServer) -> None:
    """A task that ends after it has nobody left to acknowledge to; that must not end the others."""
    worker = bench.start_worker()
    bench.send("hold", "before")
    eventually(bench.has("before", "started"))
    redis_server.stop()
    worker.says("Connection to broker lost")
    redis_server.start()
    bench.let_go("before")
    eventually(bench.has("before", "finished"))
    bench.send("sleep", "after", 0.0)
    eventually(bench.has("after", "finished"))
    eventually(bench.is_idle)
    assert worker.process.poll() is None


def test_a_drain_outlives_the_broker_connection(bench: Bench) -> None:
    """Tasks that are waited for end undisturbed when the broker goes away meanwhile."""
    worker = bench.start_worker()
    bench.send("hold", "s")
    eventually(bench.has("s", "started"))
    worker.signal(signal.SIGTERM)
    worker.says("Warm shutdown")
    kill_broker_connections(bench.redis)
    bench.let_go("s")
    assert worker.wait() == 0
    assert bench.entries("s") == ["started", "finally", "finished"]


def run_past_the_visibility_timeout(
    bench: Bench, renewal: str, kill: bool = False, key_prefix: str = ""
) -> list[str]:
    options = {
        "global_keyprefix": key_prefix,
        "visibility_timeout": 2,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "unacked_key": UNACKED,
        "unacked_index_key": f"{UNACKED}_index",
        "unacked_mutex_key": f"{UNACKED}_mutex",
    }
    bench.sender.conf.broker_transport_options = options
    bench.start_worker(env={"POOL_APP_RENEWAL": renewal}, broker_transport_options=options)
    bench.send("sleep", "long", 6.0)
    eventually(bench.has("long", "started"))
    if kill:
        kill_broker_connections(bench.redis)
        eventually(bench.has("long", "started", 2))
    eventually(bench.has("long", "finished", 2 if kill else 1))
    return bench.entries("long")


@pytest.mark.parametrize("key_prefix", ["", "prefix:"])
def test_renewal_keeps_a_long_task_from_starting_twice(bench: Bench, key_prefix: str) -> None:
    """A task three times as long as the visibility time-out runs once, whatever kombu's key prefix."""
    assert run_past_the_visibility_timeout(bench, "1", key_prefix=key_prefix).count("started") == 1
    eventually(lambda: bench.redis.hlen(f"{key_prefix}{UNACKED}") == 0)


def test_without_renewal_a_long_task_starts_twice(bench: Bench) -> None:
    """The negative twin: this is what kombu does by itself."""
    assert run_past_the_visibility_timeout(bench, "0").count("started") > 1


def test_renewal_outlives_the_broker_connection(bench: Bench) -> None:
    """After a reconnection it renews what the new channel has delivered."""
    assert run_past_the_visibility_timeout(bench, "1", kill=True).count("started") == 2


def test_renewal_goes_on_in_the_soft_shutdown_window(bench: Bench) -> None:
    """The hub sleeps there; the next worker must not take what still runs."""
    options = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    settings: dict[str, Any] = {"broker_transport_options": options, "worker_soft_shutdown_timeout": 6.0}
    worker = bench.start_worker(env={"REMAP_SIGTERM": "SIGQUIT"}, **settings)
    bench.send("sleep", "s", 5.0)
    eventually(bench.has("s", "started"))
    bench.start_worker(**settings)
    worker.signal(signal.SIGTERM)
    worker.wait()
    assert bench.entries("s") == ["started", "finally", "finished"]


# -- without a worker


@contextmanager
def running_pool(limit: int, app: Any = None) -> Iterator[TaskPool]:
    interval = sys.getswitchinterval()
    pool = TaskPool(limit, app=app, threads=False, semaphore=LaxBoundedSemaphore(limit))
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("has_eventfd", [True, False])
def test_a_task_is_accepted_before_it_is_done(has_eventfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the tasks, the hub thread hears of each in the order in which it lived."""
    if not has_eventfd:  # as on macOS
        monkeypatch.delattr(os, "eventfd")
    heard: list[tuple[str, int]] = []

    def body(number: int) -> tuple[int, Any, float]:
        if number % 2:
            await_(asyncio.sleep(0))
        return (0, number, 0.0)

    with running_pool(2000) as pool:
        for number in range(2000):
            pool.apply_async(
                body,
                args=(number,),
                accept_callback=lambda _pid, _time, number=number: heard.append(("accepted", number)),
                callback=lambda _result, number=number: heard.append(("done", number)),
            )
        assert pool.wait_until_idle(60.0)
    assert len(heard) == 4000
    assert [number for what, number in heard if what == "accepted"] == list(range(2000))
    positions = {entry: index for index, entry in enumerate(heard)}
    assert all(positions["accepted", number] < positions["done", number] for number in range(2000))


def test_callbacks_run_on_the_thread_that_delivers_and_a_broken_one_harms_no_other() -> None:
    """Celery's request state is not thread-safe, so nothing of it may run on the loop's thread."""
    threads: set[int] = set()

    def on_done(_result: object) -> None:
        threads.add(threading.get_ident())
        raise ValueError("a broken request")

    with running_pool(10) as pool:
        for _ in range(10):
            pool.apply_async(lambda: (0, None, 0.0), callback=on_done)
        assert pool.wait_until_idle(60.0)
    assert threads == {threading.get_ident()}


def test_await_outside_a_task_body_is_refused() -> None:
    """Outside the pool, and inside a coroutine, `await_` raises at once and closes the coroutine."""
    with pytest.raises(RuntimeError, match="only in the body of a task"):
        await_(asyncio.sleep(0))
    errors: list[str] = []

    async def nested() -> None:
        with pytest.raises(RuntimeError) as error:
            await_(asyncio.sleep(0))
        errors.append(str(error.value))

    with running_pool(1) as pool:
        pool.apply_async(lambda: (0, await_(nested()), 0.0))
        assert pool.wait_until_idle(60.0)
    assert len(errors) == 1
    assert cancellation() is None


def test_a_broker_that_is_not_asynchronous_is_refused() -> None:
    """Without Celery's hub nobody would deliver the callbacks."""
    pool = TaskPool(1, threads=True)
    with pytest.raises(ImproperlyConfigured, match="asynchronous"):
        pool.start()
