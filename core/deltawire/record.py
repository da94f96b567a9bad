"""A job's record: the hash that is the truth about it (PROTOCOL.md §3.1), and what its cancel key says."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from .events import TERMINAL_STATUSES, Timings
from .options import FIRST, Options

Field = str | bytes | float
MAX_REASON_CHARACTERS: Final = 255
SUMMARY: Final = (
    *("status", "attempt", "created_at", "tenant", "options", "started_at", "first_delta_at", "finished_at"),
    *("not_before", "admitted", "message"),
)
"""What a record is without what may be large."""
ALL_BUT_REQUEST: Final = (
    *SUMMARY,
    *("lease_until", "traceparent", "digest", "retries", "waited_s", "attempt_began_at", "response"),
)


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """Times are Unix seconds; `request` is gone once the job has ended."""

    status: str
    attempt: int
    created_at: float
    tenant: str
    options: Options
    digest: str = ""
    request: bytes | None = None
    response: bytes | None = None
    """What a Response repeats of its request, JSON; None: the job is no Response (PROTOCOL.md §5.11)."""
    started_at: float | None = None
    first_delta_at: float | None = None
    finished_at: float | None = None
    retries: int = 0
    """How often the upstream was asked again before the job was parked last."""
    waited_s: float = 0.0
    """How long it has waited for that, all waits together."""
    attempt_began_at: float | None = None
    """Of an attempt that was parked: it goes on with the next claim."""
    not_before: int | None = None
    """Until when a parked job waits; milliseconds of Redis' own clock."""
    lease_until: int | None = None
    """Of the running attempt; milliseconds of Redis' own clock."""
    is_admitted: bool = False
    """Whether it had a place among its tenant's when it was made."""
    message: bytes | None = None
    """What the message of a job that waits for its turn said besides; JSON."""
    traceparent: str = ""
    """What the job's spans are children of, in whatever process they are; empty where nobody traces it."""

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STATUSES

    @property
    def queue_deadline(self) -> float:
        """When the job, if it is still queued, has waited for too long."""
        return self.created_at + self.options.queue_timeout_s

    def message_options(self) -> dict[str, Any]:
        """What its message is to say besides its id, for those who send it (again)."""
        said: dict[str, Any] = msgspec.json.decode(self.message) if self.message else {}
        return said | ({} if self.options.priority == FIRST else {"priority": self.options.priority})

    def is_parked(self, now: float) -> bool:
        """Whether the job is queued and waits for its time, not for a worker."""
        return self.status == "queued" and self.not_before is not None and now * 1000 < self.not_before

    def timings(self, now: float) -> Timings:
        """Durations so far, from the record's creation; clocks of two machines never make one negative."""

        def since(moment: float | None) -> float | None:
            return None if moment is None else max(0.0, moment - self.created_at)

        return Timings(
            queued_s=since(self.started_at),
            first_delta_s=since(self.first_delta_at),
            total_s=max(0.0, now - self.created_at),
        )

    def log_fields(self, job_id: str) -> dict[str, object]:
        """What each line about the job in a log of ours carries (as `extra`)."""
        return {"job_id": job_id, "attempt": self.attempt, "tenant": self.tenant}

    def fields(self) -> tuple[Field, ...]:
        """Names and values of the hash, but for those that the scripts keep themselves."""
        fields: list[Field] = [
            *("created_at", f"{self.created_at:.6f}", "tenant", self.tenant),
            *("options", msgspec.json.encode(self.options)),
        ]
        if self.request is not None:
            fields += ["request", self.request]
        if self.response is not None:
            fields += ["response", self.response]
        if self.is_admitted:
            fields += ["admitted", 1]
        if self.digest:
            fields += ["digest", self.digest]
        if self.traceparent:
            fields += ["traceparent", self.traceparent]
        if self.retries:
            fields += ["retries", self.retries, "waited_s", f"{self.waited_s:.3f}"]
        for name in ("started_at", "first_delta_at", "attempt_began_at"):
            moment: float | None = getattr(self, name)
            if moment is not None:
                fields += [name, f"{moment:.6f}"]
        return tuple(fields)


def read_record(reply: list[bytes]) -> Record | None:
    """The record in a script's HGETALL; None where there is none."""
    return _read(dict(zip(reply[::2], reply[1::2], strict=True)))


def read_fields(names: Sequence[str], values: Sequence[bytes | None]) -> Record | None:
    """The record as far as HMGET was asked for it; None where there is none."""
    pairs = zip(names, values, strict=True)
    return _read({name.encode(): value for name, value in pairs if value is not None})


def _read(fields: Mapping[bytes, bytes]) -> Record | None:
    if not fields:
        return None

    def moment(name: bytes) -> float | None:
        return float(fields[name]) if name in fields else None

    return Record(
        status=fields[b"status"].decode(),
        attempt=int(fields[b"attempt"]),
        created_at=float(fields[b"created_at"]),
        tenant=fields[b"tenant"].decode(),
        options=msgspec.json.decode(fields[b"options"], type=Options),
        digest=fields.get(b"digest", b"").decode(),
        request=fields.get(b"request"),
        response=fields.get(b"response"),
        started_at=moment(b"started_at"),
        first_delta_at=moment(b"first_delta_at"),
        finished_at=moment(b"finished_at"),
        retries=int(fields.get(b"retries", 0)),
        waited_s=moment(b"waited_s") or 0.0,
        attempt_began_at=moment(b"attempt_began_at"),
        not_before=int(fields[b"not_before"]) if b"not_before" in fields else None,
        lease_until=int(fields[b"lease_until"]) if b"lease_until" in fields else None,
        is_admitted=b"admitted" in fields,
        message=fields.get(b"message"),
        traceparent=fields.get(b"traceparent", b"").decode(),
    )


class CancelRequest(msgspec.Struct, frozen=True):
    """What a cancel key says. A bare key (any other value) says no more than that it is there."""

    reason: str = "cancel_key"
    requested_at: float | None = None
    tenant: str | None = None  # who left a tombstone: it is for a job of this tenant's only


def encode_cancel(request: CancelRequest) -> bytes:
    return msgspec.json.encode(request)


def decode_cancel(value: bytes) -> CancelRequest | None:
    """What the cancel key's value says; None where there is no key (an empty value from a script)."""
    if not value:
        return None
    try:
        request = msgspec.json.decode(value, type=CancelRequest)
        return msgspec.structs.replace(request, reason=request.reason[:MAX_REASON_CHARACTERS])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return CancelRequest()
