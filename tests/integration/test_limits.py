"""A relay that is full, and clients that want too much: each is refused clearly (PROTOCOL §5.7)."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from deltawire.client import AsyncClient, JobUnavailableError
from deltawire.redis_server import RedisServer
from deltawire_relay import limits, server
from tests.support.producer import REQUEST, Producer
from tests.support.readers import WAIT_S, WebSocketReader, http_client, websocket
from tests.support.relay_process import RelayProcess, relay_in_process
from tests.support.system import eventually
from tests.unit.test_limits import is_empty

PLACES = 6
HEADROOM = limits.MIN_HEADROOM
CHAT = "/v1/chat/completions"
UPGRADE = (
    b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@pytest.fixture(scope="module")
def small(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """It allows little, and takes this machine for a proxy."""
    environment = {
        "DELTAWIRE_MAX_CONNECTIONS": str(PLACES),
        "DELTAWIRE_MAX_CONNECTIONS_PER_IP": "2",
        "DELTAWIRE_MAX_SUBSCRIPTIONS": "2",
        "DELTAWIRE_MESSAGES_PER_S": "1",
        "DELTAWIRE_MAX_MESSAGE_BYTES": "2000",
        "DELTAWIRE_MAX_BODY_BYTES": "2000",
        "DELTAWIRE_TRUSTED_PROXIES": "127.0.0.0/8",
    }
    with RelayProcess(redis_server.url, environment) as process:
        yield process


@pytest.fixture
async def relay(small: RelayProcess) -> RelayProcess:
    """Empty again: all places can be had, one after the other's release."""

    async def is_empty() -> bool:
        async with AsyncExitStack() as stack:
            with suppress(InvalidStatus):
                for _ in range(PLACES):
                    await stack.enter_async_context(websocket(f"{small.websocket_url}/v1/ws"))
                return True
        return False

    await becomes_true(is_empty)
    return small


async def becomes_true(check: Callable[[], Awaitable[bool]]) -> None:
    """What the relay hears of a moment later."""
    async with asyncio.timeout(WAIT_S):
        while not await check():  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(0.02)


def forwarded(address: str) -> dict[str, str]:
    return {"X-Forwarded-For": address}


@asynccontextmanager
async def opened(relay: RelayProcess, address: str, count: int = 1) -> AsyncIterator[list[WebSocketReader]]:
    """WebSockets from an address behind our proxy."""
    async with AsyncExitStack() as stack:
        url = f"{relay.websocket_url}/v1/ws"
        yield [
            await stack.enter_async_context(websocket(url, headers=forwarded(address))) for _ in range(count)
        ]


def check_refusal(response: httpx.Response, status: int, code: str) -> None:
    """The one error shape, and when to come again, in all the words that clients know."""
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["retryable"]) == (code, True)
    assert int(response.headers["Retry-After"]) >= error["retry_after_s"] > 0
    assert response.headers["X-Should-Retry"] == "true"


async def closing_words(reader: WebSocketReader) -> tuple[dict[str, Any], int]:
    messages, code = await reader.until_closed()
    return messages[-1]["error"], code


async def test_a_full_relay_takes_no_more_readers_but_commands(relay: RelayProcess, jobs: Producer) -> None:
    """503 at each door, before the upgrade at the WebSocket's; what is left is for everything else."""
    job = await jobs.running("a")
    events = f"{relay.url}/v1/jobs/{job.job_id}/events"
    async with AsyncExitStack() as stack, http_client() as client:
        for number in range(PLACES - 1):
            [reader] = await stack.enter_async_context(opened(relay, f"192.0.2.{number}"))
        async with client.stream("GET", events) as response:
            assert response.status_code == 200
            check_refusal(await client.get(events), 503, "overloaded")
            check_refusal(await client.post(f"{relay.url}{CHAT}", json=REQUEST), 503, "overloaded")
            with pytest.raises(InvalidStatus) as caught:
                await stack.enter_async_context(opened(relay, "192.0.2.9"))
            answer = caught.value.response
            check_refusal(
                httpx.Response(
                    answer.status_code, headers=[*answer.headers.raw_items()], content=bytes(answer.body)
                ),
                503,
                "overloaded",
            )
            assert (await client.get(f"{relay.url}/readyz")).status_code == 200
            created = await client.post(f"{relay.url}/v1/jobs", json={"request": REQUEST})
            assert created.status_code == 202
        await reader.connection.close()

        async def has_place() -> bool:
            async with client.stream("GET", events) as response:
                return response.status_code == 200

        await becomes_true(has_place)


