"""Our worker, as `python -m deltawire_worker` starts it; another checkout's, too."""

import asyncio
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.processes import Servers
from benchmarks.scraper import scrape
from benchmarks.workers.base import Worker, enqueue
from deltawire.api_keys import new_api_key
from deltawire.keys import Keys
from deltawire.log import JobLog
from deltawire.options import Options
from deltawire.queue import QUEUE, TASK
from deltawire.redis_client import RedisClient
from deltawire.redis_server import free_port


def request(model: str) -> dict[str, Any]:
    """A body of a size that people send."""
    return {"model": model, "messages": [{"role": "user", "content": "Tell me of rivers. " * 10}]}


class Ours(Worker):
    name = "deltawire"
    is_peer = False
    counted_by = "xadd"
    has_queue = True

    def __init__(self, checkout: Path | None = None, *, with_records: bool = False) -> None:
        self._checkout = checkout
        if checkout:
            self.name = f"deltawire of {checkout.name}"
        self._with_records = with_records
        self._numbers = itertools.count()

    def start(self, servers: Servers, streams: int) -> None:
        port = free_port()
        environment = {
            "DELTAWIRE_REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "DELTAWIRE_UPSTREAM_BASE_URL": f"http://127.0.0.1:{self.gateway_port}/v1",
            "DELTAWIRE_UPSTREAM_API_KEY": "sk-bench",
            "DELTAWIRE_WORKER_PORT": str(port),
            "DELTAWIRE_CONCURRENCY": str(streams),
            **self._environment(),
        }
        if self._checkout:
            parts = (str(self._checkout / part) for part in ("core", "worker", "relay"))
            environment["PYTHONPATH"] = ":".join(parts)
        servers.start(
            "worker", [sys.executable, "-m", "deltawire_worker"], environment=environment, port=port
        )
        self._started(port)

    def _environment(self) -> dict[str, str]:
        return {}

    def _started(self, port: int) -> None:
        """It has this port for its probes."""

    async def ask(self, model: str, count: int) -> None:
        """By bare `send_task`, or as our doors do: the body in the record, then a message without one."""
        ids = [f"bench{next(self._numbers)}" for _ in range(count)]
        body = request(model)
        if self._with_records:
            await self._submit(body, ids)
        enqueue(self.redis_port, TASK, QUEUE, {} if self._with_records else {"request": body}, ids)

    async def _submit(self, body: dict[str, Any], ids: list[str]) -> None:
        client = RedisClient(f"redis://127.0.0.1:{self.redis_port}/0", name="bench")
        log = JobLog(client, Keys())
        encoded = msgspec.json.encode(body)
        try:
            now = time.time()
            await asyncio.gather(
                *(
                    log.submit(job_id, request=encoded, options=Options(), digest="bench", created_at=now)
                    for job_id in ids
                )
            )
        finally:
            await client.aclose()


class Scraped(Ours):
    """As in production: Prometheus asks each second."""

    name = "deltawire, scraped"

    def __init__(self, checkout: Path | None = None, *, with_records: bool = False) -> None:
        super().__init__(checkout, with_records=with_records)
        self._key, self._entry = new_api_key("bench", "default", ["metrics"])

    def _environment(self) -> dict[str, str]:
        return {"DELTAWIRE_API_KEYS": self._entry}

    def _started(self, port: int) -> None:
        scrape(port, self._key)
