"""Django Channels 4.3.2 with channels_redis 4.3.0, one process of uvicorn 0.54 (uvloop, websockets-sansio).

A group per job, on RedisPubSubChannelLayer: channels_redis has two layers, and the other, RedisChannelLayer,
keeps each message in a sorted set until its process fetches it, and drops what is beyond its capacity. The
publisher sends, byte for byte, what another process would by
`channel_layer.group_send(job_id, {"type": "delta", "text": chunk})`.
"""

from typing import ClassVar

import msgspec

from benchmarks.processes import Servers
from benchmarks.relays.base import Publisher, Relay, Viewer
from benchmarks.relays.peers import (
    ROOT,
    RedisPublisher,
    WebSocketViewer,
    missing_python,
    uvicorn,
)
from deltawire.redis_server import free_port


class GroupPublisher(RedisPublisher):
    def command(self, job_id: str, chunk: bytes) -> tuple[str | bytes | float, ...]:
        message = msgspec.msgpack.encode({"type": "delta", "text": chunk.decode()})
        return "PUBLISH", f"asgi__group__{job_id}", message


class Channels(Relay):
    name: ClassVar = "channels"

    def missing(self) -> str | None:
        return missing_python()

    def start(self, servers: Servers, redis_port: int) -> None:
        self.port = free_port()
        servers.start(
            "relay",
            uvicorn("benchmarks.relays.channels_app:application", self.port),
            environment={"REDIS_PORT": str(redis_port)},
            port=self.port,
            cwd=ROOT,
        )

    def publisher(self, redis_port: int) -> Publisher:
        return GroupPublisher(redis_port)

    def viewer(self, job_id: str, *, from_start: bool = False) -> Viewer:
        return WebSocketViewer(f"/jobs/{job_id}")
