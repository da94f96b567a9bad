"""What the SDK's callers do not see: connections that break, relays that go, credentials that expire."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.server import ServerConnection, serve

import deltawire
from deltawire.client import following
from deltawire.events import Event
from deltawire.messages import Snapshot
from deltawire.redis_server import RedisServer, free_port
from deltawire.tokens import mint, new_claims, sign
from deltawire_relay import admissions as admissions_module
from tests.support.producer import Producer
from tests.support.relay_process import RelayProcess, relay_in_process
from tests.support.system import eventually
from tests.support.tcp_proxy import tcp_proxy

CUTS: Final = 100
SECRET: Final = "0123456789abcdef0123456789abcdef"
Seen = list[Event | Snapshot]


class Reader:
    """Reads a job as one kind of client does; `seen` grows meanwhile."""

    def __init__(self, kind: str, transport: Any) -> None:
        self.kind = kind
        self.transport = transport
        self.seen: Seen = []

    async def read(self, url: str, job_id: str, api_key: Any = None) -> None:
        """In a thread where it is blocking, since what cuts runs in the loop."""
        if self.kind == "sync":
            await asyncio.to_thread(self._read, url, job_id, api_key)
            return
        async with deltawire.AsyncClient(url, api_key=api_key, transport=self.transport) as client:
            async for event in client.events(job_id):
                self.seen.append(event)

    def _read(self, url: str, job_id: str, api_key: Any) -> None:
        with deltawire.Client(url, api_key=api_key, transport=self.transport) as client:
            for event in client.events(job_id):
                self.seen.append(event)

    @property
    def numbers(self) -> list[int]:
        return [event.sequence_number for event in self.seen]


KINDS: Final = ("sync-websocket", "sync-sse", "async-websocket", "async-sse")


@pytest.fixture(params=KINDS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return Reader(*request.param.split("-"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes back at once, so that a hundred times take seconds."""
    monkeypatch.setattr(following, "BACKOFF_MAX_S", 0.01)


@pytest.mark.usefixtures("impatient")
async def test_a_hundred_cuts_in_one_stream_are_not_seen(
    relay: RelayProcess, jobs: Producer, reader: Reader
) -> None:
    """At any moment of a connection's life: every event comes once, and in order (PROTOCOL §4, §6.4)."""
    job = await jobs.running()
    randomness = random.Random(11)
    async with tcp_proxy(urlsplit(relay.url).port or 0) as proxy:

        async def cut() -> None:
            while proxy.connections <= CUTS:
                await asyncio.sleep(randomness.uniform(0, 0.03))
                proxy.cut()

        async def produce() -> None:
            while proxy.connections <= CUTS:
                await job.deltas(*(f"{job.top + number} " for number in range(randomness.randint(1, 4))))
                await asyncio.sleep(randomness.uniform(0, 0.01))
            await job.end()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(cut())
            tasks.create_task(produce())
            tasks.create_task(reader.read(f"http://127.0.0.1:{proxy.port}", job.job_id))
    assert reader.numbers == list(range(1, job.top + 1))


@pytest.mark.parametrize("reader", [KINDS[0], KINDS[3]], indirect=True)  # each takes the seconds of a drain
async def test_a_relay_that_restarts_is_not_seen(
    redis_server: RedisServer, jobs: Producer, reader: Reader
) -> None:
    """It says goodbye and when to come; for as long as it is away the client tries again."""
    job = await jobs.running("one ")
    with RelayProcess(redis_server.url) as relay:
        reading = asyncio.create_task(reader.read(relay.url, job.job_id))
        await eventually(lambda: len(reader.seen) == job.top)
        await asyncio.to_thread(relay.stop)
        await job.deltas("two ")
        await asyncio.to_thread(relay.start)
        await eventually(lambda: len(reader.seen) == job.top)
        await job.end()
        await reading
    assert reader.numbers == list(range(1, job.top + 1))


