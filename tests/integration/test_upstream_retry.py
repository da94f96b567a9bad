"""Asking again before the first delta, and what may come in between (PROTOCOL §2.1): with a real gateway."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from deltawire.background import in_background
from deltawire.events import MAX_EVENT_BYTES
from deltawire.gateway import Gateway
from deltawire.keys import Keys
from deltawire.models import read_models
from deltawire.options import Options
from deltawire.sweeper import Sweeper
from deltawire_worker import generate as generate_module
from deltawire_worker.models import Catalogue
from deltawire_worker.pool import Cancellation
from deltawire_worker.retry import Budget
from deltawire_worker.run import Outcome
from deltawire_worker.upstreams import Upstream, Upstreams
from tests.integration.test_generate import (
    DEADLINE_S,
    Bench,
    content,
    open_bench,
    request,
    text_of,
    types,
    until,
)

META: Final = "dw:{job}:meta"
NOWHERE: Final = "http://127.0.0.1:1/v1"


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    async with open_bench(redis_url) as bench:
        yield bench


async def retrying(bench: Bench, count: int = 1) -> dict[str, Any]:
    """The job's so-manieth `retrying` event, as soon as it is in the log."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            events = [event for event in await bench.events("job") if event["type"] == "retrying"]
            if len(events) >= count:
                return events[count - 1]
            await asyncio.sleep(0.005)


async def due(bench: Bench) -> None:
    """As if the time of the parked job had come."""
    await bench.redis.hset(META, "not_before", 1)


# -- in the slot


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"fault": "status", "status": 500}, "upstream_server_error"),
        ({"fault": "status", "status": 429, "retry_after": "0.05"}, "upstream_rate_limit"),
        ({"fault": "html"}, "upstream_server_error"),
        ({"fault": "error"}, "upstream_error_event"),
        ({"fault": "cut"}, "upstream_eof"),
        ({"fault": "reset"}, "upstream_eof"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_fails_once_is_asked_again(bench: Bench, fault: dict[str, Any], reason: str) -> None:
    """Readers see that, and then an answer as ever; nothing of the failure is left."""
    assert await bench.run("job", request(deltas=3, fail_first=1, **fault)) == Outcome("completed")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "retrying", "delta", "completed"]
    assert (events[2]["try"], events[2]["reason"]) == (2, reason)
    assert 0 < events[2]["delay_s"] <= 0.5
    assert content(events[-1]) == text_of(events)
    assert events[-1]["usage_source"] == "provider"
    assert bench.requests("job") == 2


async def test_the_last_failure_is_the_jobs(bench: Bench) -> None:
    """After as many retries as the job allows."""
    options = {"max_retries": 2}
    outcome = await bench.run("job", request(fault="status", status=503, retry_after="0.01"), options)
    assert outcome == Outcome("failed", "upstream_server_error")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "retrying", "retrying", "failed"]
    assert [event["try"] for event in events[2:4]] == [2, 3]
    assert events[-1]["error"]["retry_after_s"] == 0.01
    assert bench.requests("job") == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
async def test_what_will_not_change_is_not_asked_again(bench: Bench, status: int) -> None:
    """It fails at once."""
    await bench.run("job", request(fault="status", status=status))
    assert types(await bench.ended("job")) == ["queued", "in_progress", "failed"]


async def test_nothing_is_asked_again_after_a_delta(bench: Bench) -> None:
    """Half an answer has been read."""
    await bench.run("job", request(fault="error", after=2))
    assert types(await bench.ended("job")) == ["queued", "in_progress", "delta", "failed"]
    assert bench.requests("job") == 1


