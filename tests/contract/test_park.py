"""What parking promises: a running job that waits outside of any slot (PROTOCOL.md §2.1)."""

import asyncio
import time
from typing import Any

import msgspec
import pytest

from deltawire.keys import ACTIVE_TTL_S
from deltawire.log import Claim, ParkCode
from deltawire.options import Options
from deltawire.record import CancelRequest, Record
from tests.support.job_logs import OpenedLog, ttls
from tests.support.log_calls import append, claim, numbers, renew, running, submit

WAIT_S = 60.0
META = "dw:{job}:meta"


async def record_of(log: OpenedLog) -> Record:
    record = await log.record("job")
    assert record is not None
    return record


async def park(
    log: OpenedLog, *, owner: str = "w1", top: int = 1, delay_s: float = WAIT_S, **fields: Any
) -> tuple[ParkCode, CancelRequest | None]:
    record = msgspec.structs.replace(await record_of(log), **{"retries": 1, **fields})
    return await log.park("job", owner=owner, record=record, top=top, delay_s=delay_s)


async def due(log: OpenedLog) -> None:
    """As if the wait was over."""
    await log.client.hset(META, "not_before", 1)


async def test_a_parked_job_is_queued_and_its_attempt_is_not_counted(job_log: OpenedLog) -> None:
    """Nobody holds it; what is left of the attempt stands in the record."""
    await running(job_log)
    assert await park(job_log, retries=2, waited_s=3.25, attempt_began_at=1_700_000_001.5) == ("PARKED", None)
    head = await job_log.head("job")
    assert head.record is not None
    assert (head.record.status, head.record.attempt, head.lease_left_s) == ("queued", 0, None)
    kept = (head.record.retries, head.record.waited_s, head.record.attempt_began_at)
    assert kept == (2, 3.25, 1_700_000_001.5)
    assert head.record.is_parked(time.time())
    assert not head.record.is_parked(time.time() + WAIT_S + 5)
    assert await job_log.index.queued(9) == ["job"]
    assert await numbers(job_log) == [1]


async def test_a_claim_before_its_time_is_told_how_long(job_log: OpenedLog) -> None:
    """And changes nothing: a message that comes too early asks nobody."""
    await running(job_log)
    await park(job_log)
    before = await job_log.client.hgetall(META)
    for owner in ("w1", "w2"):
        early = await claim(job_log, owner)
        assert early.code == "PARKED"
        assert WAIT_S - 30 < early.held_for_s <= WAIT_S
    assert await job_log.client.hgetall(META) == before


async def test_a_claim_in_time_goes_on_with_the_attempt(job_log: OpenedLog) -> None:
    """The same number, by whomever; events go on where they stopped."""
    await running(job_log)
    await append(job_log, 2, "a")
    await park(job_log, top=2, attempt_began_at=5.0)
    await due(job_log)
    again = await claim(job_log, "w2")
    assert (again.code, again.attempt, again.top) == ("CLAIMED", 1, 2)
    assert again.record is not None
    assert (again.record.retries, again.record.attempt_began_at, again.record.not_before) == (1, 5.0, None)
    assert await append(job_log, 3, "b", owner="w2") == ("OK", 3)


async def test_another_attempt_begins_anew(job_log: OpenedLog) -> None:
    """An attempt that was parked, claimed and lost is not the one that takes it over."""
    await running(job_log)
    await park(job_log, attempt_began_at=5.0)
    await due(job_log)
    await claim(job_log)
    taken = await claim(job_log, take_over=1)
    assert (taken.code, taken.attempt) == ("CLAIMED", 2)
    assert taken.record is not None
    assert taken.record.attempt_began_at is None


async def test_only_the_owner_of_the_attempt_may_park(job_log: OpenedLog) -> None:
    """Neither a stranger, nor a former attempt, nor anybody once the job has ended."""
    await running(job_log)
    assert await park(job_log, owner="w2") == ("STALE", None)
    assert await park(job_log, attempt=2) == ("STALE", None)
    await append(job_log, 2, end="completed")
    assert await park(job_log, attempt=1, top=2) == ("STALE", None)
    assert (await record_of(job_log)).status == "completed"


async def test_a_repeat_changes_nothing(job_log: OpenedLog) -> None:
    """The answer to the first call may have been lost."""
    await running(job_log)
    record = await record_of(job_log)
    await job_log.park("job", owner="w1", record=record, top=1, delay_s=WAIT_S)
    before = await job_log.client.hgetall(META)
    assert await job_log.park("job", owner="w1", record=record, top=1, delay_s=99) == ("PARKED", None)
    assert await job_log.client.hgetall(META) == before


