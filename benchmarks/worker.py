"""What a delta costs a worker, from the gateway's socket to Redis; what a stream costs it in memory; how many
jobs it accepts per second. Ours beside its peers and the floor.

    .venv/bin/python -m benchmarks.worker [--systems ours,threads] [--scenarios paced,saturated,memory,accept]
        [--rounds 1] [--seconds 5] [--json FILE]

`ours@PATH` is the worker of another checkout: `--systems ours,ours@../before --rounds 3` compares two, round
by round. Each measurement has a Redis, a gateway (benchmarks.load_gateway) and a worker of its own, all real
processes of this machine. CPU is user and system of all of the worker's processes, and of Redis, between two
moments, divided by the deltas that reached Redis between them (its own count of calls).
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import redis
import uvloop

from benchmarks.load_gateway import Stats, model_name
from benchmarks.processes import Servers, end_in_order, start_redis
from benchmarks.report import Table, show
from benchmarks.workers.base import Marks, Worker
from benchmarks.workers.ours import Ours, Scraped
from benchmarks.workers.peers import HttpxReader, LineCounter, LiteLlm, Prefork, Threads
from deltawire.redis_server import free_port

Figures = dict[str, float | None]

WARM_UP_S: Final = 1.5
BEGIN_TIMEOUT_S: Final = 40.0
PLENTY: Final = 1_000_000  # of deltas: such a stream does not end by itself while it is measured
KEPT_UP: Final = 0.98  # of what the gateway sent came through
KEPT_UP_MS: Final = 1_000  # the delay's p99
BUSY: Final = 0.85  # of a core: a load process above that may be the bottleneck


class Run:
    """One worker with what is around it."""

    def __init__(self, servers: Servers, worker: Worker, gateway_port: int, redis_port: int) -> None:
        self.servers = servers
        self.worker = worker
        self._gateway_port = gateway_port
        self.redis_port = redis_port
        self.delays_us = worker.delays_us
        self._redis = redis.Redis(port=redis_port)

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._gateway_port}{path}", timeout=30) as answer:
            body: bytes = answer.read()
            return body

    def stats(self) -> Stats:
        """The gateway's."""
        return msgspec.json.decode(self._get("/stats"), type=Stats)

    def closed(self) -> list[tuple[str, float]]:
        """Streams of the gateway whose reader has gone: its request id, and when."""
        return msgspec.json.decode(self._get("/closed"), type=list[tuple[str, float]])

    def go(self) -> None:
        self._get("/go")

    async def until(self, is_so: Callable[[Stats], bool], what: str) -> Stats:
        """The gateway's figures as soon as they are so. Raises TimeoutError."""
        deadline = time.monotonic() + BEGIN_TIMEOUT_S
        while not is_so(stats := self.stats()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{what}: {stats}; the worker's log:\n{self.servers.log('worker')[-2000:]}"
                )
            await asyncio.sleep(0.02)
        return stats

    async def hold(self, rate: int, count: int, deltas: int = PLENTY) -> None:
        """Has so many streams more open, of which none has begun."""
        if not count:
            return
        held = self.stats().held + count
        await self.worker.ask(model_name(rate, deltas, is_held=True), count)
        await self.until(lambda stats: stats.held >= held, f"{held} streams")

    async def listen(self) -> None:
        """From now on the delays of what is published are known."""
        if self.worker.counted_by is None:
            return
        loop = asyncio.get_running_loop()
        hello = b"PSUBSCRIBE *\r\n"
        await loop.create_connection(lambda: Marks(hello, self.delays_us), "127.0.0.1", self.redis_port)

    async def published(self) -> int:
        """Deltas that reached Redis so far, or the worker's far end."""
        if (command := self.worker.counted_by) is None:
            delivered = await self.worker.delivered()
            return self.stats().sent if delivered is None else delivered
        calls: Any = self._redis.info("commandstats")
        return int(calls.get(f"cmdstat_{command}", {"calls": 0})["calls"])

    async def measure(self, seconds: float, *, until: int | None = None) -> Figures:
        """What is used, and what comes through, in that time; or from /go `until` so many came through."""
        published, sent = await self.published(), self.stats().sent
        before, load_s, began = self.servers.cpu_s(), time.process_time(), time.monotonic()
        first = len(self.delays_us)
        if until is not None:
            self.go()
        while (left := began + seconds - time.monotonic()) > 0:
            await asyncio.sleep(left if until is None else 0.05)
            if until is not None and await self.published() - published >= until:
                break
        after, load_s, took = self.servers.cpu_s(), time.process_time() - load_s, time.monotonic() - began
        deltas, stats = await self.published() - published, self.stats()
        delays = sorted(self.delays_us[first:])
        used = {name: after[name] - before[name] for name in after}
        figures: Figures = {
            "worker_us": 1e6 * used["worker"] / deltas if deltas else None,
            "redis_us": 1e6 * used["redis"] / deltas if deltas else None,
            "deltas_per_s": deltas / took,
            "delivered": deltas / max(1, stats.sent - sent),
            "p50_ms": delays[len(delays) // 2] / 1e3 if delays else None,
            "p99_ms": delays[len(delays) * 99 // 100] / 1e3 if delays else None,
            "gateway_busy": used["gateway"] / took,
            "load_busy": load_s / took,
            "gateway_late_ms": stats.latest_tick_s * 1e3,
        }
        if self.worker.counted_by is None:
            figures["redis_us"] = None
        return figures


@contextlib.asynccontextmanager
async def running(worker: Worker, streams: int, *, jobs_first: str = "", jobs: int = 0) -> AsyncIterator[Run]:
    """A run of the worker; so many `jobs` of the model `jobs_first` wait in the queue when it starts."""
    with Servers() as servers:
        worker.redis_port, worker.gateway_port, worker.delays_us = start_redis(servers), free_port(), []
        start_gateway(servers, worker.gateway_port)
        if jobs_first:
            await worker.ask(jobs_first, jobs)
        worker.start(servers, streams)
        try:
            yield Run(servers, worker, worker.gateway_port, worker.redis_port)
        finally:
            servers.kill("worker")  # what it is at is of no interest any more


def start_gateway(servers: Servers, port: int) -> None:
    command = [sys.executable, "-m", "benchmarks.load_gateway", "--port", str(port)]
    servers.start("gateway", command, port=port, environment={"PYTHONPATH": _path_with_here()})


def _path_with_here() -> str:
    """So that a child finds `benchmarks`, wherever it is started."""
    return ":".join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


async def paced(worker: Worker, seconds: float, *, streams: int = 100, rate: int = 50) -> Figures:
    """Streams at a steady rate each, and somebody who listens."""
    async with running(worker, streams) as run:
        await run.hold(rate, streams)
        await run.listen()
        run.go()
        await asyncio.sleep(WARM_UP_S)
        return await run.measure(seconds)


async def thousand(worker: Worker, seconds: float) -> Figures:
    """More than one process takes, in the small pieces in which it comes from many gateways."""
    return await paced(worker, seconds, streams=1_000, rate=50)


async def saturated(worker: Worker, seconds: float, *, streams: int = 1_000, deltas: int = 300) -> Figures:
    """Streams as fast as the worker takes them, until nearly all of it is in Redis, or four times `seconds`.

    Not what passes in some time: a worker may hold for seconds what it has read.
    """
    async with running(worker, streams) as run:
        await run.hold(0, streams, deltas)
        return await run.measure(4 * seconds, until=int(0.95 * streams * deltas))


async def memory(worker: Worker, seconds: float) -> Figures:
    """As many streams of 20 per second as one process keeps up with, of those numbers that are tried.

    Memory is PSS above that with the first hundred (or a third), before the first delta and at the end.
    """
    figures: Figures = {}
    for streams in worker.tries:
        figures = await _memory(worker, seconds, streams)
        if (figures["delivered"] or 0) > KEPT_UP and (figures["p99_ms"] or 0) < KEPT_UP_MS:
            break
    return figures


async def _memory(worker: Worker, seconds: float, streams: int) -> Figures:
    first = 0 if worker.is_process_each else min(100, streams // 2)
    async with running(worker, first + streams) as run:
        await run.hold(20, first)
        few = run.servers.memory_kb()["worker"] if first else 0
        await run.hold(20, streams)
        silent = run.servers.memory_kb()["worker"]
        await run.listen()
        run.go()
        await asyncio.sleep(WARM_UP_S)
        figures = await run.measure(seconds)
        grown = run.servers.memory_kb()["worker"]
    kb = {"silent_kb": (silent - few) / streams, "stream_kb": (grown - few) / streams}
    return {**figures, **kb, "streams": first + streams}


async def accept(worker: Worker, seconds: float, *, jobs: int = 3_000) -> Figures:
    """Short jobs (one delta) that wait in the queue when the worker starts: from the first to the last one's
    request at the gateway; its CPU per job until the last one has ended, its start left out.
    """
    del seconds
    async with running(worker, 1_000, jobs_first=model_name(0, 1), jobs=jobs) as run:
        began = await run.until(lambda stats: stats.requests >= 1, "first job")
        before = run.servers.cpu_s()
        ended = await run.until(lambda stats: stats.requests >= jobs and not stats.open, "all jobs")
        after, count = run.servers.cpu_s(), jobs - began.requests
        return {
            "jobs_per_s": (jobs - 1) / (ended.last_request_at - ended.first_request_at),
            "worker_ms": 1e3 * (after["worker"] - before["worker"]) / count,
            "redis_ms": 1e3 * (after["redis"] - before["redis"]) / count,
            "gateway_busy": (after["gateway"] - before["gateway"])
            / (ended.last_request_at - ended.first_request_at),
        }


async def accept_bare(worker: Worker, seconds: float) -> Figures:
    """As `accept`, the bodies in the messages."""
    return await accept(worker, seconds)


Scenario = Callable[[Worker, float], Coroutine[Any, Any, Figures]]

SCENARIOS: Final[dict[str, tuple[str, Scenario, dict[str, str]]]] = {
    "paced": (
        "100 streams at 50 deltas per second each",
        paced,
        {
            "worker_us": "worker µs per delta",
            "redis_us": "Redis µs per delta",
            "p50_ms": "delay p50 ms",
            "p99_ms": "delay p99 ms",
            "delivered": "delivered",
        },
    ),
    "thousand": (
        "1,000 streams at 50 deltas per second each",
        thousand,
        {
            "worker_us": "worker µs per delta",
            "redis_us": "Redis µs per delta",
            "deltas_per_s": "deltas per second",
            "delivered": "delivered",
        },
    ),
    "saturated": (
        "1,000 streams as fast as the worker takes them",
        saturated,
        {
            "worker_us": "worker µs per delta",
            "redis_us": "Redis µs per delta",
            "deltas_per_s": "deltas per second",
        },
    ),
    "memory": (
        "streams of 20 deltas per second that one process keeps up with",
        memory,
        {
            "streams": "streams",
            "silent_kb": "KiB per stream, silent",
            "stream_kb": "KiB per stream",
            "worker_us": "worker µs per delta",
            "p50_ms": "delay p50 ms",
            "p99_ms": "delay p99 ms",
            "delivered": "delivered",
        },
    ),
    "accept": (
        "3,000 short jobs that wait in the queue, their bodies in records",
        accept,
        {"jobs_per_s": "jobs per second", "worker_ms": "worker ms per job", "redis_ms": "Redis ms per job"},
    ),
    "accept_bare": (
        "3,000 short jobs that wait in the queue, their bodies in the messages",
        accept_bare,
        {"jobs_per_s": "jobs per second", "worker_ms": "worker ms per job", "redis_ms": "Redis ms per job"},
    ),
}
STREAMS: Final = {"paced": 100, "thousand": 1_000, "saturated": 1_000}
OURS: Final = {"ours": Ours, "scraped": Scraped}
SYSTEMS: Final[dict[str, type[Worker]]] = {
    **OURS,
    "prefork": Prefork,
    "threads": Threads,
    "httpx": HttpxReader,
    "litellm": LiteLlm,
    "floor": LineCounter,
}


def make_worker(name: str, scenario: str) -> Worker:
    """By its name on the command line."""
    kind, _, path = name.partition("@")
    if kind in OURS:
        return OURS[kind](Path(path).resolve() if path else None, with_records=scenario == "accept")
    if name not in SYSTEMS:
        raise SystemExit(f"there is no system {name!r}, only {', '.join(SYSTEMS)}")
    return SYSTEMS[name]()


def run_table(scenario: str, systems: Sequence[str], *, rounds: int, seconds: float) -> Table:
    """Medians of rounds in which the systems take turns."""
    title, measure, columns = SCENARIOS[scenario]
    found: dict[str, list[Figures]] = {name: [] for name in systems}
    notes: list[str] = []
    for _ in range(rounds):
        for name in systems:
            worker = make_worker(name, scenario)
            if reason := _unfit(worker, scenario):
                notes.append(f"{worker.name}: {reason}")
                continue
            try:
                figures: Figures = uvloop.run(measure(worker, seconds))
            except (TimeoutError, RuntimeError) as error:
                print(name, scenario, error, file=sys.stderr, flush=True)
                notes.append(f"{worker.name}: did not come to {str(error).partition(':')[0]} in time")
                continue
            print(name, scenario, _short(figures), file=sys.stderr, flush=True)
            found[name].append(figures)
            notes += [
                f"{worker.name}: the {what.removesuffix('_busy')} took {busy:.0%} of a core"
                for what in ("gateway_busy", "load_busy")
                if (busy := figures.get(what) or 0) > BUSY
            ]
    by_name = {make_worker(name, scenario).name: figures for name, figures in found.items() if figures}
    return table(f"worker-{scenario}", f"Worker: {title}", columns, by_name, notes)


def table(
    key: str, title: str, columns: dict[str, str], found: dict[str, list[Figures]], notes: Sequence[str]
) -> Table:
    """Medians of all rounds, by system; `columns` says which figures, and their heads."""
    medians = {system: _medians(figures) for system, figures in found.items()}
    return {
        "key": key,
        "title": title,
        "columns": ["system", *columns.values()],
        "rows": [[system, *(_shown(row.get(name)) for name in columns)] for system, row in medians.items()],
        "notes": list(dict.fromkeys(notes)),
        "figures": found,
    }


def _unfit(worker: Worker, scenario: str) -> str | None:
    if reason := worker.missing():
        return reason
    if scenario.startswith("accept") and not worker.has_queue:
        return "has no queue"
    if scenario == "accept" and worker.is_peer:
        return "has no records"
    if STREAMS.get(scenario, 0) > worker.most_streams:
        return f"at most {worker.most_streams} streams"
    return None


def _medians(rounds: Sequence[Figures]) -> Figures:
    medians: Figures = {}
    for name in rounds[0]:
        values = [value for figures in rounds if (value := figures[name]) is not None]
        medians[name] = statistics.median(values) if values else None
    return medians


def _shown(value: float | None) -> float | None:
    """With the digits that mean something."""
    if value is None:
        return None
    return round(value) if value >= 100 else round(value, 1 if value >= 10 else 2)


def _short(figures: Figures) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in figures.items() if value is not None)


def rows(*, with_peers: bool, rounds: int, seconds: float) -> list[Table]:
    """All tables."""
    systems = list(SYSTEMS) if with_peers else [name for name, kind in SYSTEMS.items() if not kind.is_peer]
    # Bodies in messages are for the peers, who know no records.
    scenarios = [name for name in SCENARIOS if with_peers or name != "accept_bare"]
    return [run_table(name, systems, rounds=rounds, seconds=seconds) for name in scenarios]


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description="What a delta, a stream and a job cost a worker.")
    parser.add_argument("--systems", default="ours")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tables = [
        run_table(scenario, args.systems.split(","), rounds=args.rounds, seconds=args.seconds)
        for scenario in args.scenarios.split(",")
    ]
    for found in tables:
        show(found)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2))


if __name__ == "__main__":
    main()
