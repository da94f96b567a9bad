"""What a job's log promises, on fakeredis, a server, behind sentinels and on a cluster (PROTOCOL.md §3)."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, get_args

import hiredis
import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deltawire import redis_client
from deltawire.codec import decode, encode_snapshot, is_snapshot, is_terminal, sequence_number_of
from deltawire.errors import RedisUnavailableError
from deltawire.events import TERMINAL_STATUSES, Cancelled, Queued
from deltawire.fold import Fold
from deltawire.keys import ACTIVE_TTL_S, CANCEL_TTL_S, Keys
from deltawire.log import (
    FIRST_PAGE_EVENTS,
    NEWS_LINES,
    PAGE_EVENTS,
    AppendCode,
    Cancellation,
    Claim,
    Head,
    JobLog,
    Submitted,
    rewrite_args,
)
from deltawire.options import Options
from deltawire.record import ALL_BUT_REQUEST, CancelRequest, Record, decode_cancel, encode_cancel
from deltawire.redis_client import RedisClient
from deltawire.redis_server import free_port
from deltawire.scripts import APPEND, CLAIM, REWRITE, Script
from tests.support import sample_events as sample
from tests.support.job_logs import FakeExecutor, OpenedLog, listening, open_job_log, ttls
from tests.support.log_calls import BODY, LEASE_S, NOW, append, claim, ending, numbers, renew, running, submit
from tests.support.sample_events import line


class SteppedLog(OpenedLog):
    """A JobLog in which something happens just before a given script runs, once."""

    def __init__(self, log: OpenedLog, before: Script, happens: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(log.executor, log.client, log.keys)
        self._before = before
        self._happens: Callable[[], Awaitable[Any]] | None = happens

        stepped, evalsha = self, self.scripts.evalsha

        async def step(script: Script, *args: str | bytes | float) -> list[Any]:
            if script is stepped._before and stepped._happens is not None:
                happens, stepped._happens = stepped._happens, None
                await happens()
            return await evalsha(script, *args)

        self.scripts.evalsha = step  # type: ignore[method-assign] # that is the point


# Submit.


async def test_submit_creates_the_record_and_the_first_event(job_log: OpenedLog) -> None:
    """A submitted job is queued, holds its request and options, and its log begins with `queued`."""
    assert await submit(job_log, tenant="t", retention_s=5) == Submitted(True, "queued", True, {})
    record = await job_log.record("job")
    assert record is not None
    assert (record.status, record.attempt, record.created_at, record.tenant) == ("queued", 0, NOW, "t")
    assert (record.options.retention_s, record.request, record.is_terminal) == (5, BODY, False)
    (event,) = await job_log.read("job", 0)
    assert decode(event) == Queued(job_id="job", sequence_number=1, attempt=0, created_at=NOW)


async def test_submit_can_be_repeated(job_log: OpenedLog) -> None:
    """Creating is create-if-absent: a repeat changes nothing and says whether the body was the same."""
    await submit(job_log)
    before = await job_log.client.hgetall("dw:{job}:meta")
    assert await submit(job_log) == Submitted(False, "queued", True, {})
    assert await submit(job_log, digest="other", tenant="x") == Submitted(False, "queued", False, {})
    assert await job_log.client.hgetall("dw:{job}:meta") == before
    assert await numbers(job_log) == [1]


async def test_submit_says_how_far_the_job_is(job_log: OpenedLog) -> None:
    """A repeat while the job runs, or after it ended, answers that status and starts nothing."""
    await running(job_log)
    assert await submit(job_log) == Submitted(False, "in_progress", True)
    await append(job_log, 2, end="completed")
    assert await submit(job_log) == Submitted(False, "completed", True)


async def test_concurrent_submits_make_one_job(job_log: OpenedLog) -> None:
    """Of many submits at once exactly one is new."""
    results = await asyncio.gather(*(submit(job_log) for _ in range(10)))
    assert [result.is_new for result in results].count(True) == 1
    assert await numbers(job_log) == [1]


async def test_submit_is_all_or_nothing(job_log: OpenedLog) -> None:
    """Where a log outlived its record (evicted, deleted by hand), submit works or leaves no record."""
    await job_log.client.xadd("dw:{job}:log", {"e": line(sample.queued())}, id="1-0")
    try:
        assert (await submit(job_log)).is_new
    except hiredis.ReplyError:
        assert await job_log.record("job") is None


# Claim.


async def test_claim_of_an_unknown_job_without_a_body_is_missing(job_log: OpenedLog) -> None:
    """A message without a body cannot make a record."""
    assert await claim(job_log) == Claim(code="MISSING")
    assert await ttls(job_log, "*{job}*") == {}


async def test_claim_of_an_unknown_job_with_a_body_makes_the_record(job_log: OpenedLog) -> None:
    """A bare send_task job gets its record at the claim: attempt 1, an empty log, the caller's options."""
    began = time.time()
    got = await claim(job_log, request=BODY, options=Options(tenant="t"))
    assert (got.code, got.attempt, got.top, got.cancel) == ("CLAIMED", 1, 0, None)
    assert got.record is not None
    assert (got.record.status, got.record.tenant, got.record.request) == ("in_progress", "t", BODY)
    assert got.record.created_at == pytest.approx(began, abs=60)
    assert got.record.started_at == pytest.approx(began, abs=60)
    assert await append(job_log, 1, "a") == ("OK", 1)


async def test_claim_of_a_queued_job(job_log: OpenedLog) -> None:
    """The first claim gets attempt 1 and the record; its own request and options do not replace it."""
    await submit(job_log, tenant="t")
    got = await claim(job_log, request=b"other", options=Options(tenant="other"))
    assert (got.code, got.attempt, got.top) == ("CLAIMED", 1, 1)
    assert got.record is not None
    assert (got.record.request, got.record.tenant, got.record.status) == (BODY, "t", "in_progress")


async def test_a_living_claim_of_another_is_held(job_log: OpenedLog) -> None:
    """A duplicate delivery under another's lease stands back, told how long, even with take_over."""
    await running(job_log)
    for take_over in (None, 1):
        got = await claim(job_log, "w2", take_over=take_over)
        assert got.code == "HELD"
        assert 0 < got.held_for_s <= LEASE_S
    assert (await renew(job_log))[0] == b"OK"


