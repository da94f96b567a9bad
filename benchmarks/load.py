"""The load side of the relay benchmarks: publishes as a worker does and reads as viewers do, in one process.

It parses nothing: a delivery is a MARK in the bytes received, and the digits behind it say when it left.
"""

import asyncio
import ctypes
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

from benchmarks.processes import Servers
from benchmarks.relays.base import AT_DIGITS, MARK, Publisher, Relay, Viewer, chunk

UNIT: Final = len(MARK) + AT_DIGITS  # what a delivery is counted by
CONNECTING: Final = 100
CONNECT_TIMEOUT_S: Final = 60.0
DRAIN_TIMEOUT_S: Final = 10.0
QUIET_S: Final = 5.0  # without anything that comes; a server may have to wait for a core
TICK_S: Final = 0.0002  # the shortest between two turns of publishing
SETTLE_S: Final = 0.5
WARM_UP_S: Final = 1.0
UNDER_WAY: Final = 2_000


class LoadError(RuntimeError):
    """A system did not take the load; the message says where it stopped."""


class Marks:
    """Counts deliveries in what one connection receives, wherever the reads cut it."""

    def __init__(self) -> None:
        self._rest = b""

    def complete(self, data: bytes) -> bytes:
        """What is to be searched now: it ends between two marks, and the next call gets the rest."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        # A mark that is not whole yet begins in the last UNIT - 1 bytes.
        cut = data.find(MARK[:1], -UNIT + 1)
        if cut >= 0:
            data, self._rest = data[:cut], data[cut:]
        return data


class Tally:
    """What all connections have received together."""

    def __init__(self) -> None:
        self.delivered = 0
        self.delays_us: list[int] | None = None
        """Where it is a list: how long the oldest delta of each read was under way."""
        self.on_news: Callable[[], None] | None = None
        self.kept: list[list[bytes]] | None = None
        """Where it is a list: all bytes of each connection, for tests that look at the order."""


class Connection(asyncio.Protocol):
    """One viewer's connection."""

    def __init__(self, viewer: Viewer, tally: Tally) -> None:
        self._viewer = viewer
        self._tally = tally
        self._marks = Marks()
        self._transport: asyncio.Transport
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.delivered = 0
        self.reads = 0
        self._kept: list[bytes] = []
        if tally.kept is not None:
            tally.kept.append(self._kept)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # a stream's, whatever its class
        self._transport.write(self._viewer.hello())

    def data_received(self, data: bytes) -> None:
        if not self._viewer.is_ready:
            answer = self._viewer.received(data)
            if self._viewer.is_ready and not self.ready.done():
                self.ready.set_result(None)
        else:
            answer = self._viewer.answer(data) if self._viewer.answers else b""
        if answer:
            self._transport.write(answer)
        tally = self._tally
        if tally.kept is not None:
            self._kept.append(data)
        self.reads += 1
        data = self._marks.complete(data)
        if not (count := data.count(MARK)):
            return
        self.delivered += count
        tally.delivered += count
        if tally.delays_us is not None:
            at = data.find(MARK) + len(MARK)
            tally.delays_us.append(round(time.monotonic() * 1e6) - int(data[at : at + AT_DIGITS]))
        if tally.on_news is not None:
            tally.on_news()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(LoadError(f"a viewer's connection ended early: {exc}"))

    def close(self) -> None:
        self._transport.abort()


async def connect(relay: Relay, viewers: Sequence[Viewer], tally: Tally) -> list[Connection]:
    """Connects all, so many at a time, and waits until each is ready. Raises LoadError."""
    loop = asyncio.get_running_loop()
    door = asyncio.Semaphore(CONNECTING)
    made: list[Connection] = []

    async def one(viewer: Viewer) -> None:
        async with door:
            _, connection = await loop.create_connection(
                lambda: Connection(viewer, tally), "127.0.0.1", relay.port
            )
            made.append(connection)
            await connection.ready

    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await asyncio.gather(*map(one, viewers))
    except TimeoutError as error:
        ready = sum(connection.ready.done() for connection in made)
        raise LoadError(f"{ready} of {len(viewers)} viewers were ready in time") from error
    except OSError as error:
        raise LoadError(f"a viewer cannot connect: {error}") from error
    return made


