"""A scenario: jobs, viewers, faults, and at the end the row of figures that says what became of them.

async with chaos.scenario("worker killed", system) as scenario:
    jobs = await scenario.submit(200, request(deltas=100, rate=10))
    scenario.watch(jobs)
    await scenario.streaming()
    scenario.strike(lambda: system.workers[0].signal(signal.SIGKILL))
    await scenario.over()
scenario.check(max_wait_s=15)
"""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from deltawire.keys import Keys
from deltawire.redis_client import RedisClient
from tests.support.ledger import FaultClock, Figures, Ledger, check_log
from tests.support.system import System, gateway_records
from tests.support.viewers import Crowd, OneJobViewer, StreamViewer

SUBMITTING: Final = 20
SUBMIT_S: Final = 30.0
OVER_S: Final = 90.0
_SNAPSHOT: Final = b'{"type":"snapshot",'  # what a log begins with that was written again (PROTOCOL §3.2)
_NUMBER: Final = re.compile(rb'"sequence_number":(\d+),')
Value = TypeVar("Value")


class Scenario:
    """Ends with the block: sums up, asks Redis for the logs, and hands the row in."""

    def __init__(
        self, figures: Figures, redis_url: str, relays: Sequence[str], *, submit_to: str | None = None
    ) -> None:
        self.figures = figures
        self.clock = FaultClock()
        self.randomness = random.Random(f"{figures.scenario}-{figures.seed}")
        self.crowd = Crowd(relays, self.clock)
        self.jobs: list[str] = []
        self.logs: dict[str, list[bytes]] = {}
        self.has_completions = True  # logs of a Producer have none that fits
        self._redis = RedisClient(redis_url, name="deltawire-chaos")
        self._submit_to = submit_to or f"http://{relays[0]}"
        self._began = time.monotonic()

    async def submit(
        self, count: int, body: dict[str, Any], options: Sequence[dict[str, Any]] = ({},)
    ) -> list[str]:
        """So many jobs by `POST /v1/jobs`, which is tried again where it says so; options are dealt out."""
        door = asyncio.Semaphore(SUBMITTING)

        async def submit(number: int) -> str:
            job = {"request": body, "options": options[number % len(options)]}
            deadline = time.monotonic() + SUBMIT_S
            async with door:
                while True:
                    response = await self.crowd.http.post(f"{self._submit_to}/v1/jobs", json=job)
                    if response.status_code != 503 or time.monotonic() > deadline:
                        break
                    await asyncio.sleep(float(response.headers["Retry-After"]))
            assert response.status_code == 202, response.text
            return str(response.json()["id"])

        ids = await asyncio.gather(*(submit(number) for number in range(count)))
        self.jobs += ids
        return ids

    def watch(
        self, jobs: Sequence[str], *, sockets: int = 2, one_job: float = 0.25, streams: float = 0.1
    ) -> None:
        """Sockets that carry all of the jobs, and for a share of the jobs a connection of their own."""
        for number in range(sockets):
            self.crowd.open_socket(jobs, first=number)
        self.crowd.watch(jobs[: round(len(jobs) * one_job)], OneJobViewer)
        self.crowd.watch(jobs[: round(len(jobs) * streams)], StreamViewer)

    async def streaming(self, timeout_s: float = OVER_S) -> None:
        """Waits until every subscriber has a delta, and all that its job's log has by then."""
        has_delta = await self.crowd.until(lambda ledger: ledger.deltas > 0 or ledger.is_over, timeout_s)
        assert has_delta, "no delta for all"
        await self._reach(await self._tops(), timeout_s)

    def strike(self, fault: Callable[[], Value]) -> Value:
        """Does it, and notes when."""
        self.clock.strike()
        self.figures.faults += 1
        return fault()

    async def recovered(self, timeout_s: float = OVER_S) -> None:
        """Waits until every subscriber has an event that is not in the log yet, or is over.

        Not just the next one: a busy viewer may still have some to read from before the fault.
        """
        tops = await self._tops()
        await self._reach({job_id: top + 1 for job_id, top in tops.items()}, timeout_s)

    async def _reach(self, numbers: Mapping[str, int], timeout_s: float) -> None:
        def has_reached(ledger: Ledger) -> bool:
            return ledger.is_over or ledger.position >= numbers[ledger.job_id]

        assert await self.crowd.until(has_reached, timeout_s), "not all have caught up"

    async def _tops(self) -> dict[str, int]:
        """The number of each log's last event."""
        keys = Keys()
        ends = await asyncio.gather(
            *(
                self._redis.execute("XREVRANGE", keys.job(job_id).log, "+", "-", "COUNT", 1)
                for job_id in self.jobs
            )
        )
        return {
            job_id: int(end[0][0].partition(b"-")[0]) for job_id, end in zip(self.jobs, ends, strict=True)
        }

    async def over(self, timeout_s: float = OVER_S) -> None:
        """Waits until every subscription is over, or that long: what is not over then counts as unended."""
        await self.crowd.over(timeout_s)

    async def cancel(self, relay: str) -> None:
        """Ends all jobs, whose streams would go on and on, at a relay ("host:port")."""
        for job_id in self.jobs:
            answer = await self.crowd.http.post(f"http://{relay}/v1/jobs/{job_id}/cancel")
            assert answer.status_code == 200, answer.text

    async def read_logs(self) -> dict[str, list[bytes]]:
        """The events that Redis has now of all jobs; of none where a log is gone."""
        keys = Keys()
        entries = await asyncio.gather(
            *(self._redis.execute("XRANGE", keys.job(job_id).log, "-", "+") for job_id in self.jobs)
        )
        logs = {
            job_id: [fields[1] for _, fields in log if not fields[1].startswith(_SNAPSHOT)]
            for job_id, log in zip(self.jobs, entries, strict=True)
        }
        return {job_id: lines for job_id, lines in logs.items() if lines}

    def check(self, *, max_wait_s: float | None = None, snapshots: bool = False) -> None:
        """Raises AssertionError with all that was broken."""
        self.figures.judge(max_wait_s=max_wait_s, snapshots=snapshots)
        assert not self.figures.broken, self.figures.broken

    async def check_gateway(self, system: System) -> None:
        """The gateway was asked at most once for each attempt."""
        asked = Counter(record["client_request_id"] for record in await gateway_records(system))
        attempts = {
            job_id: int(found[1]) if (found := re.search(rb'"attempt":(\d+)', lines[-1])) else 0
            for job_id, lines in self.logs.items()
        }
        self.figures.broken += [
            f"{job_id}: {asked[job_id]} requests in {attempt} attempts"
            for job_id, attempt in attempts.items()
            if asked[job_id] > attempt
        ]

    async def __aenter__(self) -> Self:
        await self.crowd.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.crowd.__aexit__(kind, error, traceback)
        figures = self.figures
        figures.jobs += len(self.jobs)
        figures.seconds += time.monotonic() - self._began
        try:
            if kind is None:
                self.logs = await self.read_logs()
        finally:
            await self._redis.aclose()
        numbered = {
            job_id: {_number(line): hash(line) for line in lines} for job_id, lines in self.logs.items()
        }
        figures.add(self.crowd.ledgers, numbered)
        figures.broken += [
            what for lines in self.logs.values() for what in check_log(lines, completion=self.has_completions)
        ]
        if kind is not None:
            figures.broken.append(f"{kind.__name__}: {str(error)[:100]}")


def _number(line: bytes) -> int:
    found = _NUMBER.search(line)
    assert found, line[:100]
    return int(found[1])