async def test_a_wait_longer_than_the_job_allows_fails_at_once(bench: Bench) -> None:
    """And says how long it would have been."""
    body = request(fault="status", status=429, retry_after="31")
    outcome = await bench.run("job", body, {"max_retry_wait_s": 30})
    assert outcome == Outcome("failed", "upstream_rate_limit")
    [*_, last] = await bench.ended("job")
    assert (last["error"]["retry_after_s"], last["status_code"]) == (31, 429)
    assert last["upstream_error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("options", [{"timeout_s": 20}, {"queue_timeout_s": 20}])
async def test_a_wait_longer_than_the_job_has_time_fails_at_once(
    bench: Bench, options: dict[str, float]
) -> None:
    """Nobody waits for a deadline only to fail then."""
    body = request(fault="status", status=429, retry_after="25")
    assert await bench.run("job", body, options) == Outcome("failed", "upstream_rate_limit")
    assert (await bench.ended("job"))[-1]["error"]["retry_after_s"] == 25


async def test_a_cancel_interrupts_the_wait(bench: Bench) -> None:
    """At once; no connection is open then."""
    task = bench.start("job", request(fault="status", status=429, retry_after="9"))
    await retrying(bench)
    began = time.monotonic()
    await bench.log.cancel("job", reason="bored")
    assert await task == Outcome("cancelled")
    assert time.monotonic() - began < 8
    [*_, last] = await bench.ended("job")
    assert last["cancel"]["reason"] == "bored"
    assert last["usage_source"] == "unavailable"
    assert bench.requests("job") == 1


async def test_nobody_watching_interrupts_the_wait(bench: Bench) -> None:
    """`on_abandon: cancel` holds there, too."""
    options = {"on_abandon": "cancel", "abandon_grace_s": 0.3}
    task = bench.start("job", request(fault="status", status=429, retry_after="9"), options)
    assert await task == Outcome("cancelled")
    assert (await bench.ended("job"))[-1]["cancel"]["reason"] == "abandoned"


async def test_the_total_deadline_holds_through_the_waits(bench: Bench) -> None:
    """The first delta's clock does not run in them, the total one does."""
    body = request(fault="status", status=503, retry_after="2", fail_first=1, deltas=3, first_delta_s=0.2)
    options = {"first_delta_timeout_s": 1.5}
    assert await bench.run("job", body, options) == Outcome("completed")


async def test_a_worker_that_stops_in_the_wait_leaves_the_job_to_another(bench: Bench) -> None:
    """As it does with any job that nobody has seen a delta of."""
    task = bench.start("job", request(fault="status", status=429, retry_after="9"))
    await retrying(bench)
    task.cancel()
    await asyncio.wait([task])
    async with asyncio.timeout(DEADLINE_S):
        while (await bench.log.claim("job", owner="other", lease_s=5)).code != "EXPIRED":  # noqa: ASYNC110 - a lease has no event
            await asyncio.sleep(0.01)


async def test_a_gateway_that_is_down_is_not_asked_four_times_by_everybody(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is the upstream's, for all jobs of the process."""
    monkeypatch.setattr(Budget, "MAX_TOKENS", 5)
    monkeypatch.setattr("deltawire_worker.retry.FIRST_BACKOFF_S", 0.01)
    async with open_bench(redis_url) as bench:
        body = request(fault="status", status=503)
        outcomes = await asyncio.gather(*(bench.start(f"job-{n}", body) for n in range(20)))
        assert {outcome.code for outcome in outcomes} == {"upstream_server_error"}
        assert len(bench.gateway.records) == 25
        assert await bench.run("job", body) == Outcome("failed", "upstream_server_error")
        assert types(await bench.ended("job")) == ["queued", "in_progress", "failed"]


# -- parked


async def park(bench: Bench, body: dict[str, Any] | None = None, **options: Any) -> Outcome:
    """Runs a job of our doors until it is parked."""
    body = body or request(deltas=3, fault="status", status=429, retry_after="30", fail_first=1)
    await bench.submit("job", body, **options)
    outcome = await bench.run("job")
    assert outcome.status == "queued"
    return outcome


async def test_a_long_wait_gives_the_slot_back(bench: Bench) -> None:
    """The job is queued again; its message, when it comes in time, goes on with the same attempt."""
    outcome = await park(bench)
    assert outcome.again_in_s is not None
    assert 30 <= outcome.again_in_s <= 33
    assert bench.runs == {}
    events = await bench.events("job")
    assert types(events) == ["queued", "in_progress", "retrying"]
    assert events[-1]["delay_s"] == outcome.again_in_s
    assert await bench.log.index.queued(9) == ["job"]
    early = await bench.run("job")
    assert early.status == "queued"
    assert early.again_in_s is not None
    assert 0 < early.again_in_s <= outcome.again_in_s
    assert await bench.events("job") == events
    await due(bench)
    assert await bench.run("job") == Outcome("completed")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "retrying", "in_progress", "delta", "completed"]
    assert [event["attempt"] for event in events if event["type"] == "in_progress"] == [1, 1]
    assert bench.requests("job") == 2


async def test_retries_are_counted_through_the_parking(bench: Bench) -> None:
    """Else a job could be parked for ever."""
    body = request(fault="status", status=429, retry_after="30")
    await park(bench, body, max_retries=2)
    await due(bench)
    assert (await bench.run("job")).status == "queued"
    await due(bench)
    assert await bench.run("job") == Outcome("failed", "upstream_rate_limit")
    events = await bench.ended("job")
    assert [event["try"] for event in events if event["type"] == "retrying"] == [2, 3]


async def test_the_time_that_a_job_was_parked_counts(bench: Bench) -> None:
    """`timeout_s` is the attempt's, waits included."""
    body = request(deltas=9_999, rate=50, fault="status", status=429, retry_after="30", fail_first=1)
    await park(bench, body, timeout_s=100)
    record = await bench.log.record("job")
    assert record is not None
    assert record.attempt_began_at == pytest.approx(time.time(), abs=DEADLINE_S)
    await bench.redis.hset(META, mapping={"not_before": 1, "attempt_began_at": time.time() - 98})
    assert await bench.run("job") == Outcome("incomplete")
    assert (await bench.ended("job"))[-1]["incomplete_details"] == {"reason": "total_timeout"}


async def test_an_attempt_whose_time_is_over_when_it_comes_back_asks_nobody(bench: Bench) -> None:
    """Nor is anything paid for it. A connection that is open would take the request at once."""
    await bench.run("warm", request(deltas=1))
    await bench.run("job", request(fault="status", status=429, retry_after="60", fail_first=1))
    asked = len(bench.gateway.records)
    await bench.redis.hset(META, mapping={"not_before": 1, "attempt_began_at": time.time() - 9_999})
    assert await bench.run("job") == Outcome("failed", "total_timeout")
    await asyncio.sleep(0.2)
    assert len(bench.gateway.records) == asked
    assert (await bench.ended("job"))[-1]["usage_source"] == "unavailable"


async def test_a_bare_job_can_be_parked(bench: Bench) -> None:
    """Its record has the request; the message that comes again has no body."""
    body = request(deltas=3, fault="status", status=429, retry_after="30", fail_first=1)
    assert (await bench.run("job", body)).status == "queued"
    await due(bench)
    assert await bench.run("job") == Outcome("completed")
    await bench.ended("job")


async def test_cancelling_a_parked_job_is_cancelling_a_queued_one(bench: Bench) -> None:
    """It has ended when the call returns, and its message finds that."""
    await park(bench)
    cancellation = await bench.log.cancel("job", reason="bored")
    assert (cancellation.status, cancellation.cancelled_from) == ("cancelled", "queued")
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "retrying", "cancelled"]
    assert await bench.run("job") == Outcome("cancelled")
    assert bench.requests("job") == 1