class Window:
    """A stretch of time: what was published and delivered in it, and what CPU it took."""

    def __init__(self, servers: Servers, tally: Tally, sent: "Sent") -> None:
        self._servers, self._tally, self._sent = servers, tally, sent
        tally.delays_us = [] if tally.delays_us is not None else None
        self._before = self._now()

    def _now(self) -> tuple[float, float, int, int, dict[str, float]]:
        cpu = self._servers.cpu_s()
        return time.monotonic(), time.process_time(), self._tally.delivered, self._sent.count, cpu

    def figures(self, fan_out: int = 1) -> dict[str, float]:
        """Closes it. CPU is in microseconds per delivery, delays in milliseconds, shares of 1."""
        began, load_began, delivered_before, sent_before, cpu_before = self._before
        ended, load_ended, delivered, sent, cpu = self._now()
        delivered -= delivered_before
        used = {name: value - cpu_before.get(name, 0.0) for name, value in cpu.items()}
        redis = used.pop("redis", 0.0)
        each = 1e6 / max(1, delivered)
        found = {
            "per_s": delivered / (ended - began),
            # What was published last may be on its way.
            "share": min(1.0, (delivered + fan_out) / max(1, (sent - sent_before) * fan_out)),
            "us": (redis + sum(used.values())) * each,
            "relay_us": sum(used.values()) * each,
            "redis_us": redis * each,
            "load": (load_ended - load_began) / (ended - began),
        }
        if self._tally.delays_us is not None:
            ordered = sorted(self._tally.delays_us)
            found |= {
                "p50_ms": percentile(ordered, 0.5) / 1e3,
                "p99_ms": percentile(ordered, 0.99) / 1e3,
                "max_ms": percentile(ordered, 1) / 1e3,
            }
        return found


