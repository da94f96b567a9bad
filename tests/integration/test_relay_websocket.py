"""The relay's WebSocket door, on real sockets and a real Redis (PROTOCOL §6)."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from deltawire.api_keys import parse_api_keys
from deltawire.redis_server import RedisServer
from deltawire_relay import conversation as conversation_module
from deltawire_relay import hub as hub_module
from deltawire_relay import looks as looks_module
from deltawire_relay import subscriber as subscriber_module
from deltawire_relay import websocket as websocket_module
from deltawire_relay.frames import PING
from tests.support.producer import Producer
from tests.support.readers import (
    WAIT_S,
    WebSocketReader,
    http_client,
    numbers,
    read_job,
    websocket,
)
from tests.support.relay_process import Keyring, RelayProcess, relay_in_process

KEYS = Keyring(
    acme=("acme", ["read", "cancel", "submit"]),
    umbrella=("umbrella", ["read", "cancel", "submit"]),
)


@pytest.fixture(scope="module")
def keyed(redis_server: RedisServer) -> Iterator[RelayProcess]:
    with RelayProcess(redis_server.url, {"DELTAWIRE_API_KEYS": KEYS.text}) as process:
        yield process


@pytest.fixture
async def reader(relay: RelayProcess) -> AsyncIterator[WebSocketReader]:
    """A socket for many jobs."""
    async with websocket(f"{relay.websocket_url}/v1/ws") as opened:
        yield opened


# Subscribing.


async def test_subscribed_comes_first_then_the_events_verbatim(
    reader: WebSocketReader, jobs: Producer
) -> None:
    """What stands in the log is what the socket carries, from the event after starting_after (§6.3)."""
    job = await jobs.running("a", "b")
    await reader.send("subscribe", job_id=job.job_id, starting_after=1)
    assert await reader.receive() == {
        "type": "subscribed",
        "job_id": job.job_id,
        "status": "in_progress",
        "attempt": 1,
        "earliest_sequence_number": 1,
        "latest_sequence_number": 4,
        "recovered": True,
    }
    async with asyncio.timeout(WAIT_S):
        raw = [await reader.connection.recv(decode=False) for _ in range(3)]
    assert raw == job.lines[1:]
    await job.end()
    assert (await reader.receive())["sequence_number"] == 5


async def test_many_jobs_share_a_socket(reader: WebSocketReader, jobs: Producer) -> None:
    """Each job's events come in order; one job's end neither closes the socket nor stops the others (§6)."""
    made = [jobs.job() for _ in range(20)]
    for job in made:
        await job.submit()
        await reader.send("subscribe", job_id=job.job_id)

    async def write(index: int) -> None:
        await made[index].claim()
        for _ in range(5):
            await made[index].deltas("x")
            await asyncio.sleep(0)
        await made[index].end()

    writing = asyncio.gather(*(write(index) for index in range(20)))
    messages, ended = [], 0
    while ended < 20:
        messages.append(await reader.receive())
        ended += messages[-1]["type"] == "completed"
    await writing
    for job in made:
        mine = [message for message in messages if message["job_id"] == job.job_id]
        assert mine[0]["type"] == "subscribed"
        assert numbers(mine) == list(range(1, 9))
    await reader.send("unsubscribe", job_id=made[0].job_id)
    assert (await reader.receive())["error"]["code"] == "not_subscribed"  # its subscription was over


async def test_a_job_may_be_subscribed_again_after_its_end(reader: WebSocketReader, jobs: Producer) -> None:
    """After the terminal event the subscription is over; another one replays (§6.3)."""
    job = await jobs.ended("a")
    for _ in range(3):
        await reader.send("subscribe", job_id=job.job_id)
        assert numbers(await reader.until_terminal()) == [1, 2, 3, 4]


async def test_a_one_job_socket_closes_after_the_terminal_event(relay: RelayProcess, jobs: Producer) -> None:
    """1000, once everything was sent; the query says where to begin (§6, §6.5)."""
    job = await jobs.running("a")
    reading = asyncio.create_task(read_job(relay.websocket_url, job.job_id, starting_after=2))
    await job.end()
    messages = await reading
    assert messages[0]["type"] == "subscribed"
    assert numbers(messages) == [3, 4]


async def test_the_path_of_a_one_job_socket_says_which_job(relay: RelayProcess, jobs: Producer) -> None:
    """A query cannot turn the socket to another job (§6)."""
    job, other = await jobs.ended("a"), await jobs.ended("b")
    url = f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws?job_id={other.job_id}"
    async with websocket(url) as reader:
        assert (await reader.receive()).get("job_id") == job.job_id


async def test_a_snapshot_stands_for_what_it_says(reader: WebSocketReader, jobs: Producer) -> None:
    """`mode: snapshot`: subscribed, the fold so far with its choice open, then the rest (§6.3)."""
    job = await jobs.running("Hel", "lo")
    await reader.send("subscribe", job_id=job.job_id, mode="snapshot", request_id="r")
    assert (await reader.receive())["type"] == "subscribed"
    snapshot = await reader.receive()
    assert (snapshot["type"], snapshot["sequence_number"], snapshot["request_id"]) == ("snapshot", 4, "r")
    choice = snapshot["completion"]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", None)
    await job.end()
    assert numbers(await reader.until_terminal()) == [5]


async def test_an_unknown_job_is_waited_for(reader: WebSocketReader, jobs: Producer) -> None:
    """`subscribed` says unknown, and the events come when the job does (§6.3)."""
    job = jobs.job()
    await reader.send("subscribe", job_id=job.job_id)
    said = await reader.receive()
    assert (said["status"], said["latest_sequence_number"]) == ("unknown", 0)
    await job.claim()  # as a worker does for a message that `send_task` sent
    await job.end()
    assert numbers(await reader.until_terminal()) == [1, 2]


async def test_unsubscribe_ends_the_events_of_one_job(reader: WebSocketReader, jobs: Producer) -> None:
    """After `unsubscribed` nothing of that job comes; the other goes on; both may be had again (§6.2)."""
    job, other = await jobs.running("a"), await jobs.running("b")
    for one in (job, other):
        await reader.send("subscribe", job_id=one.job_id)
        await reader.until(3)
    await reader.send("unsubscribe", job_id=job.job_id, request_id="u")
    assert await reader.receive() == {"type": "unsubscribed", "job_id": job.job_id, "request_id": "u"}
    await job.end()
    await other.end()
    (message,) = [await reader.receive()]
    assert (message["job_id"], message["sequence_number"]) == (other.job_id, 4)
    await reader.send("subscribe", job_id=job.job_id, starting_after=3)
    assert numbers(await reader.until_terminal()) == [4]


async def test_request_ids_come_back(reader: WebSocketReader, jobs: Producer) -> None:
    """Every answer repeats the request_id of what it answers, refusals about a job included (§6.2)."""
    job = await jobs.queued()
    await reader.send("subscribe", job_id=job.job_id, request_id="1")
    assert (await reader.receive_type("subscribed"))["request_id"] == "1"
    await reader.send("subscribe", job_id=job.job_id, request_id="2")
    refused = await reader.receive_type("error")
    assert (refused["request_id"], refused["job_id"]) == ("2", job.job_id)
    await reader.send("cancel", job_id=job.job_id, request_id="3")
    assert (await reader.receive_type("cancel_result"))["request_id"] == "3"
    await reader.send("authenticate", token="none is needed", request_id="4")
    assert await reader.receive_type("authenticated") == {
        "type": "authenticated",
        "expires_at": None,
        "request_id": "4",
    }


@pytest.mark.parametrize(
    "message",
    [
        {"type": "subscribe", "job_id": "a", "starting_after": "1"},
        {"type": "subscribe"},
        {"type": "sing", "job_id": "a"},
    ],
)
async def test_request_ids_come_back_with_refusals_of_wrong_fields(
    reader: WebSocketReader, message: dict[str, str]
) -> None:
    """A client that waits for its answer hears of its mistake (§6.2: "which the answer repeats")."""
    await reader.connection.send(json.dumps({**message, "request_id": "r"}))
    assert (await reader.receive_type("error")).get("request_id") == "r"


# Cancelling.


async def test_cancel_is_answered_and_the_end_comes(reader: WebSocketReader, jobs: Producer) -> None:
    """`cancel_result` tells the truth, and the subscriber gets the terminal event (§6.3, §4.5)."""
    job = await jobs.queued()
    await reader.send("subscribe", job_id=job.job_id)
    await reader.until(1)
    await reader.send("cancel", job_id=job.job_id, reason="enough")
    messages = [await reader.receive() for _ in range(2)]
    by_type = {message["type"]: message for message in messages}
    assert by_type["cancelled"]["cancel"]["reason"] == "enough"
    assert by_type["cancel_result"] == {
        "type": "cancel_result",
        "job_id": job.job_id,
        "status": "cancelled",
        "cancelled_from": "queued",
        "delivered": True,
    }


async def test_other_messages_are_answered_while_a_cancel_waits(
    reader: WebSocketReader, jobs: Producer
) -> None:
    """A cancel that waits for a silent worker holds up nothing else on the socket (§6)."""
    silent, other = await jobs.running("a"), await jobs.queued()
    await reader.send("cancel", job_id=silent.job_id)
    await reader.send("subscribe", job_id=other.job_id)
    assert (await reader.receive())["type"] == "subscribed"
    result = await reader.receive_type("cancel_result")
    assert (result["status"], result["delivered"]) == ("in_progress", False)


async def test_other_messages_are_answered_while_a_subscription_waits(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A position above a log's top waits for healing; the other jobs of the socket do not wait with it."""
    monkeypatch.setattr(subscriber_module, "HEAL_TIMEOUT_S", 600.0)
    above, other = await jobs.running("a"), await jobs.queued()
    async with (
        relay_in_process(redis_server.url, monkeypatch) as address,
        websocket(f"ws://{address}/v1/ws") as reader,
    ):
        await reader.send("subscribe", job_id=above.job_id, starting_after=99)
        await reader.send("subscribe", job_id=other.job_id)
        assert (await reader.receive_type("subscribed"))["job_id"] == other.job_id


