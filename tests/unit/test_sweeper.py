"""The sweeper's decisions, on fakeredis and virtual time: what it believes, and when."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

import msgspec
import pytest
from fakeredis import FakeAsyncRedis

from deltawire.codec import decode
from deltawire.errors import RedisUnavailableError, WireError
from deltawire.events import Cancelled, Failed
from deltawire.keys import LEASE_S, Keys
from deltawire.metrics import new_registry
from deltawire.options import Options
from deltawire.redis_connection import Reply
from deltawire.sweeper import LOST_MESSAGE_INTERVAL_S, PARKED_SLACK_S, RESEND_PAUSE_S, SLOW_S, Sweeper
from deltawire.tenants import TenantLimits
from deltawire_worker.lease import Presence
from deltawire_worker.run import Run
from tests.support import sample_events as sample
from tests.support.job_logs import FakeExecutor, OpenedLog
from tests.support.log_calls import BODY
from tests.support.sample_events import line
from tests.support.virtual_time import run

VICTIM = "victim"


class FakeQueue:
    """A broker with a queue that a test fills and empties."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.waiting = 0
        self.is_away = False
        self._lock = threading.Lock()

    def send(self, job_id: str, **_: Any) -> None:
        if self.is_away:
            raise WireError("queue_unavailable", "away")
        with self._lock:
            self.sent.append(job_id)

    def depth(self) -> int:
        if self.is_away:
            raise WireError("queue_unavailable", "away")
        return self.waiting


class SlowExecutor(FakeExecutor):
    """Takes its time, in virtual seconds; or fails; or lets something happen before a command."""

    def __init__(self, client: Any) -> None:  # redis-py's
        super().__init__(client)
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.unreachable = ""  # keys with this in their names
        self.calls = 0

    async def execute(self, *args: str | bytes | float) -> Reply:
        self.calls += 1
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        if self.unreachable and any(self.unreachable in str(arg) for arg in args):
            raise RedisUnavailableError("no answer in time")
        return await super().execute(*args)


class World:
    """One Redis, one broker, a sweeper, and what a worker that may die does."""

    def __init__(self, client: FakeAsyncRedis) -> None:
        self.client = client
        self.executor = SlowExecutor(FakeAsyncRedis(connection_pool=client.connection_pool))
        self.log = OpenedLog(self.executor, client, Keys())
        self.queue = FakeQueue()
        self.sweeper = self.another("sweeper")

    def another(self, owner: str) -> Sweeper:
        return Sweeper(self.log, self.queue, owner=owner)

    async def queued(self, job_id: str = "job", *, age_s: float = 0, **options: Any) -> None:
        await self.log.submit(
            job_id, request=BODY, options=Options(**options), digest="d", created_at=time.time() - age_s
        )

    async def lost(
        self, job_id: str = "job", *, deltas: int = 1, owner: str = VICTIM, **options: Any
    ) -> None:
        """A job whose worker has died: its lease has run out."""
        await self.log.index.lives(owner, 0)
        await self.log.index.will_run(owner, (job_id,))
        await self.queued(job_id, **options)
        assert (await self.log.claim(job_id, owner=owner, lease_s=0)).code == "CLAIMED"
        await self.log.index.left_queue((job_id,))
        events = [line(sample.delta(n + 2, f"d{n} ", job_id=job_id)) for n in range(deltas)]
        fields = ("first_delta_at", time.time())
        if events:
            await self.log.append(job_id, attempt=1, owner=owner, first=2, events=events, fields=fields)

    async def renew(self, job_id: str = "job") -> None:
        """As renew.lua of a worker that lives does; the lease has run out again at once."""
        await asyncio.sleep(0)
        await self.client.hincrby(f"dw:{{{job_id}}}:meta", "lease_until", 1)

    async def status(self, job_id: str = "job") -> str:
        record = await self.log.record(job_id)
        return record.status if record else "unknown"

    async def last(self, job_id: str = "job") -> Any:
        return decode(await self.log.last(job_id) or b"")

    async def sweep_twice(self, sweeper: Sweeper | None = None) -> None:
        """Two looks, a lease apart, and what clocks are rounded by."""
        for pause_s in (LEASE_S + 0.001, 0):
            await (sweeper or self.sweeper).sweep()
            await asyncio.sleep(pause_s)


