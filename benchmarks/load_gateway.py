"""An OpenAI-compatible gateway that costs next to nothing, for benchmarks: any body in, timed chunks out.

    python -m benchmarks.load_gateway --port 9000

The request's model says what is streamed: `bench-RATE-DELTAS`, chunks per second (0: as fast as the reader
takes them, a few in each write, in turn with all other streams) and how many; `bench-50-1000-held` answers
with its head only until somebody calls `GET /go`, whereupon all that are held begin, spread over an interval.

Each chunk carries the time at which it was handed to its socket (benchmarks.relays.base.chunk).

`GET /stats` is a JSON object (`Stats`): what was done, and the CPU it took, so that the load side can be
checked. `GET /closed` lists the streams that their reader closed before their end, by X-Client-Request-Id.
Times are CLOCK_MONOTONIC in seconds. Trusts its clients: loopback only.
"""

import argparse
import asyncio
import re
import socket
import time
from typing import Final, cast

import msgspec
import uvloop

from benchmarks.relays.base import chunk

MODEL: Final = re.compile(rb'"model"\s*:\s*"bench-(\d+)-(\d+)(-held)?"')
LENGTH: Final = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
REQUEST_ID: Final = re.compile(rb"\r\nx-client-request-id:\s*([^\r]+)", re.IGNORECASE)
TICK_S: Final = 0.001
SLOTS: Final = 4096  # of a tick each; so the slowest rate is one chunk in four seconds
SEND_BUFFER_BYTES: Final = 32_768  # else the kernel takes megabytes of each stream, and nothing presses back

HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
SATURATED_CHUNKS: Final = 16  # a write: what TCP would join anyway, since the reader is behind
END: Final = b"data: [DONE]\n\n"


class Stats(msgspec.Struct):
    requests: int = 0  # for streams
    held: int = 0
    open: int = 0
    sent: int = 0  # chunks handed to sockets, all streams together
    first_request_at: float = 0.0
    last_request_at: float = 0.0
    latest_tick_s: float = 0.0  # the most that a chunk was late by, since the last /go
    cpu_s: float = 0.0


def model_name(rate: int, deltas: int, *, is_held: bool = False) -> str:
    """The model to ask for."""
    return f"bench-{rate}-{deltas}" + "-held" * is_held


class LoadGateway:
    def __init__(self) -> None:
        self.stats = Stats()
        self.held: list[Connection] = []
        self.closed: list[tuple[str, float]] = []
        self._slots: list[list[Connection]] = [[] for _ in range(SLOTS)]
        self._paced = 0  # streams that are in a slot
        self._tick_number = 0
        self._writable: set[Connection] = set()
        self._is_pumping = False

    def begin(self, stream: "Connection", at: float) -> None:
        if stream.interval_s == 0:
            self.pump(stream)
            return
        if not self._paced:
            self._tick_number = int(time.monotonic() / TICK_S)
            asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._paced += 1
        stream.due = at
        self._slots[max(int(at / TICK_S), self._tick_number + 1) % SLOTS].append(stream)

    def go(self) -> None:
        """Begins all streams that are held, spread evenly over an interval."""
        held, self.held = self.held, []
        self.stats.held, self.stats.latest_tick_s = 0, 0.0
        now = time.monotonic() + 2 * TICK_S
        for number, stream in enumerate(held):
            self.begin(stream, now + stream.interval_s * number / len(held))

    def _tick(self) -> None:
        """Writes what is due; comes again as long as anything will be."""
        now = time.monotonic()
        while self._tick_number < int(now / TICK_S):
            self._tick_number += 1
            at = self._tick_number % SLOTS
            slot, self._slots[at] = self._slots[at], []
            for stream in slot:
                self.stats.latest_tick_s = max(self.stats.latest_tick_s, now - stream.due)
                if stream.step():
                    stream.due += stream.interval_s
                    # What is behind goes on with the next tick.
                    at = max(int(stream.due / TICK_S), self._tick_number + 1)
                    self._slots[at % SLOTS].append(stream)
                else:
                    self._paced -= 1
        if self._paced:
            left = (self._tick_number + 1) * TICK_S - time.monotonic()
            asyncio.get_running_loop().call_later(max(0.0, left), self._tick)

    def pump(self, stream: "Connection") -> None:
        """SATURATED_CHUNKS for each writable stream in each turn of the loop."""
        self._writable.add(stream)
        if not self._is_pumping:
            self._is_pumping = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        streams, self._writable = self._writable, set()
        for stream in streams:
            if stream.is_writable and stream.step(SATURATED_CHUNKS) and stream.is_writable:
                self._writable.add(stream)
        self._is_pumping = bool(self._writable)
        if self._is_pumping:
            asyncio.get_running_loop().call_soon(self._turn)


