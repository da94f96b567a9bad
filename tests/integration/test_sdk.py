"""The SDK against a real relay, with jobs whose logs the test writes."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import httpx
import pytest

import deltawire
from deltawire.client import following
from deltawire.events import Delta, Event
from deltawire.messages import Snapshot
from deltawire.redis_server import RedisServer
from deltawire.tokens import mint
from tests.support.producer import Producer
from tests.support.relay_process import Keyring, RelayProcess
from tests.support.system import eventually
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

TRANSPORTS: Final = ("websocket", "sse")
ENDS: Final = {
    "failed": deltawire.JobFailedError,
    "cancelled": deltawire.JobCancelledError,
    "incomplete": deltawire.JobIncompleteError,
}
SECRET: Final = "0123456789abcdef0123456789abcdef"


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Any:
    return request.param


@asynccontextmanager
async def proxy_of(relay: RelayProcess) -> AsyncIterator[TcpProxy]:
    """Between client and relay: it knows what is open."""
    async with tcp_proxy(urlsplit(relay.url).port or 0) as proxy:
        yield proxy


def url_of(proxy: TcpProxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


@pytest.mark.parametrize("kind", ENDS)
async def test_a_job_that_has_not_completed_is_an_error_with_its_result(
    relay: RelayProcess, jobs: Producer, kind: str
) -> None:
    """`result` raises, `wait` tells; both have what there is of the answer."""
    job = await jobs.ended("one ", kind=kind)
    async with deltawire.AsyncClient(relay.url) as client:
        result = await client.job(job.job_id).wait()
        with pytest.raises(ENDS[kind]) as caught:
            await client.job(job.job_id).result()
    assert isinstance(caught.value, deltawire.JobEndedError)
    assert caught.value.result == result
    assert (result.status, result.text) == (kind, "the whole text")
    said = {"failed": result.error, "cancelled": result.cancel, "incomplete": result.incomplete_details}
    assert {name for name, what in said.items() if what is not None} == {kind}


async def test_a_wait_ends_with_its_time(relay: RelayProcess, jobs: Producer, transport: Any) -> None:
    """By an error that is a TimeoutError, too; the job goes on, and can be waited for again."""
    job = await jobs.running("one ")
    with deltawire.Client(relay.url, transport=transport) as client:
        with pytest.raises(deltawire.WaitTimeoutError, match=r"0\.2 s") as caught:
            await asyncio.to_thread(client.job(job.job_id).wait, 0.2)
        assert isinstance(caught.value, TimeoutError)
    async with deltawire.AsyncClient(relay.url, transport=transport) as aclient:
        handle = aclient.job(job.job_id)
        with pytest.raises(deltawire.WaitTimeoutError, match=r"0\.2 s"):
            await handle.result(timeout_s=0.2)
        await job.end()
        assert (await handle.result(timeout_s=30)).status == handle.status == "completed"


async def test_a_callers_own_timeout_stays_its_own(relay: RelayProcess, jobs: Producer) -> None:
    """`asyncio.timeout` around a wait is told by its own error, and what a callback raises comes through."""
    job = await jobs.running("one ")
    async with deltawire.AsyncClient(relay.url) as client:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await client.job(job.job_id).wait(timeout_s=30)
        assert not isinstance(caught.value, deltawire.WaitTimeoutError)

        def fail(_: object) -> None:
            raise TimeoutError("mine")

        with pytest.raises(TimeoutError, match="mine"):
            await client.job(job.job_id).wait(timeout_s=30, on_event=fail)


async def test_progress_is_told_by_every_event(relay: RelayProcess, jobs: Producer, transport: Any) -> None:
    """Each once, and in order; of an async client the callback may be a coroutine function."""
    job = await jobs.ended("one ", "two ")
    seen: list[int] = []
    with deltawire.Client(relay.url, transport=transport) as client:

        def note(event: Event | Snapshot) -> None:
            seen.append(event.sequence_number)

        await asyncio.to_thread(client.job(job.job_id).wait, on_event=note)
    assert seen == list(range(1, job.top + 1))
    seen.clear()
    async with deltawire.AsyncClient(relay.url, transport=transport) as aclient:

        async def anote(event: Event | Snapshot) -> None:
            await asyncio.sleep(0)
            seen.append(event.sequence_number)

        await aclient.job(job.job_id).wait(on_event=anote)
    assert seen == list(range(1, job.top + 1))


async def test_a_result_has_what_the_terminal_event_had_no_room_for(
    relay: RelayProcess, jobs: Producer
) -> None:
    """It is asked for at the job's address; and so is metadata that this process does not know."""
    job = jobs.job()
    await job.submit(metadata={"message": "7"})
    await job.claim()
    await job.deltas("one ", "two")
    await job.end(completion=None, completion_url=f"/v1/jobs/{job.job_id}")
    async with deltawire.AsyncClient(relay.url) as client:
        result = await client.job(job.job_id).result()
        async with client.job(job.job_id).stream() as stream:
            async for _ in stream:
                pass
    assert (result.text, result.metadata) == ("one two", {"message": "7"})
    assert stream.result is not None
    assert stream.result.text == "one two"


