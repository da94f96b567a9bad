"""What a relay under test has to say of itself, so that one load program can drive them all.

The load program (one process, uvloop) is both sides: it publishes as an LLM worker would, through Redis, and
reads as viewers do. What it publishes is one chunk per delta, `chunk(number, at)`; a delivery is counted
where MARK stands in the bytes that a viewer receives, and the digits behind it say when it was published.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

from benchmarks.processes import Servers

MARK: Final = b"~at"  # survives any quoting; followed by AT_DIGITS digits: CLOCK_MONOTONIC in microseconds
AT_DIGITS: Final = 16


def chunk(number: int, at: float | None = None) -> bytes:
    """A `chat.completion.chunk` of about 216 bytes that says when it was made."""
    at_us = round((time.monotonic() if at is None else at) * 1e6)
    return (
        b'{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
        b'"system_fingerprint":"fp_0123456789","choices":[{"index":0,"delta":{"content":"%08d ~at%016d"},'
        b'"logprobs":null,"finish_reason":null}]}'
    ) % (number, at_us)


def upgrade(path: str, headers: str = "") -> bytes:
    """A WebSocket handshake (RFC 6455 §4.1). `headers`: further ones, each with its line end."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{headers}"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    ).encode()


def text_frame(text: bytes) -> bytes:
    """As a client sends it (RFC 6455 §5.3): masked, here by zeros."""
    assert len(text) < 126
    return bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text


class Publisher(ABC):
    """The worker's side. Lives in the load process, on its loop; its cost is load, not the system's."""

    @abstractmethod
    async def open(self, job_ids: Sequence[str]) -> None:
        """Connects; makes the jobs if the system knows such a thing."""

    @abstractmethod
    def publish(self, job_id: str, chunk: bytes) -> None:
        """Sends one delta. Never blocks; order within a job is kept."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the jobs, where they have an end, and disconnects."""


class Viewer(ABC):
    """What one viewer says on its connection (TCP to 127.0.0.1:port). One object per connection; sans I/O."""

    @abstractmethod
    def hello(self) -> bytes:
        """What to send once connected: an HTTP request (RFC 6455 upgrade, or an SSE GET)."""

    @abstractmethod
    def received(self, data: bytes) -> bytes:
        """What to answer to bytes received before the viewer is ready (b"" for nothing).

        Sets `is_ready` once deltas will come. Afterwards the load program only counts, and calls `answer`.
        """

    is_ready: bool = False

    def answer(self, data: bytes) -> bytes:
        """What must be answered later on, such as a ping; called only where `answers` is true."""
        return b""

    answers: ClassVar[bool] = False


class Relay(ABC):
    """A system under test. `name` is its row in the tables."""

    name: ClassVar[str]
    is_peer: ClassVar[bool] = True  # False: ours, floors and the tutorial pattern, which `make bench` runs
    has_log: ClassVar[bool] = False  # whether a late viewer gets what came before
    has_snapshots: ClassVar[bool] = False  # whether it can get the sum of that instead
    port: int

    def missing(self) -> str | None:
        """What has to be installed first, as a sentence; None if nothing is."""
        return None

    @abstractmethod
    def start(self, servers: Servers, redis_port: int) -> None:
        """Starts the server-side processes (Redis runs already, as "redis") and sets `port`. Blocks."""

    @abstractmethod
    def publisher(self, redis_port: int) -> Publisher: ...

    @abstractmethod
    def viewer(self, job_id: str, *, from_start: bool = False) -> Viewer:
        """A viewer of a job; `from_start` (only with `has_log`) asks for all deltas from the first one."""

    def late_viewer(self, job_id: str) -> Viewer:
        """A viewer that asks for the sum of what came before, where the system knows such a thing."""
        raise NotImplementedError
