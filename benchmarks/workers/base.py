"""What a worker under test has to say of itself, and how streams are asked for and counted."""

import asyncio
import json
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, cast

import redis
from celery import Celery

from benchmarks.processes import Servers
from benchmarks.relays.base import AT_DIGITS, MARK

ROOT: Final = Path(__file__).parents[2]
PEERS_BIN: Final = ROOT / ".venv-bench" / "bin"
_AT: Final = re.compile(re.escape(MARK) + rb"(\d{%d})" % AT_DIGITS)


class Worker(ABC):
    """A system under test: it reads streams of the gateway and publishes them. `name` is its row."""

    name: str
    is_peer: ClassVar[bool] = True  # False: ours and the floor
    counted_by: ClassVar[str | None] = None
    """The Redis command that it calls once for each delta; None: it does not publish."""
    most_streams: ClassVar[int] = 100_000
    tries: ClassVar[tuple[int, ...]] = (2_000, 1_500, 1_000, 500)
    """Numbers of streams, of 20 deltas per second each, that it may keep up with."""
    is_process_each: ClassVar[bool] = False
    has_queue: ClassVar[bool] = False  # whether it takes jobs from a queue
    redis_port: int  # both run, and are set, before anything is called
    gateway_port: int
    delays_us: list[int]  # of deltas as they come out at its far end; one that publishes leaves it alone

    def missing(self) -> str | None:
        """What has to be installed first, as a sentence; None if nothing is."""
        return None

    @abstractmethod
    def start(self, servers: Servers, streams: int) -> None:
        """Starts the process "worker", fit for so many streams. Blocks."""

    @abstractmethod
    async def ask(self, model: str, count: int) -> None:
        """Asks for so many streams of the gateway's model. Where it `has_queue`, also before `start`."""

    async def delivered(self) -> int | None:
        """Deltas that came out at its far end, where that is not Redis."""
        return None


class Marks(asyncio.Protocol):
    """A connection that says one thing, then finds the chunks' time stamps in whatever comes, and no more."""

    def __init__(self, hello: bytes, delays_us: list[int]) -> None:
        self._hello = hello
        self._rest = b""
        self.delays_us = delays_us
        """CLOCK_MONOTONIC now, less the time stamp, of each delta; may be shared among connections."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._hello)  # uvloop's is none, by class

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns() // 1000
        data = self._rest + data
        end = 0
        for found in _AT.finditer(data):
            self.delays_us.append(now - int(found[1]))
            end = found.end()
        self._rest = data[max(end, len(data) - len(MARK) - AT_DIGITS + 1) :]


def enqueue(redis_port: int, task: str, queue: str, kwargs: dict[str, Any], ids: Sequence[str]) -> None:
    """Puts a message for each job id into the queue, as Celery's `send_task` would, at a hundredth of the
    cost: one is made by Celery, all others are copies with another id. Blocks.
    """
    url, aside = (
        f"redis://127.0.0.1:{redis_port}/0",
        f"{queue}-aside",
    )  # a worker may wait at the queue itself
    with Celery("benchmark", broker=url, set_as_current=False) as app:
        app.send_task(task, kwargs=kwargs, queue=aside, task_id=ids[0], ignore_result=True)
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as pipeline:
        first = client.rpop(aside)
        assert isinstance(first, bytes)
        message = json.loads(first)
        message["properties"]["delivery_info"]["routing_key"] = queue
        for job_id in ids:
            message["headers"].update(id=job_id, root_id=job_id)
            message["properties"].update(correlation_id=job_id, delivery_tag=str(uuid.uuid4()))
            pipeline.lpush(queue, json.dumps(message))
        pipeline.execute()