def in_a_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def main() -> None:
        async with FakeAsyncRedis(max_connections=1_000) as client:  # sweepers look at hundreds at once
            await test(World(client))

    def on_virtual_clock() -> None:
        run(main())

    on_virtual_clock.__name__, on_virtual_clock.__doc__ = test.__name__, test.__doc__
    return on_virtual_clock


# Lost workers.


@in_a_world
async def test_a_lost_job_ends_at_the_second_look(w: World) -> None:
    """A lease apart from the first; with the fold of its deltas, and the request erased."""
    await w.lost(deltas=3)
    await w.sweeper.sweep()
    await asyncio.sleep(LEASE_S - 0.1)
    await w.sweeper.sweep()
    assert await w.status() == "in_progress"
    await asyncio.sleep(0.1)
    await w.sweeper.sweep()
    last = await w.last()
    assert isinstance(last, Failed)
    assert (last.error.code, last.source, last.sequence_number) == ("worker_lost", "worker", 5)
    assert last.completion is not None
    assert last.completion["choices"][0]["message"]["content"] == "d0 d1 d2 "
    assert last.usage_source == "estimated"
    assert last.usage is not None
    assert last.usage["prompt_tokens"] > 0
    record = await w.log.record("job")
    assert record is not None
    assert record.request is None


@in_a_world
async def test_what_was_swept_is_counted(w: World) -> None:
    """Jobs that it has ended, by why; and how many wait."""
    registry = new_registry()
    registry.register(w.sweeper)

    def said(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"deltawire_{name}", labels)

    await w.lost()
    await w.queued("late", age_s=4_000, queue_timeout_s=60)
    await w.queued("waits")
    await w.sweep_twice()
    assert said("sweeper_endings_total", reason="worker_lost") == 1
    assert said("sweeper_endings_total", reason="queue_timeout") == 1
    assert said("jobs_queued") == 1
    assert said("jobs_resent_total") == 0


@in_a_world
async def test_a_renewal_between_the_looks_saves_the_job(w: World) -> None:
    """Whatever the sweeper saw before: it begins to look anew."""
    await w.lost()
    for _ in range(5):
        await w.sweeper.sweep()
        await asyncio.sleep(LEASE_S)
        await w.renew()
    await w.sweeper.sweep()
    assert await w.status() == "in_progress"


@in_a_world
async def test_a_slow_redis_makes_what_was_seen_worthless(w: World) -> None:
    """It may have kept the owner from renewing."""
    await w.lost()
    await w.sweeper.sweep()
    await asyncio.sleep(LEASE_S)
    w.executor.delay_s = SLOW_S + 0.1
    await w.sweeper.sweep()
    w.executor.delay_s = 0
    await w.sweeper.sweep()
    assert await w.status() == "in_progress"
    await w.sweep_twice()
    assert await w.status() == "failed"


@in_a_world
async def test_a_redis_that_fails_makes_what_was_seen_worthless(w: World) -> None:
    """And the sweeper goes on when it is back."""
    await w.lost()
    await w.sweeper.sweep()
    w.executor.error = RedisUnavailableError("away")
    keeping = asyncio.create_task(w.sweeper.keep())
    await asyncio.sleep(LEASE_S)
    w.executor.error = None
    await asyncio.sleep(LEASE_S - 0.5)
    assert await w.status() == "in_progress"
    await asyncio.sleep(4)
    assert await w.status() == "failed"
    keeping.cancel()


@in_a_world
async def test_many_sweepers_end_a_job_once(w: World) -> None:
    """At the same time, of several jobs: one terminal event each."""
    sweepers = [w.another(f"s{n}") for n in range(8)]
    for n in range(5):
        await w.lost(f"job{n}")
    for _ in range(3):
        await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
        await asyncio.sleep(LEASE_S)
    for n in range(5):
        lines = await w.log.read(f"job{n}", 0)
        assert [type(decode(text)).__name__ for text in lines] == ["Queued", "Delta", "Failed"]
    await w.sweeper.sweep()
    assert await w.log.index.jobs_of(VICTIM) == []
    await w.sweeper.sweep()
    assert await w.log.index.lost_owners() == []


