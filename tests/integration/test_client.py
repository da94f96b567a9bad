"""The client against a real relay, through a proxy that cuts its connections."""

import asyncio
import random
from http import HTTPStatus
from urllib.parse import urlsplit

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from deltawire.client import AsyncClient, JobUnavailableError, text_of
from deltawire.errors import ERRORS, WireError
from deltawire.events import Event
from deltawire.messages import ErrorMessage, Snapshot
from deltawire.redis_server import free_port
from tests.support.producer import Producer
from tests.support.relay_process import RelayProcess
from tests.support.system import eventually
from tests.support.tcp_proxy import tcp_proxy

DELTAS = 200
CUT_EVERY = 15
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


async def test_a_caller_sees_every_event_once_however_often_the_connection_breaks(
    relay: RelayProcess, jobs: Producer
) -> None:
    """The client reconnects and resumes by itself (PROTOCOL §6.4)."""
    job = await jobs.running()
    randomness = random.Random(7)
    async with tcp_proxy(urlsplit(relay.url).port or 0) as proxy:

        async def produce() -> None:
            for number in range(DELTAS):
                await job.deltas(f"{number} ")
                if number % CUT_EVERY == 0:
                    # At any moment of a connection's life, but not while there is none to cut.
                    await eventually(lambda: proxy.cut() > 0, what="a connection")
                await asyncio.sleep(randomness.uniform(0, 0.01))
            await job.end()

        producing = asyncio.create_task(produce())
        async with AsyncClient(f"http://127.0.0.1:{proxy.port}") as client:
            events: list[Event | Snapshot] = [event async for event in client.events(job.job_id)]
        await producing
        assert proxy.connections > DELTAS // CUT_EVERY
    assert [event.sequence_number for event in events] == list(range(1, job.top + 1))
    assert "".join(text for event in events for text in text_of(event)).endswith(f"{DELTAS - 1} ")


async def test_a_reader_can_begin_where_it_left_off(relay: RelayProcess, jobs: Producer) -> None:
    """`starting_after` is the last number that it has."""
    job = await jobs.running("a", "b", "c")
    await job.end()
    async with AsyncClient(relay.url) as client:
        events = [event async for event in client.events(job.job_id, starting_after=4)]
    assert [event.sequence_number for event in events] == list(range(5, job.top + 1))


async def test_a_reader_that_lags_may_get_less_and_the_same(relay: RelayProcess, jobs: Producer) -> None:
    """With `merge` the text is the same, in fewer events, and the cursor follows them (PROTOCOL §6.6)."""
    words = [f"{number} " for number in range(DELTAS)]
    job = await jobs.running(*words)
    await job.end()
    async with AsyncClient(relay.url) as client:
        events = [event async for event in client.events(job.job_id, merge=True)]
    assert len(events) < DELTAS / 4
    assert events[-1].sequence_number == job.top
    assert "".join(text for event in events for text in text_of(event)) == "".join(words)


async def test_submit_retrieve_and_cancel(relay: RelayProcess) -> None:
    """The commands, by HTTP."""
    async with AsyncClient(relay.url) as client:
        job = await client.submit(REQUEST, {"metadata": {"a": "b"}}, idempotency_key="once")
        assert (await client.submit(REQUEST, {"metadata": {"a": "b"}}, idempotency_key="once")).id == job.id
        assert (await client.retrieve(job.id))["metadata"] == {"a": "b"}
        result = await client.cancel(job.id, reason="enough")
    assert (result.status, result.cancelled_from, result.delivered) == ("cancelled", "queued", True)


async def test_a_refusal_is_an_error_with_its_code(relay: RelayProcess) -> None:
    """The relay's words, not a status code."""
    async with AsyncClient(relay.url) as client:
        with pytest.raises(JobUnavailableError) as caught:
            await client.submit({"model": "m"})
        assert caught.value.error is not None
        assert caught.value.error.param == "request.messages"
        with pytest.raises(JobUnavailableError) as caught:
            async for _ in client.events("not.a.job.id"):
                pass
        assert caught.value.error is not None
        assert caught.value.error.code == "invalid_job_id"


def refusal(code: str, retry_after_s: float) -> str:
    error = WireError(code, "too much", retry_after_s=retry_after_s).error
    return msgspec.json.encode(ErrorMessage(error=error)).decode()


async def test_a_client_waits_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `Retry-After` before the upgrade, by `retry_after_s` behind it; 4504 is for good (PROTOCOL §5.7)."""
    answers = iter([("429", 7), ("503", 8), ("rate_limited", 9), ("connection_limit", 10)])
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(delay_s: float) -> None:
        is_a_wait = delay_s <= 10  # and not the websockets library's, between two pings
        slept.append(delay_s if is_a_wait else 0)
        await sleep(0 if is_a_wait else delay_s)

    def before(connection: ServerConnection, _: Request) -> Response | None:
        connection.answer = next(answers)  # type: ignore[attr-defined] # for `behind`
        code, wait_s = connection.answer  # type: ignore[attr-defined] # as above
        if not code.isdigit():
            return None
        response = connection.respond(HTTPStatus(int(code)), "")
        response.headers["Retry-After"] = str(wait_s)
        return response

    async def behind(connection: ServerConnection) -> None:
        code, wait_s = connection.answer  # type: ignore[attr-defined] # as above
        await connection.send(refusal(code, wait_s))
        await connection.close(ERRORS[code].close_code or 0, code)

    monkeypatch.setattr("deltawire.client.async_client.asyncio.sleep", note)
    async with serve(behind, "127.0.0.1", 0, process_request=before) as server:
        port = server.sockets[0].getsockname()[1]
        async with AsyncClient(f"http://127.0.0.1:{port}") as client:
            with pytest.raises(JobUnavailableError, match=r"4504.*too much") as caught:
                async for _ in client.events("job"):
                    pass
    assert caught.value.error is not None
    assert caught.value.error.code == "connection_limit"
    assert [delay_s for delay_s in slept if delay_s >= 6] == [7, 8, 9]


async def test_no_relay_is_an_error_that_says_where() -> None:
    """For commands at once."""
    address = f"http://127.0.0.1:{free_port()}"
    async with AsyncClient(address) as client:
        with pytest.raises(JobUnavailableError, match=address):
            await client.submit(REQUEST)


async def test_a_relay_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever (§4.4)."""
    monkeypatch.setattr("deltawire.client.following.GIVE_UP_AFTER_S", 0.2)
    async with AsyncClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(JobUnavailableError, match="cannot be reached"):
            async for _ in client.events("job"):
                pass