@asynccontextmanager
async def expiring(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """A relay, a job, two tokens for it, and what makes the first one expire."""
    monkeypatch.setattr(admissions_module, "LOOK_INTERVAL_S", 0.05)
    job = await jobs.running("one ")
    async with relay_in_process(redis_server.url, monkeypatch, jwt_secrets=(SECRET,)) as address:
        short, long = (mint(SECRET, subject="u", jobs=[job.job_id], ttl_s=ttl_s) for ttl_s in (900, 7_200))
        an_hour_on = SimpleNamespace(time=lambda: job.events[0]["created_at"] + 3_600)
        yield SimpleNamespace(
            url=f"http://{address}",
            job=job,
            tokens=[short, long],
            expire=lambda: monkeypatch.setattr(admissions_module, "time", an_hour_on),
        )


async def test_a_credential_that_expires_in_mid_stream_is_asked_for_again(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    """After 4005, or `token_expired` on an event stream; the caller sees neither."""
    async with expiring(redis_server, jobs, monkeypatch) as case:
        left = list(case.tokens)
        reading = asyncio.create_task(reader.read(case.url, case.job.job_id, lambda: left.pop(0)))
        await eventually(lambda: len(reader.seen) == case.job.top)
        case.expire()
        await eventually(lambda: not left, what="the second token")
        await case.job.end()
        await reading
        assert reader.numbers == list(range(1, case.job.top + 1))


async def test_a_credential_that_cannot_be_renewed_ends_with_its_time(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    """At once, and by its own error: to come back with it would be of no use."""
    async with expiring(redis_server, jobs, monkeypatch) as case:
        reading = asyncio.create_task(reader.read(case.url, case.job.job_id, case.tokens[0]))
        await eventually(lambda: len(reader.seen) == case.job.top)
        case.expire()
        with pytest.raises(deltawire.AuthenticationError) as caught:
            await reading
        assert caught.value.error is not None
        assert caught.value.error.code == "token_expired"


async def test_a_credential_that_stays_bad_is_asked_for_twice(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    """An expired token that comes again is no reason to try for ever."""
    expired = sign(new_claims(subject="u", jobs=["*"], now=time.time() - 36_000), SECRET)
    asked: list[str] = []

    def api_key() -> str:
        asked.append(expired)
        return expired

    async with relay_in_process(redis_server.url, monkeypatch, jwt_secrets=(SECRET,)) as address:
        with pytest.raises(deltawire.AuthenticationError):
            await reader.read(f"http://{address}", "job", api_key)
    assert len(asked) == 2


async def test_a_connection_that_says_nothing_is_left(
    relay: RelayProcess, jobs: Producer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-open: nothing ends it, but no heartbeat comes either."""
    for module in ("sync_connections", "async_connections"):
        monkeypatch.setattr(f"deltawire.client.{module}.SILENCE_S", 0.5)
    job = await jobs.running("one ")
    async with tcp_proxy(urlsplit(relay.url).port or 0) as proxy:
        reading = asyncio.create_task(reader.read(f"http://127.0.0.1:{proxy.port}", job.job_id))
        await eventually(lambda: len(reader.seen) == job.top)
        proxy.freeze()
        await job.deltas("two ")
        await job.end()
        await reading
        assert proxy.connections >= 2
    assert reader.numbers == list(range(1, job.top + 1))


async def test_a_relay_that_stays_away_is_given_up(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever (PROTOCOL §4.4)."""
    monkeypatch.setattr(following, "GIVE_UP_AFTER_S", 0.2)
    with pytest.raises(deltawire.UnreachableError, match="cannot be reached"):
        await reader.read(f"http://127.0.0.1:{free_port()}", "job")


async def test_a_reader_that_is_slow_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience counts from the first failure, not from the last event."""
    monkeypatch.setattr(following, "GIVE_UP_AFTER_S", 1.5)
    lines = [
        b'{"type":"queued","job_id":"j","sequence_number":1,"attempt":0,"created_at":1.0}',
        b'{"type":"in_progress","job_id":"j","sequence_number":2,"attempt":1,"created_at":1.0,'
        b'"upstream":"default","model":"m"}',
    ]
    said = iter(lines)

    async def one_each(connection: ServerConnection) -> None:
        await connection.send(next(said).decode())
        connection.transport.abort()

    async with serve(one_each, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with deltawire.AsyncClient(f"http://127.0.0.1:{port}") as client:
            events = client.events("j")
            assert (await anext(events)).sequence_number == 1
            await asyncio.sleep(2.0)
            assert (await anext(events)).sequence_number == 2
            await events.aclose()
