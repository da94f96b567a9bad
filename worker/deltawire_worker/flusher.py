"""From the token loop to the log: batches without a timer, and without ever awaiting Redis.

At most one append of a job is under way. The first event goes at once; what arrives meanwhile is the next
batch. So there is no added delay when idle, and batching grows with the load. The appends of all jobs that
one turn of the loop made leave in one write for each primary.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import hiredis
import msgspec

from deltawire.codec import DeltaEncoder, encode_snapshot
from deltawire.errors import RedisUnavailableError
from deltawire.events import MAX_EVENT_BYTES
from deltawire.fold import Fold
from deltawire.keys import ACTIVE_TTL_S, LEASE_S, Keys
from deltawire.log import AppendCode, append_args, queued_event, rewrite_args
from deltawire.record import Record
from deltawire.redis_connection import RedisConnection, RedisLink, Reply, pack
from deltawire.redis_nodes import RedisNodes, code_of
from deltawire.scripts import APPEND, RENEW, REWRITE, Script

MAX_PENDING_BYTES: Final = 4 * MAX_EVENT_BYTES
MAX_LOG_BYTES: Final = 8_388_608
SNAPSHOT_BYTES: Final = 131_072  # of events between two snapshots; two such stretches are kept
RETRY_S: Final = 0.1
STALL_TIMEOUT_S: Final = 60.0
SETTLE_S: Final = 5.0  # so long relays take to subscribe again when Redis has been away

_log = logging.getLogger(__name__)


class JobWriter:
    """Writes one attempt's events, numbered without a hole.

    It keeps the attempt's recent events, and a snapshot of what came before them, until it is closed: a log
    that Redis has lost, or that has grown long, is written anew from here.
    """

    def __init__(
        self,
        flusher: "Flusher",
        *,
        job_id: str,
        record: Record,
        owner: str,
        top: int,
        on_cancel: Callable[[], None],
        on_refused: Callable[[AppendCode], None],
    ) -> None:
        self._flusher = flusher
        self.key = flusher.keys.job(job_id).meta
        self._job_id = job_id
        self._record = record
        self._owner = owner
        self._encoder = DeltaEncoder(job_id, record.attempt)
        self._on_cancel = on_cancel
        self._on_refused = on_refused
        self._acknowledged = top
        self._events: list[bytes] = []  # those after `_acknowledged`, the ones under way first
        self._under_way: int | None = None  # how many events
        self._is_rewriting = False  # by the call under way
        self._fields: list[str | float] = []
        self._terminal = ""
        self._ttl_s: float = ACTIVE_TTL_S
        self._ended: asyncio.Future[AppendCode] | None = None
        self._room: asyncio.Event | None = None
        # Before the first attempt a log holds nothing, or the `queued` event that its record tells of.
        self._recent = [queued_event(job_id, record)] if top == record.attempt == 1 else []
        """The acknowledged ones after `_base`."""
        self._base = Snapshot(top - len(self._recent), Fold())
        self._next_base: Snapshot | None = None
        self._bytes_since_base = 0
        self._log_bytes = 0
        self._log_bytes_limit = flusher.max_log_bytes
        self._must_rewrite = False
        self.pending_bytes = 0
        self.watched_at = asyncio.get_running_loop().time()
        """When a publication last had a receiver; until then, when the attempt began. Loop time."""

    @property
    def next_number(self) -> int:
        """The number of the event that is put next."""
        return self._acknowledged + len(self._events) + 1

    @property
    def is_ending(self) -> bool:
        """Whether the terminal event has been put."""
        return self._ended is not None

    @property
    def is_full(self) -> bool:
        """Whether the buffer's bound is reached: Redis is slower than the upstream, or away."""
        return self.pending_bytes > MAX_PENDING_BYTES

    async def room(self) -> bool:
        """Waits until the buffer is below its bound; False: Redis took nothing for STALL_TIMEOUT_S."""
        try:
            while self.is_full:
                self._room = asyncio.Event()
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    await self._room.wait()
        except TimeoutError:
            return False
        finally:
            self._room = None
        return True

    def put(self, event: bytes) -> None:
        """Appends an encoded event that has `next_number`."""
        self._events.append(event)
        self._grew(len(event))

    def put_deltas(self, chunks: list[bytes], created_at: float, fold: Fold) -> None:
        """Appends chunks as deltas; `fold` has them already."""
        number = self.next_number
        size = 0
        for chunk in chunks:
            event = self._encoder.encode(number, created_at, chunk)
            self._events.append(event)
            size += len(event)
            number += 1
        self._grew(size)
        if self._bytes_since_base > SNAPSHOT_BYTES:
            self._move_base(number - 1, fold)

    def _grew(self, size: int) -> None:
        self.pending_bytes += size
        self._bytes_since_base += size
        self._flusher.mark(self)

    def _move_base(self, number: int, fold: Fold) -> None:
        """What lies before the snapshot before this one is no longer kept, once the log has it."""
        base = self._next_base
        if base is not None:
            if base.number > self._acknowledged:
                return
            del self._recent[: base.number - self._base.number]
            self._base = base
        self._next_base = Snapshot(number, fold)
        self._bytes_since_base = 0

    def note(self, name: str, value: float) -> None:
        """Sets a field of the record with the next append."""
        self._fields += [name, value]
        self._record = msgspec.structs.replace(self._record, **{name: value})

    async def end(self, event: bytes, *, status: str, retention_s: float) -> AppendCode:
        """Appends the terminal event and waits for the answer; the caller sets the deadline.

        CANCELLED means that the cancel key came first: nothing of it was taken, call again with the
        `cancelled` event. Whatever else is refused stays refused.
        """
        self._terminal = status
        self._ttl_s = retention_s
        self._ended = asyncio.get_running_loop().create_future()
        self.note("finished_at", round(time.time(), 6))
        self.put(event)
        return await self._ended

    def rewrite(self) -> None:
        """The log is lost: it is written anew from what is kept here, unless the job has ended meanwhile."""
        if self._ended is None or not self._ended.done():
            self._must_rewrite = True
            self._flusher.mark_if_open(self)

    # What the flusher calls.

    def command(self) -> bytes | None:
        """The next call, packed; None if there is nothing to say or one is under way."""
        if self._under_way is not None or not (self._events or self._must_rewrite):
            return None
        self._is_rewriting = self._must_rewrite
        if self._must_rewrite:
            # The terminal event comes after, as it always does: by an append.
            events = self._events[:-1] if self._terminal else self._events
            self._under_way = len(events)
            base = self._base
            return pack(
                (
                    *("EVALSHA", REWRITE.sha),
                    *rewrite_args(
                        self._flusher.keys,
                        self._job_id,
                        owner=self._owner,
                        lease_s=LEASE_S,
                        first=base.number + 1,
                        snapshot=base.line(self._job_id, self._record.attempt),
                        events=self._recent + events,
                        record=self._record,
                    ),
                )
            )
        self._under_way = len(self._events)
        args = append_args(
            self._flusher.keys,
            self._job_id,
            attempt=self._record.attempt,
            owner=self._owner,
            first=self._acknowledged + 1,
            events=self._events,
            terminal=self._terminal,
            ttl_s=self._ttl_s,
            fields=self._fields,
        )
        return pack(("EVALSHA", APPEND.sha, *args))

    def answered(self, reply: Reply) -> None:
        """The reply to the call under way."""
        sent, self._under_way = self._under_way or 0, None
        if isinstance(reply, Exception):
            self._flusher.retry(self, reply)
            return
        code: AppendCode = reply[0].decode()
        if code in {"OK", "CANCELLING"}:
            self._taken(sent, reply[2])
            if code == "CANCELLING":
                self._on_cancel()
            if self._events or self._must_rewrite:
                self._flusher.mark(self)
            elif self._ended is not None and not self._ended.done():
                self._ended.set_result(code)
        elif code == "CANCELLED" and self._ended is not None:
            self.pending_bytes -= len(self._events.pop())
            self._terminal = ""
            if not self._ended.done():
                self._ended.set_result(code)
        elif code in {"GAP", "MISSING"}:
            _log.warning("Redis has lost events; writing them again", extra={"job_id": self._job_id})
            self.rewrite()
        else:
            self._events.clear()
            self._must_rewrite = False
            self.pending_bytes = 0
            if self._ended is not None and not self._ended.done():
                self._ended.set_result(code)
            self._on_refused(code)

    def _taken(self, sent: int, receivers: int) -> None:
        done = self._events[:sent]
        del self._events[:sent]
        self._recent += done
        self._acknowledged += sent
        size = sum(map(len, done))
        self.pending_bytes -= size
        if self._is_rewriting:
            self._must_rewrite = False  # the fields still wait: a record that was not lost has none of them
            self._log_bytes = self._base.size + sum(map(len, self._recent))
            # A long text is all snapshot: writing it anew pays only when the log has doubled.
            self._log_bytes_limit = max(self._flusher.max_log_bytes, 2 * self._log_bytes)
        else:
            self._log_bytes += size
            if self._log_bytes > self._log_bytes_limit and not self._terminal:
                self._must_rewrite = True
            if not self._events:
                self._fields.clear()
        if self._room is not None:
            self._room.set()
        if receivers:
            self.watched_at = asyncio.get_running_loop().time()


