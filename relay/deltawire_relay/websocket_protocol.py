"""A WebSocket's bytes: handshake, messages in, pings, closing (RFC 6455), without a task.

The websockets library's protocol without I/O says what each byte means. Between two messages it knows nothing
that another one does not know, so an open connection that is idle has none: it takes the spare one for each
read, and keeps it in the middle of a message and while it closes.
"""

import asyncio
from http import HTTPStatus
from typing import Any, Final

from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Protocol, Side, State
from websockets.server import ServerProtocol

from .flow import StallWatch

SUBPROTOCOL: Final = "deltawire.v1"
MAX_FRAGMENTS: Final = 4_096
CLOSE_TIMEOUT_S: Final = 5.0


class Refusal(Exception):  # noqa: N818 - an answer to a handshake
    """A handshake is answered with this status instead of 101."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class _BrokenMessageError(Exception):
    """Each frame was right, but not the message."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Begun:
    """The fragments of a message, in one: thousands of them weigh no more than their bytes."""

    __slots__ = ("data", "fragments", "opcode")

    def __init__(self, opcode: Opcode) -> None:
        self.opcode = opcode
        self.data = bytearray()
        self.fragments = 0

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """Raises _BrokenMessageError."""
        self.data += data
        self.fragments += 1
        if self.fragments > MAX_FRAGMENTS:
            raise _BrokenMessageError(CloseCode.MESSAGE_TOO_BIG, "too many fragments")


class Spare:
    """The library's protocol for whoever reads next, all with the same bound for messages."""

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self._protocol: Protocol | None = None

    def take(self) -> Protocol:
        protocol, self._protocol = self._protocol, None
        return protocol or Protocol(Side.SERVER, state=State.OPEN, max_size=self.max_message_bytes)

    def give_back(self, protocol: Protocol) -> None:
        self._protocol = protocol


