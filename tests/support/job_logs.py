"""Opens a JobLog on each kind of Redis that the contract tests run on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, cast

import hiredis
import redis.asyncio
from fakeredis import FakeAsyncRedis

from deltawire.keys import Keys
from deltawire.log import JobLog
from deltawire.redis_client import RedisClient
from deltawire.redis_connection import Reply
from deltawire.scripts import Executor

KINDS: Final = ("fakeredis", "server")


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

    def __init__(self, executor: Executor, client: redis.asyncio.Redis, keys: Keys) -> None:
        super().__init__(executor, keys)
        self.executor = executor
        self.client = client


@asynccontextmanager
async def open_job_log(kind: str, url: str) -> AsyncIterator[OpenedLog]:
    """A JobLog on an empty fakeredis of its own, or on the server at `url`."""
    if kind == "fakeredis":
        async with FakeAsyncRedis() as client:
            yield OpenedLog(
                FakeExecutor(FakeAsyncRedis(connection_pool=client.connection_pool)), client, Keys()
            )
        return
    executor = RedisClient(url, name="deltawire-tests")
    try:
        async with redis.asyncio.Redis.from_url(url) as client:
            yield OpenedLog(executor, client, Keys())
    finally:
        await executor.aclose()


async def ttls(log: OpenedLog, pattern: str = "*") -> dict[str, int]:
    """The keys on the server, and their times to live in seconds (-1: none)."""
    keys = cast("list[bytes]", await log.client.keys(pattern))  # redis-py types both ways of decoding
    return {key.decode(): int(await log.client.ttl(key)) for key in keys}
