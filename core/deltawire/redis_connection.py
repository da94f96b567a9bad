"""One Redis connection: commands go out packed, replies and pushes come in by callback.

RESP3 over an asyncio protocol and hiredis' parser. Through redis-py an append or a pub/sub message costs
several times as much, and its pool either makes a connection for each of a thousand concurrent claims or
has them queue for one; here they share one and are pipelined. `RedisLink` keeps a connection up. Behind
sentinels both find the primary by themselves; `redis_nodes` is about clusters.
"""

import asyncio
import logging
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final, TypeVar, cast

import hiredis
from hiredis import PushNotification, ReplyError
from redis.connection import parse_url

from . import redis_url
from .errors import RedisUnavailableError

Reply = Any  # whatever RESP3 says: bytes, int, list, dict, None, or hiredis.ReplyError
ReplyCallback = Callable[[Reply], None]
T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 5.0
REPLY_TIMEOUT_S: Final = 8.0
RECONNECT_MAX_S: Final = 2.0
_log = logging.getLogger(__name__)


def pack(args: tuple[str | bytes | float, ...]) -> bytes:
    """One command, as RESP."""
    return cast("bytes", hiredis.pack_command(args))  # type: ignore[arg-type] # its stub means any length


_PING: Final = pack(("PING",))


class _Pushed:
    """Stands among the callbacks for a command that is answered by pushes, and for the PING behind it.

    Counting the pushes would not do: when a slot leaves its node, that one takes the slot's subscriptions
    back by pushes that answer nothing. The PING's reply is the end of the command's answer, and an error
    reply before it is the command's own.
    """

    def __init__(self, on_done: Callable[[Exception | None], None]) -> None:
        self.error: Exception | None = None
        self._on_done = on_done

    def __call__(self, reply: Reply) -> None:
        self._on_done(self.error or (reply if isinstance(reply, Exception) else None))


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
        """Drops a connection that owes a reply and says nothing: TCP alone would believe in it for long.

        One that is idle is asked something: who only listens, listens to a dead host for ever else.
        """
        silent_s = self._loop.time() - self._heard_at
        if silent_s >= REPLY_TIMEOUT_S:
            if self._callbacks:
                _log.warning("Redis owes a reply for %.0f s; reconnecting", silent_s)
                self.abort()
                return
            self.write(_PING, (_ignore_reply,))
            silent_s = 0.0
        self._timer = self._loop.call_later(REPLY_TIMEOUT_S - silent_s, self._watch)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._reader.feed(data)
        gets, on_push, callbacks = self._reader.gets, self._on_push, self._callbacks
        try:
            while (reply := gets()) is not False:
                if type(reply) is PushNotification:
                    on_push(reply)
                elif not (isinstance(reply, ReplyError) and self._is_refused_push(reply)):
                    callbacks.popleft()(reply)
        except hiredis.ProtocolError:
            _log.exception("Redis sent what is not RESP; reconnecting")
            self.abort()
            return
        self._on_read()

    def _is_refused_push(self, error: Exception) -> bool:
        """Whether the error answers a command that has a PING behind it, and not that PING."""
        pushed = self._callbacks[0]
        if not isinstance(pushed, _Pushed) or pushed.error is not None:
            return False
        pushed.error = error
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        error = RedisUnavailableError("the connection to Redis was lost")
        error.__cause__ = exc
        while self._callbacks:
            # In calls of their own, so that one that raises does not keep the others waiting.
            self._loop.call_soon(self._callbacks.popleft(), error)
        # Last, so that who waits for it finds that all have been called.
        if not self.lost.done():
            self.lost.set_result(None)

    def write(self, packed: bytes, callbacks: Iterable[ReplyCallback]) -> None:
        """Sends packed commands; there must be one callback for each reply that they cause."""
        if self._transport is None:
            raise RedisUnavailableError("not connected to Redis")
        if not self._callbacks:
            self._heard_at = self._loop.time()
        self._callbacks.extend(callbacks)
        self._transport.write(packed)

    def push(
        self, *args: str | bytes | float, on_done: Callable[[Exception | None], None] | None = None
    ) -> None:
        """Sends (S)SUBSCRIBE or (S)UNSUBSCRIBE with names, answered by pushes.

        `on_done` is called once, after those pushes: with None, the refusal (an ACL, a slot that is
        elsewhere) or a RedisUnavailableError. Without it a refusal drops the connection.
        """
        self.write(pack(args) + _PING, (_Pushed(on_done or self._must_be_taken),))

    def _must_be_taken(self, error: Exception | None) -> None:
        if error is not None and not isinstance(error, RedisUnavailableError):
            _log.error("Redis refuses to subscribe: %s", error)
            self.abort()

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


