"""The parking of a worker process: messages go out when they are due, on virtual time."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from deltawire.background import in_background
from deltawire.errors import WireError
from deltawire_worker.parking import DRAIN_TIMEOUT_S, Parking
from tests.support.virtual_time import virtual_time


@pytest.fixture(autouse=True)
def _threads_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time does not wait for a thread."""

    async def to_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return function(*args, **kwargs)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)


class Broker:
    """Takes messages, but for those that it is told to refuse first."""

    def __init__(self, refuse: int = 0) -> None:
        self.sent: list[tuple[float, str, dict[str, Any]]] = []
        self._refuse = refuse
        self._loop = asyncio.get_running_loop()

    def send(self, job_id: str, **message: Any) -> None:
        if self._refuse:
            self._refuse -= 1
            raise WireError("queue_unavailable", "away")
        self.sent.append((round(self._loop.time()), job_id, message))


@virtual_time
async def test_messages_go_out_when_they_are_due() -> None:
    """In the order of their times, whatever the order in which they came, with what they had besides."""
    broker = Broker()
    parking = Parking(broker)
    async with in_background(parking.keep()):
        parking.put("late", 30)
        parking.put("soon", 10, link=[1])
        await asyncio.sleep(5)
        parking.put("next", 2)
        await asyncio.sleep(60)
        parking.put("last", 1)
        await asyncio.sleep(5)
    assert broker.sent == [(7, "next", {}), (10, "soon", {"link": [1]}), (30, "late", {}), (66, "last", {})]
    assert len(parking) == 0


@virtual_time
async def test_a_broker_that_is_away_is_asked_again() -> None:
    """Once a second; nothing is lost."""
    broker = Broker(refuse=3)
    parking = Parking(broker)
    async with in_background(parking.keep()):
        parking.put("job", 10)
        await asyncio.sleep(20)
    assert broker.sent == [(13, "job", {})]


@virtual_time
async def test_a_drain_sends_all_at_once() -> None:
    """Whoever takes one too early parks it."""
    broker = Broker()
    parking = Parking(broker)
    for n in range(5):
        parking.put(f"job-{n}", 100 - n)
    await parking.drain()
    assert sorted(job_id for _, job_id, _ in broker.sent) == [f"job-{n}" for n in range(5)]
    assert {at for at, _, _ in broker.sent} == {0}


@virtual_time
async def test_a_drain_without_a_broker_is_short() -> None:
    """Sweepers find the jobs when they are due."""
    parking = Parking(Broker(refuse=99))
    parking.put("job", 100)
    await parking.drain()
    assert asyncio.get_running_loop().time() <= DRAIN_TIMEOUT_S
    assert len(parking) == 1


@virtual_time
async def test_a_message_whose_sending_was_cut_short_is_still_there() -> None:
    """The drain sends it; twice is harmless, never is not."""
    broker = Broker()
    parking = Parking(broker)
    parking.put("job", 0)
    keeping = asyncio.create_task(parking.keep())
    await asyncio.sleep(0)
    keeping.cancel()
    await asyncio.wait([keeping])
    await parking.drain()
    assert [job_id for _, job_id, _ in broker.sent][-1] == "job"
