"""The relay's commands to Redis: refused at once while none is answered, and not too many reads at a time."""

import asyncio
from typing import Final

from deltawire.errors import RedisUnavailableError
from deltawire.redis_connection import Reply
from deltawire.scripts import Executor

from .feed import Feed

DOWN_AFTER_S: Final = 2.0
READS_AT_ONCE: Final = 32


class Commands:
    """An executor for `JobLog`, in front of another.

    It makes nobody wait for what others have waited for in vain already, and lets the log reads of many hubs
    (all of them, when the feed is back) queue here, where they delay no cancellation.
    """

    def __init__(self, redis: Executor, feed: Feed) -> None:
        self._redis = redis
        self._feed = feed
        self._reads = asyncio.Semaphore(READS_AT_ONCE)

    async def execute(self, *args: str | bytes | float) -> Reply:
        """Raises hiredis.ReplyError and RedisUnavailableError."""
        self._check()
        if args[0] != "XRANGE":
            return await self._ask(*args)
        async with self._reads:
            self._check()
            return await self._ask(*args)

    async def _ask(self, *args: str | bytes | float) -> Reply:
        reply = await self._redis.execute(*args)
        self._feed.note_answer()
        return reply

    def _check(self) -> None:
        silent_s = self._feed.unanswered_s
        if silent_s > DOWN_AFTER_S:
            raise RedisUnavailableError(f"Redis has answered nothing for {silent_s:.0f} s")
