"""Tells webhooks of the ends of jobs. Every worker does; who takes an entry has it for a while.

An end may be told twice (a worker that dies after an answer, an answer that is lost), always by the same id;
it is told within a minute or so, whoever dies. A webhook that fails is called again over a day.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

import httpx
from prometheus_client.core import Metric

from deltawire.errors import RedisUnavailableError
from deltawire.log import JobLog
from deltawire.metrics import counter_family, gauge_family
from deltawire.notices import BATCH, LOOK_S, Notice, Notices

from .webhook_endpoints import Webhook

INTERVAL_S: Final = 1.0
PUT_OFF_S: Final = 2.0
TIMEOUT_S: Final = 10.0  # well below LEASE_S
MAX_UNDER_WAY: Final = 4 * BATCH
MAX_ANSWER_BYTES: Final = 1_024
RETRIES_S: tuple[float, ...] = (5, 300, 1_800, 7_200, 18_000, 36_000, 28_800)
"""How long after each failure a webhook is called again: about a day in all. Then it is given up."""
JITTER: Final = 0.2

_RESULTS: Final = ("delivered", "failed", "gone", "given_up")
_log = logging.getLogger(__name__)


class Webhooks:
    """Delivers for all webhooks that are configured."""

    def __init__(self, webhooks: Iterable[Webhook], log: JobLog, notices: Notices) -> None:
        self._by_name = {webhook.name: webhook for webhook in webhooks}
        self._log = log
        self._notices = notices
        self._under_way = Counter[str]()
        """What is being dealt with, by webhook; looks at jobs by no name."""
        self._share = MAX_UNDER_WAY // (len(self._by_name) + 1)
        self._results = dict.fromkeys(_RESULTS, 0)
        self._waiting = 0

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        yield counter_family(
            "deltawire_webhooks_total",
            "Calls of webhooks: delivered, failed (to be tried again), gone (410), given_up.",
            self._results,
            ["result"],
        )
        yield gauge_family(
            "deltawire_webhooks_pending",
            "Ends that webhooks are to hear of, those of jobs that still run included; of all workers.",
            self._waiting,
        )

    async def keep(self) -> None:
        """Until cancelled; calls that are under way are made again by somebody then."""
        # It follows no redirect and keeps no cookie: an answer must not send us anywhere.
        async with (
            httpx.AsyncClient(
                timeout=TIMEOUT_S,
                follow_redirects=False,
                headers={"User-Agent": "deltawire"},
                limits=httpx.Limits(max_connections=None),  # `_share` bounds them, for each webhook
            ) as client,
            asyncio.TaskGroup() as calls,
        ):  # a webhook that is slow holds up nobody else
            while True:
                due: list[tuple[str, str]] = []
                try:
                    self._waiting, due = await self._notices.due()
                except RedisUnavailableError as error:
                    _log.warning("cannot look after webhooks: %s", error)
                beyond: list[tuple[str, str]] = []
                for job_id, name in due:
                    if self._under_way[name] >= self._share:
                        beyond.append((job_id, name))
                        continue
                    self._under_way[name] += 1
                    calls.create_task(self._deal_with(client, job_id, name))
                if beyond:
                    with suppress(RedisUnavailableError):  # they are due again when LEASE_S is over
                        delay_s = PUT_OFF_S * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
                        await self._notices.put_off(beyond, time.time() + delay_s)
                if len(due) < BATCH:  # else there is more
                    await asyncio.sleep(INTERVAL_S * random.uniform(0.5, 1))  # noqa: S311 - jitter

    async def _deal_with(self, client: httpx.AsyncClient, job_id: str, name: str) -> None:
        try:
            if name:
                await self._tell(client, job_id, name)
            else:
                await self._find_end(job_id)
        except RedisUnavailableError as error:
            _log.warning("cannot look after a webhook: %s", error, extra={"job_id": job_id})
        except Exception:  # noqa: BLE001 - the outer edge: one job's must not keep others from being told
            _log.exception("cannot look after a webhook", extra={"job_id": job_id})
        finally:
            self._under_way[name] -= 1

    async def _find_end(self, job_id: str) -> None:
        """Looks whether the job has ended, and addresses its end to those who want it."""
        record = (await self._log.head(job_id)).record
        if record is not None and not record.is_terminal:
            await self._notices.expect(job_id, time.time() + LOOK_S)
            return
        notice = await self._notices.notice(job_id)
        if record is not None:
            line = await self._log.last(job_id)
            if line is not None:  # kept, unless it is
                await self._notices.ended(job_id, record, line)
                notice = await self._notices.notice(job_id)
        if notice is None or notice.body is None:
            await self._notices.forget(job_id)
            return
        await self._notices.address(job_id, [webhook.name for webhook in self._wanting(notice)])

    def _wanting(self, notice: Notice) -> list[Webhook]:
        """Those that have not been told."""
        return [
            webhook
            for webhook in self._by_name.values()
            if webhook.wants(notice.type, notice.tenant) and notice.tries.get(webhook.name, 0) >= 0
        ]

    async def _tell(self, client: httpx.AsyncClient, job_id: str, name: str) -> None:
        notice = await self._notices.notice(job_id)
        webhook = self._by_name.get(name)
        if notice is None or notice.body is None or webhook is None or notice.tries.get(name, 0) < 0:
            await self._notices.forget(job_id, name)
            return
        tries = notice.tries.get(name, 0) + 1
        result = await self._call(client, webhook, notice.id, notice.body, job_id)
        if result == "failed" and tries > len(RETRIES_S):
            result = "given_up"
            _log.error("webhook %s is given up", name, extra={"job_id": job_id})
        self._results[result] += 1
        if result == "failed":
            delay_s = RETRIES_S[tries - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311 - jitter
            await self._notices.tried(job_id, name, tries, again_at=time.time() + delay_s)
        else:
            others = [other for other in self._wanting(notice) if other is not webhook]
            await self._notices.done(job_id, name, is_last=not others)

    @staticmethod
    async def _call(
        client: httpx.AsyncClient, webhook: Webhook, notice_id: str, body: bytes, job_id: str
    ) -> str:
        """One of `_RESULTS`, but for the last."""
        status: int | None = None
        why = ""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                headers = webhook.headers(notice_id, int(time.time()), body)
                async with client.stream("POST", webhook.url, content=body, headers=headers) as response:
                    status = response.status_code
                    with suppress(httpx.HTTPError):  # the status says enough
                        await _read_some(response)
        except TimeoutError:
            why = "no answer in time"
        except httpx.HTTPError as error:
            why = type(error).__name__
        if status is not None and 200 <= status < 300:
            return "delivered"
        # Not its address: that is often a secret.
        _log.warning("webhook %s: %s", webhook.name, status or why, extra={"job_id": job_id})
        return "gone" if status == 410 else "failed"


async def _read_some(response: httpx.Response) -> None:
    """A small answer to its end, so that the connection can be used again; of a large one no more."""
    size = 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            return
