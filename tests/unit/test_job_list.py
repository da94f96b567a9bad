"""The list of jobs, where not all of it can be read (PROTOCOL §5.8)."""

import asyncio
from typing import Any, cast

import pytest

from deltawire.errors import RedisUnavailableError
from deltawire.log import JobLog
from deltawire_relay.job_list import JobList, Wanted
from tests.support.virtual_time import virtual_time


class _Places:
    """Two tenants: of one nothing can be read, of the other it takes a while."""

    async def tenants(self, _: int) -> list[str]:
        return ["lost", "slow"]

    async def listed(self, tenant: str, *_: Any, **__: Any) -> list[str]:
        if tenant == "slow":
            await asyncio.sleep(1)
            return []
        raise RedisUnavailableError("no answer from Redis in time")

    async def unlist(self, *_: object) -> None: ...


class _Log:
    places = _Places()


@virtual_time
async def test_a_tenant_that_cannot_be_read_is_a_redis_that_is_away() -> None:
    """Whatever is being read of the others meanwhile: that is a 503, and no fault of the relay's own."""
    with pytest.raises(RedisUnavailableError):
        await JobList(cast(JobLog, _Log())).page(None, Wanted())