async def test_a_cancel_key_that_comes_before_the_parking_ends_the_job(bench: Bench) -> None:
    """Set by hand, between the refusal and the script."""
    park_job = bench.log.park

    async def cancel_first(*args: Any, **kwargs: Any) -> Any:
        await bench.redis.set("dw:{job}:cancel", json.dumps({"reason": "late"}))
        return await park_job(*args, **kwargs)

    bench.log.park = cancel_first  # type: ignore[method-assign]
    await bench.submit("job", request(fault="status", status=429, retry_after="30"))
    assert await bench.run("job") == Outcome("cancelled")
    assert (await bench.ended("job"))[-1]["cancel"]["reason"] == "late"


async def test_a_parked_job_that_has_waited_too_long_in_all_is_ended(bench: Bench) -> None:
    """`queue_timeout_s` counts from the record's creation, whoever looks."""
    await park(bench)
    created_at = time.time() - 4_000
    await bench.redis.hset(META, mapping={"not_before": 1, "created_at": created_at})
    assert await bench.run("job") == Outcome("failed", "queue_timeout")


class Queue:
    """An empty broker, and what was sent to it."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, job_id: str, **_: Any) -> None:
        self.sent.append(job_id)

    def depth(self) -> int:
        return 0


async def test_a_parked_job_whose_worker_died_is_sent_again_when_it_is_due(bench: Bench) -> None:
    """By a sweeper, as any queued job whose message is lost; and not before, however often it looks."""
    await park(bench)
    queue = Queue()
    sweeper = Sweeper(bench.log, queue, owner="sweeper")
    for _ in range(3):
        await sweeper._send_lost()
    assert queue.sent == []
    assert await bench.log.index.queued(9) == ["job"]
    await due(bench)
    for _ in range(2):
        await sweeper._send_lost()
    assert queue.sent == ["job"]
    assert await bench.run("job") == Outcome("completed")


async def test_a_parked_job_that_nobody_brings_back_is_ended_by_its_time_in_the_queue(bench: Bench) -> None:
    """As any queued job; the numbers go on."""
    await park(bench)
    created_at = time.time() - 4_000
    await bench.redis.hset(META, "created_at", created_at)
    await bench.log.index.waits_until("job", created_at + 3_600)
    await Sweeper(bench.log, Queue(), owner="sweeper").sweep()
    events = await bench.ended("job")
    assert types(events) == ["queued", "in_progress", "retrying", "failed"]
    assert events[-1]["error"]["code"] == "queue_timeout"


async def test_a_job_that_is_parked_stays_among_those_that_wait(bench: Bench) -> None:
    """Though this process has said of its claim, a moment ago, that it waits no more."""
    presence = bench.presence
    async with in_background(presence.keep()):
        await park(bench)
        presence.claimed("other")
        await bench.log.index.will_queue("other", time.time() + 60)
        async with asyncio.timeout(DEADLINE_S):
            while "other" in await bench.log.index.queued(9):  # noqa: ASYNC110 - a set has no event for tests
                await asyncio.sleep(0.01)
        assert await bench.log.index.queued(9) == ["job"]


@pytest.mark.parametrize("why", [Cancellation.REVOKED, Cancellation.SHUTDOWN, Cancellation.TIME_LIMIT])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_task_that_is_cancelled_while_it_parks_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, why: Cancellation, when: str
) -> None:
    """Revoked it ends as cancelled; else the job is parked, or another attempt's."""
    monkeypatch.setattr(generate_module, "cancellation", lambda: why)
    park_job = bench.log.park
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            reached.set()
            await go_on.wait()
        answer = await park_job(*args, **kwargs)
        reached.set()
        await go_on.wait()
        return answer

    bench.log.park = slowly  # type: ignore[method-assign]
    await bench.submit("job", request(deltas=3, fault="status", status=429, retry_after="30", fail_first=1))
    task = bench.start("job")
    await reached.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait([task])
    assert task.cancelled()
    record = await bench.log.record("job")
    assert record is not None
    if why is Cancellation.REVOKED:
        assert (await bench.ended("job"))[-1]["cancel"]["reason"] == "task_revoked"
    else:
        assert (record.status, record.attempt) == ("queued", 0)
        await due(bench)
        assert await bench.run("job") == Outcome("completed")


