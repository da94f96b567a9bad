"""How an attempt ended, and the terminal event that says so. Pure."""

from typing import Literal

import msgspec

from .errors import WireError
from .events import (
    Cancel,
    Cancelled,
    Completed,
    Failed,
    Incomplete,
    IncompleteDetails,
    TerminalEvent,
    Timings,
)
from .fold import Fold
from .record import CancelRequest

Deadline = Literal["first_delta_timeout", "idle_timeout", "total_timeout"]
IncompleteReason = Literal["length", "content_filter", "upstream_eof", "idle_timeout", "total_timeout"]
Source = Literal["request", "upstream", "worker", "queue", "relay"]

_DEADLINES: dict[Deadline, str] = {
    "first_delta_timeout": "the gateway sent no delta in time",
    "idle_timeout": "the gateway fell silent",
    "total_timeout": "the job took longer than its timeout_s",
}


class AsCompleted(msgspec.Struct, frozen=True):
    pass


class AsIncomplete(msgspec.Struct, frozen=True):
    reason: IncompleteReason


class AsFailed(msgspec.Struct, frozen=True):
    error: WireError
    source: Source
    status_code: int | None = None  # the upstream's, if it gave one


class AsCancelled(msgspec.Struct, frozen=True):
    request: CancelRequest
    heard_at: float  # stands for the time of the request where a bare key does not say it
    upstream_closed_at: float | None


Ending = AsCompleted | AsIncomplete | AsFailed | AsCancelled


def as_queue_timeout() -> AsFailed:
    """No worker took the job before its `queue_deadline`."""
    return AsFailed(WireError("queue_timeout", "no worker took the job in time"), "queue")


def as_lost(code: str) -> AsFailed:
    """Nobody streams the job any more, and it does not start again; `code` says how the attempt was lost."""
    return AsFailed(WireError(code, "the worker that ran this job was lost"), "worker")


def at_end_of_stream(fold: Fold) -> Ending:
    """The gateway has said all it will, with [DONE] or without: what counts is the finish_reason."""
    reasons = [reason for reason in fold.finish_reasons() if reason is not None]
    if not reasons:
        if fold.is_empty:
            return AsFailed(
                WireError("upstream_eof", "the gateway ended the stream before its first delta"),
                "upstream",
            )
        return AsIncomplete("upstream_eof")
    if len(reasons) < len(fold.finish_reasons()):
        return AsIncomplete("upstream_eof")
    if "length" in reasons:
        return AsIncomplete("length")
    if "content_filter" in reasons:
        return AsIncomplete("content_filter")
    return AsCompleted()


def at_deadline(deadline: Deadline, fold: Fold) -> Ending:
    """After the first delta a time-out leaves an incomplete answer, before it a failure."""
    if fold.is_empty or deadline == "first_delta_timeout":
        return AsFailed(WireError(deadline, _DEADLINES[deadline]), "upstream")
    return AsIncomplete(deadline)


def terminal_event(
    ending: Ending,
    *,
    job_id: str,
    sequence_number: int,
    attempt: int,
    now: float,
    fold: Fold,
    timings: Timings,
) -> TerminalEvent:
    """The event for an ending, with the fold of the attempt."""
    fields = {
        "job_id": job_id,
        "sequence_number": sequence_number,
        "attempt": attempt,
        "created_at": now,
        "completion": fold.completion(),
        "usage": fold.usage,
        "usage_source": "unavailable" if fold.usage is None else "provider",
        "timings": timings,
    }
    match ending:
        case AsCompleted():
            return Completed(**fields)  # type: ignore[arg-type] # the fields are those of every terminal event
        case AsIncomplete(reason):
            return Incomplete(**fields, incomplete_details=IncompleteDetails(reason))  # type: ignore[arg-type] # as above
        case AsFailed(error, source, status_code):
            return Failed(**fields, error=error.error, source=source, status_code=status_code)  # type: ignore[arg-type] # as above
        case AsCancelled(request, heard_at, upstream_closed_at):
            cancel = Cancel(
                reason=request.reason,
                requested_at=heard_at if request.requested_at is None else request.requested_at,
                upstream_closed_at=upstream_closed_at,
            )
            return Cancelled(**fields, cancel=cancel)  # type: ignore[arg-type] # as above