class Snapshot:
    """The fold up to a number, as of now."""

    def __init__(self, number: int, fold: Fold) -> None:
        self.number = number
        self._state = msgspec.json.encode(fold.state())

    @property
    def size(self) -> int:
        return len(self._state)

    def line(self, job_id: str, attempt: int) -> bytes:
        """As it stands in the log; nothing where there is nothing before it."""
        if self.number == 0:
            return b""
        return encode_snapshot(
            job_id, self.number, attempt=attempt, created_at=time.time(), fold=msgspec.Raw(self._state)
        )


class Flusher:
    """Through which a worker process appends: one connection to each primary of Redis."""

    def __init__(self, url: str, keys: Keys, *, max_log_bytes: int = MAX_LOG_BYTES) -> None:
        self.keys = keys
        self.max_log_bytes = max_log_bytes
        self._nodes = RedisNodes(
            url, name="deltawire-worker-flusher", on_connected=self._connected, on_moved=self._mark_all
        )
        self._writers: set[JobWriter] = set()
        self._dirty: dict[JobWriter, None] = {}
        self._is_scheduled = False

    @property
    def is_connected(self) -> bool:
        return self._nodes.is_connected

    async def start(self) -> None:
        """Raises RedisUnavailableError if Redis is not to be reached."""
        await self._nodes.start()

    async def close(self) -> None:
        await self._nodes.close()

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
        self._dirty.pop(writer, None)

    def mark(self, writer: JobWriter) -> None:
        """The writer has something to say; it leaves at the end of this turn of the loop."""
        self._dirty[writer] = None
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def retry(self, writer: JobWriter, error: Exception) -> None:
        """An append was refused (out of memory, loading, a slot that moves) or lost: later, again."""
        self._saw(writer.key, error)
        if not isinstance(error, RedisUnavailableError) and code_of(error) != "MOVED":
            _log.warning("Redis refuses an append: %s", error)
        asyncio.get_running_loop().call_later(RETRY_S, self.mark_if_open, writer)

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
        link = self._nodes.link(key)
        return link.connection if link is not None else None

    def _saw(self, key: str, error: Exception) -> None:
        self._nodes.saw(error)
        # Redis has forgotten our scripts (SCRIPT FLUSH, a failover): a new connection brings them along.
        if code_of(error) == "NOSCRIPT" and (connection := self._connection(key)):
            connection.abort()

    def mark_if_open(self, writer: JobWriter) -> None:
        if writer in self._writers:
            self.mark(writer)

    def _flush(self) -> None:
        self._is_scheduled = False
        dirty, self._dirty = self._dirty, {}
        batches: dict[RedisConnection, tuple[list[bytes], list[Callable[[Reply], None]]]] = {}
        for writer in dirty:
            connection = self._connection(writer.key)
            # Where there is none, `_connected` marks the writer again, or a move of its slot.
            if connection is not None and (command := writer.command()):
                commands, callbacks = batches.setdefault(connection, ([], []))
                commands.append(command)
                callbacks.append(writer.answered)
        for connection, (commands, callbacks) in batches.items():
            connection.write(b"".join(commands), callbacks)

    async def _connected(self, _: RedisLink, connection: RedisConnection) -> None:
        for script in (APPEND, REWRITE, RENEW):
            await _load(connection, script)
        asyncio.get_running_loop().call_soon(self._mark_all)

    def _mark_all(self) -> None:
        settled_at = asyncio.get_running_loop().time() + SETTLE_S
        for writer in self._writers:
            writer.watched_at = max(writer.watched_at, settled_at)
            self.mark(writer)


async def _load(connection: RedisConnection, script: Script) -> Any:  # the digest
    try:
        return await connection.execute("SCRIPT", "LOAD", script.text)
    except hiredis.ReplyError as error:
        raise RedisUnavailableError(f"Redis does not take our script: {error}") from error
