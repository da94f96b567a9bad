"""The virtual clock keeps the promises that other tests lean on."""

import asyncio
import time

import pytest

from tests.support.virtual_time import WaitsForEverError, run, virtual_time


@virtual_time
async def test_an_hour_of_waiting_costs_milliseconds() -> None:
    """Sleeping moves the loop's clock by exactly that much, and hardly any real time passes."""
    loop, began = asyncio.get_running_loop(), time.perf_counter()
    assert loop.time() == 0.0
    for _ in range(240):
        await asyncio.sleep(15)
    assert loop.time() == pytest.approx(3600)
    assert time.perf_counter() - began < 60


@virtual_time
async def test_timers_fire_in_the_order_of_their_time() -> None:
    """Timers fire by their time, whatever the order in which they were set, each at its own moment."""
    loop = asyncio.get_running_loop()
    fired: list[tuple[str, float]] = []

    def note(name: str) -> None:
        fired.append((name, loop.time()))

    for name, delay in (("c", 90_000.0), ("a", 0.001), ("b", 60.0)):
        loop.call_later(delay, note, name)
    await asyncio.sleep(100_000)
    assert [name for name, _ in fired] == ["a", "b", "c"]
    assert [at for _, at in fired] == pytest.approx([0.001, 60.0, 90_000.0])


@virtual_time
async def test_time_stands_while_something_is_ready() -> None:
    """The clock does not move while callbacks are ready, however many loop steps they take."""
    loop = asyncio.get_running_loop()
    loop.call_later(0.001, lambda: None)
    for _ in range(1_000):
        await asyncio.sleep(0)
    assert loop.time() == 0.0


@virtual_time
async def test_time_outs_are_virtual() -> None:
    """asyncio.timeout ends a wait at its virtual deadline."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(600):
            await asyncio.Event().wait()
    assert asyncio.get_running_loop().time() == pytest.approx(600)


def test_a_wait_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that waits with no deadline and no one to wake it fails the test instead of hanging it."""
    monkeypatch.setattr("tests.support.virtual_time.THREAD_TIMEOUT_S", 0.01)

    async def hang() -> None:
        await asyncio.Event().wait()

    with pytest.raises(WaitsForEverError):
        run(hang())


@virtual_time
async def test_no_time_passes_while_a_thread_is_at_work() -> None:
    """However slow it is: a timer that is set meanwhile is not its deadline."""
    async with asyncio.timeout(0.001):
        await asyncio.to_thread(time.sleep, 0.1)
        assert asyncio.get_running_loop().time() == 0


@virtual_time
async def test_threads_still_report_back() -> None:
    """The result of an executor's thread arrives, though no timer is set."""
    assert await asyncio.to_thread(lambda: 7) == 7
