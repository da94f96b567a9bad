"""Short calls of a job's log for the contract tests: one job, "job", and its owner, "w1"."""

from typing import Any

from deltawire.codec import sequence_number_of
from deltawire.keys import ACTIVE_TTL_S
from deltawire.log import AppendCode, Claim, Submitted
from deltawire.options import Options
from deltawire.scripts import RENEW
from tests.support import sample_events as sample
from tests.support.job_logs import OpenedLog
from tests.support.sample_events import line

BODY = b'{"model":"m","messages":[]}'
LEASE_S = 60.0
NOW = 1_700_000_000.5


async def submit(log: OpenedLog, job_id: str = "job", *, digest: str = "d", **options: Any) -> Submitted:
    return await log.submit(job_id, request=BODY, options=Options(**options), digest=digest, created_at=NOW)


async def claim(log: OpenedLog, owner: str = "w1", **kwargs: Any) -> Claim:
    return await log.claim("job", owner=owner, **{"lease_s": LEASE_S, **kwargs})


async def append(
    log: OpenedLog, first: int, *texts: str, attempt: int = 1, owner: str = "w1", end: str = "", **kwargs: Any
) -> tuple[AppendCode, int]:
    """Appends a delta for each text, and a terminal event of status `end`."""
    events = [line(sample.delta(first + at, text, attempt=attempt)) for at, text in enumerate(texts)]
    if end:
        events.append(ending(end, first + len(texts), attempt))
    return await log.append(
        "job", attempt=attempt, owner=owner, first=first, events=events, terminal=end, **kwargs
    )


def ending(status: str, number: int, attempt: int = 1) -> bytes:
    make = sample.cancelled if status == "cancelled" else sample.completed
    return line(make(number, attempt=attempt))


async def renew(
    log: OpenedLog, owner: str = "w1", attempt: int = 1, ttl_s: int = ACTIVE_TTL_S
) -> list[bytes]:
    keys = log.keys.job("job")
    reply: list[bytes] = await log.scripts.evalsha(
        RENEW, 3, keys.meta, keys.log, keys.cancel, owner, attempt, round(LEASE_S * 1000), ACTIVE_TTL_S
    )
    return reply


async def running(log: OpenedLog, **options: Any) -> None:
    """A job that w1 has claimed: one event, attempt 1."""
    await submit(log, **options)
    assert (await claim(log)).code == "CLAIMED"


async def numbers(log: OpenedLog) -> list[int]:
    return [sequence_number_of(event) for event in await log.read("job", 0)]
