"""A stand-in for a worker: writes real logs through `JobLog`, so that the relay's tests need no worker."""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from deltawire.codec import DeltaEncoder, encode_terminal
from deltawire.errors import Error
from deltawire.events import (
    Cancel,
    Cancelled,
    Completed,
    Failed,
    Incomplete,
    IncompleteDetails,
    TerminalEvent,
    Timings,
)
from deltawire.keys import Keys
from deltawire.log import JobLog
from deltawire.options import Options
from deltawire.queue import QUEUE
from deltawire.redis_client import RedisClient
from tests.support.sample_events import in_progress, line, queued, text_chunk

REQUEST: Final = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
OWNER: Final = "producer"
WAIT_S: Final = 30.0
USAGE: Final = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def completion(text: str) -> dict[str, Any]:
    """A `chat.completion` with one choice."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


class ProducedJob:
    """One job and its writer. `lines` is the log as written: what every reader must see."""

    def __init__(self, log: JobLog, job_id: str) -> None:
        self.job_id = job_id
        self.attempt = 0
        self.lines: list[bytes] = []
        self._log = log
        self._encoder = DeltaEncoder(job_id, 1)

    @property
    def top(self) -> int:
        return len(self.lines)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.lines]

    async def submit(self, *, tenant: str = "default", metadata: dict[str, str] | None = None) -> None:
        """Writes the record and event 1."""
        created_at = time.time()
        await self._log.submit(
            self.job_id,
            request=json.dumps(REQUEST).encode(),
            options=Options(tenant=tenant, metadata=metadata or {}),
            digest="none",
            created_at=created_at,
        )
        # As `submit` encoded it; its times may differ from the log's in the last digits.
        self.lines = await self._log.read(self.job_id, 0) or [line(queued(job_id=self.job_id))]

    async def adopt(self) -> None:
        """Waits for the message of a job that somebody else submits, and claims it."""
        async with asyncio.timeout(WAIT_S):
            while not await self._was_sent():  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.005)
        self.lines = await self._log.read(self.job_id, 0)
        await self.claim()

    async def _was_sent(self) -> bool:
        messages: list[bytes] = await self._log.scripts.execute("LRANGE", QUEUE, 0, -1)
        return any(self.job_id.encode() in message for message in messages)

    async def claim(self) -> None:
        """Claims the job and appends `in_progress`; a job without a record gets one."""
        request = json.dumps(REQUEST).encode() if not self.lines else None
        claim = await self._log.claim(self.job_id, owner=OWNER, lease_s=600, request=request)
        assert claim.code == "CLAIMED", claim
        self.attempt = claim.attempt
        self._encoder = DeltaEncoder(self.job_id, self.attempt)
        await self.append([line(in_progress(self.top + 1, job_id=self.job_id, attempt=self.attempt))])

    async def append(self, lines: Sequence[bytes], *, terminal: str = "") -> None:
        """One append, which the log must take."""
        code, top = await self._log.append(
            self.job_id,
            attempt=self.attempt,
            owner=OWNER,
            first=self.top + 1,
            events=lines,
            terminal=terminal,
        )
        assert code in {"OK", "CANCELLING"}, code
        self.lines += lines
        assert top == self.top

    def encode_deltas(self, texts: Iterable[str]) -> list[bytes]:
        """The next deltas, one for each text."""
        return [
            self._encoder.encode(number, time.time(), json.dumps(text_chunk(text)).encode())
            for number, text in enumerate(texts, self.top + 1)
        ]

    async def deltas(self, *texts: str) -> None:
        """Appends deltas, in one batch."""
        await self.append(self.encode_deltas(texts))

    async def chunks(self, *chunks: bytes) -> None:
        """Appends deltas of exactly these bytes, in one batch."""
        numbered = enumerate(chunks, self.top + 1)
        await self.append([self._encoder.encode(number, time.time(), chunk) for number, chunk in numbered])

    async def stream(self, batches: Iterable[Sequence[str]], pauses_s: Iterable[float] = (0.0,)) -> None:
        """Appends batch after batch, with the pauses between them (repeated as needed)."""
        for texts, pause_s in zip(batches, itertools.cycle(pauses_s), strict=False):
            await self.deltas(*texts)
            await asyncio.sleep(pause_s)

    async def end(self, kind: str = "completed", **fields: Any) -> None:
        """Appends the terminal event of that type, with other fields where they are given."""
        event = msgspec.structs.replace(self.terminal_event(kind), **fields)
        await self.append([encode_terminal(event)], terminal=kind)

    def terminal_event(self, kind: str) -> TerminalEvent:
        fields: dict[str, Any] = {
            "job_id": self.job_id,
            "sequence_number": self.top + 1,
            "attempt": self.attempt,
            "created_at": time.time(),
            "completion": completion("the whole text"),
            "usage": USAGE,
            "usage_source": "provider",
            "timings": Timings(queued_s=0.1, first_delta_s=0.2, total_s=0.3),
        }
        if kind == "completed":
            return Completed(**fields)
        if kind == "incomplete":
            return Incomplete(**fields, incomplete_details=IncompleteDetails("length"))
        if kind == "failed":
            error = Error(message="no", type="upstream_error", code="upstream_rate_limit", retryable=True)
            return Failed(**fields, error=error, source="upstream", status_code=429)
        cancel = Cancel(reason="client", requested_at=1.0, upstream_closed_at=2.0)
        return Cancelled(**fields, cancel=cancel)


class Producer:
    """Makes jobs on one Redis."""

    def __init__(self, log: JobLog) -> None:
        self.log = log

    def job(self, job_id: str | None = None) -> ProducedJob:
        """A job that is not in Redis yet."""
        return ProducedJob(self.log, job_id or f"job-{uuid.uuid4().hex[:12]}")

    async def queued(self, job_id: str | None = None, *, tenant: str = "default") -> ProducedJob:
        job = self.job(job_id)
        await job.submit(tenant=tenant)
        return job

    async def running(self, *texts: str, tenant: str = "default") -> ProducedJob:
        """A claimed job with a delta for each text."""
        job = await self.queued(tenant=tenant)
        await job.claim()
        if texts:
            await job.deltas(*texts)
        return job

    async def ended(self, *texts: str, kind: str = "completed", tenant: str = "default") -> ProducedJob:
        job = await self.running(*texts, tenant=tenant)
        await job.end(kind)
        return job


@asynccontextmanager
async def producer(redis_url: str) -> AsyncIterator[Producer]:
    client = RedisClient(redis_url, name="deltawire-producer")
    try:
        yield Producer(JobLog(client, Keys()))
    finally:
        await client.aclose()
