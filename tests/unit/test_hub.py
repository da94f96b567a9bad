"""A hub reads one job for many subscribers; each sees position+1, +2, … once (PROTOCOL §4.1, §4.3, §4.4).

Redis is in memory and the clock virtual, so that every interleaving here is the one written down.
"""

import asyncio
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deltawire.errors import RedisUnavailableError
from deltawire.log_fold import LogFold
from deltawire.messages import Snapshot, Subscribed
from deltawire_relay.hub import UNKNOWN_JOB_TIMEOUT_S, Hub
from deltawire_relay.looks import CHECK_INTERVAL_S, TAIL_CHECK_AFTER_S
from deltawire_relay.page import Page
from deltawire_relay.subscriber import HEAL_TIMEOUT_S
from tests.support.fake_log import LATENCY_S, FakeRedis, FakeSink
from tests.support.hub_readers import JOB, SETTLE_S, Reader, attach, deltas, hubs_of, started
from tests.support.sample_events import completed, delta, in_progress, line, queued, restarted
from tests.support.virtual_time import virtual_time


@contextmanager
def heard(reader: Reader) -> Iterator[None]:
    """Takes note of how the hub's last catch-up ended: asyncio complains of one that nobody looks at."""
    try:
        yield
    finally:
        task = reader.hub._catching_up
        if task is not None and task.done() and not task.cancelled():
            task.exception()


# Opening.

OPENING = [
    f"{command}:{moment}" for command in ("subscribe", "head", "read") for moment in ("sent", "answered")
]


@pytest.mark.parametrize("first", OPENING)
@pytest.mark.parametrize("second", OPENING)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_no_event_is_lost_or_doubled_while_a_hub_opens(first: str, second: str, position: int) -> None:
    """Events that come at any two moments of opening reach the subscriber once, in order."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis, 3)
        waiting = [second, first]

        def appear(moment: str) -> None:
            if waiting and moment == waiting[-1]:
                waiting.pop()
                redis.append(*deltas(len(redis.lines) + 1, len(redis.lines) + 2))

        redis.hook = appear
        reader = await attach(hubs_of(redis), position=position)
        await asyncio.sleep(SETTLE_S)
        redis.append(*deltas(len(redis.lines) + 1, len(redis.lines) + 1))
        redis.append(line(completed(len(redis.lines) + 1)))
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.lines == redis.lines[position:]
        assert reader.sink.has_ended

    check()


@pytest.mark.parametrize("moment", OPENING[:4])
def test_no_event_of_a_job_that_appears_while_a_hub_opens_is_lost(moment: str) -> None:
    """A job submitted at any moment of opening is seen whole, within one check at the latest."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()

        def appear(name: str) -> None:
            if name == moment and not redis.lines:
                redis.append(line(queued()))

        redis.hook = appear
        reader = await attach(hubs_of(redis))
        await asyncio.sleep(CHECK_INTERVAL_S + SETTLE_S)
        assert reader.sink.numbers == [1]
        redis.append(line(in_progress(2)))
        redis.append(line(completed(3)))
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.lines == redis.lines
        assert reader.sink.has_ended

    check()


@virtual_time
async def test_subscribed_says_where_the_first_event_goes_on() -> None:
    """`subscribed` comes first and tells the log's bounds as of that moment (PROTOCOL §6)."""
    redis = FakeRedis()
    started(redis, 5)
    reader = await attach(hubs_of(redis), position=2)
    said = reader.sink.subscribed
    assert (said.status, said.attempt, said.recovered) == ("in_progress", 1, True)
    assert (said.earliest_sequence_number, said.latest_sequence_number) == (1, 5)
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [3, 4, 5]


