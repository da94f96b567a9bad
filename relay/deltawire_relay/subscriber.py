"""A subscriber: one reader of one job on one connection. A position, never a queue."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from deltawire.errors import RedisUnavailableError, WireError
from deltawire.log import FIRST_PAGE_EVENTS, next_page_events
from deltawire.messages import Snapshot, Subscribed
from deltawire.record import Record
from deltawire.tracing import Value

from .tail import Batch

if TYPE_CHECKING:
    from .hub import Hub

_log = logging.getLogger(__name__)

PAGE_EVENTS = 256
FIRST_GROWTH = 64  # from a page that only told how large events are; nearly all readers are quick
HEAL_TIMEOUT_S = 10.0
RETRY_S = 1.0
MAX_TRACED = (
    100  # deliveries of one job in this process: ten thousand that end at once would hold up the loop
)


class Sink(Protocol):
    """Where a subscriber's bytes go. `write_*` never block; they may make `is_writable` false."""

    via: str
    """For metrics: `websocket`, `event_stream`, `chat` or `responses`."""

    @property
    def is_writable(self) -> bool: ...
    def write_batch(self, batch: Batch) -> None: ...
    def write_message(self, message: Subscribed | Snapshot) -> None: ...
    def ended(self, subscriber: "Subscriber") -> None:
        """The terminal event has been written."""

    def refused(self, subscriber: "Subscriber", error: WireError) -> None:
        """Nothing will come any more, for this reason."""


