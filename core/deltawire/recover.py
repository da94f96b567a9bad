"""What becomes of a job whose attempt has ended without a terminal event. Pure.

The one decision for whoever finds such a job: a claim, a sweeper, a worker that shuts down.
"""

from typing import Literal

import msgspec

from .record import Record

Loss = Literal["worker_lost", "worker_shutdown"]
"""How the attempt was lost: its worker died, or gave it up when its time to finish was over."""


class NextAttempt(msgspec.Struct, frozen=True):
    """Go on with another attempt; `discards` says that readers have deltas to throw away."""

    discards: bool


class End(msgspec.Struct, frozen=True):
    """End the job as `failed` with this code."""

    code: Loss


def recover(record: Record, loss: Loss = "worker_lost") -> NextAttempt | End:
    """Decides by the job's `restart` policy and `max_attempts`.

    By default a job starts again only while nobody has seen a delta: a visible restart is for those who
    asked for it.
    """
    options = record.options
    has_deltas = record.first_delta_at is not None
    if record.attempt >= options.max_attempts or options.restart == "never":
        return End(loss)
    if has_deltas and options.restart != "always":
        return End(loss)
    return NextAttempt(discards=has_deltas)