async def test_an_own_claim_attaches_or_goes_on(job_log: OpenedLog) -> None:
    """The owner itself is told of its attempt, and gets the next one only by naming it."""
    await running(job_log)
    for take_over in (None, 7):
        got = await claim(job_log, take_over=take_over)
        assert (got.code, got.attempt) == ("OWN", 1)
        assert got.record is not None
    got = await claim(job_log, take_over=1)
    assert (got.code, got.attempt) == ("CLAIMED", 2)


async def test_an_expired_claim_is_shown_then_taken_over(job_log: OpenedLog) -> None:
    """An expired lease is handed to the caller to decide; naming the attempt takes it over, once."""
    await submit(job_log)
    await claim(job_log, lease_s=0)
    await append(job_log, 2, "a")
    seen = await claim(job_log, "w2")
    assert (seen.code, seen.attempt, seen.top) == ("EXPIRED", 1, 2)
    assert seen.record is not None
    assert seen.record.status == "in_progress"
    taken = await claim(job_log, "w2", take_over=seen.attempt)
    assert (taken.code, taken.attempt, taken.top) == ("CLAIMED", 2, 2)
    assert (await claim(job_log, "w3", take_over=seen.attempt)).code == "HELD"


async def test_a_take_over_of_an_older_attempt_is_refused(job_log: OpenedLog) -> None:
    """Who decided about attempt 1 cannot take over attempt 2, expired or not."""
    await submit(job_log)
    await claim(job_log, lease_s=0)
    await claim(job_log, "w2", take_over=1, lease_s=0)
    got = await claim(job_log, "w3", take_over=1)
    assert (got.code, got.attempt) == ("EXPIRED", 2)


async def test_an_expired_lease_can_be_renewed_by_its_owner(job_log: OpenedLog) -> None:
    """An owner whose attempt is still the current one keeps it; the one who would take over stands back."""
    await submit(job_log)
    await claim(job_log, lease_s=0)
    assert await renew(job_log) == [b"OK", b""]
    assert (await claim(job_log, "w2", take_over=1)).code == "HELD"


async def test_claim_of_an_ended_job(job_log: OpenedLog) -> None:
    """Whatever the claim brings, what has ended stays ended."""
    await running(job_log)
    await append(job_log, 2, end="completed")
    assert await claim(job_log, "w2", request=BODY, take_over=1) == Claim(code="ENDED", status="completed")


async def test_started_at_is_that_of_the_first_attempt(job_log: OpenedLog) -> None:
    """A later attempt does not move the time at which the job left the queue."""
    await submit(job_log)
    first = await claim(job_log, lease_s=0)
    second = await claim(job_log, "w2", take_over=1)
    assert first.record is not None
    assert second.record is not None
    assert first.record.started_at == second.record.started_at


async def test_of_concurrent_claims_one_wins(job_log: OpenedLog) -> None:
    """Of many owners that claim at once exactly one is the owner, the others stand back."""
    await submit(job_log)
    codes = [got.code for got in await asyncio.gather(*(claim(job_log, f"w{n}") for n in range(10)))]
    assert sorted(codes) == ["CLAIMED"] + ["HELD"] * 9


# Append.


async def test_append_ok(job_log: OpenedLog) -> None:
    """New events go to the log in order, byte for byte, and the new top comes back."""
    await running(job_log)
    assert await append(job_log, 2, "a", "b") == ("OK", 3)
    assert (await job_log.read("job", 1)) == [
        line(sample.delta(2, "a")),
        line(sample.delta(3, "b")),
    ]
    assert await job_log.last("job") == line(sample.delta(3, "b"))


async def test_a_repeated_append_changes_nothing(job_log: OpenedLog) -> None:
    """The same append again is OK with the same top; what is in the log stays, whatever the repeat holds."""
    await running(job_log)
    await append(job_log, 2, "a", "b")
    assert await append(job_log, 2, "a", "b") == ("OK", 3)
    assert await append(job_log, 2, "x") == ("OK", 3)
    assert await job_log.read("job", 1) == [line(sample.delta(2, "a")), line(sample.delta(3, "b"))]


async def test_an_overlapping_append_adds_only_what_is_new(job_log: OpenedLog) -> None:
    """Of a batch that is half known the second half is appended."""
    await running(job_log)
    await append(job_log, 2, "a", "b")
    assert await append(job_log, 3, "x", "c", "d") == ("OK", 5)
    assert (await job_log.read("job", 1))[1:] == [
        line(sample.delta(number, text)) for number, text in ((3, "b"), (4, "c"), (5, "d"))
    ]


async def test_an_append_past_the_top_is_a_gap(job_log: OpenedLog) -> None:
    """Events after missing ones are refused with the top, so that the writer can send again from there."""
    await running(job_log)
    assert await append(job_log, 3, "b") == ("GAP", 1)
    assert await numbers(job_log) == [1]


async def test_a_stale_attempt_cannot_write(job_log: OpenedLog) -> None:
    """After a take-over the old attempt is refused, new events, repeats and endings alike."""
    await submit(job_log)
    await claim(job_log, lease_s=0)
    await append(job_log, 2, "a")
    await claim(job_log, "w2", take_over=1)
    assert await append(job_log, 3, "b") == ("STALE", 2)
    assert await append(job_log, 2, "a") == ("STALE", 2)
    assert await append(job_log, 3, end="completed") == ("STALE", 2)
    assert await append(job_log, 3, "b", attempt=2, owner="w2") == ("OK", 3)


async def test_nothing_follows_a_terminal_event(job_log: OpenedLog) -> None:
    """After the terminal event appends are ENDED, a second ending too, and the repeat of the ending is OK."""
    await running(job_log)
    assert await append(job_log, 2, "a", end="completed") == ("OK", 3)
    assert await append(job_log, 2, "a", end="completed") == ("OK", 3)
    assert await append(job_log, 4, "b") == ("ENDED", 3)
    assert await append(job_log, 4, end="cancelled") == ("ENDED", 3)
    assert await append(job_log, 9, "b") == ("ENDED", 3)
    assert await numbers(job_log) == [1, 2, 3]


async def test_an_append_without_a_record_is_missing(job_log: OpenedLog) -> None:
    """Only claim makes a record: after Redis lost everything the writer hears of it and writes nothing."""
    await running(job_log)
    await job_log.client.flushall()
    assert await append(job_log, 2, "a") == ("MISSING", 0)
    assert await ttls(job_log, "*{job}*") == {}


