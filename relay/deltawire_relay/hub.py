"""A hub: this process's shared reader of one job.

The order is everything: SUBSCRIBE, wait for the acknowledgement, hold what comes live, read where the log
stands, merge by number, go live with no `await` in between. History first and SUBSCRIBE after loses or
doubles events; a test proves that it does. A hole in the numbers is read from the log, inline, and no
subscriber notices.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from deltawire.codec import decode, is_terminal, type_of
from deltawire.errors import GapError, RedisUnavailableError, WireError
from deltawire.fold import LogFold, fold_pages
from deltawire.log import Head, JobLog
from deltawire.messages import Snapshot
from deltawire.record import Record

from .feed import Feed
from .subscriber import Subscriber
from .tail import Tail

_log = logging.getLogger(__name__)

UNKNOWN_JOB_TIMEOUT_S: Final = 60.0
CHECK_INTERVAL_S: Final = 1.0
TAIL_CHECK_AFTER_S: Final = 3.0
OPEN_TIMEOUT_S: Final = 5.0
MAX_HELD_BYTES: Final = 1_048_576
RETRY_S: Final = 0.05
RETRY_MAX_S: Final = 1.0
GAP_LOOKS: Final = 5
LOST_LOOKS: Final = 3

_LIFECYCLE: Final = frozenset(
    {b"queued", b"in_progress", b"completed", b"incomplete", b"failed", b"cancelled"}
)


class Hub:
    """Reads one job for all its subscribers in this process."""

    def __init__(self, job_id: str, log: JobLog, feed: Feed) -> None:
        self.job_id = job_id
        self.record: Record | None = None
        self.status = "unknown"
        self.attempt = 0
        self.earliest = 0
        self.tail = Tail()
        self.is_ended = False
        self.subscribers: set[Subscriber] = set()
        self._log = log
        self._feed = feed
        self._channel = log.keys.job(job_id).channel
        self._held: list[bytes] | None = []  # payloads that wait for the log; None while live
        self._held_bytes = 0
        self._lost_looks = 0
        self._has_dropped = False  # what was held, since the log was read last
        self._catching_up: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._last_event_at = asyncio.get_running_loop().time()
        self._fold = LogFold()
        self._fold_lock = asyncio.Lock()
        self._news = asyncio.Event()

    async def open(self) -> None:
        """Goes live. Raises RedisUnavailableError; close it then, too."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._feed.subscribe(self._channel, self)
                await self._catch_up()
        except TimeoutError as error:
            raise RedisUnavailableError("no subscription within the time allowed") from error
        self._checking = asyncio.create_task(self._check(), name=f"hub-check-{self.job_id}")

    def close(self) -> None:
        """Leaves the channel and ends the hub's tasks. Idempotent."""
        self._feed.unsubscribe(self._channel)
        for task in (self._catching_up, self._checking):
            if task is not None:
                task.cancel()

    def detach(self, subscriber: Subscriber) -> None:
        self.subscribers.discard(subscriber)

    # What the feed calls.

    def received(self, payload: bytes) -> None:
        if self._held is not None:
            self._held.append(payload)
            self._held_bytes += len(payload)
            if self._held_bytes > MAX_HELD_BYTES:
                # The log has them, too, when it can be read again.
                self._held.clear()
                self._held_bytes = 0
                self._has_dropped = True
        elif self.record is None or not self._merge([payload]):
            self._hold([payload])

    def flush(self) -> None:
        for subscriber in tuple(self.subscribers):
            subscriber.pump()

    def reconnected(self) -> None:
        if self._held is None:
            self._hold([])

    # What subscribers and the jobs API call.

    async def read(self, after: int, count: int) -> list[bytes]:
        """At most `count` events of the log after `after`, none of which the tail holds."""
        return await self._log.read(self.job_id, after, self.tail.base, count=count)

    async def reaches(self, position: int, timeout_s: float) -> bool:
        """Whether the log's top reaches `position` within the time allowed, and before the job ends."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.tail.top < position:
                    if self.is_ended:
                        return False
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def ends(self, timeout_s: float) -> bool:
        """Whether the terminal event comes within the time allowed."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_ended:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def snapshot(self, request_id: str | None = None) -> Snapshot:
        """The fold of the log up to its top; the terminal event is never part of it, so that it still comes.

        Later calls go on from where the last one stood.
        """
        async with self._fold_lock:
            through = self.tail.top - self.is_ended
            await fold_pages(self._fold, self._log.pages(self.job_id, self._fold.sequence_number, through))
            return Snapshot(
                request_id=request_id,
                job_id=self.job_id,
                sequence_number=self._fold.sequence_number,
                completion=self._fold.completion(),
            )

    # Inside.

    def _merge(self, payloads: list[bytes]) -> bool:
        """Adds live payloads to the tail. False: events are missing before one of them."""
        for payload in payloads:
            try:
                self._note(self.tail.extend(payload.split(b"\n")))
            except GapError:
                return False
            except ValueError:
                _log.warning("a message on the channel is no event", extra={"job_id": self.job_id})
        return True

    def _note(self, lines: list[bytes]) -> None:
        if not lines:
            return
        for line in lines:
            kind = type_of(line)
            if kind in _LIFECYCLE:
                self.status = kind.decode()
                if kind == b"in_progress":
                    event = decode(line)
                    self.attempt = event.attempt
                self.is_ended = is_terminal(line)
        self._last_event_at = asyncio.get_running_loop().time()
        self._news.set()

    def _hold(self, payloads: list[bytes]) -> None:
        """Holds live payloads back until the log has been read."""
        self._held = payloads
        self._held_bytes = sum(map(len, payloads))
        self._catching_up = asyncio.create_task(self._catch_up_and_pump(), name=f"catch-up-{self.job_id}")

    async def _catch_up_and_pump(self) -> None:
        pause_s = RETRY_S
        while True:
            try:
                await self._catch_up()
            except RedisUnavailableError:
                await asyncio.sleep(pause_s)
                pause_s = min(RETRY_MAX_S, pause_s * 2)
            else:
                self.flush()
                return

    async def _catch_up(self) -> None:
        """Reads what the log has beyond the tail, then merges what was held and goes live."""
        for look in range(GAP_LOOKS):
            self._has_dropped = False
            if self.record is None:
                self._begin_at(await self._log.head(self.job_id))
            else:
                async for page in self._log.pages(self.job_id, self.tail.top):
                    self._take(page)
            # No await between here and going live.
            held, self._held, self._held_bytes = self._held or [], [], 0
            if (self.record is None or self._merge(held)) and not self._has_dropped:
                self._held = None
                return
            self._held = held
            await asyncio.sleep(RETRY_S * look)
        # A message whose predecessors never reach the log: Redis has lost them. The log is what counts.
        self._held = None

    def _take(self, page: list[bytes]) -> None:
        """Adds a page of the log to the tail."""
        try:
            self._note(self.tail.extend(page))
        except GapError as error:
            # The log itself has a hole. Whoever stands before it is told so when it reads on.
            self.tail = Tail(error.got - 1)
            self._note(self.tail.extend(page))

    async def _compare(self) -> None:
        """Looks at the log's end: further than the tail's (a lost message), or nearer (lost writes)."""
        head = await self._log.head(self.job_id)
        if self._held is not None:
            return
        if head.top > self.tail.top:
            self._hold([])
        elif self.record is None or (head.record is not None and head.top == self.tail.top):
            self._lost_looks = 0
        else:
            # One look is not enough: a worker that holds the events may be about to heal the log.
            self._lost_looks += 1
            if self._lost_looks >= LOST_LOOKS:
                self._lost_looks = 0
                self._lose(head)

    def _lose(self, head: Head) -> None:
        """Redis has lost acknowledged writes for good: what is left is the log."""
        _log.warning("the log has lost events", extra={"job_id": self.job_id})
        if head.record is None:
            for subscriber in tuple(self.subscribers):
                subscriber.refuse(WireError("unknown_job", "the job is gone from Redis"))
            return
        self._begin_at(head)
        self._fold = LogFold()
        self.flush()

    def _begin_at(self, head: Head) -> None:
        self.record, self.earliest = head.record, head.earliest
        if head.record is not None:
            self.status, self.attempt = head.record.status, head.record.attempt
            self.is_ended = head.record.is_terminal
            self.tail = Tail(head.top)
            self._news.set()

    async def _check(self) -> None:
        """Once a second, what pub/sub does not tell: a bare cancel key, a lost message, too long a wait."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            now = loop.time()
            for subscriber in tuple(self.subscribers):
                if not subscriber.is_allowed and now - subscriber.attached_at >= UNKNOWN_JOB_TIMEOUT_S:
                    subscriber.refuse(
                        WireError("unknown_job", f"no such job came within {UNKNOWN_JOB_TIMEOUT_S:.0f} s")
                    )
            if self.is_ended:
                continue
            try:
                if self.status == "queued" and await self._log.cancel_request(self.job_id):
                    await self._log.cancel(self.job_id, reason="cancel_key")
                if self._held is None and (
                    self.record is None or now - self._last_event_at >= TAIL_CHECK_AFTER_S
                ):
                    self._last_event_at = now
                    await self._compare()
            except RedisUnavailableError as error:
                _log.warning("cannot check on %s: %s", self.job_id, error)


class Hubs:
    """The hubs of this process, by job; a hub lives as long as somebody holds it."""

    def __init__(self, log: JobLog, feed: Feed) -> None:
        self._log = log
        self._feed = feed
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @asynccontextmanager
    async def hold(self, job_id: str) -> AsyncIterator[Hub]:
        """The live hub of a job. Raises RedisUnavailableError."""
        hub, release = await self.acquire(job_id)
        try:
            yield hub
        finally:
            release()

    async def acquire(self, job_id: str) -> tuple[Hub, Callable[[], None]]:
        """As `hold`, for callers whose use does not nest; call the second value once when done."""
        entry = self._entries.get(job_id)
        if entry is None:
            entry = self._entries[job_id] = _Entry(Hub(job_id, self._log, self._feed))
        entry.holders += 1
        try:
            # One opening for all; whoever is cancelled meanwhile does not cancel it for the others.
            await asyncio.shield(entry.opened)
        except BaseException:
            self._release(entry)
            raise
        return entry.hub, lambda: self._release(entry)

    def _release(self, entry: "_Entry") -> None:
        entry.holders -= 1
        if entry.holders == 0:
            if self._entries.get(entry.hub.job_id) is entry:
                del self._entries[entry.hub.job_id]
            entry.opened.cancel()
            entry.hub.close()


class _Entry:
    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.holders = 0
        self.opened = asyncio.create_task(hub.open(), name=f"hub-open-{hub.job_id}")
