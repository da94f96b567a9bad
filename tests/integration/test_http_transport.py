"""The worker's HTTP transport against real sockets, and against stock httpx where both must agree.

Each test runs on asyncio and on uvloop, and fails if it leaves a task, a timer of ours or a socket.
"""

import asyncio
import contextlib
import functools
import gc
import inspect
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any, cast

import httpx
import pytest
import uvloop

from deltawire_worker import happy_eyeballs, http_connection
from deltawire_worker.http_transport import BodyStream, StreamTransport
from tests.support.tcp_proxy import abort

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
both = pytest.mark.parametrize("kind", ["deltawire", "httpx"])


def on_each_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on asyncio and on uvloop, and then look for what it left behind."""

    async def run(*args: Any, **kwargs: Any) -> None:
        await asyncio.wait_for(test(*args, **kwargs), 100)
        for _ in range(3):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    @pytest.mark.parametrize("loop_name", LOOPS)
    @functools.wraps(test)
    def wrapper(*args: Any, loop_name: str, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            runner.run(run(*args, **kwargs))
        gc.collect()  # an unclosed socket becomes a ResourceWarning, and so a failure

    signature = inspect.signature(test)
    parameters = [*signature.parameters.values()]
    parameters.append(inspect.Parameter("loop_name", inspect.Parameter.KEYWORD_ONLY, annotation=str))
    wrapper.__signature__ = signature.replace(parameters=parameters)  # pytest reads it
    return cast("Callable[..., None]", wrapper)


# The server.


@dataclass
class Received:
    """One request as it came over the wire."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def request(self) -> Received:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head[:-4].split("\r\n")
        received = Received(line, [tuple(text.split(": ", 1)) for text in lines], b"")  # type: ignore[misc] # pairs
        if received.header("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline(), 16):
                received.body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        else:
            received.body = await self.reader.readexactly(int(received.header("content-length") or 0))
        return received

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """Close with a RST instead of a FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    async def sees_close(self) -> bool:
        """Wait up to 20 s for the client to close; nobody times out by himself that fast."""
        try:
            async with asyncio.timeout(20):
                while await self.reader.read(65536):
                    pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True


@dataclass
class Server:
    url: str = ""
    peers: list[Peer] = field(default_factory=list)
    requests: list[Received] = field(default_factory=list)
    closes: list[bool] = field(default_factory=list)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def request(self, peer: Peer) -> Received:
        self.requests.append(await peer.request())
        return self.requests[-1]

    async def expect_close(self, peer: Peer) -> None:
        self.closes.append(await peer.sees_close())
        self.closed.set()

    async def saw_close(self) -> bool:
        async with asyncio.timeout(30):
            await self.closed.wait()
        return self.closes[-1]


Handler = Callable[[Server, Peer], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, *, context: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Server]:
    """Serve `handler` once per connection; its tasks end with the block."""
    server = Server()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        server.peers.append(peer)
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(server, peer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            tasks.discard(task)
            abort(writer.transport)

    listener = await asyncio.start_server(serve, host, 0, ssl=context, backlog=1024)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if context else 'http'}://{host}:{port}"
    try:
        yield server
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.01)


def answering(*responses: bytes) -> Handler:
    """Answer the requests of each connection with `responses` in turn, the last one for ever."""

    async def handler(server: Server, peer: Peer) -> None:
        turn = 0
        while True:
            await server.request(peer)
            await peer.send(responses[min(turn, len(responses) - 1)])
            turn += 1

    return handler


def once(data: bytes, *, close: bool = True) -> Handler:
    """Answer one request with `data`, then close, or wait for the client to."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        await peer.send(data)
        if close:
            await peer.close()
        else:
            await server.expect_close(peer)

    return handler


def make_transport(kind: str, context: ssl.SSLContext | None = None) -> httpx.AsyncBaseTransport:
    if kind == "httpx":
        return httpx.AsyncHTTPTransport(verify=context or PLAIN, limits=httpx.Limits(max_connections=None))
    return StreamTransport(ssl_context=context or PLAIN)


# Nothing is trusted, and nothing is loaded: making the default context costs 10 ms.
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def client_of(kind: str = "deltawire", **options: Any) -> httpx.AsyncClient:
    timeout = options.pop("timeout", 60.0)
    return httpx.AsyncClient(transport=make_transport(kind, **options), timeout=timeout)


def ours(client: httpx.AsyncClient) -> StreamTransport:
    assert isinstance(client._transport, StreamTransport)
    return client._transport


async def standing_still(number: Callable[[], int]) -> int:
    """Waits until a number has not changed for a while; which it is then."""
    seen = -1
    while seen != (seen := number()):  # noqa: ASYNC110 # what does not happen has no event
        await asyncio.sleep(0.3)
    return seen


async def next_piece(stream: AsyncIterator[bytes]) -> bytes:
    return await anext(stream)


async def settled(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Wait for something that the other end of a socket brings about."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition() and loop.time() < deadline:  # noqa: ASYNC110 # the other end has no event of ours
        await asyncio.sleep(0.005)
    return condition()


def is_at_rest(transport: StreamTransport, *, kept: int = 0) -> bool:
    """No connection but `kept` idle ones, no permit, no timer on any connection."""
    return (
        len(transport._idle) == len(transport._connections) == kept
        and transport._active == 0
        and all(connection._timer is None for connection in transport._connections)
    )


# Requests.


@on_each_loop
@both
async def test_get_post_and_stream_work_through_a_plain_client(kind: str) -> None:
    """The three usual calls reach the server as httpx made them."""
    async with serving(answering(HELLO)) as server, client_of(kind) as client:
        assert (await client.get(f"{server.url}/a%20b?c=d&e")).text == "hello"
        assert (await client.post(f"{server.url}/p", json={"model": "m"})).text == "hello"
        async with client.stream("POST", server.url, content=b"x" * 300_000) as response:
            assert [piece async for piece in response.aiter_bytes()] == [b"hello"]
        first, second, third = server.requests
        assert first.line == "GET /a%20b?c=d&e HTTP/1.1"
        assert first.headers[0] == ("Host", server.url.removeprefix("http://"))
        assert (second.body, second.header("content-type")) == (b'{"model":"m"}', "application/json")
        assert third.body == b"x" * 300_000
        assert len(server.peers) == 1


@on_each_loop
@both
async def test_a_body_of_unknown_length_is_chunked(kind: str) -> None:
    """A generator goes out in chunks, its empty pieces left out (one would end the body)."""

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"one", b"", b"two", b"z" * 70_000):
            yield piece

    async with serving(answering(HELLO)) as server, client_of(kind) as client:
        await client.post(server.url, content=pieces())
        assert server.requests[0].body == b"onetwo" + b"z" * 70_000
        assert (await client.get(server.url)).status_code == 200
        assert len(server.peers) == 1


@on_each_loop
@pytest.mark.parametrize("declared", ["3", "9"])
async def test_a_body_that_is_not_its_content_length_is_our_fault(declared: str) -> None:
    """A wrong Content-Length is refused, or the next request would be read as part of this one.

    (Stock httpx lets h11's own exception through here.)
    """
    async with serving(once(HELLO, close=False)) as server, client_of() as client:
        with pytest.raises(httpx.LocalProtocolError):
            await client.post(server.url, content=b"hello", headers={"Content-Length": declared})


@on_each_loop
@both
@pytest.mark.parametrize(
    "headers",
    [{"X": "a\r\nEvil: 1"}, {"X": "a\n"}, {"X": "a\0"}, {"X": " a"}, {"X Y": "a"}, {"X\r\n": "a"}, {"": "a"}],
)
async def test_a_header_cannot_forge_another(kind: str, headers: dict[str, str]) -> None:
    """What would break the framing of the request never reaches a socket."""
    async with serving(answering(HELLO)) as server, client_of(kind) as client:
        with pytest.raises(httpx.LocalProtocolError):
            await client.get(server.url, headers=headers)
        assert not server.requests


@on_each_loop
@both
async def test_an_unknown_scheme_is_refused(kind: str) -> None:
    """Only http and https exist here."""
    async with client_of(kind) as client:
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")


@on_each_loop
@both
async def test_the_body_stops_at_an_early_error(kind: str) -> None:
    """A server that refuses a large body and closes is heard, not reported as a broken pipe."""

    async def refuse(server: Server, peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        peer.writer.write_eof()
        await server.expect_close(peer)

    async with serving(refuse) as server, client_of(kind) as client:
        response = await client.post(server.url, content=b"x" * 20_000_000)
        assert (response.status_code, response.text) == (413, "big")


@on_each_loop
async def test_an_early_error_ends_an_upload_that_the_server_does_not_read() -> None:
    """Nobody waits out the write time-out for an answer that is already here."""

    async def refuse(server: Server, peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
        await server.expect_close(peer)

    async with serving(refuse) as server, client_of() as client:
        async with asyncio.timeout(30):
            response = await client.post(server.url, content=b"x" * 20_000_000)
        assert response.status_code == 401
        assert await server.saw_close()  # the request is unfinished: nothing can follow it
        assert await settled(lambda: is_at_rest(ours(client)))


# Responses.

ENDINGS = {
    "sized": (HELLO, b"hello", True),
    "chunked": (CHUNKED + b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nTrailer: t\r\n\r\n", b"hello", True),
    "empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "304": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"", True),
    "after 1xx": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + HELLO,
        b"hello",
        True,
    ),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", False),
    "connection close": (HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), b"hello", False),
}


@on_each_loop
@both
@pytest.mark.parametrize("ending", ENDINGS)
async def test_each_way_to_end_a_response(kind: str, ending: str) -> None:
    """The body is whole, and the connection is used again exactly where that is safe."""
    data, body, is_kept = ENDINGS[ending]
    async with serving(answering(data)) as server, client_of(kind) as client:
        for _ in range(2):
            response = await client.get(server.url)
            assert response.content == body
            assert "link" not in response.headers
            assert "trailer" not in response.headers
        assert len(server.peers) == (1 if is_kept else 2)


@on_each_loop
@both
@pytest.mark.parametrize(
    "length", [b"Content-Length: 5", b"Content-Length: 0", b"Transfer-Encoding: chunked"]
)
async def test_a_head_response_has_no_body(kind: str, length: bytes) -> None:
    """Whatever length it announces, and the connection is used again."""
    data = b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % length
    async with serving(answering(data, HELLO)) as server, client_of(kind) as client:
        assert (await client.head(server.url)).content == b""
        assert (await client.get(server.url)).text == "hello"
        assert len(server.peers) == 1


@on_each_loop
async def test_a_body_after_a_head_response_closes_the_connection() -> None:
    """A server that sends one all the same cannot slip it in as the next response."""
    async with serving(answering(HELLO)) as server, client_of() as client:
        assert (await client.head(server.url)).content == b""
        assert (await client.get(server.url)).text == "hello"
        assert len(server.peers) == 2


@on_each_loop
@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\n\r\n", HELLO, b"x"])
async def test_bytes_past_the_end_close_the_connection(extra: bytes) -> None:
    """They never become part of the next response (stock httpx waits there until its time-out)."""
    async with serving(answering(HELLO + extra)) as server, client_of() as client:
        for _ in range(2):
            assert (await client.get(server.url)).text == "hello"
        assert len(server.peers) == 2


@on_each_loop
async def test_an_upgrade_closes_the_connection() -> None:
    """101 is handed over as it is; what follows is not HTTP."""
    data = b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nbytes"
    async with serving(once(data, close=False)) as server, client_of() as client:
        assert (await client.get(server.url)).status_code == 101
        assert await server.saw_close()


@on_each_loop
@both
async def test_the_head_reaches_httpx_as_it_came(kind: str) -> None:
    """Status, version, reason, case and order of headers; blanks around a value go."""
    data = b"HTTP/1.1 207 Some Reason\r\nX-A:\r\nx-b:  1 \r\nX-B: 2\r\nContent-Length: 0\r\n\r\n"
    async with serving(answering(data)) as server, client_of(kind) as client:
        response = await client.get(server.url)
        assert (response.status_code, response.reason_phrase) == (207, "Some Reason")
        assert response.http_version == "HTTP/1.1"
        assert response.headers.raw == [
            (b"X-A", b""),
            (b"x-b", b"1"),
            (b"X-B", b"2"),
            (b"Content-Length", b"0"),
        ]


@on_each_loop
@both
@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"2\r\nhe\r\n3;x\r\nllo\r\n0\r\nT: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX:\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
async def test_each_byte_boundary(kind: str, data: bytes) -> None:
    """The same response byte by byte, and cut in two at every place."""

    async def handler(server: Server, peer: Peer) -> None:
        for cut in range(len(data)):
            await server.request(peer)
            pieces = [data[i : i + 1] for i in range(len(data))] if cut == 0 else [data[:cut], data[cut:]]
            for piece in pieces:
                await peer.send(piece)
                await asyncio.sleep(0.0005)

    async with serving(handler) as server, client_of(kind) as client:
        for _ in range(len(data)):
            async with client.stream("GET", server.url) as response:
                assert b"".join([piece async for piece in response.aiter_raw()]) == b"hello"
        assert len(server.peers) == 1


@on_each_loop
async def test_what_arrived_comes_in_one_piece() -> None:
    """A reader that was busy gets all that came meanwhile at once, not chunk by chunk."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        for number in range(10):
            await peer.send(b"%s1\r\n%d\r\n" % (b"" if number else CHUNKED, number))
            await asyncio.sleep(0.002)
        server.reached.set()
        await server.closed.wait()
        await peer.send(b"0\r\n\r\n")

    async with (
        serving(handler) as server,
        client_of() as client,
        client.stream("GET", server.url) as response,
    ):
        await server.reached.wait()
        await asyncio.sleep(0.05)
        stream = response.aiter_raw()
        assert await anext(stream) == b"0123456789"
        server.closed.set()
        assert [piece async for piece in stream] == []


# Pushing: each piece goes to a function from where it arrives.


def pushing(response: httpx.Response) -> BodyStream:
    body = response.extensions["body_stream"]
    assert isinstance(body, BodyStream)
    return body


@on_each_loop
async def test_pieces_are_pushed_as_they_arrive() -> None:
    """First what came before; and nobody is woken until the sink, or the body, has come to an end."""
    pieces: list[bytes] = []

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        for number in range(6):
            await peer.send((b"" if number else CHUNKED) + b"1\r\n%d\r\n" % number)
            await server.reached.wait()
            server.reached.clear()
        await peer.send(b"0\r\n\r\n")

    def sink(piece: bytes) -> bool:
        server.reached.set()
        pieces.append(piece)
        return piece != b"3"

    async with (
        serving(handler) as server,
        client_of() as client,
        client.stream("GET", server.url) as response,
    ):
        assert await pushing(response).push(sink)
        assert pieces == [b"0", b"1", b"2", b"3"]
        assert not await pushing(response).push(sink)
        assert pieces == [b"%d" % number for number in range(6)]
        assert await settled(lambda: is_at_rest(ours(client), kept=1))


@on_each_loop
async def test_a_response_that_comes_at_once_is_pushed_turn_by_turn() -> None:
    """One that is long must not hold up the others."""
    length = 200_000
    body = bytes(range(200)) * (length // 200)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (length, body)
    turns, pieces = 0, list[tuple[int, bytes]]()

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def sink(piece: bytes) -> bool:
        pieces.append((turns, piece))
        return True

    async with (
        serving(once(answer)) as server,
        client_of() as client,
        client.stream("GET", server.url) as response,
    ):
        counting = asyncio.create_task(count())
        assert not await pushing(response).push(sink)
        counting.cancel()
    assert b"".join(piece for _, piece in pieces) == body
    assert max(len(piece) for _, piece in pieces) <= http_connection.MAX_PIECE_BYTES
    assert len({turn for turn, _ in pieces}) >= len(pieces) // 2


@on_each_loop
async def test_what_a_sink_raises_is_raised() -> None:
    """Not taken for a broken connection; which is closed, as the response is unfinished."""

    def sink(piece: bytes) -> bool:
        if piece == b"two":
            raise LookupError(piece)
        server.reached.set()
        return True

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        await peer.send(CHUNKED + b"3\r\none\r\n")
        await server.reached.wait()
        await peer.send(b"3\r\ntwo\r\n")
        await server.closed.wait()

    async with serving(handler) as server, client_of() as client:
        async with client.stream("GET", server.url) as response:
            with pytest.raises(LookupError):
                await pushing(response).push(sink)
        assert await settled(lambda: is_at_rest(ours(client)))
        server.closed.set()


@on_each_loop
async def test_a_cancelled_push_takes_nothing_more() -> None:
    """What arrives between the cancellation and its coming through is nobody's."""
    pieces: list[bytes] = []

    def sink(piece: bytes) -> bool:
        pieces.append(piece)
        task.cancel()
        return True

    body = CHUNKED + b"3\r\none\r\n" * 1_000
    async with serving(once(body, close=False)) as server, client_of() as client:
        async with client.stream("GET", server.url) as response:
            task = asyncio.create_task(pushing(response).push(sink))
            with pytest.raises(asyncio.CancelledError):
                await task
            taken = len(pieces)
            await asyncio.sleep(0.01)
            assert len(pieces) == taken <= 2  # what was here already, and the first that arrived
        assert await server.saw_close()


@on_each_loop
async def test_a_response_that_is_closed_ends_its_push() -> None:
    """With an error, as another reader would get it; and a later one gets it at once."""
    async with serving(once(CHUNKED + b"5\r\nhello\r\n", close=False)) as server, client_of() as client:
        async with client.stream("GET", server.url) as response:
            push = asyncio.create_task(pushing(response).push(lambda _: True))
            await asyncio.sleep(0.01)
            await response.aclose()
            with pytest.raises(httpx.ReadError):
                await asyncio.wait_for(push, 30)
            with pytest.raises(httpx.ReadError):
                await pushing(response).push(lambda _: True)
        assert await server.saw_close()


@on_each_loop
@both
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nX: y\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", httpx.RemoteProtocolError),
        (CHUNKED + b"5\r\nhello\r\n", httpx.RemoteProtocolError),
        (CHUNKED + b"9\r\nhello", httpx.RemoteProtocolError),
        (CHUNKED + b"xyz\r\n", httpx.RemoteProtocolError),
        (b"SSH-2.0-OpenSSH_9.2\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000 + b"\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", None),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", None),
    ],
)
async def test_the_end_of_the_connection(
    kind: str, data: bytes, error: type[httpx.RequestError] | None
) -> None:
    """It ends a body that has no other end, and is the server's fault everywhere else."""
    async with serving(once(data)) as server, client_of(kind) as client:
        if error is None:
            assert (await client.get(server.url)).text == "hello"
        else:
            with pytest.raises(error) as caught:
                await client.get(server.url)
            assert caught.value.request.url == server.url
        if kind == "deltawire":
            assert await settled(lambda: is_at_rest(ours(client)))