async def test_an_append_after_the_log_was_lost_is_a_gap(job_log: OpenedLog) -> None:
    """Where only the log is gone, the writer is asked to begin again from 1."""
    await running(job_log)
    await job_log.client.delete("dw:{job}:log")
    assert await append(job_log, 2, "a") == ("GAP", 0)
    assert await append(job_log, 1, "x", "a") == ("OK", 2)
    assert -1 not in (await ttls(job_log)).values()


async def test_what_somebody_has_deleted_is_not_appended_again(job_log: OpenedLog) -> None:
    """A stream takes no number that it ever had: the log can be written anew only, and has not ended."""
    await running(job_log)
    await append(job_log, 2, "a", "b")
    await job_log.client.xdel("dw:{job}:log", "3-0")
    assert await append(job_log, 4, "c") == ("GAP", 2)
    assert await append(job_log, 3, "b", "c") == ("GAP", -1)
    assert await append(job_log, 3, "b", end="completed") == ("GAP", -1)
    record = await job_log.record("job")
    assert record is not None
    assert record.status == "in_progress"
    assert await numbers(job_log) == [1, 2]


async def test_append_says_that_the_job_is_being_cancelled(job_log: OpenedLog) -> None:
    """Deltas under a cancel key are taken, with the word to end the job."""
    await running(job_log)
    await job_log.cancel("job", reason="r")
    assert await append(job_log, 2, "a") == ("CANCELLING", 2)


async def test_only_cancelled_ends_a_cancelled_job(job_log: OpenedLog) -> None:
    """Once the key exists every other terminal event is refused, with the deltas beside it."""
    await running(job_log)
    await job_log.cancel("job", reason="r")
    assert await append(job_log, 2, "a", end="completed") == ("CANCELLED", 1)
    assert await numbers(job_log) == [1]
    assert await append(job_log, 2, "a", end="cancelled") == ("CANCELLING", 3)
    assert await append(job_log, 4, end="completed") == ("ENDED", 3)


async def test_an_append_writes_record_fields_with_its_events(job_log: OpenedLog) -> None:
    """Fields of the record change in the same step as the log; a repeat does not change them again."""
    await running(job_log)
    await append(job_log, 2, "a", fields=("first_delta_at", 12.5))
    await append(job_log, 2, "a", fields=("first_delta_at", 99.5))
    record = await job_log.record("job")
    assert record is not None
    assert (record.first_delta_at, record.finished_at) == (12.5, None)


async def test_an_ending_erases_the_request_and_sets_the_retention(job_log: OpenedLog) -> None:
    """After the terminal event no prompt is kept, no owner; log and record live for the retention."""
    await running(job_log)
    await job_log.cancel("job", reason="r")
    await append(job_log, 2, "a", end="cancelled", ttl_s=77, fields=("finished_at", NOW))
    record = await job_log.record("job")
    assert record is not None
    assert (record.status, record.request, record.finished_at, record.is_terminal) == (
        "cancelled",
        None,
        NOW,
        True,
    )
    fields = await job_log.client.hgetall("dw:{job}:meta")
    assert not {b"request", b"lease_until"} & set(fields)
    remaining = await ttls(job_log, "dw:{job}:*")
    assert await job_log.client.get("dw:{job}:cancel") == b"over cancelled"
    assert set(remaining) == {"dw:{job}:meta", "dw:{job}:log", "dw:{job}:cancel"}
    assert all(70 < remaining[key] <= 77 for key in ("dw:{job}:meta", "dw:{job}:log"))


async def test_new_events_are_published_in_one_message(job_log: OpenedLog) -> None:
    """The channel carries just the new events of each append, joined by line ends; a repeat is silent."""
    async with listening(job_log, "dw:{job}:events") as channel:
        await submit(job_log)
        await claim(job_log)
        await append(job_log, 2, "a", "b")
        await append(job_log, 2, "a", "b")
        await append(job_log, 3, "x", "c")
        await append(job_log, 9, "z")
        await job_log.executor.execute(job_log.keys.publish, "dw:{job}:events", b"end")
        got: list[bytes] = []
        while not got or got[-1] != b"end":
            message = await channel.get_message(timeout=5)
            if message is not None:
                got.append(message["data"])
    assert got == [
        line(Queued(job_id="job", sequence_number=1, attempt=0, created_at=NOW)),
        line(sample.delta(2, "a")) + b"\n" + line(sample.delta(3, "b")),
        line(sample.delta(4, "c")),
        b"end",
    ]


async def test_append_counts_who_listens(job_log: OpenedLog) -> None:
    """The reply's third element is the number of receivers of the publication."""
    await running(job_log)
    keys, publish = job_log.keys.job("job"), job_log.keys.publish
    args = (4, keys.meta, keys.log, keys.cancel, keys.channel, 1, "w1")
    async with listening(job_log, keys.channel):
        reply = await job_log.scripts.evalsha(APPEND, *args, 2, 60, "", publish, 0, line(sample.delta(2)))
        assert reply == [b"OK", 2, 1]
    reply = await job_log.scripts.evalsha(APPEND, *args, 3, 60, "", publish, 0, line(sample.delta(3)))
    assert reply == [b"OK", 3, 0]


# Cancel.


async def test_cancel_of_a_queued_job_ends_it(job_log: OpenedLog) -> None:
    """A queued job has ended when cancel returns: `cancelled`, with the reason, request erased."""
    await submit(job_log, retention_s=50)
    assert await job_log.cancel("job", reason="r") == Cancellation("cancelled", "queued")
    last = decode(await job_log.last("job") or b"")
    assert isinstance(last, Cancelled)
    assert (last.sequence_number, last.attempt, last.cancel.reason) == (2, 0, "r")
    assert last.cancel.requested_at == pytest.approx(time.time(), abs=60)
    assert last.cancel.upstream_closed_at is None
    record = await job_log.record("job")
    assert record is not None
    assert (record.status, record.request) == ("cancelled", None)
    assert record.finished_at == pytest.approx(time.time(), abs=60)
    remaining = await ttls(job_log, "dw:{job}:*")
    assert all(0 < remaining[key] <= 50 for key in ("dw:{job}:meta", "dw:{job}:log"))
    assert await claim(job_log, request=BODY) == Claim(code="ENDED", status="cancelled")