# Authentication.


async def test_a_key_in_the_header_opens_the_socket(keyed: RelayProcess, jobs: Producer) -> None:
    """A client that can set headers needs no first message (§6.1)."""
    job = await jobs.ended("a", tenant="acme")
    async with websocket(f"{keyed.websocket_url}/v1/ws", token=KEYS["acme"]) as reader:
        await reader.send("subscribe", job_id=job.job_id)
        assert numbers(await reader.until_terminal()) == [1, 2, 3, 4]


async def test_a_key_in_the_first_message_opens_the_socket(keyed: RelayProcess, jobs: Producer) -> None:
    """A browser authenticates by message, on both kinds of socket (§6.1)."""
    job = await jobs.ended("a", tenant="acme")
    for path in ("/v1/ws", f"/v1/jobs/{job.job_id}/ws"):
        async with websocket(keyed.websocket_url + path, headers={"Origin": keyed.url}) as reader:
            await reader.send("authenticate", token=KEYS["acme"], request_id="a")
            answer = await reader.receive()
            assert (answer["type"], answer["request_id"]) == ("authenticated", "a")
            if path == "/v1/ws":
                await reader.send("subscribe", job_id=job.job_id)
            assert numbers(await reader.until_terminal()) == [1, 2, 3, 4]


async def test_another_tenants_job_is_unknown(keyed: RelayProcess, jobs: Producer) -> None:
    """`subscribed` and `cancel_result` about it are those about a job that does not exist (§4.8)."""
    job, missing = await jobs.running("a", tenant="umbrella"), jobs.job()
    async with websocket(f"{keyed.websocket_url}/v1/ws", token=KEYS["acme"]) as reader:
        said = []
        for job_id in (job.job_id, missing.job_id):
            await reader.send("subscribe", job_id=job_id, starting_after=2, mode="snapshot")
            said.append(json.dumps(await reader.receive()).replace(job_id, "id"))
        assert said[0] == said[1]
        await job.end()
        said = []
        for job_id in (job.job_id, missing.job_id):
            await reader.send("cancel", job_id=job_id)
            said.append(json.dumps(await reader.receive()).replace(job_id, "id"))
        assert said[0] == said[1]


