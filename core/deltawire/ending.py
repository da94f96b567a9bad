"""How an attempt ended, and the terminal event that says so. Pure."""

from typing import Any, Final, Literal

import msgspec

from .errors import WireError
from .events import (
    Cancel,
    Cancelled,
    Completed,
    Failed,
    Incomplete,
    IncompleteDetails,
    Output,
    TerminalEvent,
    Timings,
    UpstreamErrorDetails,
)
from .fold import Fold
from .record import CancelRequest
from .usage import estimate

Deadline = Literal["first_delta_timeout", "idle_timeout", "total_timeout"]
IncompleteReason = Literal["length", "content_filter", "upstream_eof", "idle_timeout", "total_timeout"]
Source = Literal["request", "upstream", "worker", "queue", "relay"]

_DEADLINES: dict[Deadline, str] = {
    "first_delta_timeout": "the gateway sent no delta in time",
    "idle_timeout": "the gateway fell silent",
    "total_timeout": "the job took longer than its timeout_s",
}

# Finish reasons that are not OpenAI's, and what they say.
_FAILED: Final = frozenset({"error", "network_error", "insufficient_system_resource"})  # OpenRouter; DeepSeek
LENGTH: Final = frozenset({"length", "model_length"})  # Mistral: the model's own limit


class AsCompleted(msgspec.Struct, frozen=True):
    pass


class AsIncomplete(msgspec.Struct, frozen=True):
    reason: IncompleteReason


class AsFailed(msgspec.Struct, frozen=True):
    error: WireError
    source: Source
    status_code: int | None = None  # the upstream's, if it gave one
    upstream_error: UpstreamErrorDetails | None = None


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


def at_end_of_stream(fold: Fold, choices: int = 1) -> Ending:
    """The gateway has said all it will, with [DONE] or without: what counts is the finish_reason.

    `choices`: so many have to have one.
    """
    reasons = [reason for reason in fold.finish_reasons() if reason is not None]
    if not reasons:
        if fold.is_empty:
            return AsFailed(
                WireError("upstream_eof", "the gateway ended the stream before its first delta"),
                "upstream",
            )
        return AsIncomplete("upstream_eof")
    if len(reasons) < max(choices, len(fold.finish_reasons())):
        return AsIncomplete("upstream_eof")
    if not _FAILED.isdisjoint(reasons):
        return AsFailed(WireError("upstream_error_event", "the gateway failed in mid-stream"), "upstream")
    if not LENGTH.isdisjoint(reasons):
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
    request: dict[str, Any] | None = None,
    outputs: list[Output] | None = None,
) -> TerminalEvent:
    """The event for an ending, with the fold of the attempt.

    `request` is there to estimate its usage where the upstream has not said it: None where the upstream was
    not asked, or has refused, so that nothing was used.
    """
    completion, usage, usage_source = fold.completion(), fold.usage, "provider"
    if usage is None:
        usage = None if request is None else estimate(request, completion)
        usage_source = "unavailable" if usage is None else "estimated"
    fields = {
        "job_id": job_id,
        "sequence_number": sequence_number,
        "attempt": attempt,
        "created_at": now,
        "completion": completion,
        "usage": usage,
        "usage_source": usage_source,
        "timings": timings,
        "outputs": outputs or msgspec.UNSET,
    }
    match ending:
        case AsCompleted():
            return Completed(**fields)  # type: ignore[arg-type] # the fields are those of every terminal event
        case AsIncomplete(reason):
            return Incomplete(**fields, incomplete_details=IncompleteDetails(reason))  # type: ignore[arg-type] # as above
        case AsFailed(error, source, status_code, upstream_error):
            return Failed(
                **fields,  # type: ignore[arg-type] # as above
                error=error.error,
                source=source,
                status_code=status_code,
                upstream_error=upstream_error or msgspec.UNSET,
            )
        case AsCancelled(wanted, heard_at, upstream_closed_at):
            cancel = Cancel(
                reason=wanted.reason,
                requested_at=heard_at if wanted.requested_at is None else wanted.requested_at,
                upstream_closed_at=upstream_closed_at,
            )
            return Cancelled(**fields, cancel=cancel)  # type: ignore[arg-type] # as above
