"""`python -m deltawire.testing.keeper`: starts Redis, relay and worker for a test session, and ends them.

It reads their settings, one line of JSON, from its input, and writes where they are, or what went wrong,
as one line. When another line comes, or its input ends, all of it ends: a pipe is closed whatever becomes of
the process that tests, be it killed. It is a process of its own for that.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final
from urllib.request import ProxyHandler, build_opener

from deltawire.redis_server import NoRedisServerError, RedisServer, free_port

START_TIMEOUT_S: Final = 60.0


class _NotStartedError(Exception):
    """A service did not start; what it said."""


class _Service:
    """A relay or a worker, as a process with a log. A context manager."""

    def __init__(self, name: str, module: str, port: int, environment: dict[str, str], logs: Path) -> None:
        self._name = name
        self._command = (sys.executable, "-P", "-m", module)
        self._environment = environment
        self._log = logs / f"{name}.log"
        self._ready_url = f"http://127.0.0.1:{port}/readyz"

    def __enter__(self) -> "_Service":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own programs
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *_: object) -> None:
        # At once: what it was at is of no interest any more.
        self._process.kill()
        self._process.wait()

    def is_ready(self) -> bool:
        """Raises _NotStartedError if it has ended."""
        if self._process.poll() is not None:
            raise _NotStartedError(
                f"the {self._name} ended:\n{self._log.read_text(errors='replace')[-3000:]}"
            )
        try:
            with build_opener(ProxyHandler({})).open(self._ready_url, timeout=2) as response:
                return bool(response.status == 200)
        except OSError:  # urllib's errors included
            return False


class _Owner:
    """The process that started this one, at the other end of the input."""

    def __init__(self) -> None:
        self._pid = os.getppid()

    def is_there(self, timeout_s: float) -> bool:
        """False at once when it has gone."""
        ended, _, _ = select.select([sys.stdin], [], [], timeout_s)
        # A process that it has forked may hold the other end open: then the parent tells.
        return not ended and os.getppid() == self._pid


def main() -> int:
    owner = _Owner()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings: dict[str, str] = json.loads(sys.stdin.readline())
    with ExitStack() as running:
        try:
            told = _start(owner, settings, running)
        except (NoRedisServerError, _NotStartedError) as error:
            told = {"error": str(error)}
        print(json.dumps(told), flush=True)  # noqa: T201 - for the one who started us
        while "error" not in told and owner.is_there(1.0):
            pass
    return 0


def _start(owner: _Owner, settings: dict[str, str], running: ExitStack) -> dict[str, Any]:
    logs = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="deltawire-testing-")))
    redis = running.enter_context(RedisServer())
    relay_port, worker_port = free_port(), free_port()
    # Nor is there a proxy on the way to a gateway on this machine; `settings` may name one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DELTAWIRE_") and not name.lower().endswith("_proxy")
    }
    environment |= {
        "DELTAWIRE_REDIS_URL": redis.url,
        "DELTAWIRE_PORT": str(relay_port),
        "DELTAWIRE_WORKER_PORT": str(worker_port),
        **settings,
    }
    starting = [
        running.enter_context(_Service("relay", "deltawire_relay", relay_port, environment, logs)),
        running.enter_context(_Service("worker", "deltawire_worker", worker_port, environment, logs)),
    ]
    deadline = time.monotonic() + START_TIMEOUT_S
    while starting:
        if not owner.is_there(0.02):
            raise _NotStartedError("the tests have gone")
        if time.monotonic() > deadline:
            raise _NotStartedError(f"it was not ready after {START_TIMEOUT_S:.0f} s")
        starting = [service for service in starting if not service.is_ready()]
    return {"url": f"http://127.0.0.1:{relay_port}", "redis_url": redis.url, "logs": str(logs)}


if __name__ == "__main__":
    sys.exit(main())
