"""Looks at what pub/sub does not tell, for all hubs of the process: a bare cancel key, a lost message, lost
writes, a lease that ran out, too long a wait for a job that nobody knows.

A hub that has heard nothing for TAIL_CHECK_AFTER_S is due. A cheap look only sees that its log ends where the
tail does, hundreds of logs in one command. Whatever else that shows, and the first of HEAD_LOOKS looks, is
for the dearer script that reads the record, too.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Final

from deltawire.errors import RedisUnavailableError
from deltawire.log import JobLog

from .hub import Hub

CHECK_INTERVAL_S: Final = 1.0
TAIL_CHECK_AFTER_S: Final = 3.0
LOOK_TIMEOUT_S: Final = 3.0  # so that one node of a cluster cannot keep the looks at all others waiting
HEAD_LOOKS: Final = 2  # of a lease that ran out readers hear within 15 s, and a sweeper wants 5 s of them
HUBS_AT_ONCE: Final = 256

_log = logging.getLogger(__name__)


class Looks:
    """Looks after `hubs`: those that there are whenever it iterates over them."""

    def __init__(self, hubs: Iterable[Hub], log: JobLog) -> None:
        self._hubs = hubs
        self._log = log

    async def keep(self) -> None:
        """Looks once a second, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await _try(self._refuse_strangers)
            await self._all(self._look_for_cancel_keys, _is_queued)
            await self._all(self._look_at_logs, _is_silent)

    async def _refuse_strangers(self) -> None:
        for hub in self._hubs:
            hub.refuse_strangers()

    async def _all(
        self, look: Callable[[Sequence[Hub]], Coroutine[Any, Any, None]], is_due: Callable[[Hub], bool]
    ) -> None:
        due = [hub for hub in self._hubs if is_due(hub)]
        if self._log.keys.is_sharded:  # no command is for many, and a node that is away stops nobody else
            await asyncio.gather(*(_try(look, [hub]) for hub in due))
            return
        for hubs in _batched(due):
            await _try(look, [hub for hub in hubs if is_due(hub)])  # still

    async def _look_for_cancel_keys(self, hubs: Sequence[Hub]) -> None:
        for job_id in await self._log.cancel_requested([hub.job_id for hub in hubs]):
            await self._log.cancel(job_id, reason="cancel_key")

    async def _look_at_logs(self, hubs: Sequence[Hub]) -> None:
        tops = {}
        heads = []
        for hub in hubs:
            if hub.begin_look() % HEAD_LOOKS == 1 or hub.is_in_doubt:
                heads.append(hub)
            else:
                tops[hub] = hub.tail.top
        await _compare(heads)
        # With the last event of the tail, which must be there.
        news = await self._log.news({hub.job_id: max(0, top - 1) for hub, top in tops.items()})
        await _compare([hub for hub, top in tops.items() if not hub.saw(top, news.get(hub.job_id, []))])


def _is_queued(hub: Hub) -> bool:
    return hub.status == "queued"


def _is_silent(hub: Hub) -> bool:
    return hub.is_silent(TAIL_CHECK_AFTER_S)


async def _compare(hubs: Iterable[Hub]) -> None:
    await asyncio.gather(*(_try(hub.compare) for hub in hubs))


async def _try(look: Callable[..., Coroutine[Any, Any, None]], *args: Sequence[Hub]) -> None:
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            await look(*args)
    except (RedisUnavailableError, TimeoutError) as error:
        _log.debug("cannot look after jobs: %s", error)
    except Exception:  # noqa: BLE001 - the outer edge: what is wrong with one must not end the looks at all
        _log.exception("a look failed")


def _batched(hubs: Sequence[Hub]) -> Iterator[Sequence[Hub]]:
    for start in range(0, len(hubs), HUBS_AT_ONCE):
        yield hubs[start : start + HUBS_AT_ONCE]
