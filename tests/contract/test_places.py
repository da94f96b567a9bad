"""What places promise: how many jobs of a tenant go to the workers, and who is next (PROTOCOL.md §1.4)."""

import time
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from deltawire.background import in_background
from deltawire.ending import as_queue_timeout
from deltawire.errors import WireError
from deltawire.job_counts import STATES, JobCounts, PlaceCounts
from deltawire.options import Options
from deltawire.tenants import Quota, TenantLimits
from deltawire.turns import Turns
from tests.support.job_logs import OpenedLog, listening, open_job_log, ttls

NOW = time.time()
RUNNING, WAITING, JOBS = (f"dw:tenant:{{acme}}:{name}" for name in ("running", "waiting", "jobs"))


class Broker:
    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.refuses = False

    def send(self, job_id: str, **message: Any) -> None:
        if self.refuses:
            raise WireError("queue_unavailable", "away")
        self.sent.append((job_id, message))

    @property
    def jobs(self) -> list[str]:
        return [job_id for job_id, _ in self.sent]


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def turns(job_log: OpenedLog, broker: Broker) -> Turns:
    return Turns(job_log, broker)


@pytest.fixture(autouse=True)
def limits(job_log: OpenedLog) -> None:
    job_log.places._limits = TenantLimits(
        max_running=2, max_queued=2, of_tenants={"big": Quota(max_running=0)}
    )


async def submit(
    log: OpenedLog, job_id: str, *, after_s: float = 0, tenant: str = "acme", **options: Any
) -> Any:
    made = Options(tenant=tenant, **options)
    return await log.submit(job_id, request=b"{}", options=made, digest="", created_at=NOW + after_s)


async def flood(log: OpenedLog, count: int) -> list[bool]:
    """Whether each job gets a message at once."""
    return [(await submit(log, f"j{n}", after_s=n)).message is not None for n in range(count)]


async def test_jobs_beyond_the_places_get_records_and_no_message(job_log: OpenedLog) -> None:
    """Two places, two who wait; the fifth is refused, and leaves nothing behind."""
    assert await flood(job_log, 4) == [True, True, False, False]
    with pytest.raises(WireError, match="tenant_queue_full") as refused:
        await submit(job_log, "j4", after_s=4)
    assert refused.value.error.retry_after_s
    assert await job_log.record("j4") is None
    assert await job_log.executor.execute("ZRANGE", JOBS, 0, -1) == [b"j0", b"j1", b"j2", b"j3"]
    assert await job_log.index.queued(9) == ["j0", "j1"]
    assert sorted(await job_log.index.some_held(9)) == ["j2", "j3"]
    record = await job_log.record("j3")
    assert record is not None
    assert record.status == "queued"
    assert job_log.places.refused == 1
    assert job_log.places.held == 2


async def test_a_repeat_is_answered_while_the_queue_is_full(job_log: OpenedLog) -> None:
    """The job exists: its repeat is not refused, takes no place, and sends no message of one that waits."""
    await flood(job_log, 4)
    assert (await submit(job_log, "j0")).message == {}
    assert (await submit(job_log, "j3", after_s=3)).message is None
    assert await job_log.executor.execute("ZCARD", RUNNING) == 2
    assert await job_log.executor.execute("ZCARD", WAITING) == 2


async def test_a_repeat_of_a_job_that_has_ended_takes_no_place(job_log: OpenedLog) -> None:
    await submit(job_log, "j0")
    record = await job_log.record("j0")
    assert record is not None
    assert await job_log.end("j0", as_queue_timeout(), record=record, top=1) == "OK"
    assert (await submit(job_log, "j0")).status == "failed"
    assert await job_log.executor.execute("ZCARD", RUNNING) == 0


async def test_one_tenants_flood_takes_nothing_from_another(job_log: OpenedLog) -> None:
    """Each has its own places; one without a limit has any number."""
    await flood(job_log, 4)
    assert (await submit(job_log, "other", tenant="umbrella")).message == {}
    assert [(await submit(job_log, f"b{n}", tenant="big")).message for n in range(9)] == [{}] * 9


async def test_the_next_one_is_called_when_a_place_is_free(
    job_log: OpenedLog, turns: Turns, broker: Broker
) -> None:
    """By priority, then by arrival; and not twice."""
    await flood(job_log, 3)
    await submit(job_log, "low", after_s=-9, priority=3)
    await turns.call_all()
    assert broker.sent == []
    await turns.go_on("acme", left=["j0"])
    await turns.go_on("acme")
    assert broker.sent == [("j2", {})]
    await turns.go_on("acme", left=["j1", "j2"])
    assert broker.sent[1:] == [("low", {"priority": 3})]
    assert await job_log.executor.execute("ZCARD", WAITING) == 0
    assert await job_log.executor.execute("ZRANGE", RUNNING, 0, -1) == [b"low"]
    assert sorted(await job_log.index.queued(9)) == ["j0", "j1", "j2", "low"]
    assert await job_log.index.some_held(9) == []
    await turns.call_all()
    assert await job_log.index.waiting_tenants(9) == []


