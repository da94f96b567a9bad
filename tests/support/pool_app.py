"""The Celery app that the tests of the task pool run in a real worker process.

Its tasks say in Redis what they lived through: `RPUSH <log name> <entry>` on the broker's database.

Environment: `POOL_APP_REDIS_URL`; `POOL_APP_SETTINGS`, a JSON object of Celery settings on top of those
below; `POOL_APP_RENEWAL=0` leaves the visibility renewal out; `POOL_APP_LIFESPAN=fail` breaks the lifespan;
`POOL_APP_DRAIN_S` bounds the warm shutdown.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar, cast

from celery import Celery, signals
from celery.exceptions import SoftTimeLimitExceeded
from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from deltawire_worker.pool import await_, cancellation
from deltawire_worker.visibility import VisibilityRenewal

REDIS_URL = os.environ.get("POOL_APP_REDIS_URL", "redis://127.0.0.1:6379/0")
#: Of the connections for the log, so that a test can kill all others.
CLIENT_NAME = "pool_app_log"

app = Celery("pool_app", broker=REDIS_URL, set_as_current=False)
app.conf.update(
    broker_transport="deltawire_worker.broker_transport:Transport",
    worker_pool="deltawire_worker.pool:TaskPool",
    worker_concurrency=1000,
    worker_prefetch_multiplier=1,
    worker_enable_prefetch_count_reduction=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_hijack_root_logger=False,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_default_queue="pool_app",
    task_serializer="json",
    result_serializer="json",
    accept_content=["json"],
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": 30,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "unacked_key": "pool_app_unacked",
        "unacked_index_key": "pool_app_unacked_index",
        "unacked_mutex_key": "pool_app_unacked_mutex",
    },
)
app.conf.update(json.loads(os.environ.get("POOL_APP_SETTINGS", "{}")))
if os.environ.get("POOL_APP_RENEWAL") != "0":
    app.steps["consumer"].add(VisibilityRenewal)

Function = TypeVar("Function", bound=Callable[..., Any])


def task(name: str, **options: Any) -> Callable[[Function], Function]:
    """`app.task`, which has no types."""
    return cast("Callable[[Function], Function]", app.task(name=name, **options))


_resources: dict[str, AsyncRedis] = {}


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    if os.environ.get("POOL_APP_LIFESPAN") == "fail":
        raise ConnectionError("no lifespan today")
    # By default the 101st task that logs at the same time gets an error.
    pool = BlockingConnectionPool.from_url(
        REDIS_URL, client_name=CLIENT_NAME, timeout=10, retry=Retry(NoBackoff(), 3)
    )
    async with AsyncRedis.from_pool(pool) as redis:
        _resources["redis"] = redis
        await redis.rpush("lifespan", "entered")
        try:
            yield
        finally:
            await redis.rpush("lifespan", "exited")


app.pool_lifespan = lifespan
app.pool_drain_timeout_s = float(os.environ["POOL_APP_DRAIN_S"]) if "POOL_APP_DRAIN_S" in os.environ else None


async def log(name: str, entry: str) -> None:
    await _resources["redis"].rpush(name, entry)


def log_from_hub(name: str, entry: str) -> None:
    with Redis.from_url(REDIS_URL, client_name=CLIENT_NAME) as redis:
        redis.rpush(name, entry)


async def logged_wait(name: str, wait: Callable[[], Awaitable[None]]) -> str:
    try:  # around the first entry too: a test that sees it may cancel before its reply is here
        await log(name, "started")
        await wait()
    except asyncio.CancelledError:
        reason = cancellation()
        await log(name, f"cancelled:{reason and reason.name}")
        raise
    finally:
        await asyncio.sleep(0.05)  # a clean-up that has to wait still runs to its end
        await log(name, "finally")
    await log(name, "finished")
    return name


async def until_told(name: str) -> None:
    while True:
        with suppress(RedisError):  # it may be away for a while
            if await _resources["redis"].exists(f"go:{name}"):
                return
        await asyncio.sleep(0.05)


@task("sleep")
def sleep(name: str, seconds: float) -> str:
    return await_(logged_wait(name, lambda: asyncio.sleep(seconds)))


@task("hold")
def hold(name: str) -> str:
    """Ends when there is a key `go:<name>`, and not before."""
    return await_(logged_wait(name, lambda: until_told(name)))


@task("two_awaits", bind=True)
def two_awaits(self: Any, name: str) -> None:
    """A park in between does not mix up which task's request this is."""
    before = self.request.id
    await_(asyncio.sleep(0.05))
    await_(log(name, f"{before == self.request.id}"))


@task("fail")
def fail(name: str) -> None:
    async def run() -> None:
        await log(name, "started")
        raise ValueError(name)

    await_(run())


@task("exit_process")
def exit_process(name: str) -> None:
    async def run() -> None:
        await log(name, "started")
        raise SystemExit(3)

    await_(run())


@task("retry_twice", bind=True, max_retries=5)
def retry_twice(self: Any, name: str) -> str:
    await_(log(name, f"try {self.request.retries}"))
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    return name


@task("append")
def append(value: str, name: str) -> None:
    await_(log(name, f"got {value}"))


@task("soft_limited")
def soft_limited(name: str, seconds: float) -> None:
    try:
        await_(logged_wait(name, lambda: asyncio.sleep(seconds)))
    except SoftTimeLimitExceeded:
        await_(log(name, "soft limit"))


@task("stubborn")
def stubborn(name: str, seconds: float) -> str:
    """Ignores every cancellation for a while, then returns as if nothing had been."""

    async def run() -> str:
        end = time.monotonic() + seconds
        entry = "started"
        while (left := end - time.monotonic()) > 0:
            try:
                await log(name, entry)
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                entry = "ignored"
        await log(name, "finished")
        return name

    return await_(run())


@task("burst")
def burst(name: str, raises: bool) -> None:
    """Fails in its clean-up when cancelled."""

    async def run() -> None:
        try:
            await log(name, "started")
            await asyncio.sleep(60)
        finally:
            if raises:
                raise ValueError("clean-up failed")

    await_(run())


def on_revoked(request: Any = None, terminated: bool = False, expired: bool = False, **_: Any) -> None:
    log_from_hub(f"revoked:{request.id}", f"terminated={terminated} expired={expired}")


def on_failure(task_id: str = "", exception: object = None, **_: Any) -> None:
    log_from_hub(f"failure:{task_id}", type(exception).__name__)


signals.task_revoked.connect(on_revoked)
signals.task_failure.connect(on_failure)
