"""The reader that everybody writes first: history, then subscribe. The race tests must see it fail."""

import asyncio
import contextlib
from typing import Final

import redis.asyncio
from redis.asyncio.client import PubSub

from deltawire.codec import is_terminal, sequence_number_of
from deltawire.log import JobLog

_SILENCE_S: Final = 0.3


async def read_naively(log: JobLog, client: redis.asyncio.Redis, job_id: str) -> list[int]:
    """The numbers it sees until the terminal event, or until nothing more comes."""
    seen: list[int] = []
    async for page in log.pages(job_id):
        seen += [sequence_number_of(line) for line in page]
        if is_terminal(page[-1]):
            return seen
    # Whatever is published between the read above and the acknowledgement below goes by unheard.
    async with client.pubsub(ignore_subscribe_messages=True) as channel:
        await channel.subscribe(log.keys.job(job_id).channel)
        while (message := await _next(channel)) is not None:
            for line in message["data"].split(b"\n"):
                seen.append(sequence_number_of(line))
                if is_terminal(line):
                    return seen
    return seen


async def _next(channel: PubSub) -> dict[str, bytes] | None:
    """The next message; None after silence, told by the clock: redis-py may swallow a cancellation."""
    loop = asyncio.get_running_loop()
    silent_at = loop.time() + _SILENCE_S
    while (left_s := silent_at - loop.time()) > 0:
        with contextlib.suppress(redis.asyncio.ConnectionError):  # it subscribes again
            message: dict[str, bytes] | None = await channel.get_message(timeout=left_s)
            if message is not None:
                return message
    return None
