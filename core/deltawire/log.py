"""A job's log and record in Redis: the only code that knows its scripts (PROTOCOL.md §3).

Every append is fenced by its attempt and can be repeated. The Lua files say what each script reads,
writes and answers. Hot appends leave through `append_args` on a connection of the caller's own.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, Literal

import msgspec

from .codec import encode, encode_terminal, sequence_number_of
from .ending import AsCancelled, Ending, terminal_event
from .errors import RedisRefusedError, RedisUnavailableError, WireError
from .events import TERMINAL_STATUSES, Queued
from .fold import Fold
from .index import Index
from .keys import ACTIVE_TTL_S, CANCEL_TTL_S, WATCHED_TTL_S, JobKeys, Keys
from .log_fold import LogFold, fold_pages
from .notices import LOOK_S, Notices
from .options import Options
from .outputs import judge, read_request
from .places import Places
from .record import (
    ALL_BUT_REQUEST,
    SUMMARY,
    CancelRequest,
    Field,
    Record,
    decode_cancel,
    encode_cancel,
    read_fields,
    read_record,
)
from .scripts import APPEND, CANCEL, CLAIM, ERASE, HEAD, PARK, SUBMIT, Executor, Scripts
from .tenants import TenantLimits

FIRST_PAGE_EVENTS: Final = 4  # large enough to know how large events are
PAGE_EVENTS: Final = 1_000
PAGE_BYTES: Final = 262_144
NEWS_LINES: Final = 32

FULL_RETRY_S: Final = 2.0
NO_LIMITS: Final = TenantLimits()

ParkCode = Literal["PARKED", "CANCELLED", "STALE", "MISSING"]
AppendCode = Literal["OK", "CANCELLING", "CANCELLED", "STALE", "ENDED", "GAP", "MISSING"]


def next_page_events(page: Sequence[bytes]) -> int:
    """How many events to ask for after `page`: Redis counts events, memory counts bytes."""
    return max(1, min(PAGE_EVENTS, PAGE_BYTES * len(page) // sum(map(len, page))))


class Submitted(msgspec.Struct, frozen=True):
    """`is_new`: this call made the record. Else `same_body` says whether it asked for the same.

    `message` says what the job's message is to say, None that it is to have none: it has ended, or waits for
    its turn.
    """

    is_new: bool
    status: str
    same_body: bool
    message: dict[str, Any] | None = None


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A job's record (None: unknown), the first event of its log that can be read and the last (0: none)."""

    record: Record | None
    earliest: int
    top: int
    lease_left_s: float | None = None
    """How long the lease of the running attempt lasts; below 0 it has run out, None without one."""

    def is_overdue(self, now: float) -> bool:
        """Whether the lease has run out, or the time in the queue: something for a sweeper."""
        if self.record is None or self.record.status != "queued":
            return self.lease_left_s is not None and self.lease_left_s < 0
        return now > self.record.queue_deadline


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a claim came to. `record` is set with CLAIMED, OWN and EXPIRED, `status` with ENDED.

    `held_for_s` says with HELD how long the owner's lease lasts, with PARKED how long the job still waits.
    """

    code: Literal["CLAIMED", "MISSING", "ENDED", "OWN", "HELD", "EXPIRED", "PARKED"]
    attempt: int = 0
    top: int = 0
    status: str = ""
    cancel: CancelRequest | None = None
    record: Record | None = None
    held_for_s: float = 0.0


class Cancellation(msgspec.Struct, frozen=True):
    """What a cancel met: the job's status afterwards, and what it was cancelled from (None: it had ended)."""

    status: str
    cancelled_from: Literal["queued", "in_progress", "unknown"] | None


Args = tuple[Field, ...]


def append_args(
    keys: Keys,
    job: JobKeys,
    *,
    attempt: int,
    owner: str,
    first: int,
    events: Sequence[bytes],
    terminal: str = "",
    ttl_s: float = ACTIVE_TTL_S,
    fields: Sequence[str | float] = (),
) -> Args:
    """KEYS and ARGV of append.lua, to follow `EVALSHA sha` (its header says what they mean)."""
    return (
        *(4, job.meta, job.log, job.cancel, job.channel),
        *(attempt, owner, first, max(1, round(ttl_s)), terminal, keys.publish),
        *(len(fields), *fields, *events),
    )


def rewrite_args(
    keys: Keys,
    job: JobKeys,
    *,
    owner: str,
    lease_s: float,
    first: int,
    snapshot: bytes,
    events: Sequence[bytes],
    record: Record,
) -> Args:
    """KEYS and ARGV of rewrite.lua. Events are numbered from `first`; `snapshot` stands for those before."""
    fields = record.fields()
    return (
        *(4, job.meta, job.log, job.cancel, job.channel),
        *(record.attempt, owner, ACTIVE_TTL_S, round(lease_s * 1000), keys.publish, first, snapshot),
        *(len(fields), *fields, *events),
    )


