"""One HTTP/1.1 connection, from its socket to the pieces of a body. `http_transport.py` keeps many."""

import asyncio
import re
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import httptools
import httpx

MAX_HEAD_BYTES = 64 * 1024  # status line and headers, 1xx responses included; also a chunked trailer
MAX_UNREAD_BYTES = 256 * 1024  # then the socket is not read until the reader has taken them
MAX_PIECE_BYTES = 8 * 1024  # what one response may take of a turn of the loop
MAX_UNSENT_BYTES = 64 * 1024  # then `request.stream` is not read until the kernel has taken them

Sink = Callable[[bytes], bool]
"""Takes a piece of a body; returns False to have no more for now."""

# RFC 9110, sections 5.1 and 5.5. A line break in a value would let it write headers of its own.
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIELD_VALUE = re.compile(rb"(?:[^\x00-\x20\x7f](?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)?")
_TARGET = re.compile(rb"[\x21-\x7e]+")


class Origin(NamedTuple):
    """Which connections can stand in for each other."""

    scheme: str
    host: bytes
    port: int
    server_name: str  # what TLS asks for and checks

    @classmethod
    def of(cls, request: httpx.Request) -> "Origin":
        url = request.url
        if url.scheme not in ("http", "https") or not url.raw_host:
            raise httpx.UnsupportedProtocol("the URL of a request must begin with http:// or https://")
        host = url.raw_host
        server_name: str = request.extensions.get("sni_hostname") or host.decode("ascii")
        return cls(url.scheme, host, url.port or (443 if url.scheme == "https" else 80), server_name)


