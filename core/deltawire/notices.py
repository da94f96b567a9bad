"""Ends that webhooks are to hear of: noted before they can come, kept when they do (PROTOCOL.md §3.1).

A job is noted before its record is written and looked at once in a while from then on, so an end is found
whoever wrote it, and whoever died right after. Who writes an end keeps what is to be told of it, since the
record may expire, or be deleted, before the last try; else whoever looks does.
"""

import time
from typing import Any, Final

import msgspec

from .codec import decode
from .events import TerminalEvent
from .job_object import job_object
from .keys import INDEX_TTL_S, Keys
from .record import Record
from .scripts import DUE, KEEP, MARK, NOTE, Scripts

LOOK_S: Final = 60.0
"""How often a job is looked at while it runs: an end that nobody could keep is told so late."""
LEASE_S: Final = 30
"""How long who takes an entry has for it; then somebody else takes it."""
BATCH: Final = 50
BODY: Final = "body"
_SEPARATOR: Final = "/"  # neither in the id of a job nor in the name of a webhook


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be told of one job's end. `id` is the same in every try; `body` is gone when all know."""

    id: str
    type: str
    tenant: str
    body: bytes | None
    tries: dict[str, int]
    """How often each webhook was called, by name; -1: that one is done with."""


class Notices:
    """Raises RedisUnavailableError."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._redis = scripts
        self._keys = keys

    async def expect(self, job_id: str, at: float) -> None:
        """Before a record is written, or a job claimed: look at it at that Unix time."""
        await self._add(at, job_id)

    async def ended(self, job_id: str, record: Record, line: bytes) -> None:
        """After a job's end was written, or found: `line` is its terminal event. Can be repeated."""
        event = decode(line)
        if not isinstance(event, TerminalEvent):
            return
        record = msgspec.structs.replace(record, status=event.status, attempt=event.attempt)
        kind = f"job.{event.status}"
        body = {
            "type": kind,
            "timestamp": _iso(event.created_at),
            "data": job_object(job_id, record, event.sequence_number, event),
        }
        await self._redis.run(
            KEEP,
            (self._keys.webhook(job_id),),
            *(INDEX_TTL_S, f"msg_{job_id}_{round(event.created_at * 1000)}"),
            *("type", kind, "tenant", record.tenant, BODY, msgspec.json.encode(body)),
        )
        await self._add(time.time(), job_id)

    async def due(self) -> tuple[int, list[tuple[str, str]]]:
        """How many wait in all; and those that are due, as (job, webhook), the caller's for LEASE_S.

        A job without a webhook's name is to be looked at.
        """
        count, names = await self._redis.run(DUE, (self._keys.webhooks,), LEASE_S, BATCH, INDEX_TTL_S)
        pairs = (name.decode().partition(_SEPARATOR) for name in names)
        return count, [(job_id, webhook) for job_id, _, webhook in pairs]

    async def notice(self, job_id: str) -> Notice | None:
        """What is kept of a job's end."""
        reply: Any = await self._redis.execute("HGETALL", self._keys.webhook(job_id))
        fields = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
        if not fields:
            return None
        known = {name.decode(): value for name, value in fields.items()}
        return Notice(
            id=known.pop("id").decode(),
            type=known.pop("type").decode(),
            tenant=known.pop("tenant").decode(),
            body=known.pop(BODY, None),
            tries={name.removeprefix(_SEPARATOR): int(value) for name, value in known.items()},
        )

    async def address(self, job_id: str, webhooks: list[str]) -> None:
        """The job's end is for these, now; the job itself need not be looked at any more."""
        if webhooks:
            names = (f"{job_id}{_SEPARATOR}{webhook}" for webhook in webhooks)
            await self._add(time.time(), *names, moves=False)  # one may be being called just now
        else:
            await self._redis.execute("HDEL", self._keys.webhook(job_id), BODY)
        await self.forget(job_id)

    async def tried(self, job_id: str, webhook: str, tries: int, *, again_at: float) -> None:
        """It has been called `tries` times, without success."""
        await self._mark(job_id, webhook, tries)
        await self._add(again_at, f"{job_id}{_SEPARATOR}{webhook}")

    async def put_off(self, due: list[tuple[str, str]], at: float) -> None:
        """What `due` has answered is not dealt with now, but is due again at that Unix time."""
        await self._add(at, *(f"{job_id}{_SEPARATOR}{name}" if name else job_id for job_id, name in due))

    async def done(self, job_id: str, webhook: str, *, is_last: bool) -> None:
        """It need not be called any more; `is_last`: nobody else is to be, either."""
        await self._mark(job_id, webhook, -1, BODY if is_last else "")
        await self.forget(job_id, webhook)

    async def forget(self, job_id: str, webhook: str = "") -> None:
        """The job, or its call of one webhook, is looked at no more."""
        name = f"{job_id}{_SEPARATOR}{webhook}" if webhook else job_id
        await self._redis.execute("ZREM", self._keys.webhooks, name)

    async def _mark(self, job_id: str, webhook: str, tries: int, unneeded: str = "") -> None:
        field = f"{_SEPARATOR}{webhook}"
        await self._redis.run(MARK, (self._keys.webhook(job_id),), INDEX_TTL_S, field, tries, unneeded)

    async def _add(self, at: float, *names: str, moves: bool = True) -> None:
        how = "CH" if moves else "NX"
        await self._redis.run(NOTE, (self._keys.webhooks,), INDEX_TTL_S, at, how, *names)


def _iso(at: float) -> str:
    """RFC 3339, in UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    return f"{whole}.{int(at % 1 * 1e6):06d}Z"
