"""The relay's pub/sub connection to each primary: job channels in, their messages to the hubs.

A hub hears `received` for each message, `flush` once per read of the socket that brought it some, and
`reconnected` when the connection was lost and its channel is subscribed again, since whatever was
published in between went by unheard.

An open connection proves nothing: it may be half-open, or lead to a server that still takes subscriptions
but is not the primary any more. So the feed publishes to channels of its own, over the connection for
commands, and believes in a connection only as long as that comes back.

On a cluster a job's channel is sharded: it is subscribed to at the primary that has its slot, and again
wherever the slot goes. Probes stay plain there, so that they cross the cluster's own bus.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol

import hiredis
from prometheus_client.core import Metric

from deltawire.errors import RedisUnavailableError
from deltawire.metrics import gauge_family
from deltawire.redis_connection import RedisConnection, RedisLink
from deltawire.redis_nodes import RedisNodes
from deltawire.scripts import Executor

PROBE_INTERVAL_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 3.0
PROBE_PATIENCE: Final = 3
SUBSCRIBE_NAMES: Final = 1_000
SEEK_S: Final = 0.1  # until a channel that has left its node is sought again

_log = logging.getLogger(__name__)


class Listener(Protocol):
    def received(self, payload: bytes) -> None: ...
    def flush(self) -> None: ...
    def reconnected(self) -> None: ...


class _Line:
    """What the probes say of the connection to one primary."""

    def __init__(self, link: RedisLink, channel: bytes) -> None:
        self.link = link
        self.channel = channel
        self.is_proven = False
        self.came_back = asyncio.Event()


class Feed:
    """Subscribes listeners to channels, one for each channel, and knows whether their messages come.

    `commands` publishes the probes; names that begin with `probe_channel` must be this feed's alone.
    """

    def __init__(self, url: str, commands: Executor, probe_channel: str) -> None:
        self._nodes = RedisNodes(
            url,
            name="deltawire-relay-feed",
            on_connected=self._resubscribe,
            on_lost=self._on_lost,
            on_moved=self._on_moved,
            on_push=self._on_push,
            on_read=self._on_read,
        )
        self._commands = commands
        self._listeners: dict[bytes, Listener] = {}
        self._dirty: dict[Listener, None] = {}  # ordered, so that the first to hear is the first to write
        self._subscribed_at: dict[bytes, RedisLink] = {}  # on a cluster
        self._probe_channel = probe_channel
        self._lines: dict[RedisLink, _Line] = {}
        self._lines_by_channel: dict[bytes, _Line] = {}
        self._numbers = itertools.count()
        self._probing: asyncio.Task[None] | None = None
        self._is_due = asyncio.Event()  # a probe, before its time
        self._probe = 0  # the number of the last one sent
        self._loop = asyncio.get_running_loop()
        self._proven_at = self._heard_at = self._loop.time()
        self._answered_at = self._loop.time()  # some command
        self._asked_at: float | None = None  # since when no probe was answered

    @property
    def nodes(self) -> RedisNodes:
        return self._nodes

    def collect(self) -> Iterator[Metric]:
        yield gauge_family(
            "deltawire_feed_silent_seconds",
            "For how long Redis has been silent: pub/sub or commands.",
            self.silent_s,
        )

    @property
    def is_delivering(self) -> bool:
        """Whether what is published now will be heard, as far as the last probe can tell.

        A primary that cannot be reached does not count while others can: nothing can be read there either.
        """
        connected = [link for link in self._nodes.links() if link.connection is not None]
        return bool(connected) and all(
            link in self._lines and self._lines[link].is_proven for link in connected
        )

    @property
    def undelivered_s(self) -> float:
        """For how long nothing has been delivered; 0 while `is_delivering`."""
        return 0.0 if self.is_delivering else self._loop.time() - self._proven_at

    @property
    def unanswered_s(self) -> float:
        """For how long no command was answered while a probe waits; 0 when the last probe was answered.

        A probe may stand behind ten thousand commands: as long as those are answered, nothing is down.
        """
        if self._asked_at is None:
            return 0.0
        return self._loop.time() - max(self._asked_at, self._answered_at)

    @property
    def silent_s(self) -> float:
        """For how long Redis has been silent by either way."""
        return max(self.undelivered_s, self.unanswered_s)

    def note_answer(self) -> None:
        """A command was answered over the connection that probes leave by."""
        self._answered_at = self._loop.time()

    async def start(self) -> None:
        """Raises RedisUnavailableError if Redis is not to be reached."""
        await self._nodes.start()
        self._probing = asyncio.create_task(self._keep_probing(), name="feed-probe")

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        await self._nodes.close()

    async def subscribe(self, channel: str, listener: Listener) -> None:
        """Returns when Redis has acknowledged: from here on the listener misses nothing.

        While Redis is away it waits; the caller sets the deadline, and calls `unsubscribe` in any case.
        """
        name = channel.encode()
        self._listeners[name] = listener
        while True:
            connection, link = await self._nodes.connected(name), self._nodes.link(name)
            try:
                if link is None or not self._nodes.is_cluster:
                    connection.push("SUBSCRIBE", name)
                    # Replies come in order, so this one acknowledges. The push itself would not do: it may
                    # belong to an earlier SUBSCRIBE of the same channel that an UNSUBSCRIBE has followed.
                    await connection.execute("PING")
                elif error := await self._push(connection, name):
                    self._nodes.saw(error)
                    await asyncio.sleep(SEEK_S)
                    continue
                else:
                    self._subscribed_at[name] = link
            except RedisUnavailableError:
                continue
            return

    async def _push(self, connection: RedisConnection, name: bytes) -> Exception | None:
        """Subscribes to a sharded channel; the refusal, if there is one."""
        done: asyncio.Future[Exception | None] = self._loop.create_future()
        connection.push(
            "SSUBSCRIBE", name, on_done=lambda error: None if done.done() else done.set_result(error)
        )
        return await done

    def unsubscribe(self, channel: str) -> None:
        name = channel.encode()
        self._listeners.pop(name, None)
        self._unsubscribe(name)

    def _unsubscribe(self, name: bytes) -> None:
        self._subscribed_at.pop(name, None)
        link = self._nodes.link(name)
        if link is None or (connection := link.connection) is None:
            return
        if self._nodes.is_cluster:
            connection.push("SUNSUBSCRIBE", name, on_done=lambda _: None)  # refused: the slot is elsewhere
        else:
            connection.push("UNSUBSCRIBE", name)

    async def _resubscribe(self, link: RedisLink, connection: RedisConnection) -> None:
        """In batches, each acknowledged: ten thousand names at once would stall Redis for everybody."""
        line = self._lines.setdefault(
            link, _Line(link, f"{self._probe_channel}:{next(self._numbers)}".encode())
        )
        self._lines_by_channel[line.channel] = line
        connection.push("SUBSCRIBE", line.channel)
        await connection.execute("PING")
        subscribed: set[bytes] = set()
        while names := [
            name for name in self._listeners.keys() - subscribed if self._nodes.link(name) is link
        ]:
            for start in range(0, len(names), SUBSCRIBE_NAMES):
                batch = names[start : start + SUBSCRIBE_NAMES]
                if self._nodes.is_cluster:
                    for name in batch:
                        self._seek_at(link, connection, name)
                else:
                    connection.push("SUBSCRIBE", *batch)
                await connection.execute("PING")
            subscribed.update(names)
        left = subscribed - self._listeners.keys()  # meanwhile, when there was no one to tell
        if left and not self._nodes.is_cluster:  # there `_sought` sees to it
            connection.push("UNSUBSCRIBE", *left)
        self._is_due.set()

    def _on_lost(self, link: RedisLink) -> None:
        line = self._lines.get(link)
        if line is not None and line.is_proven:
            self._proven_at = self._heard_at
            line.is_proven = False
        if line is not None:
            line.came_back.set()  # nobody need wait for it: the next connection has a probe of its own
        for name in [name for name, at in self._subscribed_at.items() if at is link]:
            del self._subscribed_at[name]

    # Channels of a cluster, whose slots move.

    def _on_moved(self) -> None:
        for link in self._lines.keys() - set(self._nodes.links()):
            del self._lines_by_channel[self._lines.pop(link).channel]
        for name in self._listeners:
            self._seek(name)

    def _seek(self, name: bytes) -> None:
        """Subscribes where the slot is now, unless that is done, or `_resubscribe` will do it."""
        link = self._nodes.link(name)
        if name not in self._listeners or link is None or self._subscribed_at.get(name) is link:
            return
        if (connection := link.connection) is not None:
            self._seek_at(link, connection, name)

    def _seek_at(self, link: RedisLink, connection: RedisConnection, name: bytes) -> None:
        connection.push("SSUBSCRIBE", name, on_done=partial(self._sought, link, name))

    def _sought(self, link: RedisLink, name: bytes, error: Exception | None) -> None:
        if error is not None:
            self._nodes.saw(error)
            self._loop.call_later(SEEK_S, self._seek, name)
        elif listener := self._listeners.get(name):
            self._subscribed_at[name] = link
            listener.reconnected()
        else:
            self._unsubscribe(name)

    def _on_push(self, push: list[Any]) -> None:
        kind, name = push[0], push[1]
        if kind not in {b"message", b"smessage"}:
            if kind == b"sunsubscribe" and name in self._listeners:
                # The slot has left. (If this comes late, and the channel is heard already, it does no harm.)
                self._subscribed_at.pop(name, None)
                self._nodes.look_again()
                self._seek(name)
            return
        if listener := self._listeners.get(name):
            listener.received(push[2])
            self._dirty[listener] = None
        elif line := self._lines_by_channel.get(name):
            self._prove(line, int(push[2]))

    def _prove(self, line: _Line, probe: int) -> None:
        if probe == self._probe:
            line.came_back.set()
        is_new, line.is_proven = not line.is_proven, True
        if self.is_delivering:
            self._proven_at = self._loop.time()
        if is_new:
            for name, listener in self._listeners.items():
                if self._nodes.link(name) is line.link:
                    listener.reconnected()

    def _on_read(self) -> None:
        self._heard_at = self._loop.time()
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
            self._probe += 1
            if self._asked_at is None:
                self._asked_at = self._loop.time()
            asked = [(line, line.link.connection) for line in self._lines.values()]
            try:
                for line, _ in asked:
                    line.came_back.clear()
                    await self._commands.execute("PUBLISH", line.channel, self._probe)
            except RedisUnavailableError:
                continue
            except hiredis.ReplyError as error:
                _log.warning("Redis refuses a probe: %s", error)
                continue
            self._asked_at = None
            # Answered, so it was sent to whoever listens at the primary.
            for line, connection in asked:
                if connection is not None and not await self._comes_back(line):
                    _log.warning("the feed's connection is open, but nothing comes through; reconnecting")
                    connection.abort()

    async def _comes_back(self, line: _Line) -> bool:
        """Waits longer while anything else comes: the probe may stand behind ten thousand subscriptions."""
        for _ in range(PROBE_PATIENCE):
            asked_at = self._loop.time()
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await line.came_back.wait()
                return True
            if self._heard_at < asked_at:
                break
        return False
