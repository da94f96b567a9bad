"""The list of a tenant's jobs, a page at a time (PROTOCOL.md §5.8)."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import msgspec

from deltawire.errors import WireError
from deltawire.keys import is_job_id
from deltawire.log import JobLog
from deltawire.record import Record

MAX_LIMIT: Final = 100
Position = tuple[float, str]
LOOKED_AT: Final = 100
MAX_LOOKED_AT: Final = 2_000
"""Entries that one page looks at: few may be of the status that is asked for."""
MAX_TENANTS: Final = 100


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a page is to hold; `after` is the last job of the page before it."""

    limit: int = 20
    after: str | None = None
    status: str | None = None
    descending: bool = True


class Page(msgspec.Struct, frozen=True):
    """`last_id` is where to go on: not always the last of `jobs`, where others were looked at in vain."""

    jobs: list[tuple[str, Record]]
    last_id: str | None
    has_more: bool


class JobList:
    """Entries are hints: those whose records have expired are dropped when they are met."""

    def __init__(self, log: JobLog) -> None:
        self._log = log

    async def page(self, tenant: str | None, wanted: Wanted) -> Page:
        """Of one tenant's jobs, or of all (the MAX_TENANTS that had jobs last).

        Raises WireError `invalid_request` where `after` is no job of them.
        """
        tenants = [tenant] if tenant is not None else await self._log.places.tenants(MAX_TENANTS)
        position = None if wanted.after is None else await self._position(tenant, wanted.after)
        jobs: list[tuple[str, Record]] = []
        last_id: str | None = None
        looked_at = 0
        async with aclosing(self._jobs(tenants, position, wanted)) as found:
            async for job_id, record in found:
                if len(jobs) == wanted.limit or looked_at == MAX_LOOKED_AT:
                    return Page(jobs, last_id, has_more=True)
                looked_at += 1
                last_id = job_id
                if wanted.status in (None, record.status):
                    jobs.append((job_id, record))
        return Page(jobs, last_id, has_more=False)

    async def _position(self, tenant: str | None, job_id: str) -> Position:
        record = await self._log.summary(job_id) if is_job_id(job_id) else None
        if record is None or tenant not in (None, record.tenant):
            raise WireError("invalid_request", "after must be a job of the list", param="after")
        return record.created_at, job_id

    async def _jobs(
        self, tenants: list[str], position: Position | None, wanted: Wanted
    ) -> AsyncGenerator[tuple[str, Record]]:
        """All jobs beyond the position, in order."""
        first = max if wanted.descending else min
        each = [self._of_tenant(tenant, position, wanted) for tenant in tenants]
        try:
            heads: dict[int, tuple[str, Record]] = {}
            # All of them: one that is still being read cannot be closed.
            found = await asyncio.gather(*(anext(jobs, None) for jobs in each), return_exceptions=True)
            for index, head in enumerate(found):
                if isinstance(head, BaseException):
                    raise head
                if head is not None:
                    heads[index] = head
            while heads:
                index = first(heads, key=lambda index: (heads[index][1].created_at, heads[index][0]))
                yield heads.pop(index)
                if (following := await anext(each[index], None)) is not None:
                    heads[index] = following
        finally:
            for jobs in each:
                await jobs.aclose()

    async def _of_tenant(
        self, tenant: str, position: Position | None, wanted: Wanted
    ) -> AsyncGenerator[tuple[str, Record]]:
        places, descending = self._log.places, wanted.descending
        count = wanted.limit + 2 if wanted.status is None else LOOKED_AT
        seen: set[str] = set()
        gone: list[str] = []
        bound, offset = None if position is None else position[0], 0
        try:
            while ids := await places.listed(tenant, bound, count, descending=descending, offset=offset):
                new = [job_id for job_id in ids if job_id not in seen]
                seen.update(new)
                offset += len(ids)
                records = await asyncio.gather(*map(self._log.summary, new))
                for job_id, record in zip(new, records, strict=True):
                    if record is None:
                        gone.append(job_id)
                        continue
                    # Not counted from the front, where others add jobs meanwhile.
                    bound, offset = record.created_at, 0
                    if not _is_before(position, (bound, job_id), descending):
                        yield job_id, record
                if len(ids) < count:
                    break
        finally:
            await places.unlist(tenant, gone)


def _is_before(position: Position | None, place: Position, descending: bool) -> bool:
    """Whether a job of the same moment comes before the position, or is it."""
    if position is None or place[0] != position[0]:
        return False
    return place >= position if descending else place <= position
