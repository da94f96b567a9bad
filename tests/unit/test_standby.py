"""While pub/sub brings nothing, viewers notice latency only, and abandoned jobs are not mistaken (§4.3)."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest

from deltawire.errors import RedisUnavailableError
from deltawire.keys import WATCHED_TTL_S
from deltawire.log import NEWS_LINES
from deltawire.scripts import Scripts
from deltawire_relay import looks
from deltawire_relay.hub import DEGRADED_AFTER_S
from deltawire_relay.hubs import Hubs
from deltawire_relay.looks import CHECK_INTERVAL_S, TAIL_CHECK_AFTER_S
from deltawire_relay.standby import MARK_INTERVAL_S, READ_INTERVAL_S, Standby
from tests.support.fake_log import LATENCY_S, FakeRedis
from tests.support.hub_readers import JOB, SETTLE_S, attach, deltas, hubs_of, started
from tests.support.sample_events import completed, line, queued
from tests.support.virtual_time import virtual_time

SOON_S = 2 * READ_INTERVAL_S + SETTLE_S


class Marks:
    """What is written past the log."""

    def __init__(self) -> None:
        self.written: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    async def execute(self, *args: str | bytes | float) -> Any:  # a raw reply
        self.written.append(args)
        if self.error is not None:
            raise self.error
        return b"OK"


@asynccontextmanager
async def standing_by(redis: FakeRedis, hubs: Hubs) -> AsyncIterator[Marks]:
    marks = Marks()
    redis.log.scripts = Scripts(marks)
    task = asyncio.create_task(Standby(hubs, redis.log, redis.feed).keep())
    try:
        yield marks
    finally:
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])


@virtual_time
async def test_readers_hear_on_while_pub_sub_is_down() -> None:
    """Within half a second each, long before a hub's own look at the log's end."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    reader = await attach(hubs, position=2)
    async with standing_by(redis, hubs):
        redis.feed.lose()
        await asyncio.sleep(DEGRADED_AFTER_S + SOON_S)
        for number in range(3, 30):
            redis.append(*deltas(number, number))
            await asyncio.sleep(SOON_S)
            assert reader.sink.numbers[-1] == number
        redis.append(line(completed(30)))
        await asyncio.sleep(SOON_S)
    assert reader.sink.lines == redis.history[2:]
    assert reader.sink.has_ended


@virtual_time
async def test_without_standby_readers_wait_for_each_look() -> None:
    """The negative twin: what the test above sees is standby's work."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.feed.lose()
    redis.append(*deltas(3, 3))
    await asyncio.sleep(TAIL_CHECK_AFTER_S - CHECK_INTERVAL_S)
    assert reader.sink.numbers == []


@virtual_time
async def test_logs_are_not_read_while_the_feed_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading on is for when it does not; a feed that comes back at once needs none."""
    monkeypatch.setattr(looks, "TAIL_CHECK_AFTER_S", math.inf)  # which read them, too, every few seconds
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    await attach(hubs, position=2)
    async with standing_by(redis, hubs):
        await asyncio.sleep(10)
        redis.feed.lose()
        await asyncio.sleep(DEGRADED_AFTER_S / 2)
        redis.feed.reconnect()
        await asyncio.sleep(10)
        assert "news:sent" not in redis.moments
        redis.feed.lose()
        await asyncio.sleep(DEGRADED_AFTER_S + SOON_S)
        assert "news:sent" in redis.moments
        redis.feed.reconnect()
        redis.moments.clear()
        await asyncio.sleep(10)
        assert "news:sent" not in redis.moments


@virtual_time
async def test_more_news_than_one_call_brings_are_read_as_pages() -> None:
    """A log that runs ahead is caught up with, however far."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    reader = await attach(hubs, position=2)
    async with standing_by(redis, hubs):
        redis.feed.lose()
        await asyncio.sleep(DEGRADED_AFTER_S)
        redis.append(*deltas(3, 10 * NEWS_LINES))
        await asyncio.sleep(SOON_S)
        assert reader.sink.lines == redis.history[2:]


@virtual_time
async def test_new_readers_come_in_while_pub_sub_is_down() -> None:
    """The log is enough to begin with; when the feed is back they are live like all others."""
    redis = FakeRedis()
    started(redis, 5)
    hubs = hubs_of(redis)
    async with standing_by(redis, hubs):
        redis.feed.lose()
        await asyncio.sleep(DEGRADED_AFTER_S)
        began_at = asyncio.get_running_loop().time()
        reader = await attach(hubs)
        assert asyncio.get_running_loop().time() - began_at < 0.1
        redis.append(*deltas(6, 6))
        await asyncio.sleep(SOON_S)
        assert reader.sink.lines == redis.history
        redis.feed.reconnect()
        await asyncio.sleep(SETTLE_S)
        redis.append(*deltas(7, 7))
        assert reader.sink.numbers[-1] == 7


@pytest.mark.parametrize("back_after_s", [0.0, 0.5 * LATENCY_S, 1.5 * LATENCY_S, 2.5 * LATENCY_S, 0.5, 1.5])
def test_no_event_is_lost_when_the_feed_comes_back_while_a_hub_opens(back_after_s: float) -> None:
    """A subscription that is acknowledged late, at any moment: what came before it is read (§4.1)."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis, 3)
        hubs = hubs_of(redis)
        redis.feed.lose()
        opening = asyncio.create_task(attach(hubs))
        await asyncio.sleep(back_after_s)
        redis.append(*deltas(4, 4))
        redis.feed.reconnect()
        for number in range(5, 12):
            redis.append(*deltas(number, number))
            await asyncio.sleep(LATENCY_S / 2)
        reader = await opening
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.lines == redis.history

    check()


