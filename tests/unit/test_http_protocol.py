"""Slow and endless requests are answered and closed; nothing is left behind (PROTOCOL §5.6)."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from deltawire_relay.flow import STALLED_TIMEOUT_S
from deltawire_relay.http_protocol import (
    BODY_TIMEOUT_S,
    HEADERS_TIMEOUT_S,
    LATE_S,
    LINGER_S,
    MAX_HEADER_BYTES,
    MAX_PIPELINED,
    HttpProtocol,
)
from tests.support.virtual_time import virtual_time

KEEP_ALIVE_S = 75
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


class FakeTransport(asyncio.Transport):
    """Takes what is written, up to `room`; the rest waits, as in a transport whose peer does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Any = None
        self.sent = b""
        self.room = 1_000_000
        self.closed_by = ""
        self.closing = asyncio.Event()
        self.has_sent_eof = False
        self.is_read = True

    def write(self, data: Any) -> None:
        is_stuck = self.get_write_buffer_size() > 0
        self.sent += data
        if not is_stuck and self.get_write_buffer_size() > 0:
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return max(0, len(self.sent) - self.room)

    def take(self, count: int) -> None:
        """The peer reads."""
        self.room += count

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert isinstance(self.protocol, asyncio.BaseProtocol)
        return self.protocol

    def close(self) -> None:
        self._end("close")

    def abort(self) -> None:
        self._end("abort")

    def _end(self, how: str) -> None:
        if not self.closed_by:
            self.closed_by = how
            self.closing.set()
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def is_closing(self) -> bool:
        return bool(self.closed_by)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_sent_eof = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


class Upgraded(asyncio.Protocol):
    """Stands for the WebSocket door."""


App = Callable[[Any, Any, Any], Awaitable[None]]


