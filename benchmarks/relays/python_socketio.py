"""python-socketio 5.18.1 with its AsyncRedisManager, one process of uvicorn 0.54 (uvloop, websockets-sansio).

WebSocket only, a room per job. The publisher sends, byte for byte, what an external process would by
`AsyncRedisManager(url, write_only=True).emit("delta", chunk, room=job_id)`.
"""

import json
from typing import ClassVar

from benchmarks.processes import Servers
from benchmarks.relays.base import Publisher, Relay, Viewer
from benchmarks.relays.peers import (
    FIVE_MINUTES_S,
    ROOT,
    RedisPublisher,
    SocketIoViewer,
    missing_python,
    uvicorn,
)
from deltawire.redis_server import free_port

HOST_ID = "0" * 32  # of the publishing process: a UUID


class ManagerPublisher(RedisPublisher):
    def command(self, job_id: str, chunk: bytes) -> tuple[str | bytes | float, ...]:
        message = {
            "method": "emit",
            "event": "delta",
            "data": [chunk.decode()],
            "binary": False,
            "namespace": "/",
            "room": job_id,
            "skip_sid": None,
            "callback": None,
            "host_id": HOST_ID,
        }
        return "PUBLISH", "socketio", json.dumps(message)


class PythonSocketIo(Relay):
    name: ClassVar = "python-socketio"

    def missing(self) -> str | None:
        return missing_python()

    def start(self, servers: Servers, redis_port: int) -> None:
        self.port = free_port()
        servers.start(
            "relay",
            uvicorn("benchmarks.relays.python_socketio_app:application", self.port),
            environment={"REDIS_PORT": str(redis_port), "PING_INTERVAL_S": str(FIVE_MINUTES_S)},
            port=self.port,
            cwd=ROOT,
        )

    def publisher(self, redis_port: int) -> Publisher:
        return ManagerPublisher(redis_port)

    def viewer(self, job_id: str, *, from_start: bool = False) -> Viewer:
        return SocketIoViewer(job_id)
