"""The control messages of the WebSocket and SSE interfaces (PROTOCOL.md §6). Events pass beside them."""

from typing import Any, Literal

import msgspec

from .errors import Error


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    request_id: str | None = None


# From the client.


class Authenticate(_Message, frozen=True, kw_only=True, tag="authenticate"):
    token: str


class Subscribe(_Message, frozen=True, kw_only=True, tag="subscribe"):
    job_id: str
    starting_after: int = 0
    mode: Literal["replay", "snapshot"] = "replay"
    merge: bool = False


class Unsubscribe(_Message, frozen=True, kw_only=True, tag="unsubscribe"):
    job_id: str


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    job_id: str
    reason: str = "client"


ClientMessage = Authenticate | Subscribe | Unsubscribe | Cancel


# To the client. Without defaults where a field is always there.


class Authenticated(_Message, frozen=True, kw_only=True, tag="authenticated"):
    expires_at: float | None


class Subscribed(_Message, frozen=True, kw_only=True, tag="subscribed"):
    """Comes first, before any event of the job. `status` may be "unknown"."""

    job_id: str
    status: str
    attempt: int
    earliest_sequence_number: int
    latest_sequence_number: int
    recovered: bool


class Snapshot(_Message, frozen=True, kw_only=True, tag="snapshot"):
    """Stands for all events up to `sequence_number`; open choices have `finish_reason: null`."""

    job_id: str
    sequence_number: int
    completion: dict[str, Any] | None  # OpenAI's chat.completion


class Unsubscribed(_Message, frozen=True, kw_only=True, tag="unsubscribed"):
    job_id: str


class CancelResult(_Message, frozen=True, kw_only=True, tag="cancel_result"):
    """`delivered`: the job has ended; if not, its worker has been told, or its claim will find the key."""

    job_id: str
    status: str
    cancelled_from: Literal["queued", "in_progress"] | None
    delivered: bool


class Heartbeat(_Message, frozen=True, kw_only=True, tag="heartbeat"):
    """The last sequence number written, by job."""

    positions: dict[str, int]


class ErrorMessage(_Message, frozen=True, kw_only=True, tag="error"):
    error: Error
    job_id: str | None = None


class Goodbye(_Message, frozen=True, kw_only=True, tag="goodbye"):
    code: int
    retry_after_s: float


ServerMessage = (
    Authenticated | Subscribed | Snapshot | Unsubscribed | CancelResult | Heartbeat | ErrorMessage | Goodbye
)