class Sent:
    """Publishes to jobs in turn, so that each gets its deltas at even distances."""

    def __init__(self, publisher: Publisher, job_ids: Sequence[str]) -> None:
        self._publisher = publisher
        self._turns = itertools.cycle(job_ids)
        self._jobs = len(job_ids)
        self.count = 0

    def publish(self, count: int) -> None:
        publish, turns, jobs = self._publisher.publish, self._turns, self._jobs
        now = time.monotonic()
        for number in range(self.count, self.count + count):
            publish(next(turns), chunk(number // jobs, now))
        self.count += max(0, count)

    async def evenly(self, rate: float, seconds: float) -> None:
        """So many deltas a second, whatever becomes of them; each on its own, where the loop keeps up."""
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        began = time.monotonic()
        first = self.count

        def tick() -> None:
            os.read(timer, 8)
            passed = min(seconds, time.monotonic() - began)
            self.publish(int(passed * rate) - (self.count - first))
            if passed == seconds and not over.done():
                over.set_result(None)

        timer = _timer(max(1 / rate, TICK_S))
        loop.add_reader(timer, tick)
        try:
            await over
        finally:
            loop.remove_reader(timer)
            os.close(timer)


class _Times(ctypes.Structure):  # struct itimerspec: interval, first; seconds and nanoseconds of each
    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns"))


def _timer(period_s: float) -> int:
    """A timerfd (timerfd_create(2)): a loop's own timers go by the millisecond, ten deltas at once here."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    seconds, nanoseconds = divmod(round(period_s * 1e9), 10**9)
    times = _Times(seconds, nanoseconds, seconds, nanoseconds)
    if descriptor < 0 or libc.timerfd_settime(descriptor, 0, ctypes.byref(times), None):
        raise OSError(ctypes.get_errno(), "no timer")
    return descriptor


async def drained(tally: Tally, expected: int) -> bool:
    """Waits until all has come, as long as something still comes."""
    before, since = tally.delivered, time.monotonic()
    deadline = since + DRAIN_TIMEOUT_S
    while tally.delivered < expected and time.monotonic() < min(deadline, since + QUIET_S):
        await asyncio.sleep(SETTLE_S)
        if tally.delivered != before:
            before, since = tally.delivered, time.monotonic()
    return tally.delivered == expected


async def steady(
    relay: Relay,
    servers: Servers,
    redis_port: int,
    *,
    jobs: int,
    viewers_each: int,
    rate: float,
    seconds: float,
    warm_up_s: float = WARM_UP_S,
    tally: Tally | None = None,
) -> dict[str, float]:
    """Publishes `rate` deltas a second to each job, evenly, while all viewers are there."""
    tally = tally or Tally()
    tally.delays_us = []
    job_ids = [f"job-{number}" for number in range(jobs)]
    publisher = relay.publisher(redis_port)
    await publisher.open(job_ids)
    viewers = [relay.viewer(job_id) for job_id in job_ids for _ in range(viewers_each)]
    connections = await connect(relay, viewers, tally)
    await asyncio.sleep(SETTLE_S)
    sent = Sent(publisher, job_ids)
    await sent.evenly(rate * jobs, warm_up_s)
    window = Window(servers, tally, sent)
    await sent.evenly(rate * jobs, seconds)
    figures = window.figures(viewers_each)
    tally.delays_us = None
    is_whole = await drained(tally, sent.count * viewers_each)
    figures["lost"] = 0 if is_whole else sent.count * viewers_each - tally.delivered
    await _close(publisher, connections)
    return figures


async def saturated(
    relay: Relay, servers: Servers, redis_port: int, *, jobs: int, seconds: float
) -> dict[str, float]:
    """Publishes as fast as deltas arrive, with at most UNDER_WAY of them under way. One viewer a job."""
    tally = Tally()
    loop = asyncio.get_running_loop()
    job_ids = [f"job-{number}" for number in range(jobs)]
    publisher = relay.publisher(redis_port)
    await publisher.open(job_ids)
    connections = await connect(relay, [relay.viewer(job_id) for job_id in job_ids], tally)
    await asyncio.sleep(SETTLE_S)
    sent = Sent(publisher, job_ids)
    is_due = is_over = False

    def refill() -> None:
        nonlocal is_due
        is_due = False
        if not is_over:
            sent.publish(UNDER_WAY - (sent.count - tally.delivered))

    def hear() -> None:
        nonlocal is_due
        if not is_due:
            is_due = True
            loop.call_soon(refill)

    tally.on_news = hear
    refill()
    await asyncio.sleep(WARM_UP_S)
    window = Window(servers, tally, sent)
    await asyncio.sleep(seconds)
    figures = window.figures()
    is_over = True
    is_whole = await drained(tally, sent.count)
    figures["lost"] = 0 if is_whole else sent.count - tally.delivered
    await _close(publisher, connections)
    return figures


async def idle(
    relay: Relay, servers: Servers, redis_port: int, *, connections: int, jobs: int
) -> dict[str, float]:
    """What so many viewers of quiet jobs take of the servers' memory, each, in KB; Redis apart."""
    tally = Tally()
    job_ids = [f"job-{number}" for number in range(jobs)]
    publisher = relay.publisher(redis_port)
    await publisher.open(["warm", *job_ids])
    # The first few bring in what any connection needs once.
    held = await connect(relay, [relay.viewer("warm") for _ in range(CONNECTING // 2)], tally)
    await asyncio.sleep(2 * SETTLE_S)
    before = _without_redis(servers.memory_kb())
    viewers = [relay.viewer(job_ids[number % jobs]) for number in range(connections)]
    held += await connect(relay, viewers, tally)
    await asyncio.sleep(4 * SETTLE_S)
    grown = _without_redis(servers.memory_kb()) - before
    await _close(publisher, held)
    return {"kb": grown / connections}


async def joins(
    relay: Relay, _servers: Servers, redis_port: int, *, deltas: int, times: int, snapshot: bool = False
) -> dict[str, float]:
    """Milliseconds from connecting to having all deltas of a running job; the median of some joins."""
    publisher = relay.publisher(redis_port)
    await publisher.open(["job"])
    tally = Tally()
    [watching] = await connect(relay, [relay.viewer("job")], tally)
    sent = Sent(publisher, ["job"])
    while sent.count < deltas:
        sent.publish(min(20, deltas - sent.count))
        await asyncio.sleep(0.005)
    if not await drained(tally, deltas):
        raise LoadError(f"the first viewer got {tally.delivered} of {deltas} deltas")
    watching.close()
    await asyncio.sleep(2 * SETTLE_S)
    took, reads = [], []
    for _ in range(times):
        viewer = relay.late_viewer("job") if snapshot else relay.viewer("job", from_start=True)
        tally = Tally()
        is_whole = asyncio.Event()
        tally.on_news = is_whole.set
        began = time.monotonic()
        [connection] = await connect(relay, [viewer], tally)
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while tally.delivered < deltas:
                    is_whole.clear()
                    await is_whole.wait()
        except TimeoutError as error:
            raise LoadError(f"a late viewer got {tally.delivered} of {deltas} deltas") from error
        took.append(1e3 * (time.monotonic() - began))
        reads.append(connection.reads)
        connection.close()
        await asyncio.sleep(0.1)
    await publisher.close()
    return {"ms": statistics.median(took), "reads": statistics.median(reads)}


async def _close(publisher: Publisher, connections: Sequence[Connection]) -> None:
    await publisher.close()
    for connection in connections:
        connection.close()
    await asyncio.sleep(0)


def _without_redis(memory_kb: dict[str, int]) -> int:
    return sum(kb for name, kb in memory_kb.items() if name != "redis")


def percentile(ordered: Sequence[float], share: float) -> float:
    """By the nearest rank; 0 of nothing."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def allow_many_files() -> None:
    """For this process and its children: as many as the system lets us have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
