"""The events of a job's log (PROTOCOL.md §2): frozen records, one closed union.

Field order matters on the wire: `type`, `job_id` and `sequence_number` come first, so that a relay
finds them without parsing the event (see `codec.py`). Times are Unix seconds, durations seconds.
"""

from typing import Any, Final, Literal, get_args

import msgspec

from .errors import Error

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
STATUSES: Final[tuple[str, ...]] = get_args(Status)
TERMINAL_STATUSES: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})
UsageSource = Literal["provider", "estimated", "unavailable"]

MAX_EVENT_BYTES: Final = 262_144


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    job_id: str
    sequence_number: int
    attempt: int
    created_at: float


class Queued(_Event, frozen=True, kw_only=True, tag="queued"):
    """The job has a record and waits for a worker."""


class InProgress(_Event, frozen=True, kw_only=True, tag="in_progress"):
    """A worker has claimed the job and turns to the upstream."""

    upstream: str
    model: str | None


class Retrying(_Event, frozen=True, kw_only=True, tag="retrying", rename={"next_try": "try"}):
    """The gateway refused or could not be reached; it is asked again after `delay_s`. Never after a delta."""

    next_try: int  # 2 for the first retry
    reason: str  # an error code
    delay_s: float


class Delta(_Event, frozen=True, kw_only=True, tag="delta"):
    """One upstream `chat.completion.chunk`, unknown fields intact.

    A relay may give several as one (`merge`): those from `first_sequence_number` to `sequence_number`.
    """

    first_sequence_number: int | msgspec.UnsetType = msgspec.UNSET
    chunk: msgspec.Raw


class Restarted(_Event, frozen=True, kw_only=True, tag="restarted"):
    """A new attempt begins after deltas were published: discard those up to `discard_through`."""

    reason: str
    discard_through: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in seconds from the record's creation; None where the moment never came."""

    queued_s: float | None
    first_delta_s: float | None
    total_s: float


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["length", "content_filter", "upstream_eof", "idle_timeout", "total_timeout"]


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """Who cancelled, when, and when the upstream connection was closed (None: none was open)."""

    reason: str
    requested_at: float | None
    upstream_closed_at: float | None


class ParseError(msgspec.Struct, frozen=True):
    """Why a choice's text is not what `response_format` declared; the text itself stays in `completion`."""

    reason: Literal["not_json", "not_valid", "incomplete", "refused", "invalid_schema", "too_large"]
    message: str


LEFT_OUT: Final = ParseError("too_large", "the event would grow too large")
"""Stands for JSON that was fine: it can be parsed again from the completion's text."""


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """What can be relied on in a choice that calls tools, or was to be JSON (`response_format`)."""

    index: int
    tool_calls: Literal["complete", "incomplete"] | None = None  # None: it calls none
    parsed: Any = None  # the JSON value; None also where there is a parse_error
    parse_error: ParseError | None = None


class _Terminal(_Event, frozen=True, kw_only=True):
    completion: dict[str, Any] | None  # OpenAI's chat.completion, vendor fields included
    usage: dict[str, Any] | None  # OpenAI's usage object
    usage_source: UsageSource
    timings: Timings
    outputs: list[Output] | msgspec.UnsetType = msgspec.UNSET  # of those choices that have one
    completion_url: str | msgspec.UnsetType = msgspec.UNSET

    @property
    def status(self) -> Status:
        """The job's, now that it has ended: the event's type."""
        tag: Status = self.__struct_config__.tag  # type: ignore[assignment] # each subclass has its own
        return tag


class Completed(_Terminal, frozen=True, kw_only=True, tag="completed"):
    """A `finish_reason` came that is neither `length` nor `content_filter`."""


class Incomplete(_Terminal, frozen=True, kw_only=True, tag="incomplete"):
    """The completion stops short of its end."""

    incomplete_details: IncompleteDetails


class UpstreamErrorDetails(msgspec.Struct, frozen=True):
    """What an upstream's error object said of itself, where that was a short plain word."""

    type: str | None = None
    code: str | None = None
    param: str | None = None


class Failed(_Terminal, frozen=True, kw_only=True, tag="failed"):
    """`source` says whose fault it was; `status_code` is the upstream's HTTP status, if it gave one."""

    error: Error
    source: Literal["request", "upstream", "worker", "queue", "relay"]
    status_code: int | None = None
    upstream_error: UpstreamErrorDetails | msgspec.UnsetType = msgspec.UNSET


class Cancelled(_Terminal, frozen=True, kw_only=True, tag="cancelled"):
    """Somebody cancelled the job; `completion` holds the text so far."""

    cancel: Cancel


TerminalEvent = Completed | Incomplete | Failed | Cancelled
Event = Queued | InProgress | Retrying | Delta | Restarted | TerminalEvent
