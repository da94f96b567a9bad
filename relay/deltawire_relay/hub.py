"""A hub: this process's shared reader of one job.

The order is everything: SUBSCRIBE, wait for the acknowledgement, hold what comes live, read where the log
stands, merge by number, go live with no `await` in between. History first and SUBSCRIBE after loses or
doubles events; a test proves that it does. A hole in the numbers is read from the log, inline, and no
subscriber notices. While nothing can be subscribed to, a hub opens all the same, and `Standby` reads on for
it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from deltawire.codec import (
    decode,
    delta_head,
    encode_terminal,
    is_delta,
    is_snapshot,
    is_terminal,
    sequence_number_of,
    type_of,
)
from deltawire.ending import AsFailed, terminal_event
from deltawire.errors import GapError, RedisUnavailableError, WireError
from deltawire.fold import Fold
from deltawire.log import NEWS_LINES, Head, JobLog
from deltawire.log_fold import LogFold, fold_pages
from deltawire.messages import Snapshot
from deltawire.outputs import judge
from deltawire.record import Record
from deltawire.tracing import OFF, Tracing

from .feed import Feed
from .metrics import SAMPLED_EVERY_S, HubMetrics
from .page import Page, PageReads
from .subscriber import Subscriber
from .tail import Tail

_log = logging.getLogger(__name__)

UNKNOWN_JOB_TIMEOUT_S: Final = 60.0
OPEN_TIMEOUT_S: Final = 10.0
SUBSCRIBE_LOOK_S: Final = 0.5
DEGRADED_AFTER_S: Final = 1.0
HEAL_TIMEOUT_S: Final = 15.0  # longer than LOST_LOOKS take
HEAL_LOOK_S: Final = 0.5
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

    def __init__(
        self,
        job_id: str,
        log: JobLog,
        feed: Feed,
        report: Callable[[str], None],
        page_reads: PageReads,
        *,
        metrics: HubMetrics,
        tracing: Tracing = OFF,
    ) -> None:
        self.job_id = job_id
        self.tracing = tracing
        self.traced = 0  # deliveries that were told to it
        self.record: Record | None = None
        self.status = "unknown"
        self.attempt = 0
        self.earliest = 0
        self.tail = Tail()
        self.is_ended = False
        self.is_lost = False  # ended by this hub, since Redis has lost the job
        self.subscribers: set[Subscriber] = set()
        self._log = log
        self._feed = feed
        self._report = report
        self._page_reads = page_reads
        self._metrics = metrics
        self._sampled_at = 0.0  # when it was last looked how long events take to here
        self._delta_head = delta_head(job_id)
        self._channel = log.keys.job(job_id).channel
        self._held: list[bytes] | None = []  # payloads that wait for the log; None while live
        self._held_bytes = 0
        self._lost_looks = 0
        self._has_dropped = False  # what was held, or never heard, since the log was read last
        self._subscribing: asyncio.Task[None] | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._is_closed = False
        self._looks = 0
        self._time = asyncio.get_running_loop().time
        self._last_event_at = self._seen_at = self._time()
        self._has_expired = False  # as far as we know, if the record is gone
        self._fold = LogFold()
        self._fold_lock = asyncio.Lock()
        self._pages: dict[tuple[int, int], asyncio.Task[Page]] = {}  # that are being read
        self._news = asyncio.Event()

    @property
    def is_listening(self) -> bool:
        """Whether it has subscribed: from then on workers see that the job is watched."""
        return self._subscribing is not None and self._subscribing.done()

    @property
    def is_live(self) -> bool:
        """Whether it follows a job that has not ended, and reads nothing just now."""
        return self.record is not None and self._is_following

    @property
    def _is_following(self) -> bool:
        return not (self.is_ended or self._is_closed or self._held is not None)

    async def open(self) -> None:
        """Goes live. Raises RedisUnavailableError; close it then, too.

        Where the subscription is not to be had soon, the log is enough to begin with.
        """
        subscribing = asyncio.create_task(
            self._feed.subscribe(self._channel, self), name=f"hub-subscribe-{self.job_id}"
        )
        self._subscribing = subscribing
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                while not subscribing.done() and self._feed.silent_s < DEGRADED_AFTER_S:
                    await asyncio.wait([subscribing], timeout=SUBSCRIBE_LOOK_S)
                if not subscribing.done():
                    subscribing.add_done_callback(self._on_late_subscription)
                await self._catch_up()
        except TimeoutError as error:
            raise RedisUnavailableError("the log could not be read within the time allowed") from error

    def _on_late_subscription(self, subscribing: asyncio.Task[None]) -> None:
        if not subscribing.cancelled():
            self.reconnected()

    def close(self) -> None:
        """Leaves the channel and ends the hub's tasks. Idempotent."""
        self._is_closed = True
        self._feed.unsubscribe(self._channel)
        for task in (self._subscribing, self._catching_up, *self._pages.values()):
            if task is not None:
                task.cancel()

    def detach(self, subscriber: Subscriber) -> None:
        """Idempotent."""
        if subscriber in self.subscribers:
            self.subscribers.remove(subscriber)
            self._metrics.delivered += subscriber.position - subscriber.origin

    @property
    def log_fields(self) -> dict[str, object]:
        """For lines of our own log."""
        if self.record is None:
            return {"job_id": self.job_id}
        return {**self.record.log_fields(self.job_id), "attempt": self.attempt}

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
                self._metrics.repairs["overflow"] += 1
        elif self.record is None:
            self._hold([payload])
        elif not (self._follows(payload) or self._merge([payload])):
            self._metrics.repairs["gap"] += 1
            self._hold([payload])

    def _follows(self, payload: bytes) -> bool:
        """Takes what nearly all messages are, the deltas that follow, unread. False: it is none of these."""
        lines = payload.split(b"\n")
        tail, head = self.tail, self._delta_head
        for number, line in enumerate(lines, tail.top + 1):
            if not line.startswith(b"%s%d," % (head, number)):
                return False
        for line in lines:
            tail.append(line)
        self._heard()
        return True

    def flush(self) -> None:
        for subscriber in tuple(self.subscribers):
            subscriber.pump()
        if self._last_event_at - self._sampled_at >= SAMPLED_EVERY_S:
            self._sample()

    def _sample(self) -> None:
        """Notes how long the newest event has taken to here, if it is a delta that somebody reads."""
        line = self.tail.newest
        if self._held is not None or line is None or not is_delta(line):
            return
        if any(subscriber.has_all for subscriber in self.subscribers):
            self._sampled_at = self._last_event_at
            self._metrics.written(line)

    def reconnected(self) -> None:
        self._metrics.repairs["reconnect"] += 1
        if self._held is None:
            self._hold([])
        else:
            self._has_dropped = True

    # What looks after all hubs calls.

    def refuse_strangers(self) -> None:
        """Refuses those for whom no job has come in time."""
        now = asyncio.get_running_loop().time()
        for subscriber in tuple(self.subscribers):
            if not subscriber.is_allowed and now - subscriber.attached_at >= UNKNOWN_JOB_TIMEOUT_S:
                subscriber.refuse(
                    WireError("unknown_job", f"no such job came within {UNKNOWN_JOB_TIMEOUT_S:.0f} s")
                )

    def is_silent(self, for_s: float) -> bool:
        """Whether it follows a job of which nothing was heard for so long, or ever."""
        if not self._is_following:
            return False
        return self.record is None or asyncio.get_running_loop().time() - self._last_event_at >= for_s

    @property
    def is_in_doubt(self) -> bool:
        """Whether only `compare` will do."""
        return self.record is None or self._lost_looks > 0

    def begin_look(self) -> int:
        """Until the next one it is not silent any more. Returns the look's number."""
        self._last_event_at = asyncio.get_running_loop().time()
        self._looks += 1
        return self._looks

    def saw(self, top: int, lines: list[bytes]) -> bool:
        """Takes what the log has from event `top` on, where the tail ended. False: there is nothing."""
        if not lines:
            return False
        if self._is_following:
            self._seen_at = asyncio.get_running_loop().time()
        if len(lines) > 1 or sequence_number_of(lines[0]) != top:
            self._metrics.repairs["tail"] += self.is_live
            self.read_on(lines)
        return True

    async def compare(self) -> None:
        """Looks at the record and the log's end: beyond the tail (a lost message) or before it (lost writes).

        Raises RedisUnavailableError.
        """
        head = await self._log.head(self.job_id)
        if not self._is_following:
            return
        if head.is_overdue(time.time()):
            self._report(self.job_id)
        now = asyncio.get_running_loop().time()
        if head.record is not None:
            self._seen_at = now
        # A job that has ended at a number at which we have another event began its log anew.
        is_lost = head.record is None or head.top < self.tail.top or head.record.is_terminal
        if head.top > self.tail.top:
            self._lost_looks = 0
            self._metrics.repairs["tail"] += self.record is not None
            self._hold([])
        elif self.record is None or not is_lost:
            self._lost_looks = 0
        else:
            # One look is not enough: a worker that holds the events may be about to heal the log.
            if self._lost_looks == 0:
                self._has_expired = now - self._seen_at >= self.record.options.retention_s
            self._lost_looks += 1
            if self._lost_looks < LOST_LOOKS:
                return
            if head.record is None and not self._has_expired:
                self._has_expired = await self._log.is_over(self.job_id)
                if self._lost_looks < LOST_LOOKS or not self._is_following:  # heard of meanwhile
                    return
            self._lost_looks = 0
            self._lose(head)

    # What subscribers and the jobs API call.

    async def page(self, after: int, count: int) -> Page:
        """At most `count` events of the log after `after`, none of which the tail holds.

        Empty where they are gone. All who ask for the same page while it is read share it.
        """
        reading = self._pages.get((after, count))
        if reading is None:
            reading = asyncio.create_task(self._read_page(after, count), name=f"read-log-{self.job_id}")
            self._pages[after, count] = reading
        # Whoever leaves meanwhile does not take it from the others.
        return await asyncio.shield(reading)

    def read_on(self, lines: list[bytes]) -> None:
        """Takes what the log has beyond the tail, while pub/sub does not bring it."""
        if not self.is_live:
            return
        if not self._take(lines) or len(lines) >= NEWS_LINES:  # there may be more
            self._hold([])
        self.flush()

    async def reaches(self, position: int, timeout_s: float) -> bool:
        """Whether the log's top reaches `position` within the time allowed, and before the job ends.

        Raises RedisUnavailableError: a log that cannot be read may reach anywhere.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self.tail.top < position:
                    if self.is_ended:
                        return False
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return (await self._log.head(self.job_id)).top >= position
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

    async def snapshot(self, request_id: str | None = None) -> Snapshot | None:
        """The fold of the log up to its top; the terminal event is never part of it, so that it still comes.

        Later calls go on from where the last one stood. None where the log is gone: at once if the job has
        ended, else when no worker has healed the log in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + HEAL_TIMEOUT_S
        async with self._fold_lock:
            while True:
                is_last_try = self.is_ended or loop.time() >= deadline
                if await self._fold_on():
                    break
                if is_last_try:
                    return None
                if self.is_live:
                    self._hold([])  # it may go on from a snapshot above the top
                await asyncio.sleep(HEAL_LOOK_S)
            self._metrics.snapshots += 1
            return Snapshot(
                request_id=request_id,
                job_id=self.job_id,
                sequence_number=self._fold.sequence_number,
                completion=self._fold.completion(),
            )

    # Inside.

    async def _fold_on(self) -> bool:
        """Brings the fold to the top. False: it lacks events that neither the log nor the tail has."""
        fold, through = self._fold, self.tail.top - self.is_ended
        if fold.sequence_number < min(self.tail.base, through):
            await fold_pages(fold, self._log.pages(self.job_id, fold.sequence_number, through))
        return fold is self._fold and self._fold_tail(through)

    def _fold_tail(self, through: int) -> bool:
        """Adds what the tail has. False: it does not go back far enough."""
        fold = self._fold
        while fold.sequence_number < through:
            batch = self.tail.after(fold.sequence_number)
            if batch is None:
                return False
            fold.add_all(batch.lines[: through - fold.sequence_number])
        return True

    async def _read_page(self, after: int, count: int) -> Page:
        self._metrics.log_reads += 1
        try:
            async with self._page_reads.room(self.tail.base - after):
                lines = await self._log.read(self.job_id, after, self.tail.base, count=count)
        finally:
            del self._pages[after, count]
        if not lines:
            return Page()
        first = sequence_number_of(lines[0]) + is_snapshot(lines[0])
        if first != after + 1:
            self.earliest = first
            return Page()
        return Page(after, lines)

    def _merge(self, payloads: list[bytes]) -> bool:
        """Adds live payloads to the tail. False: events are missing before one of them."""
        for payload in payloads:
            try:
                lines = payload.split(b"\n")
                if is_snapshot(lines[0]):  # of a log that was healed; what it stands for we have, or read
                    if sequence_number_of(lines[0]) > self.tail.top:
                        return False
                    del lines[0]
                self._note(self.tail.extend(lines))
            except GapError:
                return False
            except ValueError:
                _log.warning("a message on the channel is no event", extra=self.log_fields)
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
        self._heard()

    def _heard(self) -> None:
        self._last_event_at = self._seen_at = self._time()
        self._lost_looks = 0
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
                    if not self._take(page):
                        # It begins with a snapshot now, or has a hole. Whoever stands before that is
                        # told so when it reads on.
                        self._begin_at(await self._log.head(self.job_id))
                        break
            # No await between here and going live.
            held, self._held, self._held_bytes = self._held or [], [], 0
            if (self.record is None or self._merge(held)) and not self._has_dropped:
                self._held = None
                return
            self._held = held
            await asyncio.sleep(RETRY_S * look)
        # A message whose predecessors never reach the log: Redis has lost them. The log is what counts.
        self._held = None

    def _take(self, page: list[bytes]) -> bool:
        """Adds a page of the log to the tail. False: events are missing before it, in the log itself."""
        has_snapshot = is_snapshot(page[0])
        if has_snapshot and sequence_number_of(page[0]) > self.tail.top:
            return False
        try:
            self._note(self.tail.extend(page[has_snapshot:]))
        except GapError:
            return False
        return True

    def _lose(self, head: Head) -> None:
        """Redis has lost acknowledged writes for good: what is left is the log."""
        _log.warning("the log has lost events", extra=self.log_fields)
        self._metrics.repairs["state_lost"] += 1
        if head.record is not None:
            self._begin_at(head)
            self._fold = LogFold()
            for subscriber in tuple(self.subscribers):
                subscriber.lose()
            self.flush()
        elif self._has_expired:
            # It may well have ended, unheard, and been forgotten as it should.
            for subscriber in tuple(self.subscribers):
                if subscriber.is_allowed:
                    subscriber.refuse(WireError("unknown_job", "the job is gone from Redis"))
        else:
            self._end_lost()

    def _end_lost(self) -> None:
        """Ends the job for those who watch it. Nobody can write this event to the log: there is none."""
        assert self.record is not None  # noqa: S101 - only what was there can be lost
        has_all = not self._fold_lock.locked() and self._fold_tail(self.tail.top)
        now = time.time()
        fold = self._fold.fold if has_all else Fold()
        event = terminal_event(
            AsFailed(WireError("state_lost", "Redis has lost the job; submit it again"), "relay"),
            job_id=self.job_id,
            sequence_number=self.tail.top + 1,
            attempt=self.attempt,
            now=now,
            fold=fold,
            timings=self.record.timings(now),
            outputs=judge(fold.completion(), None, is_over=False),
        )
        self.is_lost = True
        self._note(self.tail.extend([encode_terminal(event)]))
        self.flush()

    def _begin_at(self, head: Head) -> None:
        """Goes on from where the log stands, if there is a record; whoever needs older events reads them."""
        if head.record is None:
            return
        self.record, self.earliest = head.record, head.earliest
        self.status, self.attempt = head.record.status, head.record.attempt
        self.is_ended = head.record.is_terminal
        self.tail = Tail(head.top)
        self._news.set()
