"""What the sets across jobs promise: where a sweeper looks (PROTOCOL.md §3.1)."""

import asyncio
from functools import partial
from typing import Any

import pytest

from deltawire.errors import RedisRefusedError, RedisUnavailableError
from deltawire.index import Index
from deltawire.keys import INDEX_TTL_S, Keys
from deltawire.scripts import Scripts
from tests.support.job_logs import OpenedLog, open_job_log, ttls
from tests.support.log_calls import submit


@pytest.fixture
def index(job_log: OpenedLog) -> Index:
    return job_log.index


async def test_queued_jobs_come_in_the_order_of_their_deadlines(index: Index) -> None:
    """Those that are overdue alone, and never more than asked for."""
    for job_id, deadline in (("c", 30.5), ("a", 10.5), ("b", 20.5)):
        await index.will_queue(job_id, deadline)
    assert await index.queued(9) == ["a", "b", "c"]
    assert await index.queued(2) == ["a", "b"]
    assert await index.overdue(20.5, 9) == ["a", "b"]
    assert await index.overdue(99, 1) == ["a"]
    assert await index.overdue(1, 9) == []
    await index.left_queue(["a", "never was"])
    await index.left_queue([])
    assert await index.queued(9) == ["b", "c"]


async def test_the_first_deadline_stays_until_it_is_corrected(index: Index) -> None:
    """A repeated submit does not move it; a correction does, and brings nothing back."""
    await index.will_queue("a", 10)
    await index.will_queue("a", 99)
    assert await index.overdue(10, 9) == ["a"]
    await index.waits_until("a", 50)
    await index.waits_until("gone", 50)
    assert await index.overdue(49, 9) == []
    assert await index.queued(9) == ["a"]


async def test_one_of_many_may_send(index: Index) -> None:
    """Of all who ask within the pause; each job for itself."""
    answers = await asyncio.gather(*(index.may_send("job", 60) for _ in range(10)))
    assert answers.count(True) == 1
    assert await index.may_send("other", 60)


async def test_parked_jobs_come_when_they_are_due(index: Index) -> None:
    """Earliest first, never more than asked for; parked again, a job is due later."""
    for job_id, due in (("c", 30.5), ("a", 10.5), ("b", 20.5)):
        await index.will_park(job_id, due)
    assert await index.due(20.5, 9) == ["a", "b"]
    assert await index.due(99, 1) == ["a"]
    await index.will_park("a", 40)
    assert await index.due(39, 9) == ["b", "c"]
    await index.left_parking(["b", "never was"])
    await index.left_parking([])
    assert await index.due(99, 9) == ["c", "a"]


async def test_the_jobs_of_an_owner(index: Index) -> None:
    """Each owner has its own set."""
    await index.will_run("w1", ["a", "b"])
    await index.will_run("w1", [])
    await index.will_run("w2", ["c"])
    await index.has_run("w1", ["a", "never was"])
    await index.has_run("w1", [])
    assert (await index.jobs_of("w1"), await index.jobs_of("w2")) == (["b"], ["c"])
    assert await index.jobs_of("nobody") == []


async def test_an_owner_with_ten_thousand_jobs_can_say_so(index: Index) -> None:
    """A script's stack is smaller than that."""
    await index.will_run("w1", [f"job-{n}" for n in range(10_000)])
    assert len(await index.jobs_of("w1")) == 10_000


async def test_an_owner_is_lost_when_its_lease_has_run_out(index: Index) -> None:
    """Until it is heard of again, or forgotten."""
    await index.lives("w1", 60)
    await index.lives("w2", 0)
    assert await index.lost_owners() == ["w2"]
    await index.lives("w2", 60)
    assert await index.lost_owners() == []
    await index.lives("w1", 0)
    await index.forget("w1")
    assert await index.lost_owners() == []


async def test_every_key_expires(job_log: OpenedLog) -> None:
    """Also of sets that are used by one command only."""
    index = job_log.index
    await submit(job_log)
    await index.will_run("w1", ["a"])
    await index.lives("w1", 5)
    await index.may_send("job", 60)
    await index.will_park("job", 60)
    remaining = await ttls(job_log)
    assert {"dw:queued", "dw:parked", "dw:owners", "dw:owner:w1:jobs", "dw:{job}:sent"} <= set(remaining)
    assert all(0 < ttl <= INDEX_TTL_S for ttl in remaining.values())


class Wire:
    """Answers nothing before it is told to."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.replies: list[asyncio.Future[Any]] = []

    async def execute(self, *args: Any) -> Any:
        self.sent.append(args[-1])
        self.replies.append(asyncio.get_running_loop().create_future())
        return await self.replies[-1]


async def settle() -> None:
    """Lets all go on until they wait for an answer: by turns of the loop, not by the clock."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("is_sharded", "at_once"), [(False, ["the entry", "the record"]), (True, ["the entry"])]
)
async def test_an_entry_goes_before_the_record(is_sharded: bool, at_once: list[str]) -> None:
    """At once where both go to one server; a cluster's others could be faster."""
    wire = Wire()
    index = Index(Scripts(wire), Keys(publish="SPUBLISH" if is_sharded else "PUBLISH"))
    call = asyncio.create_task(
        index.entered(partial(index.will_queue, "the entry", 1), wire.execute("EVALSHA", "the record"))
    )
    await settle()
    assert wire.sent == at_once
    wire.replies[0].set_result([])
    await settle()
    assert wire.sent == ["the entry", "the record"]
    wire.replies[1].set_result("answer")
    assert await call == "answer"


@pytest.mark.parametrize("is_sharded", [False, True])
async def test_a_record_that_could_not_be_written_is_said(is_sharded: bool) -> None:
    """Also where the entry was the one that failed first."""

    async def fail(*_: Any) -> None:
        raise RedisUnavailableError("away")

    index = Index(Scripts(Wire()), Keys(publish="SPUBLISH" if is_sharded else "PUBLISH"))
    with pytest.raises(RedisUnavailableError):
        await index.entered(fail, fail())


@pytest.mark.parametrize("refusals", [1, 2])
async def test_an_entry_that_was_refused_alone_is_made_after_its_record(refusals: int) -> None:
    """Memory that becomes free between two commands lets the second one in."""
    tries = []

    async def enter() -> None:
        tries.append(1)
        if len(tries) <= refusals:
            raise RedisRefusedError("OOM")

    async def answer() -> str:
        return "answer"

    entered = Index(Scripts(Wire()), Keys()).entered(enter, answer())
    if refusals == 1:
        assert await entered == "answer"
    else:
        with pytest.raises(RedisRefusedError):
            await entered
    assert len(tries) == 2


# Real servers only.


async def test_a_worker_can_take_jobs_at_maxmemory(redis_url: str) -> None:
    """And a sweeper look after them: jobs must end for memory to become free."""
    async with open_job_log("server", redis_url) as log:
        await log.index.will_run("w0", ["a"])
        await log.index.lives("w0", 0)
        await log.index.may_send("a", 60)
        await log.client.config_set("maxmemory", "1")
        try:
            await log.index.will_run("w1", ["a"])
            await log.index.lives("w1", 60)
            assert await log.index.may_send("b", 60)
            assert not await log.index.may_send("b", 60)
            assert await log.index.lost_owners() == ["w0"]
            await log.index.has_run("w0", ["a"])
            await log.index.forget("w0")
        finally:
            await log.client.config_set("maxmemory", "0")
        assert await log.index.jobs_of("w1") == ["a"]
