"""Calls jobs that wait for a place of their tenant's: their messages are sent when it is their turn.

Whoever ends a job calls the next one of its tenant at once; once a second every sweeper calls what those who
died have not called.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Collection
from typing import Any, Final, Protocol

from .errors import RedisRefusedError, RedisUnavailableError, WireError
from .log import JobLog

TENANTS_AT_ONCE: Final = 100
CHECKED_AT_ONCE: Final = 10
NO_RECORD_S: Final = 60.0
"""So old a job without a record has none on its way: who made it has died, or it is erased."""
_OVER: Final = -math.inf

_log = logging.getLogger(__name__)


class Sender(Protocol):
    """The broker. Blocks and raises WireError `queue_unavailable`."""

    def send(self, job_id: str, **message: Any) -> None: ...


class Turns:
    """Raises RedisUnavailableError where Redis cannot answer."""

    def __init__(self, log: JobLog, queue: Sender) -> None:
        self._log = log
        self._places = log.places
        self._queue = queue

    async def go_on(self, tenant: str, *, left: Collection[str] = (), kept: Collection[str] = ()) -> None:
        """Takes back the places of jobs that have `left`, and calls those whose turn it is then."""
        await self.call(tenant, await self._places.turns(tenant, left=left, kept=kept))

    async def call_all(self) -> None:
        """Calls for some tenants, each as often as any other, whose turn it is."""
        index = self._log.index
        tenants = await index.waiting_tenants(TENANTS_AT_ONCE)
        random.shuffle(tenants)
        calls = await asyncio.gather(*map(self._look_after, tenants), return_exceptions=True)
        for tenant, answer in zip(tenants, calls, strict=True):
            if isinstance(answer, BaseException):
                self._pass_over(answer, "cannot call the jobs of a tenant", tenant=tenant)

    async def _look_after(self, tenant: str) -> None:
        index = self._log.index
        some = await self._places.some_running(tenant, CHECKED_AT_ONCE)
        ended = await asyncio.gather(*map(self._has_ended, some), return_exceptions=True)
        lost = [job_id for job_id, has_ended in zip(some, ended, strict=True) if has_ended is True]
        await self.go_on(tenant, left=lost)
        if not await self._places.count_waiting(tenant):
            await index.has_none_waiting(tenant)
            if await self._places.count_waiting(tenant):  # since
                await index.has_waiting(tenant)

    async def _has_ended(self, job_id: str) -> bool:
        record = await self._log.summary(job_id)
        return record is None or record.is_terminal

    def _pass_over(self, error: BaseException, what: str, **about: str) -> None:
        """One tenant's or one job's trouble is logged. Raises what is everybody's."""
        is_ones_own = isinstance(error, RedisRefusedError) or self._log.keys.is_sharded
        if isinstance(error, RedisUnavailableError) and is_ones_own:
            _log.warning("%s: %s", what, error, extra=about)
        elif isinstance(error, RedisUnavailableError | WireError) or not isinstance(error, Exception):
            raise error
        else:
            _log.error(what, exc_info=error, extra=about)

    async def call(self, tenant: str, job_ids: Collection[str]) -> None:
        """Sends the messages of jobs that have a place now. Those that cannot be sent are called again."""
        deadlines: dict[str, float] = {}
        over: list[str] = []
        try:
            for job_id in job_ids:
                try:
                    deadline = await self._send(tenant, job_id)
                except Exception as error:  # noqa: BLE001 - one that cannot be read must not stand before the others
                    self._pass_over(error, "cannot call a job", job_id=job_id, tenant=tenant)
                    deadline = None if isinstance(error, RedisUnavailableError) else _OVER
                if deadline == _OVER:
                    over.append(job_id)
                elif deadline is not None:
                    deadlines[job_id] = deadline
        except WireError as error:
            _log.warning("cannot send the messages of jobs whose turn it is: %s", error)
        finally:
            if deadlines:
                await self._places.sent(tenant, deadlines)
                await self._log.index.left_hold(deadlines)
        if over:
            await self._places.left(tenant, over)

    async def _send(self, tenant: str, job_id: str) -> float | None:
        """Its queue deadline; _OVER if it is nobody's turn; None if it is on its way to those that wait."""
        record = await self._log.summary(job_id)
        if record is None:
            since = await self._places.waits_since(tenant, job_id)
            return _OVER if since is None or time.time() - since > NO_RECORD_S else None
        if record.is_terminal:
            return _OVER
        if record.status != "queued":
            return None
        await self._log.index.will_queue(job_id, record.queue_deadline)
        await asyncio.to_thread(self._queue.send, job_id, **record.message_options())
        return record.queue_deadline
