"""Appends of many jobs behind sentinels and on a cluster, while primaries are lost and slots move."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from deltawire import redis_client, redis_connection
from deltawire.codec import is_snapshot, sequence_number_of
from deltawire.fold import Fold
from deltawire.keys import Keys
from deltawire.log import JobLog
from deltawire.redis_client import RedisClient
from deltawire.redis_nodes import slot_of
from deltawire_worker.flusher import Flusher
from deltawire_worker.writer import JobWriter
from tests.support.redis_servers import ClusterServers, SentinelServers

DEADLINE_S = 60.0
JOBS = 60
OWNER = "w"


class Bench:
    """Writers that never stop, one for each job."""

    def __init__(self, flusher: Flusher, log: JobLog) -> None:
        self.flusher = flusher
        self.log = log
        self.writers: dict[str, JobWriter] = {}
        self.refused: list[str] = []

    async def open(self, job_id: str) -> None:
        claim = await self.log.claim(job_id, owner=OWNER, lease_s=60, request=b"{}")
        assert claim.record is not None
        self.writers[job_id] = self.flusher.open(
            job_id,
            record=claim.record,
            owner=OWNER,
            top=claim.top,
            on_cancel=lambda: None,
            on_refused=self.refused.append,
        )

    async def write(self) -> None:
        while True:
            for writer in self.writers.values():
                writer.put_deltas([b'{"choices":[]}'], time.time(), Fold())
            await asyncio.sleep(0.01)

    async def all_acknowledged(self, job_ids: list[str] | None = None, *, more: int = 0) -> None:
        """Waits until what has been put by now, and so many further events of each, are in the logs."""
        writers = [self.writers[job_id] for job_id in job_ids or self.writers]
        put = [writer.next_number - 1 + more for writer in writers]
        await eventually(
            lambda: all(writer._acknowledged >= number for writer, number in zip(writers, put, strict=True))
        )

    async def check(self) -> None:
        """Every log has all events without a hole, and every writer has been served.

        From 1 on; or from a snapshot on, where more was lost than a writer holds.
        """
        for job_id, writer in self.writers.items():
            lines = [line async for page in self.log.pages(job_id) for line in page]
            first = sequence_number_of(lines[0])
            assert first == 1 or is_snapshot(lines[0])
            assert [*map(sequence_number_of, lines)] == list(range(first, writer.next_number)), job_id
        assert self.refused == []


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.01)


@asynccontextmanager
async def bench_of(url: str) -> AsyncIterator[Bench]:
    """Writers at work. When the body is done they stop, and all logs are checked."""
    keys = Keys.at(url)
    client, flusher = RedisClient(url, name="test"), Flusher(url, keys)
    await flusher.start()
    bench = Bench(flusher, JobLog(client, keys))
    writing: asyncio.Task[None] | None = None
    try:
        for number in range(JOBS):
            await bench.open(f"job{number}")
        writing = asyncio.create_task(bench.write())
        await bench.all_acknowledged()
        yield bench
        await bench.all_acknowledged(more=1)  # what was there may have been taken by a server that is lost
        writing.cancel()
        await asyncio.wait([writing])
        await bench.all_acknowledged()
        await bench.check()
    finally:
        if writing is not None:
            writing.cancel()
        await flusher.close()
        await client.aclose()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent server is left soon, and a busy machine has time."""
    monkeypatch.setattr(redis_connection, "REPLY_TIMEOUT_S", 2.0)
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", DEADLINE_S)


@pytest.mark.parametrize("how", ["killed", "paused", "asked to"])
async def test_writers_outlive_a_failover_of_the_sentinels(how: str) -> None:
    """What the old primary took and the new one lacks is written again."""
    with SentinelServers() as servers:
        async with bench_of(servers.url):
            lost = servers.primary
            if how == "asked to":
                servers.fail_over()
            else:
                (servers.kill if how == "killed" else servers.pause)(lost)
            await asyncio.to_thread(servers.wait_for_failover, lost)


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_writers_outlive_a_takeover_in_the_cluster(how: str) -> None:
    """All jobs of the lost primary go on at its replica, those of the others undisturbed."""
    with ClusterServers(replicas=True) as servers:
        async with bench_of(servers.url) as bench:
            lost = servers.nodes[0]
            others = [job for job in bench.writers if servers.node_of(f"{{{job}}}") is not lost]
            assert 0 < len(others) < JOBS
            (servers.kill if how == "killed" else servers.pause)(lost)
            await bench.all_acknowledged(others)
            await asyncio.to_thread(servers.wait_for_takeover, lost)


async def test_writers_follow_slots_that_move(cluster_servers: ClusterServers) -> None:
    """A job's keys, its channel among them, move under its writer."""
    cluster_servers.flush()
    async with bench_of(cluster_servers.url) as bench:
        moved = []
        for job_id in list(bench.writers)[:10]:
            key = bench.log.keys.job(job_id).log
            source = cluster_servers.node_of(key)
            target = next(node for node in cluster_servers.nodes if node is not source)
            await asyncio.to_thread(cluster_servers.move, slot_of(key), source, target)
            moved.append((key, source, target))
        await bench.all_acknowledged()
        for key, source, target in moved:
            assert cluster_servers.node_of(key) is target
            await asyncio.to_thread(cluster_servers.move, slot_of(key), target, source)


async def test_a_lost_node_stops_its_own_writers_only() -> None:
    """They wait, within their bound; when the node is back, empty, their logs are written anew."""
    with ClusterServers() as servers:
        async with bench_of(servers.url) as bench:
            lost = servers.nodes[2]
            theirs = [job for job in bench.writers if servers.node_of(f"{{{job}}}") is lost]
            others = [job for job in bench.writers if job not in theirs]
            servers.kill(lost)
            await eventually(lambda: all(bench.writers[job].pending_bytes for job in theirs))
            for _ in range(3):
                await bench.all_acknowledged(others)
            assert bench.flusher.is_connected
            lost.start()
