"""Nchan 1.3.6 in nginx 1.22.1 (Debian 12: nginx-light, libnginx-mod-nchan), three rows.

One worker process (a second one costs more), no access log, exact locations instead of regular
expressions (Nchan's README: they cost more than all of Nchan). Published by HTTP POST on 64 connections, one
request at a time on each, a job always on the same one (publishing by WebSocket costs as much); watched by
WebSocket. In memory and with Redis a channel keeps 5,000 messages for ten minutes; without store Redis only
passes messages on (`nchan_redis_storage_mode nostore`, `nchan_redis_nostore_fastpublish on`).
"""

import asyncio
import os
import resource
from collections import deque
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import ClassVar, Final, cast

from benchmarks.processes import Servers
from benchmarks.relays.base import Publisher, Relay, Viewer
from benchmarks.relays.peers import WebSocketViewer
from deltawire.redis_server import free_port

NGINX: Final = Path("/usr/sbin/nginx")
MODULE: Final = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
TEMPLATE: Final = Path(__file__).with_name("nchan.conf")
CONNECTIONS: Final = 64


class _Connection(asyncio.Protocol):
    """A keep-alive connection that posts one message after another, as HTTP clients do."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._is_busy = False
        self._answer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def post(self, request: bytes) -> None:
        if self._is_busy:
            self._waiting.append(request)
        else:
            self._is_busy = True
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found:
            return
        if not head.startswith(b"HTTP/1.1 20"):
            raise RuntimeError(f"Nchan refused a message: {head[:300]!r}")
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._answer = b""
        if self._waiting:
            self._transport.write(self._waiting.popleft())
        else:
            self._is_busy = False

    def close(self) -> None:
        self._transport.close()


class _PostPublisher(Publisher):
    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[_Connection] = []
        self._connection_of: dict[str, _Connection] = {}

    async def open(self, job_ids: Sequence[str]) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(min(CONNECTIONS, len(job_ids))):
            _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
            self._connections.append(connection)
        for number, job_id in enumerate(job_ids):
            self._connection_of[job_id] = self._connections[number % len(self._connections)]

    def publish(self, job_id: str, chunk: bytes) -> None:
        self._connection_of[job_id].post(
            b"POST /publish?id=%b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (job_id.encode(), len(chunk), chunk)
        )

    async def close(self) -> None:
        for connection in self._connections:
            connection.close()


def _is_ready(port: int) -> bool:
    """Whether it answers, and not with the 503 of an Nchan that has not reached Redis yet."""
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request("GET", "/publish?id=probe")
        return connection.getresponse().status in (200, 404)
    except OSError:
        return False
    finally:
        connection.close()


class Nchan(Relay):
    """In memory: the messages never see Redis."""

    name: ClassVar = "nchan memory"
    has_log: ClassVar = True
    workers: ClassVar = 1
    redis: ClassVar = ""

    def missing(self) -> str | None:
        if NGINX.exists() and MODULE.exists():
            return None
        return "install nginx with Nchan: apt-get install nginx-light libnginx-mod-nchan"

    def start(self, servers: Servers, redis_port: int) -> None:
        self.port = free_port()
        folder = servers.folder / "nchan"
        folder.mkdir()
        upstream = f"upstream redis {{ nchan_redis_server redis://127.0.0.1:{redis_port}; {self.redis} }}"
        config = TEMPLATE.read_text()
        for name, value in {
            "MODULE": MODULE,
            "WORKERS": self.workers,
            "FOLDER": folder,
            "PORT": self.port,
            "FILES": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            "HISTORY": 5000,
            "REDIS_UPSTREAM": upstream if self.redis else "",
            "REDIS_PASS": "nchan_redis_pass redis;" if self.redis else "",
        }.items():
            config = config.replace(f"@{name}@", str(value))
        if os.getuid() != 0:
            config = config.replace("user root;\n", "")
        (folder / "nginx.conf").write_text(config)
        command: list[str | Path] = [NGINX, "-p", folder, "-c", folder / "nginx.conf"]
        servers.start("nchan", command, is_ready=lambda: _is_ready(self.port))

    def publisher(self, redis_port: int) -> Publisher:
        return _PostPublisher(self.port)

    def viewer(self, job_id: str, *, from_start: bool = False) -> Viewer:
        return WebSocketViewer(f"/watch?id={job_id}")  # from the oldest message on, by default


class NchanRedisWithoutStore(Nchan):
    name: ClassVar = "nchan redis nostore"
    has_log: ClassVar = False
    redis: ClassVar = "nchan_redis_storage_mode nostore; nchan_redis_nostore_fastpublish on;"


class NchanRedis(Nchan):
    name: ClassVar = "nchan redis"
    redis: ClassVar = "nchan_redis_storage_mode distributed;"
