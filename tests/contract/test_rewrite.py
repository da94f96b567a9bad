"""What writing a log anew promises: after a loss, and to compact it (PROTOCOL.md §3.2, §4)."""

import asyncio
from typing import Any

import msgspec
import pytest
from redis.asyncio.client import PubSub

from deltawire.codec import encode_snapshot, is_snapshot, sequence_number_of
from deltawire.fold import Fold
from deltawire.keys import ACTIVE_TTL_S, Keys
from deltawire.log import rewrite_args
from deltawire.log_fold import LogFold, fold_pages
from deltawire.options import Options
from deltawire.record import Record
from deltawire.scripts import REWRITE
from tests.support import sample_events as sample
from tests.support.job_logs import OpenedLog, listening, open_job_log, ttls
from tests.support.log_calls import BODY, LEASE_S, NOW, append, claim, renew, running, submit
from tests.support.sample_events import line

RECORD = Record(
    status="in_progress",
    attempt=1,
    created_at=NOW,
    tenant="t",
    options=Options(tenant="t", metadata={"a": "ü"}, max_attempts=7),
    digest="d",
    request=BODY,
    response=b'{"model":"m"}',
    started_at=NOW + 1.25,
    first_delta_at=NOW + 2.000001,
)
LOSSES = [["dw:{job}:meta"], ["dw:{job}:log"], ["dw:{job}:meta", "dw:{job}:log"]]


def deltas(first: int, *texts: str, attempt: int = 1) -> list[bytes]:
    return [line(sample.delta(first + at, text, attempt=attempt)) for at, text in enumerate(texts)]


def snapshot(number: int, *texts: str) -> bytes:
    """What stands for all events up to `number`, of which `texts` are the deltas."""
    fold = Fold()
    for text in texts:
        fold.add(sample.text_chunk(text))
    return encode_snapshot("job", number, attempt=1, created_at=NOW, fold=fold.state())


async def rewrite(
    log: OpenedLog,
    first: int,
    events: list[bytes],
    *,
    before: bytes = b"",
    owner: str = "w1",
    record: Record = RECORD,
) -> list[Any]:
    """The script's reply."""
    args = rewrite_args(
        log.keys,
        log.keys.job("job"),
        owner=owner,
        lease_s=LEASE_S,
        first=first,
        snapshot=before,
        events=events,
        record=record,
    )
    return await log.scripts.evalsha(REWRITE, *args)


async def written(log: OpenedLog, *texts: str) -> list[bytes]:
    """Makes a job of w1's with these deltas; its log."""
    await running(log)
    await append(log, 2, *texts)
    return await log.read("job", 0)


class Listener:
    """Who listens on the job's channel."""

    def __init__(self, log: OpenedLog, channel: PubSub) -> None:
        self._log = log
        self._channel = channel

    async def events(self) -> list[bytes]:
        """All that came since the last call."""
        await self._log.executor.execute(self._log.keys.publish, "dw:{job}:events", b"until here")
        got: list[bytes] = []
        async with asyncio.timeout(10):
            while True:
                message = await self._channel.get_message(timeout=1)
                if message is not None and message["data"] == b"until here":
                    return got
                if message is not None:
                    got += message["data"].split(b"\n")


@pytest.mark.parametrize("lost", LOSSES, ids=["record", "log", "both"])
async def test_a_rewrite_brings_back_what_was_lost(job_log: OpenedLog, lost: list[str]) -> None:
    """The log byte for byte, the job claimed by its owner; the next append goes on, and all keys expire."""
    before = await written(job_log, "a", "b")
    await job_log.client.delete(*lost)
    assert (await rewrite(job_log, 1, before))[:2] == [b"OK", 3]
    assert await job_log.read("job", 0) == before
    assert (await renew(job_log))[0] == b"OK"
    assert (await claim(job_log, "w2")).code == "HELD"
    remaining = await ttls(job_log, "dw:{job}:*")
    assert set(remaining) == {"dw:{job}:meta", "dw:{job}:log"}
    assert all(0 < ttl <= ACTIVE_TTL_S for ttl in remaining.values())
    assert await append(job_log, 4, "c") == ("OK", 4)