@in_a_world
async def test_a_job_without_deltas_is_sent_again_once_by_many_sweepers(w: World) -> None:
    """The worker that gets it goes on with the next attempt; another message comes a minute later."""
    sweepers = [w.another(f"s{n}") for n in range(8)]
    await w.lost(deltas=0)
    for _ in range(4):
        await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
        await asyncio.sleep(LEASE_S)
    assert w.queue.sent == ["job"]
    assert await w.status() == "in_progress"
    assert 0 < await w.client.ttl("dw:{job}:sent") <= RESEND_PAUSE_S


@pytest.mark.parametrize(("restart", "ends"), [("always", False), ("never", True)])
def test_the_jobs_options_decide(restart: str, *, ends: bool) -> None:
    """As for a worker that claims it (PROTOCOL.md §2.4)."""

    @in_a_world
    async def test(w: World) -> None:
        await w.lost(restart=restart)
        await w.sweep_twice()
        assert (await w.status() == "failed") is ends
        assert (w.queue.sent == []) is ends

    test()


@in_a_world
async def test_the_last_attempt_is_not_sent_again(w: World) -> None:
    """`max_attempts` counts."""
    await w.lost(deltas=0, max_attempts=1)
    await w.sweep_twice()
    assert (await w.status(), w.queue.sent) == ("failed", [])


@in_a_world
async def test_a_lost_job_that_nobody_takes_ends_at_its_queue_time_out(w: World) -> None:
    """Its message was sent again, and there is no worker."""
    await w.lost(deltas=0, queue_timeout_s=0.001)
    await asyncio.to_thread(time.sleep, 0.01)
    await w.sweep_twice()
    assert (await w.last()).error.code == "worker_lost"


@in_a_world
async def test_a_lost_job_with_a_cancel_key_ends_as_cancelled(w: World) -> None:
    """With the reason that the key says."""
    await w.lost()
    await w.log.cancel("job", reason="r")
    await w.sweep_twice()
    last = await w.last()
    assert isinstance(last, Cancelled)
    assert last.cancel.reason == "r"


@in_a_world
async def test_a_lost_job_with_a_cancel_key_does_not_wait_for_another_worker(w: World) -> None:
    """It would start again, but for the key; there may be no worker."""
    await w.lost(deltas=0)
    await w.log.cancel("job", reason="r")
    await w.sweep_twice()
    assert isinstance(await w.last(), Cancelled)
    assert w.queue.sent == []


@in_a_world
async def test_a_zombie_cannot_write_after_the_claim(w: World) -> None:
    """A worker that wakes too late: neither events, nor an end, nor its lease."""
    await w.lost()
    await w.sweep_twice()
    lines = await w.log.read("job", 0)
    for end in ("", "completed"):
        event = line(sample.completed(3) if end else sample.delta(3))
        code, _ = await w.log.append(
            "job", attempt=1, owner=VICTIM, first=3, events=[event, event], terminal=end
        )
        assert code == "STALE"
    assert await w.log.read("job", 0) == lines


@in_a_world
async def test_a_claim_of_another_sweeper_is_respected(w: World) -> None:
    """It ends the job, or dies and its own lease runs out."""
    await w.lost()
    await w.sweeper.sweep()
    await asyncio.sleep(LEASE_S)
    other = await w.log.claim("job", owner="other", lease_s=60, take_over=1)
    assert other.code == "CLAIMED"
    await w.sweep_twice()
    assert await w.status() == "in_progress"


@in_a_world
async def test_a_sweeper_that_dies_before_the_end_is_succeeded(w: World) -> None:
    """The job is still among its first owner's, with a lease that runs out."""
    await w.lost()
    await w.log.claim("job", owner="dead sweeper", lease_s=0, take_over=1)
    await w.sweep_twice()
    last = await w.last()
    assert isinstance(last, Failed)
    assert last.attempt == 3


