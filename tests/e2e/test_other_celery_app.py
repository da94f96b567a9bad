"""Another Celery app on the same Redis database keeps its own long tasks.

kombu keeps what is not acknowledged in keys that all apps on a database share by default, and whoever has
the shortest visibility time-out restarts the others' tasks. This module is also that
other app: `celery -A tests.e2e.test_other_celery_app worker`.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest
from celery import Celery
from redis import Redis

from tests.support.system import System, check_whole, request, submit, watch

DURATION_S: Final = 120.0
STARTS: Final = "other_app:starts"
ENDS: Final = "other_app:ends"
NAMES: Final = ("early", "late")

app = Celery("other_app", broker=os.environ.get("OTHER_APP_REDIS_URL"), set_as_current=False)


def _take_long(name: str) -> None:
    with Redis.from_url(os.environ["OTHER_APP_REDIS_URL"]) as redis:
        redis.rpush(STARTS, f"{name} {time.time()}")
        time.sleep(float(os.environ["OTHER_APP_DURATION_S"]))
        redis.rpush(ENDS, f"{name} {time.time()}")


@app.task(name="other.early")  # type: ignore[untyped-decorator] # Celery ships no types
def early() -> None:
    """As Celery does it by default: acknowledged when it starts."""
    _take_long("early")


@app.task(name="other.late", acks_late=True)  # type: ignore[untyped-decorator] # as above
def late() -> None:
    """Unacknowledged for as long as it runs, so a foreign sweep could start it again."""
    _take_long("late")


class LongTask:
    """The other app's worker, and its two long tasks, under way."""

    def __init__(self, redis_url: str, *, duration_s: float) -> None:
        self.redis = Redis.from_url(redis_url)
        self._directory = tempfile.TemporaryDirectory(prefix="deltawire-other-app-")
        self._log = Path(self._directory.name, "worker.log")
        self._sender = Celery("sender", broker=redis_url, set_as_current=False)
        with self._log.open("wb") as log:
            self._worker = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", "tests.e2e.test_other_celery_app", "worker"),
                    *("-n", "other@tests", "--pool", "threads", "--concurrency", "4", "-l", "INFO"),
                ],
                env={
                    **os.environ,
                    "OTHER_APP_REDIS_URL": redis_url,
                    "OTHER_APP_DURATION_S": str(duration_s),
                },
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for name in NAMES:
            self._sender.send_task(f"other.{name}")

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._worker.poll() is None

    def entries(self, name: str) -> list[str]:
        """The tasks that have started (or ended), by name, in order."""
        values: list[bytes] = self.redis.lrange(name, 0, -1)  # type: ignore[assignment] # not the async client
        return sorted(value.decode().split()[0] for value in values)

    def close(self) -> None:
        # The pool's threads are asleep; a warm shutdown would wait for them.
        self._worker.kill()
        self._worker.wait()
        self._sender.close()
        self.redis.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


SHORT_VISIBILITY: Final = "import deltawire.queue as queue; queue.VISIBILITY_TIMEOUT_S = 4"
SHARED_KEYS: Final = """
own = queue.transport_options
def shared(key_prefix):
    return {name: value for name, value in own(key_prefix).items() if not name.startswith("unacked_")
            or name.startswith("unacked_restore")}
queue.transport_options = shared
"""


@pytest.fixture(scope="module", autouse=True)
def long_task(system: System) -> Iterator[LongTask]:
    """Under way while the other tests here run."""
    with LongTask(system.redis_url, duration_s=DURATION_S) as long_task:
        yield long_task


@pytest.mark.parametrize("shares_keys", [False, True])
async def test_a_short_visibility_time_out_is_ours_alone(shares_keys: bool) -> None:
    """And the negative twin: with kombu's default key names the other app's task is started again."""
    with System(workers=0) as system, LongTask(system.redis_url, duration_s=60) as long_task:
        system.start_worker(before_main=SHORT_VISIBILITY + (SHARED_KEYS if shares_keys else ""))
        started = Counter(long_task.entries(STARTS))
        deadline = time.monotonic() + 55
        while started["early"] < 1 or started["late"] < (2 if shares_keys else 1):
            assert long_task.is_running, long_task.log[-3000:]
            assert time.monotonic() < deadline, started
            await asyncio.sleep(0.1)
            started = Counter(long_task.entries(STARTS))
        if not shares_keys:
            # Longer than the twin needs: a time-out and two sweeps.
            await asyncio.sleep(4 + 2 * 5 + 1)
            assert long_task.entries(STARTS) == sorted(NAMES)
        assert started["early"] == 1


@pytest.mark.timeout(DURATION_S + 90)
async def test_a_long_task_of_another_app_on_the_same_database_starts_once(
    system: System, long_task: LongTask
) -> None:
    """While deltawire's workers run jobs and sweep what lies unacknowledged, and for two time-outs."""
    deadline = time.monotonic() + DURATION_S + 60
    while long_task.entries(ENDS) != sorted(NAMES):
        assert long_task.is_running, long_task.log[-3000:]
        assert time.monotonic() < deadline, long_task.log[-3000:]
        # Jobs all the while: the worker takes, acknowledges and sweeps.
        check_whole(await watch(system, await submit(system, request(deltas=2, rate=0))))
        await asyncio.sleep(1)

    assert long_task.entries(STARTS) == sorted(NAMES)
