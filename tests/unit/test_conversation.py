"""A client's conversation, whatever it sends (PROTOCOL §6)."""

import asyncio
from typing import cast

from websockets.frames import Opcode

from deltawire.api_keys import SCOPES, new_api_key, parse_api_keys
from deltawire_relay.admissions import Admissions
from deltawire_relay.auth import Gate, Principal
from deltawire_relay.conversation import MAX_UNANSWERED
from deltawire_relay.hubs import Hubs
from deltawire_relay.jobs import Jobs
from deltawire_relay.limits import Bounds, Limits
from deltawire_relay.revoked import Revoked
from deltawire_relay.websocket import WebSocketDoor
from tests.support.virtual_time import virtual_time
from tests.unit.test_heartbeats import connect
from tests.unit.test_http_protocol import FakeTransport
from tests.unit.test_limits import is_empty
from tests.unit.test_websocket_protocol import masked

ADMISSIONS = Admissions(Revoked())


@virtual_time
async def test_one_that_asks_much_at_once_lets_others_have_their_turn() -> None:
    """All is answered, in the order in which it was asked, but not in one turn of the loop."""
    transport = connect(WebSocketDoor(Gate([], []), cast(Hubs, None), cast(Jobs, None), ADMISSIONS))
    count, turns = 20 * MAX_UNANSWERED, 0
    asked = [masked(Opcode.TEXT, b'{"type":"none","request_id":"%d"}' % number) for number in range(count)]
    transport.protocol.data_received(b"".join(asked))
    assert not transport.is_read
    while transport.sent.count(b'"request_id"') < count:
        turns += 1
        await asyncio.sleep(0)
    assert turns >= count // MAX_UNANSWERED
    assert transport.is_read
    at = [transport.sent.index(b'"request_id":"%d"' % number) for number in range(count)]
    assert at == sorted(at)


class Tokens(Gate):
    """Each token is its subject's name, wherever it comes from."""

    def authenticate(self, token: str | None, *, is_ticket: bool = False) -> Principal:
        return Principal(token or "", "acme", SCOPES, is_key=False, expires_at=2e9)

    def check_origin(self, origin: str | None, host: str | None, *, has_header: bool = True) -> None:
        pass


def say_who(transport: FakeTransport, token: str) -> None:
    transport.protocol.data_received(
        masked(Opcode.TEXT, b'{"type":"authenticate","token":"%s"}' % token.encode())
    )


@virtual_time
async def test_a_subject_has_so_many_sockets() -> None:
    """Whoever is one too many is closed with 4504 (PROTOCOL §5.7), until another one has gone."""
    limits = Limits(Bounds(max_connections_per_subject=1))
    _, entry = new_api_key("any", "acme", ["read"])
    door = WebSocketDoor(
        Tokens(parse_api_keys(entry), []), cast(Hubs, None), cast(Jobs, None), ADMISSIONS, limits
    )
    ann, second, bob = connect(door), connect(door), connect(door)
    for transport, name in ((ann, "ann"), (second, "ann"), (bob, "bob")):
        say_who(transport, name)
        await asyncio.sleep(0.1)
    assert b'"authenticated"' not in second.sent
    assert (4504).to_bytes(2, "big") + b"connection_limit" in second.sent
    assert not any(transport.is_closing() for transport in (ann, bob))
    ann.abort()
    await asyncio.sleep(0.1)
    third = connect(door)
    say_who(third, "ann")
    await asyncio.sleep(0.1)
    assert b'"authenticated"' in third.sent
    for transport in (second, bob, third):
        transport.abort()
    await asyncio.sleep(0.1)
    assert is_empty(limits)
