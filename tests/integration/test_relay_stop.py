"""A relay that is stopped, as proxies see it that keep connections to it."""

import asyncio

from deltawire.redis_server import RedisServer
from tests.support.producer import WAIT_S, Producer
from tests.support.relay_process import RelayProcess

CLIENTS = 20


async def _ask(port: int, answered: asyncio.Semaphore) -> bool:
    """Asks again and again over one connection. Whether it was told to leave; else it lost a request."""
    is_first = True
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"\r\nconnection: close\r\n" in head:
                return True
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
            if is_first:
                answered.release()
            is_first = False
    except (OSError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()


async def test_who_keeps_a_connection_is_told_before_it_closes(redis_server: RedisServer) -> None:
    """No request is lost in a stop: what has a body is not sent a second time by anybody."""
    with RelayProcess(redis_server.url) as relay:
        answered = asyncio.Semaphore(0)
        asking = [asyncio.create_task(_ask(relay.port, answered)) for _ in range(CLIENTS)]
        async with asyncio.timeout(WAIT_S):
            for _ in asking:
                await answered.acquire()
        relay.terminate()
        assert await asyncio.gather(*asking) == [True] * CLIENTS


async def _takes_connections(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_an_event_stream_that_begins_in_a_stop_is_told_too(
    redis_server: RedisServer, jobs: Producer
) -> None:
    """It comes over a connection that a proxy keeps, and does not hold up the end."""
    job = await jobs.running("a")
    with RelayProcess(redis_server.url) as relay:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await reader.readuntil(b'"ok"}')  # so the connection is taken
        relay.terminate()
        while await _takes_connections(relay.port):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        # Into the second that those have who keep one.
        writer.write(f"GET /v1/jobs/{job.job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        assert b'"goodbye"' in answer
        assert answer.endswith(b"0\r\n\r\n")
        assert relay.wait() == 0
        assert "Traceback" not in relay.log