@pytest.mark.parametrize(("tenant", "code"), [("t", b"CANCELLING"), (None, b"CANCELLING"), ("other", b"OK")])
async def test_a_cancel_while_the_record_was_lost_is_for_its_own_tenants_job(
    job_log: OpenedLog, tenant: str | None, code: bytes
) -> None:
    """As at a claim: to another tenant the job did not exist."""
    before = await written(job_log, "a")
    await job_log.client.delete("dw:{job}:meta")
    await job_log.cancel("job", reason="r", tenant=tenant)
    assert (await rewrite(job_log, 1, before))[0] == code
    assert await append(job_log, 3, "b") == (("CANCELLING" if code != b"OK" else "OK"), 3)


async def test_a_job_that_is_over_does_not_come_back(job_log: OpenedLog) -> None:
    """Neither by an owner that wakes when the record has expired, nor by a message that comes once more."""
    before = await written(job_log, "a")
    assert (await append(job_log, 3, end="completed", ttl_s=1))[0] == "OK"
    await job_log.client.delete("dw:{job}:meta", "dw:{job}:log")
    assert (await rewrite(job_log, 1, before))[:2] == [b"ENDED", 0]
    again = await claim(job_log, "w2", request=BODY)
    assert (again.code, again.status) == ("ENDED", "completed")
    assert set(await ttls(job_log, "dw:{job}:*")) == {"dw:{job}:cancel"}
    await job_log.cancel("job", reason="r")
    assert (await submit(job_log)).is_new  # whoever asks for it anew means it
    new = await claim(job_log, "w2")
    assert (new.code, new.cancel) == ("CLAIMED", None)


async def test_that_a_job_is_over_is_known_for_an_hour_at_least(job_log: OpenedLog) -> None:
    """By its record, or by what outlives that."""
    for ttl_s, known in ((7, {"dw:{job}:cancel"}), (ACTIVE_TTL_S, {"dw:{job}:meta", "dw:{job}:log"})):
        await written(job_log, "a")
        await append(job_log, 3, end="completed", ttl_s=ttl_s)
        left = await ttls(job_log, "dw:{job}:*")
        assert {key for key, ttl in left.items() if ACTIVE_TTL_S - 60 < ttl <= ACTIVE_TTL_S} == known
        await job_log.client.delete(*left)


async def test_a_lost_record_comes_back_as_it_was(job_log: OpenedLog) -> None:
    """Options, tenant, digest, metadata, times and request, to the last digit."""
    assert (await rewrite(job_log, 1, [line(sample.queued())]))[0] == b"OK"
    record = await job_log.record("job")
    assert record is not None
    assert record.lease_until is not None
    assert msgspec.structs.replace(record, lease_until=None) == RECORD


async def test_a_record_without_digest_or_times_comes_back_without_them(job_log: OpenedLog) -> None:
    """A bare send_task job's record, before its first delta."""
    bare = msgspec.structs.replace(RECORD, digest="", first_delta_at=None)
    await rewrite(job_log, 1, [line(sample.queued())], record=bare)
    record = await job_log.record("job")
    assert record is not None
    assert (record.digest, record.first_delta_at) == ("", None)


async def test_a_rewrite_tells_a_record_that_is_there_what_it_does_not_know(job_log: OpenedLog) -> None:
    """The log shows a delta from now on, and by the record a lost worker's job is tried again or not."""
    await written(job_log)
    await job_log.client.delete("dw:{job}:log")
    await rewrite(job_log, 1, [line(sample.queued()), *deltas(2, "a")])
    record = await job_log.record("job")
    assert record is not None
    assert record.first_delta_at == RECORD.first_delta_at


async def test_a_rewrite_publishes_what_the_log_lacked(job_log: OpenedLog) -> None:
    """No more and no less: of a lost tail the tail, of a lost log all, of a log that is whole nothing."""
    log = await written(job_log, *"abc")
    async with listening(job_log, "dw:{job}:events") as channel:
        listener = Listener(job_log, channel)
        assert (await rewrite(job_log, 1, log)) == [b"OK", 4, 0]
        assert await listener.events() == []
        await job_log.client.xdel("dw:{job}:log", "4-0", "3-0")
        assert (await rewrite(job_log, 1, log)) == [b"OK", 4, 1]
        assert await listener.events() == log[2:]
        assert await job_log.read("job", 0) == log
        await job_log.client.delete("dw:{job}:log")
        assert (await rewrite(job_log, 1, log)) == [b"OK", 4, 1]
        assert await listener.events() == log
        await job_log.client.flushall()
        assert (await rewrite(job_log, 3, log[2:], before=snapshot(2, "a"))) == [b"OK", 4, 1]
        assert await listener.events() == log[2:]
        # A compaction along with which new events come.
        assert (await rewrite(job_log, 4, [log[3], *deltas(5, "d")], before=snapshot(3, *"ab")))[2] == 1
        assert await listener.events() == deltas(5, "d")


