"""httpx's API over asyncio and httptools, for thousands of streamed responses in one process.

Stock httpx pays for a task scope and a time-out object per chunk, and searches its whole pool at every
request. Here bytes go from `data_received` to the reader through one list and one future, or straight to a
function (`BodyStream.push`), and the pool is a deque per origin.

Left out on purpose: HTTP/2, `network_stream` and `trace` extensions, Unix sockets, a DNS cache, and
**proxies**: where `HTTPS_PROXY`, `HTTP_PROXY` or `ALL_PROXY` applies to an address, the caller uses
`httpx.AsyncHTTPTransport` (an `AsyncClient` with `transport=` ignores those variables).

Errors are httpx's own. Ours: `LocalProtocolError`, `UnsupportedProtocol`. The peer's:
`RemoteProtocolError`. The network's: `ConnectError`, `ReadError`, and the four time-outs.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable

import httpx

from .happy_eyeballs import open_socket
from .http_connection import MAX_PIECE_BYTES, Connection, Origin, Sink, encode_head

__all__ = ["BodyStream", "StreamTransport"]


class StreamTransport(httpx.AsyncBaseTransport):
    """An `httpx.AsyncClient(transport=...)` for many long responses; one event loop, HTTP/1.1.

    `max_connections` bounds the open connections; requests past it wait in order for `timeout.pool`
    seconds (default: no bound). At most `max_idle_connections` are kept for reuse, each for
    `idle_expiry_s`, the one used last first. `ssl_context` defaults to `httpx.create_ssl_context()`;
    its ALPN list is set to HTTP/1.1.

    Time-outs are httpx's: `connect` covers DNS, TCP and TLS together, `write` each piece of the body,
    `read` the longest silence while a reader waits (any byte counts, not only body).

    A response that is closed before its end, a failure, and a cancellation at any await abort the
    connection at once. If the server has closed a kept connection before the first byte of a response,
    the request goes out once more, on a new one; this includes POST, so a server that dies after
    it has acted on a request may see it twice. A body that can be read only once is never sent again.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        max_connections: int | None = None,
        max_idle_connections: int = 100,
        idle_expiry_s: float = 5.0,
    ) -> None:
        self._ssl_context = httpx.create_ssl_context() if ssl_context is None else ssl_context
        self._ssl_context.set_alpn_protocols(["http/1.1"])
        self._max_connections = max_connections
        # A permit is one request under way. Idle connections hold none; they give way instead.
        self._permits = None if max_connections is None else asyncio.Semaphore(max_connections)
        self._active = 0
        self._connections: set[Connection] = set()
        self._idle = _IdleConnections(max_idle_connections, idle_expiry_s)
        self._is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`; return once the head of the final response is here. Cancelling is safe."""
        origin = Origin.of(request)
        head = encode_head(request)
        timeouts: dict[str, float | None] = request.extensions.get("timeout", {})
        await self._take_permit(timeouts.get("pool"))
        connection: Connection | None = None
        try:
            connection = self._idle.take(origin)
            is_reused = connection is not None
            if connection is None:
                connection = await self._connect(origin, timeouts.get("connect"))
            try:
                await connection.exchange(request, head, timeouts)
            except (httpx.ReadError, httpx.RemoteProtocolError):
                if not (is_reused and connection.is_stale and isinstance(request.stream, httpx.ByteStream)):
                    raise
                connection.abort()
                connection = await self._connect(origin, timeouts.get("connect"))
                await connection.exchange(request, head, timeouts)
        except BaseException:
            self._settle(connection, is_failed=True)
            raise
        body = BodyStream(connection, timeouts.get("read"), self._settle)
        headers, connection.headers = connection.headers, []  # httpx has its own copies
        return httpx.Response(
            connection.status,
            headers=headers,
            stream=body,
            extensions={
                "http_version": connection.http_version,
                "reason_phrase": connection.reason,
                "body_stream": body,
            },
        )

    async def aclose(self) -> None:
        """Abort every connection, those under way included; their readers get `ReadError`."""
        self._is_closed = True
        self._idle.close()
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # the loop closes an aborted socket in its next step

    async def _take_permit(self, timeout: float | None) -> None:
        if self._permits is not None:
            try:
                async with asyncio.timeout(timeout):
                    await self._permits.acquire()
            except TimeoutError as exc:
                raise httpx.PoolTimeout("no connection became free in time") from exc
        self._active += 1

    async def _connect(self, origin: "Origin", timeout: float | None) -> "Connection":
        if self._max_connections is not None and self._active + len(self._idle) > self._max_connections:
            self._idle.evict()
        loop = asyncio.get_running_loop()
        connection = Connection(loop, origin, self._forget)
        self._connections.add(connection)
        try:
            async with asyncio.timeout(timeout):
                sock = await open_socket(loop, origin.host, origin.port)
                # From here on the loop owns the socket, also when this await fails or is cancelled.
                await loop.create_connection(lambda: connection, sock=sock)
                if origin.scheme == "https":
                    await connection.start_tls(self._ssl_context, origin.server_name)
        except TimeoutError as exc:
            self._drop(connection)
            raise httpx.ConnectTimeout("could not connect in time") from exc
        except (OSError, ValueError) as exc:  # ValueError: a name that ssl or the resolver cannot encode
            self._drop(connection)
            raise httpx.ConnectError(str(exc)) from exc
        except BaseException:
            self._drop(connection)
            raise
        return connection

    def _settle(self, connection: "Connection | None", *, is_failed: bool = False) -> None:
        """End a request: its permit is free, its connection kept or aborted. Once per request."""
        self._active -= 1
        if self._permits is not None:
            self._permits.release()
        if connection is None:
            return
        if is_failed or self._is_closed or not connection.rest():
            connection.abort()
        else:
            self._idle.put(connection)

    def _drop(self, connection: "Connection") -> None:
        connection.abort()
        self._connections.discard(connection)  # it may never have had a transport to lose

    def _forget(self, connection: "Connection") -> None:
        self._connections.discard(connection)
        self._idle.discard(connection)


class BodyStream(httpx.AsyncByteStream):
    """The body of one response. Its connection is let go once, at the end, on error or by `aclose`.

    It is also the response's extension `body_stream`: `push` is the way past httpx's layers, each of which
    wraps the body in a generator and keeps the response.
    """

    def __init__(
        self, connection: "Connection", read_timeout: float | None, settle: Callable[["Connection"], None]
    ) -> None:
        # None once let go: from then on the connection may already carry another response.
        self._connection: Connection | None = connection
        self._read_timeout = read_timeout
        self._settle = settle

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield, each time, all bytes that arrived since the last time, in one piece."""
        try:
            while True:
                connection = self._unfinished()
                if data := connection.take():
                    yield data
                elif connection.is_complete:
                    return
                else:
                    await connection.news(self._read_timeout)
        finally:
            self._let_go()

    async def push(self, sink: Sink) -> bool:
        """Call `sink` with each piece of the body as it arrives, from within the loop's read of the socket.

        A piece is all that came, up to MAX_PIECE_BYTES for each turn of the loop.

        Return False at the end; True once `sink` has returned False, to be called again for the rest. Raises
        what iterating does, and what `sink` raises. Cancelling ends the response.
        """
        is_enough = False
        try:
            while not is_enough:
                connection = self._unfinished()
                if data := connection.take(MAX_PIECE_BYTES):
                    is_enough = not sink(data)
                    if connection.has_unread and not is_enough:
                        await asyncio.sleep(0)  # thousands of others want their turn, and so do appends
                elif connection.is_complete:
                    break
                else:
                    is_enough = await connection.push(sink, self._read_timeout)
        finally:
            if not is_enough:
                self._let_go()
        return is_enough

    def _unfinished(self) -> "Connection":
        if self._connection is None:
            raise httpx.ReadError("the response was closed while it was being read")
        return self._connection

    async def aclose(self) -> None:
        """Abort the connection if the response is unfinished, else keep it. Never waits."""
        self._let_go()

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._settle(connection)


class _IdleConnections:
    """Kept connections by origin, the newest last: taking and putting are O(1)."""

    def __init__(self, max_connections: int, expiry_s: float) -> None:
        self._by_origin: dict[Origin, deque[Connection]] = {}
        self._max_connections = max_connections
        self._expiry_s = expiry_s
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._count

    def take(self, origin: "Origin") -> "Connection | None":
        while connections := self._by_origin.get(origin):
            connection = connections.pop()
            is_fresh = connection.loop.time() < connection.expires_at
            self._removed(connection)
            if is_fresh and connection.is_usable:
                return connection
            connection.abort()
        return None

    def put(self, connection: "Connection") -> None:
        """Keep it; where that is one too many, an older one goes."""
        connection.is_idle = True
        connection.expires_at = connection.loop.time() + self._expiry_s
        self._by_origin.setdefault(connection.origin, deque()).append(connection)
        self._count += 1
        if self._count > self._max_connections:
            self.evict()
        if self._timer is None and self._count:
            self._timer = connection.loop.call_at(connection.expires_at, self._expire, connection.loop)

    def evict(self) -> None:
        """Abort the oldest connection of one origin, if there is one."""
        if connections := next(iter(self._by_origin.values()), None):
            self._abort_oldest(connections)

    def discard(self, connection: "Connection") -> None:
        if connection.is_idle:
            self._by_origin[connection.origin].remove(connection)
            self._removed(connection)

    def close(self) -> None:
        while self._count:
            self.evict()

    def _abort_oldest(self, connections: "deque[Connection]") -> None:
        connection = connections.popleft()
        self._removed(connection)
        connection.abort()

    def _removed(self, connection: "Connection") -> None:
        connection.is_idle = False
        self._count -= 1
        if not self._by_origin[connection.origin]:
            del self._by_origin[connection.origin]
        if not self._count and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for connections in list(self._by_origin.values()):
            while connections and connections[0].expires_at <= loop.time():
                self._abort_oldest(connections)
        if self._count:
            due = min(connections[0].expires_at for connections in self._by_origin.values())
            self._timer = loop.call_at(due, self._expire, loop)
