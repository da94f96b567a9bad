"""What the SDK's callers do not see of commands: answers that are lost, relays that are away or too busy."""

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import httpx
import msgspec
import pytest

import deltawire
from deltawire.errors import WireError
from deltawire.keys import RANDOM_KEY
from deltawire.redis_server import free_port
from tests.support.relay_process import Keyring, RelayProcess
from tests.support.system import System, eventually, request
from tests.support.tcp_proxy import Filter, TcpProxy, tcp_proxy

REQUEST: Final = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
KEYS: Final = Keyring(backend=("acme", ["submit", "read", "cancel", "list"]))
KEYED: Final = {"DELTAWIRE_API_KEYS": KEYS.text, "DELTAWIRE_JWT_SECRET": "0123456789abcdef0123456789abcdef"}
Answer = tuple[int, dict[str, str], Any]


@pytest.fixture(params=[deltawire.Client, deltawire.AsyncClient])
def client_class(request: pytest.FixtureRequest) -> Any:
    return request.param


async def of(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a method of either client returns; a blocking one is called in a thread."""
    if inspect.iscoroutinefunction(call):
        return await call(*arguments, **named)
    return await asyncio.to_thread(call, *arguments, **named)


async def close(client: Any) -> None:
    await of(client.aclose if isinstance(client, deltawire.AsyncClient) else client.close)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """With two relays, that say by a token what a handle is good for."""
    with System(relays=2, relay_environment=KEYED) as system:
        yield system


@asynccontextmanager
async def forgetful(ports: list[int], loses: int = 1) -> AsyncIterator[TcpProxy]:
    """A balancer of relays that loses the first answers: the relay has given them, and nobody gets them.

    Each connection goes to the next relay.
    """
    lost = 0

    def lose(_: bytes) -> NoReturn:
        nonlocal lost
        lost += 1
        proxy.target_port = ports[lost % len(ports)]
        raise ConnectionAbortedError  # which ends both halves

    def new_filter() -> Filter:
        return lose if lost < loses else bytes

    async with tcp_proxy(ports[0], new_filter=new_filter) as proxy:
        yield proxy
    assert lost == loses


@pytest.mark.parametrize("key", [None, "the caller's"])
async def test_a_submission_whose_answer_was_lost_is_one_job(
    system: System, client_class: Any, key: str | None
) -> None:
    """Sent again, to another relay: the same id and token, one run, and the handle is good for all."""
    key = key and f"{key} {client_class.__name__}"
    whole = deltawire.AsyncClient(system.relay_url, api_key=KEYS["backend"])
    before = {job["id"] for job in (await whole.list(limit=100))["data"]}
    async with forgetful(system.relay_ports, loses=2) as proxy:
        client = client_class(f"http://127.0.0.1:{proxy.port}", api_key=KEYS["backend"])
        job = await of(client.submit, request(deltas=3), {"metadata": {"a": "b"}}, idempotency_key=key)
        result = await of(job.result, 30)
        await close(client)
    jobs = [job for job in (await whole.list(limit=100))["data"] if job["id"] not in before]
    assert [(shown["id"], shown["status"], shown["attempt"]) for shown in jobs] == [(job.id, "completed", 1)]
    assert result.metadata == {"a": "b"}
    assert re.fullmatch("[0-9a-f]{32}" if key is None else "[0-9a-f]{64}", job.id)
    assert job.urls["self"].endswith(job.id)
    async with deltawire.AsyncClient(system.relay_url, api_key=job.token) as viewer:
        assert (await viewer.retrieve(job.id))["status"] == "completed"
    await whole.aclose()


async def test_each_submission_is_a_job_of_its_own(relay: RelayProcess, client_class: Any) -> None:
    """Also of equal requests: only what is sent again by itself is the same."""
    client = client_class(relay.url)
    jobs = [await of(client.submit, REQUEST) for _ in range(3)]
    assert len({job.id for job in jobs}) == 3
    await close(client)


async def test_a_cancel_whose_answer_was_lost_tells_how_the_job_ended(
    relay: RelayProcess, client_class: Any
) -> None:
    """The second one finds it cancelled, and says nothing of who it was."""
    async with forgetful([relay.port]) as proxy:
        client = client_class(f"http://127.0.0.1:{proxy.port}")
        direct = client_class(relay.url)
        job = await of(direct.submit, REQUEST)
        answer = await of(client.cancel, job.id, reason="mine")
        assert (answer.status, answer.cancelled_from, answer.delivered) == ("cancelled", None, True)
        result = await of(job.wait, 30)
        assert (result.status, result.cancel.reason) == ("cancelled", "mine")
        await close(client)
        await close(direct)


async def test_what_a_lost_answer_has_erased_is_erased(relay: RelayProcess, client_class: Any) -> None:
    """No error, though the relay does not know it any more; but one where nothing was lost."""
    direct = client_class(relay.url)
    job = await of(direct.submit, REQUEST)
    async with forgetful([relay.port]) as proxy:
        client = client_class(f"http://127.0.0.1:{proxy.port}")
        await of(client.delete, job.id)
        await close(client)
    with pytest.raises(deltawire.NotFoundError):
        await of(direct.delete, job.id)
    await close(direct)


async def test_a_relay_that_is_away_for_a_moment_is_waited_for(
    relay: RelayProcess, client_class: Any
) -> None:
    """All commands are sent again, for as often as the caller wants."""
    async with tcp_proxy(free_port()) as proxy:
        client = client_class(f"http://127.0.0.1:{proxy.port}", max_retries=100)

        async def come() -> None:
            await eventually(lambda: proxy.connections >= 3)
            proxy.target_port = relay.port

        coming = asyncio.create_task(come())
        job = await of(client.submit, REQUEST)
        await coming
        assert (await of(client.retrieve, job.id))["status"] == "queued"
        await close(client)


class Desk:
    """Answers HTTP requests with what it is given, one after the other, and notes what they say."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, dict[str, str], bytes]] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.asked.append((head[0], headers, body))
        status, told, said = self._answers.pop(0)
        content = json.dumps(said).encode()
        lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in told.items())]
        lines += ["Connection: close", f"Content-Length: {len(content)}", "", ""]
        writer.write("\r\n".join(lines).encode() + content)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def url_of(desk: Desk) -> AsyncIterator[str]:
    async with await asyncio.start_server(desk.answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def refusal(code: str, **fields: Any) -> Answer:
    """A relay's."""
    error = WireError(code, "no", **fields)
    return error.status, {}, {"error": msgspec.to_builtins(error.error)}


BUSY: Final[Answer] = (503, {}, {})
ACCEPTED: Final[Answer] = (202, {}, {"id": "j", "status": "queued", "token": None, "urls": None})


async def test_a_submission_is_sent_again_as_it_was(client_class: Any) -> None:
    """Under the same key, which is known for a client's own; the credential is the one of the time."""
    credentials = iter(("first", "second", "third"))
    desk = Desk(BUSY, (429, {"Retry-After": "0"}, {}), ACCEPTED)
    async with url_of(desk) as url:
        client = client_class(url, api_key=lambda: next(credentials))
        assert (await of(client.submit, REQUEST)).id == "j"
        await close(client)
    assert len({(line, headers["idempotency-key"], body) for line, headers, body in desk.asked}) == 1
    assert desk.asked[0][1]["idempotency-key"].startswith(RANDOM_KEY)
    assert [headers["authorization"] for _, headers, _ in desk.asked] == [
        "Bearer first",
        "Bearer second",
        "Bearer third",
    ]


@pytest.mark.parametrize(
    ("answers", "options", "error"),
    [
        ([BUSY, BUSY, BUSY], {}, deltawire.ServerError),
        ([BUSY], {"max_retries": 0}, deltawire.ServerError),
        ([refusal("forbidden")], {}, deltawire.PermissionDeniedError),
        ([BUSY, refusal("unknown_job")], {}, deltawire.NotFoundError),
        ([refusal("tenant_queue_full", retry_after_s=11)], {}, deltawire.RateLimitError),
        ([(200, {}, "no relay")], {}, deltawire.ServerError),
    ],
)
async def test_what_cannot_be_helped_is_told(
    client_class: Any, answers: list[Answer], options: dict[str, Any], error: type[Exception]
) -> None:
    """After so many tries as one wants; at once where another would not help, or would come too late."""
    desk = Desk(*answers)
    async with url_of(desk) as url:
        client = client_class(url, **options)
        with pytest.raises(error):
            await of(client.retrieve, "job")
        await close(client)
    assert len(desk.asked) == len(answers)


async def test_what_gives_the_credential_fails_in_its_own_way(client_class: Any) -> None:
    """It may ask somebody else, by httpx, too: that is no relay that is away."""
    asked = []

    def api_key() -> str:
        asked.append(1)
        raise httpx.ConnectError("of the other")

    client = client_class("http://127.0.0.1:9", api_key=api_key)
    with pytest.raises(httpx.ConnectError, match="of the other"):
        await of(client.retrieve, "job")
    assert len(asked) == 1
    await close(client)
