"""What slow subscribers cost the relay, and their neighbours.

    PYTHONPATH=. .venv/bin/python benchmarks/slow_clients.py [--slow 300] [--seconds 5]

For each door (WebSocket, SSE, and both with merge=true): a relay process, one good reader whose delay per
delta is measured alone, while slow readers come and catch up, and beside them when their jobs stream on.
Each slow reader takes no byte, or 100 bytes a second, with the smallest receive buffer that the system gives
it. Memory is the growth of the relay's resident memory, divided by the number of slow readers.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence

from tests.support.producer import ProducedJob, producer
from tests.support.readers import websocket
from tests.support.relay_process import RelayProcess

from deltawire.redis_server import RedisServer

JOBS = 20
TEXT = "word " * 4
PAUSE_S = 0.02
DRIP_BYTES = 100


def in_ms(delays: Sequence[float], share: float) -> str:
    ordered = sorted(delays)
    return f"{ordered[int((len(ordered) - 1) * share)] * 1e3:.1f}"


async def stream(job: ProducedJob, seconds: float) -> None:
    """Appends bursts of deltas, one each PAUSE_S; each begins with the time at which it was sent."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await job.deltas(f"{time.time()} ", *[TEXT] * 9)
        await asyncio.sleep(PAUSE_S)


async def delays_of(relay: RelayProcess, job: ProducedJob, seconds: float) -> list[float]:
    """What a good reader sees while the job streams."""
    delays = []
    async with websocket(f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws?starting_after={job.top}") as reader:
        streaming = asyncio.create_task(stream(job, seconds))
        try:
            while not streaming.done():
                async with asyncio.timeout(2):
                    message = json.loads(await reader.connection.recv())
                if message["type"] == "delta":
                    text = message["chunk"]["choices"][0]["delta"]["content"]
                    if text[0].isdigit():
                        delays.append(time.time() - float(text))
        except TimeoutError:
            pass
        await streaming
    return delays


@contextlib.asynccontextmanager
async def slow_readers(
    relay: RelayProcess, paths: Sequence[str], drips: bool
) -> AsyncIterator[list[socket.socket]]:
    """Connections that ask and then read nothing, or DRIP_BYTES a second."""
    loop = asyncio.get_running_loop()
    sockets = []
    for path in paths:
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", relay.port))
        upgrade = (
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        )
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{upgrade if '/ws' in path else ''}\r\n"
        await loop.sock_sendall(peer, head.encode())
        sockets.append(peer)

    async def drip() -> None:
        while drips:
            for peer in sockets:
                with contextlib.suppress(BlockingIOError):
                    peer.recv(DRIP_BYTES)
            await asyncio.sleep(1)

    dripping = asyncio.create_task(drip())
    try:
        yield sockets
    finally:
        dripping.cancel()
        for peer in sockets:
            peer.close()


async def measure(name: str, door: str, count: int, seconds: float, redis_url: str, *, drips: bool) -> None:
    with RelayProcess(redis_url) as relay:
        async with producer(redis_url) as jobs:
            good = await jobs.running("warm up")
            await delays_of(relay, good, 1)
            alone = await delays_of(relay, good, seconds)
            watched = [await jobs.running(*[TEXT] * 2_000) for _ in range(JOBS)]
            # The tails of the jobs and what reading the logs takes are there with one reader each, too.
            first = [door.format(watched[at].job_id) for at in range(JOBS)]
            async with slow_readers(relay, first, drips):
                await asyncio.sleep(1)
                before = relay.rss_bytes
                paths = [door.format(watched[at % JOBS].job_id) for at in range(count)]
                coming = asyncio.create_task(delays_of(relay, good, seconds))
                async with slow_readers(relay, paths, drips):
                    catching_up = await coming
                    streams = [asyncio.create_task(stream(job, seconds)) for job in watched[:2]]
                    beside = await delays_of(relay, good, seconds)
                    await asyncio.gather(*streams)
                    grown = relay.rss_bytes - before
    neighbour = ", ".join(
        f"p{share} {' -> '.join(in_ms(delays, share / 100) for delays in (alone, catching_up, beside))} ms"
        for share in (50, 99)
    )
    print(
        f"{name:26} {grown / count / 1024:5.1f} KiB each; neighbour's delay {neighbour}",
        flush=True,
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    doors = {"WebSocket": "/v1/jobs/{}/ws?merge=", "event stream": "/v1/jobs/{}/events?merge="}
    with RedisServer() as redis:
        for name, door in list(doors.items()):
            for merge in ("false", "true"):
                for drips in (False, True):
                    what = f"{name}{', merge' * (merge == 'true')}{', drip' * drips}"
                    await measure(what, door + merge, options.slow, options.seconds, redis.url, drips=drips)


if __name__ == "__main__":
    asyncio.run(main())
