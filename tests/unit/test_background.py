"""What goes on in the background ends with its service, and not unheard before."""

import asyncio

import pytest

from deltawire.background import in_background
from tests.support.virtual_time import virtual_time


@virtual_time
async def test_all_have_ended_when_it_is_left() -> None:
    """Their clean-up included, also where the service fails."""
    ended: list[str] = []

    async def serve() -> None:
        async with in_background(go_on("a"), go_on("b")):
            await asyncio.sleep(1)
            raise ZeroDivisionError

    async def go_on(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            ended.append(name)

    with pytest.raises(ZeroDivisionError):
        await serve()
    assert sorted(ended) == ["a", "b"]


@virtual_time
async def test_one_that_fails_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """The others go on."""
    beats = 0

    async def fail() -> None:
        raise ZeroDivisionError

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(1)
            beats += 1

    async with in_background(fail(), beat()):
        await asyncio.sleep(3.5)
        assert "fail goes on no more" in caplog.text
        assert beats == 3
