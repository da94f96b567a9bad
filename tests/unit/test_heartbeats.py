"""Heartbeats come every HEARTBEAT_S, to each connection, without a timer for each (PROTOCOL §6.3)."""

import asyncio
from typing import Any, cast

import pytest
from websockets.frames import Opcode

from deltawire.background import in_background
from deltawire.errors import RedisUnavailableError
from deltawire_relay.admissions import Admissions
from deltawire_relay.auth import Gate
from deltawire_relay.conversation import MAX_UNANSWERED
from deltawire_relay.hubs import Hubs
from deltawire_relay.jobs import Jobs
from deltawire_relay.revoked import Revoked
from deltawire_relay.websocket import HEARTBEAT_S, WebSocketDoor
from tests.support.virtual_time import virtual_time
from tests.unit.test_http_protocol import FakeTransport
from tests.unit.test_websocket_protocol import HANDSHAKE, masked

ADMISSIONS = Admissions(Revoked())

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
    door = WebSocketDoor(Gate([], []), cast(Hubs, None), cast(Jobs, None), ADMISSIONS)
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


class SlowHubs:
    """It takes `for_s` to open a hub, and then there is none."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s

    async def acquire(self, _: str) -> Any:
        await asyncio.sleep(self._for_s)
        raise RedisUnavailableError("not to be reached")


@virtual_time
async def test_who_is_not_listened_to_need_not_answer() -> None:
    """A client that has asked much is not read while it waits for us; its pongs are behind that."""
    door = WebSocketDoor(
        Gate([], []), cast(Hubs, SlowHubs(HEARTBEAT_S)), cast(Jobs, None), Admissions(Revoked())
    )
    async with in_background(door.keep()):
        transport = connect(door)
        asked = MAX_UNANSWERED + 5
        for number in range(asked):
            subscribe = b'{"type":"subscribe","job_id":"job-%d"}' % number
            transport.protocol.data_received(masked(Opcode.TEXT, subscribe))
        await asyncio.sleep(0)
        assert not transport.is_read
        while not transport.is_read:
            await asyncio.sleep(1)
            assert not transport.is_closing()
        for _ in range(asked):
            await asyncio.sleep(HEARTBEAT_S)
            transport.protocol.data_received(PONG)
        assert transport.sent.count(b"redis_unavailable") == asked
        assert not transport.is_closing()


@virtual_time
async def test_one_heartbeat_that_fails_does_not_stop_the_others() -> None:
    """One task beats for all of them."""
    door = WebSocketDoor(Gate([], []), cast(Hubs, None), cast(Jobs, None), ADMISSIONS)
    async with in_background(door.keep()):
        broken, whole = connect(door), connect(door)

        def fail(data: Any) -> None:
            raise RuntimeError("the handler is closed")

        broken.write = fail  # type: ignore[method-assign] # as uvloop's, of a handle that is no more
        await asyncio.sleep(2.5 * HEARTBEAT_S)
        assert whole.sent.count(b"heartbeat") == 2
        assert broken.closed_by == "abort"


@virtual_time
async def test_all_leave_when_the_relay_does() -> None:
    """A goodbye and 4001 each; who does not close is dropped when the window is over."""
    door = WebSocketDoor(Gate([], []), cast(Hubs, None), cast(Jobs, None), ADMISSIONS)
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
