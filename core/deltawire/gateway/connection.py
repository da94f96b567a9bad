"""One client's connection: HTTP/1.1 in (httptools), answers out, one after the other."""

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import cast

import httptools

from deltawire.gateway.answer import Reply, encode_error
from deltawire.gateway.desk import Answer, Desk, Headers, HttpRequest
from deltawire.gateway.plan import Ending, Plan
from deltawire.gateway.player import Player
from deltawire.gateway.records import Closer
from deltawire.gateway.wheel import TimerWheel
from deltawire.gateway.wire import encode_head

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_HEAD_BYTES = 65_536
MAX_PIPELINED = 16
IDLE_S = 75.0
NO_PROGRESS_S = 300.0
LINGER_S = 10.0  # for a closed connection to take what is still in its buffer
_HIGH_WATER_BYTES = 65_536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, no time


class Connection(asyncio.Protocol):
    """Requests are answered in order; reading goes on meanwhile, for only so is a disconnect seen at once.

    Therefore what is read ahead is bounded: a body over 8 MiB gets a 413, heads over 64 KiB a 431, what is
    not HTTP a 400, and more than 16 requests in waiting, or any of these behind an unfinished answer, end
    the connection. A connection that asks nothing for 75 s is closed, one whose client reads nothing for
    300 s is aborted. End of input is taken for a close, as clients of a stream have no use for a half-open
    connection.
    """

    def __init__(
        self,
        desk: Desk,
        wheel: TimerWheel,
        *,
        on_made: Callable[["Connection"], None],
        on_lost: Callable[["Connection"], None],
    ) -> None:
        self._desk = desk
        self._wheel = wheel
        self._on_made = on_made
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._waiting: deque[tuple[HttpRequest, bool, bool]] = deque()  # request, keep alive, HTTP/1.1
        self._answer: Answer | None = None  # the one under way
        self._player: Player | None = None
        self._keeps_alive = True
        self._is_chunked = True
        self._is_paused = False
        self._is_closing = False
        self._refusal: int | None = None
        self._begin()

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in deed only
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._wheel.add(self, self._loop.time() + IDLE_S)
        self._on_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop("client")
        self._wheel.remove(self)
        self._on_lost(self)

    def eof_received(self) -> None:
        if self._answer is not None:
            self._drop("client")
            self._transport.abort()  # a plain close would first wait for a reader that is gone

    def pause_writing(self) -> None:
        self._is_paused = True
        if self._player is not None:
            self._player.pause()
            self._wheel.add(self, self._loop.time() + NO_PROGRESS_S)

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._player is not None:
            self._player.resume()
            self._wheel.remove(self)

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._is_closing = True  # no other protocol is spoken here; what follows is not HTTP
        except httptools.HttpParserError:
            self._refusal = self._refusal or 400
        self._advance()
        if self._refusal is not None and not self._transport.is_closing():
            self._refuse(self._refusal)

    def shut(self) -> None:
        """End what is under way, and the connection, without ceremony."""
        self._drop("server")
        self._transport.abort()

    # The parser's side.

    def _begin(self) -> None:
        self._target = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._head_bytes = 0
        self._body_bytes = 0

    def on_message_begin(self) -> None:
        self._begin()

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        if self._refusal is None:
            self._headers[name.lower().decode("latin-1")] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue" and self._answer is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._refusal = self._refusal or 413
        if self._refusal is None:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._refusal is not None:
            return
        if len(self._waiting) >= MAX_PIPELINED:
            self._refusal = 429
            return
        method = self._parser.get_method().decode("latin-1")
        request = HttpRequest(method, self._target.decode("latin-1"), self._headers, b"".join(self._body))
        is_http_11 = self._parser.get_http_version() == "1.1"
        keeps_alive = is_http_11 and self._parser.should_keep_alive()
        self._waiting.append((request, keeps_alive, is_http_11))

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = self._refusal or 431

    # Answers.

    def _advance(self) -> None:
        """Answer what waits, until an answer takes time."""
        while self._answer is None and self._waiting and not self._transport.is_closing():
            request, self._keeps_alive, self._is_chunked = self._waiting.popleft()
            self._answer = answer = self._desk.answer(request)
            now = self._loop.time()
            self._wheel.remove(self)
            if isinstance(answer.content, Plan):
                self._perform(answer.content, answer, now)
            elif answer.content.at_s > 0:
                self._wheel.add(self, now + answer.content.at_s)
            else:
                self._send(answer.content, answer.headers, has_body=request.method != "HEAD")

    def wake(self, now: float) -> None:
        """A delayed reply is due, or nothing was asked, or read, for too long."""
        if self._answer is None and not self._transport.is_closing():
            self._close()
        elif self._answer is None or isinstance(self._answer.content, Plan):
            self.shut()
        else:
            self._send(self._answer.content, self._answer.headers)
            self._advance()

    def _perform(self, plan: Plan, answer: Answer, now: float) -> None:
        assert answer.record is not None  # noqa: S101 - only chat completions have plans
        self._keeps_alive = self._keeps_alive and plan.ending != "close"
        headers: Headers = (
            *_of_type("text/event-stream", plan.script.headers),
            ("Cache-Control", "no-cache"),
            *answer.headers,
            *plan.script.headers.items(),
            *((("Transfer-Encoding", "chunked"),) if self._is_chunked else ()),
            *(() if self._keeps_alive else (("Connection", "close"),)),
        )
        self._transport.write(encode_head(200, headers))
        self._player = Player(
            plan,
            answer.record,
            transport=self._transport,
            wheel=self._wheel,
            ledger=self._desk.ledger,
            is_chunked=self._is_chunked,
            now=now,
            on_end=self._end_stream,
        )
        if self._is_paused:
            self._player.pause()

    def _end_stream(self, ending: Ending) -> None:
        if ending == "finish":
            self._finish()
            self._advance()
            return
        self._drop("server")
        if ending == "abort":
            raw = self._transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._transport.abort()
        else:
            self._close()

    def _send(self, reply: Reply, headers: Headers, *, has_body: bool = True) -> None:
        is_empty = reply.status == 204
        all_headers: Headers = (
            *(() if is_empty else _of_type(reply.content_type, dict(reply.headers))),
            *(() if is_empty else (("Content-Length", str(len(reply.body))),)),
            *headers,
            *reply.headers,
            *(() if self._keeps_alive else (("Connection", "close"),)),
        )
        head = encode_head(reply.status, all_headers)
        self._transport.write(head + reply.body if has_body else head)
        record = self._answer.record if self._answer else None
        if record is not None:
            record.first_byte_at = time.time()
            record.sent_deltas = reply.deltas
            self._desk.ledger.deltas_sent += reply.deltas
        self._finish()

    def _refuse(self, status: int) -> None:
        """The client broke the protocol: say so if no answer is in the way, and close."""
        self._is_closing = True
        if self._answer is not None:
            self._drop("server")
            self._transport.abort()
            return
        self._keeps_alive = False
        self._send(
            Reply(status=status, body=encode_error("The request is not one that this server reads.")), ()
        )

    def _finish(self) -> None:
        """The answer is written whole."""
        if self._answer is not None and self._answer.record is not None:
            self._desk.ledger.finish(self._answer.record, time.time())
        self._answer = self._player = None
        if self._keeps_alive and not self._is_closing:
            self._wheel.add(self, self._loop.time() + IDLE_S)
        elif not self._waiting or not self._keeps_alive:
            self._close()

    def _close(self) -> None:
        self._is_closing = True
        self._transport.close()
        self._wheel.add(self, self._loop.time() + LINGER_S)

    def _drop(self, by: Closer) -> None:
        """The answer under way, if any, is over before its end. The first reason counts."""
        self._is_closing = True
        if self._player is not None:
            self._player.stop()
        if self._answer is not None and self._answer.record is not None:
            self._desk.ledger.close(self._answer.record, by, time.time())
        self._answer = self._player = None
        self._waiting.clear()


def _of_type(content_type: str, headers: Mapping[str, str]) -> Headers:
    """The Content-Type, unless `headers` say another."""
    is_given = any(name.lower() == "content-type" for name in headers)
    return () if is_given else (("Content-Type", content_type),)