@virtual_time
async def test_a_second_subscriber_joins_a_live_hub_without_asking_redis() -> None:
    """One hub serves all: who comes later costs no further SUBSCRIBE and no look at the log's top."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    first = await attach(hubs, position=2)
    asked = len(redis.moments)
    second = await attach(hubs, position=2)
    assert second.hub is first.hub
    assert len(redis.moments) == asked
    redis.append(*deltas(3, 4))
    assert first.sink.numbers == second.sink.numbers == [3, 4]


@virtual_time
async def test_a_job_that_has_ended_is_replayed_whole() -> None:
    """Whoever comes after the end gets the log, terminal event included, and then the end."""
    redis = FakeRedis()
    started(redis, 9)
    redis.append(line(completed(10)))
    for position in range(10):
        reader = await attach(hubs_of(redis), position=position)
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.numbers == list(range(position + 1, 11))
        assert reader.sink.has_ended


# Live: what pub/sub can do to messages.


@virtual_time
async def test_a_lost_message_is_read_from_the_log_when_the_next_one_comes() -> None:
    """A hole in the numbers is filled before anything after it is passed on."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.append(*deltas(3, 4), publish=0)
    redis.append(*deltas(5, 5))
    redis.append(*deltas(6, 6))
    assert reader.sink.numbers == []
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [3, 4, 5, 6]


@virtual_time
async def test_the_last_message_lost_is_found_soon() -> None:
    """A loss that no later event shows is found by looking at the log's top; so the end always comes."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.append(line(completed(3)), publish=0)
    await asyncio.sleep(TAIL_CHECK_AFTER_S + CHECK_INTERVAL_S + SETTLE_S)
    assert reader.sink.numbers == [3]
    assert reader.sink.has_ended


@virtual_time
async def test_messages_doubled_or_out_of_order_change_nothing() -> None:
    """Old news is skipped; news that comes too early waits for what is missing."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    messages = [redis.append(*deltas(first, first + 1), publish=0) for first in (3, 5, 7)]
    for index in (0, 0, 2, 1, 0, 2, 1):
        redis.publish(messages[index])
        await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == list(range(3, 9))


@virtual_time
async def test_a_message_that_overlaps_what_is_known_brings_only_the_rest() -> None:
    """A batch that repeats known events and adds new ones is taken from where the reader stands."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.append(*deltas(3, 4))
    redis.append(*deltas(5, 6), publish=0)
    redis.publish(b"\n".join(deltas(3, 6)))
    assert reader.sink.numbers == [3, 4, 5, 6]


@virtual_time
async def test_a_lost_connection_loses_no_event() -> None:
    """What was published while the feed was away is read from the log as soon as it is back."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.feed.lose()
    redis.append(*deltas(3, 6))
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == []
    redis.feed.reconnect()
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [3, 4, 5, 6]


