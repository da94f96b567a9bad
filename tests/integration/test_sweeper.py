"""The sweeper on a real Redis, with workers' leases and presences as they are."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from deltawire import sweeper as sweeper_module
from deltawire.codec import decode
from deltawire.events import Failed
from deltawire.keys import LEASE_S, Keys
from deltawire.log import JobLog
from deltawire.options import Options
from deltawire.redis_client import RedisClient
from deltawire.redis_server import RedisServer
from deltawire.sweeper import Sweeper
from deltawire_worker.flusher import Flusher
from deltawire_worker.lease import Leases, Presence
from deltawire_worker.run import Run

BODY = b'{"model":"m","messages":[]}'
RUNS = 50
WAIT_S = 30.0


class NoQueue:
    """A broker that nothing is to be sent to."""

    def send(self, job_id: str, **_: Any) -> None:
        raise AssertionError(f"{job_id} was sent again")

    def depth(self) -> int:
        return 1


class Worker:
    """Runs without streams: what a sweeper sees of a worker."""

    def __init__(self, url: str, owner: str) -> None:
        self.owner = owner
        self.client = RedisClient(url, name=owner)
        self.log = JobLog(self.client, Keys())
        self.flusher = Flusher(url, Keys())
        self.runs: dict[str, Run] = {}
        self.leases = Leases(self.flusher, owner, self.runs)
        self.presence = Presence(self.log.index, owner, self.runs)
        self._kept: list[asyncio.Task[None]] = []

    def live(self) -> None:
        """It renews its leases and its presence."""
        self._kept = [asyncio.create_task(keeper.keep()) for keeper in (self.leases, self.presence)]

    async def stall(self) -> None:
        """It says nothing more, until it lives again."""
        for task in self._kept:
            task.cancel()
        await asyncio.wait(self._kept)

    async def take(self, job_id: str, **options: Any) -> None:
        await self.log.submit(
            job_id, request=BODY, options=Options(**options), digest="d", created_at=1_000_000.0
        )
        await self.presence.begins(job_id)
        claim = await self.log.claim(job_id, owner=self.owner, lease_s=LEASE_S)
        assert claim.record is not None
        run = Run(job_id, claim.attempt, claim.record)
        run.writer = self.flusher.open(
            job_id,
            record=claim.record,
            owner=self.owner,
            top=claim.top,
            on_cancel=lambda: None,
            on_refused=lambda _: None,
        )
        self.runs[job_id] = run
        self.presence.claimed(job_id)

    async def statuses(self) -> list[str]:
        records = [await self.log.record(job_id) for job_id in self.runs]
        return [record.status if record else "unknown" for record in records]


@asynccontextmanager
async def worker(url: str, owner: str = "w1") -> AsyncIterator[Worker]:
    """A worker that lives."""
    made = Worker(url, owner)
    await made.flusher.start()
    made.live()
    try:
        yield made
    finally:
        await made.stall()
        await made.flusher.close()
        await made.client.aclose()


@asynccontextmanager
async def sweeping(url: str, owner: str) -> AsyncIterator[Sweeper]:
    """A sweeper in its own connection."""
    client = RedisClient(url, name=owner)
    sweeper = Sweeper(JobLog(client, Keys()), NoQueue(), owner=owner)
    task = asyncio.create_task(sweeper.keep())
    try:
        yield sweeper
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await client.aclose()


async def until_ended(made: Worker) -> list[str]:
    async with asyncio.timeout(WAIT_S):
        while "in_progress" in (statuses := await made.statuses()):  # noqa: ASYNC110 - Redis has no event for tests
            await asyncio.sleep(0.1)
    return statuses


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that a test may stop; others go on using theirs."""
    with RedisServer(program=os.environ.get("DELTAWIRE_TEST_REDIS_PROGRAM")) as server:
        yield server


@pytest.mark.parametrize("looks_once", [False, True], ids=["two looks", "negative twin: one look"])
async def test_a_redis_that_stalls_ends_nobodys_jobs(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch, *, looks_once: bool
) -> None:
    """Every lease runs out in 6 s; a sweeper that believed it at once would end living streams."""
    if looks_once:
        monkeypatch.setattr(sweeper_module, "LEASE_S", 0.0)
    async with worker(own_server.url) as made, sweeping(own_server.url, "s1") as sweeper:
        for n in range(RUNS):
            await made.take(f"job-{n}", restart="never")
        # The worker is the last to come back: its sweeper's commands are executed before its renewals.
        await made.stall()
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(LEASE_S + 1)
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        for job_id in made.runs:
            sweeper.report(job_id)
        await sweeper.sweep()
        made.live()
        await asyncio.sleep(LEASE_S + 2)  # past what would be a second look
        await sweeper.sweep()
        assert await made.statuses() == ["failed" if looks_once else "in_progress"] * RUNS


async def test_a_dead_workers_jobs_end_and_a_living_ones_go_on(redis_url: str) -> None:
    """With several sweepers, which agree: each job has one terminal event."""
    async with (
        worker(redis_url, "dead") as dead,
        worker(redis_url, "alive") as alive,
        sweeping(redis_url, "s1"),
        sweeping(redis_url, "s2"),
    ):
        for n in range(10):
            await dead.take(f"dead-{n}", restart="never")
            await alive.take(f"alive-{n}", restart="never")
        await dead.stall()
        assert await until_ended(dead) == ["failed"] * 10
        assert await alive.statuses() == ["in_progress"] * 10
        for job_id in dead.runs:
            lines = await dead.log.read(job_id, 0)
            assert [type(decode(text)) for text in lines[1:]] == [Failed]
        async with asyncio.timeout(WAIT_S):
            while await dead.log.index.jobs_of("dead") or await dead.log.index.lost_owners():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.1)
        assert len(await alive.log.index.jobs_of("alive")) == 10