@on_each_loop
@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 12_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 4_000,
        CHUNKED + b"0\r\nT: " + b"y" * 70_000,
    ],
    ids=["one header", "many headers", "endless 1xx", "a trailer"],
)
async def test_headers_are_bounded(data: bytes) -> None:
    """64 KiB, however they come; without the bound, a server could fill the worker's memory."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        for start in range(0, len(data), 1000):
            await peer.send(data[start : start + 1000])
        await server.expect_close(peer)

    async with serving(handler) as server, client_of() as client:
        with pytest.raises(httpx.RemoteProtocolError, match="too large"):
            await client.get(server.url)
        assert await server.saw_close()


@on_each_loop
@both
async def test_what_came_before_an_error_is_read_first(kind: str) -> None:
    """Deltas that arrived are not lost because the connection broke after them."""
    async with (
        serving(once(CHUNKED + b"5\r\nhello\r\n")) as server,
        client_of(kind) as client,
        client.stream("GET", server.url) as response,
    ):
        await asyncio.sleep(0.05)
        stream = response.aiter_raw()
        assert await anext(stream) == b"hello"
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(stream)


@on_each_loop
@both
async def test_a_reset_is_a_read_error(kind: str) -> None:
    """The connection broke: neither an end of the body nor a protocol error."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        await peer.send(CHUNKED + b"5\r\nhello\r\n")
        await server.reached.wait()
        peer.reset()

    async with serving(handler) as server, client_of(kind) as client:
        async with client.stream("GET", server.url) as response:
            stream = response.aiter_raw()
            await anext(stream)
            server.reached.set()
            with pytest.raises(httpx.ReadError) as caught:
                await anext(stream)
        assert caught.value.__cause__ is not None


