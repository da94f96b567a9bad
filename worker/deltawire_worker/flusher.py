"""From the token loop to the log: batches without a timer, and without ever awaiting Redis.

At most one append of a job is under way. The first event goes at once; what arrives meanwhile is the next
batch. So there is no added delay when idle, and batching grows with the load. The appends of all jobs that
one turn of the loop made leave in one write.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import hiredis

from deltawire.codec import DeltaEncoder
from deltawire.errors import RedisUnavailableError
from deltawire.events import MAX_EVENT_BYTES
from deltawire.keys import ACTIVE_TTL_S, JobKeys, Keys
from deltawire.log import APPEND, RENEW, AppendCode, Script, append_args
from deltawire.redis_connection import RedisConnection, RedisLink, Reply, pack

MAX_PENDING_BYTES: Final = 4 * MAX_EVENT_BYTES
RETRY_S: Final = 0.1
STALL_TIMEOUT_S: Final = 30.0

_log = logging.getLogger(__name__)


class JobWriter:
    """Writes one attempt's events, numbered without a hole."""

    def __init__(
        self,
        flusher: "Flusher",
        keys: JobKeys,
        *,
        job_id: str,
        attempt: int,
        top: int,
        on_cancel: Callable[[], None],
        on_refused: Callable[[AppendCode], None],
    ) -> None:
        self._flusher = flusher
        self._keys = keys
        self._attempt = attempt
        self._encoder = DeltaEncoder(job_id, attempt)
        self._on_cancel = on_cancel
        self._on_refused = on_refused
        self._acknowledged = top
        self._events: list[bytes] = []  # those after `_acknowledged`, the ones under way first
        self._under_way = 0
        self._fields: list[str | float] = []
        self._terminal = ""
        self._ttl_s: float = ACTIVE_TTL_S
        self._ended: asyncio.Future[AppendCode] | None = None
        self._room: asyncio.Event | None = None
        self.pending_bytes = 0

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
        self.pending_bytes += len(event)
        self._flusher.mark(self)

    def put_deltas(self, chunks: list[bytes], created_at: float) -> None:
        """Appends chunks as deltas."""
        number = self.next_number
        for chunk in chunks:
            event = self._encoder.encode(number, created_at, chunk)
            self._events.append(event)
            self.pending_bytes += len(event)
            number += 1
        self._flusher.mark(self)

    def note(self, name: str, value: float) -> None:
        """Sets a field of the record with the next append."""
        self._fields += [name, value]

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

    # What the flusher calls.

    def command(self) -> bytes | None:
        """The next append, packed; None if there is nothing to say or one is under way."""
        if self._under_way or not self._events:
            return None
        self._under_way = len(self._events)
        args = append_args(
            self._keys,
            attempt=self._attempt,
            first=self._acknowledged + 1,
            events=self._events,
            terminal=self._terminal,
            ttl_s=self._ttl_s,
            fields=self._fields,
        )
        return pack(("EVALSHA", APPEND.sha, *args))

    def answered(self, reply: Reply) -> None:
        """The reply to the append under way."""
        sent, self._under_way = self._under_way, 0
        if isinstance(reply, Exception):
            if not isinstance(reply, RedisUnavailableError):
                self._flusher.retry(self, reply)
            return  # a lost connection: what was under way is sent again on the next one
        code: AppendCode = reply[0].decode()
        if code in {"OK", "CANCELLING"}:
            done = self._events[:sent]
            del self._events[:sent]
            self._acknowledged += sent
            self.pending_bytes -= sum(map(len, done))
            if not self._events:
                self._fields.clear()
            if self._room is not None:
                self._room.set()
            if code == "CANCELLING":
                self._on_cancel()
            if self._events:
                self._flusher.mark(self)
            elif self._ended is not None and not self._ended.done():
                self._ended.set_result(code)
        elif code == "CANCELLED" and self._ended is not None:
            self.pending_bytes -= len(self._events.pop())
            self._terminal = ""
            if not self._ended.done():
                self._ended.set_result(code)
        else:
            self._events.clear()
            self.pending_bytes = 0
            if self._ended is not None and not self._ended.done():
                self._ended.set_result(code)
            self._on_refused(code)


class Flusher:
    """The one connection over which a worker process appends."""

    def __init__(self, url: str, keys: Keys) -> None:
        self._keys = keys
        self._link = RedisLink(
            url, name="deltawire-worker-flusher", on_connected=self._connected, on_lost=self._lost
        )
        self._writers: set[JobWriter] = set()
        self._dirty: dict[JobWriter, None] = {}
        self._is_scheduled = False

    @property
    def is_connected(self) -> bool:
        return self._link.connection is not None

    async def start(self) -> None:
        """Raises RedisUnavailableError if Redis is not to be reached."""
        await self._link.start()

    async def close(self) -> None:
        await self._link.close()

    def open(
        self,
        job_id: str,
        *,
        attempt: int,
        top: int,
        on_cancel: Callable[[], None],
        on_refused: Callable[[AppendCode], None],
    ) -> JobWriter:
        """A writer for one attempt, whose log ends at `top`. Close it."""
        writer = JobWriter(
            self,
            self._keys.job(job_id),
            job_id=job_id,
            attempt=attempt,
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
        """Redis answered an append with an error (out of memory, read-only, loading): later, again."""
        _log.warning("Redis refuses an append: %s", error)
        self._bring_scripts(error)
        asyncio.get_running_loop().call_later(RETRY_S, self._mark_if_open, writer)

    def renew(self, job_id: str, args: tuple[str | int, ...], on_reply: Callable[[Reply], None]) -> None:
        """Sends renew.lua's call for a job. No connection, no answer: the next renewal will do."""
        if connection := self._link.connection:
            keys = self._keys.job(job_id)
            command = pack(("EVALSHA", RENEW.sha, 3, keys.meta, keys.log, keys.cancel, *args))

            def answered(reply: Reply) -> None:
                if isinstance(reply, Exception):
                    self._bring_scripts(reply)
                else:
                    on_reply(reply)

            connection.write(command, (answered,))

    def _bring_scripts(self, error: Exception) -> None:
        """Redis has forgotten our scripts (SCRIPT FLUSH, a failover): a new connection brings them along."""
        if str(error).startswith("NOSCRIPT") and (connection := self._link.connection):
            connection.abort()

    def _mark_if_open(self, writer: JobWriter) -> None:
        if writer in self._writers:
            self.mark(writer)

    def _flush(self) -> None:
        self._is_scheduled = False
        connection = self._link.connection
        if connection is None:
            return  # `_connected` marks all
        dirty, self._dirty = self._dirty, {}
        commands: list[bytes] = []
        callbacks: list[Callable[[Reply], None]] = []
        for writer in dirty:
            if command := writer.command():
                commands.append(command)
                callbacks.append(writer.answered)
        if commands:
            connection.write(b"".join(commands), callbacks)

    async def _connected(self, connection: RedisConnection) -> None:
        for script in (APPEND, RENEW):
            await _load(connection, script)
        asyncio.get_running_loop().call_soon(self._mark_all)

    def _mark_all(self) -> None:
        for writer in self._writers:
            self.mark(writer)

    def _lost(self) -> None:
        # Every append under way has had its callback by now; `_connected` sends them again.
        self._dirty.clear()


async def _load(connection: RedisConnection, script: Script) -> Any:  # the digest
    try:
        return await connection.execute("SCRIPT", "LOAD", script.text)
    except hiredis.ReplyError as error:
        raise RedisUnavailableError(f"Redis does not take our script: {error}") from error
