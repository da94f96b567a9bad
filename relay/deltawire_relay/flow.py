"""What one connection may hold, and how long it may stand still: the same for all that the relay serves."""

import asyncio
import socket
from typing import Final

# A subscriber is a position, so what waits here waits in the log as well: the less the better. A batch
# (`tail.py`) may come on top of WRITE_HIGH.
WRITE_HIGH: Final = 16_384
WRITE_LOW: Final = 4_096
STALLED_TIMEOUT_S: Final = 30.0


def limit_buffers(transport: asyncio.Transport) -> None:
    """Bounds what waits in the transport, and in the kernel beyond what is on its way to the peer.

    Without the latter the kernel takes megabytes for a peer that reads slowly, and hides that it does.
    """
    transport.set_write_buffer_limits(WRITE_HIGH, WRITE_LOW)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux, macOS
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in {socket.AF_INET, socket.AF_INET6}:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, WRITE_HIGH)


class StallWatch:
    """Drops a connection whose peer takes no byte for STALLED_TIMEOUT_S. It comes back from its position.

    `start` when the transport says `pause_writing`, `stop` at `resume_writing` and `connection_lost`.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        size = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(STALLED_TIMEOUT_S, self._check, size)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, size: int) -> None:
        if self._transport.get_write_buffer_size() >= size:
            # No last word would get through either.
            self._transport.abort()
        else:
            self.start()