class Connection(asyncio.Protocol):
    """One socket, at rest or in one exchange: a request and its response, never two at once.

    One future, one reader: whoever sends or receives waits on `news`, which anything new resolves.
    Only who pushes is not woken by each piece of a body: it goes to the sink from where it arrives.
    """

    # A worker has thousands: a dict of so many names is 1.5 KB.
    __slots__ = (
        *("origin", "is_idle", "expires_at", "loop", "status", "reason", "http_version", "headers"),
        *("is_complete", "is_stale", "_on_lost", "_transport", "_is_aborted", "_is_write_paused"),
        *("_is_read_paused", "_waiter", "_sink", "_timer", "_read_timeout", "_progress_at", "_is_busy"),
        *("_parser", "_method", "_error", "_chunks", "_unread_bytes", "_head_bytes", "_bytes_since_body"),
        *("_is_silent", "_is_sent", "_has_head", "_has_news", "_can_keep", "_ends_by_eof"),
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, origin: "Origin", on_lost: Callable[["Connection"], None]
    ) -> None:
        self.origin = origin
        self.is_idle = False  # it is in the pool, until:
        self.expires_at = 0.0
        self.loop = loop
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._is_aborted = False
        self._is_write_paused = False
        self._is_read_paused = False
        self._waiter: asyncio.Future[bool] | None = None
        self._sink: Sink | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._read_timeout = 0.0
        self._progress_at = 0.0
        self._is_busy = False
        self._reset("")

    def _reset(self, method: str) -> None:
        self.status = 0
        self.reason = b""
        self.http_version = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        self.is_stale = False  # the server ended the connection before the first byte of a response
        # A parser of its own for each response: only so can HEAD, and bytes past the end, do no harm.
        self._parser: Any = httptools.HttpResponseParser(self)  # Any: see mypy's overrides
        self._method = method
        self._error: httpx.TransportError | None = None
        self._chunks: list[bytes] = []
        self._unread_bytes = 0
        self._head_bytes = 0
        self._bytes_since_body = 0
        self._is_silent = True  # no byte of a response yet
        self._is_sent = False
        self._has_head = False
        self._has_news = False
        self._can_keep = False
        self._ends_by_eof = False

    @property
    def has_unread(self) -> bool:
        return bool(self._chunks)

    @property
    def is_usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def start_tls(self, context: ssl.SSLContext, server_name: str) -> None:
        # Not create_connection(ssl=...): cancelled at its first step, that leaves the socket to shake
        # hands alone for a minute. This way the TCP transport is in our hands, to be aborted.
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection was closed before the TLS handshake")
        transport = await self.loop.start_tls(self._transport, self, context, server_hostname=server_name)
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection was closed during the TLS handshake")
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)

    async def exchange(self, request: httpx.Request, head: bytes, timeouts: dict[str, float | None]) -> None:
        """Send the request and wait for the head of the final response."""
        self._reset(request.method)
        self._is_busy = True
        if not self.is_usable:
            self._end(None)  # it ended while nobody listened
        await self._send(request, head, timeouts.get("write"))
        while not self._has_head:
            if self._error is not None:
                raise self._error
            await self.news(timeouts.get("read"))

    async def _send(self, request: httpx.Request, head: bytes, timeout: float | None) -> None:
        if not isinstance(request.stream, httpx.AsyncByteStream):
            raise TypeError("the body of the request is not an async stream")
        is_chunked = "chunked" in request.headers.get("transfer-encoding", "").lower()
        missing_bytes = 0 if is_chunked else int(request.headers.get("content-length", "0"))
        pending = head
        async for piece in request.stream:
            if not piece:
                continue
            if is_chunked:
                pending += b"%x\r\n%b\r\n" % (len(piece), piece)
            else:
                missing_bytes -= len(piece)
                if missing_bytes < 0:
                    raise httpx.LocalProtocolError("the body is longer than its Content-Length")
                pending += piece
            if not await self._write(pending, timeout):
                return
            pending = b""
        if missing_bytes:
            raise httpx.LocalProtocolError("the body is shorter than its Content-Length")
        if is_chunked:
            pending += b"0\r\n\r\n"
        self._is_sent = await self._write(pending, timeout)

    async def _write(self, data: bytes, timeout: float | None) -> bool:
        """Write and wait until the kernel has taken most. False: the server wants no more of it.

        RFC 9112, section 9.5: stop at an early error. What it answered is still to be read, also when
        it has closed the connection since.
        """
        if data and self._transport is not None and not self._is_refused():
            self._transport.write(data)
        if self._must_wait_to_write():
            try:
                async with asyncio.timeout(timeout):
                    while self._must_wait_to_write():
                        await self.news(None)
            except TimeoutError as exc:
                raise httpx.WriteTimeout("the server did not take the request in time") from exc
        return not self._is_refused()

    def _must_wait_to_write(self) -> bool:
        return self._is_write_paused and not self._is_refused()

    def _is_refused(self) -> bool:
        return self._error is not None or self.is_complete or self.status >= 400

    async def push(self, sink: Sink, read_timeout: float | None) -> bool:
        """Call `sink` with each piece of the body that arrives from now on, until there is other news.

        True: `sink` returned False. What it raises is raised.
        """
        self._sink = sink
        try:
            return await self.news(read_timeout)
        finally:
            if self._sink is sink:
                self._sink = None

    def news(self, read_timeout: float | None) -> asyncio.Future[bool]:
        """Return a future that anything new resolves; a silence of `read_timeout` s is an error, too.

        Its result says whether a sink wants no more.
        """
        self._waiter = waiter = self.loop.create_future()
        if read_timeout is not None:
            # No time-out object per chunk: the timer looks at these when it fires, and sleeps on.
            self._read_timeout = read_timeout
            self._progress_at = self.loop.time()
            if self._timer is None:
                self._timer = self.loop.call_later(read_timeout, self._look_at_clock)
        return waiter

    def _look_at_clock(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return  # the reader is busy with other things; the next wait sets the timer again
        due = self._progress_at + self._read_timeout
        if self.loop.time() < due:
            self._timer = self.loop.call_at(due, self._look_at_clock)
        else:
            self._fail(httpx.ReadTimeout("the server sent nothing in time"), None)

    def take(self, max_bytes: int | None = None) -> bytes:
        """Return the unread bytes of the body (none: b""); once they are gone, raise what went wrong."""
        chunks = self._chunks
        if not chunks:
            if self._error is not None:
                raise self._error
            return b""
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if max_bytes is not None and len(data) > max_bytes:
            chunks.append(data[max_bytes:])
            data = data[:max_bytes]
        self._unread_bytes -= len(data)
        if self._is_read_paused and self._unread_bytes <= MAX_UNREAD_BYTES:
            self._resume_reading()
        return data

    def rest(self) -> bool:
        """End the exchange. False: the connection cannot carry another one, and is to be aborted."""
        self._is_busy = False
        if not (self._is_sent and self.is_complete and self._can_keep and self.is_usable):
            return False
        self._chunks.clear()
        self._stop_timer()
        if self._is_read_paused:
            self._resume_reading()  # or a close by the server would not be seen
        return True

    def abort(self) -> None:
        """Close the socket without a goodbye, and wake whoever waits. Never waits, can be repeated."""
        self._is_aborted = True
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()
        if self._is_busy and not self.is_complete and self._error is None:
            self._error = httpx.ReadError("the connection was closed on our side")
        self._wake()

    def _fail(self, error: httpx.TransportError, cause: BaseException | None) -> None:
        if self._error is None:
            error.__cause__ = cause  # raised by whoever reads: the equivalent of `from`
            self._error = error
        self.abort()

    def _wake(self, *, is_enough: bool = False) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(is_enough)

    def _push(self, sink: Sink) -> None:
        """Hand on what is unread, and wake who pushes only if there is something to say."""
        waiter = self._waiter
        if waiter is None or waiter.done():  # it has been told of an end, or cancelled
            return
        try:
            goes_on = sink(self.take(MAX_PIECE_BYTES))
        except Exception as exc:  # noqa: BLE001 - asyncio would take it for a broken connection
            self._waiter = None
            waiter.set_exception(exc)
            return
        if not goes_on or self._chunks or self.is_complete or self._error is not None:
            self._wake(is_enough=not goes_on)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _resume_reading(self) -> None:
        self._is_read_paused = False
        if self.is_usable and self._transport is not None:
            self._transport.resume_reading()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        if self._is_aborted:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._is_busy:  # nothing was asked; whatever comes next cannot be trusted
            self.abort()
            return
        if self.is_complete or self._error is not None:
            self._can_keep = False
            return
        unread_bytes = self._unread_bytes
        self._is_silent = False
        self._progress_at = self.loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._can_keep = False
        except httptools.HttpParserError as exc:
            self._can_keep = False
            if not self.is_complete:
                self._fail(httpx.RemoteProtocolError(str(exc)), exc)
        if self._unread_bytes > unread_bytes:
            self._bytes_since_body = 0
            if self._unread_bytes > MAX_UNREAD_BYTES and self._transport is not None:
                self._is_read_paused = True
                self._transport.pause_reading()
        else:
            self._bytes_since_body += len(data)
            if self._bytes_since_body > MAX_HEAD_BYTES and not self.is_complete:
                self._fail(httpx.RemoteProtocolError("the headers of the response are too large"), None)
        if self._has_news:
            self._has_news = False
            if self._sink is not None and self._chunks:
                self._push(self._sink)
            else:
                self._wake()

    def eof_received(self) -> None:
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(exc)
        self._parser = None  # it refers back to us
        self._stop_timer()
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._wake()

    def _end(self, exc: Exception | None) -> None:
        """The server sent its last byte (`exc` None), or the connection broke."""
        self._can_keep = False
        if not self._is_busy:
            self.abort()
            self._on_lost(self)
        elif not self.is_complete and self._error is None:
            self.is_stale = self._is_silent
            if exc is not None:
                self._error = httpx.ReadError(str(exc))
                self._error.__cause__ = exc
            elif self._has_head and self._ends_by_eof:
                self.is_complete = True
            elif self._has_head:
                self._error = httpx.RemoteProtocolError("the server closed the connection amid the body")
            else:
                self._error = httpx.RemoteProtocolError("the server closed the connection without a response")
        self._wake()

    # What httptools calls, within `data_received`.

    def on_message_begin(self) -> None:
        if self.is_complete:  # a second response that nobody asked for
            self._can_keep = False

    def on_status(self, status: bytes) -> None:
        if not self._has_head:
            self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return  # a trailer, or what follows the end
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail(httpx.RemoteProtocolError("the headers of the response are too large"), None)
        else:
            self.headers.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if self._has_head or self._error is not None or (status < 200 and status != 101):
            return
        self._has_head = self._has_news = True
        self.status = status
        self.http_version = b"HTTP/" + self._parser.get_http_version().encode("ascii")
        self._can_keep = self._parser.should_keep_alive() and status != 101
        fields = {name.lower(): value.lower() for name, value in self.headers}
        codings = fields.get(b"transfer-encoding")  # the last such line; its last coding decides
        if codings is not None:
            self._ends_by_eof = not codings.endswith(b"chunked")
        else:
            self._ends_by_eof = b"content-length" not in fields
        if self._method == "HEAD":
            self.is_complete = True  # whatever length it announces

    def on_body(self, body: bytes) -> None:
        if self.is_complete:
            self._can_keep = False
            return
        self._chunks.append(body)
        self._unread_bytes += len(body)
        self._has_news = True

    def on_message_complete(self) -> None:
        if self._has_head:
            self.is_complete = self._has_news = True
        else:  # a 1xx response: the final one is still to come
            self.headers.clear()
            self.reason = b""


def encode_head(request: httpx.Request) -> bytes:
    """Return the request line and headers as httpx made them, refusing what would forge others."""
    method = request.method.encode("ascii", "replace")
    target: bytes = request.extensions.get("target", request.url.raw_path)
    if not _TOKEN.fullmatch(method) or not _TARGET.fullmatch(target):
        raise httpx.LocalProtocolError("illegal request method or target")
    lines = [b"%b %b HTTP/1.1\r\n" % (method, target)]
    for name, value in request.headers.raw:
        if not _TOKEN.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise httpx.LocalProtocolError(
                f"illegal name or value of header {name!r}"
            )  # not the value: secret
        if name.lower() == b"content-length" and not value.isdigit():
            raise httpx.LocalProtocolError("Content-Length is not a number")
        lines.append(b"%b: %b\r\n" % (name, value))
    lines.append(b"\r\n")
    return b"".join(lines)