async def test_a_queued_job_whose_log_was_evicted_ends_with_a_whole_log(job_log: OpenedLog) -> None:
    """Whoever has seen event 1 would wait for ever if the terminal event had its number."""
    await submit(job_log)
    first = await job_log.read("job", 0)
    await job_log.client.delete("dw:{job}:log")
    assert await job_log.cancel("job", reason="r") == Cancellation("cancelled", "queued")
    lines = await job_log.read("job", 0)
    assert lines[:-1] == first
    assert decode(lines[-1]).sequence_number == 2


async def test_who_is_listened_to(job_log: OpenedLog) -> None:
    """A subscription counts on whichever server it is, and is no other job's; a mark counts, too (§2.5)."""
    await job_log.mark_watched("marked")
    async with job_log.client.pubsub() as channel:
        subscribe = channel.ssubscribe if job_log.keys.is_sharded else channel.subscribe
        await subscribe("dw:{job}:events")
        await channel.get_message(timeout=5)
        assert await job_log.listened_to(["other", "job", "marked"]) == {"job"}
        watched = [await job_log.is_watched(job_id) for job_id in ("other", "job", "marked")]
    assert watched == [False, True, True]
    assert await job_log.listened_to([]) == set()


async def test_cancel_of_a_running_job_tells_its_worker(job_log: OpenedLog) -> None:
    """The owner's control channel gets the job's id and the key's value at once; the key says the same."""
    await running(job_log)
    async with job_log.client.pubsub(ignore_subscribe_messages=True) as channel:
        await channel.subscribe(job_log.keys.control("w1"))
        assert await job_log.cancel("job", reason="r") == Cancellation("in_progress", "in_progress")
        message = None
        while message is None:
            message = await channel.get_message(timeout=5)
    _, value = await renew(job_log)
    assert (message["channel"], message["data"]) == (b"dw:control:w1", b"job\n" + value)
    request = decode_cancel(value)
    assert request is not None
    assert request.reason == "r"
    assert request.requested_at == pytest.approx(time.time(), abs=60)


async def test_cancel_of_an_ended_job_changes_nothing(job_log: OpenedLog) -> None:
    """What has ended is not cancelled from anything, and no key is left behind."""
    await running(job_log)
    await append(job_log, 2, end="completed")
    assert await job_log.cancel("job", reason="r") == Cancellation("completed", None)
    assert await job_log.cancel_request("job") is None
    assert await numbers(job_log) == [1, 2]


async def test_cancel_of_an_unknown_job_leaves_a_tombstone(job_log: OpenedLog) -> None:
    """The key waits for the claim for a day, and makes no record."""
    assert await job_log.cancel("job", reason="r") == Cancellation("unknown", "unknown")
    assert await job_log.record("job") is None
    assert (await job_log.cancel_request("job") or CancelRequest()).reason == "r"
    (ttl,) = (await ttls(job_log)).values()
    assert CANCEL_TTL_S - 60 < ttl <= CANCEL_TTL_S
    got = await claim(job_log, request=BODY)
    assert got.code == "CLAIMED"
    assert got.cancel is not None
    assert got.cancel.reason == "r"


@pytest.mark.parametrize("state", ["unknown", "queued", "in_progress"])
async def test_cancel_is_idempotent_and_the_first_reason_stays(job_log: OpenedLog, state: str) -> None:
    """A second cancel changes neither the key nor the log."""
    if state != "unknown":
        await submit(job_log)
    if state == "in_progress":
        await claim(job_log)
    first = await job_log.cancel("job", reason="first")
    value, log = await job_log.cancel_request("job"), await numbers(job_log)
    second = await job_log.cancel("job", reason="second")
    assert second.status == first.status
    assert await job_log.cancel_request("job") == value
    assert value is not None
    assert value.reason == "first"
    assert await numbers(job_log) == log


async def test_concurrent_cancels_end_a_queued_job_once(job_log: OpenedLog) -> None:
    """However many cancel at once, there is one terminal event."""
    await submit(job_log)
    await asyncio.gather(*(job_log.cancel("job", reason=str(n)) for n in range(10)))
    assert await numbers(job_log) == [1, 2]


async def test_a_bare_key_cancels(job_log: OpenedLog) -> None:
    """`SET dw:{id}:cancel 1 EX 86400` from any client is a cancellation; its value need say nothing."""
    await running(job_log)
    await job_log.client.set("dw:{job}:cancel", "1", ex=86_400)
    assert await job_log.cancel_request("job") == CancelRequest("cancel_key", None)
    assert await append(job_log, 2, "a") == ("CANCELLING", 2)
    assert decode_cancel((await renew(job_log))[1]) == CancelRequest("cancel_key", None)


async def test_a_queued_job_with_a_bare_key_can_be_cancelled_again(job_log: OpenedLog) -> None:
    """A cancel call ends a queued job whose key somebody else has set, with that key's reason."""
    await submit(job_log)
    await job_log.client.set("dw:{job}:cancel", "1", ex=86_400)
    assert await job_log.cancel("job", reason="mine") == Cancellation("cancelled", "queued")
    last = decode(await job_log.last("job") or b"")
    assert isinstance(last, Cancelled)
    assert last.cancel.reason == "cancel_key"


async def test_a_claim_before_the_cancel(job_log: OpenedLog) -> None:
    """Claim first: the job runs, and the cancel is its worker's to carry out."""
    await submit(job_log)
    got = await claim(job_log)
    assert got.cancel is None
    assert await job_log.cancel("job", reason="r") == Cancellation("in_progress", "in_progress")
    assert await append(job_log, 2, end="cancelled") == ("CANCELLING", 2)


async def test_a_claim_in_the_middle_of_a_cancel(job_log: OpenedLog) -> None:
    """A claim between the key and the terminal event sees the key and owns the ending; cancel says so."""
    await submit(job_log)
    claims: list[Claim] = []

    async def claim_now() -> None:
        claims.append(await claim(job_log))

    stepped = SteppedLog(job_log, APPEND, claim_now)
    assert await stepped.cancel("job", reason="r") == Cancellation("in_progress", "in_progress")
    assert claims[0].code == "CLAIMED"
    assert claims[0].cancel is not None
    assert await numbers(job_log) == [1]
    assert await append(job_log, 2, end="cancelled") == ("CANCELLING", 2)


