"""An in-memory Redis for one hub: a log and a feed with the real interfaces, and a hand on every moment.

`moments` names each point at which the code under test waits: `subscribe:sent`, `subscribe:acknowledged`,
`head:sent`, `head:read`, and so on. A test hooks in there and changes the world in between.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from deltawire.codec import encode_snapshot, is_snapshot, sequence_number_of, type_of
from deltawire.errors import RedisUnavailableError, WireError
from deltawire.events import TERMINAL_STATUSES
from deltawire.keys import Keys
from deltawire.log import NEWS_LINES, Cancellation, Head, JobLog
from deltawire.log_fold import LogFold
from deltawire.messages import Snapshot, Subscribed
from deltawire.options import OnAbandon, Options
from deltawire.record import Record
from deltawire_relay.feed import Feed, Listener
from deltawire_relay.subscriber import Subscriber
from deltawire_relay.tail import Batch
from tests.support.sample_events import CREATED_AT

LATENCY_S = 0.001


class FakeRedis:
    """The truth about one job, and who listens to it."""

    def __init__(self, *, tenant: str = "default") -> None:
        self.tenant = tenant
        self.retention_s = 3600.0
        self.on_abandon: OnAbandon = "continue"
        self.has_record = False
        self.lines: list[bytes] = []  # the log
        self.history: list[bytes] = []  # all events that were ever appended: event N is the Nth
        self.trimmed = 0  # how many events at the beginning of `lines` are gone
        self.listener: Listener | None = None
        self.is_away = False
        self.away_for: set[str] = set()  # commands that fail
        self.error: Exception | None = None  # what every command answers
        self.is_cancel_requested = False
        self.is_over = False  # the mark that outlives the record
        self.largest_page_bytes = 0  # of all that were read
        self.moments: list[str] = []
        self.hook: Callable[[str], None] = lambda _: None
        self.log = FakeLog(self)
        self.feed = FakeFeed(self)

    @property
    def status(self) -> str:
        """The status that the record has: written in the same script as the event."""
        status = "queued"
        for line in self.lines:
            kind = type_of(line).decode()
            if kind in {"in_progress", *TERMINAL_STATUSES}:
                status = kind
            elif kind == "snapshot":
                status = "in_progress"
        return status

    def append(self, *lines: bytes, publish: int = 1) -> bytes:
        """Appends and publishes (so many times). Returns the message, to be published later or again."""
        self.has_record = True
        self.lines += lines
        self.history += lines
        payload = b"\n".join(lines)
        for _ in range(publish):
            self.publish(payload)
        return payload

    def forget(self) -> None:
        """Redis loses everything about the job."""
        self.has_record = False
        self.lines = []

    def heal(self, through: int) -> None:
        """A worker puts a snapshot in the place of all events up to `through`; there is a record again."""
        fold = LogFold()
        for line in self.history[:through]:
            fold.add(line)
        snapshot = encode_snapshot("job", through, attempt=1, created_at=CREATED_AT, fold=fold.fold.state())
        self.has_record = True
        self.lines = [snapshot, *self.history[through:]]

    def publish(self, payload: bytes) -> None:
        if self.listener is not None and not self.is_away:
            self.listener.received(payload)
            self.listener.flush()

    async def command(self, name: str) -> None:
        """One round trip: sent, executed by Redis when this returns. The answer still has to `arrive`."""
        await self._moment(f"{name}:sent")
        if self.is_away or name in self.away_for:
            raise RedisUnavailableError("away")
        if self.error is not None:
            raise self.error

    async def arrive(self, name: str) -> None:
        await self._moment(f"{name}:answered")

    async def _moment(self, name: str) -> None:
        self.moments.append(name)
        self.hook(name)
        await asyncio.sleep(LATENCY_S)


class FakeLog(JobLog):
    """What a hub asks of a JobLog."""

    def __init__(self, redis: FakeRedis) -> None:
        self.keys = Keys()
        self._fake = redis

    def _record(self) -> Record | None:
        if not self._fake.has_record:
            return None
        return Record(
            status=self._fake.status,
            attempt=int(self._fake.status != "queued"),
            created_at=CREATED_AT,
            tenant=self._fake.tenant,
            options=Options(
                tenant=self._fake.tenant,
                retention_s=self._fake.retention_s,
                on_abandon=self._fake.on_abandon,
            ),
        )

    async def record(self, job_id: str) -> Record | None:
        await self._fake.command("record")
        record = self._record()
        await self._fake.arrive("record")
        return record

    async def head(self, job_id: str) -> Head:
        await self._fake.command("head")
        lines = self._fake.lines[self._fake.trimmed :]
        head = Head(
            record=self._record(),
            earliest=sequence_number_of(lines[0]) + is_snapshot(lines[0]) if lines else 0,
            top=sequence_number_of(lines[-1]) if lines else 0,
        )
        await self._fake.arrive("head")
        return head

    async def top(self, job_id: str) -> int:
        await self._fake.command("top")
        top = sequence_number_of(self._fake.lines[-1]) if self._fake.lines else 0
        await self._fake.arrive("top")
        return top

    async def read(
        self, job_id: str, after: int, through: int | None = None, *, count: int = 1_000
    ) -> list[bytes]:
        await self._fake.command("read")
        lines = [
            line
            for line in self._fake.lines[self._fake.trimmed :]
            if after < sequence_number_of(line) <= (through if through is not None else 1 << 60)
        ][:count]
        self._fake.largest_page_bytes = max(self._fake.largest_page_bytes, sum(map(len, lines)))
        await self._fake.arrive("read")
        return lines

    async def news(self, tops: Mapping[str, int]) -> dict[str, list[bytes]]:
        await self._fake.command("news")
        lines = self._fake.lines[self._fake.trimmed :]
        news = {
            job_id: [line for line in lines if sequence_number_of(line) > top][:NEWS_LINES]
            for job_id, top in tops.items()
        }
        await self._fake.arrive("news")
        return {job_id: lines for job_id, lines in news.items() if lines}

    async def cancel_requested(self, job_ids: Sequence[str]) -> list[str]:
        await self._fake.command("cancel_requested")
        return list(job_ids) if self._fake.is_cancel_requested else []

    async def is_over(self, job_id: str) -> bool:
        await self._fake.command("is_over")
        return self._fake.is_over

    async def cancel(self, job_id: str, *, reason: str, tenant: str | None = None) -> Cancellation:
        await self._fake.command("cancel")
        return Cancellation("cancelled", "queued")


class FakeFeed(Feed):
    """What a hub asks of a Feed, with the connection's losses in a test's hand."""

    def __init__(self, redis: FakeRedis) -> None:
        self._fake = redis
        self._wanted: Listener | None = None
        self._lost_at: float | None = None
        self._is_up = asyncio.Event()
        self._is_up.set()

    @property
    def is_delivering(self) -> bool:
        return self._lost_at is None

    @property
    def undelivered_s(self) -> float:
        return 0.0 if self._lost_at is None else asyncio.get_running_loop().time() - self._lost_at

    @property
    def unanswered_s(self) -> float:
        return 0.0

    async def subscribe(self, channel: str, listener: Listener) -> None:
        self._wanted = listener
        while True:
            try:
                await self._fake.command("subscribe")
            except RedisUnavailableError:
                continue
            if self._is_up.is_set():
                break
            await self._is_up.wait()
        self._fake.listener = listener
        await self._fake.arrive("subscribe")

    def unsubscribe(self, channel: str) -> None:
        self._wanted = self._fake.listener = None

    def lose(self) -> None:
        """The connection is lost: what is published from here on goes by unheard."""
        self._fake.listener = None
        if self._lost_at is None:
            self._lost_at = asyncio.get_running_loop().time()
            self._is_up.clear()

    def reconnect(self) -> None:
        """The connection is back, and the channel subscribed again."""
        self._lost_at = None
        self._is_up.set()
        if self._wanted is not None:
            self._fake.listener = self._wanted
            self._wanted.reconnected()


class FakeSink:
    """Takes what a subscriber writes, as long as `is_writable`, or as many batches as `room` says."""

    via = "websocket"

    def __init__(self, *, room: int | None = None) -> None:
        self.is_open_for_more = True
        self.room = room
        self.messages: list[Subscribed | Snapshot] = []
        self.lines: list[bytes] = []
        self.batches: list[Batch] = []
        self.all: list[bytes | Subscribed | Snapshot] = []  # lines and messages, as they came
        self.has_ended = False
        self.error: WireError | None = None

    @property
    def is_writable(self) -> bool:
        return self.is_open_for_more and (self.room is None or self.room > 0)

    @property
    def numbers(self) -> list[int]:
        return [sequence_number_of(line) for line in self.lines]

    @property
    def subscribed(self) -> Subscribed:
        assert isinstance(self.messages[0], Subscribed)
        return self.messages[0]

    def write_batch(self, batch: Batch) -> None:
        assert self.is_writable, "a sink that is full was written to"
        if self.room is not None:
            self.room -= 1
        self.lines += batch.lines
        self.batches.append(batch)
        self.all += batch.lines

    def write_message(self, message: msgspec.Struct) -> None:
        assert isinstance(message, Subscribed | Snapshot)
        self.messages.append(message)
        self.all.append(message)

    def ended(self, subscriber: Subscriber) -> None:
        assert not self.has_ended, "ended twice"
        self.has_ended = True

    def refused(self, subscriber: Subscriber, error: WireError) -> None:
        self.error = error
