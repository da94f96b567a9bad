"""Connections that share the library's protocols are, each, what the library would be (RFC 6455)."""

import asyncio
import tracemalloc
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State

from deltawire_relay.websocket_protocol import CLOSE_TIMEOUT_S, MAX_FRAGMENTS, Spare, WebSocketProtocol
from tests.support.virtual_time import virtual_time
from tests.unit.test_http_protocol import FakeTransport

MAX_MESSAGE_BYTES: Final = 65_536
HANDSHAKE: Final = (
    b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class Peer(WebSocketProtocol):
    """Notes what it is told."""

    def __init__(self, spare: Spare) -> None:
        super().__init__(spare)
        self.messages: list[str | bytes] = []

    def received(self, message: str | bytes) -> None:
        self.messages.append(message)


def connect(spare: Spare | None = None) -> tuple[Peer, FakeTransport]:
    """A connection whose handshake is over; what that has sent is forgotten."""
    peer, transport = Peer(spare or Spare(MAX_MESSAGE_BYTES)), FakeTransport()
    transport.set_protocol(peer)
    peer.connection_made(transport)
    peer.data_received(HANDSHAKE)
    assert transport.sent.startswith(b"HTTP/1.1 101 ")
    transport.sent = b""
    return peer, transport


def masked(opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, list[str | bytes]]:
    """What a client sends, pings among fragments included, and the messages in it."""
    sent, messages = b"", list[str | bytes]()
    for _ in range(draw(st.integers(0, 4))):
        text = draw(st.text(max_size=8) | st.just("x" * 200))
        data, opcode = text.encode(), draw(st.sampled_from([Opcode.TEXT, Opcode.BINARY]))
        messages.append(text if opcode is Opcode.TEXT else data)
        cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            is_last = end == len(data) and begin == ([0, *cuts])[-1]
            sent += masked(opcode, data[begin:end], fin=is_last)
            if is_last:
                break
            opcode = Opcode.CONT
            if draw(st.booleans()):
                sent += masked(Opcode.PING, b"p%d" % len(sent))
    if draw(st.booleans()):
        sent += masked(Opcode.CLOSE, b"\x03\xe8")
    return sent, messages


@given(st.data())
def test_connections_that_share_a_spare_do_not_mix(data: st.DataObject) -> None:
    """However their bytes are cut and mixed: each hears its messages, and answers as the library does."""
    told = data.draw(st.lists(conversations(), min_size=1, max_size=3))

    @virtual_time
    async def check() -> None:
        spare = Spare(MAX_MESSAGE_BYTES)
        connected = [connect(spare) for _ in told]
        left = [sent for sent, _ in told]
        while any(left):
            at = data.draw(st.sampled_from([at for at, rest in enumerate(left) if rest]))
            count = data.draw(st.integers(1, len(left[at])))
            connected[at][0].data_received(left[at][:count])
            left[at] = left[at][count:]
        for (peer, transport), (sent, messages) in zip(connected, told, strict=True):
            library = Protocol(Side.SERVER, state=State.OPEN)
            library.receive_data(sent)
            assert peer.messages == messages
            assert transport.sent == b"".join(library.data_to_send())
            assert peer.is_writable is (library.state is State.OPEN)
            assert (peer._protocol is None) is (library.state is State.OPEN)

    check()


@pytest.mark.parametrize(
    "begun",
    [
        masked(Opcode.TEXT, b"whole") + masked(Opcode.TEXT, b"more")[:1],
        masked(Opcode.TEXT, b"more")[:2],
        masked(Opcode.TEXT, b"more")[:6],
        masked(Opcode.TEXT, b"more", fin=False),
    ],
    ids=["a byte of a header", "half a header", "a header", "a fragment"],
)
@virtual_time
async def test_in_the_middle_of_a_message_nothing_is_shared(begun: bytes) -> None:
    """The library's state is the connection's own then, even where nothing is buffered."""
    spare = Spare(MAX_MESSAGE_BYTES)
    peer, _ = connect(spare)
    other, _ = connect(spare)
    peer.data_received(begun)
    assert peer._protocol is not None
    other.data_received(masked(Opcode.TEXT, b"theirs"))
    assert other.messages == ["theirs"]
    assert other._protocol is None


async def test_a_message_in_thousands_of_fragments_weighs_no_more_than_its_bytes() -> None:
    """Else one stranger's few bytes, on as many connections as it may have, would fill the memory."""
    peer, _ = connect()
    fragment = masked(Opcode.CONT, b"x", fin=False)
    peer.data_received(masked(Opcode.TEXT, b"x", fin=False))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(MAX_FRAGMENTS - 1):
            peer.data_received(fragment)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 10 * MAX_FRAGMENTS


REFUSED: Final = {
    "no UTF-8": (masked(Opcode.TEXT, b"\xff"), 1007),
    "a mask that is missing": (b"\x81\x00", 1002),
    "too large": (masked(Opcode.TEXT, b"x" * (MAX_MESSAGE_BYTES + 1)), 1009),
    "too many": (
        masked(Opcode.TEXT, fin=False) + masked(Opcode.CONT, fin=False) * MAX_FRAGMENTS + masked(Opcode.CONT),
        1009,
    ),
}


@pytest.mark.parametrize(("data", "code"), REFUSED.values(), ids=REFUSED)
def test_a_peer_that_breaks_the_protocol_is_closed(data: bytes, code: int) -> None:
    """At once, with the code of RFC 6455 §7.4.1; nothing that comes after is heard, or written."""

    @virtual_time
    async def check() -> None:
        peer, transport = connect()
        peer.data_received(masked(Opcode.TEXT, b"before") + data + masked(Opcode.TEXT, b"after"))
        peer.data_received(masked(Opcode.TEXT, b"after"))
        peer.write(b"ours")
        assert peer.messages == ["before"]
        assert transport.sent[:1] == b"\x88"
        assert transport.sent[2:4] == code.to_bytes(2, "big")
        assert len(transport.sent) == 2 + transport.sent[1]
        assert transport.has_sent_eof
        await asyncio.sleep(CLOSE_TIMEOUT_S + 1)
        assert transport.closed_by == "abort"

    check()


@virtual_time
async def test_a_peer_that_closes_and_stays_is_dropped() -> None:
    """Its close frame is echoed; a connection that it leaves open ends after CLOSE_TIMEOUT_S."""
    peer, transport = connect()
    peer.data_received(masked(Opcode.CLOSE, b"\x0f\xa1"))
    assert transport.sent == b"\x88\x02\x0f\xa1"
    assert transport.has_sent_eof
    peer.set_timer(None)  # as when it is known, too late, who it is
    await asyncio.sleep(CLOSE_TIMEOUT_S - 1)
    assert not transport.is_closing()
    await asyncio.sleep(2)
    assert transport.closed_by == "abort"


@virtual_time
async def test_closing_waits_for_the_peer_but_not_for_ever() -> None:
    """After our close frame nothing else is written; what the peer has not taken yet has its time."""
    peer, transport = connect()
    transport.room = 10
    peer.write(b"x" * 20)
    peer.close(4001, "bye")
    peer.close(4003, "twice")
    peer.write(b"too late")
    frame = b"\x88\x05" + (4001).to_bytes(2, "big") + b"bye"
    assert transport.sent == b"x" * 20 + frame
    for _ in range(3):  # a stall watch drops those who take nothing
        await asyncio.sleep(CLOSE_TIMEOUT_S)
        transport.take(1)
    assert not transport.is_closing()
    transport.take(100)
    peer.resume_writing()
    assert not peer.is_writable
    await asyncio.sleep(CLOSE_TIMEOUT_S + 1)
    assert transport.closed_by == "abort"


@virtual_time
async def test_a_transport_that_was_full_is_taken_over_as_such() -> None:
    """It will not say `pause_writing` again, only that it has resumed."""
    peer, transport = Peer(Spare(MAX_MESSAGE_BYTES)), FakeTransport()
    transport.set_protocol(peer)
    transport.sent, transport.room = b"an answer before", 3
    peer.connection_made(transport)
    peer.data_received(HANDSHAKE)
    assert not peer.is_writable
    transport.take(1_000)
    peer.resume_writing()
    assert peer.is_writable
    peer.connection_lost(None)
