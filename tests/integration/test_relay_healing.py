"""The relay heals itself: pub/sub that goes, hangs or is forbidden; a Redis that stops, stalls or forgets."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import msgspec
import pytest
import redis.asyncio

from deltawire import redis_client
from deltawire.codec import encode_snapshot
from deltawire.log_fold import LogFold
from deltawire.options import Options
from deltawire.redis_client import RedisClient
from deltawire.redis_server import RedisServer
from deltawire_relay import feed as feed_module
from deltawire_relay import health as health_module
from deltawire_relay import hub as hub_module
from deltawire_relay import server as server_module
from deltawire_relay.feed import Feed
from tests.support.producer import ProducedJob, Producer, producer
from tests.support.readers import Message, WebSocketReader, http_client, is_event, numbers, websocket
from tests.support.relay_process import RelayProcess, relay_in_process
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

WAIT_S: Final = 30.0


@pytest.fixture
def own_redis(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A server that a test may stop, stall and empty."""
    with RedisServer(program=redis_server._program) as server:
        yield server


@asynccontextmanager
async def watched(url: str, job: ProducedJob, **query: Any) -> AsyncIterator[WebSocketReader]:
    """A one-job socket that has seen what there is."""
    text = "&".join(f"{name}={value}" for name, value in query.items())
    async with websocket(f"{url}/v1/jobs/{job.job_id}/ws?{text}") as reader:
        await reader.until(job.top)
        yield reader


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def status(client: httpx.AsyncClient) -> tuple[int, str]:
    answer = await client.get("/readyz")
    return answer.status_code, answer.json()["status"]


async def until_status(client: httpx.AsyncClient, code: int, text: str) -> None:
    async def is_it() -> bool:
        return await status(client) == (code, text)

    await until(is_it)


# Pub/sub that fails.


async def test_readers_see_everything_while_pub_sub_is_forbidden(own_redis: RedisServer) -> None:
    """Commands work, SUBSCRIBE does not: readers, new ones too, read on; allowed again, all is as before."""
    with RelayProcess(own_redis.url) as relay:
        async with (
            producer(own_redis.url) as jobs,
            redis.asyncio.Redis.from_url(own_redis.url) as admin,
            http_client(base_url=relay.url) as client,
        ):
            job = await jobs.running("a")
            async with watched(relay.websocket_url, job) as reader:
                await admin.execute_command("ACL", "SETUSER", "default", "-subscribe")  # type: ignore[no-untyped-call]
                await admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
                await until_status(client, 200, "degraded")
                for number in range(5):
                    await job.deltas(f"{number}")
                    assert numbers(await reader.until(job.top)) == [job.top]
                async with watched(relay.websocket_url, job) as late:
                    await job.deltas("both")
                    await reader.until(job.top)
                    await late.until(job.top)
                    await admin.execute_command("ACL", "SETUSER", "default", "+subscribe")  # type: ignore[no-untyped-call]
                    await until_status(client, 200, "ok")
                    await job.deltas("live", "again")
                    await job.end()
                    for one in (reader, late):
                        messages, code = await one.until_closed()
                        assert (numbers(messages)[-1], code) == (job.top, 1000)
        assert "Traceback" not in relay.log


class Heard:
    """A listener."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.reconnections = 0
        self.news = asyncio.Event()

    def received(self, payload: bytes) -> None:
        self.payloads.append(payload)

    def flush(self) -> None:
        self.news.set()

    def reconnected(self) -> None:
        self.reconnections += 1
        self.news.set()


@asynccontextmanager
async def feed_through(url: str, commands_url: str) -> AsyncIterator[Feed]:
    commands = RedisClient(commands_url, name="commands")
    feed = Feed(url, commands, "dw:probe:test")
    try:
        await feed.start()
        yield feed
    finally:
        await feed.close()
        await commands.aclose()


def feed_delivers(feed: Feed) -> Callable[[], Awaitable[bool]]:
    async def is_delivering() -> bool:
        return feed.is_delivering

    return is_delivering


@asynccontextmanager
async def feed_behind_a_proxy(
    redis_url: str, redis_server: RedisServer
) -> AsyncIterator[tuple[TcpProxy, Feed, Heard, Any]]:  # redis-py's client is loosely typed
    """A feed that delivers through a proxy, the listener on its channel, and who publishes there."""
    heard = Heard()
    async with (
        asyncio.timeout(WAIT_S),
        tcp_proxy(redis_server.port) as proxy,
        feed_through(f"redis://127.0.0.1:{proxy.port}/0", redis_url) as feed,
        redis.asyncio.Redis.from_url(redis_url) as publisher,
    ):
        await feed.subscribe("job", heard)
        await until(feed_delivers(feed))
        yield proxy, feed, heard, publisher


async def test_a_half_open_feed_is_found_and_made_anew(
    redis_url: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection stays open and nothing comes through: the probe that left by another way shows it."""
    monkeypatch.setattr(feed_module, "PROBE_INTERVAL_S", 0.1)
    monkeypatch.setattr(feed_module, "PROBE_TIMEOUT_S", 1.0)
    async with feed_behind_a_proxy(redis_url, redis_server) as (proxy, feed, heard, publisher):
        before = heard.reconnections
        proxy.freeze()
        await publisher.publish("job", "unheard")
        while heard.reconnections == before:
            heard.news.clear()
            await heard.news.wait()
        assert proxy.connections >= 2
        await until(feed_delivers(feed))

        async def is_heard() -> bool:
            await publisher.publish("job", "heard")
            return b"heard" in heard.payloads

        await until(is_heard)
        assert b"unheard" not in heard.payloads