async def test_new_jobs_do_not_overtake_those_that_wait(job_log: OpenedLog) -> None:
    """Also while a place is free already, and nobody was called yet."""
    await flood(job_log, 3)
    await job_log.places.left("acme", ["j0", "j1"])
    assert (await submit(job_log, "late", after_s=9)).message is None


async def test_a_message_that_cannot_be_sent_is_sent_later(
    job_log: OpenedLog, turns: Turns, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when who called the job has died: its place lapses, and it is called again."""
    monkeypatch.setattr("deltawire.places.SENDING_S", 0.05)
    await flood(job_log, 3)
    broker.refuses = True
    await turns.go_on("acme", left=["j0"])
    broker.refuses = False
    while not broker.sent:
        await turns.call_all()
    assert broker.jobs == ["j2"]


async def test_places_of_jobs_that_are_gone_are_found(
    job_log: OpenedLog, turns: Turns, broker: Broker
) -> None:
    """Whoever had them died between their place and their record, or after their end."""
    await flood(job_log, 3)
    await job_log.executor.execute("DEL", "dw:{j0}:meta")
    await turns.call_all()
    assert broker.jobs == ["j2"]


async def test_a_turn_of_a_job_without_a_record_is_nobodys(
    job_log: OpenedLog, turns: Turns, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record may be on its way; if it stays away, the next one is called."""
    monkeypatch.setattr("deltawire.places.SENDING_S", 0.01)
    monkeypatch.setattr("deltawire.turns.NO_RECORD_S", 1e9)
    await flood(job_log, 4)
    await job_log.executor.execute("DEL", "dw:{j2}:meta")
    await turns.go_on("acme", left=["j0"])
    assert broker.sent == []
    assert await job_log.places.count_waiting("acme") == 2
    monkeypatch.setattr("deltawire.turns.NO_RECORD_S", -99.0)
    while not broker.sent:
        await turns.call_all()
    assert broker.jobs == ["j3"]


async def test_a_cancelled_job_waits_no_more(job_log: OpenedLog) -> None:
    """It has ended at once, as any queued one, and is called by nobody."""
    await flood(job_log, 3)
    cancellation = await job_log.cancel("j2", reason="test")
    assert (cancellation.status, cancellation.cancelled_from) == ("cancelled", "queued")
    assert await job_log.executor.execute("ZCARD", WAITING) == 0


async def test_a_bare_job_waits_at_its_claim(job_log: OpenedLog, turns: Turns, broker: Broker) -> None:
    """It is never refused, has not been started, and its message comes again with what it said."""
    await flood(job_log, 4)
    options = Options(tenant="acme")
    claimed = await job_log.claim("bare", owner="w1", lease_s=5, request=b"{}", options=options)
    record = claimed.record
    assert record is not None
    assert not record.is_admitted
    assert await job_log.places.admit("bare", record, runs=True) == "WAITING"
    kept = msgspec.structs.replace(record, message=b'{"link":[]}')
    assert (await job_log.park("bare", owner="w1", record=kept, top=0, delay_s=0))[0] == "PARKED"
    record = await job_log.record("bare")
    assert record is not None
    assert (record.status, record.attempt, record.started_at) == ("queued", 0, None)
    await turns.go_on("acme", left=["j0", "j1", "j2", "j3"])
    assert broker.sent == [("bare", {"link": []})]
    again = await job_log.claim("bare", owner="w2", lease_s=5)
    assert again.code == "CLAIMED"
    assert again.record is not None
    assert await job_log.places.admit("bare", again.record, runs=True) == "ADMITTED"


async def test_a_job_waits_and_is_called_at_maxmemory(redis_url: str) -> None:
    """Else its attempt counts as lost; or its message is sent again and again, as if it were still to be."""
    async with open_job_log("server", redis_url) as log:
        log.places._limits = TenantLimits(max_running=1)
        broker = Broker()
        await flood(log, 1)
        for job_id, is_held in (("held", True), ("parked", False)):
            options = Options(tenant="acme" if is_held else "other")
            claimed = await log.claim(job_id, owner="w1", lease_s=5, request=b"{}", options=options)
            assert claimed.record is not None
            await log.client.config_set("maxmemory", "1")
            try:
                if is_held:
                    assert await log.places.admit(job_id, claimed.record, runs=True) == "WAITING"
                delay_s = 0 if is_held else 60
                parked = await log.park(job_id, owner="w1", record=claimed.record, top=0, delay_s=delay_s)
                assert parked[0] == "PARKED"
                await Turns(log, broker).go_on("acme", left=["j0"])
            finally:
                await log.client.config_set("maxmemory", "0")
        assert broker.jobs == ["held"]
        assert not await log.client.exists(WAITING, "dw:held")
        assert (await log.client.zscore(RUNNING, "held") or 0) > (NOW + 3600) * 1000
        assert await log.client.zscore("dw:queued", "held")


async def test_jobs_are_counted_for_prometheus(job_log: OpenedLog) -> None:
    """By what they wait for, as of the last look; and what quotas did in this process."""
    registry, counts = CollectorRegistry(), JobCounts(job_log.index)
    registry.register(counts)
    registry.register(PlaceCounts(job_log.places))
    await flood(job_log, 4)
    with pytest.raises(WireError):
        await submit(job_log, "j4")
    await job_log.index.will_run("w1", ["j0"])
    await job_log.index.lives("w1", 60)
    async with in_background(counts.keep()):
        while registry.get_sample_value("deltawire_jobs", {"state": "running"}) is None:
            await job_log.index.queued(1)  # as long as it takes to ask Redis
    found = {state: registry.get_sample_value("deltawire_jobs", {"state": state}) for state in STATES}
    assert found == {"queued": 2, "waiting": 2, "parked": 0, "running": 1}
    assert registry.get_sample_value("deltawire_tenant_refusals_total") == 1
    assert registry.get_sample_value("deltawire_jobs_held_total") == 2


async def test_all_expires(job_log: OpenedLog, turns: Turns) -> None:
    await flood(job_log, 3)
    await turns.go_on("acme", left=["j0"])
    left = await ttls(job_log)
    assert {RUNNING, WAITING, JOBS, "dw:tenants", "dw:tenants:waiting"} <= left.keys() | {WAITING}
    assert min(left.values()) > 0


async def test_a_deleted_job_is_gone_and_stays_gone(job_log: OpenedLog) -> None:
    """Record, log, place and listing; a message that comes late makes no new one."""
    await submit(job_log, "j0")
    await job_log.cancel("j0", reason="deleted")
    assert await job_log.erase("j0", "deleted")
    assert await job_log.is_over("j0")
    assert not await job_log.is_over("j1")
    assert not await job_log.erase("j0", "deleted")
    assert (await ttls(job_log, "*j0*")).keys() == {"dw:{j0}:cancel"}
    assert (
        await job_log.executor.execute("ZCARD", RUNNING) == await job_log.executor.execute("ZCARD", JOBS) == 0
    )
    late = await job_log.claim("j0", owner="w1", lease_s=5, request=b"{}", options=Options())
    assert (late.code, late.status) == ("ENDED", "cancelled")


@pytest.mark.parametrize("is_erased", [False, True], ids=["cancelled", "erased"])
async def test_a_job_that_ends_in_the_queue_is_not_counted_any_more(
    job_log: OpenedLog, is_erased: bool
) -> None:
    """A sweeper looks at the first hundred for lost messages: those that wait no more would hide others."""
    await flood(job_log, 3)
    assert await job_log.index.counts() == (2, 1, 0, 0)
    for n in range(3):
        await job_log.cancel(f"j{n}", reason="client")
        if is_erased:
            assert await job_log.erase(f"j{n}", "deleted")
    assert await job_log.index.counts() == (0, 0, 0, 0)


async def test_a_parked_job_that_is_erased_leaves_nothing(job_log: OpenedLog) -> None:
    """Though its cancel did not get through."""
    await submit(job_log, "j0")
    claim = await job_log.claim("j0", owner="w1", lease_s=60)
    assert claim.record is not None
    await job_log.park("j0", owner="w1", record=claim.record, top=1, delay_s=60)
    assert await job_log.erase("j0", "deleted")
    assert await job_log.index.counts() == (0, 0, 0, 0)


async def test_a_job_whose_worker_does_not_answer_is_erased_all_the_same(job_log: OpenedLog) -> None:
    """Its readers get a terminal event, and the worker is refused when it wakes."""
    await submit(job_log, "j0")
    claimed = await job_log.claim("j0", owner="w1", lease_s=60)
    async with listening(job_log, "dw:{j0}:events") as pubsub:
        assert await job_log.erase("j0", "deleted")
        news = None
        while news is None:
            news = await pubsub.get_message(timeout=5)
    assert news["data"].startswith(b'{"type":"cancelled","job_id":"j0","sequence_number":2')
    late = await job_log.append("j0", attempt=claimed.attempt, owner="w1", first=2, events=[b"{}"])
    assert late == ("MISSING", 0)
