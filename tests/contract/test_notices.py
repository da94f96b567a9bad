"""What the notes for webhooks promise, on each kind of Redis (PROTOCOL.md §3.1)."""

import json
import time
from typing import Any

import pytest

from deltawire import notices as module
from deltawire.codec import encode
from deltawire.events import Completed, Timings
from deltawire.keys import INDEX_TTL_S
from deltawire.notices import Notices
from deltawire.options import Options
from deltawire.record import Record
from tests.support.job_logs import OpenedLog, open_job_log, ttls

RECORD = Record(status="in_progress", attempt=1, created_at=5.0, tenant="acme", options=Options())


@pytest.fixture
def notices(job_log: OpenedLog) -> Notices:
    return Notices(job_log.scripts, job_log.keys)


def end(at: float = 7.25) -> bytes:
    return encode(
        Completed(
            job_id="job",
            sequence_number=3,
            attempt=2,
            created_at=at,
            completion={"choices": []},
            usage=None,
            usage_source="unavailable",
            timings=Timings(queued_s=0.0, first_delta_s=None, total_s=2.25),
        )
    )


async def due(notices: Notices) -> list[tuple[str, str]]:
    return sorted((await notices.due())[1])


async def test_what_is_due_is_taken_by_one_for_a_while(
    notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not due yet counts as waiting; what nobody has dealt with comes again."""
    now = time.time()
    await notices.expect("later", now + 600)
    await notices.expect("job", now - 1)
    monkeypatch.setattr(module, "LEASE_S", -1)  # it has run out at once
    assert await notices.due() == (2, [("job", "")])
    monkeypatch.undo()
    assert await notices.due() == (2, [("job", "")])
    assert await notices.due() == (2, [])
    await notices.forget("job")
    assert await notices.due() == (1, [])


async def test_an_end_is_kept_once_and_told_to_each(notices: Notices, job_log: OpenedLog) -> None:
    """What is told does not change; it goes when the last one knows, and the mark stays for two days."""
    await notices.ended("job", RECORD, end())
    await notices.ended("job", RECORD, end())
    assert await due(notices) == [("job", "")]
    notice = await notices.notice("job")
    assert notice is not None
    assert (notice.id, notice.type, notice.tenant) == ("msg_job_7250", "job.completed", "acme")
    body: dict[str, Any] = json.loads(notice.body or b"")
    assert body["timestamp"] == "1970-01-01T00:00:07.250000Z"
    assert (body["data"]["status"], body["data"]["attempt"]) == ("completed", 2)
    await notices.address("job", ["a", "b"])
    assert await due(notices) == [("job", "a"), ("job", "b")]
    await notices.address(
        "job", ["a", "b"]
    )  # by somebody who looks late: calls that are made stay as they are
    assert await due(notices) == []
    await notices.tried("job", "a", 1, again_at=time.time() - 1)
    await notices.done("job", "b", is_last=False)
    assert await due(notices) == [("job", "a")]
    notice = await notices.notice("job")
    assert notice is not None
    assert notice.tries == {"a": 1, "b": -1}
    await notices.done("job", "a", is_last=True)
    notice = await notices.notice("job")
    assert notice is not None
    assert (notice.body, notice.tries) == (None, {"a": -1, "b": -1})
    assert (await notices.due())[0] == 0
    left_s = await ttls(job_log)
    assert left_s
    assert all(INDEX_TTL_S - 60 < seconds <= INDEX_TTL_S for seconds in left_s.values())


async def test_an_end_that_nobody_wants(notices: Notices) -> None:
    """Nothing of it is kept but that it was."""
    await notices.ended("job", RECORD, end())
    await notices.address("job", [])
    notice = await notices.notice("job")
    assert notice is not None
    assert notice.body is None
    assert await notices.due() == (0, [])


async def test_another_job_of_the_same_id(notices: Notices) -> None:
    """Its end is another one, with nothing of what was done for the first."""
    await notices.ended("job", RECORD, end())
    await notices.address("job", ["a"])
    await notices.done("job", "a", is_last=True)
    await notices.ended("job", RECORD, end(at=99.0))
    notice = await notices.notice("job")
    assert notice is not None
    assert (notice.id, notice.tries) == ("msg_job_99000", {})
    assert notice.body is not None


async def test_what_has_gone_is_not_brought_back(notices: Notices, job_log: OpenedLog) -> None:
    """A mark on a notice that has expired makes no key without an end."""
    await notices.done("job", "a", is_last=True)
    assert await notices.notice("job") is None
    assert await ttls(job_log) == {}


async def test_ends_are_told_at_maxmemory(redis_url: str) -> None:
    """A worker claims and ends its jobs then, too; and what is told makes room."""
    async with open_job_log("server", redis_url) as log:
        notices = Notices(log.scripts, log.keys)
        await notices.expect("other", time.time() + 600)
        await log.client.config_set("maxmemory", "1")
        try:
            await notices.expect("job", time.time() - 1)
            await notices.ended("job", RECORD, end())
            assert await due(notices) == [("job", "")]
            await notices.address("job", ["a"])
            await notices.tried("job", "a", 1, again_at=time.time() - 1)
            assert await due(notices) == [("job", "a")]
            await notices.put_off([("job", "a")], time.time() - 1)
            assert await due(notices) == [("job", "a")]
            await notices.done("job", "a", is_last=True)
        finally:
            await log.client.config_set("maxmemory", "0")
        assert (await notices.due())[0] == 1