async def test_bare_connections_are_bounded_too(relay: RelayProcess) -> None:
    """Those that ask for nothing: the next is told 503 and closed at once; when they go all is as before."""
    idle = [await asyncio.open_connection("127.0.0.1", relay.port) for _ in range(PLACES + HEADROOM + 1)]
    try:
        reader, _ = idle[-1]  # they are accepted in their order
        async with asyncio.timeout(WAIT_S):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 5\r\n" in head
        assert json.loads(body)["error"]["code"] == "overloaded"
    finally:
        for _, writer in idle:
            writer.close()

    async def has_room() -> bool:
        async with http_client() as client:
            return (await client.get(f"{relay.url}/healthz")).status_code == 200

    await becomes_true(has_room)


async def test_an_address_behind_a_proxy_has_its_share(relay: RelayProcess, jobs: Producer) -> None:
    """4504 after the upgrade, so that browsers see it, and 429; whatever it writes into X-Forwarded-For."""
    job = await jobs.running("a")
    events = f"{relay.url}/v1/jobs/{job.job_id}/events"
    async with opened(relay, "2001:db8::1", 2), http_client() as client:
        for word in ("2001:db8::2", "192.0.2.7, 2001:db8::1", "127.0.0.1,2001:db8::1", "[2001:db8::9]:443"):
            async with opened(relay, word) as [reader]:
                error, code = await closing_words(reader)
            assert (error["code"], error["retryable"], code) == ("connection_limit", True, 4504)
            assert error["retry_after_s"] > 0
            check_refusal(await client.get(events, headers=forwarded(word)), 429, "connection_limit")
            check_refusal(
                await client.post(f"{relay.url}{CHAT}", json=REQUEST, headers=forwarded(word)),
                429,
                "connection_limit",
            )
        async with opened(relay, "192.0.2.7", 2) as [reader, _]:
            await reader.send("unsubscribe", job_id="none", request_id="r")
            assert (await reader.receive())["request_id"] == "r"