@in_a_world
async def test_a_job_that_another_sweeper_holds_is_not_forgotten(w: World) -> None:
    """That one may die before the end; nobody else knows of the job then."""
    await w.lost()
    await w.log.claim("job", owner="other sweeper", lease_s=60, take_over=1)
    await w.sweep_twice()
    await w.client.hset("dw:{job}:meta", "lease_until", 1)
    await w.sweep_twice()
    assert await w.status() == "failed"


@in_a_world
async def test_a_lost_server_of_a_cluster_keeps_nobody_from_the_others(w: World) -> None:
    """Jobs whose server does not answer are left for later; those on other servers end."""
    w.log.keys = msgspec.structs.replace(w.log.keys, publish="SPUBLISH")
    for job_id in ("here", "there"):
        await w.lost(job_id)
    w.executor.unreachable = "{there}"
    await w.sweep_twice()
    assert await w.status("here") == "failed"
    w.executor.unreachable = ""
    assert await w.status("there") == "in_progress"
    await w.sweep_twice()
    assert await w.status("there") == "failed"


@in_a_world
async def test_a_tenant_whose_server_is_lost_keeps_nobody_from_the_others(w: World) -> None:
    """The jobs of other tenants are called, and what comes behind turns in a sweep is done."""
    w.log.places._limits = TenantLimits(max_running=1)
    for tenant in ("here", "there"):
        for job_id in ("first", "second"):
            await w.queued(f"{tenant}-{job_id}", tenant=tenant)
        await w.log.places.left(tenant, [f"{tenant}-first"])
    w.log.keys = msgspec.structs.replace(w.log.keys, publish="SPUBLISH")
    w.executor.unreachable = "{there}"
    await w.sweeper.sweep()
    assert w.queue.sent == ["here-second"]


@in_a_world
async def test_a_turn_of_a_record_that_cannot_be_read_is_the_next_ones(w: World) -> None:
    """It neither keeps the only place for ever nor the sweeper from the rest."""
    w.log.places._limits = TenantLimits(max_running=1)
    for job_id in ("first", "poison", "next"):
        await w.queued(job_id)
    await w.client.hset("dw:{poison}:meta", "options", "{")
    await w.log.places.left("default", ["first"])
    logging.getLogger("deltawire.turns").disabled = True
    try:
        await w.sweeper.sweep()
        await w.sweeper.sweep()
    finally:
        logging.getLogger("deltawire.turns").disabled = False
    assert w.queue.sent == ["next"]


@in_a_world
async def test_a_job_whose_record_has_vanished_is_forgotten(w: World) -> None:
    """So is its owner, when it has no other."""
    await w.lost()
    await w.client.delete("dw:{job}:meta", "dw:{job}:log")
    await w.sweeper.sweep()
    await w.sweeper.sweep()
    assert await w.client.keys("dw:own*") == []


@in_a_world
async def test_a_job_that_was_reported_is_looked_at(w: World) -> None:
    """Though no set tells of it."""
    await w.lost()
    await w.client.delete(w.log.keys.owners)
    for _ in range(3):
        w.sweeper.report("job")
        await w.sweeper.sweep()
        await asyncio.sleep(LEASE_S)
    assert await w.status() == "failed"


@in_a_world
async def test_a_worker_whose_jobs_redis_forgot_tells_them_at_once(w: World) -> None:
    """Else those that nobody watches would have no end, if it died within its half minute."""
    presence = Presence(w.log.index, VICTIM, {"job": cast("Run", None)})
    keeping = asyncio.create_task(presence.keep())
    await asyncio.sleep(1.5)
    await w.client.flushall()
    await asyncio.sleep(1)
    assert await w.log.index.jobs_of(VICTIM) == ["job"]
    keeping.cancel()


# What must not stop it.


