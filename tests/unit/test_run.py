"""A run's deadlines and interruptions, on virtual time."""

import asyncio
import time

import pytest

from deltawire.events import Timings
from deltawire.keys import Keys
from deltawire.options import Options
from deltawire.record import CancelRequest, Record
from deltawire_worker.flusher import Flusher
from deltawire_worker.run import CancelWanted, Cause, DeadlinePassed, Refused, Run
from tests.support.virtual_time import virtual_time

CANCEL = CancelWanted(CancelRequest("bored", 1.0), 2.0)
STALE = Refused("STALE")


def make_run(
    *, first_delta_timeout_s: float = 10, idle_timeout_s: float = 5, timeout_s: float = 60, **times: float
) -> Run:
    """A run that writes nowhere."""
    options = Options(
        first_delta_timeout_s=first_delta_timeout_s, idle_timeout_s=idle_timeout_s, timeout_s=timeout_s
    )
    record = Record(
        status="in_progress",
        attempt=1,
        created_at=times.get("created_at", 1_000.0),
        tenant="default",
        options=options,
        started_at=times.get("started_at"),
        attempt_began_at=times.get("attempt_began_at"),
    )
    run = Run("job", 1, record)
    flusher = Flusher("redis://127.0.0.1:1/0", Keys())
    run.writer = flusher.open(
        "job",
        record=record,
        owner="w",
        top=0,
        on_cancel=lambda: None,
        on_refused=lambda code: run.abort(Refused(code)),
    )
    return run


def now() -> float:
    return asyncio.get_running_loop().time()


async def stream(run: Run, *deltas_at: float) -> float:
    """Sees deltas at these times, then nothing for a day; when it was interrupted."""
    async with run:
        for at in deltas_at:
            await asyncio.sleep(at - now())
            run.saw_delta(time.time())
        await asyncio.sleep(86_400)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    return now()


@virtual_time
async def test_the_first_delta_has_a_deadline() -> None:
    """Counted from the claim, not from when streaming began."""
    run = make_run(first_delta_timeout_s=10)
    await asyncio.sleep(4)
    assert await stream(run) == pytest.approx(10)
    assert run.cause == DeadlinePassed("first_delta_timeout")


@virtual_time
async def test_the_idle_deadline_counts_from_the_last_delta() -> None:
    """It is set again by every delta, and only by deltas."""
    run = make_run(idle_timeout_s=5)
    assert await stream(run, 9.0, 13.0, 17.5, 22.0) == pytest.approx(27)
    assert run.cause == DeadlinePassed("idle_timeout")


@virtual_time
async def test_the_total_deadline_beats_them_both() -> None:
    """However lively the stream is."""
    run = make_run(timeout_s=20, idle_timeout_s=5)
    assert await stream(run, *(float(at) for at in range(1, 20))) == pytest.approx(20)
    assert run.cause == DeadlinePassed("total_timeout")


@virtual_time
async def test_the_total_deadline_holds_before_the_first_delta_too() -> None:
    """Where it is the shorter one."""
    run = make_run(timeout_s=3, first_delta_timeout_s=10)
    assert await stream(run) == pytest.approx(3)
    assert run.cause == DeadlinePassed("total_timeout")


@virtual_time
async def test_an_idle_deadline_shorter_than_the_first_ones_is_armed_by_the_first_delta() -> None:
    """The timer that was set for the first delta does not hide it."""
    run = make_run(first_delta_timeout_s=3_600, idle_timeout_s=1, timeout_s=7_200)
    assert await stream(run, 0.5) == pytest.approx(1.5)
    assert run.cause == DeadlinePassed("idle_timeout")


@virtual_time
async def test_while_the_upstream_is_not_asked_its_clock_stands() -> None:
    """It has its whole time whenever it is asked again; the attempt's own goes on."""
    run = make_run(first_delta_timeout_s=10, timeout_s=60)
    async with run:
        await asyncio.sleep(9)
        for _ in range(2):
            with run.not_asking():
                await asyncio.sleep(15)
            await asyncio.sleep(9)
        await asyncio.sleep(86_400)
    assert now() == pytest.approx(58)
    assert run.cause == DeadlinePassed("first_delta_timeout")

    late = make_run(first_delta_timeout_s=10, timeout_s=20)
    async with late:
        with late.not_asking():
            await asyncio.sleep(86_400)
    assert now() == pytest.approx(78)
    assert late.cause == DeadlinePassed("total_timeout")


@virtual_time
async def test_an_upstream_that_has_said_all_has_five_seconds_to_end() -> None:
    """Or its idle time-out, where that is shorter."""
    for idle_timeout_s, end_s in ((60, 7), (3, 5)):
        began = now()
        run = make_run(idle_timeout_s=idle_timeout_s, timeout_s=600)
        async with run:
            await asyncio.sleep(2)
            run.saw_delta(time.time())
            run.saw_all()
            await asyncio.sleep(86_400)
        assert now() - began == pytest.approx(end_s)
        assert run.cause == DeadlinePassed("idle_timeout")


@virtual_time
async def test_an_attempt_that_was_parked_has_the_rest_of_its_time() -> None:
    """Its clock went on; that of the first delta did not."""
    run = make_run(timeout_s=60, first_delta_timeout_s=50, attempt_began_at=time.time() - 20)
    assert run.left_s == pytest.approx(40, abs=1)
    assert run.began_at == pytest.approx(time.time() - 20, abs=1)
    async with run:
        await asyncio.sleep(86_400)
    assert now() == pytest.approx(40, abs=1)
    assert run.cause == DeadlinePassed("total_timeout")


