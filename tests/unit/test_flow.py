"""A peer that takes nothing is dropped, one that takes a little is not (PROTOCOL §4.7)."""

import asyncio

import pytest

from deltawire_relay.flow import STALLED_TIMEOUT_S, StallWatch
from tests.support.virtual_time import virtual_time


class FakeTransport(asyncio.Transport):
    """Bytes that wait, as many as the test says."""

    waiting = 1_000
    is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize(("taken", "written"), [(0, 0), (0, 500), (1, 0), (1, 500), (400, 5_000)])
def test_only_what_the_peer_takes_counts(taken: int, written: int) -> None:
    """However much is written to it in the meantime."""

    @virtual_time
    async def check() -> None:
        transport = FakeTransport()
        watch = StallWatch(transport)
        watch.start()
        for _ in range(3):
            await asyncio.sleep(STALLED_TIMEOUT_S / 2)
            watch.wrote(written)
            transport.waiting += written - taken
        assert transport.is_aborted is (taken == 0)
        watch.stop()

    check()


@virtual_time
async def test_a_peer_that_has_taken_all_is_not_watched() -> None:
    """Until the transport says again that something waits."""
    transport = FakeTransport()
    watch = StallWatch(transport)
    watch.start()
    watch.stop()
    await asyncio.sleep(10 * STALLED_TIMEOUT_S)
    assert not transport.is_aborted
