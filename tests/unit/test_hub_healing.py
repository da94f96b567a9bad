"""Logs that begin with a snapshot, and logs that go: no reader is left waiting or given a hole (§4, §6.3)."""

import asyncio

import pytest

from deltawire.codec import decode
from deltawire.events import Failed
from deltawire.log_fold import LogFold
from deltawire.messages import Snapshot, Subscribed
from deltawire_relay.hub import HEAL_TIMEOUT_S, LOST_LOOKS
from deltawire_relay.looks import TAIL_CHECK_AFTER_S
from tests.support.fake_log import FakeRedis, FakeSink
from tests.support.hub_readers import SETTLE_S, Reader, attach, deltas, hubs_of, started
from tests.support.sample_events import completed, line, queued
from tests.support.virtual_time import virtual_time

VERDICT_S = (LOST_LOOKS + 1) * (TAIL_CHECK_AFTER_S + 1)


def fold_of(redis: FakeRedis, through: int) -> object:
    fold = LogFold()
    for text in redis.history[:through]:
        fold.add(text)
    return fold.completion()


def expect_jump(reader: Reader, redis: FakeRedis, *, at_least: int) -> int:
    """The reader's last two messages: `recovered: false`, and the fold of all up to some number."""
    subscribed, snapshot = reader.sink.messages[-2:]
    assert isinstance(subscribed, Subscribed)
    assert not subscribed.recovered
    assert isinstance(snapshot, Snapshot)
    assert snapshot.sequence_number >= at_least
    assert snapshot.completion == fold_of(redis, snapshot.sequence_number)
    return snapshot.sequence_number


# Logs that begin with a snapshot.


@pytest.mark.parametrize("position", range(9))
def test_a_log_that_begins_with_a_snapshot(position: int) -> None:
    """Below its number: told so, the fold, then the rest. From its number on: nobody notices."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis, 8)
        redis.heal(5)
        reader = await attach(hubs_of(redis), position=position)
        await asyncio.sleep(SETTLE_S)
        assert reader.sink.subscribed.earliest_sequence_number == 6
        begin = position
        if position < 5:
            begin = expect_jump(reader, redis, at_least=5)
        else:
            assert [type(message) for message in reader.sink.messages] == [Subscribed]
            assert reader.sink.subscribed.recovered
        assert reader.sink.lines == redis.history[begin:]
        redis.append(line(completed(9)))
        assert reader.sink.lines == redis.history[begin:]
        assert reader.sink.has_ended

    check()


@pytest.mark.parametrize("position", [3, 4, 5])
def test_a_log_that_is_compacted_while_a_slow_reader_is_on_its_way(position: int, small_tail: None) -> None:
    """It meets the snapshot in mid-stream; one that stands at its number goes on as if nothing were."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis, 20)
        sink = FakeSink(room=0)
        reader = await attach(hubs_of(redis), position=position, sink=sink)
        redis.heal(5)
        sink.room = None
        reader.subscriber.pump()
        await asyncio.sleep(SETTLE_S)
        begin = position if position == 5 else expect_jump(reader, redis, at_least=5)
        assert reader.sink.lines == redis.history[begin:]
        again = await attach(reader.hubs, position=position)
        assert again.sink.subscribed.recovered == (position == 5)

    check()


@virtual_time
async def test_a_live_reader_does_not_notice_that_its_log_is_compacted() -> None:
    """What the tail holds is not asked of the log, and new events go on."""
    redis = FakeRedis()
    started(redis, 8)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    redis.heal(7)
    redis.append(*deltas(9, 9))
    redis.append(line(completed(10)))
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.lines == redis.history
    assert len(reader.sink.messages) == 1


@virtual_time
async def test_a_snapshot_that_goes_beyond_the_tail_is_taken_up() -> None:
    """Events were missed, and only a snapshot stands for them: the hub goes on behind it (§4.3)."""
    redis = FakeRedis()
    redis.append(line(queued()))
    reader = await attach(hubs_of(redis), position=1)
    redis.feed.lose()
    started_lines = [*deltas(2, 9)]
    redis.append(*started_lines)
    redis.heal(6)
    redis.feed.reconnect()
    await asyncio.sleep(SETTLE_S)
    begin = expect_jump(reader, redis, at_least=6)
    assert reader.hub.status == "in_progress"
    redis.append(line(completed(10)))
    assert reader.sink.lines == redis.history[begin:]
    assert reader.sink.has_ended


