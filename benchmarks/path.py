"""The whole path: gateway, worker, Redis, relay, WebSocket; beside a direct connection to the gateway by the
same client in the same run. What it adds to each delta and to the first one, what it costs, how soon a cancel
arrives.

    .venv/bin/python -m benchmarks.path [--parts deltas,first,cancel] [--rounds 1] [--seconds 4]

Delays are from the gateway's write to the client's read (the chunk's time stamp, one clock for all), CPU is
that of all server-side processes. Latency suffers from all else that the machine does: hence the direct one.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import uvloop
from celery import Celery

from benchmarks.load_gateway import model_name
from benchmarks.processes import end_in_order
from benchmarks.relays.base import MARK, text_frame, upgrade
from benchmarks.report import Table, show
from benchmarks.worker import PLENTY, WARM_UP_S, Figures, Run, running, table
from benchmarks.workers.base import Marks
from benchmarks.workers.ours import Ours, request
from deltawire.queue import QUEUE, TASK
from deltawire.redis_server import free_port

WAIT_S: Final = 30.0
ASKED: Final = 100  # first tokens of each door in each round
CANCELLED: Final = 100  # jobs by each door in each round
SERVERS: Final = ("worker", "relay", "redis")


class Client(asyncio.Protocol):
    """One connection, on which one thing is said at first; what comes is kept until it is looked for."""

    def __init__(self, hello: bytes) -> None:
        self._hello = hello
        self.received = b""
        self._wanted: tuple[bytes, asyncio.Future[float]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._hello)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self._wanted and self._wanted[0] in self.received and not self._wanted[1].done():
            self._wanted[1].set_result(time.monotonic())

    async def read(self, wanted: bytes) -> float:
        """When it came. Raises TimeoutError."""
        if wanted in self.received:
            return time.monotonic()
        self._wanted = (wanted, asyncio.get_running_loop().create_future())
        async with asyncio.timeout(WAIT_S):
            return await self._wanted[1]


def post(path: str, body: Any) -> bytes:
    encoded = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%b" % (len(encoded), encoded)


def watching(job_id: str) -> bytes:
    return upgrade(f"/v1/jobs/{job_id}/ws")


class Setting:
    """A whole deltawire, its gateway, and those who ask."""

    def __init__(self, run: Run, relay_port: int) -> None:
        self.run = run
        self.relay_port = relay_port
        self.gateway_port = run.worker.gateway_port
        self.app = Celery("backend", broker=f"redis://127.0.0.1:{run.redis_port}/0", set_as_current=False)

    async def connect(self, hello: bytes, port: int | None = None) -> Client:
        """To the relay, unless another port is given."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: Client(hello), "127.0.0.1", port or self.relay_port)
        return client

    async def submit(self, model: str) -> str:
        """The id of a job made by `POST /v1/jobs`."""
        client = await self.connect(post("/v1/jobs", {"request": request(model)}))
        await client.read(b'"urls"')
        client.transport.abort()
        return str(msgspec.json.decode(client.received.partition(b"\r\n\r\n")[2])["id"])

    def send_task(self, model: str) -> str:
        """The id of a job made by any backend's `send_task`. Blocks."""
        return str(self.app.send_task(TASK, kwargs={"request": request(model)}, queue=QUEUE).id)

    async def watch(self, job_id: str) -> Client:
        return await self.connect(watching(job_id))


@contextlib.asynccontextmanager
async def whole() -> AsyncIterator[Setting]:
    ours = Ours()
    async with running(ours, 1_000) as run:
        port, redis_url = free_port(), f"redis://127.0.0.1:{run.redis_port}/0"
        run.servers.start(
            "relay",
            [sys.executable, "-m", "deltawire_relay"],
            environment={"DELTAWIRE_REDIS_URL": redis_url, "DELTAWIRE_PORT": str(port)},
            port=port,
        )
        setting = Setting(run, port)
        with setting.app:
            await first_by_job(setting)  # whatever is made when it is first used is made now
            await first_by_send_task(setting)
            yield setting


@contextlib.asynccontextmanager
async def streaming(
    setting: Setting, *, streams: int, rate: int, seconds: float, is_direct: bool = False
) -> AsyncIterator[list[int]]:
    """So many streams, each with one viewer; the delays so far, in microseconds."""
    model = model_name(rate, round(rate * seconds), is_held=True)
    delays_us: list[int] = []
    if is_direct:
        hellos = [post("/v1/chat/completions", {**request(model), "stream": True})] * streams
    else:
        hellos = [watching(setting.send_task(model)) for _ in range(streams)]
    port = setting.gateway_port if is_direct else setting.relay_port
    loop = asyncio.get_running_loop()
    viewers = [
        await loop.create_connection(partial(Marks, hello, delays_us), "127.0.0.1", port) for hello in hellos
    ]
    await setting.run.until(lambda stats: stats.held >= streams, "streams")
    setting.run.go()
    await asyncio.sleep(WARM_UP_S)
    try:
        yield delays_us
    finally:
        for transport, _ in viewers:
            transport.abort()


async def deltas(setting: Setting, seconds: float) -> dict[str, Figures]:
    """100 streams of 50 per second."""
    found: dict[str, Figures] = {}
    for name, is_direct in (("direct", True), ("deltawire", False)):
        lasts_s = seconds + 2 * WARM_UP_S
        async with streaming(
            setting, streams=100, rate=50, seconds=lasts_s, is_direct=is_direct
        ) as delays_us:
            before, first = setting.run.servers.cpu_s(), len(delays_us)
            await asyncio.sleep(seconds)
            after, delays = setting.run.servers.cpu_s(), sorted(delays_us[first:])
        found[name] = figures = percentiles([delay / 1e6 for delay in delays])
        for server in SERVERS:
            used_s = after[server] - before[server]
            figures[f"{server}_us"] = None if is_direct else 1e6 * used_s / len(delays)
        figures["sum_us"] = None if is_direct else sum(figures[f"{server}_us"] or 0 for server in SERVERS)
    found["added"] = {
        name: None if (direct := found["direct"][name]) is None else (value or 0) - direct
        for name, value in found["deltawire"].items()
    }
    return found


