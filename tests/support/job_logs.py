"""Opens a JobLog on each kind of Redis that the contract tests run on."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, cast

import hiredis
import redis.asyncio
from fakeredis import FakeAsyncRedis

from deltawire.keys import Keys
from deltawire.log import JobLog
from deltawire.redis_client import RedisClient
from deltawire.redis_connection import Reply
from deltawire.scripts import Executor

KINDS: Final = ("fakeredis", "server", "sentinel", "cluster")


class FakeExecutor:
    """Raw replies and error replies of a fakeredis, as a RedisClient gives those of a server."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        client.response_callbacks.clear()

    async def execute(self, *args: str | bytes | float) -> Reply:
        try:
            return await self._client.execute_command(*args)  # type: ignore[no-untyped-call] # redis-py
        except redis.exceptions.NoScriptError as error:  # redis-py takes the code off the text
            raise hiredis.ReplyError(f"NOSCRIPT {error}") from error
        except redis.exceptions.ResponseError as error:
            raise hiredis.ReplyError(str(error)) from error


class OpenedLog(JobLog):
    """A JobLog, and a redis-py client beside it that does what other programs may do."""

    def __init__(
        self,
        executor: Executor,
        client: redis.asyncio.Redis,
        keys: Keys,
        other_nodes: Sequence[redis.asyncio.Redis] = (),
    ) -> None:
        super().__init__(executor, keys)
        self.executor = executor
        self.client = client
        self.nodes = (client, *other_nodes)


@asynccontextmanager
async def open_job_log(kind: str, url: str, nodes: Sequence[str] = ()) -> AsyncIterator[OpenedLog]:
    """A JobLog on an empty fakeredis of its own, or at `url`; the client beside it is the first node's."""
    if kind == "fakeredis":
        async with FakeAsyncRedis() as client:
            yield OpenedLog(
                FakeExecutor(FakeAsyncRedis(connection_pool=client.connection_pool)), client, Keys()
            )
        return
    executor = RedisClient(url, name="deltawire-tests")
    try:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(redis.asyncio.Redis.from_url(node)) for node in nodes or [url]
            ]
            yield OpenedLog(executor, clients[0], Keys.at(url), clients[1:])
    finally:
        await executor.aclose()


async def ttls(log: OpenedLog, pattern: str = "*") -> dict[str, int]:
    """The keys on all nodes, and their times to live in seconds (-1: none)."""
    remaining: dict[str, int] = {}
    for node in log.nodes:
        keys = cast("list[bytes]", await node.keys(pattern))  # redis-py types both ways of decoding
        remaining |= {key.decode(): int(await node.ttl(key)) for key in keys}
    return remaining


@asynccontextmanager
async def listening(log: OpenedLog, channel: str) -> AsyncIterator[Any]:  # redis-py types PubSub loosely
    """A subscription to a job's channel, from its acknowledgement to that of its end."""
    async with log.client.pubsub(ignore_subscribe_messages=True) as pubsub:
        is_sharded = log.keys.is_sharded
        await (pubsub.ssubscribe(channel) if is_sharded else pubsub.subscribe(channel))
        await pubsub.get_message(timeout=5)
        yield pubsub
        await (pubsub.sunsubscribe(channel) if is_sharded else pubsub.unsubscribe(channel))
        await pubsub.get_message(timeout=5)
