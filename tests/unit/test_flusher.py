"""The writer of a job against a connection of ours: batches, resending, refusals, bounds."""

import asyncio
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.codec import decode
from deltawire.errors import RedisUnavailableError
from deltawire.events import Delta
from deltawire.fold import Fold
from deltawire.keys import ACTIVE_TTL_S
from deltawire.log import AppendCode
from deltawire.metrics import new_registry
from deltawire.redis_connection import Reply
from deltawire.scripts import RENEW
from deltawire_worker.flusher import ENOUGH, HOLD_S, RETRY_S
from deltawire_worker.writer import MAX_PENDING_BYTES, STALL_TIMEOUT_S
from tests.support.flusher_bench import Append, Bench, bench, settle, turns
from tests.support.virtual_time import run, virtual_time


@virtual_time
async def test_the_first_event_leaves_at_once() -> None:
    """Within a turn of the loop, with everything that the script wants to know."""
    b = await bench(top=4)
    assert b.writer.next_number == 5
    b.writer.put(b"five")
    await turns()
    append = b.under_way
    assert append.keys == ["dw:{job}:meta", "dw:{job}:log", "dw:{job}:cancel", "dw:{job}:events"]
    assert (append.attempt, append.first, append.ttl_s, append.terminal) == (3, 5, ACTIVE_TTL_S, "")
    assert (append.events, append.fields) == ([b"five"], {})


