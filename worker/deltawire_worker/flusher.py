"""The appends of all jobs of a worker process, in few writes to each primary (see `_Lane`).

Nothing here, nor in `writer.py`, is awaited by the token loop.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import hiredis
from prometheus_client.core import Metric

from deltawire.errors import RedisUnavailableError
from deltawire.keys import Keys
from deltawire.log import AppendCode
from deltawire.metrics import Histogram, counter_family, gauge_family, histogram_family
from deltawire.record import Record
from deltawire.redis_connection import RedisConnection, RedisLink, Reply, pack
from deltawire.redis_nodes import RedisNodes, code_of
from deltawire.scripts import APPEND, RENEW, REWRITE, Script

from .writer import JobWriter

MAX_LOG_BYTES: Final = 8_388_608
HOLD_S: Final = 0.001
ENOUGH: Final = 8  # appends in a write: at a tenth more they cost what any number would
RETRY_S: Final = 0.1
TIMED_EVERY_S: Final = 0.01
SETTLE_S: Final = 5.0  # so long relays take to subscribe again when Redis has been away

_log = logging.getLogger(__name__)


class FlushMetrics:
    """Plain numbers, for writers and lanes to add to."""

    def __init__(self) -> None:
        self.appends = self.events = self.flushes = self.rewrites = 0
        self.refusals = dict.fromkeys(("cancelled", "ended", "stale", "gap", "missing", "error"), 0)
        self.seconds = Histogram()

    def collect(self) -> Iterator[Metric]:
        yield counter_family("deltawire_appends_total", "Appends that Redis has taken.", self.appends)
        yield counter_family("deltawire_append_events_total", "Events in appends.", self.events)
        yield counter_family(
            "deltawire_append_refusals_total", "Appends that were not taken.", self.refusals, ["code"]
        )
        yield histogram_family(
            "deltawire_append_seconds",
            "From a write of appends to Redis' last answer to it.",
            {(): self.seconds},
        )
        yield counter_family("deltawire_flushes_total", "Writes of appends to Redis.", self.flushes)
        yield counter_family("deltawire_log_rewrites_total", "Logs that were written anew.", self.rewrites)


class _Lane:
    """What leaves by one connection, and when: at once, with all of its turn of the loop, or in a handful.

    An append of its own costs Redis and each relay that listens a wake-up and two system calls: more than the
    append itself. So while appends come so fast that ENOUGH do within HOLD_S, that many leave together.
    """

    def __init__(self, connection: RedisConnection, metrics: FlushMetrics) -> None:
        self.waiting: dict[JobWriter, None] = {}
        self._connection = connection
        self._metrics = metrics
        self._timed_at = -math.inf
        self._loop = asyncio.get_running_loop()
        self._spacing_s = HOLD_S  # between two appends, of late
        self._sent_at = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    def send_if_due(self) -> None:
        """Sends what waits, unless more is about to come."""
        if len(self.waiting) < ENOUGH and self._spacing_s * ENOUGH < HOLD_S:
            if self._timer is None:  # for the case that nothing more comes
                self._timer = self._loop.call_later(HOLD_S, self._send)
        else:
            self._send()

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._connection.is_open:
            return
        commands: list[bytes] = []
        callbacks: list[Callable[[Reply], None]] = []
        waiting, self.waiting = self.waiting, {}
        for writer in waiting:
            if command := writer.command():
                commands.append(command)
                callbacks.append(writer.answered)
        if commands:
            now = self._loop.time()
            if now - self._timed_at >= TIMED_EVERY_S:
                self._timed_at = now
                callbacks[-1] = partial(self._timed, time.monotonic(), callbacks[-1])
            self._metrics.flushes += 1
            self._connection.write(b"".join(commands), callbacks)
            spacing_s = min((now - self._sent_at) / len(commands), HOLD_S)
            self._spacing_s += (spacing_s - self._spacing_s) / 4
            self._sent_at = now

    def _timed(self, sent_at: float, answered: Callable[[Reply], None], reply: Reply) -> None:
        self._metrics.seconds.observe(time.monotonic() - sent_at)  # uvloop's clock counts milliseconds
        answered(reply)


class Flusher:
    """Through which a worker process appends: one connection to each primary of Redis."""

    def __init__(self, url: str, keys: Keys, *, max_log_bytes: int = MAX_LOG_BYTES) -> None:
        self.keys = keys
        self.max_log_bytes = max_log_bytes
        self.metrics = FlushMetrics()
        self._loop = asyncio.get_running_loop()  # asked for once: before Python 3.12 it costs a system call
        self.time = self._loop.time
        self.nodes = RedisNodes(
            url, name="deltawire-worker-flusher", on_connected=self._connected, on_moved=self._mark_all
        )
        self._writers: set[JobWriter] = set()
        self._dirty: dict[JobWriter, None] = {}
        self._is_scheduled = False
        self._lanes: dict[RedisConnection, _Lane] = {}
        self.settled_at = -math.inf
        """Until then relays that Redis was away from, too, have time to subscribe again. Loop time."""

    @property
    def is_connected(self) -> bool:
        return self.nodes.is_connected

    def collect(self) -> Iterator[Metric]:
        yield from self.metrics.collect()
        yield gauge_family(
            "deltawire_pending_bytes",
            "Events that wait for Redis.",
            sum(writer.pending_bytes for writer in self._writers),
        )

    async def start(self) -> None:
        """Raises RedisUnavailableError if Redis is not to be reached."""
        await self.nodes.start()

    async def close(self) -> None:
        await self.nodes.close()

    def open(
        self,
        job_id: str,
        *,
        record: Record,
        owner: str,
        top: int,
        on_cancel: Callable[[], None],
        on_refused: Callable[[AppendCode], None],
    ) -> JobWriter:
        """A writer for the attempt that `record` names, whose log ends at `top`. Close it."""
        writer = JobWriter(
            self,
            job_id=job_id,
            record=record,
            owner=owner,
            top=top,
            on_cancel=on_cancel,
            on_refused=on_refused,
        )
        self._writers.add(writer)
        return writer

    def close_writer(self, writer: JobWriter) -> None:
        self._writers.discard(writer)
        if not writer.is_ending:  # else what is left is the terminal event, which nobody else would write
            self._dirty.pop(writer, None)
            for lane in self._lanes.values():
                lane.waiting.pop(writer, None)

    def mark(self, writer: JobWriter) -> None:
        """The writer has something to say: it leaves in this turn of the loop, or a little later."""
        self._dirty[writer] = None
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    def retry(self, writer: JobWriter, error: Exception) -> None:
        """An append was refused (out of memory, loading, a slot that moves) or lost: later, again."""
        self._saw(writer.keys.meta, error)
        if not isinstance(error, RedisUnavailableError) and code_of(error) != "MOVED":
            _log.warning("Redis refuses an append: %s", error, extra=writer.log_fields)
        self._loop.call_later(RETRY_S, self.mark_if_open, writer)

    def renew(self, job_id: str, args: tuple[str | int, ...], on_reply: Callable[[Reply], None]) -> None:
        """Sends renew.lua's call for a job. No connection, no answer: the next renewal will do."""
        keys = self.keys.job(job_id)
        if connection := self._connection(keys.meta):
            command = pack(("EVALSHA", RENEW.sha, 3, keys.meta, keys.log, keys.cancel, *args))

            def answered(reply: Reply) -> None:
                if isinstance(reply, Exception):
                    self._saw(keys.meta, reply)
                else:
                    on_reply(reply)

            connection.write(command, (answered,))

    def _connection(self, key: str) -> RedisConnection | None:
        link = self.nodes.link(key)
        return link.connection if link is not None else None

    def _saw(self, key: str, error: Exception) -> None:
        self.nodes.saw(error)
        # Redis has forgotten our scripts (SCRIPT FLUSH, a failover): a new connection brings them along.
        if code_of(error) == "NOSCRIPT" and (connection := self._connection(key)):
            connection.abort()

    def mark_if_open(self, writer: JobWriter) -> None:
        if writer in self._writers:
            self.mark(writer)

    def _flush(self) -> None:
        self._is_scheduled = False
        dirty, self._dirty = self._dirty, {}
        lanes: dict[_Lane, None] = {}
        for writer in dirty:
            connection = self._connection(writer.keys.meta)
            # Where there is none, `_connected` marks the writer again, or a move of its slot.
            if connection is not None:
                lane = self._lanes.get(connection) or self._lanes.setdefault(
                    connection, _Lane(connection, self.metrics)
                )
                lane.waiting[writer] = None
                lanes[lane] = None
        for lane in lanes:
            lane.send_if_due()

    async def _connected(self, _: RedisLink, connection: RedisConnection) -> None:
        self._lanes = {known: lane for known, lane in self._lanes.items() if known.is_open}
        for script in (APPEND, REWRITE, RENEW):
            await _load(connection, script)
        self.settled_at = self.time() + SETTLE_S
        self._loop.call_soon(self._mark_all)

    def _mark_all(self) -> None:
        settled_at = self.time() + SETTLE_S
        for writer in self._writers:
            writer.watched_at = max(writer.watched_at, settled_at)
            self.mark(writer)


async def _load(connection: RedisConnection, script: Script) -> Any:  # the digest
    try:
        return await connection.execute("SCRIPT", "LOAD", script.text)
    except hiredis.ReplyError as error:
        raise RedisUnavailableError(f"Redis does not take our script: {error}") from error