def queued_event(job_id: str, record: Record) -> bytes:
    """Event 1, as it was when the record was made."""
    return encode(Queued(job_id=job_id, sequence_number=1, attempt=0, created_at=record.created_at))


class JobLog:
    """Logs and records of all jobs. Raises RedisUnavailableError where Redis cannot answer."""

    def __init__(
        self, redis: Executor, keys: Keys, limits: TenantLimits = NO_LIMITS, *, tells_ends: bool = False
    ) -> None:
        """`tells_ends`: there are webhooks."""
        self.scripts = Scripts(redis)
        self.keys = keys
        self.index = Index(self.scripts, keys)
        self.places = Places(self.scripts, keys, self.index, limits)
        self.notices = Notices(self.scripts, keys) if tells_ends else None

    async def submit(
        self,
        job_id: str,
        *,
        request: bytes,
        options: Options,
        digest: str,
        created_at: float,
        traceparent: str = "",
        response: bytes | None = None,
    ) -> Submitted:
        """Creates the job `queued`, if it does not exist. Can be repeated.

        Raises WireError `tenant_queue_full` where too many of the tenant's wait; then nothing is written.
        """
        # So that the event can be told from the record, to the last digit.
        created_at = round(created_at, 6)
        record = _queued(request, options, created_at, traceparent, response)
        admission = await self.places.admit(job_id, record, is_new=True)
        if admission == "FULL" and await self.summary(job_id) is None:
            raise WireError(
                "tenant_queue_full",
                f"too many jobs of {options.tenant} wait already; try again later",
                retry_after_s=FULL_RETRY_S,
            )
        is_held = admission != "ADMITTED"
        record = msgspec.structs.replace(record, is_admitted=not is_held)
        keys = self.keys.job(job_id)
        submitting = self.scripts.run(
            SUBMIT,
            (keys.meta, keys.log, keys.cancel, keys.channel),
            *(
                round(options.queue_timeout_s) + ACTIVE_TTL_S,
                digest,
                queued_event(job_id, record),
                options.tenant,
                self.keys.publish,
            ),
            *record.fields(),
        )
        if self.notices is not None:
            await self.notices.expect(job_id, record.queue_deadline + LOOK_S)
        will_wait = self.index.will_hold if is_held else self.index.will_queue
        reply = await self.index.entered(partial(will_wait, job_id, record.queue_deadline), submitting)
        message = None if is_held else record.message_options()
        if reply[0] == b"CREATED":
            return Submitted(True, "queued", True, message)
        status = reply[1].decode()
        if status in TERMINAL_STATUSES:
            await self.places.left(options.tenant, (job_id,))
        return Submitted(False, status, reply[2] == b"1", message if status == "queued" else None)

    async def claim(
        self,
        job_id: str,
        *,
        owner: str,
        lease_s: float,
        request: bytes | None = None,
        options: Options | None = None,
        take_over: int | None = None,
    ) -> Claim:
        """Tries to make `owner` the owner of the job's next attempt.

        `request` and `options` make a record where there is none. EXPIRED says that another owner's lease
        ran out, OWN that the caller has the attempt already: call again with `take_over` set to that
        attempt to go on from it.
        """
        if self.notices is not None:
            await self.notices.expect(job_id, time.time() + LOOK_S)
        keys = self.keys.job(job_id)
        fields = () if request is None else _queued(request, options or Options(), time.time()).fields()
        reply = await self.scripts.run(
            CLAIM,
            (keys.meta, keys.log, keys.cancel),
            *(owner, round(lease_s * 1000), ACTIVE_TTL_S, take_over if take_over is not None else ""),
            *fields,
        )
        code = reply[0].decode()
        if code in {"CLAIMED", "OWN", "EXPIRED"}:
            return Claim(
                code=code,
                attempt=reply[1],
                top=reply[2],
                cancel=decode_cancel(reply[3]),
                record=read_record(reply[4]),
            )
        if code in {"HELD", "PARKED"}:
            return Claim(code=code, held_for_s=reply[1] / 1000)
        if code == "ENDED":
            return Claim(code=code, status=reply[1].decode())
        return Claim(code=code)

    async def park(
        self, job_id: str, *, owner: str, record: Record, top: int, delay_s: float
    ) -> tuple[ParkCode, CancelRequest | None]:
        """Puts the running attempt that `record` names back into the queue, for `delay_s` at the least.

        The log must have all that was put up to `top`. `record.retries` and `attempt_began_at` are kept for
        the claim that goes on with it. Who parks a job sends its message again; else a sweeper does. 0 is for
        a job that waits for its turn: who calls it sends the message, with what `record.message` says.
        """
        if delay_s:
            await self.index.will_queue(job_id, record.queue_deadline)
            await self.index.will_park(job_id, time.time() + delay_s)
        else:  # it waits for no worker, until it is called
            await self.index.left_queue((job_id,))
            await self.index.will_hold(job_id, record.queue_deadline)
        keys = self.keys.job(job_id)
        ttl_s = max(record.queue_deadline - time.time(), delay_s) + ACTIVE_TTL_S
        fields: tuple[Field, ...] = ("retries", record.retries, "waited_s", f"{record.waited_s:.3f}")
        if record.attempt_began_at is not None:
            fields += ("attempt_began_at", f"{record.attempt_began_at:.6f}")
        if record.message is not None:
            fields += ("message", record.message)
        code, value = await self.scripts.run(
            PARK,
            (keys.meta, keys.log, keys.cancel),
            *(record.attempt, owner, round(delay_s * 1000), round(ttl_s), top, *fields),
        )
        return code.decode(), decode_cancel(value)

    async def append(
        self,
        job_id: str,
        *,
        attempt: int,
        owner: str,
        first: int,
        events: Sequence[bytes],
        terminal: str = "",
        ttl_s: float = ACTIVE_TTL_S,
        fields: Sequence[str | float] = (),
    ) -> tuple[AppendCode, int]:
        """Appends events numbered from `first`. Returns the script's code and the log's top."""
        args = append_args(
            self.keys,
            self.keys.job(job_id),
            attempt=attempt,
            owner=owner,
            first=first,
            events=events,
            terminal=terminal,
            ttl_s=ttl_s,
            fields=fields,
        )
        reply = await self.scripts.evalsha(APPEND, *args)
        return reply[0].decode(), reply[1]

    async def cancel(self, job_id: str, *, reason: str, tenant: str | None = None) -> Cancellation:
        """Cancels a job: a queued one has ended when this returns, a running one's worker has been told.

        A job without a record gets a tombstone that its claim will find, if the job is `tenant`'s then
        (None: anybody's). Idempotent.
        """
        keys = self.keys.job(job_id)
        value = encode_cancel(CancelRequest(reason, time.time(), tenant))
        status, top, set_value = await self.scripts.run(
            CANCEL,
            (keys.meta, keys.log, keys.cancel),
            *(value, CANCEL_TTL_S, self.keys.control(""), job_id),
        )
        status = status.decode()
        if status in TERMINAL_STATUSES:
            return Cancellation(status, None)
        if status == "queued" and (record := await self.summary(job_id)) is not None:
            request = decode_cancel(set_value) or CancelRequest()
            ending = AsCancelled(request, time.time(), None)
            code = await self.end(job_id, ending, record=record, top=top)
            if code in {"OK", "CANCELLING"}:
                return Cancellation("cancelled", "queued")
            if code == "STALE":
                return Cancellation("in_progress", "in_progress")
            # Somebody else has ended it in between, or its record is gone.
            record = await self.summary(job_id)
            return Cancellation(record.status if record else "unknown", None)
        return Cancellation(status, status)

    async def end(
        self,
        job_id: str,
        ending: Ending,
        *,
        record: Record,
        top: int,
        owner: str = "",
        fold: Fold | None = None,
        was_asked: bool = False,
    ) -> AppendCode:
        """Appends the terminal event of a job that nobody streams: a queued one, or one that `owner` claimed.

        Fenced like any other append: of a queued job that a worker claims in between it is STALE. A log that
        is gone begins anew, so that the terminal event does not have the number of the first one. `was_asked`
        says that the upstream was, so that the usage is estimated.
        """
        now = time.time()
        fold = fold or Fold()
        request = read_request(record.request)
        before = [] if top else [queued_event(job_id, record)]
        event = terminal_event(
            ending,
            job_id=job_id,
            sequence_number=top + 1 + len(before),
            attempt=record.attempt,
            now=now,
            fold=fold,
            timings=record.timings(now),
            request=request if was_asked or not fold.is_empty else None,
            outputs=judge(fold.completion(), request, is_over=False),
        )
        line = encode_terminal(event)
        code, _ = await self.append(
            job_id,
            attempt=record.attempt,
            owner=owner,
            first=top + 1,
            events=[*before, line],
            terminal=event.status,
            ttl_s=record.options.retention_s,
            fields=("finished_at", now),
        )
        if code in {"OK", "CANCELLING"}:
            await self.tell_end(job_id, record, line)
        if code in {"OK", "CANCELLING", "ENDED"}:
            await self._wait_no_more(record.tenant, job_id)
        return code

    async def _wait_no_more(self, tenant: str, job_id: str) -> None:
        """Takes a job that has ended from all sets in which it may be: sweepers would do so much later."""
        job_ids = (job_id,)
        await asyncio.gather(
            self.places.left(tenant, job_ids),
            self.index.left_hold(job_ids),
            self.index.left_queue(job_ids),
            self.index.left_parking(job_ids),
        )

    async def tell_end(self, job_id: str, record: Record, line: bytes) -> None:
        """Has webhooks told of a job's end, which was written: `line` is its terminal event."""
        if self.notices is not None:
            # Else whoever looks at the job next finds the end.
            with suppress(RedisUnavailableError):
                await self.notices.ended(job_id, record, line)

    async def erase(self, job_id: str, reason: str) -> bool:
        """Erases the record and the log of a job. Whether there was one.

        Cancel it first: one that has not ended is ended here for those who read it live, and its worker is
        refused whatever it writes.
        """
        keys = self.keys.job(job_id)
        while (record := await self.summary(job_id)) is not None:
            now = time.time()
            number, event = 1, b""
            if not record.is_terminal:
                log_fold = await fold_pages(LogFold(), self.pages(job_id))
                number = log_fold.sequence_number + 1
                cancelled = terminal_event(
                    AsCancelled(await self.cancel_request(job_id) or CancelRequest(reason), now, None),
                    job_id=job_id,
                    sequence_number=number,
                    attempt=record.attempt,
                    now=now,
                    fold=log_fold.fold,
                    timings=record.timings(now),
                )
                event = encode_terminal(cancelled)
            names = (keys.meta, keys.log, keys.cancel, keys.channel, keys.watched, keys.sent)
            reply = await self.scripts.run(ERASE, names, event, number, self.keys.publish, CANCEL_TTL_S)
            if reply[0] == b"ERASED":
                if event:
                    await self.tell_end(job_id, record, event)
                await self._wait_no_more(record.tenant, job_id)
                await self.places.unlist(record.tenant, (job_id,))
                return True
        return False

    async def cancel_request(self, job_id: str) -> CancelRequest | None:
        """What the cancel key says; None where there is none."""
        value: bytes | None = await self.scripts.execute("GET", self.keys.job(job_id).cancel)
        return None if value is None else decode_cancel(value or b"1")

    async def is_over(self, job_id: str) -> bool:
        """Whether the job has ended or was erased, as the mark says that may outlive its record."""
        value: bytes | None = await self.scripts.execute("GET", self.keys.job(job_id).cancel)
        return value is not None and value.startswith(b"over ")

    async def cancel_requested(self, job_ids: Sequence[str]) -> list[str]:
        """Those of the jobs whose cancel key exists: one call for all (on a cluster one for each)."""
        if not job_ids:
            return []
        keys = [self.keys.job(job_id).cancel for job_id in job_ids]
        if self.keys.is_sharded:
            values = await asyncio.gather(*(self.scripts.execute("GET", key) for key in keys))
        else:
            values = await self.scripts.execute("MGET", *keys)
        return [job_id for job_id, value in zip(job_ids, values, strict=True) if value is not None]

    async def listened_to(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the jobs to which some relay listens: one call for all (on a cluster one for each)."""
        if not job_ids:
            return set()
        channels = [self.keys.job(job_id).channel for job_id in job_ids]
        if self.keys.is_sharded:
            asked = [self.scripts.execute("PUBSUB", "SHARDNUMSUB", channel) for channel in channels]
            replies = await asyncio.gather(*asked)
        else:
            replies = [await self.scripts.execute("PUBSUB", "NUMSUB", *channels)]
        listeners = [count for reply in replies for count in reply[1::2]]
        return {job_id for job_id, count in zip(job_ids, listeners, strict=True) if count}

    async def is_watched(self, job_id: str) -> bool:
        """Whether some relay listens to the job's channel, or has said that it watches without listening."""
        return bool(await self.listened_to([job_id])) or await self.is_marked_watched(job_id)

    async def is_marked_watched(self, job_id: str) -> bool:
        """Whether a relay that does not listen has said that it watches."""
        return bool(await self.scripts.execute("EXISTS", self.keys.job(job_id).watched))

    async def mark_watched(self, job_id: str) -> None:
        """Says so for WATCHED_TTL_S."""
        await self.scripts.execute("SET", self.keys.job(job_id).watched, 1, "EX", WATCHED_TTL_S)

    async def head(self, job_id: str) -> Head:
        """The record and the bounds of the log, as of one moment.

        Without the request: that is for its worker alone, and each relay that watches would hold on to it.
        """
        keys = self.keys.job(job_id)
        values, earliest, top, left = await self.scripts.run(HEAD, (keys.meta, keys.log), *ALL_BUT_REQUEST)
        return Head(
            record=read_fields(ALL_BUT_REQUEST, values),
            earliest=earliest,
            top=top,
            lease_left_s=None if left == b"" else left / 1000,
        )

    async def record(self, job_id: str) -> Record | None:
        """The whole record, the request included; or None."""
        return await self._fields(job_id, (*ALL_BUT_REQUEST, "request"))

    async def summary(self, job_id: str, *also: str) -> Record | None:
        """The record without what may be large: `request`, `response`; those in `also` it has."""
        return await self._fields(job_id, (*SUMMARY, *also))

    async def _fields(self, job_id: str, names: Sequence[str]) -> Record | None:
        return read_fields(names, await self.scripts.execute("HMGET", self.keys.job(job_id).meta, *names))

    async def top(self, job_id: str) -> int:
        """The number of the log's last event; 0 for an empty log."""
        last = await self._last(job_id)
        return last[0] if last else 0

    async def last(self, job_id: str) -> bytes | None:
        """The log's last event."""
        last = await self._last(job_id)
        return last[1] if last else None

    async def _last(self, job_id: str) -> tuple[int, bytes] | None:
        entries = await self.scripts.execute("XREVRANGE", self.keys.job(job_id).log, "+", "-", "COUNT", 1)
        return _entry(entries[0]) if entries else None

    async def read(
        self, job_id: str, after: int, through: int | None = None, *, count: int = PAGE_EVENTS
    ) -> list[bytes]:
        """The events (after, through], in order; at most `count` of them."""
        end = f"{through}-0" if through is not None else "+"
        log = self.keys.job(job_id).log
        entries = await self.scripts.execute("XRANGE", log, f"{after + 1}-0", end, "COUNT", count)
        return [fields[1] for _, fields in entries]

    async def pages(
        self, job_id: str, after: int = 0, through: int | None = None
    ) -> AsyncIterator[list[bytes]]:
        """The events (after, through] in pages of about PAGE_BYTES; a page is never empty."""
        count = FIRST_PAGE_EVENTS
        while page := await self.read(job_id, after, through, count=count):
            yield page
            if len(page) < count:
                return
            after = sequence_number_of(page[-1])
            count = next_page_events(page)
            await asyncio.sleep(0)

    async def news(self, tops: Mapping[str, int]) -> dict[str, list[bytes]]:
        """The next lines of those logs that go beyond the number given, by job; at most NEWS_LINES of each.

        One call for all (on a cluster one for each), so a few hundred jobs at a time. A log that cannot be
        read, as one of a cluster's servers is away, keeps nobody from the others. Raises
        RedisUnavailableError where none can be read.
        """
        if not tops:
            return {}
        if not self.keys.is_sharded or len(tops) == 1:
            try:
                return await self._news(tops)
            except RedisRefusedError:  # one of the keys is somebody else's, and no stream
                if len(tops) == 1:
                    raise
        asked = (self._news({job_id: top}) for job_id, top in tops.items())
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(failed) == len(answers):
            raise failed[0]
        found = [answer for answer in answers if isinstance(answer, dict)]
        return {job_id: lines for answer in found for job_id, lines in answer.items()}

    async def _news(self, tops: Mapping[str, int]) -> dict[str, list[bytes]]:
        jobs = {self.keys.job(job_id).log.encode(): job_id for job_id in tops}
        after = [f"{top}-0" for top in tops.values()]
        reply = await self.scripts.execute("XREAD", "COUNT", NEWS_LINES, "STREAMS", *jobs, *after)
        streams = reply.items() if isinstance(reply, dict) else reply or ()  # RESP3, RESP2
        return {jobs[log]: [_entry(entry)[1] for entry in entries] for log, entries in streams}


def _entry(entry: list[Any]) -> tuple[int, bytes]:
    """A stream entry as (sequence number, event)."""
    entry_id, fields = entry
    return int(entry_id.partition(b"-")[0]), fields[1]


def _queued(
    request: bytes,
    options: Options,
    created_at: float,
    traceparent: str = "",
    response: bytes | None = None,
) -> Record:
    return Record(
        status="queued",
        attempt=0,
        created_at=created_at,
        tenant=options.tenant,
        options=options,
        request=request,
        response=response,
        traceparent=traceparent,
    )
