"""What one tenant's flood does to another tenant: the latter's time to its first delta, with the flood and
without, in one run; and what the flood would do if tenants had no quota.

    .venv/bin/python -m benchmarks.flood [--seconds 4] [--quota 20]

The flooding tenant keeps ten times its quota of jobs of two seconds waiting or running (or once: it keeps to
it). One worker takes twice the quota at a time. The other tenant asks one question after the other through
the OpenAI door.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from benchmarks.load_gateway import model_name
from benchmarks.path import Client, percentiles
from benchmarks.processes import Servers, end_in_order, start_redis
from benchmarks.relays.base import MARK
from benchmarks.report import Table, show
from benchmarks.worker import Figures, start_gateway, table
from benchmarks.workers.ours import request
from deltawire.redis_server import free_port

TIMES: Final = 10
SLOTS: Final = 2  # of the worker, in quotas
LONG: Final = model_name(5, 10)  # the flood's jobs: two seconds, and little work
CROWDS: Final = {"alone": 0, "beside a full quota": 1, "beside a flood": TIMES}
SHORT: Final = model_name(50, 3)
KEYS: Final = {"flood": "dw_flood", "quiet": "dw_quiet"}
COLUMNS: Final = {
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "count": "asked",
    "flood_per_s": "the flood's jobs per second",
}


def post(path: str, tenant: str, body: Any) -> bytes:
    encoded = msgspec.json.encode(body)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {KEYS[tenant]}\r\ncontent-length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


class Setting:
    """A whole deltawire with two tenants."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.ended = 0
        """How many of the flood's jobs have."""

    async def ask(self, path: str, tenant: str, body: Any, until: bytes) -> Client:
        loop = asyncio.get_running_loop()
        hello = post(path, tenant, body)
        _, client = await loop.create_connection(lambda: Client(hello), "127.0.0.1", self._port)
        await client.read(until)
        return client

    async def first_delta(self, tenant: str, model: str) -> float:
        began = time.monotonic()
        body = {**request(model), "stream": True}
        client = await self.ask("/v1/chat/completions", tenant, body, MARK)
        took = time.monotonic() - began
        client.transport.abort()
        return took

    async def keep_up(self) -> None:
        """One job of the flood after the other, each to its end."""
        while True:
            body = {**request(LONG), "stream": True}
            client = await self.ask("/v1/chat/completions", "flood", body, b"[DONE]")
            client.transport.abort()
            self.ended += 1


@contextlib.asynccontextmanager
async def whole(quota: int, slots: int) -> AsyncIterator[Setting]:
    digests = {tenant: hashlib.sha256(key.encode()).hexdigest() for tenant, key in KEYS.items()}
    with Servers() as servers:
        redis_port, gateway_port, port, worker_port = start_redis(servers), *(free_port() for _ in range(3))
        start_gateway(servers, gateway_port)
        environment = {
            "DELTAWIRE_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "DELTAWIRE_UPSTREAM_BASE_URL": f"http://127.0.0.1:{gateway_port}/v1",
            "DELTAWIRE_API_KEYS": ",".join(f"{t}:{t}:read+submit:{sha}" for t, sha in digests.items()),
            "DELTAWIRE_TENANT_MAX_RUNNING": str(quota),
            "DELTAWIRE_CONCURRENCY": str(slots),
            "DELTAWIRE_PORT": str(port),
            "DELTAWIRE_WORKER_PORT": str(worker_port),
        }
        for name, listens_on in (("worker", worker_port), ("relay", port)):
            command = [sys.executable, "-m", f"deltawire_{name}"]
            servers.start(name, command, environment=environment, port=listens_on)
        yield Setting(port)


async def measure(quota: int, seconds: float, *, has_quota: bool) -> dict[str, Figures]:
    """The quiet tenant's time to first delta without the flood and with it."""
    found: dict[str, Figures] = {}
    async with whole(quota if has_quota else 0, SLOTS * quota) as setting:
        await setting.first_delta("quiet", SHORT)
        flood: list[asyncio.Task[None]] = []
        for name, times in CROWDS.items():
            if not has_quota and times < TIMES:
                continue
            while len(flood) < times * quota:
                flood.append(asyncio.create_task(setting.keep_up()))
            if times:
                ended = setting.ended
                while setting.ended < ended + 2 * quota:  # by then all have asked  # noqa: ASYNC110 - tells nobody
                    await asyncio.sleep(0.05)
            began, ended_before, taken = time.monotonic(), setting.ended, []
            while time.monotonic() - began < seconds:
                taken.append(await setting.first_delta("quiet", SHORT))
            per_s = (setting.ended - ended_before) / (time.monotonic() - began)
            label = name if has_quota else f"{name}, no quota"
            found[label] = {**percentiles(taken), "count": len(taken), "flood_per_s": per_s}
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    return found


def run_table(*, rounds: int, seconds: float, quota: int = 20) -> Table:
    found: dict[str, list[Figures]] = {}
    for _ in range(rounds):
        for has_quota in (True, False):
            for name, figures in uvloop.run(measure(quota, seconds, has_quota=has_quota)).items():
                found.setdefault(name, []).append(figures)
    title = f"A tenant's time to first delta; another floods at {TIMES} times its quota of {quota}"
    return table("flood", title, COLUMNS, found, [])


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description="One tenant floods, another asks.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--quota", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = run_table(rounds=args.rounds, seconds=args.seconds, quota=args.quota)
    show(found)
    if args.json:
        args.json.write_text(json.dumps([found], indent=2))


if __name__ == "__main__":
    main()
