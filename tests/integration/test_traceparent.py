"""A gateway is told in which trace it is asked."""

import asyncio

from deltawire_worker.refusal import UpstreamError
from deltawire_worker.upstream import UpstreamClient
from deltawire_worker.upstreams import Upstream

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def asked_with(traceparent: str) -> str:
    """The head of the request that a gateway gets."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    upstream = Upstream(name="default", base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    client = UpstreamClient()
    try:
        async with client.open(upstream, b"{}", job_id="job", traceparent=traceparent):
            raise AssertionError("it refuses")
    except UpstreamError:
        pass
    finally:
        await client.aclose()
        server.close()
        await server.wait_closed()
    return heads[0].decode().lower()


async def test_the_attempts_span_goes_along() -> None:
    """So that the gateway's own spans are its children."""
    assert f"traceparent: {TRACEPARENT}" in await asked_with(TRACEPARENT)


async def test_without_a_trace_nothing_is_said() -> None:
    """No header at all."""
    assert "traceparent" not in await asked_with("")
