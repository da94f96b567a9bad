"""One Redis connection: commands go out packed, replies and pushes come in by callback.

RESP3 over an asyncio protocol and hiredis' parser. Through redis-py an append or a pub/sub message costs
several times as much, and its pool either makes a connection for each of a thousand concurrent claims or
has them queue for one; here they share one and are pipelined. `RedisLink` keeps a connection up,
`RedisClient` waits for replies over one.
"""

import asyncio
import logging
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, cast

import hiredis
from redis.connection import parse_url

from .errors import RedisUnavailableError

Reply = Any  # whatever RESP3 says: bytes, int, list, dict, None, or hiredis.ReplyError
ReplyCallback = Callable[[Reply], None]

CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 10.0
REPLY_TIMEOUT_S: Final = 8.0
RECONNECT_MAX_S: Final = 2.0
RETRY_S: Final = 0.1
_CONFIRMATIONS: Final = frozenset({b"subscribe", b"unsubscribe"})
# What Redis answers while it starts, fails over or follows.
_NOT_NOW: Final = frozenset({"LOADING", "MASTERDOWN", "READONLY", "TRYAGAIN", "CLUSTERDOWN"})
_log = logging.getLogger(__name__)


def pack(args: tuple[str | bytes | float, ...]) -> bytes:
    """One command, as RESP."""
    return cast("bytes", hiredis.pack_command(args))  # type: ignore[arg-type] # its stub means any length


class _Pushed:
    """Stands among the callbacks for a command that is answered by pushes, one for each name."""

    def __init__(self, connection: "RedisConnection", names: int) -> None:
        self.names = names
        self._connection = connection

    def __call__(self, reply: Reply) -> None:
        """An error reply (an ACL, a wrong slot) came instead, or the connection was lost."""
        if not isinstance(reply, RedisUnavailableError):
            _log.error("Redis refuses to subscribe: %s", reply)
            self._connection.abort()


