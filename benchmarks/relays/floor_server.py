"""The floor's server: as little as a Python relay can be. No limits, no deadlines, no healing.

    python -m benchmarks.relays.floor_server PORT redis|log REDIS_PORT
    python -m benchmarks.relays.floor_server PORT socket FEED_PORT

One frame is encoded for each delta, and each socket gets the frames of one read of the feed in one write.
"""

import asyncio
import base64
import hashlib
import struct
import sys
from collections import defaultdict

import hiredis
import uvloop

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3


def frame(payload: bytes) -> bytes:
    if len(payload) < 126:
        return b"\x81%c%s" % (len(payload), payload)
    return b"\x81\x7e%s%s" % (struct.pack("!H", len(payload)), payload)


def accept(request: bytes) -> bytes:
    key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
    digest = base64.b64encode(hashlib.sha1(key + GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %s\r\n\r\n" % digest
    )


class Feed(asyncio.Protocol):
    """Where deltas come from; who listens to what."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.sockets: defaultdict[bytes, set[Socket]] = defaultdict(set)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment] # a stream's, whatever its class

    def join(self, socket: "Socket") -> None:
        self.sockets[socket.job_id].add(socket)
        socket.open()

    def leave(self, socket: "Socket") -> None:
        self.sockets[socket.job_id].discard(socket)

    def write(self, frames: dict[bytes, list[bytes]]) -> None:
        for job_id, ready in frames.items():
            joined = b"".join(ready)
            for socket in self.sockets[job_id]:
                socket.transport.write(joined)


class SocketFeed(Feed):
    """Deltas as lines `JOB_ID PAYLOAD`, without any Redis."""

    rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        frames: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for line in lines:
            job_id, _, payload = line.partition(b" ")
            frames[job_id].append(frame(payload))
        self.write(frames)


class PubSubFeed(Feed):
    """Deltas as messages on the job's channel; a socket is open once Redis has acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = hiredis.Reader()
        self.joining: defaultdict[bytes, list[Socket]] = defaultdict(list)

    def join(self, socket: "Socket") -> None:
        if socket.job_id in self.sockets:
            super().join(socket)
            return
        self.joining[socket.job_id].append(socket)
        if len(self.joining[socket.job_id]) == 1:
            self.transport.write(b"SUBSCRIBE %s\r\n" % socket.job_id)

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        frames: defaultdict[bytes, list[bytes]] = defaultdict(list)
        while (push := self.reader.gets()) is not False:
            if push[0] == b"message":
                frames[push[1]].append(frame(push[2]))
            else:
                self.acknowledged(push[1])
        self.write(frames)

    def acknowledged(self, job_id: bytes) -> None:
        for socket in self.joining.pop(job_id):
            super().join(socket)


class LogFeed(PubSubFeed):
    """As that, and what a stream holds comes first. A message is `NUMBER PAYLOAD`."""

    history: "History"

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        frames: defaultdict[bytes, list[tuple[int, bytes]]] = defaultdict(list)
        while (push := self.reader.gets()) is not False:
            if push[0] == b"message":
                number, _, payload = push[2].partition(b" ")
                frames[push[1]].append((int(number), frame(payload)))
            else:
                self.acknowledged(push[1])
        for job_id, numbered in frames.items():
            joined = b"".join([ready for _, ready in numbered])
            for socket in self.sockets[job_id]:
                if socket.held is None:
                    socket.transport.write(joined)
                else:
                    socket.held += numbered


class History(asyncio.Protocol):
    """Reads streams; a socket's live deltas are held meanwhile."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.reader = hiredis.Reader()
        self.asking: list[Socket] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment] # a stream's, whatever its class

    def ask(self, socket: "Socket") -> None:
        self.asking.append(socket)
        self.transport.write(b"XRANGE log:%s - +\r\n" % socket.job_id)

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (entries := self.reader.gets()) is not False:
            socket = self.asking.pop(0)
            top = int(entries[-1][0].partition(b"-")[0]) if entries else 0
            ready = [frame(fields[1]) for _, fields in entries]
            ready += [live for number, live in socket.held or () if number > top]
            socket.held = None
            socket.transport.write(b"".join(ready))


class Socket(asyncio.Protocol):
    """A viewer at `GET /JOB_ID`, or `GET /JOB_ID?all` for what the log holds, too."""

    transport: asyncio.Transport
    held: list[tuple[int, bytes]] | None = None
    job_id = b""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment] # a stream's, whatever its class

    def data_received(self, data: bytes) -> None:
        if self.job_id:
            return
        self.answer = accept(data)
        self.job_id, _, wish = data.split(b" ", 2)[1].lstrip(b"/").partition(b"?")
        self.held = [] if wish else None
        self.feed.join(self)

    def open(self) -> None:
        self.transport.write(self.answer)
        del self.answer
        if self.held is not None and isinstance(self.feed, LogFeed):
            self.feed.history.ask(self)

    def connection_lost(self, _: Exception | None) -> None:
        self.feed.leave(self)


async def serve(port: int, kind: str, feed_port: int) -> None:
    loop = asyncio.get_running_loop()
    feed: Feed
    if kind == "socket":
        feed = SocketFeed()
        await loop.create_server(lambda: feed, "127.0.0.1", feed_port)
    else:
        feed = LogFeed() if kind == "log" else PubSubFeed()
        if isinstance(feed, LogFeed):
            _, feed.history = await loop.create_connection(History, "127.0.0.1", feed_port)
        await loop.create_connection(lambda: feed, "127.0.0.1", feed_port)
    server = await loop.create_server(lambda: Socket(feed), "127.0.0.1", port, backlog=1_000)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