async def test_what_was_parked_cannot_write(job_log: OpenedLog) -> None:
    """A late append or renewal of the attempt is stale, until it is claimed again."""
    await running(job_log)
    await park(job_log)
    assert await append(job_log, 2, "late") == ("STALE", 1)
    assert await renew(job_log) == [b"STALE", b""]
    assert await numbers(job_log) == [1]


async def test_an_attempt_that_was_lost_cannot_write_while_the_one_after_it_is_parked(
    job_log: OpenedLog,
) -> None:
    """The parked one's number is not counted, so it is the lost one's: the owner tells them apart."""
    await submit(job_log)
    await claim(job_log, lease_s=0)
    assert (await claim(job_log, "w2", take_over=1)).attempt == 2
    await append(job_log, 2, "b", attempt=2, owner="w2")
    assert await park(job_log, owner="w2", attempt=2, top=2) == ("PARKED", None)
    assert await append(job_log, 3, "late") == ("STALE", 2)
    assert await append(job_log, 3, end="completed") == ("STALE", 2)
    assert await numbers(job_log) == [1, 2]


async def test_a_cancel_key_forbids_parking(job_log: OpenedLog) -> None:
    """Its worker ends the job, which it was told to."""
    await running(job_log)
    await job_log.cancel("job", reason="bored")
    code, request = await park(job_log)
    assert code == "CANCELLED"
    assert request is not None
    assert request.reason == "bored"
    assert (await record_of(job_log)).status == "in_progress"


@pytest.mark.parametrize("value", ["", "1"])
async def test_a_bare_cancel_key_forbids_it_too(job_log: OpenedLog, value: str) -> None:
    """Whatever it holds."""
    await running(job_log)
    await job_log.client.set("dw:{job}:cancel", value)
    assert await park(job_log) == ("CANCELLED", CancelRequest())


async def test_cancelling_a_parked_job_ends_it_as_a_queued_one(job_log: OpenedLog) -> None:
    """At once; its terminal event continues the numbers."""
    await running(job_log)
    await append(job_log, 2, "a")
    await park(job_log, top=2)
    cancelled = await job_log.cancel("job", reason="bored")
    assert (cancelled.status, cancelled.cancelled_from) == ("cancelled", "queued")
    assert await numbers(job_log) == [1, 2, 3]
    assert b'"type":"cancelled"' in (await job_log.read("job", 2))[0]
    assert await claim(job_log) == Claim(code="ENDED", status="cancelled")


async def test_a_key_set_by_hand_lets_the_claim_through(job_log: OpenedLog) -> None:
    """Who cancels a parked job with nothing but Redis waits for its claim only."""
    await running(job_log)
    await park(job_log)
    await job_log.client.set("dw:{job}:cancel", "1")
    got = await claim(job_log)
    assert (got.code, got.cancel) == ("CLAIMED", CancelRequest())


async def test_a_job_that_redis_lost_is_missing(job_log: OpenedLog) -> None:
    """Its record, or the end of its log: its owner writes it again first."""
    await running(job_log)
    record = await record_of(job_log)
    assert await park(job_log, top=2) == ("MISSING", None)
    await job_log.client.delete(META)
    assert await job_log.park("job", owner="w1", record=record, top=1, delay_s=1) == ("MISSING", None)


async def test_a_parked_job_lives_until_its_time_in_the_queue_is_over(job_log: OpenedLog) -> None:
    """And for as long after it as any other."""
    options = Options(queue_timeout_s=7_200)
    await job_log.submit("job", request=b"{}", options=options, digest="", created_at=time.time())
    await claim(job_log)
    await park(job_log)
    left = await ttls(job_log, "dw:{job}:*")
    assert left.keys() == {META, "dw:{job}:log"}
    assert all(0 <= 7_200 + ACTIVE_TTL_S - ttl < 60 for ttl in left.values())


async def test_a_cancel_and_a_park_at_once_end_the_job_or_leave_it_to_be_ended(job_log: OpenedLog) -> None:
    """Whichever comes first: never a parked job that somebody was told is cancelled."""
    for _ in range(20):
        await job_log.client.flushdb()
        await submit(job_log)
        await claim(job_log)
        (code, _), cancelled = await asyncio.gather(park(job_log), job_log.cancel("job", reason="race"))
        record = await record_of(job_log)
        if code == "PARKED":
            assert (cancelled.status, record.status) == ("cancelled", "cancelled")
        else:
            assert (code, cancelled.status, record.status) == ("CANCELLED", "in_progress", "in_progress")
