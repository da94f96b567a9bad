"""The primaries behind one URL: a link to each, and which of them has a key.

A single server, and the primary that sentinels name, are one link. Of a cluster there is one for each node
that has slots. Which those are is asked of some of its nodes: at first, when an answer or a lost connection
suggests that it has changed, and for as long as one of them is not to be reached. However many callers are
told MOVED, that is one question, and never more than a few in a second.
"""

import asyncio
import binascii
import logging
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import hiredis

from . import redis_url
from .errors import RedisUnavailableError
from .redis_connection import CONNECT_TIMEOUT_S, RedisConnection, RedisLink, ask_any

SLOTS: Final = 16_384
REFRESH_S: Final = 0.2
REFRESH_MAX_S: Final = 1.0
ASKED: Final = 5
"""How many nodes are asked at once, others each time: more than are likely to be lost together."""

# What Redis answers while it starts, fails over, follows or hands over a slot.
_NOT_NOW: Final = frozenset({"LOADING", "MASTERDOWN", "READONLY", "TRYAGAIN", "CLUSTERDOWN"})
_log = logging.getLogger(__name__)


def slot_of(key: str | bytes) -> int:
    """The slot of a key or of a sharded channel: of what stands in its first braces, if anything does."""
    raw = key.encode() if isinstance(key, str) else key
    tag, closing, _ = raw.partition(b"{")[2].partition(b"}")
    return binascii.crc_hqx(tag if tag and closing else raw, 0) % SLOTS


def code_of(error: Exception) -> str:
    """The first word of an error reply, by which Redis tells errors apart; else nothing."""
    return str(error).partition(" ")[0] if isinstance(error, hiredis.ReplyError) else ""


async def _nothing(_link: RedisLink, _connection: RedisConnection) -> None: ...