async def test_only_a_trusted_proxys_word_counts(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another peer says in X-Forwarded-For changes nothing, for it or for those it names."""
    trusted = (ip_network("127.0.0.2/32"),)
    async with (
        relay_in_process(
            redis_url, monkeypatch, max_connections_per_ip=1, trusted_proxies=trusted
        ) as address,
        AsyncExitStack() as stack,
    ):

        async def opened_from(host: str) -> WebSocketReader:
            return await stack.enter_async_context(
                websocket(f"ws://{address}/v1/ws", headers=forwarded("192.0.2.1"), local_addr=(host, 0))
            )

        for _ in range(3):
            await opened_from("127.0.0.3")
        reader = await opened_from("127.0.0.2")
        await reader.send("unsubscribe", job_id="none")
        assert (await reader.receive())["error"]["code"] == "not_subscribed"
        error, code = await closing_words(await opened_from("127.0.0.2"))
        assert (error["code"], code) == ("connection_limit", 4504)


async def test_a_socket_has_so_many_subscriptions(relay: RelayProcess, jobs: Producer) -> None:
    """One more is refused, and the socket goes on; one that is given up makes room."""
    names = [(await jobs.running("a")).job_id for _ in range(3)]
    async with opened(relay, "192.0.2.1") as [reader]:
        for name in names[:2]:
            await reader.send("subscribe", job_id=name)
        await reader.send("subscribe", job_id=names[2], request_id="third")
        refused = await reader.receive_type("error")
        assert (refused["error"]["code"], refused["request_id"]) == ("subscription_limit", "third")
        assert not refused["error"]["retryable"]
        await reader.send("unsubscribe", job_id=names[0])
        await reader.send("subscribe", job_id=names[2], request_id="again")
        while (await reader.receive_type("subscribed")).get("request_id") != "again":
            pass


@pytest.mark.parametrize("kind", ["messages", "pings"])
async def test_a_socket_that_says_too_much_is_closed(kind: str, relay: RelayProcess) -> None:
    """A thousand may come at once; the flood after them is 4013, with when to come back."""
    async with opened(relay, "192.0.2.1") as [reader]:
        hear = asyncio.create_task(closing_words(reader))
        message = json.dumps({"type": "unsubscribe", "job_id": "a"})

        async def say(count: int) -> None:
            for _ in range(count):
                if kind == "pings":
                    await reader.connection.ping()
                else:
                    await reader.connection.send(message)

        await say(1_000)
        assert not hear.done()
        with suppress(ConnectionClosed):
            await say(5_000)
        error, code = await hear
    assert (error["code"], error["retryable"], code) == ("rate_limited", True, 4013)
    assert error["retry_after_s"] >= 1


async def test_sizes_are_settings(relay: RelayProcess) -> None:
    """1009 for a message, 413 for a body, whether or not it says its length."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    async with opened(relay, "192.0.2.1") as [reader], http_client() as client:
        await reader.connection.send(" " * 2_001)
        assert (await reader.until_closed())[1] == 1009
        headers = {"Content-Type": "application/json"}
        for content in (b" " * 2_001, pieces()):
            response = await client.post(f"{relay.url}/v1/jobs", content=content, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


async def test_handshakes_that_come_too_fast(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the rate it is 503 before the upgrade; our client waits as it is told, and then is served."""
    async with relay_in_process(redis_url, monkeypatch, handshakes_per_s=1) as address:
        url = f"ws://{address}/v1/ws"
        async with AsyncExitStack() as stack:

            async def connect_too_fast() -> None:
                while True:
                    await stack.enter_async_context(websocket(url))

            with pytest.raises(InvalidStatus) as caught:
                await connect_too_fast()
            assert caught.value.response.status_code == 503
            assert caught.value.response.headers["Retry-After"] == "1"
            slept: list[float] = []
            sleep = asyncio.sleep

            async def note(delay_s: float) -> None:
                slept.append(delay_s)
                await sleep(delay_s)

            monkeypatch.setattr("deltawire.client.async_client.asyncio.sleep", note)
            async with AsyncClient(f"http://{address}") as client:
                with pytest.raises(JobUnavailableError) as refusal:
                    async for _ in client.events("no.job"):
                        pass
            assert refusal.value.error is not None
            assert refusal.value.error.code == "invalid_job_id"
            assert max(slept) >= 1


async def test_nothing_is_counted_when_all_have_gone(
    redis_url: str, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they go: refused, lost in a handshake, a request or a stream, drained."""
    made: list[limits.Limits] = []

    def capture(*args: Any, **kwargs: Any) -> limits.Limits:
        made.append(limits.Limits(*args, **kwargs))
        return made[0]

    monkeypatch.setattr(server, "Limits", capture)
    monkeypatch.setattr(server, "DRAIN_WINDOW_S", 1.0)
    job = await jobs.running("a")
    body = json.dumps({**REQUEST, "stream": True}).encode()
    post = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    events = b"GET /v1/jobs/%s/events HTTP/1.1\r\nHost: localhost\r\n\r\n" % job.job_id.encode()
    said = [
        UPGRADE,
        UPGRADE.replace(b"/v1/ws", b"/v1/jobs/%s/ws" % job.job_id.encode()),
        UPGRADE.replace(b"/v1/ws", b"/nowhere"),
        UPGRADE.replace(b"13", b"12"),
        UPGRADE.replace(b"Host", b"Origin: https://evil.example\r\nHost"),
        events,
        events * 3,
        events.replace(b"events", b"events?mode=none"),
        post % (CHAT.encode(), len(body)) + body,
        post % (CHAT.encode(), len(body)) + body[:10],
        post % (b"/v1/jobs", 2) + b"{}",
    ]
    randomness = random.Random(11)
    async with relay_in_process(redis_url, monkeypatch, max_connections=40, trusted_proxies=()) as address:
        host, _, port = address.partition(":")
        seen: set[str] = set()

        async def visit() -> None:
            _, writer = await asyncio.open_connection(host, int(port))
            data = randomness.choice(said)
            cut = randomness.choice([len(data), len(data), randomness.randrange(len(data))])
            writer.write(data[:cut])
            for _ in range(randomness.randrange(12)):
                await asyncio.sleep(0.005)
                seen.update(transport for transport, count in made[0].places.items() if count)
            if randomness.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()

        for _ in range(4):
            await asyncio.gather(*(visit() for _ in range(100)))
        assert seen == {"websocket", "sse"}
        assert made[0].refusals["max_connections"] > 0
        await eventually(lambda: is_empty(made[0]), what="quiet")
        staying = [await asyncio.open_connection(host, int(port)) for _ in range(9)]
        for (_, writer), data in zip(staying, [UPGRADE, events, b"GET"] * 3, strict=True):
            writer.write(data)
        await eventually(lambda: sum(made[0].places.values()) == 6, what="six places")
    assert is_empty(made[0])
    for _, writer in staying:
        writer.close()
