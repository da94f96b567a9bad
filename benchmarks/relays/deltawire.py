"""Ours: the relay's real process, fed by a worker's write path: records, leases, fenced appends, the log."""

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.processes import Servers
from benchmarks.relays.base import Publisher, Relay, Viewer, upgrade
from benchmarks.scraper import scrape
from deltawire.api_keys import new_api_key
from deltawire.codec import encode
from deltawire.events import InProgress
from deltawire.fold import Fold
from deltawire.keys import LEASE_S, Keys
from deltawire.log import AppendCode, JobLog
from deltawire.options import Options
from deltawire.redis_client import RedisClient
from deltawire.redis_server import free_port
from deltawire_worker.flusher import Flusher
from deltawire_worker.lease import Leases
from deltawire_worker.run import Run
from deltawire_worker.writer import JobWriter

OWNER = "bench"
REQUEST = b'{"model":"bench","messages":[{"role":"user","content":"hi"}]}'
CLAIMING = 200
PING = b"\x89\x00"
MASKED_PONG = b"\x8a\x80\x00\x00\x00\x00"


class RefusedError(RuntimeError):
    """The log does not take what is published: the benchmark is wrong."""


class DeltawirePublisher(Publisher):
    """What a worker does from the chunk on: `JobWriter`s behind one `Flusher`, with leases that are renewed.

    The fold is not fed: no snapshot leaves a worker whose Redis loses nothing and whose logs stay short.
    """

    def __init__(self, redis_port: int) -> None:
        url = f"redis://127.0.0.1:{redis_port}/0"
        self._client = RedisClient(url, name="bench")
        self._log = JobLog(self._client, Keys())
        self._flusher = Flusher(url, Keys())
        self._writers: dict[str, JobWriter] = {}
        self._runs: dict[str, Run] = {}
        self._fold = Fold()
        self._renewing: asyncio.Task[None] | None = None

    async def open(self, job_ids: Sequence[str]) -> None:
        await self._flusher.start()
        door = asyncio.Semaphore(CLAIMING)
        self._renewing = asyncio.create_task(Leases(self._flusher, OWNER, self._runs).keep())

        async def begin(job_id: str) -> None:
            async with door:
                await self._begin(job_id)

        await asyncio.gather(*map(begin, job_ids))

    async def _begin(self, job_id: str) -> None:
        await self._log.submit(
            job_id, request=REQUEST, options=Options(), digest="bench", created_at=time.time()
        )
        claim = await self._log.claim(job_id, owner=OWNER, lease_s=LEASE_S)
        if claim.code != "CLAIMED" or claim.record is None:
            raise RefusedError(f"the claim of {job_id} came to {claim.code}")
        run = Run(job_id, claim.attempt, claim.record)
        run.writer = writer = self._flusher.open(
            job_id,
            record=claim.record,
            owner=OWNER,
            top=claim.top,
            on_cancel=lambda: None,
            on_refused=self._refused,
        )
        event = InProgress(
            job_id=job_id,
            sequence_number=writer.next_number,
            attempt=claim.attempt,
            created_at=time.time(),
            upstream="default",
            model="bench",
        )
        writer.put(encode(event))
        self._writers[job_id] = writer
        self._runs[job_id] = run

    @staticmethod
    def _refused(code: AppendCode) -> None:
        raise RefusedError(f"an append came to {code}")

    def publish(self, job_id: str, chunk: bytes) -> None:
        self._writers[job_id].put_deltas([chunk], time.time(), self._fold)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        for writer in self._writers.values():
            self._flusher.close_writer(writer)
        await self._flusher.close()
        await self._client.aclose()


class DeltawireViewer(Viewer):
    answers = True

    def __init__(self, path: str, headers: str = "") -> None:
        self._path = path
        self._headers = headers
        self._seen = b""

    def hello(self) -> bytes:
        return upgrade(self._path, self._headers)

    def received(self, data: bytes) -> bytes:
        self._seen += data
        self.is_ready = b'"type":"subscribed"' in self._seen
        return b""

    def answer(self, data: bytes) -> bytes:
        return MASKED_PONG if PING in data else b""


class Deltawire(Relay):
    name: ClassVar = "deltawire"
    is_peer: ClassVar = False
    has_log: ClassVar = True
    has_snapshots: ClassVar = True
    _headers = ""

    def _environment(self) -> dict[str, str]:
        return {}

    def start(self, servers: Servers, redis_port: int) -> None:
        self.port = free_port()
        environment = {
            "DELTAWIRE_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "DELTAWIRE_PORT": str(self.port),
            **self._environment(),
        }
        command = (sys.executable, "-m", "deltawire_relay")
        servers.start("relay", command, environment=environment, port=self.port)

    def publisher(self, redis_port: int) -> DeltawirePublisher:
        return DeltawirePublisher(redis_port)

    def viewer(self, job_id: str, *, from_start: bool = False) -> DeltawireViewer:
        return DeltawireViewer(f"/v1/jobs/{job_id}/ws", self._headers)

    def late_viewer(self, job_id: str) -> DeltawireViewer:
        return DeltawireViewer(f"/v1/jobs/{job_id}/ws?mode=snapshot", self._headers)


class Guarded(Deltawire):
    """As in production: every viewer shows a key, and Prometheus asks each second."""

    name: ClassVar = "deltawire, with keys and scraped"

    def __init__(self) -> None:
        self._key, self._entry = new_api_key("bench", "default", ["read", "metrics"])
        self._headers = f"Authorization: Bearer {self._key}\r\n"

    def _environment(self) -> dict[str, str]:
        return {"DELTAWIRE_API_KEYS": self._entry}

    def start(self, servers: Servers, redis_port: int) -> None:
        super().start(servers, redis_port)
        scrape(self.port, self._key)