@virtual_time
async def test_what_arrives_meanwhile_is_the_next_batch() -> None:
    """One append of a job under way at most."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    first = b.under_way
    for event in (b"2", b"3"):
        b.writer.put(event)
        await settle()
    assert b.connection.appends == []
    first.accept()
    await settle()
    second = b.under_way
    assert (second.first, second.events) == (2, [b"2", b"3"])
    second.accept()
    await settle()
    assert b.connection.appends == []
    assert (b.writer.pending_bytes, b.writer.next_number) == (0, 4)


@virtual_time
async def test_appends_and_their_refusals_are_counted() -> None:
    """With their events; what waits for Redis is told in bytes, until the writer is closed."""
    b = await bench()
    registry = new_registry()
    registry.register(b.flusher)

    def said(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"deltawire_{name}", labels)

    for event in (b"1", b"22", b"333"):
        b.writer.put(event)
    assert said("pending_bytes") == 6
    await settle()
    b.under_way.accept()
    assert (said("appends_total"), said("append_events_total"), said("flushes_total")) == (1, 3, 1)
    assert (said("append_seconds_count"), said("pending_bytes")) == (1, 0)
    b.writer.put(b"4")
    await settle()
    b.under_way.refuse("MISSING")
    await settle()
    b.rewrite_under_way.accept()
    assert (said("append_refusals_total", code="missing"), said("log_rewrites_total")) == (1, 1)
    b.writer.put(b"5")
    await settle()
    b.lose()
    assert said("append_refusals_total", code="error") == 1
    assert said("pending_bytes") == 1
    b.flusher.close_writer(b.writer)
    assert said("pending_bytes") == 0


async def hurry(b: Bench) -> None:
    """Appends come so fast that they are held from now on."""
    for number in range(2 * ENOUGH):
        b.open(f"early-{number}").put(b"1")
        await turns()
    await asyncio.sleep(2 * HOLD_S)
    b.connection.appends.clear()


@virtual_time
async def test_appends_that_come_slowly_do_not_wait() -> None:
    """Nothing is to be had by it: who waited would wait for the time to be over."""
    b = await bench()
    for number in range(3 * ENOUGH):
        b.open(f"job-{number}").put(b"1")
        await turns()
        assert len(b.connection.appends) == number + 1
        await asyncio.sleep(1.5 * HOLD_S / ENOUGH)


@virtual_time
async def test_appends_that_come_fast_leave_by_the_handful() -> None:
    """ENOUGH at a time; and where no more come, those that wait leave all the same."""
    b = await bench()
    await hurry(b)
    for number in range(ENOUGH):
        assert b.connection.appends == []
        b.open(f"job-{number}").put(b"1")
        await turns()
    assert [append.keys[1] for append in b.connection.appends] == [
        f"dw:{{job-{number}}}:log" for number in range(ENOUGH)
    ]
    b.connection.appends.clear()
    b.open("last").put(b"1")
    await turns()
    assert b.connection.appends == []
    await asyncio.sleep(2 * HOLD_S)
    assert [append.keys[1] for append in b.connection.appends] == ["dw:{last}:log"]


@virtual_time
async def test_after_a_silence_an_append_does_not_wait_long() -> None:
    """Few writes after the rush is over, each leaves at once again."""
    b = await bench()
    await hurry(b)
    for number in range(3):
        b.open(f"slow-{number}").put(b"1")
        await asyncio.sleep(1.0)
    b.connection.appends.clear()
    b.open("next").put(b"1")
    await turns()
    assert len(b.connection.appends) == 1


@virtual_time
async def test_a_writer_that_is_closed_while_it_waits_says_nothing() -> None:
    """Its job was given up."""
    b = await bench()
    await hurry(b)
    other = b.open("other")
    other.put(b"1")
    await turns()
    b.flusher.close_writer(other)
    await asyncio.sleep(2 * HOLD_S)
    assert b.connection.appends == []


@virtual_time
async def test_the_appends_of_one_turn_leave_in_one_write() -> None:
    """Whoever they belong to."""
    b = await bench()
    others = [b.open(f"job-{n}") for n in range(5)]
    writes = b.connection.writes
    for writer in (b.writer, *others):
        writer.put(b"x")
        writer.put(b"y")
    await settle()
    assert len(b.connection.appends) == 6
    assert b.connection.writes == writes + 1


@virtual_time
async def test_deltas_are_numbered_without_a_hole() -> None:
    """Across batches and other events."""
    b = await bench(top=2)
    b.writer.put_deltas([b'{"n":3}', b'{"n":4}'], 1_000.5, Fold())
    b.writer.put(b"five")
    b.writer.put_deltas([b'{"n":6}'], 1_001.5, Fold())
    await settle()
    append = b.under_way
    deltas = [decode(append.events[i]) for i in (0, 1, 3)]
    for number, delta in zip((3, 4, 6), deltas, strict=True):
        assert isinstance(delta, Delta)
        assert (delta.sequence_number, bytes(delta.chunk)) == (number, b'{"n":%d}' % number)
        assert (delta.job_id, delta.attempt) == ("job", 3)


@virtual_time
async def test_fields_leave_with_the_next_append_and_until_it_is_acknowledged() -> None:
    """Setting one again is harmless, losing one is not."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    first = b.under_way
    b.writer.note("first_delta_at", 12.5)
    b.writer.put(b"2")
    first.accept()
    await settle()
    assert first.fields == {}
    assert b.connection.appends[0].fields == {"first_delta_at": "12.5"}
    b.lose()
    await b.connect()
    again = b.under_way
    assert again.fields == {"first_delta_at": "12.5"}
    again.accept()
    b.writer.put(b"3")
    await settle()
    assert b.under_way.fields == {}


@virtual_time
async def test_the_terminal_event_leaves_with_status_and_retention() -> None:
    """And `end` answers when Redis has."""
    b = await bench()
    ending = asyncio.create_task(b.writer.end(b"2", status="completed", retention_s=77.4))
    b.writer.put(b"1")
    await settle()
    append = b.under_way
    assert (append.terminal, append.ttl_s, append.events) == ("completed", 77, [b"1", b"2"])
    assert set(append.fields) == {"finished_at"}
    assert not ending.done()
    assert b.writer.is_ending
    append.accept()
    assert await ending == "OK"


