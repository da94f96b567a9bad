"""What the relays of others share: viewers by HTTP, WebSocket and Socket.IO; publishers by Redis commands."""

import shutil
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.redis_pipe import RedisPipe
from benchmarks.relays.base import Publisher, Viewer, text_frame, upgrade

ROOT: Final = Path(__file__).parents[2]
NODE: Final = Path(__file__).with_name("node")
BENCH_PYTHON: Final = ROOT / ".venv-bench/bin/python"
FIVE_MINUTES_S: Final = 300


def missing_node() -> str | None:
    if shutil.which("node") and (NODE / "node_modules").exists():
        return None
    return "install Node 20 or newer and run `make benchmarks/relays/node/node_modules/.installed`"


def missing_python() -> str | None:
    return None if BENCH_PYTHON.exists() else "run `make .venv-bench/.installed`"


def uvicorn(application: str, port: int) -> list[str | Path]:
    """Its command in .venv-bench, as its documentation has it for production: one process, no access log."""
    options = (
        f"--port {port} --loop uvloop --http httptools --ws websockets-sansio --log-level warning"
        f" --no-access-log --ws-per-message-deflate false --ws-ping-interval {FIVE_MINUTES_S}"
    )
    return [BENCH_PYTHON, "-m", "uvicorn", application, *options.split()]


class RedisPublisher(Publisher):
    """Publishes each delta by one Redis command, as soon as it is there."""

    def __init__(self, redis_port: int) -> None:
        self._redis_port = redis_port

    async def open(self, job_ids: Sequence[str]) -> None:
        self._redis = await RedisPipe.connect(self._redis_port)

    @abstractmethod
    def command(self, job_id: str, chunk: bytes) -> tuple[str | bytes | float, ...]:
        """The command that the peer's own producer library would send for this delta."""

    def publish(self, job_id: str, chunk: bytes) -> None:
        self._redis.send(*self.command(job_id, chunk))

    async def close(self) -> None:
        self._redis.close()


class HttpViewer(Viewer):
    """Sends one request; ready with the answer's head, which has to have the `expected` status."""

    def __init__(self, request: bytes, expected: int) -> None:
        self._request = request
        self._expected = b"HTTP/1.1 %d " % expected
        self._seen = b""

    def hello(self) -> bytes:
        return self._request

    def received(self, data: bytes) -> bytes:
        self._seen += data
        if b"\r\n\r\n" in self._seen:
            if not self._seen.startswith(self._expected):
                raise RuntimeError(f"a viewer was refused: {self._seen[:300]!r}")
            self.is_ready = True
        return b""


class WebSocketViewer(HttpViewer):
    def __init__(self, path: str) -> None:
        super().__init__(upgrade(path), expected=101)


class SocketIoViewer(Viewer):
    """Socket.IO 5 over Engine.IO 4, WebSocket only; ready once the server has accepted the connection.

    It answers no pings: the servers are told to send none for FIVE_MINUTES_S, longer than any run.
    """

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._seen = b""
        self._has_asked = False

    def hello(self) -> bytes:
        return upgrade("/socket.io/?EIO=4&transport=websocket")

    def received(self, data: bytes) -> bytes:
        self._seen += data
        if b'40{"sid"' in self._seen:
            self.is_ready = True
        elif b'0{"sid"' in self._seen and not self._has_asked:
            self._has_asked = True
            return text_frame(b'40{"job":"%b"}' % self._job_id.encode())
        return b""
