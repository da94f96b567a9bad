"""A whole deltawire for a test session: what starts it, what a test knows of it, and what cleans up."""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import redis

import deltawire
from deltawire.api_keys import SCOPES, new_api_key

from .scripted_gateway import ScriptedGateway

STOP_TIMEOUT_S: Final = 15.0
CLEAR_TIMEOUT_S: Final = 15.0
#: Where a job's message waits in the broker, by priority, and where until its end (`deltawire.queue`).
_QUEUES: Final = ("deltawire", "deltawire\x06\x163", "deltawire\x06\x166", "deltawire\x06\x169", "dw:unacked")


class DeltawireServer:
    """A relay, a worker and a Redis, in processes that end with this one, however it ends. A context manager.

    It wants credentials as an installation for others does: `api_key`, or tokens that are signed with
    `jwt_secret`. `environment` is what an application that uses it has in its own environment.
    """

    def __init__(self, gateway: ScriptedGateway, environment: Mapping[str, str]) -> None:
        self.gateway = gateway
        self.api_key, self._key_entry = new_api_key("tests", "default", sorted(SCOPES))
        self.jwt_secret = secrets.token_urlsafe(32)
        self._settings = environment
        self._process: subprocess.Popen[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Addresses and secrets under the names that deltawire's own programs know them by."""
        return {
            "DELTAWIRE_PUBLIC_URL": self.url,
            "DELTAWIRE_REDIS_URL": self.redis_url,
            "DELTAWIRE_API_KEY": self.api_key,
            "DELTAWIRE_JWT_SECRET": self.jwt_secret,
        }

    @property
    def broker_url(self) -> str:
        """Where a Celery app of yours sends `deltawire.generate`."""
        return self.redis_url

    @property
    def logs(self) -> str:
        """What worker and relay have said so far."""
        return "\n".join(f"--- {path.stem}\n{path.read_text()}" for path in sorted(self._logs.glob("*.log")))

    def client(self, **options: Any) -> "deltawire.Client":
        """A client with all rights; `options` are what else it takes. The caller closes it."""
        return deltawire.Client(self.url, **{"api_key": self.api_key, **options})

    def async_client(self, **options: Any) -> "deltawire.AsyncClient":
        """The same, asynchronous."""
        return deltawire.AsyncClient(self.url, **{"api_key": self.api_key, **options})

    def clear(self) -> None:
        """Cancels and erases all jobs, also those that nobody has begun, and what webhooks have yet to hear.

        Raises RuntimeError if it cannot.
        """
        deadline = time.monotonic() + CLEAR_TIMEOUT_S
        try:
            while self._erase_jobs() or self._redis.exists(*_QUEUES):
                if time.monotonic() > deadline:
                    raise RuntimeError("jobs that were cancelled did not end")
                time.sleep(0.01)
            # An end that nobody has been told of outlives its job.
            self._redis.delete("dw:webhooks", *self._redis.scan_iter("dw:webhook:*"))
        except (deltawire.JobUnavailableError, redis.RedisError) as error:
            raise RuntimeError(f"deltawire does not answer: {error}\n{self.logs[-3000:]}") from error

    def _erase_jobs(self) -> int:
        """How many there were."""
        jobs = self._client.list(limit=100)["data"]
        for job in jobs:
            with suppress(deltawire.NotFoundError):  # its time was over
                self._client.delete(job["id"])
        return len(jobs)

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C in the terminal is pytest's, which then stops it. -P: what lies in the
        # directory where the tests were started must not stand in for a library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deltawire.testing.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._learn(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def _learn(self, keeper: "subprocess.Popen[str]") -> None:
        assert keeper.stdin is not None  # noqa: S101 - it is a pipe
        assert keeper.stdout is not None  # noqa: S101 - it is a pipe
        settings = {
            "DELTAWIRE_UPSTREAM_BASE_URL": self.gateway.base_url,
            "DELTAWIRE_API_KEYS": self._key_entry,
            "DELTAWIRE_JWT_SECRET": self.jwt_secret,
            **self._settings,
        }
        keeper.stdin.write(json.dumps(settings) + "\n")
        keeper.stdin.flush()
        told = json.loads(keeper.stdout.readline() or '{"error": "it ended at once"}')
        if "error" in told:
            raise RuntimeError(f"deltawire did not start: {told['error']}")
        self.url: str = told["url"]
        self.redis_url: str = told["redis_url"]
        self._logs = Path(told["logs"])
        self._client = self.client(timeout_s=CLEAR_TIMEOUT_S)
        self._redis = redis.Redis.from_url(self.redis_url, socket_timeout=CLEAR_TIMEOUT_S)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._client.close()
        self._redis.close()
        self._stop()

    def _stop(self) -> None:
        if self._process is None:
            return
        keeper, self._process = self._process, None
        # A line, as the end of its input may not come: what the tests have forked holds the pipe open, too.
        keeper.communicate("\n", timeout=STOP_TIMEOUT_S)
