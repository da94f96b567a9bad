"""Redis commands for any number of callers: pipelined, each sent to the primary that has its key."""

import asyncio
import time
from typing import Final

import hiredis

from .errors import RedisUnavailableError
from .metrics import Histogram
from .redis_connection import RedisConnection, Reply, connect
from .redis_nodes import RedisNodes, code_of

COMMAND_TIMEOUT_S: Final = 10.0
RETRY_S: Final = 0.1


class RedisClient:
    """Connects when first used; one connection to each primary.

    A command whose connection is lost is sent again, so it must be one that may be repeated.
    """

    def __init__(self, url: str, *, name: str) -> None:
        self._name = name
        self.nodes = RedisNodes(url, name=name)
        self._is_closed = False
        self.seconds = Histogram()
        """How long commands took, whatever came of them."""
        self.refused = self.unavailable = 0

    async def execute(self, *args: str | bytes | float) -> Reply:
        """Raises hiredis.ReplyError, and RedisUnavailableError after COMMAND_TIMEOUT_S or when closed.

        On a cluster the first key decides where the command goes; all its keys must be in one slot.
        """
        if self._is_closed:
            raise RedisUnavailableError("this client was closed")
        key = _key_of(args)
        self.nodes.keep_up()
        asked_at = time.monotonic()  # uvloop's clock counts milliseconds
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                while True:
                    connection = await self.nodes.connected(key)
                    try:
                        return await self._send(connection, args)
                    except RedisUnavailableError:
                        await asyncio.sleep(0)  # lost: the next connection will do
                    except hiredis.ReplyError as error:
                        if not self.nodes.saw(error):
                            self.refused += code_of(error) != "NOSCRIPT"  # it is sent again, with the script
                            raise
                        await asyncio.sleep(RETRY_S)
        except TimeoutError as error:
            self.unavailable += 1
            raise RedisUnavailableError("no answer from Redis in time") from error
        finally:
            self.seconds.observe(time.monotonic() - asked_at)

    async def _send(self, connection: RedisConnection, args: tuple[str | bytes | float, ...]) -> Reply:
        try:
            return await connection.execute(*args)
        except hiredis.ReplyError as error:
            if (node := self.nodes.asked_for(error)) is None:
                raise
        # The slot is on its way to that node, and the key is there already, or not yet anywhere.
        other = await connect(node, name=self._name)
        try:
            await other.execute("ASKING")
            return await other.execute(*args)
        finally:
            other.abort()

    async def aclose(self) -> None:
        self._is_closed = True
        await self.nodes.close()


def _key_of(args: tuple[str | bytes | float, ...]) -> str | bytes | None:
    """A command's first key. Where there is none, whatever stands in its place will do; but what is published
    to all nodes must not wait for one of them.
    """
    match args[0]:
        case "PUBLISH":
            return None
        case "PUBSUB":
            position = 2  # behind what is asked for
        case "EVAL" | "EVALSHA":
            position = 3  # behind the script and the number of its keys
        case "XREAD":
            position = args.index("STREAMS") + 1
        case _:
            position = 1
    key = args[position] if position < len(args) else None
    return key if isinstance(key, str | bytes) else None
