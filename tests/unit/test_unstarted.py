"""Jobs whose messages a worker drops: revoked, or past their `expires` (PROTOCOL §1.1)."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deltawire.errors import RedisUnavailableError
from deltawire_worker.generate import Generator


async def test_one_that_cannot_be_cancelled_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for the answer, so whoever looks for the job finds out by its line in the log."""

    async def cancel(*_: Any, **__: Any) -> None:
        raise RedisUnavailableError("no answer from Redis in time")

    generator = SimpleNamespace(_log=SimpleNamespace(cancel=cancel))
    with caplog.at_level(logging.WARNING):
        await Generator.cancel_unstarted(cast(Generator, generator), "job")
    (line,) = caplog.records
    assert (line.levelname, getattr(line, "job_id", "")) == ("WARNING", "job")
