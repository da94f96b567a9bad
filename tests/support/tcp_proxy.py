"""A TCP proxy on loopback that cuts, delays, freezes and loses what passes through it, when told to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

#: Gets what the server sent on one connection and returns what the client shall see of it.
Filter = Callable[[bytes], bytes]


class Pair:
    """One connection through the proxy. A way that is frozen stays open, and takes bytes to nowhere."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.is_frozen = {client: False, server: False}  # by whom the bytes would go to

    def cut(self) -> None:
        abort(self.client.transport)
        abort(self.server.transport)


class TcpProxy:
    """Forwards to a port. What happens to whom:

    - `cut` aborts every connection that is open;
    - `freeze` makes them half-open: kept, with nothing forwarded one way or both;
    - `is_frozen` does the same to those that are still to come;
    - `delay_s` holds back each piece, both ways (and what comes meanwhile goes with the next piece);
    - `new_filter` makes a filter for each connection's replies.
    """

    def __init__(self, target_port: int, *, new_filter: Callable[[], Filter] | None = None) -> None:
        self.target_port = target_port
        self._new_filter = new_filter
        self._pairs: set[Pair] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self.port = 0
        self.connections = 0
        self.delay_s = 0.0
        self.is_frozen = False

    @property
    def redis_url(self) -> str:
        """For a Redis server behind it."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._pairs)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            server_reader, server = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:  # a server that is away: so is its proxy
            abort(writer.transport)
            return
        pair = Pair(writer, server)
        self._pairs.add(pair)
        if self.is_frozen:
            self._freeze(pair, requests=True, replies=True)
        try:
            await asyncio.gather(
                self._pump(reader, server, pair, None),
                self._pump(server_reader, writer, pair, self._new_filter and self._new_filter()),
                return_exceptions=True,
            )
        finally:
            self._pairs.discard(pair)
            writer.close()
            server.close()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: Pair,
        filter_: Filter | None,
    ) -> None:
        try:
            while data := await reader.read(65_536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if pair.is_frozen[writer]:
                    continue
                writer.write(filter_(data) if filter_ else data)
                await writer.drain()
        finally:
            abort(writer.transport)

    def cut(self) -> int:
        """Aborts what is open, both ways; how many connections that were."""
        for pair in self._pairs:
            pair.cut()
        return len(self._pairs)

    def freeze(self, *, requests: bool = True, replies: bool = True) -> None:
        """From now on what is open forwards nothing that way. It does not thaw: `cut` it."""
        for pair in self._pairs:
            self._freeze(pair, requests=requests, replies=replies)

    @staticmethod
    def _freeze(pair: Pair, *, requests: bool, replies: bool) -> None:
        pair.is_frozen[pair.server] |= requests
        pair.is_frozen[pair.client] |= replies

    async def close(self) -> None:
        """Cuts what is open, or comes yet to a server that is closed, and waits until nothing of it is left.

        Else the loop's end cancels what is left, which asyncio's streams report as an exception.
        """
        await asyncio.sleep(0)  # what was accepted last gets its task
        while self._serving:
            self.cut()
            await asyncio.wait(tuple(self._serving), timeout=0.01)

    async def lose_replies(self, for_s: float) -> None:
        """Requests get through, their replies are lost, and then the connections are, too."""
        self.freeze(requests=False)
        await asyncio.sleep(for_s)
        self.cut()


def abort(transport: asyncio.WriteTransport) -> None:
    """Aborts, whatever state it is in: asyncio's own fails on one that was flushed and closed just before."""
    with suppress(AttributeError):
        transport.abort()


@asynccontextmanager
async def tcp_proxy(
    target_port: int, *, new_filter: Callable[[], Filter] | None = None
) -> AsyncIterator[TcpProxy]:
    """A proxy on a free port in front of `target_port`."""
    proxy = TcpProxy(target_port, new_filter=new_filter)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    async with server:
        try:
            yield proxy
        finally:
            server.close()
            await proxy.close()