@pytest.mark.parametrize("lost", [["dw:{job}:log"], [META, "dw:{job}:log"]])
async def test_a_job_that_redis_lost_before_it_was_parked_is_written_again(
    bench: Bench, lost: list[str]
) -> None:
    """And parked then, whole."""
    park_job = bench.log.park
    losses = [lost]

    async def lose_first(*args: Any, **kwargs: Any) -> Any:
        if losses:
            await bench.redis.delete(*losses.pop())
        return await park_job(*args, **kwargs)

    bench.log.park = lose_first  # type: ignore[method-assign]
    await park(bench)
    assert types(await bench.events("job")) == ["queued", "in_progress", "retrying"]
    await due(bench)
    assert await bench.run("job") == Outcome("completed")
    await bench.ended("job")


async def test_a_parked_jobs_log_that_is_lost_is_healed_by_the_next_claims_worker(bench: Bench) -> None:
    """What stood in it before the first delta is a snapshot of nothing."""
    fault: dict[str, Any] = {"fault": "status", "status": 429, "retry_after": "30", "fail_first": 1}
    await park(bench, request(deltas=100_000, rate=200, **fault))
    await due(bench)
    task = bench.start("job")
    await bench.deltas("job", 5)
    await bench.redis.delete("dw:{job}:log")
    await bench.deltas("job", 10)
    await bench.log.cancel("job", reason="enough")
    assert await task == Outcome("cancelled")
    last = json.loads((await bench.lines("job"))[-1])
    assert (last["type"], bool(content(last))) == ("cancelled", True)


