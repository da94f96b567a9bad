"""A client's conversation, whatever it sends (PROTOCOL §6)."""

import asyncio
from typing import cast

from websockets.frames import Opcode

from deltawire_relay.admissions import Admissions
from deltawire_relay.auth import Gate
from deltawire_relay.conversation import MAX_UNANSWERED
from deltawire_relay.hubs import Hubs
from deltawire_relay.jobs import Jobs
from deltawire_relay.revoked import Revoked
from deltawire_relay.websocket import WebSocketDoor
from tests.support.virtual_time import virtual_time
from tests.unit.test_heartbeats import connect
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
