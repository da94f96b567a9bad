"""What one connection may hold, and how long it may stand still: the same for all that the relay serves."""

import asyncio
import socket
from collections.abc import Iterator
from typing import ClassVar, Final

from prometheus_client.core import Metric

from deltawire.metrics import counter_family

MAX_UNSENT_BYTES: Final = 16_384
STALLED_TIMEOUT_S: Final = 30.0


def limit_buffers(transport: asyncio.Transport) -> None:
    """Nothing is written while something waits: what a subscriber does not take waits in the log.

    So the transport holds one batch (`tail.py`), and the kernel MAX_UNSENT_BYTES besides what is on its way
    to the peer. It would take megabytes for a peer that reads slowly, and hide that it does.
    """
    transport.set_write_buffer_limits(0)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux, macOS
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in {socket.AF_INET, socket.AF_INET6}:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)


class StallWatch:
    """Drops a connection whose peer takes no byte for STALLED_TIMEOUT_S. It comes back from its position.

    `start` when the transport says `pause_writing`, `stop` at `resume_writing` and `connection_lost`, and
    `wrote` what is written in between.
    """

    dropped: ClassVar[int] = 0
    """By all of this process: each lives for moments, and knows nobody."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = 0  # bytes, if the peer has taken none since the timer was set

    def start(self) -> None:
        self._waiting = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(STALLED_TIMEOUT_S, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wrote(self, count: int) -> None:
        self._waiting += count

    def _check(self) -> None:
        if self._transport.get_write_buffer_size() >= self._waiting:
            StallWatch.dropped += 1
            # No last word would get through either.
            self._transport.abort()
        else:
            self.start()


class Stalls:
    """Tells how many connections stall watches have dropped."""

    def collect(self) -> Iterator[Metric]:
        yield counter_family(
            "deltawire_slow_clients_dropped_total",
            f"Connections whose client took no byte for {STALLED_TIMEOUT_S:.0f} s.",
            StallWatch.dropped,
        )