# Backpressure.


@on_each_loop
async def test_a_slow_reader_stops_the_server() -> None:
    """Unread bytes stay bounded while the reader sleeps, and none is lost."""
    total = 32 * 1024 * 1024
    sent = 0

    async def handler(server: Server, peer: Peer) -> None:
        nonlocal sent
        await server.request(peer)
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            await peer.send(b"x" * 65536)
            sent += 65536
        await peer.close()

    async with (
        serving(handler) as server,
        client_of() as client,
        client.stream("GET", server.url) as response,
    ):
        (connection,) = ours(client)._connections
        assert await settled(lambda: connection._is_read_paused)
        assert await standing_still(lambda: sent) < total  # the server waits for us
        assert connection._unread_bytes <= http_connection.MAX_UNREAD_BYTES + 256 * 1024
        received = 0
        async for piece in response.aiter_raw():
            received += len(piece)
            assert connection._unread_bytes <= http_connection.MAX_UNREAD_BYTES + 256 * 1024
        assert received == total


@on_each_loop
async def test_a_paused_connection_can_be_kept() -> None:
    """All of the body is here but unread: closing the response keeps the connection, and it reads again."""
    body = b"x" * 300_000

    async def handler(server: Server, peer: Peer) -> None:
        for _ in range(2):
            await server.request(peer)
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n")
            await peer.send(body)

    async with serving(handler) as server, client_of() as client:
        async with client.stream("GET", server.url):
            (connection,) = ours(client)._connections
            assert await settled(lambda: connection.is_complete)
            assert connection._is_read_paused
        assert (await client.get(server.url)).content == body
        assert len(server.peers) == 1
        assert await settled(lambda: not ours(client)._connections)  # it sees the server close