class Subscriber:
    """Writes what lies beyond its position, as far as the sink takes it.

    The hub calls `pump` when there is news, the connection when it can take more. Live, late, slow and
    reconnecting readers differ in their position only.
    """

    def __init__(
        self, hub: "Hub", sink: Sink, *, tenant: str | None, position: int = 0, merge: bool = False
    ) -> None:
        self.hub = hub
        self.position = position
        self.origin = position
        """From which what it was given counts: what a snapshot stands for was not."""
        self.via = sink.via
        self.is_open = False
        self.attached_at = asyncio.get_running_loop().time()
        self._began_at = time.time()
        self._began_after = position
        self._sink = sink
        self._tenant = tenant
        self._merge = merge
        self._allowed_by: Record | None = None  # by which it was last found allowed
        self._reading: asyncio.Task[None] | None = None
        self._is_closed = False
        self._page_events = FIRST_PAGE_EVENTS
        self._growth = FIRST_GROWTH

    @property
    def is_allowed(self) -> bool:
        """Whether the job exists for this reader: it has a record, and the record is its tenant's."""
        record = self.hub.record
        return record is not None and (self._tenant is None or record.tenant == self._tenant)

    @property
    def has_all(self) -> bool:
        """Whether nothing is left to be written."""
        return self.position == self.hub.tail.top

    @property
    def is_lagging(self) -> bool:
        """Whether it is behind, and so waits for its sink, or for the log."""
        return self._reading is not None or (self.is_open and not self.has_all)

    @property
    def has_ended(self) -> bool:
        """Whether the terminal event lies at or before the position."""
        return self.is_allowed and self.hub.is_ended and self.position >= self.hub.tail.top

    async def open(self, *, mode: str = "replay", request_id: str | None = None) -> None:
        """Says `subscribed`, then, if asked for or needed, `snapshot`, then events flow.

        Raises RedisUnavailableError. Says nothing if it was closed meanwhile.
        """
        recovered = await self._is_recoverable()
        if self.is_allowed and (mode == "snapshot" or not recovered):
            await self._jump(recovered=recovered, request_id=request_id)
        else:
            self._begin(recovered, None, request_id)
        self.pump()

    async def _is_recoverable(self) -> bool:
        """Whether the log goes on from the position.

        A position above the log's top waits HEAL_TIMEOUT_S for a worker that heals its log.
        """
        hub = self.hub
        if not self.is_allowed:
            return True
        if hub.is_ended and hub.tail.top == 0:
            return False
        if self.position > hub.tail.top:
            return await hub.reaches(self.position, HEAL_TIMEOUT_S)
        return hub.earliest <= self.position + 1

    def _begin(self, recovered: bool, snapshot: Snapshot | None, request_id: str | None) -> None:
        """Without an await: what `subscribed` says is what the first event follows."""
        if self._is_closed:
            return
        hub = self.hub
        self._sink.write_message(
            Subscribed(
                request_id=request_id,
                job_id=hub.job_id,
                status=hub.status if self.is_allowed else "unknown",
                attempt=hub.attempt if self.is_allowed else 0,
                earliest_sequence_number=hub.earliest if self.is_allowed else 0,
                latest_sequence_number=hub.tail.top if self.is_allowed else 0,
                recovered=recovered,
            )
        )
        if snapshot is not None:
            self._sink.write_message(snapshot)
            self._skip_to(snapshot.sequence_number)
        self.is_open = True

    def _skip_to(self, position: int) -> None:
        self.origin += position - self.position
        self.position = position

    async def _heal(self) -> None:
        """The log does not reach to the position: of a job that has just appeared, or Redis lost its end."""
        if not await self._is_recoverable():
            await self._jump()

    async def _jump(
        self, *, beyond: int = -1, recovered: bool = False, request_id: str | None = None
    ) -> None:
        """Goes on from a snapshot. Without one the log is gone, and what is left is the end, or an error."""
        hub = self.hub
        snapshot = await hub.snapshot(request_id)
        if snapshot is not None and beyond >= 0 and (await hub.page(beyond, self._page_events)).lines:
            return  # it was healed whole, and goes on from the position
        if self._is_closed:
            return
        if snapshot is not None and snapshot.sequence_number <= beyond:
            snapshot = None
        is_gone = snapshot is None or (hub.is_ended and hub.tail.top == 0)
        if is_gone and not hub.is_lost:
            self.refuse(WireError("unknown_job", f"the log of job {hub.job_id} is gone"))
            return
        if snapshot is None:
            recovered = False
            self._skip_to(hub.tail.top - 1)
        self._begin(recovered, snapshot, request_id)

    def lose(self) -> None:
        """The log ends at or before the position, and with another event: go on from a snapshot."""
        is_due = self.is_open and self._reading is None and self.position >= self.hub.tail.top
        if is_due and self.is_allowed:
            self._read(self._jump)

    def pump(self) -> None:
        """Writes what is due. Never blocks; may be called at any time."""
        if not self.is_open or self._reading is not None:
            return
        hub, sink = self.hub, self._sink
        if hub.record is None or hub.record is not self._allowed_by:
            if not self.is_allowed:
                return
            self._allowed_by = hub.record
        tail = hub.tail
        if self.position > tail.top:
            self._read(self._heal)
            return
        while self.position < tail.top and sink.is_writable:
            batch = (tail.merged_after if self._merge else tail.after)(self.position)
            if batch is None:
                self._read(self._read_log)
                return
            sink.write_batch(batch)
            self.position = batch.through
        if hub.is_ended and self.has_ended:
            self.is_open = False
            sink.ended(self)

    def close(self) -> None:
        """Stops. Idempotent."""
        if self.hub.tracing.is_on and not self._is_closed:
            self._trace()
        self._is_closed = True
        self.is_open = False
        if self._reading is not None:
            self._reading.cancel()
        self.hub.detach(self)

    def _trace(self) -> None:
        """One span in the job's trace, made when all is over: an open subscription holds none."""
        hub, record = self.hub, self.hub.record
        if record is None or not record.traceparent or not self.is_allowed or hub.traced >= MAX_TRACED:
            return
        hub.traced += 1
        attributes: dict[str, Value] = {
            "deltawire.job.id": hub.job_id,
            "deltawire.starting_after": self._began_after,
            "deltawire.delivered_through": self.position,
            "deltawire.is_whole": self.has_ended,
        }
        hub.tracing.start(
            "deliver", kind="server", parent=record.traceparent, at=self._began_at, attributes=attributes
        ).end()

    def refuse(self, error: WireError) -> None:
        """Ends the subscription with an error."""
        self.is_open = False
        self._sink.refused(self, error)

    def _write(self, batch: Batch) -> None:
        self._sink.write_batch(batch)
        self.position = batch.through

    def _read(self, reading: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._reading = asyncio.create_task(self._read_and_pump(reading), name=f"read-log-{self.hub.job_id}")

    async def _read_and_pump(self, reading: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await reading()
        except RedisUnavailableError as error:
            _log.debug("cannot read the log: %s", error, extra=self.hub.log_fields)
            await asyncio.sleep(RETRY_S)
        finally:
            self._reading = None
        self.pump()

    async def _read_log(self) -> None:
        """Reads the log up to where the tail begins, while the sink takes it. Holds a page at the most."""
        hub = self.hub
        while self.is_open and self._sink.is_writable and self.position < hub.tail.base:
            page = await hub.page(self.position, self._page_events)
            if not page.lines:
                await self._jump(beyond=self.position)
                return
            before = self.position
            for batch in page.merged_batches if self._merge else page.batches:
                if not self._sink.is_writable:
                    break
                self._write(batch)
            self._adapt(page.lines, self.position - before)

    def _adapt(self, page: Sequence[bytes], taken: int) -> None:
        """Pages grow for a quick reader; a slow one's are what it takes, since the rest is read again."""
        growing = min(PAGE_EVENTS, next_page_events(page), self._growth * len(page))
        self._page_events = growing if taken == len(page) else max(1, taken)
        self._growth = 2
