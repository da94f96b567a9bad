"""A job's log and record in Redis: the only code that knows its scripts (PROTOCOL.md §3).

Every append is fenced by its attempt and can be repeated. The Lua files say what each script reads,
writes and answers. Hot appends leave through `append_args` on a connection of the caller's own.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any, Final, Literal, Protocol, cast

import hiredis
import msgspec

from .codec import encode, encode_terminal, sequence_number_of
from .errors import RedisUnavailableError
from .events import TERMINAL_STATUSES, Cancel, Cancelled, Queued, Timings
from .keys import ACTIVE_TTL_S, CANCEL_TTL_S, JobKeys, Keys
from .options import Options
from .redis_connection import Reply


class Script(msgspec.Struct, frozen=True):
    """A Lua script and the digest under which a server knows it."""

    text: str
    sha: str


def _load(name: str) -> Script:
    text = files("deltawire").joinpath("lua", f"{name}.lua").read_text()
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


SUBMIT: Final = _load("submit")
CLAIM: Final = _load("claim")
APPEND: Final = _load("append")
CANCEL: Final = _load("cancel")
RENEW: Final = _load("renew")
HEAD: Final = _load("head")

FIRST_PAGE_EVENTS: Final = 4  # large enough to know how large events are
PAGE_EVENTS: Final = 1_000
PAGE_BYTES: Final = 262_144

AppendCode = Literal["OK", "CANCELLING", "CANCELLED", "STALE", "ENDED", "GAP", "MISSING"]


def next_page_events(page: Sequence[bytes]) -> int:
    """How many events to ask for after `page`: Redis counts events, memory counts bytes."""
    return max(1, min(PAGE_EVENTS, PAGE_BYTES * len(page) // sum(map(len, page))))


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """A job's record. Times are Unix seconds; `request` is gone once the job has ended."""

    status: str
    attempt: int
    created_at: float
    tenant: str
    options: Options
    request: bytes | None = None
    started_at: float | None = None
    first_delta_at: float | None = None
    finished_at: float | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STATUSES


class Submitted(msgspec.Struct, frozen=True):
    """`is_new`: this call made the record. Else `same_body` says whether it asked for the same."""

    is_new: bool
    status: str
    same_body: bool


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A job's record (None: unknown) and the numbers of its log's first and last event (0: empty)."""

    record: Record | None
    earliest: int
    top: int


class CancelRequest(msgspec.Struct, frozen=True):
    """What a cancel key says. A bare key (any other value) says no more than that it is there."""

    reason: str = "cancel_key"
    requested_at: float | None = None
    tenant: str | None = None  # who left a tombstone: it is for a job of this tenant's only


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a claim came to. `record` is set with CLAIMED, OWN and EXPIRED, `status` with ENDED."""

    code: Literal["CLAIMED", "MISSING", "ENDED", "OWN", "HELD", "EXPIRED"]
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


def encode_cancel(request: CancelRequest) -> bytes:
    return msgspec.json.encode(request)


def decode_cancel(value: bytes) -> CancelRequest | None:
    """What the cancel key's value says; None where there is no key (an empty value from a script)."""
    if not value:
        return None
    try:
        return msgspec.json.decode(value, type=CancelRequest)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return CancelRequest()


def append_args(
    keys: JobKeys,
    *,
    attempt: int,
    first: int,
    events: Sequence[bytes],
    terminal: str = "",
    ttl_s: float = ACTIVE_TTL_S,
    fields: Sequence[str | float] = (),
) -> tuple[str | bytes | float, ...]:
    """KEYS and ARGV of append.lua, to follow `EVALSHA sha` (its header says what they mean)."""
    args: list[str | bytes | float] = [4, keys.meta, keys.log, keys.cancel, keys.channel]
    args += [attempt, first, max(1, round(ttl_s)), terminal, len(fields)]
    args += [str(field) for field in fields]
    args += events
    return tuple(args)