@virtual_time
async def test_a_long_stream_within_its_deadlines_is_left_alone() -> None:
    """An hour of deltas; afterwards no timer is left to interrupt anybody."""
    run = make_run(idle_timeout_s=2, timeout_s=7_200)
    async with run:
        for _ in range(3_600):
            await asyncio.sleep(1)
            run.saw_delta(time.time())
    await asyncio.sleep(86_400)
    assert run.cause is None


@virtual_time
async def test_a_deadline_that_has_passed_before_streaming_ends_it_at_the_first_await() -> None:
    """The claim, or a Redis that was slow, may have eaten all of it."""
    run = make_run(first_delta_timeout_s=1)
    await asyncio.sleep(2)
    assert await stream(run) == pytest.approx(2)
    assert run.cause == DeadlinePassed("first_delta_timeout")


@pytest.mark.parametrize("cause", [CANCEL, STALE, DeadlinePassed("idle_timeout")])
def test_an_abort_interrupts_the_stream(cause: Cause) -> None:
    """At once, and the interruption ends with the stream: what follows runs undisturbed."""

    @virtual_time
    async def test() -> None:
        run = make_run()
        asyncio.get_running_loop().call_later(3, run.abort, cause)
        assert await stream(run) == pytest.approx(3)
        assert run.cause == cause
        await asyncio.sleep(1)

    test()


@virtual_time
async def test_an_abort_before_streaming_ends_it_at_its_first_await() -> None:
    """A cancel key that is found between claim and stream opens no upstream for longer than a step."""
    run = make_run()
    run.abort(CANCEL)
    assert await stream(run) == 0
    assert run.cause == CANCEL


@virtual_time
async def test_an_abort_after_streaming_interrupts_nobody() -> None:
    """The terminal event is being written; only the cause is noted."""
    run = make_run()
    async with run:
        await asyncio.sleep(1)
    run.abort(CANCEL)
    await asyncio.sleep(1)
    assert run.cause == CANCEL


@virtual_time
async def test_the_first_cause_stays() -> None:
    """Whoever comes second changes nothing and does not interrupt again."""
    run = make_run()
    loop = asyncio.get_running_loop()
    for cause in (CANCEL, STALE, DeadlinePassed("idle_timeout")):
        loop.call_later(3, run.abort, cause)
    assert await stream(run) == pytest.approx(3)
    assert run.cause == CANCEL


@virtual_time
async def test_a_foreign_cancellation_goes_through() -> None:
    """Ours is absorbed, anybody else's is not ours to absorb."""
    run = make_run()
    task = asyncio.create_task(stream(run))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.cause is None


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_foreign_cancellation_goes_through_also_beside_our_own(ours_first: bool) -> None:
    """Two cancellations in one turn of the loop, in both orders: uncancel counts."""

    @virtual_time
    async def test() -> None:
        run = make_run()
        task = asyncio.create_task(stream(run))
        await asyncio.sleep(1)
        if ours_first:
            run.abort(CANCEL)
        task.cancel()
        run.abort(CANCEL)
        with pytest.raises(asyncio.CancelledError):
            await task

    test()


@virtual_time
async def test_a_time_out_around_a_run_is_still_that_time_out() -> None:
    """`asyncio.timeout` counts cancellations; a run inside it leaves the count as it was."""
    run = make_run()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await stream(run)


@virtual_time
async def test_an_error_of_the_stream_goes_through_an_abort() -> None:
    """Only the interruption is absorbed, not what else went wrong."""
    run = make_run()
    with pytest.raises(ValueError, match="odd"):
        async with run:
            raise ValueError("odd")


@virtual_time
async def test_an_abort_from_within_the_stream_ends_with_it() -> None:
    """A full buffer or a late timer is noticed by the streaming task itself, maybe just before its end."""
    run = make_run()
    async with run:
        run.abort(Refused("UNREACHABLE"))
    await asyncio.sleep(1)  # the terminal event's append


@virtual_time
async def test_a_deadline_noticed_by_the_first_delta_ends_with_the_stream() -> None:
    """The loop was busy past total_timeout; the delta that comes then is the last batch of its stream."""
    run = make_run(timeout_s=1)
    async with run:
        run._started -= 2  # the timer has not had its turn yet
        run.saw_delta(time.time())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(1)


@virtual_time
async def test_an_abort_within_the_stream_interrupts_its_next_await() -> None:
    """Where there is one."""
    run = make_run()
    async with run:
        run.abort(Refused("UNREACHABLE"))
        await asyncio.sleep(86_400)
    assert now() == 0
    await asyncio.sleep(1)


@virtual_time
async def test_durations_count_from_the_record_and_are_never_negative() -> None:
    """Clocks of two machines differ."""
    run = make_run(created_at=1_000.0, started_at=999.0)
    assert run.timings(1_002.0) == Timings(queued_s=0.0, first_delta_s=None, total_s=2.0)
    run.saw_delta(1_001.5)
    run.saw_delta(1_001.9)
    assert run.timings(1_002.0) == Timings(queued_s=0.0, first_delta_s=1.5, total_s=2.0)
    assert make_run().timings(900.0) == Timings(queued_s=None, first_delta_s=None, total_s=0.0)
    await asyncio.sleep(0)
    if run._timer is not None:
        run._timer.cancel()