class RedisConnection(asyncio.Protocol):
    """A RESP3 connection. Every callback gets one reply, or a RedisUnavailableError when it is lost."""

    def __init__(self, on_push: Callable[[list[Any]], None], on_read: Callable[[], None]) -> None:
        self._reader = hiredis.Reader()
        self._callbacks: deque[ReplyCallback] = deque()
        self._on_push = on_push
        self._on_read = on_read
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()  # or when the first reply became due, if that is later
        self._timer: asyncio.TimerHandle | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._watch()

    def _watch(self) -> None:
        """Drops a connection that owes a reply and says nothing: TCP alone would believe in it for long."""
        silent_s = self._loop.time() - self._heard_at
        if not self._callbacks:
            silent_s = 0.0
        if silent_s >= REPLY_TIMEOUT_S:
            _log.warning("Redis owes a reply for %.0f s; reconnecting", silent_s)
            self.abort()
        else:
            self._timer = self._loop.call_later(REPLY_TIMEOUT_S - silent_s, self._watch)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        reader = self._reader
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                if not isinstance(reply, hiredis.PushNotification):
                    self._callbacks.popleft()(reply)
                else:
                    if reply[0] in _CONFIRMATIONS:
                        self._confirm()
                    self._on_push(reply)
        except hiredis.ProtocolError:
            _log.exception("Redis sent what is not RESP; reconnecting")
            self.abort()
            return
        self._on_read()

    def _confirm(self) -> None:
        pushed = self._callbacks[0]
        assert isinstance(pushed, _Pushed)  # noqa: S101 - replies and confirmations come in order
        pushed.names -= 1
        if pushed.names == 0:
            self._callbacks.popleft()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        if not self.lost.done():
            self.lost.set_result(None)
        error = RedisUnavailableError("the connection to Redis was lost")
        error.__cause__ = exc
        while self._callbacks:
            # In calls of their own, so that one that raises does not keep the others waiting.
            self._loop.call_soon(self._callbacks.popleft(), error)

    def write(self, packed: bytes, callbacks: Iterable[ReplyCallback]) -> None:
        """Sends packed commands; there must be one callback for each reply that they cause."""
        if self._transport is None:
            raise RedisUnavailableError("not connected to Redis")
        if not self._callbacks:
            self._heard_at = self._loop.time()
        self._callbacks.extend(callbacks)
        self._transport.write(packed)

    def push(self, *args: str | bytes | float) -> None:
        """Sends SUBSCRIBE or UNSUBSCRIBE with names, answered by pushes. If refused, the connection goes."""
        self.write(pack(args), (_Pushed(self, len(args) - 1),))

    async def execute(self, *args: str | bytes | float) -> Reply:
        """One command's reply. Raises hiredis.ReplyError and RedisUnavailableError."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def answer(reply: Reply) -> None:
            if future.done():
                return
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)

        self.write(pack(args), (answer,))
        return await future

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    def abort(self) -> None:
        """Drops the connection at once."""
        if self._transport is not None:
            self._transport.abort()


async def connect(
    url: str,
    *,
    name: str,
    on_push: Callable[[list[Any]], None] = lambda _: None,
    on_read: Callable[[], None] = lambda: None,
) -> RedisConnection:
    """Connects, authenticates and selects as `url` says (redis://, rediss://, unix://).

    Raises RedisUnavailableError; nothing stays open then, or when cancelled.
    """
    address = parse_url(url)  # type: ignore[no-untyped-call] # redis-py
    loop = asyncio.get_running_loop()
    connection = RedisConnection(on_push, on_read)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if path := address.get("path"):
                await loop.create_unix_connection(lambda: connection, path)
            else:
                await loop.create_connection(
                    lambda: connection,
                    address.get("host", "localhost"),
                    address.get("port", 6379),
                    ssl=_tls(address) if url.startswith("rediss:") else None,
                )
            hello: list[str | float] = ["HELLO", 3]
            if password := address.get("password"):
                hello += ["AUTH", address.get("username") or "default", password]
            await connection.execute(*hello, "SETNAME", name)
            if db := address.get("db"):
                await connection.execute("SELECT", db)
    except (OSError, TimeoutError, hiredis.ReplyError) as error:
        connection.abort()
        raise RedisUnavailableError(f"cannot connect to Redis: {str(error) or 'timed out'}") from error
    except BaseException:
        connection.abort()
        raise
    return connection


def _tls(address: Any) -> ssl.SSLContext:  # redis-py's loosely typed options
    context = ssl.create_default_context(cafile=address.get("ssl_ca_certs"))
    if address.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if address.get("ssl_certfile"):
        context.load_cert_chain(address["ssl_certfile"], address.get("ssl_keyfile"))
    return context


class RedisLink:
    """Keeps one connection up: reconnects with jittered backoff until closed.

    `on_connected` runs on each new connection before it is offered as `connection`; when it fails, the
    connection is dropped and made again.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        on_connected: Callable[[RedisConnection], Awaitable[None]],
        on_lost: Callable[[], None] = lambda: None,
        on_push: Callable[[list[Any]], None] = lambda _: None,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._url = url
        self._name = name
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_push = on_push
        self._on_read = on_read
        self._task: asyncio.Task[None] | None = None
        self._is_up = asyncio.Event()
        self._connection: RedisConnection | None = None

    @property
    def connection(self) -> RedisConnection | None:
        """The connection, if there is one just now."""
        connection = self._connection
        return connection if connection is not None and connection.is_open else None

    async def start(self) -> None:
        """Connects. Raises RedisUnavailableError if the first try fails; nothing runs then."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.keep_up(first)
        try:
            await first
        except BaseException:
            await self.close()
            raise

    def keep_up(self, first: asyncio.Future[None] | None = None) -> None:
        """Starts connecting, and goes on until closed. Idempotent. `first` hears of the first try only."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_up(first), name=f"redis-link-{self._name}")

    async def connected(self) -> RedisConnection:
        """Waits for a connection. The caller sets the deadline."""
        while (connection := self.connection) is None:
            self._is_up.clear()  # it may have been lost a moment ago, and `_keep_up` not have heard of it
            await self._is_up.wait()
        return connection

    async def close(self) -> None:
        """Closes the connection and stops reconnecting."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _keep_up(self, first: asyncio.Future[None] | None) -> None:
        failures = 0
        while True:
            try:
                connection = await connect(
                    self._url, name=self._name, on_push=self._on_push, on_read=self._on_read
                )
                try:
                    await self._on_connected(connection)
                    self._connection = connection
                    self._is_up.set()
                    if first is not None and not first.done():
                        first.set_result(None)
                    elif failures:
                        _log.warning("Redis is back (%s)", self._name)
                    failures = 0
                    await connection.lost
                finally:
                    self._connection = None
                    connection.abort()
                    self._on_lost()
            except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits must hear of it or be served later
                if first is not None and not first.done():
                    first.set_exception(error)
                    return
                failures += 1
                if failures == 1:
                    _log.warning("Redis is not to be reached (%s): %s", self._name, error)
            await asyncio.sleep(random.uniform(0, min(RECONNECT_MAX_S, 0.05 * 2 ** min(failures, 10))))  # noqa: S311 - jitter


class RedisClient:
    """Commands over one connection, pipelined, for any number of callers. Connects when first used.

    A command whose connection is lost is sent again, so it must be one that may be repeated.
    """

    def __init__(self, url: str, *, name: str) -> None:
        self._link = RedisLink(url, name=name, on_connected=_nothing)
        self._is_closed = False

    async def execute(self, *args: str | bytes | float) -> Reply:
        """Raises hiredis.ReplyError, and RedisUnavailableError after COMMAND_TIMEOUT_S or when closed."""
        if self._is_closed:
            raise RedisUnavailableError("this client was closed")
        self._link.keep_up()
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                while True:
                    connection = await self._link.connected()
                    try:
                        return await connection.execute(*args)
                    except RedisUnavailableError:
                        await asyncio.sleep(0)  # lost: the next connection will do
                    except hiredis.ReplyError as error:
                        if str(error).partition(" ")[0] not in _NOT_NOW:
                            raise
                        await asyncio.sleep(RETRY_S)
        except TimeoutError as error:
            raise RedisUnavailableError("no answer from Redis in time") from error

    async def aclose(self) -> None:
        self._is_closed = True
        await self._link.close()


async def _nothing(_: RedisConnection) -> None: ...
