"""What a writer remembers of its job: enough to write a lost or long log anew, and no more than that."""

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import hiredis
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltawire.codec import is_snapshot, sequence_number_of
from deltawire.events import Queued
from deltawire.fold import Fold
from deltawire.keys import ACTIVE_TTL_S, LEASE_S
from deltawire.log import AppendCode
from deltawire.log_fold import LogFold
from deltawire_worker import flusher as flusher_module
from deltawire_worker import writer as writer_module
from deltawire_worker.writer import Snapshot
from tests.support import sample_events as sample
from tests.support.flusher_bench import OWNER, RECORD, Append, Bench, Rewrite, bench, settle
from tests.support.sample_events import line, text_chunk
from tests.support.virtual_time import run, virtual_time

SNAPSHOT_BYTES = 1_000
MAX_LOG_BYTES = 5_000


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """A stretch between two snapshots is a few deltas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "SNAPSHOT_BYTES", SNAPSHOT_BYTES)
        yield


class Streamed:
    """The one job of a bench, streamed to its writer; `lines` is all that was put, in order."""

    def __init__(self, b: Bench) -> None:
        self.writer = b.writer
        self.fold = Fold()
        self.lines: list[bytes] = []

    def put(self) -> None:
        number = self.writer.next_number
        self.lines.append(line(sample.in_progress(number, attempt=RECORD.attempt)))
        self.writer.put(self.lines[-1])

    def deltas(self, count: int, text: str = "text ") -> None:
        chunks = [text_chunk(f"{text}{len(self.lines) + n} ") for n in range(count)]
        for chunk in chunks:
            self.fold.add(chunk)
        encoded = [json.dumps(chunk).encode() for chunk in chunks]
        number = self.writer.next_number
        self.lines += [
            self.writer._encoder.encode(number + at, 1.0, chunk) for at, chunk in enumerate(encoded)
        ]
        self.writer.put_deltas(encoded, 1.0, self.fold)

    async def end(self) -> AppendCode:
        """As the generator does it: where the cancel key came first, `cancelled` takes the number."""
        for status in ("completed", "cancelled"):
            make = sample.cancelled if status == "cancelled" else sample.completed
            event = line(make(self.writer.next_number, attempt=RECORD.attempt))
            code = await self.writer.end(event, status=status, retention_s=5)
            if code != "CANCELLED":
                self.lines.append(event)
                return code
        raise AssertionError("cancelled was refused as if it were another ending")


class Server:
    """What append.lua and rewrite.lua do with one job that nobody takes over; it can lose things."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.last = 0  # number that the log had; it takes none up to there
        self.status: str | None = "in_progress"
        self.fields: dict[str, str] = {}
        self.is_cancelling = False
        self.published: list[bytes] = []

    @property
    def top(self) -> int:
        return sequence_number_of(self.lines[-1]) if self.lines else 0

    def apply(self, call: Append | Rewrite) -> list[Any]:
        return self._append(call) if isinstance(call, Append) else self._rewrite(call)

    def _append(self, call: Append) -> list[Any]:
        top, through = self.top, call.first + len(call.events) - 1
        if self.status is None:
            return [b"MISSING", top, 0]
        if through <= top:
            return [b"OK", top, 0]
        if self.status != "in_progress":
            return [b"ENDED", top, 0]
        if call.first > top + 1:
            return [b"GAP", top, 0]
        if self.is_cancelling and call.terminal not in {"", "cancelled"}:
            return [b"CANCELLED", top, 0]
        if top < self.last:
            return [b"GAP", -1, 0]
        self.last = through
        self.lines += call.events[top + 1 - call.first :]
        self.fields |= call.fields
        self.status = call.terminal or self.status
        return [b"CANCELLING" if self.is_cancelling else b"OK", through, 0]

    def _rewrite(self, call: Rewrite) -> list[Any]:
        top, through = self.top, call.first + len(call.events) - 1
        if self.status not in {None, "in_progress"}:
            return [b"ENDED", top, 0]
        if top > through:
            return [b"STALE", top, 0]
        self.status = "in_progress"
        self.fields |= call.fields
        self.last = through
        self.lines = [call.snapshot] if call.snapshot else []
        self.lines += call.events
        assert [sequence_number_of(text) for text in self.lines] == list(
            range(call.first - bool(call.snapshot), through + 1)
        )
        return [b"CANCELLING" if self.is_cancelling else b"OK", through, 0]

    def lose(self, what: str) -> None:
        if what == "all":
            self.__init__()  # type: ignore[misc] # as if it were another one
            self.status = None
        elif self.status == "in_progress":  # of a job that has ended nobody could write it again
            del self.lines[0 if what == "log" else len(self.lines) // 2 :]
            if what != "deleted":
                self.last = self.top

    def check(self, lines: list[bytes]) -> None:
        """It has all lines; a snapshot may stand for the first of them."""
        mine = self.lines
        if is_snapshot(mine[0]):
            number = sequence_number_of(mine[0])
            assert mine[1:] == lines[number:]
            assert fold_of(mine[:1]) == fold_of(lines[:number])
        else:
            assert mine == lines


def fold_of(lines: list[bytes]) -> Any:  # a completion as JSON
    fold = LogFold()
    for text in lines:
        fold.add(text)
    return fold.completion()


def kept_bytes(b: Bench) -> int:
    return sum(map(len, b.writer._recent))


async def answer(b: Bench, server: Server) -> bool:
    """The server answers the call under way. Whether there was one."""
    calls = b.connection.calls
    assert len(calls) <= 1
    b.connection.appends.clear()
    b.connection.rewrites.clear()
    for call in calls:
        call.answer(server.apply(call))
    await settle()
    return bool(calls)


async def answer_all(b: Bench, server: Server) -> None:
    while await answer(b, server):
        pass


STEPS = [
    *("put", "deltas", "deltas", "deltas", "answer", "answer", "answer", "turn"),
    *("lose before", "lose after", "error", "log", "tail", "deleted", "all", "renew", "cancel"),
]


@given(st.lists(st.sampled_from(STEPS), max_size=60), st.integers(0, 60))
@example(["put", "put", "answer", "all"], 0)
@example(["deltas"] * 9 + ["answer", "all", "deltas", "turn", "answer"], 14)
def test_whatever_is_lost_the_log_ends_up_whole(plan: list[str], ends_at: int) -> None:
    """Every event, in order, once, but for those that one snapshot stands for; and memory has its bound."""

    async def main() -> None:
        b, server = await bench(), Server()
        b.flusher.max_log_bytes = b.writer._log_bytes_limit = MAX_LOG_BYTES
        job = Streamed(b)
        ending: asyncio.Task[AppendCode] | None = None
        most_pending = largest_batch = 0
        for i, step in enumerate([*plan, "turn"]):
            if ending is None and i >= min(ends_at, len(plan)):
                ending = asyncio.create_task(job.end())
                await asyncio.sleep(0)
            elif step == "put" and ending is None:
                job.put()
            elif step == "deltas" and ending is None:
                was = b.writer.pending_bytes
                job.deltas(3)
                largest_batch = max(largest_batch, b.writer.pending_bytes - was)
            elif step == "answer":
                await answer(b, server)
            elif step == "error":
                for call in b.connection.calls:
                    call.answer(hiredis.ReplyError("OOM"))
                b.connection.appends.clear()
                b.connection.rewrites.clear()
                await asyncio.sleep(2 * flusher_module.RETRY_S)
            elif step.startswith("lose"):
                if step == "lose after":
                    for call in b.connection.calls:
                        server.apply(call)
                b.lose()
                await b.connect()
            elif step in {"log", "tail", "deleted", "all"}:
                if ending is None or not ending.done():  # what is lost after the end stays lost
                    server.lose(step)
            elif step == "cancel":
                server.is_cancelling = True
            elif step == "renew" and server.status is None:
                b.writer.rewrite()
            else:
                await settle()
            assert len(b.connection.calls) <= 1
            most_pending = max(most_pending, b.writer.pending_bytes)
            assert kept_bytes(b) <= 2 * (max(SNAPSHOT_BYTES, most_pending) + largest_batch) + 1_000
        assert ending is not None
        await settle()
        await answer_all(b, server)
        assert await ending in {"OK", "CANCELLING"}
        assert (b.refusals, b.writer.pending_bytes) == ([], 0)
        server.check(job.lines)
        assert server.status == ("cancelled" if b"cancelled" in job.lines[-1] else "completed")

    run(main())


@virtual_time
async def test_a_long_stream_is_not_encoded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is of all that came: one after each stretch of the same length would be the square of it."""
    encoded = 0

    class Counting(Snapshot):
        def __init__(self, number: int, fold: Fold) -> None:
            nonlocal encoded
            super().__init__(number, fold)
            encoded += self.size

    monkeypatch.setattr(writer_module, "Snapshot", Counting)
    b, server = await bench(), Server()
    job = Streamed(b)
    for _ in range(200):
        job.deltas(10, "a long text " * 20)
        await settle()
        await answer(b, server)
    assert encoded < 2 * sum(map(len, job.lines))


@virtual_time
async def test_memory_has_its_bound() -> None:
    """Two stretches of events, however long the job: each as long as the fold, or SNAPSHOT_BYTES."""
    b, server = await bench(), Server()
    job = Streamed(b)
    for _ in range(300):
        job.deltas(2)
        await settle()
        await answer(b, server)
        stretch = max(SNAPSHOT_BYTES, len(msgspec.json.encode(job.fold.state())))
        assert kept_bytes(b) + b.writer.pending_bytes <= 2 * stretch + 2_000
    assert sum(map(len, job.lines)) > 50 * SNAPSHOT_BYTES


@virtual_time
async def test_a_rewrite_says_all_that_the_script_wants_to_know() -> None:
    """The record among it, with what was noted since the claim."""
    b = await bench()
    job = Streamed(b)
    job.put()
    b.writer.note("first_delta_at", 12.5)
    job.deltas(1)
    await settle()
    b.under_way.refuse("MISSING")
    await settle()
    rewrite = b.rewrite_under_way
    assert (rewrite.attempt, rewrite.owner, rewrite.ttl_s) == (RECORD.attempt, OWNER, ACTIVE_TTL_S)
    assert (rewrite.lease_ms, rewrite.first, rewrite.snapshot) == (round(LEASE_S * 1000), 1, b"")
    assert rewrite.events == job.lines
    assert rewrite.fields["first_delta_at"] == "12.500000"
    rewrite.accept()
    b.writer.put(b"x")
    await settle()
    assert b.under_way.fields == {"first_delta_at": "12.5"}
    assert b.writer.next_number == 4


@virtual_time
async def test_the_first_attempt_remembers_the_queued_event() -> None:
    """Which its submitter wrote: event 1 of a log that is written anew."""
    b = await bench()
    record = msgspec.structs.replace(RECORD, attempt=1)
    writer = b.flusher.open(
        "other", record=record, owner=OWNER, top=1, on_cancel=lambda: None, on_refused=b.refusals.append
    )
    writer.rewrite()
    await settle()
    rewrite = b.rewrite_under_way
    queued = Queued(job_id="other", sequence_number=1, attempt=0, created_at=RECORD.created_at)
    assert (rewrite.first, rewrite.snapshot, rewrite.events) == (1, b"", [line(queued)])


@virtual_time
async def test_a_later_attempt_stands_for_what_came_before_by_an_empty_snapshot() -> None:
    """Its readers have discarded that: `restarted` comes next."""
    b = await bench(top=7)
    b.writer.rewrite()
    await settle()
    rewrite = b.rewrite_under_way
    assert (rewrite.first, rewrite.events) == (8, [])
    assert sequence_number_of(rewrite.snapshot) == 7
    assert fold_of([rewrite.snapshot]) is None


@virtual_time
async def test_a_lost_end_of_a_log_is_appended_again() -> None:
    """What is older stays in the log as it is, and the record hears again what the lost appends told it."""
    b, server = await bench(), Server()
    job = Streamed(b)
    b.writer.note("first_delta_at", 12.5)
    while b.writer._base.number == 0:  # until the log holds more than we do
        job.deltas(1)
        await settle()
        await answer(b, server)
    del server.lines[-3:], server.fields["first_delta_at"]
    server.last = server.top
    job.deltas(1)
    ending = asyncio.create_task(job.end())
    await settle()
    await answer(b, server)
    assert b.connection.rewrites == []
    again = b.under_way
    assert again.events[:-1] == job.lines[-4:]
    again.answer(server.apply(again))
    assert await ending == "OK"
    assert server.lines == job.lines
    assert server.fields["first_delta_at"] == "12.5"
    assert b.writer.pending_bytes == 0


@virtual_time
async def test_a_lost_end_that_is_longer_than_what_is_held_is_healed_by_a_snapshot() -> None:
    """Which takes the log's place."""
    b, server = await bench(), Server()
    job = Streamed(b)
    for _ in range(60):
        job.deltas(1)
        await settle()
        await answer(b, server)
    assert b.writer._base.number > 10
    del server.lines[10:]
    server.last = server.top
    job.deltas(1)
    await settle()
    await answer(b, server)
    assert b.connection.appends == []
    await answer_all(b, server)
    assert is_snapshot(server.lines[0])
    server.check(job.lines)


@virtual_time
async def test_a_loss_that_the_terminal_event_meets_is_healed_first() -> None:
    """The rewrite has everything but the terminal event, which follows by an append, with its status."""
    b = await bench()
    job = Streamed(b)
    job.deltas(2)
    ending = asyncio.create_task(job.end())
    await settle()
    b.under_way.refuse("MISSING")
    await settle()
    rewrite = b.rewrite_under_way
    assert rewrite.events == job.lines[:2]
    rewrite.accept()
    await settle()
    assert not ending.done()
    append = b.under_way
    assert (append.first, len(append.events), append.terminal) == (3, 1, "completed")
    assert "finished_at" in append.fields
    append.accept()
    assert await ending == "OK"


@virtual_time
async def test_a_terminal_event_that_meets_a_rewrite_under_way_waits_for_it() -> None:
    """Also where the rewrite has to be sent again."""
    b, server = await bench(), Server()
    job = Streamed(b)
    job.deltas(2)
    b.writer.rewrite()
    await settle()
    ending = asyncio.create_task(job.end())
    await settle()
    server.apply(b.connection.rewrites[0])
    b.lose()
    await b.connect()
    again = b.rewrite_under_way
    assert again.events == job.lines[:2]
    again.answer(server.apply(again))
    await settle()
    append = b.under_way
    assert (append.first, append.terminal) == (3, "completed")
    append.answer(server.apply(append))
    assert await ending == "OK"
    server.check(job.lines)


@virtual_time
async def test_a_loss_that_is_heard_of_during_an_append_is_healed_after_it() -> None:
    """The append's answer is not the rewrite's."""
    b = await bench()
    job = Streamed(b)
    job.put()
    await settle()
    b.writer.rewrite()
    b.under_way.accept()
    await settle()
    assert b.rewrite_under_way.events == job.lines


@pytest.mark.parametrize("code", ["STALE", "ENDED"])
def test_a_refused_rewrite_is_not_sent_again(code: AppendCode) -> None:
    """Another owner's job is not ours when Redis has lost it once more, either."""

    @virtual_time
    async def test() -> None:
        b = await bench()
        Streamed(b).put()
        b.writer.rewrite()
        await settle()
        b.rewrite_under_way.accept(code)
        assert b.refusals == [code]
        b.lose()
        await b.connect()
        assert b.connection.rewrites == []
        assert b.connection.appends == []

    test()


@virtual_time
async def test_a_job_that_has_ended_is_not_written_again() -> None:
    """Lost a moment after its end, it stays lost: its worker does not make it run again."""
    b, server = await bench(), Server()
    ending = asyncio.create_task(Streamed(b).end())
    await settle()
    await answer_all(b, server)
    assert await ending == "OK"
    b.writer.rewrite()
    await settle()
    assert b.connection.rewrites == []


@virtual_time
async def test_a_closed_writer_writes_nothing_again() -> None:
    """Its renewal was answered when the job had been given up."""
    b = await bench()
    b.flusher.close_writer(b.writer)
    b.writer.rewrite()
    await settle()
    assert b.connection.rewrites == []


@virtual_time
async def test_no_snapshot_is_made_over_and_over_while_redis_is_away() -> None:
    """Each costs as much as the text is long."""
    b = await bench()
    job = Streamed(b)
    b.lose()
    made = 0
    state = job.fold.state

    def counted() -> dict[str, Any]:
        nonlocal made
        made += 1
        return state()

    job.fold.state = counted  # type: ignore[method-assign] # to count
    for _ in range(100):
        job.deltas(3)
        await settle()
    assert b.writer.pending_bytes > 20 * SNAPSHOT_BYTES
    assert made <= 2


@virtual_time
async def test_a_long_log_is_compacted_once_in_a_while() -> None:
    """A rewrite when the limit is passed, not with every append after it."""
    b, server = await bench(), Server()
    b.flusher.max_log_bytes = b.writer._log_bytes_limit = MAX_LOG_BYTES
    job = Streamed(b)
    rewrites = 0
    for _ in range(200):
        job.deltas(2)
        await settle()
        while b.connection.appends or b.connection.rewrites:
            rewrites += len(b.connection.rewrites)
            await answer(b, server)
    total = sum(map(len, job.lines))
    assert 5 < rewrites < total / (MAX_LOG_BYTES - 2 * SNAPSHOT_BYTES - 1_000)
    server.check(job.lines)


@virtual_time
async def test_a_log_that_is_mostly_text_is_compacted_when_it_has_doubled() -> None:
    """Where the snapshot alone is above the limit, writing it again and again would free nothing."""
    b, server = await bench(), Server()
    b.flusher.max_log_bytes = b.writer._log_bytes_limit = MAX_LOG_BYTES
    job = Streamed(b)
    sizes = []
    for _ in range(100):
        job.deltas(1, "x" * 2_000)
        await settle()
        while b.connection.appends or b.connection.rewrites:
            if b.connection.rewrites:
                sizes.append(sum(map(len, server.lines)))
            await answer(b, server)
    assert len(sizes) > 2
    assert all(later > 1.5 * before for before, later in pairwise(sizes[1:])), sizes
    assert len(sizes) < 8
    server.check(job.lines)
