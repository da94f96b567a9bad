"""The names of Redis keys and channels, and how long they live (PROTOCOL.md §3). The only home of both."""

import re
from typing import Final, Literal

import msgspec

from . import redis_url

JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")

CANCEL_TTL_S: Final = 86_400
ACTIVE_TTL_S: Final = 3_600
"""How long a running job's keys outlive their last renewal. Renewals come every second."""
LEASE_S: Final = 5.0
"""How long a worker's claim on a running job lasts unless it is renewed, which it is every second."""
WATCHED_TTL_S: Final = 60
"""How long a job counts as watched after a relay that cannot listen has said so."""
MODELS_TTL_S: Final = 120
"""How long a worker's list of models holds. It comes every 30 s."""
PLACE_S: Final = 30.0
"""How long a running job's place among its tenant's lasts unless it is kept, as it is every few seconds."""
SENDING_S: Final = 5.0
"""How long a job that is called keeps its place until its message is sent."""
INDEX_TTL_S: Final = 172_800
"""How long the sets across jobs outlive their last use."""

RANDOM_KEY: Final = "random-"
"""How an Idempotency-Key begins that a client has made for a single call (PROTOCOL.md §5.2)."""


def is_job_id(job_id: str) -> bool:
    """Whether `job_id` may name a job. Anything else is refused: braces would spread its keys over slots."""
    return JOB_ID.fullmatch(job_id) is not None


class JobKeys(msgspec.Struct, frozen=True):
    """The keys of one job. The hash tag keeps them in one cluster slot."""

    meta: str
    log: str
    cancel: str
    channel: str
    watched: str
    sent: str


class TenantKeys(msgspec.Struct, frozen=True):
    """The keys of one tenant, in one cluster slot. Hints."""

    running: str
    """Jobs that have a place: their messages are sent, or they run. By when the place counts as lost."""
    waiting: str
    """Jobs that wait for a place, by whose turn it is."""
    jobs: str
    """The newest jobs, by when they were created."""


class Keys(msgspec.Struct, frozen=True):
    """All names under one prefix."""

    prefix: str = "dw"
    publish: Literal["PUBLISH", "SPUBLISH"] = "PUBLISH"
    """The command that publishes on a job's channel: a cluster keeps it in the job's slot."""

    @property
    def is_sharded(self) -> bool:
        """Whether they lie on a cluster, where no command may have keys of two jobs."""
        return self.publish == "SPUBLISH"

    @classmethod
    def at(cls, url: str, prefix: str = "dw") -> "Keys":
        """Those for the Redis at `url`."""
        return cls(prefix, "SPUBLISH" if redis_url.parse(url).kind == "cluster" else "PUBLISH")

    def job(self, job_id: str) -> JobKeys:
        tag = f"{self.prefix}:{{{job_id}}}"
        names = ("meta", "log", "cancel", "events", "watched", "sent")
        return JobKeys(*(f"{tag}:{name}" for name in names))

    def tenant(self, tenant: str) -> TenantKeys:
        tag = f"{self.prefix}:tenant:{{{tenant}}}"
        return TenantKeys(f"{tag}:running", f"{tag}:waiting", f"{tag}:jobs")

    def control(self, owner: str) -> str:
        """The channel on which one worker process hears of cancellations."""
        return f"{self.prefix}:control:{owner}"

    def probe(self, feed: str) -> str:
        """The channel on which one relay's feed hears itself."""
        return f"{self.prefix}:probe:{feed}"

    @property
    def revocations(self) -> str:
        """The channel on which relays hear that there is a revocation to read."""
        return f"{self.prefix}:revocations"

    @property
    def revoked(self) -> str:
        """The stream of revocations."""
        return f"{self.prefix}:revoked:log"

    @property
    def webhooks(self) -> str:
        """Jobs whose ends webhooks are to hear of, by the time of the next look at them. A hint."""
        return f"{self.prefix}:webhooks"

    def webhook(self, job_id: str) -> str:
        """What webhooks are told of a job's end, and which of them have been."""
        return f"{self.prefix}:webhook:{job_id}"

    @property
    def vitals(self) -> str:
        """The channel on which every process says once a second how it is."""
        return f"{self.prefix}:vitals"

    @property
    def models(self) -> str:
        """The models that the upstreams serve."""
        return f"{self.prefix}:models"

    @property
    def queued(self) -> str:
        """Jobs that wait for a worker, by the time at which they have waited too long. A hint."""
        return f"{self.prefix}:queued"

    @property
    def parked(self) -> str:
        """Jobs that are parked, by the time at which they are due. A hint."""
        return f"{self.prefix}:parked"

    @property
    def held(self) -> str:
        """Jobs that wait for a place of their tenant's, by the time at which that was too long. A hint."""
        return f"{self.prefix}:held"

    @property
    def tenants(self) -> str:
        """Tenants that have had jobs lately, by when that was. A hint."""
        return f"{self.prefix}:tenants"

    @property
    def waiting_tenants(self) -> str:
        """Tenants of which jobs wait for a place. A hint."""
        return f"{self.prefix}:tenants:waiting"

    @property
    def owners(self) -> str:
        """Worker processes, by the time at which they count as lost unless they are heard of. A hint."""
        return f"{self.prefix}:owners"

    def jobs_of(self, owner: str) -> str:
        """The jobs of one worker process. A hint."""
        return f"{self.prefix}:owner:{owner}:jobs"
