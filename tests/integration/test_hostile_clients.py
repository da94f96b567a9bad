"""Clients that are slow, endless, many or broken: the relay stays up, small, and fair (PROTOCOL §4.7, §5.6).

All of it happens on real sockets against a real process, beside a good neighbour who gets every event.
"""

import asyncio
import itertools
import json
import random
import resource
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from deltawire.redis_server import RedisServer
from tests.support.producer import Producer
from tests.support.readers import Message, http_client, is_event, numbers, websocket
from tests.support.relay_process import RelayProcess

WAIT_S = 40.0
MIB = 1_048_576
SLOW = 400
RECONNECTS = 3_000
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
TEXT, PING, CLOSE = 0x1, 0x9, 0x8


@pytest.fixture
def fresh_relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """A process of its own: its memory is measured."""
    with RelayProcess(redis_server.url) as process:
        yield process


@pytest.fixture(scope="module")
def patient_relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """It lets clients send as much as they like."""
    with RelayProcess(redis_server.url, {"DELTAWIRE_MESSAGES_PER_S": "0"}) as process:
        yield process


class Peer:
    """A client that does as it is told, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, path: str) -> None:
        """Sends a whole request, a handshake if the path is a WebSocket's."""
        upgrade = UPGRADE if path.partition("?")[0].endswith("/ws") else "Connection: close\r\n"
        await self.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n".encode())

    async def head(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """All that comes until the relay closes. A reset counts as a close."""
        data = b""
        async with asyncio.timeout(WAIT_S):
            try:
                while piece := await self.reader.read(65_536):
                    data += piece
            except ConnectionError:
                pass
        return data

    async def frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame."""
        async with asyncio.timeout(WAIT_S):
            first, size = await self.reader.readexactly(2)
            if size >= 126:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
            return first & 15, await self.reader.readexactly(size)

    async def messages(self) -> list[Message]:
        """What text frames say, up to a terminal event."""
        found: list[Message] = []
        while not found or found[-1]["type"] != "completed":
            opcode, payload = await self.frame()
            if opcode == TEXT:
                found.append(json.loads(payload))
        return found

    async def streamed(self) -> list[Message]:
        """What an event stream says, up to its end."""
        lines = (await self.rest()).split(b"\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]

    async def close_code(self) -> int:
        while (frame := await self.frame())[0] != CLOSE:
            pass
        return int.from_bytes(frame[1][:2], "big")


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A client's frame (RFC 6455 §5.2) with the mask 0."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack("!H", size)
    return bytes([opcode | (0x80 if fin else 0)]) + length + b"\0\0\0\0" + payload


@asynccontextmanager
async def connected(relay: RelayProcess, count: int = 1) -> AsyncIterator[list[Peer]]:
    """Peers that buffer next to nothing, so that what they do not read stays with the relay."""
    async with AsyncExitStack() as stack:
        peers = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, limit=1_024)
            stack.callback(writer.transport.abort)
            peers.append(Peer(reader, writer))
        yield peers


@asynccontextmanager
async def neighbour(relay: RelayProcess, jobs: Producer) -> AsyncIterator[None]:
    """Somebody who watches a job all the while and gets everything, once, in order; probes are answered."""
    job = await jobs.running()
    url = f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws"
    async with websocket(url, ping_interval=None, open_timeout=WAIT_S) as reader:

        async def watch() -> list[Message]:
            return [json.loads(data) async for data in reader.connection]

        watching = asyncio.create_task(watch())
        streaming = asyncio.create_task(job.stream([["x"]] * 100_000, [0.05]))
        try:
            yield
            async with http_client() as client:
                assert (await client.get(f"{relay.url}/healthz")).status_code == 200
        finally:
            streaming.cancel()
            await asyncio.wait([streaming])
        job.lines = await jobs.log.read(job.job_id, 0)  # what was cancelled may have been appended
        await job.end()
        async with asyncio.timeout(2 * WAIT_S):
            assert numbers(await watching) == list(range(1, job.top + 1))


async def test_slow_subscribers_cost_less_than_64_kib_each(fresh_relay: RelayProcess, jobs: Producer) -> None:
    """Some take nothing, some 100 bytes at a time; when they read again they get all, in order."""
    relay = fresh_relay
    job = await jobs.running(*["some words and more " * 3] * 3_000)
    paths = [f"/v1/jobs/{job.job_id}/{door}?merge=" for door in ("ws", "events")]
    # The first are for the hub, its tail, and what reading the log takes.
    async with neighbour(relay, jobs), connected(relay, 2) as first:
        for peer, path in zip(first, paths, strict=True):
            await peer.ask(path + "false")
            await peer.head()
        await asyncio.sleep(1)
        before = relay.rss_bytes
        async with connected(relay, SLOW) as slow:
            for peer, path in zip(slow, itertools.cycle(paths), strict=False):
                await peer.ask(path + "false")
            for peer in slow:
                await peer.head()
            for _ in range(20):
                await job.deltas(*["and more"] * 50)
                for peer in slow[: SLOW // 2]:
                    await peer.reader.read(100)
                await asyncio.sleep(0.05)
            grown = (relay.rss_bytes - before) / SLOW / 1024
            print(f"\na slow subscriber: {grown:.1f} KiB of the relay's memory")
            assert grown < 64
            await job.end()
            for messages in (await slow[-2].messages(), await slow[-1].streamed()):
                assert numbers(messages) == list(range(1, job.top + 1))


async def test_one_who_lags_and_merges_gets_the_same_text(relay: RelayProcess, jobs: Producer) -> None:
    """Five thousand deltas are a few frames; the positions are those of all others (PROTOCOL §6.6)."""
    words = [f"word{number % 7} " for number in range(5_000)]
    job = await jobs.running()
    for at in range(0, len(words), 500):
        await job.deltas(*words[at : at + 500])
    await job.end()
    async with neighbour(relay, jobs), connected(relay, 2) as (socket_peer, stream_peer):
        await socket_peer.ask(f"/v1/jobs/{job.job_id}/ws?merge=true&starting_after=100")
        await socket_peer.head()
        await stream_peer.ask(f"/v1/jobs/{job.job_id}/events?merge=true&starting_after=100")
        for messages in (await socket_peer.messages(), await stream_peer.streamed()):
            events = [message for message in messages if is_event(message)]
            assert len(events) < 40
            position, text = 100, ""
            for event in events:
                assert event.get("first_sequence_number", event["sequence_number"]) == position + 1
                position = event["sequence_number"]
                if event["type"] == "delta":
                    text += event["chunk"]["choices"][0]["delta"]["content"]
            assert position == job.top
            assert text == "".join(words[98:])


async def test_a_flood_of_messages_that_nobody_reads_the_answers_of(
    patient_relay: RelayProcess, jobs: Producer
) -> None:
    """The relay stops listening; when the client reads, each message has had its answer, in order."""
    relay = patient_relay
    count = 50_000
    flood = [
        masked(TEXT, json.dumps({"type": "unsubscribe", "job_id": "a", "request_id": str(at)}).encode())
        for at in range(count)
    ]
    async with neighbour(relay, jobs), connected(relay) as (peer,):
        await peer.ask("/v1/ws")
        await peer.head()
        before = relay.rss_bytes
        sending = asyncio.create_task(peer.send(b"".join(flood)))
        await asyncio.sleep(1.5)
        assert relay.rss_bytes - before < 8 * MIB
        answered = 0
        while answered < count:
            opcode, payload = await peer.frame()
            if opcode == TEXT:
                message = json.loads(payload)
                if message["type"] == "error":
                    assert message["request_id"] == str(answered)
                    answered += 1
        await sending


async def test_a_flood_of_pings_that_nobody_reads_the_pongs_of(
    patient_relay: RelayProcess, jobs: Producer
) -> None:
    """The library answers each by itself, so here it is the transport that has to be bounded."""
    relay = patient_relay
    async with neighbour(relay, jobs), connected(relay) as (peer,):
        await peer.ask("/v1/ws")
        await peer.head()
        before = relay.rss_bytes
        sending = asyncio.create_task(peer.send(masked(PING, b"x" * 125) * 400_000))
        await asyncio.sleep(2)
        assert relay.rss_bytes - before < 16 * MIB
        assert not sending.done()
        for _ in range(10_000):
            assert (await peer.frame())[0] in {TEXT, PING, 0xA}
        sending.cancel()


FRAGMENTS = {
    "ten thousand of one byte": (masked(TEXT, b"{", fin=False) + masked(0, b"x", fin=False) * 10_000, 1009),
    "ten thousand of none": (masked(TEXT, b"{", fin=False) + masked(0, fin=False) * 10_000, 1009),
    "seventy of a kilobyte": (masked(TEXT, fin=False) + masked(0, b"x" * 1_000, fin=False) * 70, 1009),
    "a continuation of nothing": (masked(0, b"x"), 1002),
    "a frame of nine exabytes": (b"\x81\xff" + b"\x7f" + b"\xff" * 7 + b"\0\0\0\0", 1009),
    "a message in a message": (masked(TEXT, b"{", fin=False) + masked(TEXT, b"{}"), 1002),
    "a frame without a mask": (b"\x81\x02{}", 1002),
    "a ping that is too long": (masked(PING, b"x" * 126), 1002),
    "random bytes": (b"\xf3" + random.Random(1).randbytes(100_000), 1002),
}


@pytest.mark.parametrize(("data", "code"), FRAGMENTS.values(), ids=FRAGMENTS)
async def test_frames_that_are_too_many_too_large_or_none(
    data: bytes, code: int, relay: RelayProcess
) -> None:
    """They end with the close code that RFC 6455 §7.4.1 has for it."""
    before = relay.rss_bytes
    async with connected(relay, 5) as peers:
        for peer in peers:
            await peer.ask("/v1/ws")
            await peer.head()
        for peer in peers:
            await peer.send(data)
        assert [await peer.close_code() for peer in peers] == [code] * len(peers)
    # What one read of a socket brings is taken apart at once: some megabytes, for a moment.
    assert relay.rss_bytes - before < 64 * MIB


async def test_one_message_in_a_thousand_fragments_is_heard(relay: RelayProcess) -> None:
    """Fragments as such are no offence."""
    text = json.dumps({"type": "unsubscribe", "job_id": "a", "request_id": "x" * 1_000}).encode()
    pieces = [masked(0, text[at : at + 1], fin=False) for at in range(1, len(text))]
    async with connected(relay) as (peer,):
        await peer.ask("/v1/ws")
        await peer.head()
        await peer.send(masked(TEXT, text[:1], fin=False) + b"".join(pieces) + masked(0))
        answer = await peer.frame()
        assert answer[0] == TEXT
        assert json.loads(answer[1])["request_id"] == "x" * 1_000


def begins(path: str, upgrade: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{upgrade}".encode()


@pytest.mark.parametrize("begin", [begins("/healthz"), begins("/v1/ws", UPGRADE)], ids=["HTTP", "WebSocket"])
@pytest.mark.parametrize("piece", [b"X-A: b\r\n" * 100, b"x" * 1_000], ids=["many", "one"])
async def test_endless_headers(begin: bytes, piece: bytes, relay: RelayProcess, jobs: Producer) -> None:
    """They end with 431, which the client gets although it goes on sending."""
    before = relay.rss_bytes
    async with neighbour(relay, jobs), connected(relay, 20) as peers:

        async def endless(peer: Peer) -> None:
            try:
                await peer.send(begin)
                while True:
                    await peer.send(piece)
                    await asyncio.sleep(0.001)
            except ConnectionError:
                pass

        sending = [asyncio.create_task(endless(peer)) for peer in peers]
        for head in await asyncio.gather(*(peer.head() for peer in peers)):
            assert head.startswith(b"HTTP/1.1 431 ")
        for task in sending:
            task.cancel()
    assert relay.rss_bytes - before < 32 * MIB


async def test_half_open_handshakes_and_slow_headers(relay: RelayProcess, jobs: Producer) -> None:
    """Hundreds of them are gone after ten seconds, with 408 where there was something to answer."""
    before = relay.rss_bytes
    async with neighbour(relay, jobs), connected(relay, 300) as peers:
        for peer, begin in zip(peers, itertools.cycle([b"", b"G", begins("/v1/ws", UPGRADE)]), strict=False):
            await peer.send(begin)

        async def drip() -> None:
            while True:
                for peer in peers[2::3]:
                    peer.writer.write(b"X")
                await asyncio.sleep(0.5)

        dripping = asyncio.create_task(drip())
        assert relay.rss_bytes - before < 32 * MIB
        answers = await asyncio.gather(*(peer.rest() for peer in peers))
        dripping.cancel()
    assert {answer.partition(b"\r\n")[0] for answer in answers[0::3]} == {b""}
    assert {answer.partition(b"\r\n")[0] for answer in answers[2::3]} == {b"HTTP/1.1 408 Request Timeout"}


@pytest.mark.timeout(300)
async def test_three_thousand_reconnects_at_once(
    redis_server: RedisServer, jobs: Producer, file_limit: int
) -> None:
    """All are served, to the end of their job; afterwards the relay is as before."""
    count = min(RECONNECTS, file_limit // 2 - 200)
    job = await jobs.ended(*["x"] * 10)
    with RelayProcess(redis_server.url) as relay:
        before = relay.rss_bytes

        doors = itertools.cycle([f"/v1/jobs/{job.job_id}/ws", f"/v1/jobs/{job.job_id}/events"])
        async with neighbour(relay, jobs):
            seen = await asyncio.gather(
                *(reconnect(relay, f"{next(doors)}?starting_after=5") for _ in range(count))
            )
            grown = (relay.rss_bytes - before) / count / 1024
            print(f"\n{count} reconnects: {grown:.1f} KiB of the relay's memory for each")
            assert grown < 64
        expected = [b'"sequence_number":%d,' % number for number in range(1, job.top + 1)]
        assert {tuple(number in data for number in expected) for data in seen} == {
            (False,) * 5 + (True,) * (job.top - 5)
        }


class Reconnecting(asyncio.Protocol):
    """Asks and goes as soon as the job's terminal event has come; thousands of streams would be slow."""

    def __init__(self, path: str) -> None:
        upgrade = UPGRADE if "/ws" in path else ""
        self.request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n".encode()
        self.data = b""
        self.over: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if b'"type":"completed"' in self.data:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(self.data)


async def reconnect(relay: RelayProcess, path: str) -> bytes:
    """All that comes, up to the terminal event."""
    async with asyncio.timeout(5 * WAIT_S):
        _, protocol = await asyncio.get_running_loop().create_connection(
            lambda: Reconnecting(path), "127.0.0.1", relay.port
        )
        return await protocol.over


@pytest.fixture
def file_limit() -> Iterator[int]:
    """As many open files as the system allows, here and in what is started meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * RECONNECTS + 1_000
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    yield max(soft, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
