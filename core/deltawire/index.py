"""Sets across jobs: where a sweeper looks. Hints only; the records are the truth (PROTOCOL.md §3.1).

Each entry is written before the record that it points to, and removed after. A key of a set lies in another
slot than the jobs it names, so nothing here is ever part of a job's script.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar, cast

from .keys import INDEX_TTL_S, Keys
from .scripts import ADD, NOTE, ONCE, OWNERS, Scripts

T = TypeVar("T")


class Index:
    """Raises RedisUnavailableError where Redis cannot answer."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._redis = scripts
        self._keys = keys

    async def entered(
        self, enter: Callable[[], Coroutine[Any, Any, None]], call: Coroutine[Any, Any, T]
    ) -> T:
        """What `call` answers; it is sent behind `enter`, one command that writes what points to its record.

        A single server has both at once: they go out in this order, over one connection. Raises, too, if the
        entry was refused alone, and is again: nobody would look for the record that is there by then.
        """
        if self._keys.is_sharded:
            try:
                await enter()
            except BaseException:
                call.close()
                raise
            return await call
        entry, answer = await asyncio.gather(enter(), call, return_exceptions=True)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(entry, BaseException):
            await enter()
        return cast("T", answer)

    # Jobs that wait for a worker.

    async def will_queue(self, job_id: str, deadline: float) -> None:
        """`deadline`: the Unix time at which the job will have waited too long. A repeat does not move it."""
        await self._redis.run(NOTE, (self._keys.queued,), INDEX_TTL_S, deadline, "NX", job_id)

    async def waits_until(self, job_id: str, deadline: float) -> None:
        """Corrects the deadline of a job that is among those that wait."""
        await self._redis.execute("ZADD", self._keys.queued, "XX", deadline, job_id)

    async def overdue(self, now: float, count: int) -> list[str]:
        """Jobs that have waited too long."""
        return _names(
            await self._redis.execute("ZRANGE", self._keys.queued, "-inf", now, "BYSCORE", "LIMIT", 0, count)
        )

    async def queued(self, count: int, start: int = 0) -> list[str]:
        """Jobs that wait, those with the nearest deadline first, from the `start`-th on."""
        return _names(await self._redis.execute("ZRANGE", self._keys.queued, start, start + count - 1))

    async def waiting(self) -> int:
        """How many jobs wait."""
        return int(await self._redis.execute("ZCARD", self._keys.queued))

    async def left_queue(self, job_ids: Collection[str]) -> None:
        if job_ids:
            await self._redis.execute("ZREM", self._keys.queued, *job_ids)

    async def may_send(self, job_id: str, pause_s: int) -> bool:
        """Whether nobody else has been told so within the pause."""
        return bool((await self._redis.run(ONCE, (self._keys.job(job_id).sent,), pause_s))[0])

    async def was_not_sent(self, job_id: str) -> None:
        """Takes a yes of `may_send` back."""
        await self._redis.execute("DEL", self._keys.job(job_id).sent)

    # Jobs that wait for their turn among their tenant's: they have no message yet.

    async def will_hold(self, job_id: str, deadline: float) -> None:
        """`deadline` as that of `will_queue`. A repeat does not move it."""
        await self._redis.run(NOTE, (self._keys.held,), INDEX_TTL_S, deadline, "NX", job_id)

    async def held_too_long(self, now: float, count: int) -> list[str]:
        key = self._keys.held
        return _names(await self._redis.execute("ZRANGE", key, "-inf", now, "BYSCORE", "LIMIT", 0, count))

    async def some_held(self, count: int) -> list[str]:
        """Any of them."""
        return _names(await self._redis.execute("ZRANDMEMBER", self._keys.held, count))

    async def left_hold(self, job_ids: Collection[str]) -> None:
        if job_ids:
            await self._redis.execute("ZREM", self._keys.held, *job_ids)

    async def has_waiting(self, tenant: str) -> None:
        """Jobs of the tenant wait."""
        await self._redis.run(ADD, (self._keys.waiting_tenants,), INDEX_TTL_S, tenant)

    async def waiting_tenants(self, count: int) -> list[str]:
        """Some tenants of which jobs wait, in no order."""
        return _names(await self._redis.execute("SRANDMEMBER", self._keys.waiting_tenants, count))

    async def has_none_waiting(self, tenant: str) -> None:
        await self._redis.execute("SREM", self._keys.waiting_tenants, tenant)

    # Jobs that are parked: they are among those that wait, too.

    async def counts(self) -> tuple[int, int, int, int]:
        """How many jobs wait for a worker, wait for their turn, are parked, and run."""
        names = (self._keys.queued, self._keys.held, self._keys.parked)
        queued, held, parked = [int(await self._redis.execute("ZCARD", name)) for name in names]
        owners = _names(await self._redis.execute("ZRANGE", self._keys.owners, 0, -1))
        running = [int(await self._redis.execute("SCARD", self._keys.jobs_of(owner))) for owner in owners]
        return max(0, queued - parked), held, parked, sum(running)

    async def will_park(self, job_id: str, due: float) -> None:
        """`due`: the Unix time at which its message is to be sent. A repeat moves it."""
        await self._redis.run(NOTE, (self._keys.parked,), INDEX_TTL_S, due, "CH", job_id)

    async def due(self, now: float, count: int) -> list[str]:
        """Jobs that were due by then."""
        return _names(
            await self._redis.execute("ZRANGE", self._keys.parked, "-inf", now, "BYSCORE", "LIMIT", 0, count)
        )

    async def left_parking(self, job_ids: Collection[str]) -> None:
        if job_ids:
            await self._redis.execute("ZREM", self._keys.parked, *job_ids)

    # Worker processes and the jobs they run.

    async def will_run(self, owner: str, job_ids: Collection[str]) -> None:
        if job_ids:
            await self._redis.run(ADD, (self._keys.jobs_of(owner),), INDEX_TTL_S, *job_ids)

    async def has_run(self, owner: str, job_ids: Collection[str]) -> None:
        if job_ids:
            await self._redis.execute("SREM", self._keys.jobs_of(owner), *job_ids)

    async def jobs_of(self, owner: str) -> list[str]:
        return _names(await self._redis.execute("SMEMBERS", self._keys.jobs_of(owner)))

    async def lives(self, owner: str, lease_s: float) -> bool:
        """Says that a worker process lives. Whether that was news to Redis, which may have lost it."""
        return bool((await self._owners(owner, lease_s))[0])

    async def lost_owners(self) -> list[str]:
        """Worker processes that were not heard of for their lease."""
        return _names((await self._owners("", 0))[1])

    async def forget(self, owner: str) -> None:
        await self._redis.execute("ZREM", self._keys.owners, owner)

    async def _owners(self, owner: str, lease_s: float) -> list[Any]:
        key = self._keys.owners
        return await self._redis.run(OWNERS, (key,), owner, round(lease_s * 1000), INDEX_TTL_S)


def _names(reply: object) -> list[str]:
    return [name.decode() for name in cast("list[bytes]", reply)]