def percentiles(seconds: Sequence[float]) -> Figures:
    ordered = sorted(seconds)
    return {f"p{share}_ms": 1e3 * ordered[(len(ordered) - 1) * share // 100] for share in (50, 99)}


SHORT: Final = model_name(50, 3)


async def first_direct(setting: Setting) -> float:
    return await first_by_chat(setting, setting.gateway_port)


async def first_by_chat(setting: Setting, port: int | None = None) -> float:
    began = time.monotonic()
    client = await setting.connect(post("/v1/chat/completions", {**request(SHORT), "stream": True}), port)
    at = await client.read(MARK)
    client.transport.abort()
    return at - began


async def first_by_job(setting: Setting) -> float:
    began = time.monotonic()
    return await first_of(setting, await setting.submit(SHORT)) - began


async def first_by_send_task(setting: Setting) -> float:
    began = time.monotonic()
    return await first_of(setting, setting.send_task(SHORT)) - began


async def first_of(setting: Setting, job_id: str) -> float:
    client = await setting.watch(job_id)
    at = await client.read(MARK)
    client.transport.abort()
    return at


DOORS: Final[dict[str, Callable[[Setting], Awaitable[float]]]] = {
    "direct": first_direct,
    "POST /v1/chat/completions": first_by_chat,
    "POST /v1/jobs, then WebSocket": first_by_job,
    "send_task, then WebSocket": first_by_send_task,
}


async def first(setting: Setting, _: float) -> dict[str, Figures]:
    """The first delta, enqueue and connections included; alone, and beside 50 streams of 20 per second."""
    found: dict[str, Figures] = {}
    for beside in ("", ", beside the streams"):
        load = streaming(setting, streams=50, rate=20, seconds=WAIT_S) if beside else contextlib.nullcontext()
        async with load:
            taken: dict[str, list[float]] = {door: [] for door in DOORS}
            for _ in range(ASKED):
                for door, ask in DOORS.items():
                    taken[door].append(await ask(setting))
        direct = percentiles(taken["direct"])
        for door, seconds in taken.items():
            figures = percentiles(seconds)
            added = {f"added_{name}": (value or 0) - (direct[name] or 0) for name, value in figures.items()}
            found[door + beside] = {**figures, **(dict.fromkeys(added) if door == "direct" else added)}
    return found


async def cancel(setting: Setting, _: float) -> dict[str, Figures]:
    """From the client's call to the moment at which the gateway sees its connection closed."""
    asked: dict[str, dict[str, float]] = {"WebSocket": {}, "POST /v1/jobs/{id}/cancel": {}}
    for _ in range(CANCELLED):
        for door, at in asked.items():
            job_id = await setting.submit(model_name(50, PLENTY))
            client = await setting.watch(job_id)
            await client.read(MARK)
            at[job_id] = time.monotonic()
            if door == "WebSocket":
                client.transport.write(text_frame(b'{"type":"cancel","job_id":"%b"}' % job_id.encode()))
            else:
                await setting.connect(post(f"/v1/jobs/{job_id}/cancel", {}))
            await client.read(b'"cancelled"')
            client.transport.abort()
    closed = dict(setting.run.closed())
    return {door: percentiles([closed[job_id] - at[job_id] for job_id in at]) for door, at in asked.items()}


_MS: Final = {"p50_ms": "p50 ms", "p99_ms": "p99 ms"}
Part = Callable[[Setting, float], Awaitable[dict[str, Figures]]]
PARTS: Final[dict[str, tuple[str, Part, dict[str, str]]]] = {
    "deltas": (
        "delay from the gateway's write to the client's read, 100 streams at 50 deltas per second each",
        deltas,
        {
            **_MS,
            **{f"{server}_us": f"{server} µs per delta" for server in SERVERS},
            "sum_us": "all µs per delta",
        },
    ),
    "first": (
        "time to the first delta, enqueue and connections included",
        first,
        {**_MS, "added_p50_ms": "added p50 ms", "added_p99_ms": "added p99 ms"},
    ),
    "cancel": ("from the client's cancel to the gateway's connection closed", cancel, _MS),
}


async def measure(part: Part, seconds: float) -> dict[str, Figures]:
    async with whole() as setting:
        return await part(setting, seconds)


def run_table(name: str, *, rounds: int, seconds: float) -> Table:
    title, part, columns = PARTS[name]
    found: dict[str, list[Figures]] = {}
    for _ in range(rounds):
        for system, figures in uvloop.run(measure(part, seconds)).items():
            found.setdefault(system, []).append(figures)
    return table(f"path-{name}", f"Whole path: {title}", columns, found, [])


def rows(*, with_peers: bool, rounds: int, seconds: float) -> list[Table]:
    """All tables; there are no peers here."""
    del with_peers
    return [run_table(name, rounds=rounds, seconds=seconds) for name in PARTS]


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description="The whole path beside a direct connection.")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tables = [run_table(name, rounds=args.rounds, seconds=args.seconds) for name in args.parts.split(",")]
    for found in tables:
        show(found)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2))


if __name__ == "__main__":
    main()