async def echo(_: Any, receive: Any, send: Any) -> None:
    """Answers with the size of the body; a client that goes is no answer."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": b"%6d" % size})


class Endless:
    """Begins an answer and waits for the client to go."""

    def __init__(self) -> None:
        self.begun = self.over = 0

    async def __call__(self, _: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.over += 1


def connect(app: App = echo) -> tuple[HttpProtocol, FakeTransport]:
    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        ws=lambda **_: Upgraded(),  # type: ignore[arg-type] # any factory of a protocol
        timeout_keep_alive=KEEP_ALIVE_S,
        log_config=None,
        lifespan="off",
    )
    config.load()
    protocol = HttpProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    transport = FakeTransport()
    transport.protocol = protocol
    protocol.connection_made(transport)
    return protocol, transport


async def closes_after(transport: FakeTransport) -> float:
    """Seconds until the transport is closed, of virtual time."""
    begin = asyncio.get_running_loop().time()
    await transport.closing.wait()
    return asyncio.get_running_loop().time() - begin


def answer(transport: FakeTransport) -> tuple[int, str]:
    """Status and code of the last answer, which must have our one shape."""
    head, _, body = transport.sent.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert b"content-type: application/json" in head
    return int(head[:3]), json.loads(body)["error"]["code"]


async def drip(protocol: HttpProtocol, data: bytes, pause_s: float) -> None:
    """Sends byte by byte, until the connection closes."""
    for at in range(len(data)):
        if protocol.transport.is_closing() or protocol._is_refused:
            return
        protocol.data_received(data[at : at + 1])
        await asyncio.sleep(pause_s)


@virtual_time
async def test_a_silent_connection_is_closed() -> None:
    """Without a word, since nothing was asked."""
    _, transport = connect()
    assert await closes_after(transport) == pytest.approx(HEADERS_TIMEOUT_S, abs=0.5)
    assert transport.sent == b""


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 1_000, UPGRADE + b"X: y\r\n" * 1_000]
)
def test_slow_headers_are_408(head: bytes) -> None:
    """However steadily they drip, counted from the connection."""

    @virtual_time
    async def check() -> None:
        protocol, transport = connect()
        await asyncio.sleep(HEADERS_TIMEOUT_S / 2)
        await drip(protocol, head, 0.5)
        assert asyncio.get_running_loop().time() == pytest.approx(HEADERS_TIMEOUT_S, abs=1)
        assert answer(transport) == (408, "request_timeout")
        assert transport.has_sent_eof
        assert await closes_after(transport) <= LINGER_S + 1

    check()


@pytest.mark.parametrize(("head", "piece"), [(POST, b"x"), (CHUNKED, b"1\r\nx\r\n")])
def test_a_slow_body_is_408(head: bytes, piece: bytes) -> None:
    """Its time is a total; progress does not extend it."""

    @virtual_time
    async def check() -> None:
        protocol, transport = connect()
        protocol.data_received(head)
        while not protocol._is_refused:
            await asyncio.sleep(4)
            protocol.data_received(piece)
        assert asyncio.get_running_loop().time() == pytest.approx(BODY_TIMEOUT_S, abs=5)
        assert answer(transport) == (408, "request_timeout")
        assert await closes_after(transport) <= LINGER_S + 1

    check()


ENDLESS = {
    "many headers": (b"GET / HTTP/1.1\r\n", b"X-A: b\r\n" * 100),
    "one header": (b"GET / HTTP/1.1\r\nX-A: ", b"b" * 1_000),
    "a path": (b"GET /", b"b" * 1_000),
    "many headers of an Upgrade": (UPGRADE, b"X-A: b\r\n" * 100),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X-A: b\r\n" * 100),
    "one trailer": (CHUNKED + b"1\r\nx\r\n0\r\nX-A: ", b"b" * 1_000),
}


@pytest.mark.parametrize(("begin", "more"), ENDLESS.values(), ids=ENDLESS)
def test_endless_headers_are_431(begin: bytes, more: bytes) -> None:
    """Cut off at their bound; what comes after the answer is dropped."""

    @virtual_time
    async def check() -> None:
        protocol, transport = connect()
        protocol.data_received(begin)
        sent = 0
        while not protocol._is_refused:
            protocol.data_received(more)
            sent += len(more)
            assert sent < 2 * MAX_HEADER_BYTES
        assert answer(transport) == (431, "headers_too_large")
        before = transport.sent
        protocol.data_received(more)
        assert await closes_after(transport) <= LINGER_S + 1
        assert transport.sent == before

    check()


@virtual_time
async def test_headers_in_one_piece_are_bounded_as_well() -> None:
    """The application never sees them."""
    app = Endless()
    protocol, transport = connect(app)
    protocol.data_received(
        b"GET / HTTP/1.1\r\nHost: a\r\nX: %s\r\n\r\n" % (b"x" * MAX_HEADER_BYTES) + REQUEST
    )
    await asyncio.sleep(0)
    assert answer(transport) == (431, "headers_too_large")
    assert app.begun == 0


@virtual_time
async def test_a_quick_client_is_served() -> None:
    """A large body in time, then another request on the same connection, then a second that is slow."""
    protocol, transport = connect()
    body = b"x" * 300_000
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body))
    for at in range(0, len(body), 1_000):
        protocol.data_received(body[at : at + 1_000])
        await asyncio.sleep(BODY_TIMEOUT_S / 400)
    await asyncio.sleep(KEEP_ALIVE_S - 5)
    protocol.data_received(REQUEST)
    await asyncio.sleep(1)
    assert transport.sent.count(b"HTTP/1.1 200 OK") == 2
    assert b"\r\n\r\n300000HTTP/1.1" in transport.sent
    assert transport.sent.endswith(b"     0")
    assert not transport.is_closing()
    await drip(protocol, b"GET / HTTP/1.1\r\n" + b"X" * 1_000, 1)
    assert answer(transport) == (408, "request_timeout")


@virtual_time
async def test_each_request_has_its_own_time() -> None:
    """A request that begins in the same read in which another ends has all of it."""
    protocol, transport = connect()
    protocol.data_received(REQUEST[:10])
    await asyncio.sleep(HEADERS_TIMEOUT_S - 1)
    protocol.data_received(REQUEST[10:] + REQUEST[:10])
    await asyncio.sleep(HEADERS_TIMEOUT_S - 1)
    protocol.data_received(REQUEST[10:])
    await asyncio.sleep(1)
    assert transport.sent.count(b"200 OK") == 2


@virtual_time
async def test_what_came_while_the_loop_was_busy_is_heard() -> None:
    """Its timers run before its sockets are read: an overloaded relay must not take that for silence."""
    protocol, transport = connect()
    asyncio.get_running_loop().call_later(HEADERS_TIMEOUT_S + LATE_S / 2, protocol.data_received, REQUEST)
    await asyncio.sleep(2 * HEADERS_TIMEOUT_S)
    assert b"200 OK" in transport.sent


@virtual_time
async def test_line_ends_do_not_keep_a_connection() -> None:
    """They begin no request, and may not take its place."""
    protocol, transport = connect()
    protocol.data_received(REQUEST)
    await asyncio.sleep(1)
    for _ in range(100):
        if transport.is_closing():
            break
        protocol.data_received(b"\r\n")
        await asyncio.sleep(1)
    assert transport.is_closing()


@virtual_time
async def test_an_answer_takes_its_time() -> None:
    """No deadline of a request holds for an event stream; a slow one behind it ends both, without a word."""
    app = Endless()
    protocol, transport = connect(app)
    protocol.data_received(REQUEST)
    await asyncio.sleep(10 * BODY_TIMEOUT_S)
    assert not transport.is_closing()
    sent = transport.sent
    protocol.data_received(REQUEST[:10])
    assert await closes_after(transport) == pytest.approx(HEADERS_TIMEOUT_S, abs=0.5)
    await asyncio.sleep(1)
    assert transport.sent == sent
    assert app.over == 1


@virtual_time
async def test_garbage_is_400_in_our_shape() -> None:
    """What is no HTTP is no reason for another shape (PROTOCOL §8.1)."""
    protocol, transport = connect()
    protocol.data_received(b"\x16\x03\x01\x02\x00")
    assert answer(transport) == (400, "invalid_request")


@virtual_time
async def test_an_upgrade_is_handed_over_without_deadlines() -> None:
    """The door has its own."""
    protocol, transport = connect()
    protocol.data_received(UPGRADE + b"\r\n")
    assert isinstance(transport.protocol, Upgraded)
    await asyncio.sleep(10 * BODY_TIMEOUT_S)
    assert not transport.is_closing()


@virtual_time
async def test_an_upgrade_behind_an_answer_that_waits_is_not_given_up() -> None:
    """The door watches the client from then on; the watch of before does not know when it reads again."""
    protocol, transport = connect()
    protocol.data_received(REQUEST)
    await asyncio.sleep(1)
    transport.room = 2 * len(transport.sent) - 3
    protocol.data_received(REQUEST)
    await asyncio.sleep(1)
    assert transport.get_write_buffer_size() == 3
    protocol.data_received(UPGRADE + b"\r\n")
    assert isinstance(transport.protocol, Upgraded)
    transport.take(1_000)
    await asyncio.sleep(10 * STALLED_TIMEOUT_S)
    assert not transport.is_closing()


H2C = (
    b"Host: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
)


@pytest.mark.parametrize(
    ("request_", "size"),
    [
        (b"POST / HTTP/1.1\r\n" + H2C + b"Content-Length: 10\r\n\r\n0123456789", b"    10"),
        (
            b"POST / HTTP/1.1\r\n" + H2C + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"     3",
        ),
        (b"GET / HTTP/1.1\r\n" + H2C + b"\r\n", b"     0"),
        (b"POST / HTTP/1.0\r\n" + H2C + b"Content-Length: 1\r\n\r\nx", b"     1"),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 1_000])
def test_an_upgrade_that_we_do_not_have_is_declined(request_: bytes, size: bytes, step: int) -> None:
    """The JDK's client offers h2c at first: its request is answered, body and all, and so is the next."""

    @virtual_time
    async def check() -> None:
        protocol, transport = connect()
        for start in range(0, len(request_), step):
            protocol.data_received(request_[start : start + step])
        await asyncio.sleep(1)
        assert transport.sent.count(b"HTTP/1.1 ") == 1
        assert transport.sent.startswith(b"HTTP/1.1 200 ")
        assert transport.sent.endswith(b"\r\n\r\n" + size)
        if b"HTTP/1.0" not in request_:
            protocol.data_received(POST + b"0123456789")
            await asyncio.sleep(1)
            assert transport.sent.endswith(b"\r\n\r\n    10")
            assert await closes_after(transport) == pytest.approx(KEEP_ALIVE_S - 1)

    check()


