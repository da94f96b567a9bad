"""Encoded events to put into logs, and chunks to fold."""

import json
from typing import Any

from msgspec import Raw

from deltawire.codec import encode, encode_terminal
from deltawire.events import (
    Cancel,
    Cancelled,
    Completed,
    Delta,
    Event,
    InProgress,
    Queued,
    Restarted,
    TerminalEvent,
    Timings,
)

CREATED_AT = 1_700_000_000.25
TIMINGS = Timings(queued_s=0.5, first_delta_s=1.0, total_s=2.0)


def text_chunk(text: str, *, index: int = 0, finish_reason: str | None = None) -> dict[str, Any]:
    """A `chat.completion.chunk` as OpenAI sends it, with one piece of content."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [
            {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish_reason}
        ],
    }


def queued(number: int = 1, *, job_id: str = "job") -> Queued:
    return Queued(job_id=job_id, sequence_number=number, attempt=0, created_at=CREATED_AT)


def in_progress(number: int, *, job_id: str = "job", attempt: int = 1) -> InProgress:
    return InProgress(
        job_id=job_id,
        sequence_number=number,
        attempt=attempt,
        created_at=CREATED_AT,
        upstream="default",
        model="m",
    )


def delta(number: int, text: str = "x", *, job_id: str = "job", attempt: int = 1) -> Delta:
    return Delta(
        job_id=job_id,
        sequence_number=number,
        attempt=attempt,
        created_at=CREATED_AT,
        chunk=Raw(json.dumps(text_chunk(text)).encode()),
    )


def restarted(number: int, *, job_id: str = "job", attempt: int = 2) -> Restarted:
    return Restarted(
        job_id=job_id,
        sequence_number=number,
        attempt=attempt,
        created_at=CREATED_AT,
        reason="worker_lost",
        discard_through=number - 1,
    )


def completed(
    number: int, *, job_id: str = "job", attempt: int = 1, completion: dict[str, Any] | None = None
) -> Completed:
    return Completed(
        job_id=job_id,
        sequence_number=number,
        attempt=attempt,
        created_at=CREATED_AT,
        completion=completion,
        usage=None,
        usage_source="unavailable",
        timings=TIMINGS,
    )


def cancelled(number: int, *, job_id: str = "job", attempt: int = 1) -> Cancelled:
    return Cancelled(
        job_id=job_id,
        sequence_number=number,
        attempt=attempt,
        created_at=CREATED_AT,
        completion=None,
        usage=None,
        usage_source="unavailable",
        timings=TIMINGS,
        cancel=Cancel(reason="test", requested_at=CREATED_AT, upstream_closed_at=None),
    )


def line(event: Event) -> bytes:
    """The event as it stands in a log."""
    return encode_terminal(event) if isinstance(event, TerminalEvent) else encode(event)
