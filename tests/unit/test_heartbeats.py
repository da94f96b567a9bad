"""Heartbeats come every HEARTBEAT_S, to each connection, without a timer for each (PROTOCOL §6.3)."""

import asyncio
from typing import cast

import pytest

from deltawire.background import in_background
from deltawire_relay.auth import Gate
from deltawire_relay.hubs import Hubs
from deltawire_relay.jobs import Jobs
from deltawire_relay.websocket import HEARTBEAT_S, WebSocketDoor
from tests.support.virtual_time import virtual_time
from tests.unit.test_http_protocol import FakeTransport
from tests.unit.test_websocket_protocol import HANDSHAKE

PONG = b"\x8a\x80\0\0\0\0"


def connect(door: WebSocketDoor) -> FakeTransport:
    transport = FakeTransport()
    connection = door()
    transport.set_protocol(connection)
    connection.connection_made(transport)
    connection.data_received(HANDSHAKE)
    return transport


@virtual_time
async def test_each_connection_hears_a_heartbeat_in_time() -> None:
    """The first after HEARTBEAT_S, whenever it connected; one that is silent has had two pings at its end."""
    door = WebSocketDoor(Gate([], []), cast(Hubs, None), cast(Jobs, None))
    async with in_background(door.keep()):
        for wait_s in (0.0, 1.0, 0.1, 7.3):
            await asyncio.sleep(wait_s)
            quick, silent = connect(door), connect(door)
            await asyncio.sleep(HEARTBEAT_S * 0.95)
            assert quick.sent.count(b"heartbeat") == 0
            for count in (1, 2, 3, 4):
                await asyncio.sleep(HEARTBEAT_S * 0.1)
                assert quick.sent.count(b"heartbeat") == count
                assert silent.sent.count(b"heartbeat") == min(count, 2)
                quick.protocol.data_received(PONG)
                await asyncio.sleep(HEARTBEAT_S * 0.9)
            assert silent.sent.endswith((4012).to_bytes(2, "big") + b"no pong")
            assert silent.closed_by == "abort"
            assert silent.protocol not in door
            assert quick.protocol in door


@virtual_time
async def test_all_leave_when_the_relay_does() -> None:
    """A goodbye and 4001 each; who does not close is dropped when the window is over."""
    door = WebSocketDoor(Gate([], []), cast(Hubs, None), cast(Jobs, None))
    transports = [connect(door) for _ in range(100)]
    begin = asyncio.get_running_loop().time()
    await door.drain(2.0)
    assert asyncio.get_running_loop().time() - begin == pytest.approx(2.0)
    for transport in transports:
        assert transport.sent.count(b'"goodbye"') == 1
        assert b"\x0f\xa1the relay is restarting" in transport.sent
        assert transport.closed_by == "abort"
    assert connect(door).sent.startswith(b"HTTP/1.1 503 ")
    assert not [connection for connection in door if connection.is_writable]