async def test_no_credential_in_time_is_4502(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket on which nobody authenticates is closed (§6.1, §6.5)."""
    monkeypatch.setattr(conversation_module, "AUTHENTICATION_TIMEOUT_S", 0.1)
    keys = parse_api_keys(KEYS.text)
    async with (
        relay_in_process(redis_server.url, monkeypatch, api_keys=keys) as address,
        websocket(f"ws://{address}/v1/ws", headers={"Origin": f"http://{address}"}) as reader,
    ):
        messages, code = await reader.until_closed()
    assert (messages[-1]["error"]["code"], code) == ("missing_credentials", 4502)


async def test_an_unknown_job_is_4507_on_its_own_socket_and_an_error_on_a_shared_one(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time-out, and with the job's id; the shared socket stays open (§6.3, §6.5)."""
    monkeypatch.setattr(hub_module, "UNKNOWN_JOB_TIMEOUT_S", 0.2)
    monkeypatch.setattr(looks_module, "CHECK_INTERVAL_S", 0.05)
    async with (
        relay_in_process(redis_server.url, monkeypatch) as address,
        websocket(f"ws://{address}/v1/jobs/nobody/ws") as own,
        websocket(f"ws://{address}/v1/ws") as shared,
    ):
        messages, code = await own.until_closed()
        assert [message["type"] for message in messages] == ["subscribed", "error"]
        assert (messages[-1]["job_id"], messages[-1]["error"]["code"]) == ("nobody", "unknown_job")
        assert code == 4507
        await shared.send("subscribe", job_id="nobody")
        error = await shared.receive_type("error")
        assert (error["job_id"], error["error"]["code"]) == ("nobody", "unknown_job")
        await shared.send("subscribe", job_id="nobody")
        assert (await shared.receive())["type"] == "subscribed"


# The connection's life.


async def test_heartbeats_tell_positions_and_a_silent_client_is_closed(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`heartbeat` names the last number written by job; two pings without an answer are 4012 (§6.3, §6.5)."""
    monkeypatch.setattr(websocket_module, "HEARTBEAT_S", 0.1)
    job = await jobs.running("a")
    async with relay_in_process(redis_server.url, monkeypatch) as address:
        async with websocket(f"ws://{address}/v1/ws") as reader:
            await reader.send("subscribe", job_id=job.job_id)
            await reader.until(3)
            assert (await reader.receive_type("heartbeat"))["positions"] == {job.job_id: 3}
            await job.end()
            await reader.until_terminal()
            assert (await reader.receive_type("heartbeat"))["positions"] == {}
        host, port = address.split(":")
        async with deaf_websocket(host, int(port), "/v1/ws") as stream:
            closing = b"\x88" + bytes([2 + len("no pong")]) + (4012).to_bytes(2, "big")
            async with asyncio.timeout(WAIT_S):
                frames = await stream.readuntil(closing)
    assert frames.count(PING) >= 2


@asynccontextmanager
async def deaf_websocket(host: str, port: int, path: str) -> AsyncIterator[asyncio.StreamReader]:
    """A client that opens a WebSocket and then never writes a byte again, not even a pong."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        async with asyncio.timeout(WAIT_S):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        yield reader
    finally:
        writer.close()


@pytest.mark.parametrize("piece", [1, 50, 1_000])
async def test_a_handshake_may_come_in_any_pieces(piece: int, relay: RelayProcess) -> None:
    """Also with the first message in its last segment: it is answered (RFC 6455 §5.2)."""
    text = b'{"type":"unsubscribe","job_id":"a","request_id":"early"}'
    sent = (
        b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        + Frame(Opcode.TEXT, text).serialize(mask=True)
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    try:
        for at in range(0, len(sent), piece):
            writer.write(sent[at : at + piece])
            await writer.drain()
            await asyncio.sleep(0.001)
        async with asyncio.timeout(WAIT_S):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            answer = await reader.readuntil(b'"code":"not_subscribed"')
        assert b'"request_id":"early"' in answer
    finally:
        writer.close()


async def test_fragmented_messages_are_read_whole(reader: WebSocketReader, jobs: Producer) -> None:
    """A client may cut its messages anywhere, while events flow to it (RFC 6455 §5.4)."""
    job, other = await jobs.running("a"), await jobs.running("b")
    await reader.send("subscribe", job_id=job.job_id)
    await reader.until(3)
    text = json.dumps({"type": "subscribe", "job_id": other.job_id})

    async def pieces() -> AsyncIterator[str]:
        for index, letter in enumerate(text):
            yield letter
            if index % 20 == 0:
                await job.deltas("x")

    await reader.connection.send(pieces())
    assert (await reader.receive_type("subscribed"))["job_id"] == other.job_id
    await reader.send("unsubscribe", job_id=other.job_id)
    await reader.receive_type("unsubscribed")
    await job.end()
    assert (await reader.until_terminal())[-1]["sequence_number"] == job.top


async def test_a_subprotocol_is_chosen_if_offered(relay: RelayProcess) -> None:
    """`deltawire.v1` if the client offers it; who offers none is served as well (§6)."""
    async with websocket(f"{relay.websocket_url}/v1/ws") as reader:
        assert reader.connection.subprotocol == "deltawire.v1"
        assert reader.connection.protocol.extensions == []


@pytest.mark.parametrize("path", ["/", "/v1/jobs/a", "/v1/jobs//ws2", "/v2/ws"])
async def test_other_paths_have_no_websocket(path: str, relay: RelayProcess) -> None:
    """A handshake elsewhere is refused with 404 (§6)."""
    with pytest.raises(InvalidStatus) as caught:
        async with websocket(relay.websocket_url + path):
            pass
    assert caught.value.response.status_code == 404


async def test_a_client_that_vanishes_leaves_nothing(
    relay: RelayProcess, jobs: Producer, redis_server: RedisServer
) -> None:
    """Cut connections end their subscriptions: the relay leaves the channel (§4.7)."""
    job = await jobs.running("a")
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        channel = jobs.log.keys.job(job.job_id).channel

        async def watchers() -> int:
            return int((await client.pubsub_numsub(channel))[0][1])

        for _ in range(5):
            async with websocket(f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws") as reader:
                await reader.until(3)
                assert await watchers() == 1
                reader.connection.transport.abort()
        async with asyncio.timeout(WAIT_S):
            while await watchers():  # noqa: ASYNC110 - it is in Redis
                await asyncio.sleep(0.005)
    assert "Traceback" not in relay.log


async def test_sigterm_says_goodbye_and_ends_well(redis_server: RedisServer, jobs: Producer) -> None:
    """`goodbye` with a delay, close code 4001, and exit code 0 (§6.3)."""
    job = await jobs.running("a")
    with RelayProcess(redis_server.url) as relay:
        async with (
            websocket(f"{relay.websocket_url}/v1/ws") as reader,
            websocket(f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws") as own,
        ):
            await reader.send("subscribe", job_id=job.job_id)
            await reader.until(3)
            await own.until(3)
            relay.terminate()
            for one in (reader, own):
                messages, code = await one.until_closed()
                goodbye = messages[-1]
                assert (goodbye["type"], goodbye["code"], code) == ("goodbye", 4001, 4001)
                assert 0 <= goodbye["retry_after_s"] <= 5
        assert await asyncio.to_thread(relay.wait) == 0
        assert "Traceback" not in relay.log


async def test_a_client_that_does_not_answer_cannot_hold_up_the_end(
    redis_server: RedisServer, jobs: Producer
) -> None:
    """A socket that reads nothing is dropped within the drain; the exit code is 0 all the same (§6.3)."""
    job = await jobs.running("a")
    with RelayProcess(redis_server.url) as relay:
        async with deaf_websocket("127.0.0.1", relay.port, f"/v1/jobs/{job.job_id}/ws"):
            relay.terminate()
            assert await asyncio.to_thread(relay.wait) == 0
        assert "Traceback" not in relay.log


async def test_a_relay_that_drains_takes_nobody_new(redis_server: RedisServer) -> None:
    """After SIGTERM a new connection is refused (§6.3)."""
    with RelayProcess(redis_server.url) as relay:
        async with http_client(base_url=relay.url) as client:
            assert (await client.get("/readyz")).status_code == 200
        relay.terminate()
        assert await asyncio.to_thread(relay.wait) == 0
        with pytest.raises((OSError, ConnectionClosed, InvalidStatus)):
            async with websocket(f"{relay.websocket_url}/v1/ws"):
                pass