# -- several upstreams, and their limits


async def test_a_job_goes_to_the_upstream_of_its_model(redis_url: str) -> None:
    """Or to the one that it names; readers see which, and their own name of the model."""
    async with Gateway(rate=0) as other, Gateway(rate=0) as plain:
        upstreams = [
            Upstream(name="other", base_url=other.base_url, models=["m1"], aliases={"fast": "m1"}),
            Upstream(name="plain", base_url=plain.base_url),
        ]
        async with open_bench(redis_url, upstreams=upstreams) as bench:
            for job_id, model, options in (
                ("a", "m1", {}),
                ("b", "fast", {}),
                ("c", "m2", {}),
                ("d", "m1", {"upstream": "plain"}),
            ):
                outcome = await bench.run(job_id, request(deltas=2, fields={"model": model}), options)
                assert outcome == Outcome("completed")
                events = await bench.ended(job_id)
                assert events[1]["model"] == model
                assert events[1]["upstream"] == ("other" if job_id in "ab" else "plain")
            assert [r.client_request_id for r in other.records] == ["a", "b"]
            assert [r.client_request_id for r in plain.records] == ["c", "d"]
            assert (await bench.ended("b"))[-1]["completion"]["model"] == "m1"


@pytest.mark.parametrize("body", [b"null", b"[]", b"5"])
async def test_a_record_without_a_request_ends_as_the_requests_fault(bench: Bench, body: bytes) -> None:
    """Its worker died before it could say so, and the message that comes again has no arguments."""
    await bench.log.submit("job", request=body, options=Options(), digest="", created_at=time.time())
    assert await bench.run("job") == Outcome("failed", "invalid_request")
    assert (await bench.ended("job"))[-1]["source"] == "request"


async def test_a_cancel_key_of_any_length_makes_an_event_that_is_one(bench: Bench) -> None:
    """Whoever sets it by hand may write what he likes."""
    await bench.submit("job", request())
    await bench.redis.set("dw:{job}:cancel", json.dumps({"reason": "x" * 300_000}))
    assert await bench.run("job") == Outcome("cancelled")
    assert len((await bench.lines("job"))[-1]) < MAX_EVENT_BYTES


async def test_a_model_that_no_upstream_has_is_the_requests_fault(redis_url: str) -> None:
    """Where each lists its own; nobody is asked."""
    upstreams = [Upstream(name="other", base_url=NOWHERE, models=["m1"])]
    async with open_bench(redis_url, upstreams=upstreams) as bench:
        assert await bench.run("job", request()) == Outcome("failed", "model_not_found")
        [*_, last] = events = await bench.ended("job")
        assert types(events) == ["queued", "failed"]
        assert (last["source"], last["error"]["param"]) == ("request", "request.model")


async def test_no_more_streams_at_a_time_than_the_upstream_takes(redis_url: str) -> None:
    """The others wait in order; their first delta's clock starts when they are asked."""
    async with Gateway(rate=0) as gateway:
        upstream = Upstream(name="default", base_url=gateway.base_url, max_streams=2)
        async with open_bench(redis_url, upstreams=[upstream]) as bench:
            open_at_once = []

            async def look() -> None:
                while True:
                    records = gateway.records
                    open_now = [r for r in records if r.finished_at is None and r.closed_by is None]
                    open_at_once.append(len(open_now))
                    await asyncio.sleep(0.002)

            async with in_background(look()):
                options = {"first_delta_timeout_s": 1.6}
                body = request(deltas=2, first_delta_s=0.5)
                tasks = [bench.start(f"job-{n}", body, options) for n in range(8)]
                outcomes = await asyncio.gather(*tasks)
            assert set(outcomes) == {Outcome("completed")}
            assert max(open_at_once) == 2