class WebSocketProtocol(asyncio.Protocol):
    """One connection, which uvicorn's HTTP protocol hands over with its request.

    Ready frames may be written with `write` at any time: the library writes whole frames only, all of them
    control frames, and none of ours goes out after its close frame (§5.5.1).
    """

    __slots__ = (
        "_begun",
        "_protocol",
        "_spare",
        "_stall",
        "_state",
        "_timer",
        "is_paused",
        "is_writable",
        "transport",
    )

    def __init__(self, spare: Spare) -> None:
        self.is_writable = False  # open, and nothing waits
        self.is_paused = False  # something waits for the peer to take it
        self._spare = spare
        self._state = State.CONNECTING
        self._protocol: Protocol | None = None
        self._begun: _Begun | None = None  # a message that is not whole
        self._timer: asyncio.TimerHandle | None = None
        self._stall: StallWatch | None = None

    # For those who build upon it.

    def judge(self, request: Request) -> None:
        """Raises Refusal."""

    def opened(self, request: Request) -> None:
        """The handshake is over."""

    def heard(self) -> None:
        """A control frame has come, or a whole message, which is then `received`."""

    def received(self, message: str | bytes) -> None:
        """A whole message: text or binary."""

    def message_too_large(self) -> None:
        """One was, and the peer is being closed for it (1009)."""

    def write(self, frames: bytes) -> None:
        """Never blocks; nothing happens where the connection is not open."""
        if self._state is State.OPEN:
            self._write(frames)

    def close(self, code: int, reason: str) -> None:
        """Begins the closing handshake, which has CLOSE_TIMEOUT_S. Idempotent."""
        if self._state is State.OPEN:
            self._protocol = protocol = self._protocol or self._spare.take()
            protocol.send_close(code, reason)
            self._send(protocol)

    def set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        """In place of the one before, while it is open; from then on there is one for the peer to close."""
        if self._state is State.OPEN:
            self._replace_timer(timer)

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        self.transport = transport
        self._protocol = _Handshake(max_size=self._spare.max_message_bytes)
        if transport.get_write_buffer_size():
            # It was paused for the protocol before, and will say only that it has resumed.
            self.pause_writing()

    def data_received(self, data: bytes) -> None:
        protocol = self._protocol or self._spare.take()
        protocol.receive_data(data)
        events = protocol.events_received()
        self._send(protocol)
        if _is_between_messages(protocol):
            self._protocol = None
            self._spare.give_back(protocol)
        else:
            self._protocol = protocol
        try:
            for event in events:
                if isinstance(event, Frame):
                    self._take(event)
                elif isinstance(event, Request):
                    self._answer(event)
        except _BrokenMessageError as error:
            self._fail(error.code, str(error))

    def eof_received(self) -> None:
        """The transport closes by itself."""
        self._state, self.is_writable = State.CLOSING, False

    def pause_writing(self) -> None:
        self.is_paused, self.is_writable = True, False
        self._stall = StallWatch(self.transport)
        self._stall.start()

    def resume_writing(self) -> None:
        self.is_paused, self.is_writable = False, self._state is State.OPEN
        self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state, self.is_writable = State.CLOSED, False
        self._replace_timer(None)
        self._stop_watching()
        if self._protocol is not None:
            _release(self._protocol)
            self._protocol = None

    # Inside.

    def _answer(self, request: Request) -> None:
        protocol = self._protocol
        assert isinstance(protocol, ServerProtocol)  # noqa: S101 - nobody else reads requests
        try:
            self.judge(request)
            response = protocol.accept(request)
        except Refusal as refusal:
            response = protocol.reject(refusal.status, refusal.text)
        protocol.send_response(response)
        self._send(protocol)
        if protocol.state is State.OPEN:
            self._state, self.is_writable = State.OPEN, not self.is_paused
            self._protocol = None
            _release(protocol)
            self.opened(request)

    def _take(self, frame: Frame) -> None:
        if frame.opcode not in _DATA:
            self.heard()
            return
        opcode, data = frame.opcode, frame.data
        if self._begun is not None or not frame.fin:
            begun = self._begun = self._begun or _Begun(opcode)
            begun.add(data)
            if not frame.fin:
                return
            self._begun = None
            opcode, data = begun.opcode, bytes(begun.data)
        self.heard()
        if opcode is Opcode.BINARY:
            self.received(bytes(data))
            return
        try:
            text = bytes(data).decode()
        except UnicodeDecodeError as error:
            raise _BrokenMessageError(
                CloseCode.INVALID_DATA, f"{error.reason} at position {error.start}"
            ) from error
        self.received(text)

    def _fail(self, code: int, reason: str) -> None:
        """The peer breaks the protocol (§7.1.7)."""
        if self._state is State.OPEN:
            self._protocol = protocol = self._protocol or self._spare.take()
            protocol.fail(code, reason)
            self._send(protocol)

    def _send(self, protocol: Protocol) -> None:
        """Sends what the library has to say, and follows it when it closes."""
        for data in protocol.data_to_send():
            if data:
                self._write(data)
            elif not self.transport.is_closing():
                self.transport.write_eof()
        if protocol.close_expected() and self._state in _NOT_CLOSING:
            self._state, self.is_writable = State.CLOSING, False
            self._expect_close()
            if protocol.close_sent is not None and protocol.close_sent.code == CloseCode.MESSAGE_TOO_BIG:
                self.message_too_large()

    def _expect_close(self) -> None:
        self._replace_timer(asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self._give_up))

    def _give_up(self) -> None:
        if self.is_paused:
            self._expect_close()  # it still takes what came before, or the stall watch sees that it does not
        else:
            self.transport.abort()

    def _replace_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    def _write(self, data: bytes) -> None:
        if self._stall is not None:
            self._stall.wrote(len(data))
        self.transport.write(data)

    def _stop_watching(self) -> None:
        if self._stall is not None:
            self._stall.stop()
            self._stall = None


_DATA: Final = frozenset({Opcode.TEXT, Opcode.BINARY, Opcode.CONT})
_NOT_CLOSING: Final = frozenset({State.CONNECTING, State.OPEN})


class _Handshake(ServerProtocol):
    def select_subprotocol(self, subprotocols: Any) -> Any:  # the library's own NewType of str
        """Ours if offered; a client that offers none is served as well."""
        return SUBPROTOCOL if SUBPROTOCOL in subprotocols else None


def _is_between_messages(protocol: Protocol) -> bool:
    """Whether it is like any other that is open, and waits for the first byte of a message."""
    waiting = getattr(
        protocol.parser, "gi_yieldfrom", None
    )  # the library's type for it is not that of generators
    return (
        protocol.state is State.OPEN
        and protocol.current_size is None
        and waiting is not None
        and waiting.__name__ == "at_eof"
    )


def _release(protocol: Protocol) -> None:
    """Breaks its reference cycle, which is as large as a connection."""
    protocol.parser.close()
