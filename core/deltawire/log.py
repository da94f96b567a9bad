"""A job's log and record in Redis: the only code that knows its scripts (PROTOCOL.md §3).

Every append is fenced by its attempt and can be repeated. The Lua files say what each script reads,
writes and answers. Hot appends leave through `append_args` on a connection of the caller's own;
everything else goes through redis-py.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any, Final, Literal, cast

import msgspec
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from .codec import encode, encode_terminal
from .errors import RedisUnavailableError
from .events import TERMINAL_STATUSES, Cancel, Cancelled, Queued, Timings
from .keys import ACTIVE_TTL_S, CANCEL_TTL_S, JobKeys, Keys
from .options import Options


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

PAGE_EVENTS: Final = 1_000

AppendCode = Literal["OK", "CANCELLING", "CANCELLED", "STALE", "ENDED", "GAP", "MISSING"]


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


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a claim came to. `record` is set with CLAIMED and EXPIRED, `status` with ENDED."""

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
    except msgspec.DecodeError:
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


def connect(url: str, *, name: str) -> redis.asyncio.Redis:
    """A redis-py client for what happens once per job. The defaults that hurt are set here.

    redis-py's own: no connect time-out, a pool that raises at 100 connections, retries with no jitter.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=32,
        timeout=5,
        socket_timeout=5,
        socket_connect_timeout=5,
        health_check_interval=15,
        client_name=name,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 3),
        retry_on_error=[redis.exceptions.ConnectionError, redis.exceptions.TimeoutError],
    )
    return redis.asyncio.Redis.from_pool(pool)


class JobLog:
    """Logs and records of all jobs. Raises RedisUnavailableError where Redis cannot answer."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._redis = client
        self.keys = keys

    async def _run(self, script: Script, keys: Sequence[str], *args: str | bytes | float) -> list[Any]:
        return cast("list[Any]", await self._evalsha(script, len(keys), *keys, *args))

    async def _evalsha(self, script: Script, *args: str | bytes | float) -> Any:  # a script's reply
        try:
            try:
                return await self._redis.evalsha(script.sha, *args)  # type: ignore[arg-type] # redis-py types arguments as str
            except redis.exceptions.NoScriptError:
                return await self._redis.eval(script.text, *args)  # type: ignore[arg-type] # as above
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise RedisUnavailableError(str(error)) from error

    async def submit(
        self, job_id: str, *, request: bytes, options: Options, digest: str, created_at: float
    ) -> Submitted:
        """Creates the job `queued`, if it does not exist. Can be repeated."""
        keys = self.keys.job(job_id)
        event = encode(Queued(job_id=job_id, sequence_number=1, attempt=0, created_at=created_at))
        reply = await self._run(
            SUBMIT,
            (keys.meta, keys.log, keys.channel),
            *(round(options.queue_timeout_s) + ACTIVE_TTL_S, digest, event),
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
        if code in {"CLAIMED", "EXPIRED"}:
            return Claim(
                code=code,
                attempt=reply[1],
                top=reply[2],
                cancel=decode_cancel(reply[3]),
                record=_record(dict(zip(reply[4][::2], reply[4][1::2], strict=True))),
            )
        if code == "OWN":
            return Claim(code=code, attempt=reply[1])
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

    async def cancel(self, job_id: str, *, reason: str) -> Cancellation:
        """Cancels a job: a queued one has ended when this returns, a running one's worker has been told.

        A job without a record gets a tombstone that its claim will find. Idempotent.
        """
        keys = self.keys.job(job_id)
        value = encode_cancel(CancelRequest(reason, time.time()))
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
            record = await self.record(job_id)
            return Cancellation(record.status if record else "unknown", "queued")
        return Cancellation(status, status)

    async def cancel_request(self, job_id: str) -> CancelRequest | None:
        """What the cancel key says; None where there is none."""
        try:
            value = await self._redis.get(self.keys.job(job_id).cancel)
            return decode_cancel(cast("bytes | None", value) or b"")
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise RedisUnavailableError(str(error)) from error

    async def record(self, job_id: str) -> Record | None:
        """The job's record, or None."""
        try:
            fields = await self._redis.hgetall(self.keys.job(job_id).meta)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise RedisUnavailableError(str(error)) from error
        return _record(cast("dict[bytes, bytes]", fields)) if fields else None

    async def head(self, job_id: str) -> Head:
        """The record and the bounds of the log, as of one moment."""
        keys = self.keys.job(job_id)
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(keys.meta)
            pipeline.xrange(keys.log, count=1)
            pipeline.xrevrange(keys.log, count=1)
            try:
                fields, first, last = await pipeline.execute()
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
                raise RedisUnavailableError(str(error)) from error
        return Head(
            record=_record(fields) if fields else None,
            earliest=_number(first[0][0]) if first else 0,
            top=_number(last[0][0]) if last else 0,
        )

    async def top(self, job_id: str) -> int:
        """The number of the log's last event; 0 for an empty log."""
        events = await self._range("xrevrange", job_id, "+", "-", 1)
        return events[0][0] if events else 0

    async def last(self, job_id: str) -> bytes | None:
        """The log's last event."""
        events = await self._range("xrevrange", job_id, "+", "-", 1)
        return events[0][1] if events else None

    async def read(
        self, job_id: str, after: int, through: int | None = None, *, count: int = PAGE_EVENTS
    ) -> list[bytes]:
        """The events (after, through], in order; at most `count` of them."""
        end = f"{through}-0" if through is not None else "+"
        return [event for _, event in await self._range("xrange", job_id, f"{after + 1}-0", end, count)]

    async def pages(
        self, job_id: str, after: int = 0, through: int | None = None
    ) -> AsyncIterator[list[bytes]]:
        """The events (after, through] in pages; a page is never empty."""
        while page := await self.read(job_id, after, through):
            yield page
            after += len(page)
            if len(page) < PAGE_EVENTS:
                return
            await asyncio.sleep(0)

    async def _range(
        self, method: str, job_id: str, start: str, end: str, count: int
    ) -> list[tuple[int, bytes]]:
        try:
            entries = await getattr(self._redis, method)(self.keys.job(job_id).log, start, end, count=count)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise RedisUnavailableError(str(error)) from error
        return [(_number(entry_id), fields[b"e"]) for entry_id, fields in entries]


def _number(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


def _record_fields(request: bytes, options: Options, created_at: float) -> tuple[str | bytes | float, ...]:
    return (
        *("created_at", f"{created_at:.6f}", "tenant", options.tenant),
        *("options", msgspec.json.encode(options), "request", request),
    )


def _record(fields: dict[bytes, bytes]) -> Record:
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
