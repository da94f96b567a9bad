"""The names of Redis keys and channels, and how long they live (PROTOCOL.md §3). The only home of both."""

import re
from typing import Final

import msgspec

JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")

CANCEL_TTL_S: Final = 86_400
ACTIVE_TTL_S: Final = 3_600
"""How long a running job's keys outlive their last renewal. Renewals come every second."""


def is_job_id(job_id: str) -> bool:
    """Whether `job_id` may name a job. Anything else is refused: braces would spread its keys over slots."""
    return JOB_ID.fullmatch(job_id) is not None


class JobKeys(msgspec.Struct, frozen=True):
    """The keys of one job. The hash tag keeps them in one cluster slot."""

    meta: str
    log: str
    cancel: str
    channel: str


class Keys(msgspec.Struct, frozen=True):
    """All names under one prefix."""

    prefix: str = "dw"

    def job(self, job_id: str) -> JobKeys:
        tag = f"{self.prefix}:{{{job_id}}}"
        return JobKeys(f"{tag}:meta", f"{tag}:log", f"{tag}:cancel", f"{tag}:events")

    def control(self, owner: str) -> str:
        """The channel on which one worker process hears of cancellations."""
        return f"{self.prefix}:control:{owner}"