# The pool.


@on_each_loop
@both
async def test_five_hundred_streams_at_once(kind: str) -> None:
    """Each reader gets its own bytes."""
    count = 500 if kind == "deltawire" else 50  # httpx' pool takes quadratic time

    async def handler(server: Server, peer: Peer) -> None:
        while True:
            number = (await peer.request()).line.split()[1].encode()
            await peer.send(CHUNKED)
            for _ in range(5):
                await peer.send(b"%x\r\n%b\r\n" % (len(number), number))
                await asyncio.sleep(0.01)
            await peer.send(b"0\r\n\r\n")

    async def read(number: int) -> bytes:
        async with client.stream("GET", f"{server.url}/{number}") as response:
            return b"".join([piece async for piece in response.aiter_raw()])

    async with serving(handler) as server, client_of(kind) as client:
        bodies = await asyncio.gather(*(read(number) for number in range(count)))
        assert bodies == [b"/%d" % number * 5 for number in range(count)]
        assert len(server.peers) == count
        if kind == "deltawire":
            assert await settled(lambda: is_at_rest(ours(client), kept=100))  # the default bound


@on_each_loop
async def test_the_connection_used_last_is_used_first() -> None:
    """So that those not needed grow old, and the one at hand is the least likely to be stale."""
    async with serving(answering(HELLO)) as server, client_of() as client:
        await asyncio.gather(client.get(server.url), client.get(server.url))
        transport = ours(client)
        (newest,) = [c for c in transport._connections if c is transport._idle._by_origin[c.origin][-1]]
        await client.get(server.url)
        assert transport._idle._by_origin[newest.origin][-1] is newest
        assert len(server.peers) == 2