class Connection(asyncio.Protocol):
    """One request at a time; what comes in between is the next one's."""

    transport: asyncio.Transport

    def __init__(self, gateway: LoadGateway) -> None:
        self._gateway = gateway
        self._received = b""
        self._left = 0
        self._number = 0
        self._request_id = ""
        self.interval_s = 0.0
        self.due = 0.0
        self.is_writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)  # uvloop's are none, by class
        transport.set_write_buffer_limits(high=0)
        peer = transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._left:
            self._gateway.closed.append((self._request_id, time.monotonic()))
            self._left = 0
            self._gateway.stats.open -= 1
        self.is_writable = False

    def pause_writing(self) -> None:
        self.is_writable = False

    def resume_writing(self) -> None:
        self.is_writable = True
        if self._left and self.interval_s == 0:
            self._gateway.pump(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head, body = self._received[:end], self._received[end + 4 :]
            length = int(found[1]) if (found := LENGTH.search(head)) else 0
            if len(body) < length:
                return
            self._received = body[length:]
            self._answer(head, body[:length])

    def _answer(self, head: bytes, body: bytes) -> None:
        gateway, stats = self._gateway, self._gateway.stats
        if head.startswith(b"POST "):
            self._stream(head, body)
        elif head.startswith(b"GET /stats"):
            stats.cpu_s = time.process_time()
            self._say(msgspec.json.encode(stats))
        elif head.startswith(b"GET /closed"):
            self._say(msgspec.json.encode(gateway.closed))
        elif head.startswith(b"GET /go"):
            gateway.go()
            self._say(b"{}")
        else:  # /v1/models, a readiness probe
            self._say(b'{"object":"list","data":[]}')

    def _say(self, body: bytes, status: bytes = b"200 OK") -> None:
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )

    def _stream(self, head: bytes, body: bytes) -> None:
        if not (model := MODEL.search(body)) or self._left or int(model[2]) < 1:
            self._say(b'{"error":{"message":"ask for bench-RATE-DELTAS"}}', b"400 Bad Request")
            return
        rate, self._left, self._number = int(model[1]), int(model[2]), 0
        self.interval_s = 1 / rate if rate else 0.0
        self._request_id = found[1].decode() if (found := REQUEST_ID.search(head)) else ""
        stats = self._gateway.stats
        now = time.monotonic()
        stats.first_request_at = stats.first_request_at or now
        stats.last_request_at = now
        stats.requests += 1
        stats.open += 1
        self.transport.write(HEAD)
        if model[3]:
            self._gateway.held.append(self)
            stats.held += 1
        elif self.step():
            self._gateway.begin(self, now + self.interval_s)

    def step(self, count: int = 1) -> bool:
        """Writes the next chunks, in one piece; whether there are more."""
        if not self._left:
            return False
        count = min(count, self._left)
        events = b"".join(
            b"data: %b\n\n" % chunk(number) for number in range(self._number + 1, self._number + count + 1)
        )
        self._number += count
        self._left -= count
        self._gateway.stats.sent += count
        if self._left:
            self.transport.write(b"%x\r\n%b\r\n" % (len(events), events))
            return True
        stop = b'"finish_reason":"stop"'.join(events.rsplit(b'"finish_reason":null', 1)) + END
        self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(stop), stop))
        self._gateway.stats.open -= 1
        return False


async def serve(port: int) -> None:
    """Until it is cancelled."""
    gateway = LoadGateway()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(gateway), "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="A gateway that costs next to nothing.")
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
