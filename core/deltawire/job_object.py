"""The job as `GET /v1/jobs/{id}` shows it, and as webhooks tell it (PROTOCOL.md §5.3). Pure."""

from typing import Any

import msgspec

from .events import Cancelled, Failed, Incomplete, TerminalEvent
from .record import Record


def job_object(job_id: str, record: Record, top: int, event: TerminalEvent | None = None) -> dict[str, Any]:
    """`event`: its end, if it has one that can be read. Never the request.

    The completion is the event's, which leaves out one that is too large for it.
    """
    job = job_summary(job_id, record, top, event) | {"completion": None, "outputs": None}
    if event is not None:
        job["completion"] = event.completion
        job["outputs"] = [] if isinstance(event.outputs, msgspec.UnsetType) else event.outputs
    return job


def job_summary(job_id: str, record: Record, top: int, event: TerminalEvent | None = None) -> dict[str, Any]:
    """As lists show it: without what was said."""
    return {
        "id": job_id,
        "object": "job",
        "status": record.status,
        "created_at": record.created_at,
        "attempt": record.attempt,
        "metadata": record.options.metadata,
        "usage": event and event.usage,
        "usage_source": event and event.usage_source,
        "error": event.error if isinstance(event, Failed) else None,
        "incomplete_details": event.incomplete_details if isinstance(event, Incomplete) else None,
        "cancel": event.cancel if isinstance(event, Cancelled) else None,
        "timings": event and event.timings,
        "latest_sequence_number": top,
    }