async def test_whoever_waits_for_a_place_can_be_cancelled_and_has_a_deadline(redis_url: str) -> None:
    """And takes no place with it."""
    async with Gateway(rate=0) as gateway:
        upstream = Upstream(name="default", base_url=gateway.base_url, max_streams=1)
        async with open_bench(redis_url, upstreams=[upstream]) as bench:
            busy = bench.start("busy", request(fault="stall"))
            await until(lambda: gateway.records)
            waiting = bench.start("job", request(deltas=1))
            late = bench.start("late", request(deltas=1), {"timeout_s": 0.5})
            next_one = bench.start("next", request(deltas=1))
            await until(lambda: bench.runs.keys() >= {"job", "next"})
            await bench.log.cancel("job", reason="bored")
            assert await waiting == Outcome("cancelled")
            assert (await bench.ended("job"))[-1]["cancel"]["upstream_closed_at"] is None
            assert await late == Outcome("failed", "total_timeout")
            await bench.log.cancel("busy", reason="bored")
            assert await busy == Outcome("cancelled")
            assert await next_one == Outcome("completed")
            assert [r.client_request_id for r in gateway.records] == ["busy", "next"]


async def test_a_wait_between_two_tries_takes_no_place(redis_url: str) -> None:
    """Somebody else is asked meanwhile."""
    async with Gateway(rate=0) as gateway:
        upstream = Upstream(name="default", base_url=gateway.base_url, max_streams=1)
        async with open_bench(redis_url, upstreams=[upstream]) as bench:
            task = bench.start("job", request(fault="status", status=429, retry_after="9"))
            await retrying(bench)
            assert await bench.run("other", request(deltas=1)) == Outcome("completed")
            assert not task.done()
            await bench.log.cancel("job", reason="bored")
            await task


# -- the list of models


async def test_relays_are_told_which_models_there_are(redis_url: str) -> None:
    """What is configured; and of an upstream that lists none, what it lists itself."""
    async with Gateway(rate=0) as gateway, open_bench(redis_url) as bench:
        upstreams = Upstreams(
            [
                Upstream(name="first", base_url=NOWHERE, models=["m1"], aliases={"fast": "m1"}),
                Upstream(name="open", base_url=gateway.base_url),
                Upstream(name="away", base_url=NOWHERE),
            ]
        )
        catalogue = Catalogue(bench.executor, Keys(), upstreams, bench.client)
        async with in_background(catalogue.keep()), asyncio.timeout(DEADLINE_S):
            while len(models := await read_models(bench.executor, Keys())) < 3:  # noqa: ASYNC110 - a key has no event
                await asyncio.sleep(0.01)
        assert models[:2] == [
            {"id": name, "object": "model", "created": 0, "owned_by": "first"} for name in ("m1", "fast")
        ]
        assert "gpt-5.4" in {model["id"] for model in models}
        assert all(model.keys() == {"id", "object", "created", "owned_by"} for model in models)
        assert 100 < await bench.redis.ttl("dw:models") <= 120


async def test_a_list_of_models_that_makes_no_sense_is_none(redis_url: str) -> None:
    """Whatever the gateway answers."""
    answer: list[Any] = [{"id": "m1"}, {"id": 7}, "x", {"id": "a\nb"}, {"id": "m2", "created": "x"}]

    class Client:
        async def models(self, _: Upstream) -> list[Any]:
            return answer

    async with open_bench(redis_url) as bench:
        upstreams = Upstreams([Upstream(name="open", base_url=NOWHERE)])
        catalogue = Catalogue(bench.executor, Keys(), upstreams, Client())  # type: ignore[arg-type]
        async with in_background(catalogue.keep()), asyncio.timeout(DEADLINE_S):
            while not (models := await read_models(bench.executor, Keys())):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        assert [(model["id"], model["created"]) for model in models] == [("m1", 0), ("m2", 0)]