@virtual_time
async def test_the_terminal_event_waits_for_the_append_under_way() -> None:
    """Which knows nothing of it."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    first = b.under_way
    ending = asyncio.create_task(b.writer.end(b"2", status="failed", retention_s=5))
    await settle()
    assert b.connection.appends == []
    first.accept()
    await settle()
    assert not ending.done()
    second = b.under_way
    assert (first.terminal, second.terminal, second.events) == ("", "failed", [b"2"])
    second.accept()
    assert await ending == "OK"


@virtual_time
async def test_a_terminal_event_leaves_though_nobody_waits_for_it_any_more() -> None:
    """Also where its turn comes, after another append, just as its writer is closed."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    first = b.under_way
    ending = asyncio.create_task(b.writer.end(b"2", status="completed", retention_s=5))
    await settle()
    first.accept()
    ending.cancel()
    b.flusher.close_writer(b.writer)
    await settle()
    assert (b.under_way.terminal, ending.cancelled()) == ("completed", True)


@virtual_time
async def test_cancelled_gives_the_terminal_event_back() -> None:
    """The deltas that were refused along with it stay, and `cancelled` takes its number."""
    b = await bench()
    ending = asyncio.create_task(b.writer.end(b"2", status="completed", retention_s=5))
    b.writer.put(b"1")
    await settle()
    b.under_way.refuse("CANCELLED")
    assert await ending == "CANCELLED"
    assert b.refusals == []
    assert b.writer.next_number == 2
    ending = asyncio.create_task(b.writer.end(b"two", status="cancelled", retention_s=5))
    await settle()
    append = b.under_way
    assert (append.first, append.events, append.terminal) == (1, [b"1", b"two"], "cancelled")
    append.accept("CANCELLING")
    assert await ending == "CANCELLING"
    assert b.writer.pending_bytes == 0


@virtual_time
async def test_a_cancel_key_met_by_an_append_is_reported() -> None:
    """The append itself was taken."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    b.under_way.accept("CANCELLING")
    assert b.cancels == 1
    b.writer.put(b"2")
    await settle()
    assert b.under_way.first == 2


@pytest.mark.parametrize("code", ["STALE", "ENDED"])
def test_a_refusal_is_reported_once_and_nothing_more_is_sent(code: AppendCode) -> None:
    """What was to be written is of no use any more."""

    @virtual_time
    async def test() -> None:
        b = await bench()
        b.writer.put(b"1")
        await settle()
        append = b.under_way
        b.writer.put(b"2")
        append.refuse(code)
        await settle()
        assert b.refusals == [code]
        assert b.connection.appends == []
        assert b.writer.pending_bytes == 0

    test()


@pytest.mark.parametrize("code", ["STALE", "ENDED"])
def test_a_refused_terminal_event_stays_refused(code: AppendCode) -> None:
    """`end` answers with the code, and does not wait."""

    @virtual_time
    async def test() -> None:
        b = await bench()
        ending = asyncio.create_task(b.writer.end(b"1", status="completed", retention_s=5))
        await settle()
        b.under_way.refuse(code)
        assert await ending == code
        assert b.refusals == [code]

    test()


@virtual_time
async def test_a_lost_connection_has_everything_sent_again() -> None:
    """From the first event that was not acknowledged; the script skips what it has."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    b.writer.put(b"2")
    b.lose()
    b.writer.put(b"3")
    await settle()
    await b.connect()
    append = b.under_way
    assert (append.first, append.events) == (1, [b"1", b"2", b"3"])


@virtual_time
async def test_without_a_connection_events_wait() -> None:
    """And leave with the next one."""
    b = Bench()
    b.writer.put(b"1")
    ending = asyncio.create_task(b.writer.end(b"2", status="completed", retention_s=5))
    await settle()
    await b.connect()
    b.under_way.accept()
    assert await ending == "OK"


@virtual_time
async def test_a_silent_writer_sends_nothing_on_a_new_connection() -> None:
    """It has nothing to say."""
    b = await bench()
    b.lose()
    await b.connect()
    assert b.connection.appends == []


@virtual_time
async def test_a_connection_that_dies_in_the_same_turn_of_the_loop_loses_nothing() -> None:
    """Between `connection_lost` and RedisLink's waking lies a turn of the loop, in which events may come.

    A worker with many streams always has events in that turn.
    """
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    b = await bench()
    b.connection.is_open = False
    b.writer.put(b"1")
    await settle()
    b.lose()
    await b.connect()
    assert [append.events for append in b.connection.appends] == [[b"1"]]
    assert failures == []


