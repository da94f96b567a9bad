"""The proxy of the chaos suite does what it says: what is proved through it depends on that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from tests.support.system import eventually
from tests.support.tcp_proxy import TcpProxy, abort, tcp_proxy

SILENCE_S = 0.2
WAIT_S = 30.0


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def ask(self, data: bytes) -> bytes:
        """The answer; nothing if the connection is gone."""
        self.writer.write(data)
        try:
            async with asyncio.timeout(WAIT_S):
                return await self._reader.read(100)
        except ConnectionError:
            return b""

    async def is_not_answered(self, data: bytes) -> bool:
        self.writer.write(data)
        try:
            async with asyncio.timeout(SILENCE_S):
                await self._reader.read(100)
        except TimeoutError:
            return True
        return False


class Echo:
    """A server behind a proxy that answers what it hears, and all that it heard."""

    def __init__(self, proxy: TcpProxy, heard: list[bytes]) -> None:
        self.proxy = proxy
        self.heard = heard
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        self.clients.append(Client(*await asyncio.open_connection("127.0.0.1", self.proxy.port)))
        return self.clients[-1]


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(100):
                heard.append(data)
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, tcp_proxy(server.sockets[0].getsockname()[1]) as proxy:
        echo = Echo(proxy, heard)
        yield echo
        for client in echo.clients:
            abort(client.writer.transport)
        await asyncio.sleep(0.01)


async def test_it_forwards_and_cuts(echo: Echo) -> None:
    client = await echo.connect()
    assert await client.ask(b"1") == b"1"
    assert echo.proxy.cut() == 1
    assert await client.ask(b"2") == b""
    assert await (await echo.connect()).ask(b"3") == b"3"


@pytest.mark.parametrize(("requests", "replies"), [(True, False), (False, True), (True, True)])
async def test_a_frozen_connection_stays_open_and_carries_nothing(
    echo: Echo, requests: bool, replies: bool
) -> None:
    """One way or both; those that come later are not frozen."""
    client = await echo.connect()
    await client.ask(b"1")
    echo.proxy.freeze(requests=requests, replies=replies)
    assert await client.is_not_answered(b"2")
    if not requests:
        await eventually(lambda: b"2" in echo.heard)
    assert (b"2" in echo.heard) is not requests
    assert await (await echo.connect()).ask(b"3") == b"3"


async def test_new_connections_may_be_accepted_and_carry_nothing(echo: Echo) -> None:
    client = await echo.connect()
    await client.ask(b"1")
    echo.proxy.is_frozen = True
    assert await (await echo.connect()).is_not_answered(b"2")
    assert await client.ask(b"3") == b"3"
    assert echo.heard == [b"1", b"3"]


async def test_lost_replies_are_those_of_requests_that_came_through(echo: Echo) -> None:
    client = await echo.connect()
    await client.ask(b"1")
    losing = asyncio.create_task(echo.proxy.lose_replies(10 * SILENCE_S))
    await asyncio.sleep(0)
    assert await client.is_not_answered(b"2")
    await losing
    assert await client.ask(b"3") == b""
    assert echo.heard == [b"1", b"2"]


async def test_nothing_of_it_is_left_when_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    """Also of connections that were open then, and of one that had just been accepted."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    before = asyncio.all_tasks()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        async with tcp_proxy(server.sockets[0].getsockname()[1]) as proxy:
            clients = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(5)]
            await asyncio.sleep(0.05)
            clients.append(await asyncio.open_connection("127.0.0.1", proxy.port))
        left = {task for task in asyncio.all_tasks() - before if "TcpProxy" in repr(task)}
        assert not left
    for _, writer in clients:
        abort(writer.transport)
    await asyncio.sleep(0.01)
    assert not caplog.records
