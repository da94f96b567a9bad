"""Places: which of a tenant's jobs may go to the workers, and which wait for their turn (PROTOCOL.md §1.4).

A job has a place from when its message is sent to its end. While a tenant has none free, its jobs get their
records and no message, so that a flood never stands in the broker's queue before anybody else's jobs. All
of it is a hint (see Index): the record decides, and what is lost here is healed by sweepers.
"""

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Final, Literal, cast

from .errors import RedisRefusedError
from .index import Index
from .keys import ACTIVE_TTL_S, INDEX_TTL_S, PLACE_S, SENDING_S, Keys
from .record import Record
from .scripts import ADMIT, NOTE, TURNS, Scripts
from .tenants import TenantLimits

Admission = Literal["ADMITTED", "WAITING", "FULL"]

MAX_LISTED: Final = 100_000
"""How many jobs of a tenant are listed: some 10 MB."""
CALLED_AT_ONCE: Final = 100
TENANTS_SEEN: Final = 10_000
SEEN_S: Final = 60.0
_CLASS_MS: Final = 10**13
"""Apart by so much are two priorities: more milliseconds than any clock shows."""


class Places:
    """Raises RedisUnavailableError where Redis cannot answer."""

    def __init__(self, scripts: Scripts, keys: Keys, index: Index, limits: TenantLimits) -> None:
        self._redis = scripts
        self._keys = keys
        self._index = index
        self._limits = limits
        self._seen: dict[str, float] = {}
        self.refused = 0
        """How many jobs were refused, as too many waited."""
        self.held = 0
        """How many jobs had to wait for their turn."""

    async def admit(
        self, job_id: str, record: Record, *, is_new: bool = False, runs: bool = False
    ) -> Admission:
        """Asks for a place; WAITING: the job is called when it is its turn. Can be repeated.

        FULL is the answer for a new job only, and leaves nothing behind. The place lasts until the job has
        waited too long for a worker; if it `runs`, for PLACE_S.
        """
        tenant = record.tenant
        keys = self._keys.tenant(tenant)
        now = time.time()
        await self._note(tenant, now)
        lasts_s = PLACE_S if runs else max(0.0, record.queue_deadline - now) + PLACE_S
        turn = (9 - record.options.priority) * _CLASS_MS + record.created_at * 1000
        reply = await self._redis.run(
            ADMIT,
            (keys.running, keys.waiting, keys.jobs),
            *(job_id, max(INDEX_TTL_S, round(lasts_s) + ACTIVE_TTL_S), round(lasts_s * 1000)),
            *(self._limits.places(tenant), self._limits.may_wait(tenant) if is_new else ""),
            *(f"{turn:.3f}", f"{record.created_at:.6f}", MAX_LISTED),
        )
        admission = cast("Admission", reply[0].decode())
        if admission == "WAITING":
            await self._index.has_waiting(tenant)
            self.held += 1
        elif admission == "FULL":
            self.refused += 1
        return admission

    async def turns(
        self,
        tenant: str,
        *,
        left: Collection[str] = (),
        kept: Collection[str] = (),
        count: int = CALLED_AT_ONCE,
    ) -> list[str]:
        """Takes places back and keeps others. Returns jobs that have one now, for `Turns.call`."""
        keys = self._keys.tenant(tenant)
        called = await self._redis.run(
            TURNS,
            (keys.running, keys.waiting),
            *(INDEX_TTL_S, round(PLACE_S * 1000), self._limits.places(tenant)),
            *(count, round(SENDING_S * 1000), len(left)),
            *left,
            *kept,
        )
        return [job_id.decode() for job_id in called]

    async def left(self, tenant: str, job_ids: Collection[str]) -> None:
        """Takes places back, and turns; who looks next calls the next ones."""
        await self.turns(tenant, left=job_ids, count=0)

    async def sent(self, tenant: str, deadlines: dict[str, float]) -> None:
        """The messages of those jobs are sent: they wait for a worker, each until its deadline."""
        keys = self._keys.tenant(tenant)
        await self._redis.execute("ZREM", keys.waiting, *deadlines)  # first: else they are called again
        until = {job_id: round((deadline + PLACE_S) * 1000) for job_id, deadline in deadlines.items()}
        # XX: one that has ended meanwhile has no place any more.
        run, running = self._redis.run, (keys.running,)
        await asyncio.gather(*(run(NOTE, running, INDEX_TTL_S, at, "XX", job) for job, at in until.items()))

    async def waits_since(self, tenant: str, job_id: str) -> float | None:
        """When a job that waits was created, or None."""
        score = await self._redis.execute("ZSCORE", self._keys.tenant(tenant).waiting, job_id)
        return None if score is None else float(score) % _CLASS_MS / 1000

    async def count_waiting(self, tenant: str) -> int:
        return int(await self._redis.execute("ZCARD", self._keys.tenant(tenant).waiting))

    async def some_running(self, tenant: str, count: int) -> list[str]:
        """Any of the jobs that have places."""
        key = self._keys.tenant(tenant).running
        return [job_id.decode() for job_id in await self._redis.execute("ZRANDMEMBER", key, count)]

    # The list of a tenant's jobs.

    async def listed(
        self, tenant: str, bound: float | None, count: int, *, descending: bool, offset: int = 0
    ) -> list[str]:
        """Its jobs by creation, from those created at `bound` on (None: from the first one)."""
        key = self._keys.tenant(tenant).jobs
        start = ("+inf" if descending else "-inf") if bound is None else f"{bound:.6f}"
        order = (start, "-inf", "BYSCORE", "REV") if descending else (start, "+inf", "BYSCORE")
        reply = await self._redis.execute("ZRANGE", key, *order, "LIMIT", offset, count)
        return [job_id.decode() for job_id in reply]

    async def unlist(self, tenant: str, job_ids: Collection[str]) -> None:
        if job_ids:
            await self._redis.execute("ZREM", self._keys.tenant(tenant).jobs, *job_ids)

    async def tenants(self, count: int) -> list[str]:
        """Those that have had jobs lately, the latest first."""
        reply = await self._redis.execute("ZRANGE", self._keys.tenants, 0, count - 1, "REV")
        return [name.decode() for name in reply]

    async def _note(self, tenant: str, now: float) -> None:
        if now - self._seen.get(tenant, 0.0) < SEEN_S:
            return
        if len(self._seen) >= TENANTS_SEEN:
            self._seen.clear()
        key = self._keys.tenants
        with suppress(RedisRefusedError):  # at maxmemory; it is for the list alone
            await self._redis.execute("ZADD", key, now, tenant)
            await self._redis.execute("ZREMRANGEBYRANK", key, 0, -1 - TENANTS_SEEN)
            await self._redis.execute("EXPIRE", key, INDEX_TTL_S)
        self._seen[tenant] = now