async def test_a_result_that_is_known_is_not_asked_for(relay: RelayProcess, jobs: Producer) -> None:
    """Whoever has read the text of a job that it has submitted has its result as well."""
    request = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}

    def read(job: deltawire.Job) -> deltawire.Result:
        assert list(job.text()) == ["one "]
        return job.result()

    async def produce(job_id: str) -> None:
        job = jobs.job(job_id)
        await job.adopt()
        await job.deltas("one ")
        await job.end()

    async with proxy_of(relay) as proxy:
        with deltawire.Client(url_of(proxy)) as client:
            job = await asyncio.to_thread(client.submit, request)
            _, result = await asyncio.gather(produce(job.id), asyncio.to_thread(read, job))
        async with deltawire.AsyncClient(url_of(proxy)) as aclient:
            ajob = await aclient.submit(request)
            await produce(ajob.id)
            assert [text async for text in ajob.text()] == ["one "]
            assert (await ajob.result()).text == result.text == "the whole text"
        assert proxy.connections == 4  # two for commands, two for events


async def test_a_result_that_cannot_be_asked_for_is_given_up(
    relay: RelayProcess, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end was heard, and then the relay stays away: nobody waits for ever (PROTOCOL §4.4)."""
    job = await jobs.ended("one ")

    def nobody(*_: object, **__: object) -> NoReturn:
        raise httpx.ReadError("")

    monkeypatch.setattr(following, "GIVE_UP_AFTER_S", 0.2)
    monkeypatch.setattr(httpx.Client, "request", nobody)
    monkeypatch.setattr(httpx.AsyncClient, "request", nobody)
    client = deltawire.Client(relay.url)
    with client, pytest.raises(deltawire.UnreachableError, match="cannot be reached"):
        await asyncio.to_thread(client.job(job.job_id).wait)
    async with deltawire.AsyncClient(relay.url) as aclient:
        with pytest.raises(deltawire.UnreachableError, match="cannot be reached"):
            await aclient.job(job.job_id).wait()


async def test_a_stream_adds_up_what_came(relay: RelayProcess, jobs: Producer, transport: Any) -> None:
    """`completion` grows with each event, after a snapshot too; `position` is where to go on."""
    job = await jobs.running("one ", "two ")
    async with deltawire.AsyncClient(relay.url, transport=transport) as client:
        async with client.job(job.job_id).stream(snapshot=True) as stream:
            first = await anext(stream)
            assert isinstance(first, Snapshot)
            assert (first.sequence_number, stream.position) == (job.top, job.top)
            assert stream.completion is not None
            assert stream.completion["choices"][0]["message"]["content"] == "one two "
            await job.deltas("three")
            assert isinstance(await anext(stream), Delta)
            assert stream.completion["choices"][0]["message"]["content"] == "one two three"
            assert stream.result is None
        await job.end()
        rest = [event async for event in client.job(job.job_id).stream(stream.position)]
        assert [event.sequence_number for event in rest] == [job.top]
        # Behind the end there is nothing, and that is no error.
        assert [event async for event in client.events(job.job_id, starting_after=job.top)] == []


async def test_what_is_left_early_leaves_nothing_open(
    relay: RelayProcess, jobs: Producer, transport: Any
) -> None:
    """A loop that breaks ends its connection, and so does a `with`; no task and no thread stays."""
    job = await jobs.running("one ", "two ")
    threads, tasks = threading.active_count(), len(asyncio.all_tasks())

    def leave(url: str) -> None:
        with deltawire.Client(url, transport=transport) as client:
            for _ in client.job(job.job_id).text():
                break
            for _ in client.events(job.job_id):
                break
            with client.job(job.job_id).stream() as stream:
                next(stream)
            assert list(stream) == []
            with pytest.raises(deltawire.WaitTimeoutError):
                client.job(job.job_id).wait(0.1)

    async with proxy_of(relay) as proxy:
        before = len(asyncio.all_tasks())
        await asyncio.to_thread(leave, url_of(proxy))
        async with deltawire.AsyncClient(url_of(proxy), transport=transport) as client:
            async for _ in client.job(job.job_id).text():
                break
            async for _ in client.events(job.job_id):
                break
            async with client.job(job.job_id).stream() as stream:
                await anext(stream)
            assert [event async for event in stream] == []
            reading = asyncio.create_task(client.job(job.job_id).wait())
            await eventually(lambda: proxy.connections >= 8)
            reading.cancel()
            await asyncio.wait([reading])
            await eventually(lambda: proxy.open == 0, what="all connections to be closed")
        await eventually(lambda: len(asyncio.all_tasks()) == before)
    await eventually(lambda: len(asyncio.all_tasks()) == tasks)
    await eventually(lambda: threading.active_count() <= threads + 1, what="threads, but asyncio's own")


READ_ON: Final = """
import sys, threading, deltawire
with deltawire.Client(sys.argv[1], transport=sys.argv[2]) as client:
    job = client.job(sys.argv[3])
    numbers = []
    try:
        with job.stream() as stream:
            for event in stream:
                numbers.append(event.sequence_number)
                print(event.sequence_number, flush=True)
    except KeyboardInterrupt:
        numbers += [event.sequence_number for event in job.stream(numbers[-1])]
    assert numbers == list(range(1, numbers[-1] + 1)), numbers
print("threads", threading.active_count())
"""


async def test_an_interrupted_reader_can_go_on(relay: RelayProcess, jobs: Producer, transport: Any) -> None:
    """Ctrl-C is heard while it waits, closes the connection, and loses nothing."""
    job = await jobs.running("one ", "two ")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", READ_ON, relay.url, transport, job.job_id),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONDEVMODE": "1"},
    )
    assert process.stdout is not None
    for number in range(1, job.top + 1):
        assert await process.stdout.readline() == b"%d\n" % number
    process.send_signal(signal.SIGINT)
    await job.deltas("three")
    await job.end()
    said = await process.stdout.read()
    assert await process.wait() == 0, said.decode()
    assert said.endswith(b"threads 1\n"), said.decode()


async def test_each_refusal_is_an_error_of_its_own(redis_server: RedisServer, jobs: Producer) -> None:
    """By what a caller would do about it; all are a JobUnavailableError with the relay's words."""
    keys = Keyring(acme=("acme", ["submit"]), backend=("acme", ["tokens", "read"]), other=("other", ["read"]))
    job = await jobs.running("one ", tenant="acme")
    environment = {"DELTAWIRE_API_KEYS": keys.text, "DELTAWIRE_JWT_SECRET": SECRET}
    request = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}

    async def refused(
        call: Callable[[deltawire.AsyncClient], Any], key: str, transport: Any = "websocket"
    ) -> Any:
        async with deltawire.AsyncClient(relay.url, api_key=key, transport=transport) as client:
            with pytest.raises(deltawire.JobUnavailableError) as caught:
                await call(client)
            assert caught.value.error is not None
            return type(caught.value), caught.value.error.code

    async def read(client: deltawire.AsyncClient) -> None:
        async for _ in client.events(job.job_id):
            pass

    with RelayProcess(redis_server.url, environment) as relay:
        submit, retrieve = lambda client: client.submit(request), lambda client: client.retrieve(job.job_id)
        assert await refused(submit, "dw_nobody") == (deltawire.AuthenticationError, "invalid_credentials")
        assert await refused(submit, keys["other"]) == (deltawire.PermissionDeniedError, "forbidden")
        assert await refused(retrieve, keys["other"]) == (deltawire.NotFoundError, "unknown_job")
        bad = await refused(lambda client: client.submit({"model": "m"}), keys["acme"])
        assert bad == (deltawire.InvalidRequestError, "invalid_request")
        for transport in TRANSPORTS:
            unknown = await refused(read, "dw_nobody", transport)
            assert unknown == (deltawire.AuthenticationError, "invalid_credentials")
            assert (await refused(read, keys["acme"], transport))[0] is deltawire.PermissionDeniedError
            # A token for the job opens it, whatever the client's own key may do.
            token = mint(
                SECRET, subject="u", jobs=[job.job_id], tenant="acme", capabilities=["read", "cancel"]
            )
            async with deltawire.AsyncClient(relay.url, api_key=keys["other"], transport=transport) as client:
                handle = client.job(job.job_id, token=token)
                assert (await handle.retrieve())["status"] == "in_progress"
                async for text in handle.text():
                    assert text == "one "
                    break
            # A page's EventSource gets an address that opens this job, and no other.
            async with deltawire.AsyncClient(relay.url, api_key=keys["backend"]) as client:
                address = await client.job(job.job_id).ticket_url("user-5", snapshot=True)
            with deltawire.Client(relay.url, api_key=keys["backend"]) as blocking:
                other = await asyncio.to_thread(blocking.job(job.job_id).ticket_url, ttl_s=60)
            for url in (address, other):
                async with httpx.AsyncClient() as page, page.stream("GET", url) as stream:
                    assert stream.status_code == 200
                    assert ("mode=snapshot" in url) == (url == address)
        # What a token submits it reads by the token of the answer.
        token = mint(SECRET, subject="u", jobs=[], tenant="acme", capabilities=["submit", "read", "cancel"])
        async with deltawire.AsyncClient(relay.url, api_key=token) as client:
            made = await client.submit(request)
            assert made.token
            assert (await made.cancel()).status == "cancelled"
            assert (await made.wait(30)).status == "cancelled"
