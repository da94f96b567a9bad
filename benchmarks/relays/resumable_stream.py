"""resumable-stream 2.2.13 (Vercel, Node 20) in a plain Node HTTP server, SSE; two rows.

The producer of each job lives in the server, reads its source from a Redis channel, as an LLM worker would
feed it, keeps all of it, and sends each chunk to each follower by a PUBLISH of its own. The first row is its
README's "Usage with explicit resumption": jobs run whoever watches; all viewers follow. In the second, its
"Idempotent API", the first viewer's request starts the job and has the stream at first hand: cheaper, but a
job that nobody has watched yet does not run. Its Redis client is its default, node-redis 6.3.1.
"""

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.processes import Servers
from benchmarks.relays.base import Publisher, Relay, Viewer
from benchmarks.relays.peers import NODE, HttpViewer, RedisPublisher, missing_node
from deltawire.redis_server import free_port


class SourcePublisher(RedisPublisher):
    def __init__(self, redis_port: int, port: int, *, starts: bool) -> None:
        super().__init__(redis_port)
        self._port = port
        self._starts = starts
        self._job_ids: Sequence[str] = ()

    async def open(self, job_ids: Sequence[str]) -> None:
        await super().open(job_ids)
        self._job_ids = job_ids
        if not self._starts:
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        for job_id in job_ids:
            writer.write(
                b"POST /jobs/%b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n" % job_id.encode()
            )
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 201 "):
                raise RuntimeError(f"a job was refused: {answer!r}")
        writer.close()

    def command(self, job_id: str, chunk: bytes) -> tuple[str | bytes | float, ...]:
        return "PUBLISH", job_id, chunk

    async def close(self) -> None:
        for job_id in self._job_ids:
            self._redis.send("PUBLISH", job_id, "[DONE]")
        await self._redis.execute("PING")
        await super().close()


class ResumableStream(Relay):
    name: ClassVar = "resumable-stream"
    has_log: ClassVar = True
    api: ClassVar = "explicit"

    def missing(self) -> str | None:
        return missing_node()

    def start(self, servers: Servers, redis_port: int) -> None:
        self.port = free_port()
        environment = {
            "PORT": str(self.port),
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}",
            "API": self.api,
        }
        servers.start(
            "relay",
            ["node", NODE / "resumable_stream.mjs"],
            environment={"NODE_ENV": "production", **environment},
            port=self.port,
        )

    def publisher(self, redis_port: int) -> Publisher:
        return SourcePublisher(redis_port, self.port, starts=self.api == "explicit")

    def viewer(self, job_id: str, *, from_start: bool = False) -> Viewer:
        request = (
            f"GET /jobs/{job_id}?resumeAt=0 HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
        )
        return HttpViewer(request.encode(), expected=200)


class ResumableStreamIdempotent(ResumableStream):
    name: ClassVar = "resumable-stream idempotent"
    api: ClassVar = "idempotent"