@virtual_time
async def test_a_renewal_on_a_connection_that_has_just_died_does_nothing() -> None:
    """As without a connection: the next one will do."""
    b = await bench()
    b.connection.is_open = False
    b.flusher.renew("job", ("owner", 1, 5_000, 60), lambda _: None)


@virtual_time
async def test_an_error_reply_is_tried_again_later() -> None:
    """Out of memory, read-only, loading: it will pass."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    b.under_way.answer(hiredis.ReplyError("OOM command not allowed"))
    await asyncio.sleep(RETRY_S / 2)
    assert b.connection.appends == []
    await asyncio.sleep(RETRY_S)
    append = b.under_way
    assert (append.first, append.events) == (1, [b"1"])
    append.accept()
    assert b.refusals == []


@virtual_time
async def test_error_replies_are_not_tried_again_for_a_writer_that_is_closed() -> None:
    """Nobody waits for it."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    append = b.under_way
    append.answer(hiredis.ReplyError("OOM"))
    b.flusher.close_writer(b.writer)
    await asyncio.sleep(10 * RETRY_S)
    assert b.connection.appends == []


@virtual_time
async def test_a_server_without_our_scripts_gets_them_with_a_new_connection() -> None:
    """SCRIPT FLUSH, or a replica that has become the primary."""
    b = await bench()
    b.writer.put(b"1")
    await settle()
    b.under_way.answer(hiredis.ReplyError("NOSCRIPT No matching script."))
    assert b.connection.is_aborted


@virtual_time
async def test_a_renewal_that_meets_a_server_without_our_scripts_heals_it_too() -> None:
    """A job that waits for its first delta appends nothing for two minutes."""
    b = await bench()
    answers: list[Reply] = []
    b.flusher.renew("job", ("owner", 1, 5_000, 60), answers.append)
    [command] = b.connection.commands
    assert command[1] == RENEW.sha.encode()
    [answer] = b.connection.answers
    answer(hiredis.ReplyError("NOSCRIPT No matching script."))
    assert b.connection.is_aborted
    assert answers == []


@virtual_time
async def test_the_answer_to_a_renewal_is_passed_on_unless_it_is_none() -> None:
    """An error, or a connection that was lost, says nothing about the lease: the next one will."""
    b = await bench()
    answers: list[Reply] = []
    for _ in range(3):
        b.flusher.renew("job", ("owner", 1, 5_000, 60), answers.append)
    first, second, third = b.connection.answers
    first([b"OK", b""])
    second(RedisUnavailableError("lost"))
    third(hiredis.ReplyError("OOM"))
    assert answers == [[b"OK", b""]]
    assert not b.connection.is_aborted