async def test_a_cancel_in_the_middle_of_a_claim(job_log: OpenedLog) -> None:
    """Cancel first: the claim finds the job ended."""
    await submit(job_log)
    stepped = SteppedLog(job_log, CLAIM, lambda: job_log.cancel("job", reason="r"))
    assert (await claim(stepped)).code == "ENDED"
    assert await numbers(job_log) == [1, 2]


async def test_a_cancel_in_the_middle_of_a_cancel(job_log: OpenedLog) -> None:
    """Both callers hear that the job was cancelled from the queue, and there is one terminal event."""
    await submit(job_log)
    stepped = SteppedLog(job_log, APPEND, lambda: job_log.cancel("job", reason="inner"))
    assert await stepped.cancel("job", reason="outer") == Cancellation("cancelled", "queued")
    assert await numbers(job_log) == [1, 2]


async def test_a_cancel_that_dies_half_way_is_found(job_log: OpenedLog) -> None:
    """Where the canceller dies between key and event, a second cancel or a claim goes on from the key."""
    await submit(job_log)

    async def die() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await SteppedLog(job_log, APPEND, die).cancel("job", reason="r")
    assert await numbers(job_log) == [1]
    assert await job_log.cancel_request("job") is not None
    assert await job_log.cancel("job", reason="again") == Cancellation("cancelled", "queued")


def test_a_cancel_request_survives_its_key() -> None:
    """The key's value is read back; no value is no request; any other value is a bare request."""
    request = CancelRequest("r", 1.5)
    assert decode_cancel(encode_cancel(request)) == request
    assert decode_cancel(b"") is None
    for value in (b"1", b"yes", b"[]", b'{"reason":1}'):
        assert decode_cancel(value) == CancelRequest("cancel_key", None)


def test_a_cancel_key_of_any_bytes_is_a_bare_request() -> None:
    """`SET … cancel` with bytes that are no text cancels like any other."""
    assert decode_cancel(b'{"reason":"\xff"}') == CancelRequest()


async def test_an_empty_cancel_key_cancels(job_log: OpenedLog) -> None:
    """The key's existence cancels, whatever it holds: `SET … cancel ""` is seen by claim and renewal too."""
    await submit(job_log)
    await job_log.client.set("dw:{job}:cancel", "", ex=86_400)
    got = await claim(job_log)
    assert await append(job_log, 2, "a") == ("CANCELLING", 2)
    assert got.cancel == CancelRequest()
    assert decode_cancel((await renew(job_log))[1]) == CancelRequest()


# Renew.


async def test_renew_extends_lease_and_keys(job_log: OpenedLog) -> None:
    """The owner's renewal moves the lease and the expiry of record and log, and says nothing of a cancel."""
    await submit(job_log)
    await claim(job_log, lease_s=0)
    for key in ("dw:{job}:meta", "dw:{job}:log"):
        await job_log.client.expire(key, 5)
    assert await renew(job_log) == [b"OK", b""]
    assert all(ttl > 5 for ttl in (await ttls(job_log)).values())
    assert (await claim(job_log, "w2")).code == "HELD"


@pytest.mark.parametrize(("owner", "attempt"), [("w2", 1), ("w1", 2), ("", 0)])
async def test_renew_of_what_is_not_the_callers_is_stale(
    job_log: OpenedLog, owner: str, attempt: int
) -> None:
    """Another's job, another attempt: STALE, and nothing is extended."""
    await running(job_log)
    before = await job_log.client.hget("dw:{job}:meta", "lease_until")
    assert await renew(job_log, owner, attempt) == [b"STALE", b""]
    assert await job_log.client.hget("dw:{job}:meta", "lease_until") == before


async def test_renew_after_the_end_or_the_loss_of_a_job(job_log: OpenedLog) -> None:
    """It tells an ended job from one that Redis lost, and makes no key."""
    await running(job_log)
    await append(job_log, 2, end="completed")
    assert await renew(job_log) == [b"STALE", b""]
    await job_log.client.flushall()
    assert await renew(job_log) == [b"MISSING", b""]
    assert await ttls(job_log, "*{job}*") == {}


# Everything else.


async def test_every_key_expires_after_every_script(job_log: OpenedLog) -> None:
    """No script leaves a key without a time to live."""
    steps: list[Callable[[], Awaitable[Any]]] = [
        lambda: job_log.cancel("other", reason="r"),
        lambda: submit(job_log, queue_timeout_s=10),
        lambda: claim(job_log),
        lambda: append(job_log, 2, "a", ttl_s=0.2),
        lambda: renew(job_log),
        lambda: job_log.cancel("job", reason="r"),
        lambda: append(job_log, 3, end="cancelled"),
        lambda: job_log.claim("other", owner="w1", lease_s=1, request=BODY),
        lambda: job_log.append("other", attempt=1, owner="w1", first=1, events=[line(sample.delta(1))]),
        lambda: submit(job_log, "third"),
        lambda: job_log.cancel("third", reason="r"),
    ]
    for step in steps:
        await step()
        remaining = await ttls(job_log)
        assert remaining
        assert all(ttl > 0 for ttl in remaining.values()), remaining


async def test_a_queued_job_outlives_its_time_in_the_queue(job_log: OpenedLog) -> None:
    """The record stays for the whole queue time-out, so that somebody can end the job at it."""
    await submit(job_log, queue_timeout_s=7_200)
    assert all(7_200 < ttl <= 7_200 + ACTIVE_TTL_S for ttl in (await ttls(job_log, "dw:{job}:*")).values())


async def test_scripts_are_loaded_again_after_a_flush(job_log: OpenedLog) -> None:
    """A server that forgot its scripts (restart, SCRIPT FLUSH) is taught them again unnoticed."""
    for script in (
        lambda: submit(job_log),
        lambda: claim(job_log),
        lambda: append(job_log, 2, "a"),
        lambda: renew(job_log),
        lambda: job_log.cancel("job", reason="r"),
    ):
        await job_log.client.script_flush()
        await script()
    assert await append(job_log, 3, end="cancelled") == ("CANCELLING", 3)


