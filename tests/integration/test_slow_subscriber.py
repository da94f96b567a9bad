"""A subscriber that stops reading costs little, slows nobody, and loses nothing (PROTOCOL §4.7)."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from deltawire.redis_server import RedisServer
from tests.support.producer import ProducedJob, Producer
from tests.support.readers import WAIT_S, numbers, websocket
from tests.support.relay_process import RelayProcess

FLOW_BYTES = 20_000_000
GROWTH_BYTES = 20_000_000


@pytest.fixture
def relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    """A process of its own: its memory is measured."""
    with RelayProcess(redis_server.url) as process:
        yield process


async def flow(job: ProducedJob) -> None:
    """Appends FLOW_BYTES of deltas, fifty at a time."""
    for _ in range(FLOW_BYTES // 50_000):
        await job.deltas(*["x" * 1_000] * 50)


@asynccontextmanager
async def stalled(relay: RelayProcess, path: str) -> AsyncIterator[asyncio.StreamReader]:
    """A connection whose client asks and then takes no byte until it is read from."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, limit=1_024)
    try:
        upgrade = (
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        )
        headers = upgrade if path.endswith("/ws") else ""
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
        async with asyncio.timeout(WAIT_S):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 200 "))
        yield reader
    finally:
        writer.transport.abort()


async def frames(reader: asyncio.StreamReader) -> list[dict[str, object]]:
    """The messages of text frames, up to a terminal event."""
    messages = []
    async with asyncio.timeout(3 * WAIT_S):
        while True:
            first, size = await reader.readexactly(2)
            if size >= 126:
                size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
            payload = await reader.readexactly(size)
            if first == 0x81:
                messages.append(json.loads(payload))
                if messages[-1]["type"] == "completed":
                    return messages


async def test_a_websocket_that_stops_reading(relay: RelayProcess, jobs: Producer) -> None:
    """20 MB of small events: memory stays bounded, a neighbour sees all at once, it catches up."""
    job = await jobs.running()
    path = f"/v1/jobs/{job.job_id}/ws"
    async with websocket(relay.websocket_url + path) as neighbour, stalled(relay, path) as reader:
        await neighbour.until(2)
        before = relay.rss_bytes
        watching = asyncio.create_task(neighbour.until_terminal())
        await flow(job)
        await job.end()
        assert numbers(await watching) == list(range(3, job.top + 1))
        assert relay.rss_bytes - before < GROWTH_BYTES
        messages = await frames(reader)
    assert [message["sequence_number"] for message in messages if "created_at" in message] == list(
        range(1, job.top + 1)
    )


async def test_an_event_stream_that_stops_reading(relay: RelayProcess, jobs: Producer) -> None:
    """The same for server-sent events."""
    job = await jobs.running()
    path = f"/v1/jobs/{job.job_id}"
    async with (
        websocket(f"{relay.websocket_url}{path}/ws") as neighbour,
        stalled(relay, f"{path}/events") as reader,
    ):
        await neighbour.until(2)
        before = relay.rss_bytes
        watching = asyncio.create_task(neighbour.until_terminal())
        await flow(job)
        await job.end()
        assert numbers(await watching) == list(range(3, job.top + 1))
        assert relay.rss_bytes - before < GROWTH_BYTES
        body = b""
        pieces = []
        async with asyncio.timeout(3 * WAIT_S):
            while not body.endswith(b"0\r\n\r\n"):
                pieces.append(await reader.read(1 << 20))
                body = (body + pieces[-1])[-16:]
    ids = [text[4:] for text in dechunked(b"".join(pieces)).split(b"\n") if text.startswith(b"id: ")]
    assert [int(text) for text in ids] == list(range(1, job.top + 1))


def dechunked(body: bytes) -> bytes:
    """The content of a chunked body (RFC 9112 §7.1)."""
    content, at = [], 0
    while size := int(body[at : (end := body.index(b"\r\n", at))], 16):
        content.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(content)
