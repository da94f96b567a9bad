"""Cancellation, heard beside the token loop, never between chunks.

Three ways lead here: a push on this worker's control channel (a millisecond), the answer to an append,
and the answer to a renewal (a second), so a lost push costs a second at the most.
"""

import time
from collections.abc import Mapping
from typing import Any

from deltawire.keys import Keys
from deltawire.record import CancelRequest, decode_cancel
from deltawire.redis_connection import RedisConnection, RedisLink

from .run import CancelWanted, Run


def want_cancel(run: Run, request: CancelRequest) -> None:
    """Ends a run as cancelled. A bare key does not say when it was set; then it is now."""
    run.abort(CancelWanted(request, time.time()))


class ControlChannel:
    """Hears what is said to this worker process."""

    def __init__(self, url: str, keys: Keys, owner: str, runs: Mapping[str, Run]) -> None:
        self._channel = keys.control(owner)
        self._runs = runs
        self.link = RedisLink(
            url, name="deltawire-worker-control", on_connected=self._subscribe, on_push=self._on_push
        )

    async def start(self) -> None:
        """Raises RedisUnavailableError if Redis is not to be reached."""
        await self.link.start()

    async def close(self) -> None:
        await self.link.close()

    async def _subscribe(self, connection: RedisConnection) -> None:
        connection.push("SUBSCRIBE", self._channel)
        await connection.execute("PING")

    def _on_push(self, push: list[Any]) -> None:
        if push[0] != b"message":
            return
        job_id, _, value = push[2].partition(b"\n")
        if run := self._runs.get(job_id.decode()):
            want_cancel(run, decode_cancel(value) or CancelRequest())