@pytest.mark.parametrize("steps", range(12))
def test_a_hub_that_is_released_while_pub_sub_is_down_leaves_nothing(steps: int) -> None:
    """Cancelled at any await of an opening without a subscription: no listener, no task."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis)
        hubs = hubs_of(redis)
        redis.feed.lose()
        await asyncio.sleep(DEGRADED_AFTER_S)
        before = asyncio.all_tasks()
        opening = asyncio.create_task(hubs.acquire(JOB))
        await asyncio.sleep(steps * LATENCY_S / 2)
        if opening.done():
            opening.result()[1]()
        else:
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        redis.feed.reconnect()
        await asyncio.sleep(SETTLE_S)
        assert len(hubs) == 0
        assert redis.listener is None
        assert asyncio.all_tasks() == before

    check()


@virtual_time
async def test_a_hub_released_while_its_news_are_read_is_left_alone() -> None:
    """What was read for it is nobody's."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    hub, release = await hubs.acquire(JOB)
    async with standing_by(redis, hubs):
        redis.feed.lose()
        redis.hook = lambda moment: release() if moment == "news:answered" and len(hubs) else None
        redis.append(*deltas(3, 10 * NEWS_LINES))
        await asyncio.sleep(DEGRADED_AFTER_S + SOON_S)
    assert len(hubs) == 0
    assert hub.tail.top == 2
    assert not [task for task in asyncio.all_tasks() if JOB in task.get_name()]


@virtual_time
async def test_standby_outlives_a_redis_that_is_away() -> None:
    """While commands fail, too, nothing can be read; when they are answered, reading goes on."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    reader = await attach(hubs, position=2)
    async with standing_by(redis, hubs) as marks:
        marks.error = hiredis.ReplyError("NOPERM")
        redis.feed.lose()
        redis.is_away = True
        await asyncio.sleep(30)
        redis.append(*deltas(3, 4))
        redis.is_away = False
        await asyncio.sleep(SOON_S)
        assert reader.sink.numbers == [3, 4]


@virtual_time
async def test_a_log_healed_while_pub_sub_is_down_is_followed() -> None:
    """A snapshot among the news is taken up as everywhere (§6.3)."""
    redis = FakeRedis()
    started(redis, 4)
    hubs = hubs_of(redis)
    reader = await attach(hubs)
    await asyncio.sleep(SETTLE_S)
    async with standing_by(redis, hubs):
        redis.feed.lose()
        await asyncio.sleep(DEGRADED_AFTER_S + READ_INTERVAL_S)
        redis.append(*deltas(5, 9))
        redis.heal(7)
        await asyncio.sleep(SOON_S)
        numbers = reader.sink.numbers
        assert numbers[:4] == [1, 2, 3, 4]
        assert len(reader.sink.messages) == 3
        redis.append(line(completed(10)))
        await asyncio.sleep(SOON_S)
        assert reader.sink.has_ended


# Marks for jobs that end when nobody watches.


@virtual_time
async def test_watched_jobs_are_marked_while_the_feed_is_away() -> None:
    """At once, and again before the mark expires; not before, and not afterwards."""
    redis = FakeRedis()
    redis.on_abandon = "cancel"
    started(redis)
    hubs = hubs_of(redis)
    await attach(hubs)
    mark = ("SET", "dw:{job}:watched", 1, "EX", WATCHED_TTL_S)
    async with standing_by(redis, hubs) as marks:
        await asyncio.sleep(60)
        assert marks.written == []
        redis.feed.lose()
        await asyncio.sleep(SOON_S)
        assert marks.written == [mark]
        await asyncio.sleep(2 * MARK_INTERVAL_S)
        assert marks.written == [mark] * 3
        redis.feed.reconnect()
        await asyncio.sleep(60)
        assert marks.written == [mark] * 3


@virtual_time
async def test_a_reader_that_comes_while_the_feed_is_away_is_marked_at_once() -> None:
    """Not with the others: a worker would long have seen nobody."""
    redis = FakeRedis()
    redis.on_abandon = "cancel"
    started(redis)
    hubs = hubs_of(redis)
    async with standing_by(redis, hubs) as marks:
        redis.feed.lose()
        await asyncio.sleep(MARK_INTERVAL_S / 2)
        assert marks.written == []
        await attach(hubs)
        await asyncio.sleep(SOON_S)
        assert len(marks.written) == 1
        await asyncio.sleep(MARK_INTERVAL_S / 2)
        assert len(marks.written) == 1


@pytest.mark.parametrize("case", ["continues", "unwatched", "ended", "unknown"])
def test_other_jobs_cost_nothing(case: str) -> None:
    """A job that goes on without viewers, that has none here, that has ended or that nobody knows."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        redis.on_abandon = "continue" if case == "continues" else "cancel"
        if case != "unknown":
            redis.append(line(queued()))
        if case == "ended":
            redis.append(line(completed(2)))
        hubs = hubs_of(redis)
        reader = await attach(hubs)
        if case == "unwatched":
            reader.subscriber.close()
        async with standing_by(redis, hubs) as marks:
            redis.feed.lose()
            await asyncio.sleep(60)
            assert marks.written == []

    check()


@virtual_time
async def test_a_relay_that_stops_marks_what_it_watches() -> None:
    """Its readers need a moment to come back elsewhere; Redis' refusal is said, not hidden."""
    redis = FakeRedis()
    redis.on_abandon = "cancel"
    started(redis)
    hubs = hubs_of(redis)
    await attach(hubs)
    marks = Marks()
    redis.log.scripts = Scripts(marks)
    standby = Standby(hubs, redis.log, redis.feed)
    await standby.mark_watched()
    assert len(marks.written) == 1
    marks.error = hiredis.ReplyError("OOM")
    with pytest.raises(RedisUnavailableError):
        await standby.mark_watched()