@on_each_loop
async def test_idle_connections_expire() -> None:
    """Without a further request; and the timer goes with the last of them."""
    async with serving(answering(HELLO)) as server:
        transport = StreamTransport(ssl_context=PLAIN, idle_expiry_s=0.5)
        async with httpx.AsyncClient(transport=transport) as client:
            await client.get(server.url)
            await client.get(server.url)
            assert len(server.peers) == 1
            assert await settled(lambda: is_at_rest(transport))
            assert transport._idle._timer is None
            assert not transport._idle._by_origin


@on_each_loop
async def test_idle_connections_are_bounded() -> None:
    """One too many, and the oldest goes."""
    async with serving(answering(HELLO)) as server:
        transport = StreamTransport(ssl_context=PLAIN, max_idle_connections=2)
        async with httpx.AsyncClient(transport=transport) as client:
            await asyncio.gather(*(client.get(server.url) for _ in range(5)))
            assert await settled(lambda: is_at_rest(transport, kept=2))


@on_each_loop
async def test_an_idle_connection_that_the_server_closes_is_forgotten() -> None:
    """Seen at once, not at the next request. So is one on which the server speaks unasked."""
    for extra in (b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"):
        async with serving(once(HELLO, close=False)) as server, client_of() as client:
            await client.get(server.url)
            assert is_at_rest(ours(client), kept=1)
            peer = server.peers[0]
            peer.writer.write(extra)
            if not extra:
                peer.writer.close()
            assert await settled(functools.partial(is_at_rest, ours(client)))


@on_each_loop
async def test_max_connections_makes_requests_wait_in_order() -> None:
    """First come, first served; a waiter that gives up takes nobody's turn."""
    order: list[str] = []
    go = asyncio.Semaphore(0)

    async def handler(server: Server, peer: Peer) -> None:
        while True:
            order.append((await peer.request()).line.split()[1])
            await go.acquire()
            await peer.send(HELLO)

    async with serving(handler) as server:
        transport = StreamTransport(ssl_context=PLAIN, max_connections=1)
        async with httpx.AsyncClient(transport=transport) as client:
            waiting = [asyncio.create_task(client.get(f"{server.url}/{n}")) for n in range(5)]
            assert await settled(lambda: len(order) == 1)
            waiting[2].cancel()
            for _ in range(5):
                go.release()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(results[2], asyncio.CancelledError)
            assert order == ["/0", "/1", "/3", "/4"]
            assert len(server.peers) == 1
            assert is_at_rest(transport, kept=1)


@on_each_loop
async def test_an_idle_connection_elsewhere_gives_way() -> None:
    """The bound counts idle connections too, but they never make anyone wait."""
    async with serving(answering(HELLO)) as one, serving(answering(HELLO)) as two:
        transport = StreamTransport(ssl_context=PLAIN, max_connections=1)
        async with httpx.AsyncClient(transport=transport) as client:
            for server in (one, two, one):
                await client.get(server.url)
                assert is_at_rest(transport, kept=1) or await settled(lambda: is_at_rest(transport, kept=1))
            assert (len(one.peers), len(two.peers)) == (2, 1)


@on_each_loop
async def test_closing_the_transport_ends_everything() -> None:
    """Idle and busy connections close; a busy reader gets an error, and nothing is kept afterwards."""
    async with serving(once(CHUNKED + b"5\r\nhello\r\n", close=False)) as server:
        client = client_of()
        async with client.stream("GET", server.url) as response:
            stream = response.aiter_raw()
            await anext(stream)
            reader = asyncio.create_task(next_piece(stream))
            await asyncio.sleep(0.01)
            await client.aclose()
            with pytest.raises(httpx.ReadError):
                await reader
        assert await server.saw_close()
        assert is_at_rest(ours(client))


# Stale connections.


def going_stale(*, reset: bool, after: bytes = b"") -> Handler:
    """The first connection answers once and then breaks on the second request; later ones answer."""

    async def handler(server: Server, peer: Peer) -> None:
        is_first = len(server.peers) == 1
        await server.request(peer)
        await peer.send(HELLO)
        await server.request(peer)
        if not is_first:
            await peer.send(HELLO)
            return
        await peer.send(after)
        if reset:
            peer.reset()
        else:
            await peer.close()

    return handler


@on_each_loop
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_stale_connection_is_replaced_once(reset: bool, method: str) -> None:
    """The server closed it as the request went out: the request goes out again, on a new connection."""
    async with serving(going_stale(reset=reset)) as server, client_of() as client:
        content = b"body" if method == "POST" else None
        await client.get(server.url)
        assert (await client.request(method, server.url, content=content)).text == "hello"
        assert len(server.peers) == 2
        assert [received.body for received in server.requests[1:]] == [content or b""] * 2


@on_each_loop
async def test_a_fresh_connection_is_not_tried_again() -> None:
    """Only a connection that had worked can be stale."""
    async with serving(once(b"")) as server, client_of() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(server.url)
        assert len(server.requests) == 1


@on_each_loop
async def test_the_second_try_is_the_last() -> None:
    """A server that closes every time is not asked for ever."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        if len(server.requests) == 1:
            await peer.send(HELLO)
            await server.request(peer)

    async with serving(handler) as server, client_of() as client:
        await client.get(server.url)
        with pytest.raises(httpx.TransportError):
            await client.get(server.url)
        assert len(server.requests) == 3


@on_each_loop
async def test_one_byte_of_a_response_forbids_a_second_try() -> None:
    """The server has begun to answer, so it has acted."""
    async with serving(going_stale(reset=False, after=b"H")) as server, client_of() as client:
        await client.get(server.url)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(server.url)
        assert len(server.requests) == 2


@on_each_loop
async def test_a_body_that_can_be_read_once_is_not_sent_again() -> None:
    """Half of it may be gone."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"

    async with serving(going_stale(reset=False)) as server, client_of() as client:
        await client.get(server.url)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(server.url, content=pieces())
        assert len(server.requests) == 2


@on_each_loop
async def test_a_time_out_on_a_kept_connection_is_not_staleness() -> None:
    """The server has the request, and may be at work on it."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        await peer.send(HELLO)
        await server.request(peer)
        await server.expect_close(peer)

    async with serving(handler) as server, client_of() as client:
        await client.get(server.url)
        with pytest.raises(httpx.ReadTimeout):
            await client.get(server.url, timeout=0.1)
        assert await server.saw_close()
        assert len(server.requests) == 2


# Time-outs.


@on_each_loop
@both
async def test_read_time_out_before_the_head(kind: str) -> None:
    """The server says nothing; it sees the connection close at once."""
    async with serving(once(b"", close=False)) as server, client_of(kind) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.get(server.url, timeout=httpx.Timeout(60, read=0.1))
        assert await server.saw_close()


@on_each_loop
@both
async def test_read_time_out_is_the_longest_silence(kind: str) -> None:
    """Not the time of the whole response; any byte counts; then silence ends it."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        await peer.send(CHUNKED)
        for byte in b"1;ext\r\nx\r\n" * 2:
            await asyncio.sleep(0.1)
            await peer.send(bytes([byte]))
        await server.expect_close(peer)

    async with serving(handler) as server, client_of(kind) as client:
        loop, received = asyncio.get_running_loop(), b""
        started_at = loop.time()
        async with client.stream("GET", server.url, timeout=httpx.Timeout(60, read=1.0)) as response:
            stream = response.aiter_raw()
            while len(received) < 2:
                received += await anext(stream)
            with pytest.raises(httpx.ReadTimeout):
                await anext(stream)
        assert received == b"xx"
        assert 2.0 < loop.time() - started_at < 60  # 20 bytes in 2 s, 1 s per byte of body, then silence
        assert await server.saw_close()


@on_each_loop
@both
async def test_a_slow_reader_is_no_silence(kind: str) -> None:
    """The clock runs only while somebody waits for the server."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.request(peer)
        await peer.send(CHUNKED + b"5\r\nhello\r\n")
        await asyncio.sleep(1.2)
        await peer.send(b"5\r\nworld\r\n0\r\n\r\n")

    async with serving(handler) as server, client_of(kind) as client:
        timeout = httpx.Timeout(60, read=1.0)
        async with client.stream("GET", server.url, timeout=timeout) as response:
            stream = response.aiter_raw()
            assert await anext(stream) == b"hello"
            await asyncio.sleep(1.5)
            assert b"".join([piece async for piece in stream]) == b"world"


@on_each_loop
@both
async def test_write_time_out(kind: str) -> None:
    """The server does not read the body."""

    async def handler(server: Server, peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined] # a read transport, too
        await server.reached.wait()

    async with serving(handler) as server, client_of(kind) as client:
        with pytest.raises(httpx.WriteTimeout) as caught:
            await client.post(server.url, content=b"x" * 50_000_000, timeout=httpx.Timeout(60, write=0.2))
        assert caught.value.__cause__ is not None
        if kind == "deltawire":  # also while the server still does not read
            assert await settled(lambda: is_at_rest(ours(client)))
        server.reached.set()


@on_each_loop
async def test_pool_time_out() -> None:
    """No connection becomes free in time; the next one that does goes to whoever asks then."""
    async with serving(once(CHUNKED, close=False)) as server:
        transport = StreamTransport(ssl_context=PLAIN, max_connections=1)
        async with httpx.AsyncClient(transport=transport) as client:
            async with client.stream("GET", server.url):
                with pytest.raises(httpx.PoolTimeout):
                    await client.get(server.url, timeout=httpx.Timeout(60, pool=0.1))
            async with client.stream("GET", server.url):
                pass
            assert await settled(lambda: is_at_rest(transport))


@contextlib.contextmanager
def full_listener() -> Any:
    """A port whose backlog is full, so that a further SYN gets no answer."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@on_each_loop
@both
async def test_connect_time_out(kind: str) -> None:
    """Nobody answers the SYN."""
    with full_listener() as port:
        async with client_of(kind) as client:
            with pytest.raises(httpx.ConnectTimeout):
                await client.get(f"http://127.0.0.1:{port}", timeout=httpx.Timeout(60, connect=0.2))
            if kind == "deltawire":
                assert is_at_rest(ours(client))


@on_each_loop
@both
async def test_connect_time_out_covers_tls(kind: str) -> None:
    """The server accepts and then does not shake hands."""

    async def handler(server: Server, peer: Peer) -> None:
        await server.expect_close(peer)

    async with serving(handler) as server, client_of(kind) as client:
        url = server.url.replace("http:", "https:")
        with pytest.raises(httpx.ConnectTimeout):
            await client.get(url, timeout=httpx.Timeout(60, connect=0.2))
        assert await server.saw_close()


# Connecting.


@on_each_loop
@both
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
async def test_no_server_is_a_connect_error(kind: str, host: str) -> None:
    """Refused, or not even a name."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets the port
        async with client_of(kind) as client:
            with pytest.raises(httpx.ConnectError) as caught:
                await client.get(f"http://{host}:{sock.getsockname()[1]}")
            assert caught.value.__cause__ is not None


def resolving_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[int, str, int]) -> None:
    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        return [(family, socket.SOCK_STREAM, 6, "", (host, port)) for family, host, port in addresses]

    monkeypatch.setattr(happy_eyeballs, "_resolve", getaddrinfo)


@on_each_loop
async def test_the_next_address_is_tried_when_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, without the delay."""
    async with serving(answering(HELLO)) as server, client_of() as client:
        port = int(server.url.rsplit(":", 1)[1])
        resolving_to(monkeypatch, (socket.AF_INET, "127.0.0.2", port), (socket.AF_INET, "127.0.0.1", port))
        assert (await client.get(f"http://gateway.test:{port}")).text == "hello"


@on_each_loop
async def test_the_next_address_is_tried_when_one_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 0.25 s, as RFC 8305 says, and not after the time-out."""
    loop = asyncio.get_running_loop()
    with full_listener() as silent:
        async with serving(answering(HELLO)) as server, client_of() as client:
            port = int(server.url.rsplit(":", 1)[1])
            resolving_to(
                monkeypatch, (socket.AF_INET, "127.0.0.1", silent), (socket.AF_INET, "127.0.0.1", port)
            )
            started_at = loop.time()
            assert (await client.get("http://gateway.test")).text == "hello"
            assert 0.2 < loop.time() - started_at < 30


@on_each_loop
async def test_cancelling_a_race_of_addresses_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a task nor a socket."""
    with full_listener() as silent:
        resolving_to(monkeypatch, *[(socket.AF_INET, "127.0.0.1", silent)] * 3)
        async with client_of() as client:
            request = asyncio.create_task(client.get("http://gateway.test"))
            await asyncio.sleep(0.35)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert len(asyncio.all_tasks()) <= 2  # pytest's and ours
            assert is_at_rest(ours(client))


@on_each_loop
async def test_small_writes_are_not_held_back() -> None:
    """TCP_NODELAY is set."""
    async with serving(answering(HELLO)) as server, client_of() as client:
        await client.get(server.url)
        (connection,) = ours(client)._connections
        assert connection._transport is not None
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# Cancellation and closing.


@on_each_loop
@both
async def test_closing_an_unfinished_response_closes_the_connection(kind: str) -> None:
    """The server stops generating, because it sees the close at once."""
    async with serving(once(CHUNKED + b"5\r\nhello\r\n", close=False)) as server, client_of(kind) as client:
        async with client.stream("GET", server.url) as response:
            async for piece in response.aiter_raw():
                assert piece == b"hello"
                break
        assert await server.saw_close()
        if kind == "deltawire":
            assert await settled(lambda: is_at_rest(ours(client)))


@on_each_loop
async def test_closing_a_response_while_another_task_reads_it() -> None:
    """The reader gets an error instead of waiting for ever."""
    async with serving(once(CHUNKED + b"5\r\nhello\r\n", close=False)) as server, client_of() as client:
        async with client.stream("GET", server.url) as response:
            stream = response.aiter_raw()
            await anext(stream)
            reader = asyncio.create_task(next_piece(stream))
            await asyncio.sleep(0.01)
            await response.aclose()
            with pytest.raises(httpx.ReadError):
                await asyncio.wait_for(reader, 30)
        assert await server.saw_close()


@on_each_loop
async def test_a_late_reader_never_sees_the_next_response() -> None:
    """A stream that was let go no longer touches the connection, which may carry another response."""
    async with serving(answering(HELLO)) as server, client_of() as client:
        first = await client._transport.handle_async_request(client.build_request("GET", server.url))
        assert await settled(lambda: next(iter(ours(client)._connections)).is_complete)
        await first.aclose()
        second = await client._transport.handle_async_request(client.build_request("GET", server.url))
        assert isinstance(first.stream, httpx.AsyncByteStream)
        with pytest.raises(httpx.ReadError):
            await anext(aiter(first.stream))
        await first.stream.aclose()
        assert await second.aread() == b"hello"
        assert len(server.peers) == 1


async def _until(event: asyncio.Event) -> AsyncIterator[bytes]:
    yield b"one"
    await event.wait()


@on_each_loop
@both
@pytest.mark.parametrize("stage", ["upload", "drain", "head", "half a head", "body"])
async def test_cancelling_at_each_await_closes_the_connection(kind: str, stage: str) -> None:
    """Wherever the request is, the server sees the connection close, and nothing of it is left."""
    answers = {"half a head": b"HTTP/1.1 200 OK\r\nX", "body": CHUNKED + b"5\r\nhello\r\n"}

    async def handler(server: Server, peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        if stage == "drain":
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined] # a read transport, too
        await peer.send(answers.get(stage, b""))
        await asyncio.sleep(0.05)
        server.reached.set()
        if stage == "drain":
            await asyncio.sleep(0.1)
            peer.writer.transport.resume_reading()  # type: ignore[attr-defined] # a read transport, too
        await server.expect_close(peer)

    async with serving(handler) as server, client_of(kind) as client:

        async def read() -> None:
            contents = {"upload": _until(asyncio.Event()), "drain": b"x" * 50_000_000}
            content: Any = contents.get(stage)
            async with client.stream("POST", server.url, content=content) as response:
                async for _ in response.aiter_raw():
                    pass

        reader = asyncio.create_task(read())
        await asyncio.wait_for(server.reached.wait(), 30)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert await server.saw_close()
        if kind == "deltawire":
            assert await settled(lambda: is_at_rest(ours(client)))


@on_each_loop
@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("step_s", [0.0, 0.0001])
async def test_cancelling_at_every_step_of_the_loop(
    is_tls: bool, host: str, step_s: float, tls: "Tls | None"
) -> None:
    """After 0, 1, 2 ... steps, from the resolver to the last chunk: no task, socket or permit is left."""
    if is_tls and tls is None:
        pytest.skip("openssl is missing")
    context, trusted = (tls.server, tls.client) if is_tls and tls else (None, PLAIN)
    data = CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"
    async with serving(answering(data), context=context) as server:
        transport = StreamTransport(ssl_context=trusted, max_connections=1)
        url = server.url.replace("127.0.0.1", host)
        async with httpx.AsyncClient(transport=transport) as client:
            steps = 0
            while True:
                transport._idle.close()
                request = asyncio.create_task(client.get(url))
                for _ in range(steps):
                    await asyncio.sleep(step_s)  # with a pause, threads and the kernel get ahead, too
                if request.done():
                    assert request.result().text == "hello"
                    break
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
                assert transport._active == 0
                assert await settled(lambda: not transport._connections)
                steps += 1
            assert steps > (4 if step_s == 0 else 1)  # it did cut in several places
            # Every permit is back: another request would otherwise wait for ever.
            assert (await client.get(url, timeout=httpx.Timeout(60, pool=5))).text == "hello"
        assert await settled(lambda: all(peer.writer.transport.is_closing() for peer in server.peers))


# TLS.


@dataclass
class Tls:
    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls | None:
    openssl = which("openssl")
    if openssl is None:
        return None
    folder: Path = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        f"-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
        f"-keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    server.set_alpn_protocols(["h2", "http/1.1"])
    return Tls(server, ssl.create_default_context(cafile=str(certificate)))


@pytest.fixture
def secure(tls: Tls | None) -> Tls:
    if tls is None:
        pytest.skip("openssl is missing")
    return tls


@on_each_loop
@both
async def test_tls(kind: str, secure: Tls) -> None:
    """Requests, streams and reuse work; HTTP/1.1 is asked for, also of a server that would speak HTTP/2."""
    protocols = []

    async def handler(server: Server, peer: Peer) -> None:
        protocols.append(peer.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await answering(HELLO, CHUNKED + b"40000\r\n" + b"x" * 0x40000 + b"\r\n0\r\n\r\n")(server, peer)

    async with (
        serving(handler, context=secure.server) as server,
        client_of(kind, context=secure.client) as client,
    ):
        assert (await client.post(server.url, content=b"y" * 1_000_000)).text == "hello"
        async with client.stream("GET", server.url) as response:
            assert sum([len(piece) async for piece in response.aiter_raw()]) == 0x40000
        assert server.requests[0].body == b"y" * 1_000_000
        assert protocols == ["http/1.1"]


@on_each_loop
@both
async def test_a_certificate_that_nobody_vouches_for_is_a_connect_error(kind: str, secure: Tls) -> None:
    """And so is one of somebody else."""
    async with serving(answering(HELLO), context=secure.server) as server:
        async with client_of(kind) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(server.url)
        async with client_of(kind, context=secure.client) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(server.url, extensions={"sni_hostname": "elsewhere.test"})


@on_each_loop
@both
async def test_a_server_without_tls_is_a_connect_error(kind: str) -> None:
    """One that answers the handshake in plain text, and one that hangs up on it."""

    async def talk(server: Server, peer: Peer) -> None:
        await peer.send(HELLO)
        await peer.sees_close()

    async def hang_up(server: Server, peer: Peer) -> None:
        await peer.reader.read(10)
        await peer.close()

    for handler in (talk, hang_up):
        async with serving(handler) as server, client_of(kind) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(server.url.replace("http:", "https:"))


@on_each_loop
@both
async def test_closing_an_unfinished_tls_response_closes_the_connection(kind: str, secure: Tls) -> None:
    """At once: without waiting for the other side's goodbye."""
    handler = once(CHUNKED + b"5\r\nhello\r\n", close=False)
    async with (
        serving(handler, context=secure.server) as server,
        client_of(kind, context=secure.client) as client,
    ):
        async with client.stream("GET", server.url) as response:
            assert await anext(response.aiter_raw()) == b"hello"
        assert await server.saw_close()


@on_each_loop
async def test_a_slow_reader_stops_a_tls_server(secure: Tls) -> None:
    """The same bound below the records."""
    total, sent = 32 * 1024 * 1024, 0

    async def handler(server: Server, peer: Peer) -> None:
        nonlocal sent
        await server.request(peer)
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            await peer.send(b"x" * 65536)
            sent += 65536
        await peer.close()

    async with (
        serving(handler, context=secure.server) as server,
        client_of(context=secure.client) as client,
        client.stream("GET", server.url) as response,
    ):
        assert await standing_still(lambda: sent) < total
        assert sum([len(piece) async for piece in response.aiter_raw()]) == total