async def test_a_compacted_log_folds_to_what_it_was(job_log: OpenedLog) -> None:
    """The snapshot stands first, under the number of what it ends with, and readers can begin after it."""
    log = await written(job_log, *"abcd")
    whole = await fold_pages(LogFold(), job_log.pages("job"))
    assert (await rewrite(job_log, 4, log[3:], before=snapshot(3, *"ab")))[:2] == [b"OK", 5]
    lines = await job_log.read("job", 0)
    assert [sequence_number_of(event) for event in lines] == [3, 4, 5]
    assert [is_snapshot(event) for event in lines] == [True, False, False]
    head = await job_log.head("job")
    assert (head.earliest, head.top) == (4, 5)
    fold = await fold_pages(LogFold(), job_log.pages("job"))
    assert fold.completion() == whole.completion()
    assert (await append(job_log, 6, "e", end="completed")) == ("OK", 7)
    assert (await job_log.head("job")).earliest == 4


async def test_an_append_to_a_compacted_log_can_be_repeated(job_log: OpenedLog) -> None:
    """Also where the log's length is that of a log which would end before the append."""
    log = await written(job_log, *"abcd")
    await rewrite(job_log, 4, log[3:], before=snapshot(3, *"ab"))
    lines = await job_log.read("job", 0)
    for _ in range(2):
        assert await append(job_log, 4, "x") == ("OK", 5)
        assert await job_log.read("job", 0) == lines
        assert await append(job_log, 7, "x") == ("GAP", 5)
    assert await append(job_log, 4, "x", "y", "e") == ("OK", 6)
    assert await job_log.read("job", 0) == [*lines, *deltas(6, "e")]


async def test_a_log_can_be_nothing_but_a_snapshot(job_log: OpenedLog) -> None:
    """Of an attempt that has written nothing yet."""
    assert (await rewrite(job_log, 6, [], before=snapshot(5))) == [b"OK", 5, 0]
    head = await job_log.head("job")
    assert (head.earliest, head.top) == (6, 5)
    assert await append(job_log, 6, "a") == ("OK", 6)


async def test_a_rewrite_can_be_repeated(job_log: OpenedLog) -> None:
    """Its answer may be lost: the repeat is OK, and publishes nothing."""
    log = await written(job_log, "a")
    await job_log.client.flushall()
    for _ in range(2):
        assert (await rewrite(job_log, 1, log)) == [b"OK", 2, 0]
    assert await job_log.read("job", 0) == log


@pytest.mark.parametrize(("owner", "attempt"), [("w2", 1), ("w1", 2), ("", 1)])
async def test_what_is_not_the_callers_is_not_written_over(
    job_log: OpenedLog, owner: str, attempt: int
) -> None:
    """Another owner's job, another attempt: STALE, and nothing has changed."""
    log = await written(job_log, "a")
    keys = await job_log.client.hgetall("dw:{job}:meta")
    record = msgspec.structs.replace(RECORD, attempt=attempt)
    assert (await rewrite(job_log, 1, log[:1], owner=owner, record=record)) == [b"STALE", 2, 0]
    assert await job_log.read("job", 0) == log
    assert await job_log.client.hgetall("dw:{job}:meta") == keys


async def test_a_queued_job_is_nobodys(job_log: OpenedLog) -> None:
    """After Redis lost it and somebody submitted it again, the former owner stands back."""
    await submit(job_log)
    assert (await rewrite(job_log, 1, deltas(1, "a")))[0] == b"STALE"
    assert (await rewrite(job_log, 1, [], record=msgspec.structs.replace(RECORD, attempt=0)))[0] == b"STALE"
    assert (await claim(job_log)).code == "CLAIMED"