class Executor(Protocol):
    """What a JobLog talks through: a RedisClient, or a double of one in unit tests."""

    async def execute(self, *args: str | bytes | float) -> Reply:
        """One command's raw reply. Raises hiredis.ReplyError and RedisUnavailableError."""


class JobLog:
    """Logs and records of all jobs. Raises RedisUnavailableError where Redis cannot answer."""

    def __init__(self, redis: Executor, keys: Keys) -> None:
        self._redis = redis
        self.keys = keys

    async def _run(self, script: Script, keys: Sequence[str], *args: str | bytes | float) -> list[Any]:
        return await self._evalsha(script, len(keys), *keys, *args)

    async def _evalsha(self, script: Script, *args: str | bytes | float) -> list[Any]:
        try:
            reply = await self._redis.execute("EVALSHA", script.sha, *args)
        except hiredis.ReplyError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise RedisUnavailableError(f"Redis refuses: {error}") from error
            reply = await self._execute("EVAL", script.text, *args)
        return cast("list[Any]", reply)

    async def _execute(self, *args: str | bytes | float) -> Reply:
        """As the executor's; a refusal (out of memory, no permission) is an unavailable Redis to callers."""
        try:
            return await self._redis.execute(*args)
        except hiredis.ReplyError as error:
            raise RedisUnavailableError(f"Redis refuses: {error}") from error

    async def submit(
        self, job_id: str, *, request: bytes, options: Options, digest: str, created_at: float
    ) -> Submitted:
        """Creates the job `queued`, if it does not exist. Can be repeated."""
        keys = self.keys.job(job_id)
        event = encode(Queued(job_id=job_id, sequence_number=1, attempt=0, created_at=created_at))
        reply = await self._run(
            SUBMIT,
            (keys.meta, keys.log, keys.cancel, keys.channel),
            *(round(options.queue_timeout_s) + ACTIVE_TTL_S, digest, event, options.tenant),
            *_record_fields(request, options, created_at),
        )
        if reply[0] == b"CREATED":
            return Submitted(True, "queued", True)
        return Submitted(False, reply[1].decode(), reply[2] == b"1")

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
        keys = self.keys.job(job_id)
        fields = _record_fields(request, options or Options(), time.time()) if request is not None else ()
        reply = await self._run(
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
                record=_record(reply[4]),
            )
        if code == "HELD":
            return Claim(code=code, held_for_s=reply[1] / 1000)
        if code == "ENDED":
            return Claim(code=code, status=reply[1].decode())
        return Claim(code=code)

    async def append(
        self,
        job_id: str,
        *,
        attempt: int,
        first: int,
        events: Sequence[bytes],
        terminal: str = "",
        ttl_s: float = ACTIVE_TTL_S,
        fields: Sequence[str | float] = (),
    ) -> tuple[AppendCode, int]:
        """Appends events numbered from `first`. Returns the script's code and the log's top."""
        args = append_args(
            self.keys.job(job_id),
            attempt=attempt,
            first=first,
            events=events,
            terminal=terminal,
            ttl_s=ttl_s,
            fields=fields,
        )
        reply = await self._evalsha(APPEND, *args)
        return reply[0].decode(), reply[1]

    async def cancel(self, job_id: str, *, reason: str, tenant: str | None = None) -> Cancellation:
        """Cancels a job: a queued one has ended when this returns, a running one's worker has been told.

        A job without a record gets a tombstone that its claim will find, if the job is `tenant`'s then
        (None: anybody's). Idempotent.
        """
        keys = self.keys.job(job_id)
        value = encode_cancel(CancelRequest(reason, time.time(), tenant))
        status, attempt, top, created_at, set_value = await self._run(
            CANCEL,
            (keys.meta, keys.log, keys.cancel),
            *(value, CANCEL_TTL_S, self.keys.control(""), job_id),
        )
        status = status.decode()
        if status in TERMINAL_STATUSES:
            return Cancellation(status, None)
        if status == "queued":
            # Fenced like any other append: if a worker claims in between, its claim sees the key and
            # ends the job itself, and this append is STALE.
            request = decode_cancel(set_value) or CancelRequest()
            now = time.time()
            event = Cancelled(
                job_id=job_id,
                sequence_number=top + 1,
                attempt=attempt,
                created_at=now,
                completion=None,
                usage=None,
                usage_source="unavailable",
                timings=Timings(queued_s=None, first_delta_s=None, total_s=now - float(created_at)),
                cancel=Cancel(
                    reason=request.reason, requested_at=request.requested_at, upstream_closed_at=None
                ),
            )
            record = await self.record(job_id)
            code, _ = await self.append(
                job_id,
                attempt=attempt,
                first=top + 1,
                events=[encode_terminal(event)],
                terminal="cancelled",
                ttl_s=record.options.retention_s if record else ACTIVE_TTL_S,
                fields=("finished_at", now),
            )
            if code in {"OK", "CANCELLING"}:
                return Cancellation("cancelled", "queued")
            if code == "STALE":
                return Cancellation("in_progress", "in_progress")
            # Somebody else has ended it in between, or its record is gone.
            record = await self.record(job_id)
            return Cancellation(record.status if record else "unknown", None)
        return Cancellation(status, status)

    async def cancel_request(self, job_id: str) -> CancelRequest | None:
        """What the cancel key says; None where there is none."""
        value: bytes | None = await self._execute("GET", self.keys.job(job_id).cancel)
        return None if value is None else decode_cancel(value or b"1")

    async def head(self, job_id: str) -> Head:
        """The record and the bounds of the log, as of one moment."""
        keys = self.keys.job(job_id)
        record, earliest, top = await self._run(HEAD, (keys.meta, keys.log))
        return Head(record=_record(record), earliest=earliest, top=top)

    async def record(self, job_id: str) -> Record | None:
        """The job's record, or None."""
        return (await self.head(job_id)).record

    async def top(self, job_id: str) -> int:
        """The number of the log's last event; 0 for an empty log."""
        last = await self._last(job_id)
        return last[0] if last else 0

    async def last(self, job_id: str) -> bytes | None:
        """The log's last event."""
        last = await self._last(job_id)
        return last[1] if last else None

    async def _last(self, job_id: str) -> tuple[int, bytes] | None:
        entries = await self._execute("XREVRANGE", self.keys.job(job_id).log, "+", "-", "COUNT", 1)
        return _entry(entries[0]) if entries else None

    async def read(
        self, job_id: str, after: int, through: int | None = None, *, count: int = PAGE_EVENTS
    ) -> list[bytes]:
        """The events (after, through], in order; at most `count` of them."""
        end = f"{through}-0" if through is not None else "+"
        log = self.keys.job(job_id).log
        entries = await self._execute("XRANGE", log, f"{after + 1}-0", end, "COUNT", count)
        return [_entry(entry)[1] for entry in entries]

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


def _entry(entry: list[Any]) -> tuple[int, bytes]:
    """A stream entry as (sequence number, event)."""
    entry_id, fields = entry
    return int(entry_id.partition(b"-")[0]), fields[1]


def _record_fields(request: bytes, options: Options, created_at: float) -> tuple[str | bytes | float, ...]:
    return (
        *("created_at", f"{created_at:.6f}", "tenant", options.tenant),
        *("options", msgspec.json.encode(options), "request", request),
    )


def _record(reply: list[bytes]) -> Record | None:
    """The record in a script's HGETALL."""
    if not reply:
        return None
    fields = dict(zip(reply[::2], reply[1::2], strict=True))

    def moment(name: bytes) -> float | None:
        return float(fields[name]) if name in fields else None

    return Record(
        status=fields[b"status"].decode(),
        attempt=int(fields[b"attempt"]),
        created_at=float(fields[b"created_at"]),
        tenant=fields[b"tenant"].decode(),
        options=msgspec.json.decode(fields[b"options"], type=Options),
        request=fields.get(b"request"),
        started_at=moment(b"started_at"),
        first_delta_at=moment(b"first_delta_at"),
        finished_at=moment(b"finished_at"),
    )
