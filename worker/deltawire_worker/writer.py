"""One attempt's events on their way to the log, and in memory in case that Redis loses them.

At most one append of a job is under way. The first event goes at once; what arrives meanwhile is the next
batch. So there is no added delay when idle, and batching grows with the load.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from deltawire.codec import DeltaEncoder, encode_snapshot
from deltawire.events import MAX_EVENT_BYTES
from deltawire.fold import Fold
from deltawire.keys import ACTIVE_TTL_S, LEASE_S
from deltawire.log import AppendCode, append_args, queued_event, rewrite_args
from deltawire.record import Record
from deltawire.redis_connection import Reply, pack
from deltawire.scripts import APPEND, REWRITE

if TYPE_CHECKING:
    from .flusher import Flusher

MAX_PENDING_BYTES: Final = 4 * MAX_EVENT_BYTES
SNAPSHOT_BYTES: Final = 8_192  # of events between two snapshots at the least; two such stretches are kept
STALL_TIMEOUT_S: Final = 60.0

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
        self.keys = flusher.keys.job(job_id)
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
        self._written: asyncio.Future[AppendCode] | None = None
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
        self.watched_at = flusher.time()
        """When a publication last had a receiver; until then, when the attempt began. Loop time."""

    @property
    def next_number(self) -> int:
        """The number of the event that is put next."""
        return self._acknowledged + len(self._events) + 1

    @property
    def log_fields(self) -> dict[str, object]:
        """For lines of our own log."""
        return self._record.log_fields(self._job_id)

    @property
    def settled_at(self) -> float:
        """See `Flusher.settled_at`."""
        return self._flusher.settled_at

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

    async def written(self) -> None:
        """Waits until the log has all that was put, or takes nothing more; the caller sets the deadline."""
        if self._events or self._must_rewrite:
            self._written = asyncio.get_running_loop().create_future()
            await self._written

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
        # As far apart as they are large, so that a stream costs what it is long, not the square of it.
        if self._bytes_since_base > max(SNAPSHOT_BYTES, (self._next_base or self._base).size):
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

    def note(self, name: str, value: str | float) -> None:
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
                        self.keys,
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
            self.keys,
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
        metrics = self._flusher.metrics
        if isinstance(reply, Exception):
            metrics.refusals["error"] += 1
            self._flusher.retry(self, reply)
            return
        code: AppendCode = reply[0].decode()
        if code in {"OK", "CANCELLING"}:
            metrics.appends += 1
            metrics.events += sent
            self._taken(sent, reply[2])
            if code == "CANCELLING":
                self._on_cancel()
            if self._events or self._must_rewrite:
                self._flusher.mark(self)
            else:
                self._settle(code)
            return
        metrics.refusals[code.lower()] += 1
        if code == "CANCELLED" and self._ended is not None:
            self.pending_bytes -= len(self._events.pop())
            self._terminal = ""
            if not self._ended.done():
                self._ended.set_result(code)
        elif code in {"GAP", "MISSING"}:
            _log.warning("Redis has lost events; writing them again", extra=self.log_fields)
            if code == "GAP" and reply[1] >= self._base.number:
                self._go_back(reply[1])
            else:
                self.rewrite()
        else:
            self._events.clear()
            self._must_rewrite = False
            self.pending_bytes = 0
            self._settle(code)
            self._on_refused(code)

    def _go_back(self, top: int) -> None:
        """The log has lost its end only, which is held: it is appended again, and what is older stays."""
        kept = top - self._base.number
        lost = self._recent[kept:]
        del self._recent[kept:]
        self._events[:0] = lost
        self._acknowledged = top
        size = sum(map(len, lost))
        self.pending_bytes += size
        self._log_bytes -= size
        if self._record.first_delta_at is not None:  # the one field that may have gone with them
            self.note("first_delta_at", self._record.first_delta_at)
        self._flusher.mark(self)

    def _settle(self, code: AppendCode) -> None:
        """There is nothing more to say: whoever waited for that hears of it."""
        for waiting in (self._written, self._ended):
            if waiting is not None and not waiting.done():
                waiting.set_result(code)

    def _taken(self, sent: int, receivers: int) -> None:
        done = self._events[:sent]
        del self._events[:sent]
        self._recent += done
        self._acknowledged += sent
        size = sum(map(len, done))
        self.pending_bytes -= size
        if self._is_rewriting:
            self._flusher.metrics.rewrites += 1
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
            self.watched_at = self._flusher.time()


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