@virtual_time
async def test_a_snapshot_on_the_channel_is_no_event() -> None:
    """A worker that heals publishes what it wrote: known is skipped, unknown is read from the log."""
    redis = FakeRedis()
    started(redis, 4)
    reader = await attach(hubs_of(redis), position=4)
    redis.append(*deltas(5, 5), publish=0)
    redis.heal(5)  # number 5 would be the next event
    redis.publish(redis.lines[0])
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.lines == []
    begin = expect_jump(reader, redis, at_least=5)
    redis.append(*deltas(6, 7), publish=0)
    redis.publish(b"\n".join(redis.lines))  # snapshot 5, then 6 and 7
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.lines == redis.history[begin:]


# Logs that go.


@virtual_time
async def test_a_log_that_is_lost_and_healed_is_not_noticed_by_live_readers() -> None:
    """The tail holds what they have; a worker that heals within seconds makes it good (§4.3)."""
    redis = FakeRedis()
    started(redis, 5)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(TAIL_CHECK_AFTER_S)
    redis.forget()
    await asyncio.sleep(TAIL_CHECK_AFTER_S + 2)
    redis.heal(4)
    redis.append(*deltas(6, 6))
    redis.append(line(completed(7)))
    await asyncio.sleep(VERDICT_S)
    assert reader.sink.lines == redis.history
    assert len(reader.sink.messages) == 1
    assert reader.sink.has_ended


@virtual_time
async def test_a_late_reader_is_served_from_memory_while_the_log_is_gone() -> None:
    """Events and snapshots that the tail can give need no log."""
    redis = FakeRedis()
    started(redis, 5)
    hubs = hubs_of(redis)
    first = await attach(hubs)
    redis.append(*deltas(6, 9))
    await asyncio.sleep(SETTLE_S)
    folded = await attach(hubs, mode="snapshot")
    redis.forget()
    late = await attach(hubs, position=5)
    again = await attach(hubs, position=5, mode="snapshot")
    assert late.sink.lines == redis.history[5:]
    assert again.sink.messages[1] == folded.sink.messages[1]
    assert len(first.sink.messages) == 1


async def reader_of_a_lost_log() -> tuple[FakeRedis, Reader]:
    """Redis has forgotten a job of 20 events; its reader has three, and asks for the next ones now."""
    redis = FakeRedis()
    started(redis, 20)
    sink = FakeSink(room=0)
    reader = await attach(hubs_of(redis), position=3, sink=sink)
    redis.forget()
    sink.room = None
    reader.subscriber.pump()
    return redis, reader


@virtual_time
async def test_a_reader_waits_for_a_log_that_is_healed(small_tail: None) -> None:
    """Its next events are gone with the log; it gets a snapshot as soon as there is one."""
    redis, reader = await reader_of_a_lost_log()
    sink = reader.sink
    await asyncio.sleep(3)
    assert len(sink.messages) == 1
    assert sink.error is None
    redis.heal(18)
    await asyncio.sleep(1)
    begin = expect_jump(reader, redis, at_least=18)
    redis.append(line(completed(21)))
    assert sink.lines == redis.history[begin:]
    assert sink.has_ended


@virtual_time
async def test_a_reader_goes_on_in_a_log_that_is_healed_whole(small_tail: None) -> None:
    """Its worker held all of it, so nothing is missing and no snapshot is called for (§4.3)."""
    redis, reader = await reader_of_a_lost_log()
    sink = reader.sink
    await asyncio.sleep(0.3)
    redis.append(*redis.history)
    await asyncio.sleep(3)
    assert [type(message).__name__ for message in sink.messages] == ["Subscribed"]
    assert sink.numbers == list(range(4, 21))


