"""Runs the relay: as the process that users run, or in the test's own loop where a constant is patched."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
import uvicorn

from deltawire.api_keys import new_api_key
from deltawire.redis_server import free_port
from deltawire_relay import server
from deltawire_relay.settings import Settings
from tests.support.processes import STOP_TIMEOUT_S, end

START_TIMEOUT_S: Final = 60.0


class RelayDidNotStartError(AssertionError):
    """The process ended or did not get ready; the message is what it logged."""


class RelayProcess:
    """`python -m deltawire_relay` with `environment` on top of a bare one. Blocking; a context manager."""

    def __init__(
        self,
        redis_url: str,
        environment: dict[str, str] | None = None,
        *,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        self.port = free_port()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DELTAWIRE_")},
            "DELTAWIRE_REDIS_URL": redis_url,
            "DELTAWIRE_PORT": str(self.port),
            **(environment or {}),
        }
        self._directory = tempfile.TemporaryDirectory(prefix="deltawire-relay-")
        self._log = Path(self._directory.name, "relay.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_timeout_s = stop_timeout_s

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    @property
    def rss_bytes(self) -> int:
        """Its resident memory now (Linux)."""
        assert self._process is not None
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def launch(self) -> None:
        """Starts the process, without waiting for anything."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deltawire_relay"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start(self) -> None:
        """Returns when /readyz says so. Raises RelayDidNotStartError."""
        self.launch()
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self.log
                self.close()
                raise RelayDidNotStartError(said)
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=1) as response:
                return response.status == 200  # type: ignore[no-any-return] # typed so
        except OSError:
            return False

    def terminate(self) -> None:
        """Sends SIGTERM, as a supervisor does, and returns at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(self._stop_timeout_s)

    def stop(self) -> None:
        """Ends the process, by SIGTERM and, as the last resort, SIGKILL. `start` begins another."""
        if self._process is not None:
            end(self._process, self._stop_timeout_s)
            self._process = None

    def close(self) -> None:
        """Ends it, and removes its files. Idempotent."""
        self.stop()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class Keyring:
    """API keys for a test: `text` is DELTAWIRE_API_KEYS, and each key is found by its name."""

    def __init__(self, **keys: tuple[str, Sequence[str]]) -> None:
        """Each is name=(tenant, scopes)."""
        self._keys: dict[str, str] = {}
        entries = []
        for name, (tenant, scopes) in keys.items():
            self._keys[name], entry = new_api_key(name, tenant, scopes)
            entries.append(entry)
        self.text = ",".join(entries)

    def __getitem__(self, name: str) -> str:
        return self._keys[name]

    def headers(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self[name]}"}


@asynccontextmanager
async def relay_in_process(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[str]:
    """The relay in this loop, at the `host:port` given; for tests that patch its modules' constants."""
    servers: list[uvicorn.Server] = []

    class Captured(server._Server):
        def __init__(self, *args: Any) -> None:  # as the base class
            super().__init__(*args)
            servers.append(self)

    monkeypatch.setattr(server, "_Server", Captured)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    host, port = listener.getsockname()
    task = asyncio.create_task(
        server.serve(
            Settings(redis_url=redis_url, broker_url=redis_url, host=host, port=port, **settings),
            sockets=[listener],
        )
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (servers and servers[0].started):
                if task.done():
                    task.result()
                await asyncio.sleep(0.005)
        yield f"{host}:{port}"
    finally:
        if servers:
            servers[0].should_exit = True
        else:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), STOP_TIMEOUT_S)
