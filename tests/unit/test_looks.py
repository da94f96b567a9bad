"""What pub/sub does not tell is looked for, for all hubs together (PROTOCOL §3.4, §4)."""

import asyncio
import logging

import pytest

from deltawire_relay.looks import CHECK_INTERVAL_S, HEAD_LOOKS, LOOK_TIMEOUT_S, TAIL_CHECK_AFTER_S
from tests.support.fake_log import FakeRedis
from tests.support.hub_readers import SETTLE_S, attach, deltas, hubs_of, started
from tests.support.sample_events import completed, line, queued
from tests.support.virtual_time import virtual_time

HUBS = 20
FOUND_S = TAIL_CHECK_AFTER_S + CHECK_INTERVAL_S + SETTLE_S


def looking() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "looks"]


@virtual_time
async def test_idle_hubs_share_their_looks() -> None:
    """At most one command a second for all of them; the record of each is read now and then."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    for number in range(HUBS):
        await attach(hubs, job_id=f"job-{number}")
    await asyncio.sleep(SETTLE_S)
    redis.moments.clear()
    await asyncio.sleep(600)
    assert redis.moments.count("news:sent") <= 600 / CHECK_INTERVAL_S
    assert redis.moments.count("read:sent") == 0
    per_hub = redis.moments.count("head:sent") / HUBS
    assert per_hub >= 600 / (HEAD_LOOKS * (TAIL_CHECK_AFTER_S + CHECK_INTERVAL_S)) - 1
    assert per_hub <= 600 / (HEAD_LOOKS * TAIL_CHECK_AFTER_S) + 1


@virtual_time
async def test_cancel_keys_of_queued_jobs_are_looked_for_together() -> None:
    """Once a second, by one command; what is running needs none, since its worker looks."""
    redis = FakeRedis()
    redis.append(line(queued()))
    hubs = hubs_of(redis)
    for number in range(HUBS):
        await attach(hubs, job_id=f"job-{number}")
    redis.moments.clear()
    await asyncio.sleep(10 * CHECK_INTERVAL_S + SETTLE_S)
    assert redis.moments.count("cancel_requested:sent") in {9, 10}
    redis.is_cancel_requested = True
    await asyncio.sleep(CHECK_INTERVAL_S + SETTLE_S)
    assert redis.moments.count("cancel:sent") >= HUBS


@virtual_time
async def test_a_log_that_ends_with_a_snapshot_of_what_is_known_is_no_news() -> None:
    """A worker has written the log again, up to the tail's top: nothing is to be read."""
    redis = FakeRedis()
    started(redis, 5)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    redis.heal(5)
    redis.moments.clear()
    await asyncio.sleep(60)
    assert redis.moments.count("read:sent") == 0
    redis.append(*deltas(6, 7), publish=0)
    await asyncio.sleep(FOUND_S)
    assert reader.sink.lines == redis.history
    assert len(reader.sink.messages) == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), TimeoutError()])
def test_trouble_does_not_end_the_looks(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """There is one task for all jobs, so nothing about one may end it."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis)
        reader = await attach(hubs_of(redis), position=2)
        redis.error = error
        await asyncio.sleep(60)
        redis.error = None
        redis.append(line(completed(3)), publish=0)
        await asyncio.sleep(FOUND_S)
        assert reader.sink.has_ended

    with caplog.at_level(logging.CRITICAL):
        check()


@virtual_time
async def test_an_answer_that_does_not_come_is_not_waited_for_long() -> None:
    """The next look comes all the same."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    news, is_stuck = redis.log.news, True

    async def stuck(tops: dict[str, int]) -> dict[str, list[bytes]]:
        return await (asyncio.Future() if is_stuck else news(tops))

    redis.log.news = stuck  # type: ignore[assignment,method-assign] # a double of a double
    await asyncio.sleep(20)
    is_stuck = False
    redis.append(line(completed(3)), publish=0)
    await asyncio.sleep(FOUND_S + LOOK_TIMEOUT_S)
    assert reader.sink.has_ended


@virtual_time
async def test_without_hubs_nobody_looks() -> None:
    """The task goes with the last hub, and comes with the next."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    for _ in range(2):
        _, release = await hubs.acquire("job")
        assert looking() == ["looks"]
        release()
        await asyncio.sleep(0)
        assert looking() == []


@virtual_time
async def test_a_hub_that_goes_while_it_is_looked_at_is_gone() -> None:
    """What is found then is nobody's: no task stays behind."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    await attach(hubs, job_id="other")
    hub, release = await hubs.acquire("job")
    redis.hook = lambda moment: release() if moment == "news:answered" and len(hubs) == 2 else None
    redis.append(*deltas(3, 9), publish=0)
    await asyncio.sleep(HEAD_LOOKS * FOUND_S)
    assert len(hubs) == 1
    assert hub.tail.top == 2
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "catch-up-job"]
