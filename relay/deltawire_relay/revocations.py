"""Revocations in Redis: all relays hear of each within a second (PROTOCOL.md §5.10)."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec
from prometheus_client.core import Metric

from deltawire.errors import RedisUnavailableError, WireError
from deltawire.keys import Keys
from deltawire.metrics import counter_family, gauge_family
from deltawire.scripts import REVOKE, Scripts
from deltawire.tokens import LEEWAY_S, MAX_LIFE_S

from .feed import Feed
from .revoked import MAX_REVOKED, Revocation, Revoked

LOOK_INTERVAL_S: Final = 1.0
LOOKS_PER_READ: Final = 60
"""Each so many looks read all: a Redis that was restored may number anew."""
PAGE: Final = 1_000
KEPT_S: Final = round(MAX_LIFE_S + 2 * LEEWAY_S)

_log = logging.getLogger(__name__)


class Revocations:
    """A stream that each relay reads on, at once when it hears of news and once a second in any case."""

    def __init__(
        self, redis: Scripts, feed: Feed, keys: Keys, revoked: Revoked, on_news: Callable[[], None]
    ) -> None:
        """`on_news` is called by `keep` when `revoked` has got more."""
        self.made = 0
        self._redis = redis
        self._feed = feed
        self._keys = keys
        self._revoked = revoked
        self._on_news = on_news
        self._last = b"0"
        self._news = asyncio.Event()
        self._has_more = False  # than `on_news` knows of

    async def revoke(self, revocation: Revocation) -> None:
        """Raises RedisUnavailableError, and WireError `overloaded` where there are too many."""
        encoded = msgspec.json.encode(revocation)
        (is_taken,) = await self._redis.run(REVOKE, (self._keys.revoked,), encoded, KEPT_S, MAX_REVOKED)
        if not is_taken:
            raise WireError(
                "overloaded", "too many tokens are revoked; revoke whole subjects, or change the key"
            )
        self.made += 1
        self._take([revocation])
        self._news.set()
        await self._redis.execute(self._keys.publish, self._keys.revocations, "")

    async def read(self, *, is_whole: bool = False) -> None:
        """What is new; with `is_whole` all. Raises RedisUnavailableError."""
        last = b"0" if is_whole else self._last
        while True:
            reply: Any = await self._redis.execute(
                "XRANGE", self._keys.revoked, b"(" + last, "+", "COUNT", PAGE
            )
            self._take(_decoded(reply))
            if reply:
                last = reply[-1][0]
            if len(reply) < PAGE:
                self._last = last
                return

    def _take(self, revocations: Iterable[Revocation]) -> None:
        self._has_more = self._revoked.add(revocations) or self._has_more

    async def keep(self) -> None:
        """Until cancelled."""
        subscribing = asyncio.create_task(
            self._feed.subscribe(self._keys.revocations, self), name="revocations-subscribe"
        )
        try:
            looks = 0
            while True:
                is_whole = False
                try:
                    async with asyncio.timeout(LOOK_INTERVAL_S):
                        await self._news.wait()
                except TimeoutError:
                    looks += 1
                    is_whole = looks % LOOKS_PER_READ == 0
                self._news.clear()
                self._tell()
                self._revoked.forget(time.time())
                try:
                    await self.read(is_whole=is_whole)
                except RedisUnavailableError as error:
                    _log.debug("cannot read the revocations: %s", error)
                    await asyncio.sleep(LOOK_INTERVAL_S)
                self._tell()
        finally:
            subscribing.cancel()
            self._feed.unsubscribe(self._keys.revocations)

    def _tell(self) -> None:
        """Once for all that came meanwhile: every connection is looked at."""
        if self._has_more:
            self._has_more = False
            self._on_news()

    # What the feed calls.

    def received(self, payload: bytes) -> None:
        self._news.set()

    def flush(self) -> None:
        pass

    def reconnected(self) -> None:
        self._news.set()

    def collect(self) -> Iterable[Metric]:
        yield counter_family(
            "deltawire_revocations_total", "Revocations that were asked for here.", self.made
        )
        yield gauge_family(
            "deltawire_revoked", "Tokens and subjects that are revoked now.", len(self._revoked)
        )


def _decoded(reply: Any) -> Iterable[Revocation]:  # of XRANGE
    for _, fields in reply:
        try:
            yield msgspec.json.decode(fields[1], type=Revocation)
        except msgspec.DecodeError:
            _log.warning("a revocation cannot be read")