def _ignore_reply(_: Reply) -> None: ...


def _ignore_push(_: list[Any]) -> None: ...


def _ignore_read() -> None: ...


async def connect(
    url: str,
    *,
    name: str,
    on_push: Callable[[list[Any]], None] = _ignore_push,
    on_read: Callable[[], None] = _ignore_read,
) -> RedisConnection:
    """Connects to the server at `url`, to the primary that sentinels name, or to some node of a cluster.

    Raises RedisUnavailableError, and ValueError for what is no URL of ours; nothing stays open then, or
    when cancelled.
    """
    where = redis_url.parse(url)
    if where.kind == "server":
        return await _connect(url, name=name, on_push=on_push, on_read=on_read)
    if where.kind == "cluster":
        node = where.server_url(*random.choice(where.hosts))  # noqa: S311 - balance
        return await _connect(node, name=name, on_push=on_push, on_read=on_read)
    sentinels = [where.sentinel_url(*host) for host in where.hosts]
    primary = where.server_url(*await ask_any(sentinels, partial(_primary, where.master_name), name=name))
    return await _connect(primary, name=name, on_push=on_push, on_read=on_read, must_be_primary=True)


async def _primary(master_name: str, _: str, sentinel: RedisConnection) -> tuple[str, int] | None:
    reply = await sentinel.execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", master_name)
    return (reply[0].decode(), int(reply[1])) if reply else None


async def ask_any(
    urls: Iterable[str], ask: Callable[[str, RedisConnection], Awaitable[T | None]], *, name: str
) -> T:
    """Asks servers all at once, over connections made for it; the first answer that is not None counts.

    Raises RedisUnavailableError if there is none within CONNECT_TIMEOUT_S.
    """

    async def one(url: str) -> T | None:
        connection = await _connect(url, name=name, on_push=_ignore_push, on_read=_ignore_read)
        try:
            return await ask(url, connection)
        finally:
            connection.abort()

    error: Exception | None = None
    tasks = [asyncio.create_task(one(url), name=f"redis-ask-{name}") for url in urls]
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            for task in asyncio.as_completed(tasks):
                try:
                    if (answer := await task) is not None:
                        return answer
                except (RedisUnavailableError, hiredis.ReplyError) as refused:
                    error = refused
    except TimeoutError as timeout:
        error = timeout
    finally:
        for asking in tasks:
            asking.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    raise RedisUnavailableError(
        f"none of {len(tasks)} servers names a primary: {error or 'not known'}"
    ) from error


async def _connect(
    url: str,
    *,
    name: str,
    on_push: Callable[[list[Any]], None],
    on_read: Callable[[], None],
    must_be_primary: bool = False,
) -> RedisConnection:
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
            server = await connection.execute(*hello, "SETNAME", name)
            if must_be_primary and server[b"role"] != b"master":
                # A failover that is not complete, or that not everybody has heard of.
                raise RedisUnavailableError("the server is no primary, or not yet")  # noqa: TRY301 - closed below
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
    """Keeps one connection to what `connect` makes of a URL: reconnects with jittered backoff until closed.

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
        self._has_come = asyncio.Event()
        self._connection: RedisConnection | None = None
        self._connections = 0  # made so far

    @property
    def is_up(self) -> bool:
        return self.connection is not None

    @property
    def reconnects(self) -> int:
        """How often a connection was made in the place of one that was lost."""
        return max(0, self._connections - 1)

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
            self._has_come.clear()  # it may have been lost a moment ago, and `_keep_up` not have heard of it
            await self._has_come.wait()
        return connection

    async def close(self) -> None:
        """Closes the connection and stops reconnecting. All callbacks have been called when it returns."""
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
                    self._connections += 1
                    self._has_come.set()
                    if first is not None and not first.done():
                        first.set_result(None)
                    elif failures:
                        _log.warning("Redis is back (%s)", self._name)
                    failures = 0
                    await asyncio.wait([connection.lost])
                finally:
                    self._connection = None
                    connection.abort()
                    await asyncio.wait([connection.lost])
                    self._on_lost()
            except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits must hear of it or be served later
                if first is not None and not first.done():
                    first.set_exception(error)
                    return
                failures += 1
                if failures == 1:
                    _log.warning("Redis is not to be reached (%s): %s", self._name, error)
            await asyncio.sleep(random.uniform(0, min(RECONNECT_MAX_S, 0.05 * 2 ** min(failures, 10))))  # noqa: S311 - jitter
