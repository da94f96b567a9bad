"""The relay's one pub/sub connection: job channels in, their messages to the hubs.

A hub hears `received` for each message, `flush` once per read of the socket that brought it some, and
`reconnected` when the connection was lost and its channel is subscribed again, since whatever was
published in between went by unheard.

An open connection proves nothing: it may be half-open, or lead to a server that still takes subscriptions
but is not the primary any more. So the feed publishes to a channel of its own, over the connection for
commands, and believes in a connection only as long as that comes back.
"""

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final, Protocol

import hiredis

from deltawire.errors import RedisUnavailableError
from deltawire.redis_connection import RedisConnection, RedisLink
from deltawire.scripts import Executor

PROBE_INTERVAL_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 3.0
PROBE_PATIENCE: Final = 3
SUBSCRIBE_NAMES: Final = 1_000

_log = logging.getLogger(__name__)


class Listener(Protocol):
    def received(self, payload: bytes) -> None: ...
    def flush(self) -> None: ...
    def reconnected(self) -> None: ...


class Feed:
    """Subscribes listeners to channels, one for each channel, and knows whether their messages come.

    `commands` publishes the probes; `probe_channel` must be this feed's alone.
    """

    def __init__(self, url: str, commands: Executor, probe_channel: str) -> None:
        self._link = RedisLink(
            url,
            name="deltawire-relay-feed",
            on_connected=self._resubscribe,
            on_lost=self._on_lost,
            on_push=self._on_push,
            on_read=self._on_read,
        )
        self._commands = commands
        self._listeners: dict[bytes, Listener] = {}
        self._dirty: dict[Listener, None] = {}  # ordered, so that the first to hear is the first to write
        self._probe_channel = probe_channel.encode()
        self._probing: asyncio.Task[None] | None = None
        self._is_due = asyncio.Event()  # a probe, before its time
        self._came_back = asyncio.Event()
        self._probe = 0  # the number of the last one sent
        self._is_proven = False
        self._loop = asyncio.get_running_loop()
        self._proven_at = self._heard_at = self._loop.time()
        self._asked_at: float | None = None  # since when no probe was answered

    @property
    def is_delivering(self) -> bool:
        """Whether what is published now will be heard, as far as the last probe can tell."""
        return self._is_proven and self._link.connection is not None

    @property
    def undelivered_s(self) -> float:
        """For how long nothing has been delivered; 0 while `is_delivering`."""
        return 0.0 if self.is_delivering else self._loop.time() - self._proven_at

    @property
    def unanswered_s(self) -> float:
        """For how long no probe was answered over the connection for commands; 0 when the last one was."""
        return 0.0 if self._asked_at is None else self._loop.time() - self._asked_at

    async def start(self) -> None:
        """Raises RedisUnavailableError if Redis is not to be reached."""
        await self._link.start()
        self._probing = asyncio.create_task(self._keep_probing(), name="feed-probe")

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        await self._link.close()

    async def subscribe(self, channel: str, listener: Listener) -> None:
        """Returns when Redis has acknowledged: from here on the listener misses nothing.

        While Redis is away it waits; the caller sets the deadline, and calls `unsubscribe` in any case.
        """
        name = channel.encode()
        self._listeners[name] = listener
        while True:
            connection = await self._link.connected()
            try:
                connection.push("SUBSCRIBE", name)
                # Replies come in order, so this one acknowledges. The push itself would not do: it may
                # belong to an earlier SUBSCRIBE of the same channel that an UNSUBSCRIBE has followed.
                await connection.execute("PING")
            except RedisUnavailableError:
                continue
            return

    def unsubscribe(self, channel: str) -> None:
        name = channel.encode()
        self._listeners.pop(name, None)
        if connection := self._link.connection:
            connection.push("UNSUBSCRIBE", name)

    async def _resubscribe(self, connection: RedisConnection) -> None:
        """In batches, each acknowledged: ten thousand names at once would stall Redis for everybody."""
        connection.push("SUBSCRIBE", self._probe_channel)
        await connection.execute("PING")
        subscribed: set[bytes] = set()
        while names := list(self._listeners.keys() - subscribed):
            for start in range(0, len(names), SUBSCRIBE_NAMES):
                connection.push("SUBSCRIBE", *names[start : start + SUBSCRIBE_NAMES])
                await connection.execute("PING")
            subscribed.update(names)
        if left := subscribed - self._listeners.keys():  # meanwhile, when there was no one to tell
            connection.push("UNSUBSCRIBE", *left)
        self._is_due.set()

    def _on_lost(self) -> None:
        if self._is_proven:
            self._proven_at = self._heard_at
            self._is_proven = False
        self._came_back.set()  # nobody need wait for it: the next connection has a probe of its own

    def _on_push(self, push: list[Any]) -> None:
        if push[0] != b"message":
            return
        self._heard_at = self._loop.time()
        if listener := self._listeners.get(push[1]):
            listener.received(push[2])
            self._dirty[listener] = None
        elif push[1] == self._probe_channel:
            self._prove(int(push[2]))

    def _prove(self, probe: int) -> None:
        if probe == self._probe:
            self._came_back.set()
        self._proven_at = self._heard_at
        if not self._is_proven:
            self._is_proven = True
            for listener in self._listeners.values():
                listener.reconnected()

    def _on_read(self) -> None:
        if self._dirty:
            dirty, self._dirty = self._dirty, {}
            for listener in dirty:
                listener.flush()

    async def _keep_probing(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await self._is_due.wait()
            self._is_due.clear()
            self._came_back.clear()
            self._probe += 1
            if self._asked_at is None:
                self._asked_at = self._loop.time()
            connection = self._link.connection
            try:
                await self._commands.execute("PUBLISH", self._probe_channel, self._probe)
            except RedisUnavailableError:
                continue
            except hiredis.ReplyError as error:
                _log.warning("Redis refuses a probe: %s", error)
                continue
            self._asked_at = None
            # Answered, so it was sent to whoever listens at the primary.
            if connection is not None and not await self._comes_back():
                _log.warning("the feed's connection is open, but nothing comes through; reconnecting")
                connection.abort()

    async def _comes_back(self) -> bool:
        """Waits longer while anything else comes: the probe may stand behind much of it."""
        for _ in range(PROBE_PATIENCE):
            asked_at = self._loop.time()
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await self._came_back.wait()
                return True
            if self._heard_at < asked_at:
                break
        return False