@pytest.mark.parametrize("wait_s", [0.0, 0.0005, 0.0015, 0.3, 4.0])
def test_who_leaves_while_a_log_is_waited_for_leaves_nothing(wait_s: float, small_tail: None) -> None:
    """Cancelling at any await of the wait: no task, no lock, and the others are served."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis, 20)
        hubs = hubs_of(redis)
        readers = [await attach(hubs, position=3, sink=FakeSink(room=0)) for _ in range(2)]
        redis.forget()
        for reader in readers:
            reader.sink.room = None
            reader.subscriber.pump()
        await asyncio.sleep(wait_s)
        readers[0].subscriber.close()
        await asyncio.sleep(0.001)
        redis.heal(18)
        await asyncio.sleep(1)
        expect_jump(readers[1], redis, at_least=18)
        assert len(readers[0].sink.messages) == 1
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("read-log")]

    check()


@virtual_time
async def test_a_log_that_cannot_be_read_takes_no_reader_back() -> None:
    """Its position lies above what the hub has read, not above the log's top: it waits, and goes on there."""
    redis = FakeRedis()
    started(redis, 4)
    hubs = hubs_of(redis)
    await attach(hubs, position=4)
    redis.append(*deltas(5, 9), publish=0)
    redis.away_for = {"read"}
    reader = await attach(hubs, position=7)
    await asyncio.sleep(30)
    assert len(reader.sink.messages) == 1
    redis.away_for = set()
    await asyncio.sleep(10)
    assert reader.sink.numbers == [8, 9]
    assert reader.sink.subscribed.recovered
    assert len(reader.sink.messages) == 1


# Jobs that are lost.


def state_lost(reader: Reader) -> Failed:
    """The terminal event that the hub has made."""
    assert reader.sink.has_ended
    assert reader.sink.error is None
    event = decode(reader.sink.lines[-1])
    assert isinstance(event, Failed)
    assert (event.error.code, event.source) == ("state_lost", "relay")
    assert event.error.retryable
    return event


@virtual_time
async def test_a_watched_job_that_redis_lost_for_good_fails() -> None:
    """Its viewers get a terminal event with the next number and what the hub has of the text (§4.2)."""
    redis = FakeRedis()
    started(redis, 5)
    hubs = hubs_of(redis)
    reader, other = await attach(hubs), await attach(hubs, mode="snapshot")
    await asyncio.sleep(SETTLE_S)
    redis.forget()
    await asyncio.sleep(TAIL_CHECK_AFTER_S)
    assert not reader.sink.has_ended
    await asyncio.sleep(VERDICT_S)
    event = state_lost(reader)
    assert event.sequence_number == 6
    assert event.completion == fold_of(redis, 5)
    assert reader.sink.lines[:-1] == redis.history
    assert state_lost(other) == event
    redis.moments.clear()
    await asyncio.sleep(60)
    assert redis.moments == []


@virtual_time
async def test_an_unavailable_redis_is_no_look() -> None:
    """A long outage, and one look afterwards, prove nothing: the worker has its seconds (§4.2)."""
    redis = FakeRedis()
    started(redis, 5)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    redis.forget()
    redis.is_away = True
    await asyncio.sleep(120)
    redis.is_away = False
    await asyncio.sleep(TAIL_CHECK_AFTER_S)
    assert not reader.sink.has_ended
    redis.heal(5)
    redis.append(line(completed(6)))
    await asyncio.sleep(VERDICT_S)
    assert reader.sink.lines == redis.history
    assert reader.sink.has_ended


@virtual_time
async def test_a_reader_that_is_behind_hears_of_the_loss_too(small_tail: None) -> None:
    """Nothing is left to make a snapshot of: it is told so, and gets the end (§6.3)."""
    redis = FakeRedis()
    started(redis, 20)
    sink = FakeSink(room=0)
    reader = await attach(hubs_of(redis), position=3, sink=sink)
    redis.forget()
    sink.room = None
    reader.subscriber.pump()
    await asyncio.sleep(max(VERDICT_S, HEAL_TIMEOUT_S))
    assert [message.recovered for message in sink.messages if isinstance(message, Subscribed)] == [
        True,
        False,
    ]
    assert state_lost(reader).completion is None
    assert sink.numbers == [21]