async def test_reading(job_log: OpenedLog) -> None:
    """Reads are (after, through], in order; head, top and last say where the log begins and ends."""
    assert await job_log.head("job") == Head(record=None, earliest=0, top=0)
    assert (await job_log.top("job"), await job_log.last("job")) == (0, None)
    assert await job_log.read("job", 0) == []
    await running(job_log)
    await append(job_log, 2, *"abcd")
    assert await job_log.top("job") == 5
    head, record = await job_log.head("job"), await job_log.record("job")
    assert record is not None
    # The request is for its worker alone: those who look after the job, or watch it, do without.
    assert (record.request, head.record) == (BODY, msgspec.structs.replace(record, request=None))
    known = {name.removeprefix("is_") for name in Record.__struct_fields__}
    assert known == {*ALL_BUT_REQUEST, "request"}
    assert (head.earliest, head.top) == (1, 5)
    assert head.lease_left_s is not None
    assert 0 < head.lease_left_s <= LEASE_S
    assert [sequence_number_of(event) for event in await job_log.read("job", 2)] == [3, 4, 5]
    assert [sequence_number_of(event) for event in await job_log.read("job", 2, 4)] == [3, 4]
    assert [sequence_number_of(event) for event in await job_log.read("job", 1, count=2)] == [2, 3]
    assert await job_log.read("job", 5) == []
    assert await job_log.read("job", 9) == []
    assert await job_log.read("job", 4, 2) == []


async def test_pages_hold_everything_once(job_log: OpenedLog) -> None:
    """A log comes in pages of growing size, bounded in events and bytes, and never an empty page."""
    await running(job_log)
    total = 2 * PAGE_EVENTS + 1
    events = [
        b'{"type":"delta","job_id":"job","sequence_number":%d,"attempt":1}' % n for n in range(2, total + 1)
    ]
    assert await job_log.append("job", attempt=1, owner="w1", first=2, events=events) == ("OK", total)
    pages = [page async for page in job_log.pages("job")]
    assert [len(page) for page in pages] == [
        FIRST_PAGE_EVENTS,
        PAGE_EVENTS,
        total - PAGE_EVENTS - FIRST_PAGE_EVENTS,
    ]
    assert [sequence_number_of(event) for page in pages for event in page] == list(range(1, total + 1))
    bounded = [page async for page in job_log.pages("job", 1, 1 + PAGE_EVENTS)]
    assert sum(map(len, bounded)) == PAGE_EVENTS
    assert all(bounded)
    assert [page async for page in job_log.pages("job", total)] == []


async def test_pages_of_a_log_that_begins_later(job_log: OpenedLog) -> None:
    """A log whose beginning was compacted away is read once, too, not some of it twice."""
    client = job_log.client
    async with client.pipeline() as pipeline:
        for n in range(501, 502 + PAGE_EVENTS):
            pipeline.xadd("dw:{job}:log", {"e": b'"sequence_number":%d,' % n}, id=f"{n}-0")
        await pipeline.execute()
    got = [sequence_number_of(event) async for page in job_log.pages("job") for event in page]
    assert got == list(range(501, 502 + PAGE_EVENTS))


async def test_a_log_that_begins_with_a_snapshot(job_log: OpenedLog) -> None:
    """The first event that can be read is the one after the snapshot, and the top is as ever (§6.3)."""
    await running(job_log)
    log = job_log.keys.job("job").log
    await job_log.client.delete(log)
    snapshot = encode_snapshot("job", 7, attempt=1, created_at=NOW, fold=Fold().state())
    await job_log.client.xadd(log, {"e": snapshot}, id="7-0")
    head = await job_log.head("job")
    assert (head.earliest, head.top) == (8, 7)
    assert await append(job_log, 8, "a") == ("OK", 8)
    head = await job_log.head("job")
    assert (head.earliest, head.top) == (8, 8)


async def test_news_of_many_logs_at_once(job_log: OpenedLog) -> None:
    """Of each log what lies beyond its number, in order, so many lines at the most; no news are left out."""
    for job_id, last in (("a", 3), ("b", NEWS_LINES + 5), ("c", 3)):
        log = job_log.keys.job(job_id).log
        for number in range(1, last + 1):
            await job_log.executor.execute("XADD", log, f"{number}-0", "e", f"{job_id}{number}")
    news = await job_log.news({"a": 1, "b": 2, "c": 3, "none": 0})
    assert news == {"a": [b"a2", b"a3"], "b": [b"b%d" % number for number in range(3, NEWS_LINES + 3)]}
    assert await job_log.news({"c": 3}) == {}
    assert await job_log.news({}) == {}
    if not isinstance(job_log.executor, FakeExecutor):  # which falls over it
        await job_log.executor.execute("SET", job_log.keys.job("d").log, "no stream")
        assert await job_log.news({"a": 2, "d": 0}) == {"a": [b"a3"]}
        with pytest.raises(RedisUnavailableError):
            await job_log.news({"d": 0})


async def test_cancel_keys_of_many_jobs_at_once(job_log: OpenedLog) -> None:
    """Whatever was set, by whomever; a key that is empty is there, too."""
    await job_log.executor.execute("SET", "dw:{a}:cancel", "1")
    await job_log.executor.execute("SET", "dw:{b}:cancel", "")
    assert await job_log.cancel_requested(["a", "none", "b"]) == ["a", "b"]
    assert await job_log.cancel_requested([]) == []


async def test_a_record_of_a_newer_version_is_read(job_log: OpenedLog) -> None:
    """An option that a newer submitter stored does not make an older worker's claim fail half way."""
    await submit(job_log)
    await job_log.client.hset("dw:{job}:meta", "options", '{"timeout_s":5,"new_option":1}')
    got = await claim(job_log)
    assert got.record is not None
    assert got.record.options.timeout_s == 5


async def test_two_prefixes_do_not_meet(job_log: OpenedLog) -> None:
    """Logs of another prefix on the same server are other logs."""
    await submit(job_log)
    other = OpenedLog(job_log.executor, job_log.client, Keys("other"))
    assert await other.record("job") is None
    assert (await submit(other)).is_new
    names = [
        *("queued", "tenant:{default}:jobs", "tenant:{default}:running", "tenants"),
        *("{job}:log", "{job}:meta"),
    ]
    assert sorted(await ttls(job_log)) == [f"{prefix}:{name}" for prefix in ("dw", "other") for name in names]


