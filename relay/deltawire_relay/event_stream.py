"""The SSE door: one job's events as `text/event-stream` (PROTOCOL.md §7, WHATWG HTML §9.2)."""

import asyncio
import random
from collections.abc import Callable
from typing import Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltawire.errors import WireError
from deltawire.messages import ErrorMessage, Goodbye, Snapshot

from .frames import event_stream_message
from .subscriber import Subscriber
from .tail import Batch

COMMENT_INTERVAL_S: Final = 15.0
HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}


class EventStream:
    """A sink that gathers bytes until the response sends them. It takes one batch; while it sends, none."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._wake = asyncio.Event()
        self.is_over = False
        self.is_sending = False

    @property
    def is_writable(self) -> bool:
        return not (self._pending or self.is_sending or self.is_over)

    def write(self, data: bytes) -> None:
        self._pending.append(data)
        self._wake.set()

    def write_batch(self, batch: Batch) -> None:
        self.write(batch.event_stream)

    def write_message(self, message: msgspec.Struct) -> None:
        # Control messages carry no id, so that they do not move the client's position; a snapshot does.
        number = message.sequence_number if isinstance(message, Snapshot) else None
        self.write(event_stream_message(msgspec.json.encode(message), number))

    def ended(self, _: Subscriber) -> None:
        self.end()

    def refused(self, subscriber: Subscriber, error: WireError) -> None:
        self.write_message(ErrorMessage(error=error.error, job_id=subscriber.hub.job_id))
        self.end()

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
                return b": keep-alive\n\n"
        data = b"".join(self._pending)
        self._pending.clear()
        return data


class EventStreamResponse(Response):
    """Streams a subscriber's events until the terminal one, or until the client goes."""

    def __init__(self, stream: EventStream, subscriber: Subscriber, *, release: Callable[[], None]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._stream = stream
        self._subscriber = subscriber
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive), name="event-stream-disconnect")
        gone.add_done_callback(lambda _: self._stream.end())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            retry_ms = random.randint(1_000, 3_000)  # noqa: S311 - jitter
            data = b"retry: %d\n\n" % retry_ms
            while data:
                # A client that takes nothing is dropped by the connection (`flow.py`).
                self._stream.is_sending = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._stream.is_sending = False
                self._subscriber.pump()
                data = await self._stream.take()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._subscriber.close()
            self._release()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def say_goodbye(stream: EventStream, window_s: float) -> None:
    """For a relay that drains: EventSource comes back by itself, after the `retry` given here."""
    retry_after_s = random.uniform(0, window_s)  # noqa: S311 - jitter
    stream.write(b"retry: %d\n\n" % (1_000 + round(retry_after_s * 1_000)))
    stream.write_message(Goodbye(code=4001, retry_after_s=round(retry_after_s, 3)))
    stream.end()