@virtual_time
async def test_a_position_above_the_top_of_a_lost_job_hears_of_it() -> None:
    """It waits for healing, then for the verdict, and is never left without an end (§4.4)."""
    redis = FakeRedis()
    started(redis, 5)
    hubs = hubs_of(redis)
    await attach(hubs, position=5)
    redis.forget()
    opening = asyncio.create_task(attach(hubs, position=9))
    reader = await opening
    await asyncio.sleep(2 * VERDICT_S)
    assert state_lost(reader).sequence_number == 6


@virtual_time
async def test_a_job_that_was_never_there_is_not_lost() -> None:
    """Its readers get unknown_job, as ever (§6.3)."""
    redis = FakeRedis()
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(120)
    assert reader.sink.error is not None
    assert reader.sink.error.code == "unknown_job"
    assert reader.sink.lines == []


@virtual_time
async def test_a_finished_job_that_expires_is_not_lost(small_tail: None) -> None:
    """Its log may go while a slow reader is on the way: that is unknown_job, at once (§1.2)."""
    redis = FakeRedis()
    started(redis, 20)
    redis.append(line(completed(21)))
    sink = FakeSink(room=1)
    reader = await attach(hubs_of(redis), sink=sink)
    await asyncio.sleep(SETTLE_S)
    redis.forget()
    sink.room = None
    reader.subscriber.pump()
    await asyncio.sleep(SETTLE_S)
    assert sink.error is not None
    assert sink.error.code == "unknown_job"
    assert not sink.has_ended


@virtual_time
async def test_a_snapshot_without_what_follows_it_is_not_given_again_and_again() -> None:
    """The fold is known, the terminal event was read and is gone: one snapshot, then unknown_job."""
    redis = FakeRedis()
    started(redis, 20)
    redis.append(line(completed(21)))
    hubs = hubs_of(redis)
    await attach(hubs, mode="snapshot")
    await asyncio.sleep(SETTLE_S)
    redis.forget()
    reader = await attach(hubs)
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.error is not None
    assert len(reader.sink.messages) <= 3


@virtual_time
async def test_a_job_that_may_have_ended_unheard_and_expired_is_not_called_lost() -> None:
    """Redis was out of reach for longer than the job is kept: nobody here knows how it ended."""
    redis = FakeRedis()
    redis.retention_s = 30
    started(redis, 5)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    redis.is_away = True
    await asyncio.sleep(60)
    redis.forget()
    redis.is_away = False
    await asyncio.sleep(VERDICT_S)
    assert reader.sink.error is not None
    assert reader.sink.error.code == "unknown_job"


@virtual_time
async def test_a_job_that_was_deleted_unheard_is_not_called_lost() -> None:
    """Nobody is told to submit it again: its mark says that it is over."""
    redis = FakeRedis()
    started(redis, 5)
    reader = await attach(hubs_of(redis))
    await asyncio.sleep(SETTLE_S)
    redis.forget()
    redis.is_over = True
    await asyncio.sleep(VERDICT_S)
    assert not reader.sink.has_ended
    assert reader.sink.error is not None
    assert reader.sink.error.code == "unknown_job"


@virtual_time
async def test_another_tenants_reader_does_not_hear_that_a_job_is_gone() -> None:
    """It would hear that there was one, before those who ask for what never was hear anything."""
    redis = FakeRedis(tenant="acme")
    started(redis, 5)
    hubs = hubs_of(redis)
    stranger, reader = await attach(hubs, tenant="umbrella"), await attach(hubs, tenant="acme")
    await asyncio.sleep(SETTLE_S)
    redis.forget()
    redis.is_over = True
    await asyncio.sleep(VERDICT_S)
    assert reader.sink.error is not None
    assert stranger.sink.error is None


# Pages that are shared.


