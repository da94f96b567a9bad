"""What a worker says of itself, so that its jobs are found if it dies (PROTOCOL §2.4)."""

import asyncio
from collections.abc import Collection
from typing import cast

from deltawire.index import Index
from deltawire_worker.lease import RENEWAL_INTERVAL_S, Presence
from tests.support.virtual_time import virtual_time

OWNER = "worker"


class FakeIndex:
    """One worker's jobs, in a Redis that takes a while for each command."""

    def __init__(self) -> None:
        self.jobs: set[str] = set()

    async def lives(self, _owner: str, _lease_s: float) -> bool:
        await asyncio.sleep(0.01)
        return False

    async def left_queue(self, _: Collection[str]) -> None:
        await asyncio.sleep(0.01)

    async def will_run(self, _: str, job_ids: Collection[str]) -> None:
        self.jobs.update(job_ids)

    async def has_run(self, _: str, job_ids: Collection[str]) -> None:
        self.jobs.difference_update(job_ids)


@virtual_time
async def test_a_job_that_comes_again_stays_among_those_of_its_worker() -> None:
    """Also where it comes while its former end is being told: nobody would miss it if the worker died."""
    index = FakeIndex()
    presence = Presence(cast(Index, index), OWNER, {})
    keeping = asyncio.create_task(presence.keep())
    await asyncio.sleep(RENEWAL_INTERVAL_S / 2)
    await presence.begins("job")
    presence.ended("job")
    await asyncio.sleep(RENEWAL_INTERVAL_S / 2 + 0.025)  # amid the next renewal
    await presence.begins("job")
    await asyncio.sleep(1)
    assert index.jobs == {"job"}
    presence.ended("job")
    await asyncio.sleep(2)
    assert index.jobs == set()
    keeping.cancel()
