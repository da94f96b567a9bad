"""The relay's one pub/sub connection: job channels in, their messages to the hubs.

A hub hears `received` for each message, `flush` once per read of the socket that brought it some, and
`reconnected` when the connection was lost and its channel is subscribed again, since whatever was
published in between went by unheard.
"""

from typing import Any, Protocol

from deltawire.errors import RedisUnavailableError
from deltawire.redis_connection import RedisConnection, RedisLink


class Listener(Protocol):
    def received(self, payload: bytes) -> None: ...
    def flush(self) -> None: ...
    def reconnected(self) -> None: ...


class Feed:
    """Subscribes listeners to channels, one for each channel."""

    def __init__(self, url: str) -> None:
        self._link = RedisLink(
            url,
            name="deltawire-relay-feed",
            on_connected=self._resubscribe,
            on_push=self._on_push,
            on_read=self._on_read,
        )
        self._listeners: dict[bytes, Listener] = {}
        self._dirty: dict[Listener, None] = {}  # ordered, so that the first to hear is the first to write

    @property
    def is_connected(self) -> bool:
        return self._link.connection is not None

    async def start(self) -> None:
        """Raises RedisUnavailableError if Redis is not to be reached."""
        await self._link.start()

    async def close(self) -> None:
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
        subscribed: set[bytes] = set()
        while names := self._listeners.keys() - subscribed:
            connection.push("SUBSCRIBE", *names)
            await connection.execute("PING")
            subscribed |= names
        for listener in self._listeners.values():
            listener.reconnected()

    def _on_push(self, push: list[Any]) -> None:
        if push[0] == b"message" and (listener := self._listeners.get(push[1])):
            listener.received(push[2])
            self._dirty[listener] = None

    def _on_read(self) -> None:
        if self._dirty:
            dirty, self._dirty = self._dirty, {}
            for listener in dirty:
                listener.flush()
