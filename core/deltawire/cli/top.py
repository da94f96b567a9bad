"""`deltawire top`: what is going on, once a second. Reads Redis and the broker; no relay is asked."""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deltawire.environment import Environment
from deltawire.errors import RedisUnavailableError, WireError
from deltawire.index import Index
from deltawire.keys import Keys
from deltawire.queue import TaskSender, make_app
from deltawire.redis_client import RedisClient
from deltawire.scripts import Scripts
from deltawire.settings import ServiceSettings
from deltawire.variables import read_settings
from deltawire.vitals import INTERVAL_S, Vitals, listening

from .doctor import in_thread
from .exit_codes import ExitCode
from .printing import PIPE_WIDTH, is_lively, out, write_json

FORGET_AFTER_S: Final = 5.0
FIRST_LOOK_S: Final = 2.2 * INTERVAL_S  # two words of each process, for its rates


class Process(msgspec.Struct, frozen=True):
    """One process. `rates` are per second, of the counts whose names end in `_total`."""

    kind: str
    name: str
    where: str
    version: str
    up_s: float
    counts: dict[str, float]
    rates: dict[str, float]


class Picture(msgspec.Struct, frozen=True):
    """All of it at one moment. A number that could not be had is None."""

    at: float
    jobs: dict[str, float | None]
    rates: dict[str, float]
    processes: list[Process]


class Pulse:
    """What processes have said of late. Pure but for its clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._heard: dict[str, tuple[float, Vitals, Vitals | None]] = {}

    def hear(self, vitals: Vitals) -> None:
        _, last, _ = self._heard.get(vitals.name, (0.0, None, None))
        self._heard[vitals.name] = (self._now(), vitals, last)

    def processes(self) -> list[Process]:
        """Those that were heard of lately, in an order that stays."""
        now = self._now()
        self._heard = {name: heard for name, heard in self._heard.items() if now - heard[0] < FORGET_AFTER_S}
        found = [_process(vitals, before) for _, vitals, before in self._heard.values()]
        return sorted(found, key=lambda process: (process.kind, process.where))


def _process(vitals: Vitals, before: Vitals | None) -> Process:
    rates: dict[str, float] = {}
    if before is not None and vitals.at > before.at:
        rates = {
            name.removesuffix("_total"): max(0.0, count - before.counts.get(name, count))
            / (vitals.at - before.at)
            for name, count in vitals.counts.items()
            if name.endswith("_total")
        }
    where = f"{vitals.host}:{vitals.pid}"
    up_s = vitals.at - vitals.started_at
    return Process(vitals.kind, vitals.name, where, vitals.version, up_s, vitals.counts, rates)


def picture(processes: list[Process], counts: dict[str, int | None], depth: int | None, at: float) -> Picture:
    """Sums of what there is. Pure."""
    workers = [process for process in processes if process.kind == "worker"]
    relays = [process for process in processes if process.kind == "relay"]
    return Picture(
        at=at,
        jobs={
            "running": _sum(workers, "running"),
            **counts,
            "messages": depth,
            "followed": _sum(relays, "jobs"),
            "readers": _sum(relays, "readers"),
        },
        rates={
            name: round(sum(process.rates.get(name, 0.0) for process in workers), 1)
            for name in ("ended", "events")
        },
        processes=processes,
    )


def _sum(processes: list[Process], name: str) -> float:
    return sum(process.counts.get(name, 0.0) for process in processes)


def table(shown: Picture) -> Group:
    """For a terminal."""
    jobs = "   ".join(f"{name} {_whole(count)}" for name, count in shown.jobs.items())
    rates = f"jobs/s {shown.rates['ended']:.1f}   events/s {shown.rates['events']:.1f}"
    return Group(Text(jobs), Text(rates), _workers(shown.processes), _relays(shown.processes))


def _workers(processes: list[Process]) -> Table:
    rows = _table("worker", "up", "jobs", "places", "parked", "jobs/s", "events/s", "late ms", "version")
    for process in processes:
        if process.kind == "worker":
            counts = process.counts
            rows.add_row(
                *(process.where, _age(process.up_s), _whole(counts.get("running"))),
                *(_whole(counts.get("places")), _whole(counts.get("parked"))),
                *(f"{process.rates.get(name, 0.0):.1f}" for name in ("ended", "events")),
                *(_ms(counts), process.version),
            )
    return rows


def _relays(processes: list[Process]) -> Table:
    rows = _table("relay", "up", "jobs", "readers", "Redis silent s", "late ms", "version")
    for process in processes:
        if process.kind == "relay":
            counts = process.counts
            rows.add_row(
                *(process.where, _age(process.up_s), _whole(counts.get("jobs"))),
                *(_whole(counts.get("readers")), f"{counts.get('silent_s', 0.0):.1f}"),
                *(_ms(counts), process.version),
            )
    return rows


def _table(first: str, *columns: str) -> Table:
    rows = Table(box=None, pad_edge=False, title=None, header_style="bold")
    rows.add_column(first)
    for column in columns:
        rows.add_column(column, justify="right")
    return rows


def _whole(count: float | None) -> str:
    return "?" if count is None else f"{count:.0f}"


def _ms(counts: dict[str, float]) -> str:
    return f"{max(0.0, counts.get('loop_late_s', 0.0)) * 1000:.0f}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


async def watch(*, once: bool, as_json: bool) -> ExitCode:
    """Shows it until interrupted, or once. Raises ConfigurationError, RedisUnavailableError."""
    settings = read_settings(ServiceSettings, Environment())
    keys = Keys.at(settings.redis_url, settings.key_prefix)
    redis = RedisClient(settings.redis_url, name="deltawire-cli")
    app = make_app(settings.broker_url, key_prefix=settings.key_prefix)
    index, sender, pulse = Index(Scripts(redis), keys), TaskSender(app), Pulse()

    async def look() -> Picture:
        counts, depth = await asyncio.gather(_or_none(index.counts()), _or_none(in_thread(sender.depth)))
        queued, held, parked = counts[:3] if counts else (None, None, None)
        states = {"queued": queued, "held": held, "parked": parked}
        return picture(pulse.processes(), states, depth, time.time())

    try:
        async with listening(settings.redis_url, keys, pulse.hear):
            if once or as_json:  # who watches sees the rates come
                await asyncio.sleep(FIRST_LOOK_S)
            await _show(look, once=once, as_json=as_json)
    finally:
        await redis.aclose()
    return ExitCode.DONE


async def _show(look: Callable[[], Coroutine[Any, Any, Picture]], *, once: bool, as_json: bool) -> None:
    if as_json or once or not is_lively():  # one picture below the other
        console = out if out.is_terminal else Console(width=PIPE_WIDTH)
        while True:
            shown = await look()
            if as_json:
                write_json(shown)
            else:
                console.print(table(shown), soft_wrap=False)
                sys.stdout.flush()
            if once:
                return
            await asyncio.sleep(INTERVAL_S)
    with Live(table(await look()), console=out, auto_refresh=False, screen=False) as live:
        while True:
            await asyncio.sleep(INTERVAL_S)
            live.update(table(await look()), refresh=True)


async def _or_none(answer: Coroutine[Any, Any, Any]) -> Any:
    """None where it cannot be had just now: the rest is shown all the same."""
    with suppress(RedisUnavailableError, WireError, TimeoutError):
        async with asyncio.timeout(2 * INTERVAL_S):
            return await answer
    return None