class RedisNodes:
    """Links to the primaries behind `url`.

    `on_connected` runs on each new connection as a link's does, `on_lost` when one is gone. `on_moved` is
    called when slots of a cluster have found another primary; the callbacks of what was under way to those
    that are none any more have been called by then.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        on_connected: Callable[[RedisLink, RedisConnection], Awaitable[None]] = _nothing,
        on_lost: Callable[[RedisLink], None] = lambda _: None,
        on_moved: Callable[[], None] = lambda: None,
        on_push: Callable[[list[Any]], None] = lambda _: None,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._where = redis_url.parse(url)
        self._name = name
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_moved = on_moved
        self._on_push = on_push
        self._on_read = on_read
        self.is_cluster = self._where.kind == "cluster"
        self._seeds = {self._where.server_url(*host) for host in self._where.hosts}
        self._nodes = self._seeds
        self._links: dict[str, RedisLink] = {}
        self._only = None if self.is_cluster else self._open(url)
        self._slots: list[RedisLink | None] = [None] * SLOTS if self.is_cluster else []
        self._is_stale = asyncio.Event()
        self._changed = asyncio.Event()
        self._left_at = float("-inf")
        self._past_reconnects = 0  # of links that are no more
        self._task: asyncio.Task[None] | None = None

    def link(self, key: str | bytes) -> RedisLink | None:
        """The link to the primary that has `key`; None if no primary of a cluster has it just now."""
        return self._slots[slot_of(key)] if self.is_cluster else self._only

    def links(self) -> tuple[RedisLink, ...]:
        """All links, connected or not."""
        return tuple(self._links.values())

    @property
    def is_connected(self) -> bool:
        """Whether any primary can be reached."""
        return self._connection(None) is not None

    @property
    def is_up(self) -> bool:
        """Whether all primaries can be reached, as far as they are known."""
        return self._is_complete if self.is_cluster else self.is_connected

    @property
    def reconnects(self) -> int:
        """How often a connection was made in the place of one that was lost."""
        return self._past_reconnects + sum(link.reconnects for link in self.links())

    async def start(self) -> None:
        """Connects. Raises RedisUnavailableError if no primary is to be reached; nothing runs then."""
        if self._only is not None:
            await self._only.start()
            return
        try:
            await self._refresh()
            self.keep_up()
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self.connected(None)
        except TimeoutError as error:
            await self.close()
            raise RedisUnavailableError("cannot connect to any primary of the Redis Cluster") from error
        except BaseException:
            await self.close()
            raise

    def keep_up(self) -> None:
        """Starts connecting, and goes on until closed. Idempotent."""
        if self._only is not None:
            self._only.keep_up()
        elif self._task is None:
            self._task = asyncio.create_task(self._follow(), name=f"redis-nodes-{self._name}")

    async def close(self) -> None:
        """Closes all connections and stops reconnecting."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        for link in self.links():
            await link.close()

    async def connected(self, key: str | bytes | None) -> RedisConnection:
        """Waits for a connection to the primary that has `key`; None: any. The caller sets the deadline."""
        while (connection := self._connection(key)) is None:
            await self._changed.wait()
        return connection

    def _connection(self, key: str | bytes | None) -> RedisConnection | None:
        links = self.links() if key is None else (self.link(key),)
        return next((connection for link in links if link and (connection := link.connection)), None)

    def saw(self, error: Exception) -> bool:
        """Whether a command that had this error is to be sent again, a little later.

        Where it says that another server is the primary now, that one is looked for.
        """
        code = code_of(error)
        if self.is_cluster:
            if code in {"MOVED", "CLUSTERDOWN", "READONLY"}:
                self._is_stale.set()
            return code in _NOT_NOW or code in {"MOVED", "ASK"} or isinstance(error, RedisUnavailableError)
        if code in {"READONLY", "MASTERDOWN"}:
            self._leave_replica()
        return code in _NOT_NOW or isinstance(error, RedisUnavailableError)

    def look_again(self) -> None:
        """Has a cluster asked where its slots are: a subscription was taken back, say."""
        self._is_stale.set()

    def asked_for(self, error: Exception) -> str | None:
        """The URL of the node that an ASK reply names; None for any other error."""
        if not self.is_cluster or code_of(error) != "ASK":
            return None
        host, _, port = str(error).rpartition(" ")[2].rpartition(":")
        return self._where.server_url(host, int(port)) if host else None

    def _leave_replica(self) -> None:
        """Connects anew: the sentinels, or a name in the DNS, may know the primary.

        At most once a second, since what else is under way has to be sent again, too.
        """
        now = asyncio.get_running_loop().time()
        if self._only is not None and now - self._left_at >= REFRESH_MAX_S:
            self._left_at = now
            if (connection := self._only.connection) is not None:
                connection.abort()

    # Links.

    def _open(self, url: str) -> RedisLink:
        link: RedisLink = RedisLink(
            url,
            name=self._name,
            on_connected=lambda connection: self._link_connected(link, connection),
            on_lost=lambda: self._link_lost(link),
            on_push=self._on_push,
            on_read=self._on_read,
        )
        self._links[url] = link
        return link

    async def _link_connected(self, link: RedisLink, connection: RedisConnection) -> None:
        await self._on_connected(link, connection)
        asyncio.get_running_loop().call_soon(self._announce)  # the link offers it when this has returned

    def _link_lost(self, link: RedisLink) -> None:
        self._is_stale.set()
        self._on_lost(link)

    def _announce(self) -> None:
        """Has all who wait for a connection look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # The topology of a cluster.

    async def _follow(self) -> None:
        tries = 0
        is_known = any(self._slots)
        while True:
            if is_known:
                pause_s = min(REFRESH_MAX_S, REFRESH_S * 2 ** min(tries, 10))
                await asyncio.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311 - jitter
                if self._is_complete:
                    tries = 0
                    await self._is_stale.wait()
            is_known = True
            self._is_stale.clear()
            try:
                await self._refresh()
            except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits is to be served later
                self._is_stale.set()
                if tries == 0:
                    _log.warning("The Redis Cluster hides its slots (%s): %s", self._name, error)
            tries += 1

    @property
    def _is_complete(self) -> bool:
        return all(link is not None and link.connection is not None for link in set(self._slots))

    async def _refresh(self) -> None:
        """Asks where the slots are; opens and closes links accordingly. Raises RedisUnavailableError."""
        asked = random.sample(sorted(self._nodes), min(ASKED, len(self._nodes)))
        slots, nodes = await ask_any(asked, partial(_topology, self._where), name=self._name)
        self._nodes = nodes | self._seeds
        primaries = {url for url in slots if url is not None}
        for url in primaries - self._links.keys():
            self._open(url).keep_up()
        before, self._slots = self._slots, [self._links[url] if url else None for url in slots]
        for url in self._links.keys() - primaries:
            await self._links[url].close()
            self._past_reconnects += self._links.pop(url).reconnects
        if self._slots != before:
            self._announce()
            self._on_moved()


async def _topology(
    where: redis_url.RedisUrl, asked: str, node: RedisConnection
) -> tuple[list[str | None], set[str]] | None:
    """Each slot's primary, and all nodes, as one node sees it; None if it has lost sight of most others."""
    if b"cluster_state:ok" not in await node.execute("CLUSTER", "INFO"):
        return None
    slots: list[str | None] = [None] * SLOTS
    nodes: set[str] = set()
    for first, last, *servers in await node.execute("CLUSTER", "SLOTS"):
        # A node that does not know how it is to be reached leaves that out; it is reached as it was just now.
        urls = [
            where.server_url(host.decode() if host else str(urlsplit(asked).hostname), port)
            for host, port, *_ in servers
        ]
        slots[first : last + 1] = [urls[0]] * (last + 1 - first)
        nodes.update(urls)
    return slots, nodes
