"""When a job that nobody watches ends, to the tenth of a second, in virtual time (PROTOCOL §2.5)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deltawire.background import in_background
from deltawire.errors import RedisUnavailableError
from deltawire.log import JobLog
from deltawire.options import Options
from deltawire.record import Record
from deltawire_worker.abandonment import RUNS_AT_ONCE, Abandonment
from deltawire_worker.run import CancelWanted, Run
from tests.support.virtual_time import virtual_time

ANSWER_S = 0.003


class Watchers:
    """What Redis says of who watches, by the time: a JobLog as far as it is asked here."""

    keys = SimpleNamespace(is_sharded=False)

    def __init__(self, is_watched: Callable[[float], bool]) -> None:
        self.is_watched_at = is_watched
        self.is_marked = False
        self.is_away = False
        self.looks: list[int] = []  # of how many jobs each

    async def listened_to(self, job_ids: Sequence[str]) -> set[str]:
        self.looks.append(len(job_ids))
        await asyncio.sleep(ANSWER_S)
        if self.is_away:
            raise RedisUnavailableError("away")
        return set(job_ids) if self.is_watched_at(asyncio.get_running_loop().time()) else set()

    async def is_marked_watched(self, _: str) -> bool:
        return self.is_marked


def a_run(job_id: str = "job", **options: Any) -> Run:
    made = Options(**{"on_abandon": "cancel", **options})
    record = Record(status="in_progress", attempt=1, created_at=0.0, tenant="default", options=made)
    run = Run(job_id, 1, record)
    run.writer = cast("Any", SimpleNamespace(watched_at=asyncio.get_running_loop().time()))
    return run


@asynccontextmanager
async def looked_after(watchers: Watchers, *runs: Run) -> AsyncIterator[None]:
    """For as long as that, the runs' abandonment is looked after."""
    abandonment = Abandonment(cast("JobLog", watchers), {run.job_id: run for run in runs})
    async with in_background(abandonment.keep()):
        yield


async def ends_at(run: Run, *, by: float) -> float | None:
    """The loop's time at which the run is cancelled; None: it is not, by then."""
    loop = asyncio.get_running_loop()
    while run.cause is None and loop.time() < by:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    return loop.time() if isinstance(run.cause, CancelWanted) else None


@pytest.mark.parametrize("grace_s", [0.0, 0.5, 2.0, 15.0])
@pytest.mark.parametrize("left_at", [0.0, 5.0, 5.07, 5.5])
@virtual_time
async def test_a_silent_stream_ends_a_grace_after_its_last_reader(left_at: float, grace_s: float) -> None:
    """Never before, and not much later; it says nothing, so that only looks can tell."""
    run = a_run(abandon_grace_s=grace_s)
    slack_s = 0.35 if grace_s <= 2 else 2.2
    async with looked_after(Watchers(lambda now: now < left_at), run):
        ended_at = await ends_at(run, by=left_at + grace_s + 10)
    assert ended_at is not None
    assert left_at + grace_s <= ended_at <= left_at + grace_s + slack_s


@virtual_time
async def test_a_stream_that_talks_to_readers_is_not_looked_at() -> None:
    """Its publications say it all."""
    watchers = Watchers(lambda _: True)
    run = a_run(abandon_grace_s=2)
    async with looked_after(watchers, run):
        for _ in range(1_000):
            run.writer.watched_at = asyncio.get_running_loop().time()
            await asyncio.sleep(0.02)
    assert (watchers.looks, run.cause) == ([], None)


@pytest.mark.parametrize("grace_s", [0.0, 2.0])
@virtual_time
async def test_a_relay_that_connects_again_is_no_reader_that_left(grace_s: float) -> None:
    """A blink of 0.08 s decides nothing, whenever it falls, not even with a grace of 0."""
    for blink_at in (5.0, 5.02, 5.04, 5.06, 5.08, 5.1):
        run = a_run(abandon_grace_s=grace_s)
        begin = asyncio.get_running_loop().time()
        watchers = Watchers(lambda now, at=begin + blink_at: not at <= now < at + 0.08)  # type: ignore[misc] # the loop's own
        async with looked_after(watchers, run):
            assert await ends_at(run, by=begin + 10) is None


@virtual_time
async def test_whoever_comes_back_in_time_begins_a_new_grace() -> None:
    """Seen by a look, or by a publication."""
    run = a_run(abandon_grace_s=2)
    watchers = Watchers(lambda now: now < 5 or 6.5 <= now < 7)
    async with looked_after(watchers, run):
        await asyncio.sleep(8.5)
        run.writer.watched_at = asyncio.get_running_loop().time()
        ended_at = await ends_at(run, by=20)
    assert ended_at is not None
    assert 10.5 <= ended_at <= 10.9


@pytest.mark.parametrize("is_marked", [True, False])
@virtual_time
async def test_nobody_is_abandoned_while_nobody_can_tell(is_marked: bool) -> None:
    """A relay has left its mark, or Redis is away; the grace begins when that is over."""
    run = a_run(abandon_grace_s=2)
    watchers = Watchers(lambda _: False)
    watchers.is_marked, watchers.is_away = is_marked, not is_marked
    async with looked_after(watchers, run):
        assert await ends_at(run, by=60) is None
        watchers.is_marked = watchers.is_away = False
        ended_at = await ends_at(run, by=70)
    assert ended_at is not None
    assert ended_at <= 62.5


@virtual_time
async def test_looks_are_for_many_runs() -> None:
    """A thousand silent runs are four commands a look; those that need no watcher are none."""
    watchers = Watchers(lambda _: True)
    runs = [a_run(f"job-{n}", abandon_grace_s=15) for n in range(1_000)]
    others = [a_run(f"other-{n}", on_abandon="continue") for n in range(10)]
    async with looked_after(watchers, *runs, *others):
        await asyncio.sleep(10)
    assert sum(watchers.looks) == 1_000 * len(watchers.looks) / 4
    assert max(watchers.looks) == RUNS_AT_ONCE
    assert len(watchers.looks) <= 4 * 10 / 0.75