@virtual_time
async def test_an_upgrade_that_we_do_not_have_keeps_the_deadlines() -> None:
    """Of the body, and of headers without end."""
    protocol, transport = connect()
    protocol.data_received(b"POST / HTTP/1.1\r\n" + H2C + b"Content-Length: 10\r\n\r\n01")
    assert await closes_after(transport) == pytest.approx(BODY_TIMEOUT_S + LINGER_S + 2 * LATE_S)
    assert answer(transport) == (408, "request_timeout")
    protocol, transport = connect()
    protocol.data_received(b"POST / HTTP/1.1\r\n" + H2C + b"X: %s\r\n\r\n" % (b"x" * MAX_HEADER_BYTES))
    assert answer(transport) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("waiting", "is_read"),
    [
        (REQUEST, True),
        (POST, True),
        (POST + b"0123456789", True),
        (POST.replace(b"10", b"90000") + b"x" * 90_000, True),
        (POST.replace(b"10", b"90000") + b"x" * 80_000, False),  # it has a deadline
    ],
)
def test_a_client_is_listened_to_while_a_request_waits(waiting: bytes, is_read: bool) -> None:
    """Else nobody would hear that it has gone."""

    @virtual_time
    async def check() -> None:
        protocol, transport = connect(Endless())
        protocol.data_received(REQUEST)
        await asyncio.sleep(1)
        protocol.data_received(waiting)
        assert transport.is_read is is_read
        transport.abort()
        await asyncio.sleep(1)

    check()


@pytest.mark.parametrize("second", [REQUEST, UPGRADE + b"\r\n", POST, b"\x00"])
def test_an_application_hears_that_its_client_has_gone(second: bytes) -> None:
    """Also where another request waits behind the one that it answers."""

    @virtual_time
    async def check() -> None:
        app = Endless()
        protocol, transport = connect(app)
        protocol.data_received(REQUEST)
        await asyncio.sleep(1)
        protocol.data_received(second)
        await asyncio.sleep(1)
        transport.abort()
        await asyncio.sleep(1)
        assert app.over == app.begun == 1
        assert protocol._deadline is None

    check()


@virtual_time
async def test_requests_do_not_pile_up() -> None:
    """Thousands in one read would each take kilobytes."""
    app = Endless()
    protocol, transport = connect(app)
    protocol.data_received(REQUEST * 5_000)
    assert len(protocol.pipeline) <= MAX_PIPELINED
    await asyncio.sleep(1)
    assert transport.is_closing()
    assert app.over == app.begun <= 1