async def test_a_lost_redis_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method raises RedisUnavailableError, after its time-out, where nobody listens."""
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", 0.05)
    client = RedisClient(f"redis://127.0.0.1:{free_port()}/0", name="t")
    log = JobLog(client, Keys())
    try:
        for call in (log.record, log.head, log.last, log.cancel_request):
            with pytest.raises(RedisUnavailableError):
                await call("job")
        with pytest.raises(RedisUnavailableError):
            await log.cancel("job", reason="r")
    finally:
        await client.aclose()


# A full Redis (real servers only: fakeredis has no maxmemory).


async def _when_full(url: str, step: Callable[[OpenedLog], Awaitable[Any]]) -> Any:  # the step's result
    async with open_job_log("server", url) as log:
        await running(log)
        await renew(log)  # every script is known to the server before it is full
        await log.cancel("warm-up", reason="r")
        client = log.client
        await client.config_set("maxmemory", "1")
        try:
            return await step(log)
        finally:
            await client.config_set("maxmemory", "0")


async def test_an_append_passes_at_maxmemory(redis_url: str) -> None:
    """A running stream goes on, and ends, though Redis is full."""

    async def step(log: OpenedLog) -> list[tuple[AppendCode, int]]:
        return [await append(log, 2, "a"), await append(log, 3, end="completed")]

    assert await _when_full(redis_url, step) == [("OK", 2), ("OK", 3)]


async def test_a_renewal_passes_at_maxmemory(redis_url: str) -> None:
    """A full Redis does not take a running job from its worker."""
    assert await _when_full(redis_url, renew) == [b"OK", b""]


async def test_a_cancel_passes_at_maxmemory(redis_url: str) -> None:
    """What would free memory is possible on a full Redis."""
    result = await _when_full(redis_url, lambda log: log.cancel("job", reason="r"))
    assert result == Cancellation("in_progress", "in_progress")


async def test_a_take_over_passes_at_maxmemory(redis_url: str) -> None:
    """A lost worker's job can be taken over, and so ended, on a full Redis."""

    async def step(log: OpenedLog) -> str:
        await log.client.config_set("maxmemory", "0")
        await log.client.hset("dw:{job}:meta", "lease_until", "0")
        await log.client.config_set("maxmemory", "1")
        return (await claim(log, "w2", take_over=1)).code

    assert await _when_full(redis_url, step) == "CLAIMED"


# A model as the oracle.


class Model:
    """What the scripts should do to one job, in plain Python."""

    def __init__(self) -> None:
        self.status: str | None = None
        self.attempt = 0
        self.owner: str | None = None
        self.is_alive = False
        self.events: list[bytes] = []
        self.cancel: str | None = None

    @property
    def is_open(self) -> bool:
        return self.status in {"queued", "in_progress"}

    @property
    def top(self) -> int:
        return sequence_number_of(self.events[-1]) if self.events else 0

    def end(self, status: str) -> None:
        self.status, self.is_alive = status, False

    def rewrite(self, attempt: int, owner: str, first: int, before: bytes, events: list[bytes]) -> str:
        if self.status is not None:
            if attempt != self.attempt or owner != self.owner:
                return "STALE"
            if self.status != "in_progress":
                return "ENDED"
        if self.top > first + len(events) - 1:
            return "STALE"
        if self.status is None:
            self.status, self.attempt, self.owner, self.is_alive = "in_progress", attempt, owner, True
        self.events = ([before] if before else []) + events
        return "OK" if self.cancel is None else "CANCELLING"

    def claim(self, owner: str, take_over: int | None, *, is_alive: bool, has_body: bool) -> str:
        if self.status is None and not has_body:
            return "MISSING"
        if self.status in TERMINAL_STATUSES:
            return "ENDED"
        if self.status == "in_progress":
            if owner != self.owner and self.is_alive:
                return "HELD"
            if take_over != self.attempt:
                return "OWN" if owner == self.owner else "EXPIRED"
        self.status, self.owner, self.is_alive = "in_progress", owner, is_alive
        self.attempt += 1
        return "CLAIMED"

    def append(self, attempt: int, owner: str, first: int, events: list[bytes], end: str) -> tuple[str, int]:
        top = self.top
        if self.status is None:
            return "MISSING", top
        if attempt != self.attempt or (self.owner or "") != owner:
            return "STALE", top
        if first + len(events) - 1 <= top:
            return "OK", top
        if not self.is_open:
            return "ENDED", top
        if first > top + 1:
            return "GAP", top
        if self.cancel is not None and end not in {"", "cancelled"}:
            return "CANCELLED", top
        self.events += events[top + 1 - first :]
        if end:
            self.end(end)
        return "OK" if self.cancel is None else "CANCELLING", self.top


OWNERS = st.sampled_from(["w1", "w2"])