async def test_an_ended_job_stays_ended(job_log: OpenedLog) -> None:
    """Also by its own owner, whose terminal event got through and whose answer was lost."""
    await written(job_log, "a")
    await append(job_log, 3, end="completed")
    log = await job_log.read("job", 0)
    assert (await rewrite(job_log, 1, log[:2])) == [b"ENDED", 3, 0]
    assert await job_log.read("job", 0) == log
    assert (await renew(job_log))[0] == b"STALE"


async def test_a_log_that_is_longer_than_its_owners_is_not_cut(job_log: OpenedLog) -> None:
    """Who knows less than the log does not own it: STALE."""
    log = await written(job_log, *"abc")
    assert (await rewrite(job_log, 1, log[:-1])) == [b"STALE", 4, 0]
    await job_log.client.delete("dw:{job}:meta")
    assert (await rewrite(job_log, 1, log[:-1])) == [b"STALE", 4, 0]
    assert await job_log.read("job", 0) == log


async def test_a_rewrite_says_that_the_job_is_being_cancelled(job_log: OpenedLog) -> None:
    """A key that was set while the record was lost cancels, as any other."""
    log = await written(job_log, "a")
    await job_log.client.flushall()
    await job_log.cancel("job", reason="r")
    assert (await rewrite(job_log, 1, log)) == [b"CANCELLING", 2, 0]
    assert await append(job_log, 3, end="completed") == ("CANCELLED", 2)
    assert await append(job_log, 3, end="cancelled") == ("CANCELLING", 3)


async def test_a_renewal_tells_a_lost_job_from_an_ended_one(job_log: OpenedLog) -> None:
    """MISSING asks for a rewrite, STALE forbids it; a lost log alone is found by the next append."""
    log = await written(job_log, "a")
    await job_log.client.delete("dw:{job}:log")
    assert (await renew(job_log))[0] == b"OK"
    await job_log.client.delete("dw:{job}:meta")
    assert (await renew(job_log))[0] == b"MISSING"
    await rewrite(job_log, 1, log)
    await append(job_log, 3, end="completed")
    assert (await renew(job_log))[0] == b"STALE"


# Real servers only.


async def test_a_rewrite_passes_at_maxmemory(redis_url: str) -> None:
    """A full Redis that has lost a log gets it back: its job could not end otherwise."""
    async with open_job_log("server", redis_url) as log:
        lines = await written(log, "a")
        await rewrite(log, 1, lines)  # the script is known to the server before it is full
        for lost in LOSSES:
            await log.client.delete(*lost)
            await log.client.config_set("maxmemory", "1")
            try:
                assert (await rewrite(log, 1, lines))[0] == b"OK"
            finally:
                await log.client.config_set("maxmemory", "0")
            assert await log.read("job", 0) == lines
            assert all(ttl > 0 for ttl in (await ttls(log, "dw:{job}:*")).values())


async def test_a_cluster_gets_its_events_on_sharded_channels(redis_url: str) -> None:
    """With SPUBLISH every script publishes there, and nowhere else."""
    async with open_job_log("server", redis_url) as plain:
        log = OpenedLog(plain.executor, plain.client, Keys(publish="SPUBLISH"))
        async with log.client.pubsub() as sharded, log.client.pubsub() as channel:
            await sharded.ssubscribe("dw:{job}:events")
            await channel.subscribe("dw:{job}:events")
            await written(log, "a")
            lines = await log.read("job", 0)
            await log.client.delete("dw:{job}:log")
            assert (await rewrite(log, 1, lines)) == [b"OK", 2, 1]
            await log.client.execute_command("SPUBLISH", "dw:{job}:events", b"end")  # type: ignore[no-untyped-call] # redis-py
            await log.client.publish("dw:{job}:events", b"end")
            got: list[bytes] = []
            async with asyncio.timeout(10):
                while b"end" not in got:
                    message = await sharded.get_message(timeout=1)
                    if message is not None and message["type"] == "smessage":
                        got.append(message["data"])
                assert (await channel.get_message(timeout=5) or {})["type"] == "subscribe"
                assert (await channel.get_message(timeout=5) or {})["data"] == b"end"
        assert got == [lines[0], lines[1], b"\n".join(lines), b"end"]
