"""What becomes of a job whose attempt has ended without a terminal event. Pure.

The one decision for whoever finds such a job: a claim today, a sweeper or a drain as well.
"""

from typing import Literal

import msgspec

from deltawire.log import Record


class NextAttempt(msgspec.Struct, frozen=True):
    """Go on with another attempt; `discards` says that readers have deltas to throw away."""

    discards: bool


class End(msgspec.Struct, frozen=True):
    """End the job as `failed` with this code."""

    code: Literal["worker_lost"]


def recover(record: Record) -> NextAttempt | End:
    """Decides by the job's `restart` policy and `max_attempts`.

    By default a job starts again only while nobody has seen a delta: a visible restart is for those who
    asked for it.
    """
    options = record.options
    has_deltas = record.first_delta_at is not None
    if record.attempt >= options.max_attempts or options.restart == "never":
        return End("worker_lost")
    if has_deltas and options.restart != "always":
        return End("worker_lost")
    return NextAttempt(discards=has_deltas)