async def test_without_probes_a_half_open_feed_is_believed_in(
    redis_url: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative twin: TCP alone notices nothing while the same messages are lost."""
    monkeypatch.setattr(feed_module, "PROBE_INTERVAL_S", 3_600)
    async with feed_behind_a_proxy(redis_url, redis_server) as (proxy, feed, heard, publisher):
        proxy.freeze()
        await publisher.publish("job", "unheard")
        async with feed_through(redis_url, redis_url) as other:
            witness = Heard()
            await other.subscribe("job", witness)
            await publisher.publish("job", "unheard")
            await witness.news.wait()
        assert feed.is_delivering
        assert heard.payloads == []
        assert proxy.connections == 1


# A Redis that fails.


async def test_readiness_over_an_outage(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """ok, degraded, 503, and ok again; meanwhile new requests are refused at once (§5.5)."""
    monkeypatch.setattr(server_module, "UNREADY_AFTER_S", 6.0)
    monkeypatch.setattr(health_module, "DEGRADED_AFTER_S", 1.0)
    # Whoever waited for Redis would wait for longer than this test.
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", 3_600)
    monkeypatch.setattr(hub_module, "OPEN_TIMEOUT_S", 3_600)
    async with (
        relay_in_process(own_redis.url, monkeypatch) as address,
        http_client(base_url=f"http://{address}") as client,
    ):
        await until_status(client, 200, "ok")
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            await until_status(client, 200, "degraded")
            await until_status(client, 503, "redis_unavailable")
            for path in ("/v1/jobs/a", "/v1/jobs/a/events"):
                answer = await client.get(path)
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "redis_unavailable"
                assert int(answer.headers["Retry-After"]) >= 1
            async with websocket(f"ws://{address}/v1/jobs/a/ws") as refused:
                messages, code = await refused.until_closed()
                assert (messages[-1]["error"]["code"], code) == ("redis_unavailable", 4003)
                assert messages[-1]["error"]["retry_after_s"] > 0
            assert (await client.get("/healthz")).status_code == 200
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
        await until_status(client, 200, "ok")
        assert (await client.get("/v1/jobs/a")).status_code == 404


async def test_readers_outlive_a_redis_that_sleeps(own_redis: RedisServer) -> None:
    """A stall of seconds delays events and loses none; whoever has a hub may still come in."""
    with RelayProcess(own_redis.url) as relay:
        async with producer(own_redis.url) as jobs:
            job = await jobs.running("a")
            async with watched(relay.websocket_url, job) as reader:
                await job.deltas("live")
                await reader.until(job.top)
                os.kill(own_redis.pid, signal.SIGSTOP)
                try:
                    await asyncio.sleep(3)
                    async with watched(relay.websocket_url, job, starting_after=job.top - 1):
                        pass
                finally:
                    os.kill(own_redis.pid, signal.SIGCONT)
                await job.deltas("b")
                await job.end()
                messages, code = await reader.until_closed()
                assert (numbers(messages), code) == ([job.top - 1, job.top], 1000)
        assert "Traceback" not in relay.log


# A Redis that forgets.


async def heal(
    client: redis.asyncio.Redis, jobs: Producer, job: ProducedJob, kept: dict[Any, Any], through: int
) -> None:
    """As a worker does it: the record, and a snapshot in the place of the log's beginning."""
    fold = LogFold()
    for line in job.lines[:through]:
        fold.add(line)
    keys = jobs.log.keys.job(job.job_id)
    snapshot = encode_snapshot(
        job.job_id, through, attempt=job.attempt, created_at=time.time(), fold=fold.fold.state()
    )
    async with client.pipeline(transaction=True) as pipeline:
        pipeline.hset(keys.meta, mapping=kept)
        pipeline.xadd(keys.log, {"e": snapshot}, id=f"{through}-0")
        for number, line in enumerate(job.lines[through:], through + 1):
            pipeline.xadd(keys.log, {"e": line}, id=f"{number}-0")
        await pipeline.execute()


async def test_readers_of_a_log_that_is_lost_and_healed(own_redis: RedisServer) -> None:
    """A live reader notices nothing; who comes after gets a snapshot, or exactly the rest (§6.3)."""
    with RelayProcess(own_redis.url) as relay, RelayProcess(own_redis.url) as second:
        async with (
            producer(own_redis.url) as jobs,
            redis.asyncio.Redis.from_url(own_redis.url) as client,
        ):
            job = await jobs.running(*"abcdef")
            kept = await client.hgetall(jobs.log.keys.job(job.job_id).meta)
            async with watched(relay.websocket_url, job) as reader:
                await client.flushall()
                await asyncio.sleep(1)
                await heal(client, jobs, job, kept, through=5)
                await job.deltas("g")
                assert numbers(await reader.until(job.top)) == [job.top]
                for url in (relay.websocket_url, second.websocket_url):
                    async with websocket(f"{url}/v1/jobs/{job.job_id}/ws?starting_after=2") as late:
                        messages = [await late.receive()]
                        while messages[-1].get("sequence_number", 0) < job.top:
                            messages.append(await late.receive())
                    resumed = [message for message in messages if message["type"] == "subscribed"][-1]
                    if resumed["recovered"]:
                        assert numbers(messages) == list(range(3, job.top + 1))  # from the hub's memory
                    else:
                        snapshot = next(message for message in messages if message["type"] == "snapshot")
                        rest = list(range(snapshot["sequence_number"] + 1, job.top + 1))
                        assert (numbers(messages), snapshot["sequence_number"] >= 5) == (rest, True)
                    async with websocket(f"{url}/v1/jobs/{job.job_id}/ws?starting_after=5") as late:
                        messages = await late.until(job.top)
                    assert messages[0]["recovered"]
                    assert numbers(messages) == list(range(6, job.top + 1))
                await job.end()
                assert numbers((await reader.until_closed())[0]) == [job.top]
        assert "Traceback" not in relay.log + second.log


async def test_readers_of_a_job_that_is_lost_for_good(own_redis: RedisServer) -> None:
    """No worker heals it: `failed: state_lost` with the next number, by either door's rules (§4.2)."""
    with RelayProcess(own_redis.url) as relay:
        async with (
            producer(own_redis.url) as jobs,
            redis.asyncio.Redis.from_url(own_redis.url) as client,
            asyncio.timeout(2 * WAIT_S),
        ):
            job = await jobs.running(*"abc")
            async with watched(relay.websocket_url, job) as reader:
                await client.flushall()
                messages: list[Message] = []
                while not messages or not is_event(messages[-1]):
                    with contextlib.suppress(TimeoutError):
                        messages.append(await reader.receive())
                event = messages[-1]
                assert (event["type"], event["sequence_number"]) == ("failed", job.top + 1)
                assert (event["error"]["code"], event["source"]) == ("state_lost", "relay")
                _, code = await reader.until_closed()
                assert code == 1000
            async with http_client(base_url=relay.url) as http:
                assert (await http.get(f"/v1/jobs/{job.job_id}")).status_code == 404
        assert "Traceback" not in relay.log


# Jobs that end when nobody watches.


@pytest.mark.parametrize("cause", ["drain", "lost feed"])
async def test_a_watched_job_is_marked(own_redis: RedisServer, cause: str) -> None:
    """A relay that stops, or cannot listen, says that its job is watched; one that listens says nothing."""
    with RelayProcess(own_redis.url) as relay:
        async with (
            producer(own_redis.url) as jobs,
            redis.asyncio.Redis.from_url(own_redis.url) as client,
        ):
            job = await jobs.running("a")
            keys = jobs.log.keys.job(job.job_id)
            options = msgspec.structs.replace(Options(), on_abandon="cancel")
            await client.hset(keys.meta, "options", msgspec.json.encode(options))
            async with watched(relay.websocket_url, job):
                assert not await client.exists(keys.watched)
                if cause == "drain":
                    relay.terminate()
                else:
                    await client.execute_command("ACL", "SETUSER", "default", "-subscribe")  # type: ignore[no-untyped-call]
                    await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]

                async def is_marked() -> bool:
                    return bool(await client.exists(keys.watched))

                await until(is_marked)
                assert 0 < await client.ttl(keys.watched) <= 60


@pytest.mark.parametrize("status", ["in_progress", "queued"])
async def test_a_watched_job_is_ended_without_any_hint(
    own_redis: RedisServer, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hub sees that nobody looks after it, where the sets across jobs do not know it (§2.4)."""
    monkeypatch.setattr("tests.support.readers.WAIT_S", 2 * WAIT_S)
    with RelayProcess(own_redis.url) as relay:
        async with producer(own_redis.url) as jobs, redis.asyncio.Redis.from_url(own_redis.url) as admin:
            job = await (jobs.running("a") if status == "in_progress" else jobs.queued())
            keys = jobs.log.keys
            await admin.delete(keys.queued)
            async with watched(relay.websocket_url, job) as reader:
                if status == "in_progress":
                    await admin.hset(keys.job(job.job_id).meta, "lease_until", 1)
                else:
                    await admin.hset(keys.job(job.job_id).meta, "created_at", time.time() - 7_200)
                last = (await reader.until_terminal())[-1]
                assert last["error"]["code"] == (
                    "worker_lost" if status == "in_progress" else "queue_timeout"
                )
