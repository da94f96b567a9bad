"""uvicorn's HTTP protocol with what it lacks: deadlines and bounds for peers that send slowly or endlessly.

A request's headers come within HEADERS_TIMEOUT_S (from the connection on for the first one), its body within
BODY_TIMEOUT_S more. An Upgrade is a request, so this holds until it is handed to the WebSocket door.
"""

import asyncio
import sys
from collections import deque
from typing import Any, Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deltawire.errors import WireError

from .flow import StallWatch, limit_buffers
from .http_app import error_answer
from .limits import Address, Limits

HEADERS_TIMEOUT_S: Final = 10.0
BODY_TIMEOUT_S: Final = 30.0
MAX_HEADER_BYTES: Final = 65_536
MAX_PIPELINED: Final = 16
LINGER_S: Final = 2.0
LATE_S: Final = 0.1


class HttpProtocol(HttpToolsProtocol):
    """One connection, until it closes or is handed over."""

    def __init__(self, *args: Any, limits: Limits | None = None, **kwargs: Any) -> None:  # as uvicorn's
        super().__init__(*args, **kwargs)
        self._limits = limits or Limits()
        self._peer: Address | None = None  # while it is counted here

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        limit_buffers(transport)
        self._stall = StallWatch(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._is_in_request = False
        self._is_in_body = False
        self._has_moved = False  # to another request, or to its body: that has a deadline of its own
        self._is_refused = False
        self._unread = 0  # bytes of the request since it began, or since the last of its body
        self._cycles: deque[RequestResponseCycle] = deque()
        self._set_deadline(HEADERS_TIMEOUT_S)
        try:
            self._peer = self._limits.arrive(self.client[0] if self.client else None)
        except WireError as error:
            # At once: who waits for it to be taken holds what has run out. Who does not see it sees a reset.
            self._answer(error)
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._peer is not None:
            self._limits.depart(self._peer)
            self._peer = None
        self._set_deadline(None)
        self._stall.stop()
        for cycle in self._cycles:  # uvicorn tells the last one only
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.stop()

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            self._unread += len(data)
            self._data = data
            super().data_received(data)
            self._watch()

    def _watch(self) -> None:
        """After each read: sets the deadline for what must come next."""
        if self._is_refused or self.transport.get_protocol() is not self:
            return
        if self._is_in_request and self._unread > MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())
        elif self._has_moved:
            timeout_s = BODY_TIMEOUT_S if self._is_in_body else HEADERS_TIMEOUT_S
            self._set_deadline(timeout_s if self._is_in_request else None)
        elif self._deadline is None and self.timeout_keep_alive_task is None and not self._is_answering:
            # Line ends between requests begin none, and have taken uvicorn's deadline away.
            self._set_deadline(HEADERS_TIMEOUT_S)
        self._has_moved = False
        if self.pipeline and (not self._is_in_request or len(self.cycle.body) <= HIGH_WATER_LIMIT):
            # uvicorn reads nothing while a request waits, not even that the client has gone.
            self.flow.resume_reading()

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that we do not have (h2c, which the JDK's client offers) is declined: HTTP/1.1 goes on.

        The parser has stopped behind the headers, and holds the body for another protocol. So another one
        gets the request, without the offer.
        """
        stopped = sys.exception()
        if self._is_refused or not self._declines_upgrade or stopped is None:
            return
        lines = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        request = b"%s %s HTTP/%s\r\n" % (
            self.parser.get_method(),
            self.url,
            self.parser.get_http_version().encode(),
        )
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        super().data_received(b"".join([request, *lines, b"\r\n", self._data[stopped.args[0] :]]))

    def handle_websocket_upgrade(self) -> None:
        if self._is_refused:
            return
        if self._is_answering:
            self._close()  # two would write
            return
        assert self._peer is not None  # noqa: S101 - or it would have been refused
        forwarded_for = [
            value.decode("latin-1") for name, value in self.headers if name == b"x-forwarded-for"
        ]
        try:
            self._limits.shake_hands(self._peer, forwarded_for, self.loop.time())
        except WireError as error:
            self._refuse(error)
            return
        self._set_deadline(None)
        self._stall.stop()  # it would not hear that the transport has resumed
        stopped = sys.exception()
        lines = [b"%s: %s\r\n" % header for header in self.headers]
        method = self.parser.get_method()
        protocol = self.ws_protocol_class(  # type: ignore[call-arg, misc] # as uvicorn's
            config=self.config, server_state=self.server_state, app_state=self.app_state, peer=self._peer
        )
        self._peer = None  # counted there
        self.connections.discard(self)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(b"".join([b"%s %s HTTP/1.1\r\n" % (method, self.url), *lines, b"\r\n"]))
        if isinstance(stopped, httptools.HttpParserUpgrade) and (rest := self._data[stopped.args[0] :]):
            protocol.data_received(rest)  # sent too early, but sent
        # It and its parser hold each other, and would wait for the garbage collector, thousands of them.
        self.parser = None  # type: ignore[assignment] # as uvicorn's

    def send_400_response(self, msg: str) -> None:
        if not self._is_refused:
            self._refuse(WireError("invalid_request", msg))

    # What the parser calls.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_request, self._is_in_body = True, False
        self._has_moved = self._has_moved or self._deadline is None
        self._unread = 0

    def on_headers_complete(self) -> None:
        if self._is_refused or self._declines_upgrade:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._close()
        else:
            self._is_in_body = self._has_moved = True
            last = self.cycle
            super().on_headers_complete()
            while self._cycles and self._cycles[0].response_complete:
                self._cycles.popleft()
            if self.cycle is not last:  # an Upgrade has none
                self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            self._unread = 0
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not (self._is_refused or self._declines_upgrade):
            self._is_in_request, self._has_moved = False, True
            super().on_message_complete()

    # Inside.

    @property
    def _declines_upgrade(self) -> bool:
        is_offered = self.parser.should_upgrade() and b"upgrade" in dict(self.headers)
        return is_offered and not self._should_upgrade()

    @property
    def _is_answering(self) -> bool:
        return bool(self._cycles) and not self._cycles[-1].response_complete

    def _set_deadline(self, timeout_s: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if timeout_s is None else self.loop.call_later(timeout_s, self._expire)

    def _expire(self) -> None:
        # Timers of a loop that was busy run before its sockets are read: what has come is heard first.
        self._deadline = self.loop.call_later(LATE_S, self._give_up)

    def _give_up(self) -> None:
        if self._is_refused:
            self.transport.abort()
        elif self._is_in_request:
            part, timeout_s = ("body", BODY_TIMEOUT_S) if self._is_in_body else ("headers", HEADERS_TIMEOUT_S)
            self._refuse(WireError("request_timeout", f"the {part} did not come within {timeout_s:.0f} s"))
        else:
            self._close()

    def _refuse(self, error: WireError) -> None:
        """Answers, unless an answer is under way, and closes."""
        may_answer = not self.pipeline and (
            not self._is_answering or (self._is_in_body and not self.cycle.response_started)
        )
        if not may_answer:
            self._close()
            return
        self._is_refused = True
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._answer(error)
        # A socket that is closed with bytes unread resets the connection, and the answer may be lost.
        self._unset_keepalive_if_required()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_deadline(LINGER_S)

    def _answer(self, error: WireError) -> None:
        answer = error_answer(error.error, error.status)
        headers = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        lines = [b"%s: %s\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(answer.body)]))

    def _close(self) -> None:
        self._is_refused = True
        self._set_deadline(None)
        self.transport.close()


def _headers_too_large() -> WireError:
    return WireError("headers_too_large", f"a request's headers have at most {MAX_HEADER_BYTES} bytes")
