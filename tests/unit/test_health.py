"""Readiness is about delivery, and does not take all relays away at once; nobody waits in vain (§5.5)."""

import asyncio

import pytest
from starlette.requests import Request

from deltawire.errors import RedisUnavailableError
from deltawire.redis_connection import Reply
from deltawire_relay.commands import DOWN_AFTER_S, READS_AT_ONCE, Commands
from deltawire_relay.feed import Feed
from deltawire_relay.health import DEGRADED_AFTER_S, Health
from tests.support.virtual_time import virtual_time

REQUEST = Request({"type": "http", "method": "GET", "path": "/readyz", "headers": []})
UNREADY_AFTER_S = 30.0


class SaidFeed(Feed):
    """Says what it is told to."""

    def __init__(self, *, undelivered_s: float = 0.0, unanswered_s: float = 0.0) -> None:
        self.said = undelivered_s, unanswered_s
        self.answers = 0

    @property
    def undelivered_s(self) -> float:
        return self.said[0]

    @property
    def unanswered_s(self) -> float:
        return self.said[1]

    def note_answer(self) -> None:
        self.answers += 1


@pytest.mark.parametrize(
    ("undelivered_s", "unanswered_s", "code", "status"),
    [
        (0, 0, 200, "ok"),
        (DEGRADED_AFTER_S - 1, 0, 200, "ok"),
        (0, DEGRADED_AFTER_S - 1, 200, "ok"),
        (DEGRADED_AFTER_S, 0, 200, "degraded"),
        (0, DEGRADED_AFTER_S, 200, "degraded"),
        (UNREADY_AFTER_S - 1, UNREADY_AFTER_S - 1, 200, "degraded"),
        (UNREADY_AFTER_S, 0, 503, "redis_unavailable"),
        (0, UNREADY_AFTER_S, 503, "redis_unavailable"),
    ],
)
async def test_readiness_over_time(undelivered_s: float, unanswered_s: float, code: int, status: str) -> None:
    """Whichever has been missing for longer counts, deliveries or answers."""
    feed = SaidFeed(undelivered_s=undelivered_s, unanswered_s=unanswered_s)
    health = Health(feed, unready_after_s=UNREADY_AFTER_S)
    answer = await health.readyz(REQUEST)
    assert (answer.status_code, answer.body) == (code, b'{"status":"%s"}' % status.encode())
    health.is_draining = True
    answer = await health.readyz(REQUEST)
    assert (answer.status_code, answer.body) == (503, b'{"status":"draining"}')
    assert (await health.healthz(REQUEST)).status_code == 200


class CountingRedis:
    """Counts how many commands are under way."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.asked = 0
        self.pause_s = 0.01
        self.error: Exception | None = None

    async def execute(self, *args: str | bytes | float) -> Reply:
        name = str(args[0])
        self.asked += 1
        self.now[name] = self.now.get(name, 0) + 1
        self.most[name] = max(self.most.get(name, 0), self.now[name])
        try:
            await asyncio.sleep(self.pause_s)
        finally:
            self.now[name] -= 1
        if self.error is not None:
            raise self.error
        return b"OK"


@virtual_time
async def test_log_reads_queue_and_nothing_queues_behind_them() -> None:
    """Ten thousand hubs that catch up leave Redis room, and a cancellation passes them all."""
    redis = CountingRedis()
    commands = Commands(redis, SaidFeed())
    reads = [asyncio.create_task(commands.execute("XRANGE", "log")) for _ in range(10_000)]
    await asyncio.sleep(0.001)
    assert await commands.execute("EVALSHA", "cancel") == b"OK"
    assert sum(read.done() for read in reads) <= 2 * READS_AT_ONCE
    for read in reads[1_000:9_000]:
        read.cancel()
    await asyncio.wait(reads)
    assert redis.most["XRANGE"] == READS_AT_ONCE
    assert not any(redis.now.values())


@virtual_time
async def test_nobody_waits_for_a_redis_that_answers_nothing() -> None:
    """Known to be down: refused at once, those that had queued included; known to be up: asked."""
    redis, feed = CountingRedis(), SaidFeed()
    redis.pause_s, redis.error = 10.0, RedisUnavailableError("no answer in time")
    commands = Commands(redis, feed)
    reads = [asyncio.create_task(commands.execute("XRANGE", "log")) for _ in range(10 * READS_AT_ONCE)]
    await asyncio.sleep(DOWN_AFTER_S + 1)
    feed.said = 0.0, DOWN_AFTER_S + 1
    began_at = asyncio.get_running_loop().time()
    with pytest.raises(RedisUnavailableError):
        await commands.execute("EVALSHA", "head")
    assert asyncio.get_running_loop().time() == began_at
    results = await asyncio.gather(*reads, return_exceptions=True)
    assert {type(result) for result in results} == {RedisUnavailableError}
    assert redis.asked == READS_AT_ONCE
    assert asyncio.get_running_loop().time() == redis.pause_s
    redis.pause_s, redis.error = 0.01, None
    feed.said = 0.0, 0.0
    assert await commands.execute("EVALSHA", "head") == b"OK"
    assert feed.answers == 1