class JobLogMachine(RuleBasedStateMachine):
    """Every sequence of calls answers as the model does and leaves the log that the model has."""

    runner: asyncio.Runner
    log: OpenedLog
    jobs = 0

    @initialize()
    def begin(self) -> None:
        JobLogMachine.jobs += 1
        self.job_id = f"job-{JobLogMachine.jobs}"
        self.model = Model()

    def keys(self) -> set[str]:
        keys = self.log.keys.job(self.job_id)
        return {keys.meta, keys.log, keys.cancel}

    def queued_event(self) -> bytes:
        return line(Queued(job_id=self.job_id, sequence_number=1, attempt=0, created_at=NOW))

    @rule(digest=st.sampled_from(["d", "e"]))
    def submit(self, digest: str) -> None:
        was = self.model.status
        got = self.runner.run(submit(self.log, self.job_id, digest=digest))
        assert (got.is_new, got.status) == (was is None, was or "queued")
        if was is None:
            self.model.status = "queued"
            # A log that is there without a record is of a job that is gone.
            self.model.events = [self.queued_event()]

    @rule(owner=OWNERS, back=st.sampled_from([None, 0, 1]), is_alive=st.booleans(), has_body=st.booleans())
    def claim(self, owner: str, back: int | None, *, is_alive: bool, has_body: bool) -> None:
        take_over = None if back is None else self.model.attempt - back
        expected = self.model.claim(owner, take_over, is_alive=is_alive, has_body=has_body)
        got = self.runner.run(
            self.log.claim(
                self.job_id,
                owner=owner,
                lease_s=LEASE_S if is_alive else 0,
                request=BODY if has_body else None,
                take_over=take_over,
            )
        )
        assert got.code == expected
        if got.code in {"CLAIMED", "EXPIRED"}:
            assert (got.attempt, got.top) == (self.model.attempt, self.model.top)
            assert (got.cancel.reason if got.cancel else None) == self.model.cancel
            assert got.record is not None
            assert got.record.status == "in_progress"
        if got.code == "OWN":
            assert got.attempt == self.model.attempt

    @rule(
        attempt=st.sampled_from([0, 0, 0, -1, 1]),
        first=st.sampled_from([1, 1, 1, 0, -1, -2, 2, 5]),
        length=st.integers(1, 4),
        end=st.sampled_from(["", "", "", "completed", "cancelled"]),
        is_owner=st.sampled_from([True, True, True, False]),
    )
    def append(self, attempt: int, first: int, length: int, end: str, *, is_owner: bool) -> None:
        owner = self.model.owner or "" if is_owner else "w3"
        attempt = max(0, self.model.attempt + attempt)
        first = max(1, self.model.top + first)
        events = [
            line(sample.delta(number, f"{len(self.model.events)}", job_id=self.job_id, attempt=attempt))
            for number in range(first, first + length)
        ]
        if end:
            events[-1] = ending(end, first + length - 1, attempt)
        got = self.runner.run(
            self.log.append(
                self.job_id, attempt=attempt, owner=owner, first=first, events=events, terminal=end
            )
        )
        assert got[0] in get_args(AppendCode)
        assert got == self.model.append(attempt, owner, first, events, end)

    @rule(
        attempt=st.sampled_from([0, 0, 0, 1]),
        is_owner=st.sampled_from([True, True, True, False]),
        back=st.integers(0, 3),
        more=st.sampled_from([0, 0, 1, 2, -1]),
    )
    def rewrite(self, attempt: int, back: int, more: int, *, is_owner: bool) -> None:
        """The log from `back` events before its top on, and `more` new ones, by somebody."""
        model = self.model
        attempt, owner = max(1, model.attempt + attempt), model.owner or "w1" if is_owner else "w3"
        first = max(1, model.top + 1 - back)
        events = [
            line(sample.delta(number, "anew", job_id=self.job_id, attempt=attempt))
            for number in range(first, model.top + 1 + more)
        ]
        before = b""
        if first > 1:
            state = Fold().state()
            before = encode_snapshot(self.job_id, first - 1, attempt=attempt, created_at=NOW, fold=state)
        args = rewrite_args(
            self.log.keys,
            self.log.keys.job(self.job_id),
            owner=owner,
            lease_s=LEASE_S,
            first=first,
            snapshot=before,
            events=events,
            record=Record(
                status="in_progress",
                attempt=attempt,
                created_at=NOW,
                tenant="default",
                options=Options(),
                request=BODY,
            ),
        )
        got = self.runner.run(self.log.scripts.evalsha(REWRITE, *args))
        assert got[0].decode() == model.rewrite(attempt, owner, first, before, events)
        assert got[1] == model.top

    @precondition(lambda self: self.model.is_open)
    @rule(what=st.sampled_from(["log", "tail", "record", "all"]))
    def lose(self, what: str) -> None:
        """Redis loses some of a job that has not ended."""
        keys = self.log.keys.job(self.job_id)

        async def delete() -> None:
            client = self.log.client
            if what != "record":
                await client.delete(keys.log)
            if what == "tail":  # as a replica has it that was behind; XDEL would leave a trace
                for event in self.model.events[:-1]:
                    await client.xadd(keys.log, {"e": event}, id=f"{sequence_number_of(event)}-0")
                await client.expire(keys.log, 60)
            if what in {"record", "all"}:
                await client.delete(keys.meta)
            if what == "all":
                await client.delete(keys.cancel)

        self.runner.run(delete())
        was, self.model = self.model, Model()
        if what in {"log", "tail"}:
            self.model = was
        elif what == "record":
            self.model.cancel = was.cancel
        self.model.events = {"tail": was.events[:-1], "record": was.events}.get(what, [])

    @rule(reason=st.sampled_from(["a", "b"]))
    def cancel(self, reason: str) -> None:
        got = self.runner.run(self.log.cancel(self.job_id, reason=reason))
        was = self.model.status
        if was in TERMINAL_STATUSES:
            assert got == Cancellation(was, None)
            return
        self.model.cancel = self.model.cancel or reason
        if was == "queued":
            assert got == Cancellation("cancelled", "queued")
            self.model.end("cancelled")
            event = self.runner.run(self.log.last(self.job_id))
            assert event is not None
            # A log that was lost begins anew.
            self.model.events = [*(self.model.events or [self.queued_event()]), event]
        else:
            status: Literal["unknown", "in_progress"] = "unknown" if was is None else "in_progress"
            assert got == Cancellation(status, status)

    @invariant()
    def the_log_is_the_models(self) -> None:
        events = self.runner.run(self.log.read(self.job_id, 0))
        assert events == self.model.events
        begins = self.model.top + 1 - len(events)
        assert [sequence_number_of(event) for event in events] == list(range(begins, begins + len(events)))
        assert not any(is_snapshot(event) for event in events[1:])
        terminal = [is_terminal(event) for event in events]
        assert not any(terminal[:-1])
        assert any(terminal) is (self.model.status in TERMINAL_STATUSES)
        if self.model.cancel is not None and any(terminal):
            assert events[-1].startswith(b'{"type":"cancelled"')

    @invariant()
    def the_record_is_the_models(self) -> None:
        record = self.runner.run(self.log.record(self.job_id))
        assert (record.status if record else None) == self.model.status
        if record is not None:
            assert record.attempt == self.model.attempt
            assert (record.request is None) is record.is_terminal

    @invariant()
    def every_key_expires(self) -> None:
        async def look() -> list[int]:
            client = self.log.client
            return [int(await client.ttl(key)) for key in sorted(self.keys())]

        assert -1 not in self.runner.run(look())


@pytest.mark.parametrize("kind", ["fakeredis", "server"])
def test_any_sequence_of_calls_answers_as_the_model(kind: str, redis_url: str) -> None:
    """No hole, no repeat, at most one terminal event, the last, and only `cancelled` after a cancel."""
    with asyncio.Runner() as runner:
        opened = open_job_log(kind, redis_url)
        log = runner.run(opened.__aenter__())
        machine = type("Machine", (JobLogMachine,), {"runner": runner, "log": log})
        try:
            run_state_machine_as_test(
                machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
            )
        finally:
            runner.run(opened.__aexit__(None, None, None))
