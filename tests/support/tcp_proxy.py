"""A TCP proxy on loopback that cuts or freezes connections when told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class TcpProxy:
    """Forwards to a port; `cut` aborts every connection that is open, `freeze` leaves it half-open."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.connections = 0
        self._frozen: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers |= {writer, upstream_writer}
        try:
            await asyncio.gather(
                self._pump(reader, upstream_writer),
                self._pump(upstream_reader, writer),
                return_exceptions=True,
            )
        finally:
            self._writers -= {writer, upstream_writer}
            writer.close()
            upstream_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                if writer not in self._frozen:
                    writer.write(data)
                    await writer.drain()
        finally:
            abort(writer.transport)

    def freeze(self) -> None:
        """What is open stays open, and nothing comes through it any more; new connections work."""
        self._frozen |= self._writers

    def cut(self) -> None:
        """Aborts what is open, both ways."""
        for writer in self._writers:
            abort(writer.transport)


def abort(transport: asyncio.WriteTransport) -> None:
    """Aborts, whatever state it is in: asyncio's own fails on one that was flushed and closed just before."""
    with suppress(AttributeError):
        transport.abort()


@asynccontextmanager
async def tcp_proxy(target_port: int) -> AsyncIterator[TcpProxy]:
    """A proxy on a free port in front of `target_port`."""
    proxy = TcpProxy(target_port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    async with server:
        yield proxy
        proxy.cut()
        await asyncio.sleep(0)
