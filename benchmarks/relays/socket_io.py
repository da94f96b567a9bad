"""socket.io 4.8.4 (Node 20), with @socket.io/redis-adapter 8.3.0 or @socket.io/redis-streams-adapter 0.3.1.

One Node process, WebSocket only, a room per job, no compression (the default); `bufferutil` is there and the
first HTTP request freed, as its page "Performance tuning" says; node-redis 6.3.1 (ioredis costs as much). A
delta is one event whose argument is the chunk as a string: the server would encode an object anew. The
publisher sends, byte for byte, what @socket.io/redis-emitter 5.1.0 does, or what a server with the streams
adapter does for `io.to(job_id).emit("delta", chunk)`. With that adapter connection state recovery is on: it
resumes a connection that broke, but who comes late gets nothing of what came before.
"""

from typing import ClassVar

import msgspec

from benchmarks.processes import Servers
from benchmarks.relays.base import Publisher, Relay, Viewer
from benchmarks.relays.peers import NODE, RedisPublisher, SocketIoViewer, missing_node
from deltawire.redis_server import free_port

EVENT = 2  # socket.io-parser's PacketType
BROADCAST = "3"  # socket.io-adapter's MessageType
MAX_LEN = (
    100_000  # of the one stream: the default, 10,000, is a second of scenario A, and what is trimmed is lost
)


class EmitterPublisher(RedisPublisher):
    """`new Emitter(redis).to(job_id).emit("delta", chunk)`"""

    def command(self, job_id: str, chunk: bytes) -> tuple[str | bytes | float, ...]:
        packet = {"type": EVENT, "data": ["delta", chunk.decode()], "nsp": "/"}
        options = {"rooms": [job_id], "flags": {}, "except": []}
        message = msgspec.msgpack.encode(("emitter", packet, options))
        return "PUBLISH", f"socket.io#/#{job_id}#", message


class StreamPublisher(RedisPublisher):
    """What `io.to(job_id).emit("delta", chunk)` of another server adds to the adapter's stream."""

    def command(self, job_id: str, chunk: bytes) -> tuple[str | bytes | float, ...]:
        packet = {"type": EVENT, "data": ["delta", chunk.decode()]}
        options = {"rooms": [job_id], "except": [], "flags": {}}
        data = msgspec.json.encode({"packet": packet, "opts": options})
        entry = ("uid", "emitter", "nsp", "/", "type", BROADCAST, "data", data)
        return "XADD", "socket.io", "MAXLEN", "~", MAX_LEN, "*", *entry


class SocketIo(Relay):
    name: ClassVar = "socket.io"
    adapter: ClassVar = "redis"

    def missing(self) -> str | None:
        return missing_node()

    def start(self, servers: Servers, redis_port: int) -> None:
        self.port = free_port()
        environment = {
            "PORT": str(self.port),
            "REDIS_PORT": str(redis_port),
            "ADAPTER": self.adapter,
            "MAX_LEN": str(MAX_LEN),
        }
        servers.start(
            "relay",
            ["node", NODE / "socket_io.mjs"],
            environment={"NODE_ENV": "production", **environment},
            port=self.port,
        )

    def publisher(self, redis_port: int) -> Publisher:
        return EmitterPublisher(redis_port)

    def viewer(self, job_id: str, *, from_start: bool = False) -> Viewer:
        return SocketIoViewer(job_id)


class SocketIoStreams(SocketIo):
    name: ClassVar = "socket.io streams"
    adapter: ClassVar = "redis-streams"

    def publisher(self, redis_port: int) -> Publisher:
        return StreamPublisher(redis_port)
