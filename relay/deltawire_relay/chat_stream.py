"""A job as a client of the OpenAI API sees it: its chunks as `data:` lines, or its end (PROTOCOL.md §9)."""

import asyncio
import re
from collections.abc import Sequence
from typing import Final

import msgspec

from deltawire.codec import chunk_of, decode, is_delta, is_terminal
from deltawire.errors import Error, WireError
from deltawire.events import TerminalEvent
from deltawire.messages import Snapshot, Subscribed

from .event_stream import ByteStream
from .frames import event_stream_message
from .openai_errors import Failure, failure_of
from .subscriber import Subscriber
from .tail import Batch

DONE: Final = event_stream_message(b"[DONE]")

_HAS_CHOICE: Final = re.compile(rb'"choices"\s*:\s*\[\s*\{').search


class ChatStream(ByteStream):
    """A sink that passes on each chunk, byte for byte as the upstream sent it."""

    via = "chat"

    def __init__(self, *, wants_usage: bool) -> None:
        super().__init__()
        self.failure: Failure | None = None
        """Why it is over, where nothing else was to be sent before: then it is the response's to say."""
        self.is_begun = False
        """Whether the headers have gone, or a chunk is there for which they will go."""
        self._wants_usage = wants_usage

    def write_batch(self, batch: Batch) -> None:
        data = b"".join(
            [
                event_stream_message(chunk)
                for chunk in map(chunk_of, filter(is_delta, batch.lines))
                if self._wants_usage or not is_usage_only(chunk)
            ]
        )
        if data:
            self.is_begun = True
            self.write(data)
        if event := _terminal(batch.lines):
            failure = failure_of(event)
            if failure is not None:
                self.fail(failure)
            else:
                self.write(DONE)

    def write_message(self, message: Subscribed | Snapshot) -> None:
        if isinstance(message, Snapshot):
            # Text that was folded up is no chunk any more. It is there to be had, but not here.
            self.fail(Failure.of(_chunks_lost(message.job_id)))

    def ended(self, _: Subscriber) -> None:
        self.end()

    def refused(self, _: Subscriber, error: WireError) -> None:
        self.fail(Failure.of(error))

    def fail(self, failure: Failure) -> None:
        """The stream ends with an error: no [DONE], which would say that it is whole."""
        if self.is_over:
            return
        if self.is_begun:
            self.write(event_stream_message(_error_body(failure.error)))
        else:
            self.failure = failure
        self.end()


class ChatAnswer:
    """A sink that waits for the end only."""

    via = "chat"
    is_writable = True

    def __init__(self) -> None:
        self.event: TerminalEvent | None = None
        self.failure: Failure | None = None
        self._over = asyncio.Event()

    def write_batch(self, batch: Batch) -> None:
        self.event = _terminal(batch.lines)

    def write_message(self, message: Subscribed | Snapshot) -> None:
        pass

    def ended(self, _: Subscriber) -> None:
        self.end()

    def refused(self, _: Subscriber, error: WireError) -> None:
        self.fail(Failure.of(error))

    def fail(self, failure: Failure) -> None:
        if not self._over.is_set():
            self.failure = failure
            self.end()

    def end(self) -> None:
        self._over.set()

    async def wait(self) -> None:
        """Until there is an event or a failure, or nobody waits for either: neither.

        The job's own deadlines (`queue_timeout_s`, `timeout_s`) end the wait.
        """
        await self._over.wait()
        if self.event is not None and self.failure is None:
            self.failure = failure_of(self.event)


def is_usage_only(chunk: bytes) -> bool:
    """Whether a chunk tells the usage and nothing else: no choice is in it (OpenAI's `include_usage`).

    It looks before it parses, since all others pass here, too.
    """
    if b'"choices":[{' in chunk or b'"usage"' not in chunk or _HAS_CHOICE(chunk):
        return False
    value = msgspec.json.decode(chunk)
    return not value.get("choices") and isinstance(value.get("usage"), dict)


def _terminal(lines: Sequence[bytes]) -> TerminalEvent | None:
    """The event that ends the job, if it is the last of the lines."""
    event = decode(lines[-1]) if is_terminal(lines[-1]) else None
    return event if isinstance(event, TerminalEvent) else None


def _error_body(error: Error) -> bytes:
    return msgspec.json.encode({"error": error})


def _chunks_lost(job_id: str) -> WireError:
    return WireError(
        "state_lost", f"the log does not go back far enough to stream; GET /v1/jobs/{job_id} has the text"
    )