@pytest.mark.parametrize("moment", ["read:sent", "read:answered"])
def test_a_connection_lost_while_catching_up_loses_no_event(moment: str) -> None:
    """The feed may go and come back within a catch-up; what it missed then is found at the next look."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis)
        reader = await attach(hubs_of(redis), position=2)
        redis.append(*deltas(3, 3), publish=0)

        def flap(name: str) -> None:
            if name == moment and len(redis.lines) == 4:
                redis.feed.lose()
                redis.append(line(completed(5)))
                redis.feed.reconnect()

        redis.hook = flap
        redis.append(*deltas(4, 4))
        await asyncio.sleep(TAIL_CHECK_AFTER_S + CHECK_INTERVAL_S + SETTLE_S)
        assert reader.sink.lines == redis.lines[2:]
        assert reader.sink.has_ended

    check()


@virtual_time
async def test_status_and_attempt_follow_the_log() -> None:
    """A late subscriber hears the status and attempt of its moment."""
    redis = FakeRedis()
    redis.append(line(queued()))
    hubs = hubs_of(redis)
    first = await attach(hubs)
    assert (first.sink.subscribed.status, first.sink.subscribed.attempt) == ("queued", 0)
    redis.append(line(in_progress(2)))
    redis.append(*deltas(3, 3))
    redis.append(line(restarted(4)), line(in_progress(5, attempt=2)))
    second = await attach(hubs, position=5)
    assert (second.sink.subscribed.status, second.sink.subscribed.attempt) == ("in_progress", 2)


# Jobs that are not there.


@virtual_time
async def test_an_unknown_job_is_waited_for() -> None:
    """`subscribed` says unknown; when the job appears, its events flow from the first (PROTOCOL §6)."""
    redis = FakeRedis()
    reader = await attach(hubs_of(redis))
    assert reader.sink.subscribed.status == "unknown"
    assert reader.sink.subscribed.latest_sequence_number == 0
    await asyncio.sleep(UNKNOWN_JOB_TIMEOUT_S / 2)
    redis.append(line(queued()))
    redis.append(line(in_progress(2)))
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [1, 2]
    await asyncio.sleep(UNKNOWN_JOB_TIMEOUT_S)
    assert reader.sink.error is None


@virtual_time
async def test_an_unknown_job_whose_first_message_is_lost_is_found_soon() -> None:
    """A hub without a record looks every second, whatever pub/sub says."""
    redis = FakeRedis()
    reader = await attach(hubs_of(redis))
    redis.append(line(queued()), publish=0)
    await asyncio.sleep(CHECK_INTERVAL_S + SETTLE_S)
    assert reader.sink.numbers == [1]


@virtual_time
async def test_an_unknown_job_is_not_waited_for_for_ever() -> None:
    """After the time-out the subscriber is refused with unknown_job (PROTOCOL §4.4)."""
    redis = FakeRedis()
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(UNKNOWN_JOB_TIMEOUT_S - CHECK_INTERVAL_S)
    assert reader.sink.error is None
    await asyncio.sleep(2 * CHECK_INTERVAL_S + SETTLE_S)
    assert reader.sink.error is not None
    assert reader.sink.error.code == "unknown_job"


@virtual_time
async def test_each_waiter_has_its_own_deadline() -> None:
    """Who came later to an unknown job is refused later."""
    redis = FakeRedis()
    hubs = hubs_of(redis)
    first = await attach(hubs)
    await asyncio.sleep(UNKNOWN_JOB_TIMEOUT_S / 2)
    second = await attach(hubs)
    await asyncio.sleep(UNKNOWN_JOB_TIMEOUT_S / 2 + CHECK_INTERVAL_S + SETTLE_S)
    assert first.sink.error is not None
    assert second.sink.error is None


@virtual_time
async def test_another_tenants_job_looks_like_none_at_all() -> None:
    """`subscribed`, what follows and the time-out are those of an unknown job (PROTOCOL §4.8)."""
    redis = FakeRedis(tenant="acme")
    started(redis, 4)
    hubs = hubs_of(redis)
    own = await attach(hubs, tenant="acme")
    foreign = await attach(hubs, tenant="umbrella", position=2, mode="snapshot")
    unknown = await attach(hubs_of(FakeRedis()), tenant="umbrella", position=2, mode="snapshot")
    assert foreign.sink.messages == unknown.sink.messages
    redis.append(*deltas(5, 5))
    redis.append(line(completed(6)))
    await asyncio.sleep(UNKNOWN_JOB_TIMEOUT_S + 2 * CHECK_INTERVAL_S)
    assert own.sink.numbers == [1, 2, 3, 4, 5, 6]
    assert foreign.sink.lines == []
    assert not foreign.sink.has_ended
    assert foreign.sink.error is not None
    assert unknown.sink.error is not None
    assert foreign.sink.error.error == unknown.sink.error.error


@virtual_time
async def test_a_position_above_an_unknown_job_is_not_believed_when_the_job_appears() -> None:
    """Whoever stands above the top of a job that appears gets its events, or a snapshot and the rest.

    A record that was lost and made anew: the client's position means nothing in the new log.
    """
    redis = FakeRedis()
    reader = await attach(hubs_of(redis), position=50)
    redis.append(line(queued()), line(in_progress(2)))
    await asyncio.sleep(HEAL_TIMEOUT_S + SETTLE_S)
    redis.append(line(completed(3)))
    await asyncio.sleep(HEAL_TIMEOUT_S + SETTLE_S)
    assert reader.sink.numbers[-1:] == [3]


@virtual_time
async def test_a_queued_job_with_a_bare_cancel_key_is_ended() -> None:
    """`SET dw:{id}:cancel` by anybody is found within a second by the hub that watches (PROTOCOL §3)."""
    redis = FakeRedis()
    redis.append(line(queued()))
    await attach(hubs_of(redis))
    redis.is_cancel_requested = True
    await asyncio.sleep(CHECK_INTERVAL_S + SETTLE_S)
    assert "cancel:sent" in redis.moments


# Positions above the top, and logs that lose their past.


@virtual_time
async def test_a_position_above_the_top_waits_for_healing() -> None:
    """A worker that sends again what Redis lost makes the position good: nothing is repeated."""
    redis = FakeRedis()
    started(redis, 4)
    opening = asyncio.create_task(attach(hubs_of(redis), position=7))
    await asyncio.sleep(HEAL_TIMEOUT_S / 2)
    redis.append(*deltas(5, 8))
    reader = await opening
    assert reader.sink.subscribed.recovered
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [8]


@virtual_time
async def test_a_position_above_the_top_that_never_heals_gets_a_snapshot() -> None:
    """After 10 s: `recovered: false`, a snapshot of what there is, then the rest (PROTOCOL §4.1)."""
    redis = FakeRedis()
    started(redis, 4)
    reader = await attach(hubs_of(redis), position=7)
    assert asyncio.get_running_loop().time() == pytest.approx(HEAL_TIMEOUT_S, abs=1)
    _, snapshot = reader.sink.messages
    assert not reader.sink.subscribed.recovered
    assert isinstance(snapshot, Snapshot)
    assert snapshot.sequence_number == 4
    redis.append(line(completed(5)))
    assert reader.sink.numbers == [5]


@virtual_time
async def test_a_position_above_the_top_of_an_ended_job_is_answered_at_once() -> None:
    """An ended log never grows, so nobody waits for that; the terminal event still comes."""
    redis = FakeRedis()
    started(redis, 4)
    redis.append(line(completed(5)))
    reader = await attach(hubs_of(redis), position=7)
    assert asyncio.get_running_loop().time() < 1
    assert not reader.sink.subscribed.recovered
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [5]
    assert reader.sink.has_ended


@virtual_time
async def test_a_log_without_its_beginning_is_said() -> None:
    """Where events after the position are gone: `recovered: false`, a snapshot, then the rest."""
    redis = FakeRedis()
    started(redis, 8)
    redis.trimmed = 5
    reader = await attach(hubs_of(redis), position=2)
    assert not reader.sink.subscribed.recovered
    assert reader.sink.subscribed.earliest_sequence_number == 6
    assert isinstance(reader.sink.messages[1], Snapshot)
    redis.append(*deltas(9, 9))
    assert reader.sink.numbers == [9]


@virtual_time
async def test_a_log_that_goes_while_it_is_read_is_said(small_tail: None) -> None:
    """A subscriber whose next events are gone gets a snapshot; it is never given a hole (PROTOCOL §4.3)."""
    redis = FakeRedis()
    started(redis, 20)
    sink = FakeSink(room=1)
    reader = await attach(hubs_of(redis), sink=sink)
    await asyncio.sleep(SETTLE_S)
    assert sink.numbers == [1, 2]
    redis.trimmed = 10
    sink.room = None
    reader.subscriber.pump()
    await asyncio.sleep(SETTLE_S)
    _, subscribed, snapshot = sink.messages
    assert isinstance(subscribed, Subscribed)
    assert not subscribed.recovered
    assert isinstance(snapshot, Snapshot)
    assert snapshot.sequence_number == 20
    assert sink.numbers == [1, 2]


@virtual_time
async def test_a_job_that_vanishes_is_not_waited_for_for_ever() -> None:
    """A watched job whose keys are gone (expired, erased, lost) ends in an error (PROTOCOL §4.4)."""
    redis = FakeRedis()
    started(redis, 5)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    redis.has_record = False
    redis.lines.clear()
    await asyncio.sleep(10 * UNKNOWN_JOB_TIMEOUT_S)
    assert reader.sink.error is not None or reader.sink.has_ended


@virtual_time
async def test_numbers_given_again_do_not_hide_the_end() -> None:
    """If Redis lost events and their worker died, a live subscriber still gets the terminal event, said or
    not (PROTOCOL §4.1's exception, §4.2)."""
    redis = FakeRedis()
    started(redis, 9)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    del redis.lines[4:]
    redis.append(line(restarted(5)), line(in_progress(6, attempt=2)))
    redis.append(line(completed(7, attempt=2)))
    await asyncio.sleep(10 * UNKNOWN_JOB_TIMEOUT_S)
    assert reader.sink.has_ended or reader.sink.error is not None


# Redis away.


@virtual_time
async def test_a_hub_that_cannot_subscribe_is_refused_in_time() -> None:
    """While Redis is away a subscription fails after the time allowed, and leaves nothing behind."""
    redis = FakeRedis()
    redis.is_away = True
    hubs = hubs_of(redis)
    with pytest.raises(RedisUnavailableError):
        await hubs.acquire(JOB)
    assert len(hubs) == 0
    redis.is_away = False
    started(redis)
    reader = await attach(hubs)
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [1, 2]


@virtual_time
async def test_a_hub_that_cannot_read_where_the_log_stands_is_refused() -> None:
    """All who wait for one opening are refused together, and the next one tries anew."""
    redis = FakeRedis()
    started(redis)
    redis.away_for = {"head"}
    hubs = hubs_of(redis)
    results = await asyncio.gather(*(hubs.acquire(JOB) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [RedisUnavailableError] * 3
    assert len(hubs) == 0
    assert redis.listener is None
    redis.away_for = set()
    assert (await attach(hubs)).hub.tail.top == 2


@virtual_time
async def test_a_catch_up_that_fails_is_tried_until_it_succeeds() -> None:
    """A gap that cannot be read now is read later; what comes meanwhile is held in order."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.away_for = {"read"}
    redis.append(*deltas(3, 3), publish=0)
    for number in range(4, 8):
        redis.append(*deltas(number, number))
        await asyncio.sleep(0.3)
    assert reader.sink.numbers == []
    redis.away_for = set()
    await asyncio.sleep(2)
    assert reader.sink.numbers == [3, 4, 5, 6, 7]


@virtual_time
async def test_a_page_that_cannot_be_read_is_read_later(small_tail: None) -> None:
    """A late subscriber's reading goes on where it stood when Redis is back."""
    redis = FakeRedis()
    started(redis, 12)
    hubs = hubs_of(redis)
    await attach(hubs, position=12)
    pages = 0

    def fail_from_second_page(moment: str) -> None:
        nonlocal pages
        if moment == "read:sent":
            pages += 1
            if pages == 2:
                redis.away_for = {"read"}

    redis.hook = fail_from_second_page
    reader = await attach(hubs)
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == [1, 2]
    redis.away_for = set()
    await asyncio.sleep(2)
    assert reader.sink.numbers == list(range(1, 13))


@virtual_time
async def test_a_snapshot_that_failed_half_way_is_right_the_next_time() -> None:
    """A fold that was cut by a failure goes on from where it stood: no delta is added twice."""
    redis = FakeRedis()
    started(redis, 1_500)  # two pages
    hubs = hubs_of(redis)
    live = await attach(hubs, position=1_500)
    pages = 0

    def fail_second_page(moment: str) -> None:
        nonlocal pages
        if moment == "read:sent":
            pages += 1
            redis.away_for = {"read"} if pages == 2 else set()

    redis.hook = fail_second_page
    with pytest.raises(RedisUnavailableError):
        await live.hub.snapshot()
    snapshot = await live.hub.snapshot()
    assert snapshot is not None
    whole = LogFold()
    for text in redis.lines:
        whole.add(text)
    assert (snapshot.sequence_number, snapshot.completion) == (1_500, whole.completion())


@virtual_time
async def test_what_is_held_while_the_log_cannot_be_read_is_bounded() -> None:
    """Events that wait for a catch-up are in the log too, so they need not be kept without end (§4.7)."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.away_for = {"read"}
    redis.append(*deltas(3, 3), publish=0)
    for number in range(4, 3_000):
        redis.append(line(delta(number, "x" * 1_000)))
    await asyncio.sleep(SETTLE_S)
    held = reader.hub._held or []
    assert sum(map(len, held)) < 1_000_000


@virtual_time
async def test_a_message_that_never_reaches_the_log_is_not_chased() -> None:
    """Published, then lost by Redis with its worker: the log is looked at now and then, not in a loop."""
    redis = FakeRedis()
    started(redis)
    await attach(hubs_of(redis), position=2)
    redis.publish(b"\n".join(deltas(4, 4)))
    redis.moments.clear()
    await asyncio.sleep(10)
    assert redis.moments.count("read:sent") < 100


@pytest.mark.parametrize("known", [True, False])
def test_what_is_no_event_on_the_channel_does_no_harm(known: bool) -> None:
    """A foreign message on a job's channel is skipped; the job's events go on."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        if known:
            started(redis)
        reader = await attach(hubs_of(redis))
        if known:
            redis.append(*deltas(3, 3), publish=0)
            redis.append(*deltas(4, 4))  # begins a catch-up
        redis.publish(b"hello?")
        await asyncio.sleep(SETTLE_S)
        if not known:
            started(redis)
        redis.append(*deltas(len(redis.lines) + 1, len(redis.lines) + 1))
        redis.append(line(completed(len(redis.lines) + 1)))
        await asyncio.sleep(TAIL_CHECK_AFTER_S + 2 * CHECK_INTERVAL_S)
        with heard(reader):
            assert reader.sink.lines == redis.lines

    check()


@virtual_time
async def test_a_hole_in_the_log_does_not_stop_its_readers_for_ever() -> None:
    """Where the log itself lacks events (trimmed, lost), subscribers are told, or given a snapshot (§4.3)."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    redis.feed.lose()
    redis.append(*deltas(3, 9))
    redis.trimmed = 6
    redis.feed.reconnect()
    redis.append(line(completed(10)))
    await asyncio.sleep(10 * UNKNOWN_JOB_TIMEOUT_S)
    with heard(reader):
        assert reader.sink.has_ended or reader.sink.error is not None


@virtual_time
async def test_an_error_answer_does_not_end_a_catch_up() -> None:
    """An error answer (BUSY, OOM, MISCONF, NOPERM) passes; the hub goes on when it has (PROTOCOL §4.4)."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.error = RedisUnavailableError("Redis refuses: BUSY running a script")
    redis.append(*deltas(3, 3), publish=0)
    redis.append(*deltas(4, 4))
    await asyncio.sleep(SETTLE_S)
    redis.error = None
    redis.append(line(completed(5)))
    await asyncio.sleep(TAIL_CHECK_AFTER_S + 2 * CHECK_INTERVAL_S)
    with heard(reader):
        assert reader.sink.lines == redis.lines[2:]


@virtual_time
async def test_an_error_answer_does_not_end_a_hubs_checks() -> None:
    """A lost terminal event is still found after Redis answered with errors for a while (PROTOCOL §4.4)."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis), position=2)
    redis.error = RedisUnavailableError("Redis refuses: BUSY running a script")
    await asyncio.sleep(2 * TAIL_CHECK_AFTER_S)
    redis.error = None
    redis.append(line(completed(3)), publish=0)
    await asyncio.sleep(4 * TAIL_CHECK_AFTER_S)
    task = reader.hubs._looking
    if task is not None and task.done():
        task.exception()
    assert reader.sink.has_ended


# Slow subscribers.


@virtual_time
async def test_a_slow_sink_is_skipped_and_catches_up_from_the_tail() -> None:
    """A sink that is full is left alone; once writable it gets the rest, and nobody else waited (§4.7)."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    slow, fast = await attach(hubs, position=2), await attach(hubs, position=2)
    slow.sink.is_open_for_more = False
    for number in range(3, 9):
        redis.append(*deltas(number, number))
    assert (slow.sink.numbers, fast.sink.numbers) == ([], [3, 4, 5, 6, 7, 8])
    slow.sink.is_open_for_more = True
    slow.subscriber.pump()
    assert slow.sink.numbers == [3, 4, 5, 6, 7, 8]


@virtual_time
async def test_a_very_slow_sink_catches_up_from_the_log(small_tail: None) -> None:
    """What the tail has forgotten is read in pages, as far as the sink takes it; events go on meanwhile."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    sink = FakeSink(room=0)
    reader = await attach(hubs, position=2, sink=sink)
    for number in range(3, 30):
        redis.append(*deltas(number, number))
    assert reader.hub.tail.base > 20
    while not sink.has_ended:
        sink.room = 1
        reader.subscriber.pump()
        await asyncio.sleep(SETTLE_S)
        top = len(redis.lines)
        if top < 40:
            redis.append(*deltas(top + 1, top + 1))
        elif top == 40:
            redis.append(line(completed(41)))
    assert sink.lines == redis.lines[2:]


@virtual_time
async def test_a_closed_subscriber_hears_nothing_more(small_tail: None) -> None:
    """Closing while a page is read leaves neither a task nor a write behind."""
    redis = FakeRedis()
    started(redis, 12)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(1.5 * LATENCY_S)
    seen = list(reader.sink.lines)
    reader.subscriber.close()
    reader.subscriber.close()
    redis.append(*deltas(13, 13))
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.lines == seen
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("read-log")]


@pytest.mark.parametrize("mode", ["replay", "snapshot"])
@virtual_time
async def test_a_page_of_large_events_is_no_large_page(mode: str) -> None:
    """Reading a log of 200 KB events holds no more of it at once than one of small events (PROTOCOL §4.7)."""
    redis = FakeRedis()
    started(redis)
    redis.append(*(line(delta(number, "x" * 200_000)) for number in range(3, 103)))
    await attach(hubs_of(redis), mode=mode)
    await asyncio.sleep(SETTLE_S)
    assert 0 < redis.largest_page_bytes < 2_000_000


@virtual_time
async def test_a_subscriber_closed_before_its_reading_began_leaves_nothing(small_tail: None) -> None:
    """A socket that goes in the very step in which reading starts: no task, no coroutine is left."""
    redis = FakeRedis()
    started(redis, 12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader = await attach(hubs_of(redis))
        reader.subscriber.close()
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.lines == []
        del reader
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# Snapshots.


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("top", range(2, 9))
def test_a_snapshot_is_the_fold_of_what_it_stands_for(top: int, ended: bool) -> None:
    """At every top: the completion is LogFold's up to its number, and the terminal event still comes."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis, min(top, 4))
        if top > 4:
            redis.append(line(restarted(5)))
            redis.append(*deltas(6, top))
        if ended:
            redis.append(line(completed(top + 1)))
        reader = await attach(hubs_of(redis), mode="snapshot")
        snapshot = reader.sink.messages[1]
        assert isinstance(snapshot, Snapshot)
        whole = LogFold()
        for text in redis.lines[: snapshot.sequence_number]:
            whole.add(text)
        assert snapshot.sequence_number == top
        assert snapshot.completion == whole.completion()
        if not ended:
            redis.append(line(completed(top + 1)))
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.numbers == [top + 1]
        assert reader.sink.has_ended

    check()


@virtual_time
async def test_events_that_come_while_a_snapshot_is_made_follow_it() -> None:
    """The snapshot stands for its number; whatever came meanwhile is sent after it, once."""
    redis = FakeRedis()
    started(redis, 5)
    hubs = hubs_of(redis)
    await attach(hubs, position=5)

    def appear(moment: str) -> None:
        if moment == "read:answered" and len(redis.lines) < 20:
            redis.append(*deltas(len(redis.lines) + 1, len(redis.lines) + 2))

    redis.hook = appear
    reader = await attach(hubs, mode="snapshot")
    await asyncio.sleep(SETTLE_S)
    snapshot = reader.sink.messages[1]
    assert isinstance(snapshot, Snapshot)
    assert reader.sink.numbers == list(range(snapshot.sequence_number + 1, len(redis.lines) + 1))
    assert reader.sink.numbers


@virtual_time
async def test_many_snapshots_at_once_are_each_right() -> None:
    """One fold serves all who ask, one after the other."""
    redis = FakeRedis()
    started(redis, 5)
    hubs = hubs_of(redis)
    readers = await asyncio.gather(*(attach(hubs, mode="snapshot") for _ in range(5)))
    for reader in readers:
        snapshot = reader.sink.messages[1]
        assert isinstance(snapshot, Snapshot)
        assert snapshot == readers[0].sink.messages[1]


# Life and death of a hub.


def hub_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if "hub" in task.get_name()]


@virtual_time
async def test_a_hub_is_released_when_the_last_holder_leaves() -> None:
    """It leaves the channel and ends its tasks; the next holder gets a new one."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    hub, release_first = await hubs.acquire(JOB)
    _, release_second = await hubs.acquire(JOB)
    release_first()
    assert len(hubs) == 1
    assert redis.listener is hub
    release_second()
    await asyncio.sleep(SETTLE_S)
    assert len(hubs) == 0
    assert redis.listener is None
    assert hub_tasks() == []
    async with hubs.hold(JOB) as other:
        assert other is not hub
    assert len(hubs) == 0


@pytest.mark.parametrize("steps", range(8))
def test_a_hub_whose_only_holder_is_cancelled_while_it_opens_is_released(steps: int) -> None:
    """At every point of opening: nothing is left, and the next holder gets a hub that works."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis)
        hubs = hubs_of(redis)
        opening = asyncio.create_task(hubs.acquire(JOB))
        await asyncio.sleep(steps * LATENCY_S)
        if not opening.done():
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        else:
            opening.result()[1]()
        await asyncio.sleep(SETTLE_S)
        assert len(hubs) == 0
        assert redis.listener is None
        assert hub_tasks() == []
        reader = await attach(hubs)
        redis.append(*deltas(3, 3))
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.numbers == [1, 2, 3]

    check()


@virtual_time
async def test_who_is_cancelled_while_a_hub_opens_does_not_cancel_the_others() -> None:
    """One opening serves all holders, whoever of them leaves."""
    redis = FakeRedis()
    started(redis)
    hubs = hubs_of(redis)
    first, second = (asyncio.create_task(hubs.acquire(JOB)) for _ in range(2))
    await asyncio.sleep(LATENCY_S)
    first.cancel()
    hub, release = await second
    assert redis.listener is hub
    assert redis.moments.count("subscribe:sent") == 1
    release()
    assert len(hubs) == 0


@virtual_time
async def test_reaches_and_ends_have_deadlines() -> None:
    """Both say False when the time is over, and True as soon as it is so."""
    redis = FakeRedis()
    started(redis)
    reader = await attach(hubs_of(redis))
    assert not await reader.hub.reaches(3, 1.0)
    assert not await reader.hub.ends(1.0)
    reaching, ending = (
        asyncio.create_task(reader.hub.reaches(3, 5.0)),
        asyncio.create_task(reader.hub.ends(5.0)),
    )
    await asyncio.sleep(SETTLE_S)
    redis.append(*deltas(3, 3))
    assert await reaching
    redis.append(line(completed(4)))
    assert await ending
    assert not await reader.hub.reaches(9, 5.0)


@virtual_time
async def test_a_page_is_as_large_as_what_its_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slow reader does not take is read again; a quick one's pages are large after the first."""
    monkeypatch.setattr("deltawire_relay.tail.BATCH_BYTES", 3 * len(deltas(10, 10)[0]))
    asked: list[int] = []
    page = Hub.page

    async def noted(hub: Hub, after: int, count: int) -> Page:
        asked.append(count)
        return await page(hub, after, count)

    monkeypatch.setattr(Hub, "page", noted)
    redis = FakeRedis()
    started(redis, 200)
    hubs = hubs_of(redis)
    quick = await attach(hubs)
    await asyncio.sleep(SETTLE_S)
    assert quick.sink.lines == redis.lines
    assert asked == [4, 256]
    asked.clear()
    slow = await attach(hubs, sink=FakeSink(room=1))
    for _ in range(40):
        await asyncio.sleep(SETTLE_S)
        slow.sink.room = 1
        slow.subscriber.pump()
    assert slow.sink.lines == redis.lines[: len(slow.sink.lines)]
    assert len(slow.sink.lines) > 100
    assert asked[:2] == [4, 256]  # it took the first page whole
    assert max(asked[2:]) <= 8