@pytest.mark.parametrize("merge", [False, True])
@virtual_time
async def test_late_readers_at_one_position_share_pages_and_what_is_encoded(
    merge: bool, small_tail: None
) -> None:
    """A hundred who come at once cost as many reads as one; each frame is made, and merged, once."""
    redis = FakeRedis()
    started(redis, 40)
    hubs = hubs_of(redis)
    await attach(hubs, position=40)
    redis.moments.clear()
    alone_sink = (await attach(hubs, position=3, merge=merge)).sink
    await asyncio.sleep(SETTLE_S)
    assert (alone_sink.lines == redis.history[3:]) != merge
    alone = redis.moments.count("read:sent")
    redis.moments.clear()
    sinks = [FakeSink() for _ in range(100)]
    await asyncio.gather(*(attach(hubs, position=3, sink=sink, merge=merge) for sink in sinks))
    await asyncio.sleep(SETTLE_S)
    assert redis.moments.count("read:sent") == alone
    for sink in sinks:
        assert sink.lines == alone_sink.lines
        assert [id(batch) for batch in sink.batches] == [id(batch) for batch in sinks[0].batches]


@virtual_time
async def test_who_leaves_does_not_take_a_shared_page_from_the_others(small_tail: None) -> None:
    """The first to ask is cut off while the page is read; the second gets it all the same."""
    redis = FakeRedis()
    started(redis, 12)
    hubs = hubs_of(redis)
    await attach(hubs, position=12)
    first, second = await attach(hubs, position=3), await attach(hubs, position=3)
    await asyncio.sleep(0.0005)
    first.subscriber.close()
    await asyncio.sleep(SETTLE_S)
    assert first.sink.lines == []
    assert second.sink.lines == redis.history[3:]


@virtual_time
async def test_who_lacks_little_does_not_wait_for_those_who_replay_much(small_tail: None) -> None:
    """Twenty replays at once leave a viewer that joins a stream its place (§4.7)."""
    redis = FakeRedis()
    started(redis, 200)
    hubs = hubs_of(redis)
    replays = [await attach(hubs, job_id=f"job-{number}") for number in range(20)]
    await attach(hubs, position=200)
    joining = await attach(hubs, position=190)
    await asyncio.sleep(SETTLE_S)
    assert joining.sink.numbers == list(range(191, 201))
    assert not any(reader.sink.numbers[-1:] == [200] for reader in replays)
    await asyncio.sleep(5)
    assert all(reader.sink.lines == redis.lines for reader in replays)


# Logs that are gone while their records are not (evicted, say).


@pytest.mark.parametrize("top", [2, 3])
def test_a_job_that_ends_at_or_below_what_its_readers_have_ends_for_them(top: int) -> None:
    """The log was lost, its worker too, and whoever ended the job began the log anew."""

    @virtual_time
    async def check() -> None:
        redis = FakeRedis()
        started(redis, 3)
        reader = await attach(hubs_of(redis))
        await asyncio.sleep(SETTLE_S)
        redis.lines = redis.lines[: top - 1]
        redis.append(line(completed(top)))
        await asyncio.sleep(VERDICT_S)
        assert reader.sink.has_ended
        assert reader.sink.lines[-1] == redis.lines[-1]

    check()


@virtual_time
async def test_another_tenants_reader_gets_nothing_of_a_log_that_lost_its_end() -> None:
    """No snapshot, which those who may read it get: to it there is no such job, before and after."""
    redis = FakeRedis(tenant="acme")
    started(redis, 5)
    hubs = hubs_of(redis)
    stranger = await attach(hubs, tenant="umbrella", position=9)
    reader = await attach(hubs, tenant="acme", position=5)
    await asyncio.sleep(SETTLE_S)
    redis.lines = redis.lines[:4]
    await asyncio.sleep(VERDICT_S)
    expect_jump(reader, redis, at_least=4)
    assert [type(message) for message in stranger.sink.messages] == [Subscribed]
    assert (stranger.sink.lines, stranger.sink.error) == ([], None)


@pytest.mark.parametrize("position", [0, 5])
def test_a_reader_of_an_ended_job_whose_log_is_gone_is_told(position: int) -> None:
    """An end without a terminal event is none."""

    class Evicted(FakeRedis):
        status = "completed"  # its record is still there

    @virtual_time
    async def check() -> None:
        redis = Evicted()
        redis.has_record = True
        reader = await attach(hubs_of(redis), position=position)
        await asyncio.sleep(VERDICT_S)
        assert not reader.sink.has_ended
        assert reader.sink.error is not None

    check()
