"""The SSE door: one job's events as `text/event-stream` (PROTOCOL.md §7, WHATWG HTML §9.2)."""

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltawire.close_codes import CloseCode
from deltawire.errors import WireError
from deltawire.messages import ErrorMessage, Goodbye, Snapshot

from .auth import Principal
from .frames import event_stream_message
from .limits import Limits, Place
from .subscriber import Subscriber
from .tail import Batch

COMMENT_INTERVAL_S: Final = 15.0
HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}


class ByteStream:
    """Gathers bytes until the response sends them. It takes one batch; while it sends, none."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._wake = asyncio.Event()
        self.is_over = False
        self.is_sending = False

    @property
    def is_writable(self) -> bool:
        return not (self._pending or self.is_sending or self.is_over)

    def write(self, data: bytes) -> None:
        """Nothing comes after the end, whoever has not heard of it yet."""
        if self.is_over:
            return
        self._pending.append(data)
        self._wake.set()

    def end(self) -> None:
        """What was written goes out, then the stream is over."""
        self.is_over = True
        self._wake.set()

    async def take(self) -> bytes:
        """Waits for bytes, at most COMMENT_INTERVAL_S: then it is a comment. Empty: the stream is over."""
        if not self._pending and not self.is_over:
            self._wake.clear()
            try:
                async with asyncio.timeout(COMMENT_INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                if not self._wake.is_set():  # what came in the same moment counts
                    return b": keep-alive\n\n"
        data = b"".join(self._pending)
        self._pending.clear()
        return data

    async def pour(self, data: bytes, subscriber: Subscriber, send: Send) -> None:
        """Sends `data`, then what comes, until the stream is over, and ends the response."""
        while data:
            # A client that takes nothing is dropped by the connection (`flow.py`).
            self.is_sending = True
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self.is_sending = False
            subscriber.pump()
            data = await self.take()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventStream(ByteStream):
    """A sink that writes events with their numbers."""

    via = "event_stream"

    def write_batch(self, batch: Batch) -> None:
        self.write(batch.event_stream)

    def write_message(self, message: msgspec.Struct) -> None:
        # Control messages carry no id, so that they do not move the client's position; a snapshot does.
        number = message.sequence_number if isinstance(message, Snapshot) else None
        self.write(event_stream_message(msgspec.json.encode(message), number))

    def ended(self, _: Subscriber) -> None:
        self.end()

    def put_out(self, error: WireError) -> None:
        """The credential is good no more."""
        self.write_message(ErrorMessage(error=error.error))
        self.end()

    def refused(self, subscriber: Subscriber, error: WireError) -> None:
        self.write_message(ErrorMessage(error=error.error, job_id=subscriber.hub.job_id))
        self.end()


class EventStreamResponse(Response):
    """Streams a subscriber's events until the terminal one, or until the client goes."""

    def __init__(
        self,
        stream: ByteStream,
        subscriber: Subscriber,
        *,
        release: Callable[[], None],
        first: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`first` goes out at once; by default it tells an EventSource when to come back."""
        super().__init__(headers={**(headers or {}), **HEADERS})
        del self.headers["content-length"]
        self._stream = stream
        self._subscriber = subscriber
        self._release = release
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with until_gone(receive, self._stream.end):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                retry_ms = random.randint(1_000, 3_000)  # noqa: S311 - jitter
                first = self._first or b"retry: %d\n\n" % retry_ms
                await self._stream.pour(first, self._subscriber, send)
        finally:
            self._subscriber.close()
            self._release()


def take_place(request: Request, principal: Principal) -> Place:
    """For a response that lasts. Raises WireError where there are too many."""
    limits: Limits = request.app.state.limits
    peer = limits.address(request.client.host if request.client else None)
    return limits.enter("sse", peer, request.headers.getlist("x-forwarded-for"), principal.counted_as)


@contextmanager
def until_gone(receive: Receive, on_gone: Callable[[], None]) -> Iterator[None]:
    """Calls `on_gone` when the client closes the connection meanwhile. The request's body has been read."""
    gone = asyncio.create_task(_disconnected(receive), name="client-gone")
    gone.add_done_callback(lambda _: on_gone())
    try:
        yield
    finally:
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def say_goodbye(stream: EventStream, window_s: float) -> None:
    """For a relay that drains: EventSource comes back by itself, after the `retry` given here."""
    retry_after_s = random.uniform(0, window_s)  # noqa: S311 - jitter
    stream.write(b"retry: %d\n\n" % (1_000 + round(retry_after_s * 1_000)))
    stream.write_message(Goodbye(code=CloseCode.DRAINING, retry_after_s=round(retry_after_s, 3)))
    stream.end()