@virtual_time
async def test_the_buffer_is_full_at_its_bound() -> None:
    """Redis that takes nothing must not cost all memory; acknowledged events free theirs."""
    b = await bench()
    event = b"x" * (MAX_PENDING_BYTES // 4)
    for _ in range(4):
        b.writer.put(event)
    await settle()
    assert not b.writer.is_full
    b.writer.put_deltas([b"{}"], 1.0, Fold())
    assert b.writer.is_full
    b.under_way.accept()
    assert not b.writer.is_full


@virtual_time
async def test_a_full_buffer_waits_for_room() -> None:
    """An upstream that is faster than a round trip waits; it is no outage."""
    b = await bench()
    b.writer.put(b"x")
    await settle()
    b.writer.put(b"x" * (MAX_PENDING_BYTES + 1))
    waiting = asyncio.create_task(b.writer.room())
    await asyncio.sleep(STALL_TIMEOUT_S / 2)
    b.under_way.accept()
    await settle()
    assert not waiting.done()  # what fills it is under way by now
    b.under_way.accept()
    assert await waiting is True


@virtual_time
async def test_a_redis_that_takes_nothing_has_its_time() -> None:
    """And not for ever."""
    b = await bench()
    b.lose()
    b.writer.put(b"x" * (MAX_PENDING_BYTES + 1))
    began = asyncio.get_running_loop().time()
    assert await b.writer.room() is False
    assert asyncio.get_running_loop().time() - began == pytest.approx(STALL_TIMEOUT_S)


@virtual_time
async def test_an_answer_to_a_closed_writer_does_no_harm() -> None:
    """Its job was given up while the append was under way."""
    b = await bench()
    for code in ("OK", "CANCELLING", "STALE"):
        writer = b.open("other")
        writer.put(b"1")
        await settle()
        append = b.under_way
        b.flusher.close_writer(writer)
        append.refuse(code) if code == "STALE" else append.accept(code)
        await settle()
        assert b.connection.appends == []


@pytest.mark.parametrize(
    "code",
    [
        "OK",
        "STALE",
        "CANCELLED",
    ],
)
def test_an_answer_to_an_end_that_nobody_waits_for_does_no_harm(code: str) -> None:
    """The task was cancelled in `end`; an exception here would end every job's connection."""

    @virtual_time
    async def test() -> None:
        b = await bench()
        ending = asyncio.create_task(b.writer.end(b"1", status="completed", retention_s=5))
        await settle()
        ending.cancel()
        await settle()
        b.flusher.close_writer(b.writer)
        append = b.under_way
        append.accept() if code == "OK" else append.refuse(code)

    test()


class ModelLog:
    """What append.lua does, for one job that nobody cancels or takes over."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.status = "in_progress"

    def apply(self, append: Append) -> list[Any]:
        top, last = len(self.events), append.first + len(append.events) - 1
        if last <= top:
            return [b"OK", top, 0]
        if self.status != "in_progress":
            return [b"ENDED", top, 0]
        if append.first > top + 1:
            return [b"GAP", top, 0]
        self.events += append.events[top + 1 - append.first :]
        self.status = append.terminal or self.status
        return [b"OK", last, 0]


steps = st.lists(
    st.sampled_from(
        ["put", "put", "deltas", "answer", "answer", "lose before", "lose after", "error", "turn"]
    ),
    max_size=60,
)


@given(steps, st.integers(0, 60))
def test_whatever_happens_to_the_connection_nothing_is_lost_or_doubled(plan: list[str], ends_at: int) -> None:
    """Appends that were executed or not, answered or not, in any order with new events and the end."""

    async def main() -> None:
        b = await bench()
        log, expected = ModelLog(), []
        ending: asyncio.Task[AppendCode] | None = None
        for i, step in enumerate([*plan, "turn"]):
            if ending is None and i >= min(ends_at, len(plan)):
                expected.append(b"end")
                ending = asyncio.create_task(b.writer.end(b"end", status="completed", retention_s=5))
                await asyncio.sleep(0)
            elif step == "put" and ending is None:
                expected.append(b"event %d" % i)
                b.writer.put(expected[-1])
            elif step == "deltas" and ending is None:
                expected += [b.writer._encoder.encode(b.writer.next_number + n, 1.0, b"{}") for n in range(2)]
                b.writer.put_deltas([b"{}", b"{}"], 1.0, Fold())
            elif step == "answer" and b.connection.appends:
                append = b.under_way
                append.answer(log.apply(append))
            elif step == "error" and b.connection.appends:
                b.under_way.answer(hiredis.ReplyError("OOM"))
                await asyncio.sleep(2 * RETRY_S)
            elif step.startswith("lose"):
                if step == "lose after" and b.connection.appends:
                    log.apply(b.connection.appends[0])
                b.lose()
                await b.connect()
            else:
                await settle()
            assert len(b.connection.appends) <= 1
        for _ in range(5):
            await settle()
            if b.connection.appends:
                append = b.under_way
                append.answer(log.apply(append))
        assert ending is not None
        assert await ending == "OK"
        assert log.events == expected
        assert (log.status, b.refusals, b.writer.pending_bytes) == ("completed", [], 0)

    run(main())
