"""The floors: what the least code that can do it costs. `floor_server.py` is their server."""

import asyncio
import itertools
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from benchmarks.processes import Servers
from benchmarks.redis_pipe import RedisPipe
from benchmarks.relays.base import Publisher, Relay, Viewer, upgrade
from deltawire.redis_server import free_port

ROOT = Path(__file__).parents[2]
APPEND = """
redis.call('XADD', KEYS[1], ARGV[1] .. '-0', 'd', ARGV[2])
return redis.call('PUBLISH', KEYS[2], ARGV[1] .. ' ' .. ARGV[2])
"""


class PlainPublisher(Publisher):
    """PUBLISH, nothing else, on the channel that has the job's name."""

    def __init__(self, redis_port: int) -> None:
        self._port = redis_port

    async def open(self, job_ids: Sequence[str]) -> None:
        self._pipe = await RedisPipe.connect(self._port)

    def publish(self, job_id: str, chunk: bytes) -> None:
        self._pipe.send("PUBLISH", job_id, chunk)

    async def close(self) -> None:
        self._pipe.close()


class LogPublisher(PlainPublisher):
    """One script call for each delta: XADD and PUBLISH."""

    async def open(self, job_ids: Sequence[str]) -> None:
        await super().open(job_ids)
        self._sha = await self._pipe.execute("SCRIPT", "LOAD", APPEND)
        self._numbers: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))

    def publish(self, job_id: str, chunk: bytes) -> None:
        self._pipe.send("EVALSHA", self._sha, 2, f"log:{job_id}", job_id, next(self._numbers[job_id]), chunk)


class SocketPublisher(Publisher):
    """Straight to the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lines: list[bytes] = []

    async def open(self, job_ids: Sequence[str]) -> None:
        self._loop = asyncio.get_running_loop()
        _, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    def publish(self, job_id: str, chunk: bytes) -> None:
        if not self._lines:
            self._loop.call_soon(self._flush)
        self._lines.append(b"%s %s\n" % (job_id.encode(), chunk))

    def _flush(self) -> None:
        self._writer.writelines(self._lines)
        self._lines.clear()

    async def close(self) -> None:
        self._writer.close()


class PlainViewer(Viewer):
    """A WebSocket that is ready when the handshake is answered."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = b""

    def hello(self) -> bytes:
        return upgrade(self._path)

    def received(self, data: bytes) -> bytes:
        self._seen += data
        self.is_ready = b"\r\n\r\n" in self._seen
        return b""


class Floor(Relay):
    """Pub/sub only."""

    name: ClassVar = "floor"
    is_peer: ClassVar = False
    kind: ClassVar = "redis"

    def start(self, servers: Servers, redis_port: int) -> None:
        self._start(servers, redis_port)

    def _start(self, servers: Servers, feed_port: int) -> None:
        self.port = free_port()
        command = (sys.executable, "-m", "benchmarks.relays.floor_server", str(self.port), self.kind)
        servers.start("relay", (*command, str(feed_port)), port=self.port, cwd=ROOT)

    def publisher(self, redis_port: int) -> Publisher:
        return PlainPublisher(redis_port)

    def viewer(self, job_id: str, *, from_start: bool = False) -> PlainViewer:
        return PlainViewer(f"/{job_id}{'?all' if from_start else ''}")


class FloorWithLog(Floor):
    """A script call for each delta, and late viewers get what came before."""

    name: ClassVar = "floor-log"
    has_log: ClassVar = True
    kind: ClassVar = "log"

    def publisher(self, redis_port: int) -> Publisher:
        return LogPublisher(redis_port)


class BareSocket(Floor):
    """No Redis at all: the load program feeds the server by a connection of its own."""

    name: ClassVar = "bare socket"
    kind: ClassVar = "socket"

    def start(self, servers: Servers, redis_port: int) -> None:
        self._feed_port = free_port()
        self._start(servers, self._feed_port)

    def publisher(self, redis_port: int) -> Publisher:
        return SocketPublisher(self._feed_port)