@pytest.mark.parametrize("key", ["meta", "log"])
def test_a_key_of_another_type_keeps_nobody_from_the_others(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis refuses to look at that job only."""

    @in_a_world
    async def test(w: World) -> None:
        for poison in ("poison", "late poison"):
            await w.lost(poison)
            await w.queued(poison)
            await w.client.delete(f"dw:{{{poison}}}:{key}")
            await w.client.set(f"dw:{{{poison}}}:{key}", "x")
        await w.client.zadd("dw:queued", {"late poison": 1})
        await w.lost()
        await w.queued("late", age_s=10, queue_timeout_s=1)
        await w.sweep_twice()
        assert [await w.status(job) for job in ("job", "late")] == ["failed", "failed"]

    test()
    assert "cannot look after a job" in caplog.text


@in_a_world
async def test_a_record_that_cannot_be_read_keeps_nobody_from_the_others(w: World) -> None:
    """Somebody else has written into our keys."""
    logging.getLogger("deltawire.sweeper").disabled = True
    try:
        await w.lost()
        await w.lost("poison")
        await w.client.hset("dw:{poison}:meta", "options", "{")
        await w.queued("late", age_s=10, queue_timeout_s=1)
        await w.sweep_twice()
    finally:
        logging.getLogger("deltawire.sweeper").disabled = False
    assert [await w.status(job) for job in ("job", "late")] == ["failed", "failed"]


@in_a_world
async def test_a_message_that_the_broker_did_not_take_is_sent_at_the_next_look(w: World) -> None:
    """The minute's pause is for messages that were sent."""
    w.queue.is_away = True
    await w.lost(deltas=0)
    await w.sweep_twice()
    w.queue.is_away = False
    await w.sweeper.sweep()
    assert w.queue.sent == ["job"]


@in_a_world
async def test_a_broker_that_is_away_keeps_nobody_from_the_others(w: World) -> None:
    """What waits too long ends, though what should be sent again is not."""
    w.queue.is_away = True
    await w.lost("restartable", deltas=0)
    await w.lost("lost")
    await w.queued("late", age_s=10, queue_timeout_s=1)
    await w.sweep_twice()
    assert [await w.status(job) for job in ("restartable", "lost", "late")] == [
        "in_progress",
        "failed",
        "failed",
    ]


# Queued jobs.


@in_a_world
async def test_a_job_that_waits_too_long_ends(w: World) -> None:
    """Without any worker; one that may still wait does not."""
    await w.queued("late", age_s=10, queue_timeout_s=5)
    await w.queued("early", age_s=10, queue_timeout_s=50)
    await w.sweeper.sweep()
    last = await w.last("late")
    assert isinstance(last, Failed)
    assert (last.error.code, last.source, last.sequence_number) == ("queue_timeout", "queue", 2)
    assert await w.status("early") == "queued"
    assert await w.log.index.queued(9) == ["early"]


@in_a_world
async def test_an_overdue_job_with_a_cancel_key_ends_as_cancelled(w: World) -> None:
    """The only terminal event that its log accepts."""
    await w.queued(age_s=10, queue_timeout_s=5)
    await w.client.set("dw:{job}:cancel", "1", ex=60)
    await w.sweeper.sweep()
    assert isinstance(await w.last(), Cancelled)
    assert await w.log.index.queued(9) == []


@in_a_world
async def test_a_repeated_submit_does_not_put_the_deadline_off(w: World) -> None:
    """Else whoever asks again every minute keeps a job waiting for ever."""
    await w.queued(age_s=10, queue_timeout_s=5)
    await w.queued(queue_timeout_s=5_000)
    await w.sweeper.sweep()
    assert await w.status() == "failed"


@in_a_world
async def test_a_deadline_that_is_wrong_is_corrected(w: World) -> None:
    """A job that is looked at too early does not stand in the way of others at every look."""
    await w.queued(queue_timeout_s=100)
    await w.client.zadd("dw:queued", {"job": 1})
    await w.sweeper.sweep()
    assert await w.status() == "queued"
    assert await w.log.index.overdue(time.time() + 90, 9) == []
    assert await w.log.index.overdue(time.time() + 110, 9) == ["job"]


@in_a_world
async def test_a_message_that_the_broker_lost_is_sent_again(w: World) -> None:
    """When the queue is empty at two looks, ten seconds apart; and then once a minute, over all sweepers."""
    await w.queued()
    sweepers = [w.another(f"s{n}") for n in range(4)]
    began = asyncio.get_running_loop().time()
    sent: list[float] = []
    while (now := asyncio.get_running_loop().time() - began) <= 55:
        await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
        if len(w.queue.sent) > len(sent):
            sent.append(now)
        await asyncio.sleep(1)
    assert w.queue.sent == ["job"]
    assert 2 * LOST_MESSAGE_INTERVAL_S <= sent[0] <= 2 * LOST_MESSAGE_INTERVAL_S + 2
    await w.client.delete("dw:{job}:sent")  # the minute is over
    for _ in range(11):
        await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
        await asyncio.sleep(1)
    assert w.queue.sent == ["job"] * 2


@in_a_world
async def test_nothing_is_sent_again_while_a_backlog_stands(w: World) -> None:
    """Nor when it stood at one of the two looks."""
    await w.queued()
    for turn in range(6):
        w.queue.waiting = 5 if turn % 2 else 0
        for _ in range(11):
            await w.sweeper.sweep()
            await asyncio.sleep(1)
    assert w.queue.sent == []


@in_a_world
async def test_the_set_of_queued_jobs_is_cleaned(w: World) -> None:
    """Of jobs that run or have ended soon; of those without a record when they would have waited too long."""
    await w.queued("running")
    await w.log.claim("running", owner=VICTIM, lease_s=60)
    await w.queued("ended")
    await w.log.cancel("ended", reason="r")
    await w.log.index.will_queue("submitted just now", time.time() + 60)
    await w.log.index.will_queue("never was", time.time() - 1)
    for _ in range(12):
        await w.sweeper.sweep()
        await asyncio.sleep(1)
    assert await w.log.index.queued(9) == ["submitted just now"]


async def _park(w: World, job_id: str) -> None:
    await w.queued(job_id)
    claim = await w.log.claim(job_id, owner=VICTIM, lease_s=60)
    assert claim.record is not None
    record = msgspec.structs.replace(claim.record, attempt=claim.attempt, retries=1)
    assert (await w.log.park(job_id, owner=VICTIM, record=record, top=1, delay_s=300))[0] == "PARKED"


async def _be_due(w: World, job_id: str) -> None:
    """As if the wait had been over for a while: Redis' own clock is not virtual."""
    await w.client.hset(f"dw:{{{job_id}}}:meta", "not_before", 1)
    await w.log.index.will_park(job_id, time.time() - PARKED_SLACK_S - 1)


@in_a_world
async def test_the_parked_jobs_of_a_worker_that_died_are_brought_back(w: World) -> None:
    """All of them within seconds of when they are due, each once, whoever sweeps; and none before."""
    jobs = [f"job-{n}" for n in range(250)]
    for job_id in (*jobs, "later"):
        await _park(w, job_id)
    sweepers = [w.another(f"s{n}") for n in range(2)]
    for _ in range(5):
        await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
    assert w.queue.sent == []
    for job_id in jobs:
        await _be_due(w, job_id)
    for _ in range(5):
        await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
    assert sorted(w.queue.sent) == sorted(jobs)
    assert await w.log.index.due(time.time() + 999, 999) == ["later"]


@in_a_world
async def test_parked_jobs_do_not_hide_a_message_that_the_broker_lost(w: World) -> None:
    """However many there are that have waited for longer: what they wait for is their time."""
    for n in range(250):
        await _park(w, f"job-{n}")
    await w.queued("lost")
    for _ in range(25):
        await w.sweeper.sweep()
        await asyncio.sleep(1)
    assert w.queue.sent == ["lost"]


@in_a_world
async def test_a_parked_job_that_came_back_by_itself_is_not_sent_again(w: World) -> None:
    """Nor one while a backlog stands: its message may be in there."""
    for job_id in ("runs", "waits"):
        await _park(w, job_id)
        await _be_due(w, job_id)
    assert (await w.log.claim("runs", owner="other", lease_s=60)).code == "CLAIMED"
    w.queue.waiting = 1
    for _ in range(5):
        await w.sweeper.sweep()
    assert w.queue.sent == []
    w.queue.waiting = 0
    await w.sweeper.sweep()
    assert w.queue.sent == ["waits"]
    assert await w.log.index.due(time.time() + 999, 9) == []
